"""Sphinx's settings for ``make docs``. The build asks nothing of the network."""

import contextlib
import importlib.metadata
import io
import os

from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

import segkernels
from segrlhf import cli, flags

project = "segkernels"
version = release = importlib.metadata.version("segkernels")
html_title = f"segkernels {version}"
html_show_copyright = False
html_theme = "furo"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88

# A name that a page or docstring refers to must be on some page, unless it is another project's.
nitpicky = True
OTHERS = (
    "torch numpy transformers datasets collections pathlib Tensor Dataset Path PreTrained\\w+ Ids"
)
nitpick_ignore_regex = [("py:class", rf"({OTHERS.replace(' ', '|')})\b.*")]


class Commands(SphinxDirective):
    """A section for every command of ``segrlhf``: what its ``--help`` prints."""

    def run(self) -> list[nodes.Node]:
        sections = []
        for name in flags.COMMANDS:
            section = nodes.section(ids=[nodes.make_id(name)], names=[name])
            section += nodes.title(text=name)
            section += nodes.literal_block(text=_help(name), language="none")
            sections.append(section)
        return sections


def _help(command: str) -> str:
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    if not out.getvalue().startswith("usage:"):
        raise ExtensionError(f"segrlhf {command} --help printed no usage, but {out.getvalue()!r}")
    return out.getvalue()


def _every_name_has_a_page(app, env) -> None:
    documented = env.domains["py"].objects
    for name in segkernels.__all__:
        if f"segkernels.{name}" not in documented:
            logging.getLogger(__name__).warning(
                "segkernels.%s: expected on a page of docs/api, got none; add it there", name
            )


def _link_names(app, doctree, docname: str) -> None:
    """Makes ``gae`` in a page or docstring a link to where it is described."""
    found = {}
    for full, entry in app.env.domains["py"].objects.items():
        package, *rooms, name = full.split(".")
        # Alone, names of other functions would be taken for other people's, as generate.
        if entry.objtype == "class" or (entry.objtype == "function" and package == "segkernels"):
            found[name] = entry
        for first in range(len(rooms) + 1):
            found[".".join([*[package, *rooms][first:], name])] = entry
    for literal in list(doctree.findall(nodes.literal)):
        entry = found.get(literal.astext())
        if entry is not None and not isinstance(literal.parent, nodes.reference):
            link = make_refnode(app.builder, docname, entry.docname, entry.node_id, [])
            literal.replace_self(link)
            link += literal


def setup(app) -> None:
    app.add_directive("commands", Commands)
    app.connect("env-check-consistency", _every_name_has_a_page)
    app.connect("doctree-resolved", _link_names)
