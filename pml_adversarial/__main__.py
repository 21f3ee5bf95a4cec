"""``python -m pml_adversarial``, also installed as ``pml-adversarial``."""

import sys


def main() -> None:
    """Runs the command line, or says how to install what it needs."""
    try:
        from .cli import main as command
    except ModuleNotFoundError as error:
        if error.name not in ("click", "matplotlib"):
            raise
        sys.exit(f"The command line needs {error.name}; install it with: pip install 'pml-adversarial[cli]'")
    command(prog_name="pml-adversarial")


if __name__ == "__main__":
    main()
