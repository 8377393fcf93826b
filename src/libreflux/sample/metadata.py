"""What a PNG says of itself: an A1111-style `parameters` text for people, a `libreflux` JSON chunk for remaking it."""

from __future__ import annotations

import dataclasses
import io
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image, PngImagePlugin
from pydantic import TypeAdapter, ValidationError

from libreflux import plainjson
from libreflux.errors import DataError
from libreflux.files import atomic_write_bytes
from libreflux.places import did_you_mean
from libreflux.sample.checks import first_steps_argument
from libreflux.values import is_guided

CHUNK = "libreflux"
YOUNGER = (
    "guidance_rule",
    "apg_eta",
    "apg_radius",
    "apg_momentum",
    "zero_init",
    "nag",
    "nag_tau",
    "nag_alpha",
    "first_steps_from",
    "first_steps_guidance",
)
"""Fields that records had not at first; a picture says nothing of one that is as usual."""


@dataclass(frozen=True, kw_only=True)
class GenerationRecord:
    """How one picture was made.

    Attributes:
        schema: version of this format, 1.
        prompt, negative: the texts.
        prompt_2, negative_2: what T5 read instead; None is the same.
        max_tokens: T5's limit; None is the model's own.
        seed: of this picture.
        steps: sampling steps.
        sigmas: an own ladder of as many, before the model's shift; None is the even one.
        guidance: guidance scale.
        width, height: pixels.
        model: as the user named it.
        no_cfg_until: steps without guidance at the start.
        guidance_start, guidance_stop: the interval of guidance, as fractions of the steps.
        guidance_rescale: see `flow.guidance.rescale`.
        guidance_rule: see `sample.rules`; its numbers are None where the rule does not read them, and a radius of none.
        apg_eta, apg_radius, apg_momentum, zero_init: see there.
        nag, nag_tau, nag_alpha: see `sample.rules.Nag`.
        first_steps_from: "MODEL:N", who drew the first N steps; None is no other model.
        first_steps_guidance: its guidance scale.
        batch_cfg: True, False or "auto": how the passes were batched, which decides the last bits.
        tile: whether the VAE decoded in tiles; None is by size.
        embedded_guidance: of a guidance-distilled model; None for others.
        quantize: "int8" or "w8a8" where the transformer was quantised while it was read; None: as stored.
        compile: whether the transformer's blocks were compiled, which decides the last bits.
        batch: how many pictures were drawn together, which decides the last bits.
        dtype: of the transformer's weights; "int8, " and the dtype of its other tensors where its linears are int8.
        device: what computed it: the last bits are its own.
        hashes: name (e.g. "transformer") to SHA-256.
        adapters: file, sha256 and weight of each adapter, in order; and path, as the user named it (older ones: none).
        versions: package to version.
        below_one: whether a guidance between 0 and 1 was followed; a picture that does not say so was drawn with the
            prompt alone.
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
    prompt_2: str | None = None
    negative_2: str | None = None
    max_tokens: int | None = None
    sigmas: list[float] | None = None
    no_cfg_until: int = 0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    guidance_rescale: float = 0.0
    guidance_rule: Literal["cfg", "apg", "cfg-zero"] = "cfg"
    apg_eta: float | None = None
    apg_radius: float | None = None
    apg_momentum: float | None = None
    zero_init: int = 0
    nag: float = 0.0
    nag_tau: float | None = None
    nag_alpha: float | None = None
    first_steps_from: str | None = None
    first_steps_guidance: float | None = None
    batch_cfg: bool | Literal["auto"] = "auto"
    tile: bool | None = None
    embedded_guidance: float | None = None
    quantize: Literal["int8", "w8a8"] | None = None
    compile: bool = False
    batch: int = 1
    dtype: str = "float32"
    device: str = "unrecorded"
    hashes: dict[str, str] = field(default_factory=dict)
    adapters: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    below_one: bool = True

    @property
    def scale(self) -> float:
        """The guidance scale that was followed; 1 is none."""
        followed = is_guided(self.guidance) and (self.guidance > 1 or self.below_one)
        return self.guidance if followed else 1.0

    @property
    def passes(self) -> int:
        """Through the transformer, at most: guided steps take two."""
        first = 0 if self.first_steps_from is None else first_steps_argument(self.first_steps_from)[1]
        rest = self.steps - max(first, self.zero_init)
        return rest * (1 + is_guided(self.scale) + (self.nag > 0)) + first * (
            2 if is_guided(self.first_steps_guidance or 0) else 1
        )

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
        if self.sigmas is not None:
            facts["Sigmas"] = " ".join(f"{sigma:g}" for sigma in self.sigmas)
        if self.embedded_guidance is not None:
            facts["Distilled CFG scale"] = f"{self.embedded_guidance:g}"
        if is_guided(self.scale):
            facts |= self._guidance_parameters()
        if self.nag:
            facts |= {"NAG scale": f"{self.nag:g}", "NAG tau": f"{self.nag_tau:g}", "NAG alpha": f"{self.nag_alpha:g}"}
        if self.first_steps_from is not None:
            facts["First steps from"] = self.first_steps_from
            facts["First steps CFG scale"] = f"{self.first_steps_guidance:g}"
        for name, text in (("Prompt 2", self.prompt_2), ("Negative prompt 2", self.negative_2)):
            if text is not None:
                facts[name] = text
        if self.max_tokens is not None:
            facts["Max tokens"] = self.max_tokens
        if self.tile is not None:
            facts["Tiled VAE"] = self.tile
        if "transformer" in self.hashes:
            facts["Model hash"] = self.hashes["transformer"][:10]
        if self.quantize is not None:
            facts["Quantized"] = self.quantize
        if self.compile:
            facts["Compiled"] = True
        if self.adapters:
            facts["Adapters"] = " ".join(f"{row['file']}:{row['weight']:g}" for row in self.adapters)
        facts["Version"] = f"libreflux {self.versions.get('libreflux', '?')}"
        lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in facts.items()))
        return "\n".join(lines)

    def _guidance_parameters(self) -> dict[str, Any]:
        """What is not as usual: intervals of all steps, no rescale and automatic batches go without saying."""
        rule = {} if self.guidance_rule == "cfg" else {"Guidance rule": self.guidance_rule}
        return (
            rule
            | {
                name: f"{value:g}"
                for name, value, usual in (
                    ("No CFG until step", self.no_cfg_until, 0),
                    ("CFG start", self.guidance_start, 0),
                    ("CFG stop", self.guidance_stop, 1),
                    ("CFG rescale", self.guidance_rescale, 0),
                    ("APG eta", self.apg_eta, None),
                    ("APG radius", self.apg_radius, None),
                    ("APG momentum", self.apg_momentum, None),
                    ("Zero init", self.zero_init, 0),
                )
                if value != usual
            }
            | ({} if self.batch_cfg == "auto" else {"CFG in one pass": self.batch_cfg})
        )


def _quoted(value: object) -> str:
    """As JSON where A1111's and Civitai's readers of `name: value, name: value` would end it early or strip it."""
    text = str(value)
    plain = text and text == text.strip() and not any(sign in text for sign in ',:"\n\r')
    return text if plain else json.dumps(text, ensure_ascii=False)


def differences(was: GenerationRecord, now: GenerationRecord) -> list[str]:
    """What may give the same prompt and numbers other pixels, one line each: weights, adapters, versions, device."""
    rows = [(f"the {name}'s hash", was.hashes.get(name), now.hashes.get(name)) for name in was.hashes | now.hashes]
    for index in range(max(len(was.adapters), len(now.adapters))):
        one, other = (
            f"{row.get('file')}:{row.get('weight')} {str(row.get('sha256'))[:10]}" if row else None
            for row in (dict(enumerate(record.adapters)).get(index) for record in (was, now))
        )
        rows.append((f"adapter {index + 1}", one, other))
    rows += [(name, was.versions.get(name), now.versions.get(name)) for name in was.versions | now.versions]
    rows += [("the dtype", was.dtype, now.dtype), ("the device", was.device, now.device)]
    then, today = ("compiled" if record.compile else "plain" for record in (was, now))
    rows.append(("the network", then, today))
    if was.batch != now.batch:
        rows.append(("the batch", str(was.batch), str(now.batch)))
    return [f"{name} was {a or 'none'}, is {b or 'none'}" for name, a, b in rows if a != b]


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


def told_fields(record: GenerationRecord) -> dict[str, Any]:
    """A record as plain values, without younger fields that are as usual: older versions read the rest too."""
    usual = {field.name: field.default for field in dataclasses.fields(record) if field.name in YOUNGER}
    told = dataclasses.asdict(record)
    return {name: value for name, value in told.items() if name not in usual or value != usual[name]}


def png_bytes(image: Image.Image, record: GenerationRecord | None = None) -> bytes:
    """The picture as PNG with its record inside; equal pictures and records give equal bytes (no time stamp)."""
    info = PngImagePlugin.PngInfo()
    if record is not None:
        # As UTF-8 iTXt when the text is not Latin-1, which Pillow decides by itself.
        info.add_text("parameters", record.parameters())
        told = told_fields(record)
        for name, usual in (("compile", False), ("batch", 1)):
            if told[name] == usual:
                del told[name]
        if not 0 < record.guidance < 1:
            del told["below_one"]  # it says nothing there
        info.add_text(CHUNK, json.dumps(told, sort_keys=True))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info, compress_level=6)
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path, record: GenerationRecord | None = None) -> None:
    """Writes `png_bytes` to `path` atomically, replacing what is there."""
    atomic_write_bytes(Path(path), png_bytes(image, record))


def open_png(path: Path) -> Image.Image:
    """A PNG's pixels and texts. Other formats are not tried: Pillow starts programs for some.

    Raises:
        DataError: not a PNG, damaged, or made to fill the memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as image:
                image.load()  # text chunks may follow the pixels
                return image
    except FileNotFoundError:
        raise DataError("no such picture", where=path, hint=did_you_mean(path)) from None
    except Exception as error:  # Pillow meets bytes that it does not expect: the file is at fault
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"not a readable picture ({told})", where=path, hint="give a PNG made by libreflux") from None


