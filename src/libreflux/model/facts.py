"""What must be known of a model besides its weights: `libreflux.json`, and a table for known hub ids."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from libreflux import plainjson
from libreflux.errors import ModelError
from libreflux.files import atomic_write_json
from libreflux.printing import get_logger

logger = get_logger(__name__)

FACTS_FILE = "libreflux.json"
MOST_STEPS, MOST_TOKENS = 10_000, 8192
"""What a file may ask for: numbers beyond them are mistakes, or made to fill the memory."""
PADDINGS = ("drop", "trim", "bias", "keep")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts of one model, as in `libreflux.json`.

    Attributes:
        schema: version of this file's format, 1.
        text_padding: "drop", "trim", "bias" or "keep": how its text conditioning was trained.
        max_tokens: the most T5 tokens it reads, and the length padded to under all but "drop".
        steps: sampling steps it is used with by default.
        guidance: default guidance scale; the embedded one where `guidance_embeds`, else classifier-free guidance.
        shift: shift of the sigma ladder; None is FLUX.1-dev's rule, by the number of image tokens.
        guidance_embeds: it has the guidance embedding of a guidance-distilled model.
        licence: SPDX id or name; merges inherit it.
        lineage: base, adapters, hashes, steps: whatever the maker of the file knew.
        parts_from: folder beside its own that has the parts it lacks; None where it is whole.
    """

    schema: int = 1
    text_padding: str = "drop"
    max_tokens: int = 512
    steps: int = 28
    guidance: float = 3.0
    shift: float | None = 1.0
    guidance_embeds: bool = False
    licence: str = "unknown"
    lineage: dict[str, Any] = field(default_factory=dict)
    parts_from: str | None = None

    @property
    def cfg_scale(self) -> float:
        """Its own scale of classifier-free guidance: 1 for a model whose guidance is embedded."""
        return 1.0 if self.guidance_embeds else self.guidance

    @property
    def embedded_guidance(self) -> float | None:
        """What its guidance embedding is fed; None for a model without one."""
        return self.guidance if self.guidance_embeds else None

    def shift_at(self, image_tokens: int) -> float:
        """Shift of the sigma ladder for a picture of this many tokens."""
        from libreflux.flow.schedule import shift_for_tokens  # loads torch, which facts do without

        return shift_for_tokens(image_tokens) if self.shift is None else self.shift

    @staticmethod
    def from_dict(values: Any, where: object) -> Facts:
        """Checks and builds; raises ModelError naming the key."""
        hint = f"write it as libreflux does: {', '.join(_TYPES)}"
        if not isinstance(values, dict):
            raise ModelError("is not a JSON object", where=where, hint=hint)
        if values.get("schema") != 1:
            raise ModelError(f"schema {values.get('schema')!r} is not 1", where=where, hint="update libreflux")
        if unknown := sorted(set(values) - set(_TYPES)):
            raise ModelError(f"unknown key {unknown[0]!r}", where=where, hint=hint)
        if missing := [name for name in _TYPES if name not in values and name not in _OPTIONAL]:
            raise ModelError(f"key {missing[0]!r} is missing", where=where, hint=hint)
        for name, wanted in _TYPES.items():
            value = values.get(name)
            if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
                raise ModelError(f"{name} has the wrong type: {value!r}", where=where, hint=hint)
        facts = Facts(**values)
        facts._check_ranges(where)
        return facts

    def _check_ranges(self, where: object) -> None:
        checks = {
            "text_padding": self.text_padding in PADDINGS,
            "max_tokens": 1 <= self.max_tokens <= MOST_TOKENS,
            "steps": 1 <= self.steps <= MOST_STEPS,
            "guidance": math.isfinite(self.guidance) and self.guidance >= 0,
            "shift": self.shift is None or (math.isfinite(self.shift) and self.shift > 0),
            "parts_from": self.parts_from is None or _FOLDER.fullmatch(self.parts_from) is not None,
        }
        for name, good in checks.items():
            if not good:
                raise ModelError(
                    f"{name} cannot be {getattr(self, name)!r}", where=where, hint="see docs or hint the file"
                )


_TYPES: dict[str, Any] = {
    "schema": int,
    "text_padding": str,
    "max_tokens": int,
    "steps": int,
    "guidance": (int, float),
    "shift": (int, float, type(None)),
    "guidance_embeds": bool,
    "licence": str,
    "lineage": dict,
    "parts_from": (str, type(None)),
}
_OPTIONAL = ("parts_from",)
_FOLDER = re.compile(r"[A-Za-z0-9][\w.-]*")

_SCHNELL = Facts(text_padding="keep", max_tokens=256, steps=4, guidance=1.0, shift=1.0, licence="apache-2.0")
_DEV = Facts(
    text_padding="keep",
    max_tokens=512,
    steps=28,
    guidance=3.5,
    shift=None,
    guidance_embeds=True,
    licence="flux-1-dev-non-commercial-license",
)
_LIBREFLUX = Facts(text_padding="bias", max_tokens=512, steps=28, guidance=3.5, shift=1.0, licence="apache-2.0")

KNOWN: dict[str, Facts] = {
    "black-forest-labs/FLUX.1-schnell": _SCHNELL,
    "black-forest-labs/FLUX.1-dev": _DEV,
    "jimmycarter/LibreFLUX": _LIBREFLUX,
    "ostris/OpenFLUX.1": Facts(
        text_padding="keep", max_tokens=512, steps=30, guidance=3.5, shift=1.0, licence="apache-2.0"
    ),
}

