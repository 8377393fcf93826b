"""How the site is built: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent / "src")]

import libreflux  # noqa: E402

project = "libreflux"
author = "The libreflux authors"
copyright = "the libreflux authors, Apache-2.0"
version = release = libreflux.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "source_links",
    "generated",
]
exclude_patterns = ["_ext"]
html_theme = "furo"
html_title = f"libreflux {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_ambiguous"]

default_role = "literal"  # docstrings write `code` as Markdown does
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
add_module_names = False
nitpick_ignore_regex = [("py:.*", ".*")]  # types in signatures, mostly other packages'; links of pages are all checked
