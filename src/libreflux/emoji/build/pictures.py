"""Rebuild `emoji/pictures/` from the two npm packages it comes from, checked by hash.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    python -m libreflux.emoji.build.pictures FOLDER_WITH_THE_TWO_TGZ

Pictures: Microsoft Fluent emoji, 3D (MIT). Names: emojibase-data (MIT), derived from CLDR (Unicode-3.0).
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from libreflux.emoji.compose import PICTURES
from libreflux.errors import DataError

SIDE = 128
PACKAGES = {
    "lobehub-fluent-emoji-3d-1.1.0.tgz": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "emojibase-data-17.0.0.tgz": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}
NPM = {
    "lobehub-fluent-emoji-3d-1.1.0.tgz": "@lobehub/fluent-emoji-3d@1.1.0",
    "emojibase-data-17.0.0.tgz": "emojibase-data@17.0.0",
}


def wanted(text: str) -> Iterator[tuple[str, str, str]]:
    """(category, emojibase label, name) of each subject in `subjects.txt`."""
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            category, _, rest = line.partition(":")
            for item in rest.split(";"):
                label, _, name = (part.strip() for part in item.partition("="))
                yield category.strip(), label, name or label


def _package(folder: Path, name: str) -> tarfile.TarFile:
    path = folder / name
    if not path.is_file():
        raise DataError("package not found", where=path, hint=f"run `npm pack {NPM[name]}` in that folder")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != PACKAGES[name]:
        raise DataError(f"sha256 is {found}, not {PACKAGES[name]}", where=path, hint="fetch the pinned version again")
    return tarfile.open(path)


def build(folder: Path, out: Path = PICTURES) -> int:
    """Write `out/NAME.webp` (128 px, alpha) and `out/subjects.json`; returns the number of subjects."""
    fluent, base = (_package(folder, name) for name in PACKAGES)
    entries = json.load(base.extractfile("package/en/data.json"))  # type: ignore[arg-type]
    hexcode = {entry["label"]: entry["hexcode"].lower() for entry in entries}
    assets = {Path(member).stem: member for member in fluent.getnames() if member.endswith(".webp")}
    out.mkdir(parents=True, exist_ok=True)
    subjects = []
    for category, label, name in wanted((Path(__file__).parent / "subjects.txt").read_text(encoding="utf-8")):
        code = hexcode.get(label)
        member = code and (assets.get(code) or assets.get(code.replace("-fe0f", "")) or assets.get(f"{code}-fe0f"))
        if not member:
            raise DataError(f"no picture for {label!r}", where="subjects.txt", hint="use a label of emojibase-data")
        picture = Image.open(io.BytesIO(fluent.extractfile(member).read())).convert("RGBA")  # type: ignore[union-attr]
        picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        file = f"{name.replace(' ', '_')}.webp"
        picture.save(out / file, "WEBP", quality=85, alpha_quality=95, method=6)
        subjects.append({"name": name, "category": category, "file": file, "code": code})
    (out / "subjects.json").write_text(json.dumps({"schema": 1, "subjects": subjects}, indent=0) + "\n", "utf-8")
    return len(subjects)


if __name__ == "__main__":
    print(build(Path(sys.argv[1])), "subjects")
