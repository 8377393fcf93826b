"""What a model looks at while it draws: attention to each text token, and what changes without the padding."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libreflux.errors import OptionError
from libreflux.values import adapter_argument
from libreflux.workflows.adapters import result_name
from libreflux.workflows.inspect_attention_files import AttentionFolder
from libreflux.workflows.inspect_attention_options import InspectAttentionOptions, check_options
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.picture_options import adapter_texts, listed, named_model

__all__ = ["InspectAttentionOptions", "InspectAttentionResult", "inspect_attention", "inspect_attention_with"]

if TYPE_CHECKING:
    from PIL import Image

    from libreflux.model.text import TextConditioning
    from libreflux.probing.attention import AttentionWatcher, TextLayout
    from libreflux.probing.attention_found import AttentionFound
    from libreflux.probing.report.attention_page import PromptShown
    from libreflux.sample.encoding import Text
    from libreflux.sample.metadata import GenerationRecord
    from libreflux.workflows.drawing import AdaptedSource, DrawingSession

PLACE = Path("out/attention")
MOST_WORDS, MOST_PADDING = 48, 4
"""Tokens whose places in the picture are shown where nobody names any: of the prompt, and of the padding."""


@dataclass(frozen=True)
class InspectAttentionResult:
    """What was found, and where it is.

    Attributes:
        folder: of the result.
        page: an HTML page that shows it.
        file: the numbers, as JSON.
        told: what was found, in one sentence.
        prompts: what was found of each prompt.
    """

    folder: Path
    page: Path
    file: Path
    told: str
    prompts: tuple[AttentionFound, ...]


def inspect_attention_with(options: InspectAttentionOptions) -> InspectAttentionResult:
    """Draw pictures, and record how much of its attention each block's image tokens give to every text token.

    The pictures are those that `generate` draws without compiled blocks. Beside them the text is changed at the same
    latents, its padding taken out for one, and what becomes of the velocity and of the picture is measured.

    Raises:
        OptionError: a value out of range, or a token that no prompt has.
        RunError: a folder that cannot be written, or that has other files; a device that is not there.
        ModelError, AdapterError: see `generate_with`.

    Example::

        import libreflux

        prompt, less = "a fox on yellow", {"steps": 2, "max_tokens": 64}
        found = libreflux.inspect_attention("emoji-base", prompt, text_padding="keep", **less)
        print(found.told)
        print(found.prompts[0].padding_share, found.prompts[0].velocity["padding_removed"])
    """
    prompts = check_options(options)
    folder = AttentionFolder(Path(options.out) if options.out is not None else PLACE / _default_name(options))
    folder.check_place()

    from libreflux.files import lock
    from libreflux.probing.attention_found import sentence
    from libreflux.probing.report.attention_page import page
    from libreflux.workflows.drawing import open_for_drawing

    named = named_model(str(options.model), options.base, None if options.comfyui is None else str(options.comfyui))
    memory = options.offload, options.quantize, options.offload_blocks
    opened = open_for_drawing(
        named or str(options.model),
        adapter_texts(options.adapters),
        options.device,
        *memory,
        compile="off",  # attention of compiled blocks cannot be watched
        training_adapters=True,
    )
    own_padding = opened.facts.text_padding
    if options.text_padding is not None:
        opened = _padded(opened, options.text_padding)
    job = _Job(options, opened, prompts)
    with lock(folder.out):
        shown = list(job.run(folder, keep_record=opened.facts.text_padding == own_padding))
        told = sentence([one.found for one in shown])
        settings = job.settings(own_padding)
        text = page(shown, model=_name(options), settings={key: str(value) for key, value in settings.items()})
        folder.write(folder.page.name, text.encode("utf-8"))
        values = {"found": told, "settings": settings, "prompts": [one.found.as_json() for one in shown]}
        folder.finish(values)
    return InspectAttentionResult(folder.out, folder.page, folder.file, told, tuple(one.found for one in shown))


def places_of(word: str, layout: TextLayout) -> list[int]:
    """The text tokens that a user means: one by its number, or all that spell a word of the prompt."""
    if word.isascii() and word.isdigit():
        return [int(word)] if int(word) < len(layout.tokens) else []
    wanted, own, found = " ".join(word.split()).casefold(), layout.tokens[: layout.own], set[int]()
    for first in range(layout.own):
        for last in range(first + 1, min(layout.own, first + len(wanted) + 1) + 1):
            if " ".join("".join(own[first:last]).replace("▁", " ").split()).casefold() == wanted:
                found |= set(range(first, last))
    return sorted(found)


class _Job:
    """The pictures of all prompts, their records and what was changed."""

    def __init__(self, options: InspectAttentionOptions, opened: AdaptedSource, prompts: Sequence[str]) -> None:
        from libreflux.sample.encoding import Text
        from libreflux.workflows.generate import common_record

        self.options, self.opened = options, opened
        common = common_record(options.as_pictures(), opened)
        self.common = dataclasses.replace(common, model=str(options.model), seed=int(options.seed))
        self.records = [dataclasses.replace(self.common, prompt=prompt) for prompt in prompts]
        self.layouts = _layouts(opened, prompts, options.max_tokens)
        self.places = _chosen(options, prompts, self.layouts)
        self.empty = Text("", None, options.max_tokens)
        self.hashes: Mapping[str, str] = {}
        self.adapters: list[dict[str, Any]] = []

    def run(self, folder: AttentionFolder, *, keep_record: bool) -> Iterator[PromptShown]:
        padded = self._with_padding()
        session = self.opened.load([*self.records, dataclasses.replace(self.common, prompt="", guidance=1.0)])
        self.hashes, self.adapters = session.hashes, session.adapters
        folder.begin()  # an earlier result stays until all is loaded
        with self.options.progress("inspecting", "pass") as report:
            counter = _Counter(report, sum(self._passes(layout) for layout in self.layouts))
            for index, record in enumerate(self.records):
                yield self._one(folder, session, padded, index, session.stamped(record), counter, keep_record)

    def settings(self, own_padding: str) -> dict[str, Any]:
        """How it was recorded, by name."""
        common, facts = self.common, self.opened.facts
        padding = facts.text_padding
        return {
            "model": str(self.options.model),
            "transformer": self.hashes.get("transformer", ""),
            "adapters": ", ".join(f"{row['file']}:{row['weight']:g}" for row in self.adapters) or "none",
            "text padding": padding if padding == own_padding else f"{padding} (the model's own is {own_padding})",
            "tokens, at most": common.max_tokens or facts.max_tokens,
            "steps": common.steps,
            "guidance": common.guidance,
            "negative prompt": common.negative or "none",
            "size": f"{common.width} x {common.height}",
            "seed": common.seed,
            "quantized": common.quantize or "as stored",
        }

    def _one(
        self,
        folder: AttentionFolder,
        session: DrawingSession,
        padded: Mapping[Text, TextConditioning],
        index: int,
        record: GenerationRecord,
        counter: _Counter,
        keep_record: bool,
    ) -> PromptShown:
        from libreflux.probing.attention import AttentionWatcher
        from libreflux.probing.attention_found import found_in
        from libreflux.probing.report.attention_page import PromptShown
        from libreflux.sample.guidance import watched_passes
        from libreflux.sample.metadata import png_bytes
        from libreflux.workflows.drawing import texts_of

        layout, stem = self.layouts[index], f"{index + 1:02d}"
        text = texts_of(record)[0]
        altered = self._altered(session.texts, padded, text, layout)
        watcher = AttentionWatcher(session.pipe.transformer, layout, altered, record.steps, counter.add)
        with watched_passes(watcher):
            picture = session.draw(record, lambda step: counter.add())
        folder.write(f"{stem}.png", png_bytes(picture, record if keep_record else None))
        others: dict[str, Image.Image] = {}
        for name, other in altered.items():
            # Under a name of its own: the negative prompt stays, even where it is the same text.
            renamed = dataclasses.replace(record, prompt=f"{record.negative} {name}")
            changed = dataclasses.replace(session, texts={**session.texts, texts_of(renamed)[0]: other})
            others[name] = changed.draw(renamed, lambda step: counter.add())
            folder.write(f"{stem}-{name.replace('_', '-')}.png", png_bytes(others[name]))
        found = found_in(
            watcher.record,
            prompt=record.prompt,
            seed=record.seed,
            layout=layout,
            velocity=watcher.changes,
            pictures={name: _difference(picture, other) for name, other in others.items()},
        )
        folder.write(f"{stem}.safetensors", _tensors(watcher))
        return PromptShown(found, picture, self._where(watcher, found, index), others)

    def _where(self, watcher: AttentionWatcher, found: AttentionFound, index: int) -> dict[int, Any]:
        """Maps of the tokens that were chosen, or of the words and the padding that is read most."""
        layout, rows = found.layout, self.common.height // 16
        places = self.places[index]
        if places is None:
            padding = sorted(range(layout.own, len(layout.tokens)), key=lambda place: -found.tokens[place])
            places = sorted([*range(min(layout.own, MOST_WORDS)), *padding[:MOST_PADDING]])
        where = watcher.record.where
        # Copies: a view would keep the places of all tokens in memory until the page is written.
        return {place: where[:, place].reshape(len(where), rows, -1).clone().numpy() for place in places}

    def _altered(
        self,
        texts: Mapping[Text, TextConditioning],
        padded: Mapping[Text, TextConditioning],
        text: Text,
        layout: TextLayout,
    ) -> dict[str, TextConditioning]:
        from libreflux.probing.attention import altered_texts

        if not self.options.causal:
            return {}
        return altered_texts(texts[text], layout, texts[self.empty], padded.get(text))

    def _passes(self, layout: TextLayout) -> int:
        changed = 0
        if self.options.causal:
            regions = sum(name.startswith("padding_") for name in layout.regions)
            changed = 1 + (2 + regions if layout.padding else 1)
        return self.common.steps * (1 + 2 * changed)

    def _with_padding(self) -> Mapping[Text, TextConditioning]:
        """The prompts with padding, where the model sees none."""
        from libreflux.model.device_faults import explained
        from libreflux.workflows.drawing import FEWER_ENCODERS, texts_of

        if not self.options.causal or self.opened.facts.text_padding not in ("drop", "trim"):
            return {}
        texts = [texts_of(record)[0] for record in self.records]
        with explained(f"encoding the prompts on {self.opened.device}", FEWER_ENCODERS):
            found, _ = _padded(self.opened, "keep").encoded(texts)
        return found


class _Counter:
    """Tells a report of one pass more."""

    def __init__(self, report: Callable[[int, int], None], total: int) -> None:
        self.report, self.done, self.total = report, 0, total

    def add(self) -> None:
        self.done += 1
        self.report(self.done, self.total)


def _padded(opened: AdaptedSource, padding: str) -> AdaptedSource:
    """The same model with another text padding."""
    facts = dataclasses.replace(opened.facts, text_padding=padding)
    return dataclasses.replace(opened, source=opened.source.with_facts(facts))


def _layouts(opened: AdaptedSource, prompts: Sequence[str], max_tokens: int | None) -> list[TextLayout]:
    from libreflux.probing.attention import TextLayout

    tokenizer = opened.source.load_t5_tokenizer()
    limit = opened.facts.max_tokens if max_tokens is None else max_tokens
    found = []
    for prompt in prompts:
        ids = list(tokenizer(prompt, verbose=False).input_ids)
        ids = ids if len(ids) <= limit else [*ids[: limit - 1], tokenizer.eos_token_id]
        own = len(ids)
        if opened.facts.text_padding in ("keep", "bias"):
            ids += [tokenizer.pad_token_id] * (limit - own)
        found.append(TextLayout(tuple(tokenizer.convert_ids_to_tokens(ids)), own))
    return found


def _chosen(
    options: InspectAttentionOptions, prompts: Sequence[str], layouts: Sequence[TextLayout]
) -> list[list[int] | None]:
    """For each prompt the tokens that were asked for; None where nobody asked."""
    words = listed(options.tokens)
    if not words:
        return [None] * len(prompts)
    found = [sorted({place for word in words for place in places_of(word, layout)}) for layout in layouts]
    for word in words:
        if not any(places_of(word, layout) for layout in layouts):
            most = max(len(layout.tokens) for layout in layouts) - 1
            hint = f"use a word of a prompt, or a number from 0 to {most}"
            raise OptionError(f"no prompt has a token {word!r}", "tokens", hint=hint)
    return list(found)


def _difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of the values, of 255."""
    import numpy as np

    a, b = (np.asarray(each.convert("RGB"), np.float64) for each in (one, other))
    return float(np.abs(a - b).mean())


def _tensors(watcher: AttentionWatcher) -> bytes:
    from safetensors.torch import save

    record = watcher.record
    return save({"on_text": record.on_text, "on_image": record.on_image, "where": record.where})


def _name(options: InspectAttentionOptions) -> str:
    """The last part of the model's, and of "." the name of the folder that it is."""
    return Path(os.path.abspath(str(options.model))).name


def _default_name(options: InspectAttentionOptions) -> str:
    given = [adapter_argument(text)[0] for text in adapter_texts(options.adapters)]
    return result_name(str(options.model), [Path(path).expanduser() for path in given])


inspect_attention = by_keywords(InspectAttentionOptions, inspect_attention_with)
