"""Parts of self-contained HTML pages: style, frame, tables, and pictures inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #767672; --line: #d9d9d4; --box: #f4f4f1;
  --c0: #1f6fb4; --c1: #c4420a; --c2: #0a7f5c; --c3: #9a4a86; --c4: #8a6a00; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e6e6e2; --paper: #17181a; --faint: #9a9a94;
  --line: #3a3b3e; --box: #222326; --c0: #6db3f2; --c1: #ff9460; --c2: #4fd0a5; --c3: #e09acb; --c4: #dcc04a; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
img { max-width: 100%; height: auto; display: block; border-radius: 4px; }
pre { background: var(--box); padding: .8rem; overflow-x: auto; font-size: .85rem; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; }
td, th { padding: .2rem .9rem .2rem 0; vertical-align: top; }
.scroll { overflow-x: auto; } .numbers { font-size: .85rem; } .numbers td { border-top: 1px solid var(--line); }
.numbers td:nth-child(2) { min-width: 9rem; }
.numbers td.n, .numbers th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.faint, figcaption small { color: var(--faint); font-size: .85rem; }
.found { padding-left: 1.1rem; } .found li { margin: .5rem 0; } .found b { font-variant-numeric: tabular-nums; }
.grids { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 0 1.6rem; }
.grids > div { break-inside: avoid; }
.pictures { border-spacing: 4px; border-collapse: separate; table-layout: fixed; }
.pictures td, .pictures th { width: 6.2rem; }
.pictures td, .pictures th { padding: 0; font-size: .82rem; line-height: 1.25; }
.pictures th:first-child { width: 6.5rem; padding-right: .4rem; vertical-align: middle; }
.pictures img { width: 100%; } .pictures .faint { font-size: inherit; font-weight: 400; white-space: nowrap; }
.read { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; font-size: .82rem;
  line-height: 1.3; } .read img { width: 100%; outline: 1px solid var(--line); }
.pairs td, .pairs th { width: 9rem; padding: 0 .8rem .8rem 0; font-size: .85rem; line-height: 1.3; }
.pairs { margin-top: 1rem; } .pairs img { width: 100%; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.2rem; }
figure { margin: 0; break-inside: avoid; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 12px; }
.grid { stroke: var(--line); fill: none; } .level { stroke: var(--ink); stroke-dasharray: 1 3; fill: none; }
.line { fill: none; stroke: var(--c); stroke-width: 2; } .band { fill: var(--c); opacity: .15; }
circle { fill: var(--c); } circle.hollow { fill: var(--paper); stroke: var(--c); stroke-width: 1.5; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); } .s4 { --c: var(--c4); }
.legend { margin: .2rem 0; font-size: .85rem; } .legend span { margin-right: 1rem; white-space: nowrap; }
.key { width: 30px; height: 10px; margin-right: .35rem; vertical-align: middle; }
details { border-top: 1px solid var(--line); padding: .4rem 0; } summary { cursor: pointer; }
.look img { width: 11%; margin-right: .4rem; display: inline-block; }
@media (max-width: 40rem) { .pictures th:first-child { width: 5.2rem; }
  .pictures { width: 100%; } .pictures td, .pictures th { font-size: .72rem; width: auto; } }
@media print { body { margin: 0; max-width: none; font-size: 11pt; } tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""

ATTENTION_STYLE = """
.strip image { image-rendering: pixelated; } .strip text { font-size: 11px; }
.over { position: relative; background-size: 100% 100%; aspect-ratio: var(--shape); border-radius: 4px;
  overflow: hidden; } .over.map::before { content: ""; position: absolute; inset: 0; background: inherit;
  filter: grayscale(1); } .over img { position: absolute; inset: 0; width: 100%; height: 100%; }
.mark { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 3 2; }
.scale { display: inline-block; width: 9rem; height: .8rem; vertical-align: middle; margin: 0 .4rem; }
.verdict { font-size: 1.15rem; border-left: 4px solid var(--c1); padding-left: .9rem; }
.tokens { display: flex; flex-wrap: wrap; gap: 2px; margin: .6rem 0; }
.tokens label, .tokens span { padding: .1rem .3rem; border-radius: 3px; font-size: .85rem; white-space: pre; }
.tokens .pad { padding: .1rem 0; width: 9px; overflow: hidden; color: transparent !important; }
.tokens label { cursor: pointer; outline: 1px solid var(--line); }
.maps > figure { display: none; } input.pick { position: absolute; opacity: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(14rem, 100%), 1fr)); gap: .8rem;
  max-width: 52rem; } .pair small { display: block; } .change { max-width: 34rem; margin: 1rem 0; }
"""
"""Beside `STYLE`, of the page of `inspect attention`."""

SWEEP_STYLE = """
.verdict { font-size: 1.15rem; border-left: 4px solid var(--c1); padding-left: .9rem; }
.sheet { overflow-x: auto; } .sheet img { max-width: none; border-radius: 0; }
"""
"""Beside `STYLE`, of the page of `average --sweep`."""


def document(title: str, body: str) -> str:
    """A whole page that may load nothing from anywhere and run no script."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
{body}
</body></html>
"""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    """A table of plain texts; columns from `numbers_from` on are right-aligned."""

    def line(tag: str, cells: Sequence[str]) -> str:
        marks = ['class="n"' if index >= numbers_from else "" for index in range(len(cells))]
        return "".join(f"<{tag} {mark}>{escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="numbers"><tr>{line("th", heads)}</tr>{body}</table></div>'


def image(data: bytes, alt: str, kind: str = "png") -> str:
    """A picture inside the page."""
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def jpeg(picture: Image.Image, side: int, quality: int) -> bytes:
    """JPEG with full colour resolution, its longer side at most `side` pixels."""
    held, small = io.BytesIO(), picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(held, "JPEG", quality=quality, subsampling=0)
    return held.getvalue()
