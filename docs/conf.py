"""Sphinx: the API reference, made of the installed package's docstrings. No file is fetched from the network."""

import fused_rnn
from fused_rnn.convert import TORCHS_OWN

project = "fused_rnn"
release = version = fused_rnn.__version__
author = "the fused_rnn authors"
html_title = f"fused_rnn {release}"
html_theme = "furo"
html_copy_source = html_show_sourcelink = html_show_copyright = False

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
default_role = "py:obj"  # `name` in a docstring is a link where the name is on these pages
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_use_param = napoleon_use_keyword = napoleon_use_rtype = False  # "T, B: ..." describes two arguments
napoleon_use_ivar = True


def leave_out_torchs(app, what, name, obj, options, lines):
    """Of a class, what it adds to torch.nn's; torch's own documentation has the rest, and its own links."""
    if TORCHS_OWN in lines:
        del lines[lines.index(TORCHS_OWN) :]


def setup(app):
    app.connect("autodoc-process-docstring", leave_out_torchs, priority=1)  # before napoleon
