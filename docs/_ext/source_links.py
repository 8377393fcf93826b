"""Links names that stand as inline code to the lines that they mean; a name that means nothing is a warning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from docutils import nodes
from names import ROOT, UnknownNameError, locate
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

log = logging.getLogger(__name__)
HISTORY = ("log", "changelog")
"""Pages about the past: what they name may be gone."""


class SourceLinks(SphinxPostTransform):
    """Makes a link of each inline code that `names.locate` finds."""

    default_priority = 5
    formats = ("html",)

    def run(self, **_: Any) -> None:
        page = self.env.current_document.docname
        if page in HISTORY:
            return
        for node in list(self.document.findall(nodes.literal)):
            if isinstance(node.parent, nodes.reference):
                continue
            try:
                place = locate(node.astext())
            except UnknownNameError as error:
                log.warning("%s", error, location=node, type="source", subtype="name")
                continue
            if place is None or not (ROOT / place.file).is_file():
                continue
            self.env.source_pages.add(place.file)
            uri = self.app.builder.get_relative_uri(page, _page(place.file))
            link = nodes.reference("", "", internal=True, refuri=f"{uri}#line-{place.line}", classes=["source"])
            node.replace_self(link)
            link += node


def _page(file: str) -> str:
    return f"source/{file}"


def _begin(app: Sphinx) -> None:
    app.env.source_pages = set()


def _pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page of each file that some page links to."""
    for file in sorted(app.env.source_pages):
        try:
            lexer = get_lexer_for_filename(file)
        except ClassNotFound:
            continue
        style = HtmlFormatter(linenos="inline", lineanchors="line", anchorlinenos=True, wrapcode=True)
        body = highlight((ROOT / file).read_text("utf-8"), lexer, style)
        yield _page(file), {"title": file, "body": f"<h1>{file}</h1>{body}"}, "page.html"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", _begin)
    app.connect("html-collect-pages", _pages)
    app.add_post_transform(SourceLinks)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
