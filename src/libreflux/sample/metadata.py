"""What a PNG says of itself: an A1111-style `parameters` text for people, a `libreflux` JSON chunk for remaking it."""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from libreflux.errors import DataError
from libreflux.files import atomic_write_bytes

CHUNK = "libreflux"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How one picture was made.

    Attributes:
        schema: version of this format, 1.
        prompt, negative: the texts.
        seed: of this picture.
        steps: sampling steps.
        guidance: guidance scale.
        width, height: pixels.
        model: as the user named it.
        no_cfg_until: steps without guidance at the start.
        embedded_guidance: of a guidance-distilled model; None for others.
        dtype: of the transformer's weights.
        hashes: name (e.g. "transformer") to SHA-256.
        adapters: file, sha256 and weight of each adapter, in order.
        versions: package to version.
    """

    schema: int = 1
    prompt: str
    negative: str = ""
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    model: str
    no_cfg_until: int = 0
    embedded_guidance: float | None = None
    dtype: str = "float32"
    hashes: dict[str, str] = field(default_factory=dict)
    adapters: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def parameters(self) -> str:
        """The text that A1111-compatible viewers show."""
        lines = [self.prompt]
        if self.negative:
            lines.append(f"Negative prompt: {self.negative}")
        facts = {
            "Steps": self.steps,
            "Sampler": "Euler",
            "CFG scale": f"{self.guidance:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.model,
        }
        if "transformer" in self.hashes:
            facts["Model hash"] = self.hashes["transformer"][:10]
        if self.adapters:
            facts["Adapters"] = " ".join(f"{row['file']}:{row['weight']:g}" for row in self.adapters)
        facts["Version"] = f"libreflux {self.versions.get('libreflux', '?')}"
        lines.append(", ".join(f"{name}: {value}" for name, value in facts.items()))
        return "\n".join(lines)


def versions() -> dict[str, str]:
    """The packages that have a say in the pixels."""
    import diffusers
    import torch
    import transformers

    from libreflux import __version__

    return {
        "libreflux": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def png_bytes(image: Image.Image, origin: Origin | None = None) -> bytes:
    """The picture as PNG with its origin inside; equal pictures and origins give equal bytes (no time stamp)."""
    info = PngImagePlugin.PngInfo()
    if origin is not None:
        # As UTF-8 iTXt when the text is not Latin-1, which Pillow decides by itself.
        info.add_text("parameters", origin.parameters())
        info.add_text(CHUNK, json.dumps(dataclasses.asdict(origin), sort_keys=True))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info, compress_level=6)
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path, origin: Origin | None = None) -> None:
    """Writes `png_bytes` to `path` atomically, replacing what is there."""
    atomic_write_bytes(Path(path), png_bytes(image, origin))


def read_origin(path: Path) -> Origin:
    """How this picture was made.

    Raises:
        DataError: not a picture, or one that libreflux did not write.
    """
    try:
        with Image.open(path) as image:
            image.load()  # text chunks may follow the pixels
            text = getattr(image, "text", {}).get(CHUNK)
    except (OSError, SyntaxError) as error:
        raise DataError(f"not a readable picture ({error})", where=path, mend="give a PNG made by libreflux") from None
    if text is None:
        raise DataError("says nothing of how it was made", where=path, mend="give a PNG made by libreflux, unchanged")
    try:
        values: Any = json.loads(text)
        if values.get("schema") != 1:
            raise DataError(f"schema {values.get('schema')!r} is not 1", where=path, mend="update libreflux")
        return Origin(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"damaged origin ({error})", where=path, mend="give a PNG made by libreflux, unchanged"
        ) from None
