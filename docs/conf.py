"""How the documentation is built: ``python -m sphinx -W --keep-going -b html docs docs/_build``."""

import re

from pml_adversarial import __version__

project = "pml_adversarial"
author = "The pml_adversarial authors"
copyright = author  # the name that Sphinx asks for
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "matplotlib.sphinxext.plot_directive",  # pictures are made by code, anew with each build
]
exclude_patterns = ["_build", "example_plugin"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of dataclasses are then described once, in the class

autodoc_preserve_defaults = True  # 8 / 255 stays 8 / 255
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
default_role = "py:obj"  # `Plan` in a docstring is a link where there is something to link to

html_theme = "furo"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_title = f"pml_adversarial {release}"

copybutton_prompt_text = "$ "

plot_formats = ["svg"]
plot_html_show_formats = False
plot_html_show_source_link = False


def readable(app, name, source):
    """Comments directly above a table become its caption; numbers are not parted from their deviation."""
    captioned = re.sub(r"^<!-- (.*) -->\n(?=\|)", r"*\1*\n\n", source[0], flags=re.MULTILINE)
    source[0] = captioned.replace(" ± ", "\u00a0±\u00a0")


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", readable)
