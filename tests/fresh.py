"""Fresh environments, made without the network: what is heavy is seen through, what is installed comes first."""

import os
import subprocess
import sys
import sysconfig
import venv


class Environment:
    """A virtual environment in ``folder`` that also finds what the running Python has installed."""

    def __init__(self, folder):
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder = folder
        self.python = str(folder / "bin" / "python")
        (packages,) = folder.glob("lib/python*/site-packages")
        seen = sysconfig.get_path("purelib")
        (packages / "see_through.pth").write_text(f"import site; site.addsitedir({seen!r})\n", encoding="utf-8")

    def install(self, what):
        """Installs a folder, a wheel or an sdist, and nothing else."""
        options = ["--no-index", "--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
        run([sys.executable, "-m", "pip", "--python", self.python, "install", "--force-reinstall", *options, str(what)])

    def run(self, *arguments):
        """Runs its Python, away from the checkout, and gives what was printed."""
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return run([self.python, *map(str, arguments)], cwd=self.folder, env=own)


def run(command, **options):
    """Runs a command and gives what it printed; what it said goes into the error if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