_LOGIN = {"black-forest-labs/flux.1-dev"}


def known_facts(name: str) -> Facts | None:
    """The table's row for a hub id, in whatever case, perhaps `org/name@revision`; None for any other name."""
    rows = {hub_id.lower(): facts for hub_id, facts in KNOWN.items()}
    return rows.get(name.partition("@")[0].lower())


def needs_login(name: str) -> bool:
    """Whether a hub id is known to ask for a log-in and consent to its licence; others say so when they are asked."""
    return name.partition("@")[0].lower() in _LOGIN


def freed(facts: Facts) -> Facts:
    """What a model is used with once plain flow matching has trained it: 28 steps, guidance 3.5, 512 tokens.

    Only a few-step student changes (8 steps or fewer, drawn without guidance): its own defaults are those of its
    distillation, which the training undoes.
    """
    if facts.guidance_embeds or facts.steps > 8 or facts.guidance != 1.0:
        return facts
    return dataclasses.replace(facts, steps=28, guidance=3.5, max_tokens=max(facts.max_tokens, 512))


def trained_facts(facts: Facts, *, text_padding: str, guidance: float | None = None, distilled: bool = False) -> Facts:
    """What a model is, once it is trained: what its training sees, its adapter's file records and it is drawn with.

    Args:
        facts: of the base.
        text_padding: of the training.
        guidance: the embedded one that it is trained at, for a model that has one.
        distilled: trained as a student, which keeps the base's ladder and draws without guidance, instead of freed. It
            reads as many tokens as a freed model: captions are cached alike for both.
    """
    free = freed(facts)
    steps, own = (facts.steps, 1.0) if distilled else (free.steps, free.guidance)
    own = own if guidance is None else guidance
    return dataclasses.replace(free, text_padding=text_padding, steps=steps, guidance=own)


def read_facts(folder: Path) -> Facts:
    """The facts in a model folder's `libreflux.json`.

    Raises:
        ModelError: no such file, or one that is not ours.
    """
    path = folder / FACTS_FILE
    try:
        values = plainjson.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            "no such file", where=path, hint="open the model with open_model, which finds its facts"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"unreadable ({error})", where=path, hint="restore the file") from None
    return Facts.from_dict(values, path)


def write_facts(folder: Path, facts: Facts) -> None:
    """Writes `libreflux.json` into a model folder."""
    rows = dataclasses.asdict(facts)
    atomic_write_json(folder / FACTS_FILE, {k: v for k, v in rows.items() if v is not None or k not in _OPTIONAL})


def find_facts(name: str, folder: Path, *, guidance_embeds: bool, masked: bool = False) -> Facts:
    """The facts of a model: its own file, the table's row for a known hub id, or the nearest row with a notice.

    Args:
        name: as the user named it, perhaps `org/name@revision`.
        folder: where it is.
        guidance_embeds: as of its transformer's config: what tells dev from schnell.
        masked: its transformer is of the class that the published LibreFLUX weights name.
    """
    if (folder / FACTS_FILE).exists():
        return read_facts(folder)
    if (known := known_facts(name)) is not None:
        return known
    nearest, like = (_DEV, "FLUX.1-dev") if guidance_embeds else (_SCHNELL, "FLUX.1-schnell")
    if masked:
        nearest, like = dataclasses.replace(_LIBREFLUX, guidance_embeds=guidance_embeds), "LibreFLUX"
    logger.warning("%s has no %s: taken for a model like %s", name, FACTS_FILE, like)
    return nearest


def check_guided(facts: Facts, guided: bool, where: object, hint: str = "correct the file") -> None:
    """Raises ModelError unless the facts know whether the transformer has a guidance embedding."""
    if facts.guidance_embeds != guided:
        raise ModelError("guidance_embeds in libreflux.json is not the transformer's", where=where, hint=hint)


_TOLD = "_libreflux_facts"
_STORED_HUB_ID = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")


def tell_facts(transformer: Any, facts: Facts) -> None:
    """Keep a live transformer's facts on it for `facts_of`: diffusers hands parts on without them."""
    setattr(transformer, _TOLD, facts)


def facts_of(transformer: Any) -> Facts:
    """The facts of a live FLUX transformer: as told, as in the folder that it came from, or nearest with a notice.

    Args:
        transformer: one that diffusers loaded says by its configuration's `_name_or_path` from where.

    Raises:
        ModelError: facts in its folder that are not ours, or not its own.
    """
    if isinstance(told := getattr(transformer, _TOLD, None), Facts):
        return told
    guided = bool(transformer.config.guidance_embeds)
    came_from = str(transformer.config.get("_name_or_path") or "")
    place = Path(came_from or "a transformer of no known origin")
    folder = next((one for one in (place, place.parent) if came_from and (one / FACTS_FILE).is_file()), place)
    stored = _STORED_HUB_ID.search(came_from)
    name = f"{stored[1]}/{stored[2]}" if stored else str(place.parent if place.name == "transformer" else place)
    facts = find_facts(name, folder, guidance_embeds=guided)
    check_guided(facts, guided, folder, hint="correct the file, or pass facts")
    tell_facts(transformer, facts)  # whoever asks next hears no second notice
    return facts
