"""Sphinx: the pages of this folder, and the API reference from the installed package's docstrings.

Pages for reading are Markdown, which code hosts show as well. The reference is reStructuredText, for autodoc. Nothing
is fetched from the network.
"""

from importlib.util import find_spec

import fused_rnn
from fused_rnn.convert import TORCHS_OWN

project = "fused_rnn"
release = version = fused_rnn.__version__
author = "the fused_rnn authors"
html_title = f"fused_rnn {release}"
html_theme = "furo"
html_copy_source = html_show_sourcelink = html_show_copyright = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3  # links like performance.md#single-steps
default_role = "py:obj"  # `name` in a docstring is a link where the name is on these pages
autodoc_mock_imports = [
    name for name in ("lightning", "sb3_contrib", "tensordict", "torchrl") if find_spec(name) is None
]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_use_param = napoleon_use_keyword = napoleon_use_rtype = False  # "T, B: ..." describes two arguments
napoleon_use_ivar = True


def leave_out_torchs(app, what, name, obj, options, lines):
    """Drop torch.nn's own documentation from a class's docstring: it is on torch's pages, with links of its own."""
    if TORCHS_OWN in lines:
        del lines[lines.index(TORCHS_OWN) :]


def setup(app):
    app.connect("autodoc-process-docstring", leave_out_torchs, priority=1)  # before napoleon