def read_record(path: Path) -> GenerationRecord:
    """How this picture was made.

    Raises:
        DataError: not a PNG, or one that libreflux did not write.
    """
    text = open_png(path).info.get(CHUNK)
    if not isinstance(text, str):
        raise DataError("says nothing of how it was made", where=path, hint="give a PNG made by libreflux, unchanged")
    try:
        values: Any = plainjson.parse(text)
        if values.get("schema") != 1:
            raise DataError(f"schema {values.get('schema')!r} is not 1", where=path, hint="update libreflux")
        known = {field.name for field in dataclasses.fields(GenerationRecord)}
        if unknown := sorted(values.keys() - known):
            what = f"says {', '.join(unknown)}, which this version does not know"
            raise DataError(what, where=path, hint="update libreflux; it was made by a newer one")
        if "below_one" not in values and isinstance(scale := values.get("guidance"), int | float):
            values["below_one"] = not 0 < scale < 1  # as older versions drew
        return TypeAdapter(GenerationRecord).validate_python(values)
    except (ValueError, TypeError, AttributeError) as error:
        why = (
            "; ".join(f"{(*row['loc'], 'it')[0]}: {row['msg']}" for row in error.errors())
            if isinstance(error, ValidationError)
            else error
        )
        raise DataError(f"damaged record ({why})", where=path, hint="give a PNG made by libreflux, unchanged") from None
