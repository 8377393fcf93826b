"""On the page: pictures of prompts that quote a text, the best and the worst, with what was read in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from libreflux.probing.report import html
from libreflux.probing.results import Picture, Result

PURPOSE = "letters"


def files(results: Sequence[Result]) -> set[Path]:
    """The pictures that `section` shows."""
    return {_file(one, picture) for one in results for picture in _shown(one)}


def section(results: Sequence[Result], names: Sequence[str], sources: Mapping[Path, bytes]) -> str:
    """HTML of models whose pictures were read; "" if none were.

    Args:
        results: of the models.
        names: what they are called.
        sources: JPEG of each of `files`.
    """
    parts = []
    for one, name in zip(results, names, strict=True):
        if shown := _shown(one):
            cells = "".join(_cell(one, picture, sources) for picture in shown)
            scale = f"guidance {float(shown[0].at['guidance']):g}"
            parts.append(f'<h3>{escape(name)}, {scale}</h3><div class="read">{cells}</div>')
    if not parts:
        return ""
    explained = (
        "Pictures whose prompts quote a text, at the guidance where most letters are right: the best first, then the "
        "worst. Letters right: 1 − edit distance / letters of the quoted text, without regard to case, spaces and "
        "punctuation."
    )
    return f'<h2>Text in pictures</h2><p class="faint">{explained}</p>{"".join(parts)}'


def _shown(result: Result) -> list[Picture]:
    return [picture for picture in result.pictures if picture.purpose == PURPOSE]


def _file(result: Result, picture: Picture) -> Path:
    assert result.folder is not None
    return result.folder / picture.file


def _cell(result: Result, picture: Picture, sources: Mapping[Path, bytes]) -> str:
    at = picture.at
    image = html.image(sources[_file(result, picture)], str(at["prompt"]), "jpeg")
    read = f"“{escape(str(at['read']))}”" if at["read"] else "nothing"
    extra = f", {float(at['extra']):g} more" if at["extra"] else ""
    return (
        f"<figure>{image}<figcaption>{100 * float(at['letters']):.0f}\u00a0% of letters{extra}</figcaption>"
        f"asked for “{escape(str(at['text']))}”<br>read {read}"
        f'<br><span class="faint">{escape(str(at["prompt"]))}</span></figure>'
    )
