"""What a probe measures and draws anew, and what it takes from an earlier one: by all that decides its numbers."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from libreflux.data import encode
from libreflux.errors import DataError
from libreflux.probing import run as probe_run
from libreflux.probing.context import ProbeContext
from libreflux.probing.drawing import Drawn, PictureBatch
from libreflux.probing.results import Measure
from libreflux.probing.section import Section, SectionResult
from libreflux.probing.settings import Settings
from libreflux.workflows import probe_measure
from libreflux.workflows.probe import probe
from tiny import DECIDING, UNDECIDING, change_json

CACHED = ("VAE", "VAE's configuration", "CLIP", "T5", "tokenizer", "tokens", "padding")
"""What decides the probe's cache."""
SECTIONS = ["pictures", "guidance", "steps", "diversity", "padding", "negative"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sections that are measured from here on, each without a model: which ones is what is asked."""
    names: list[str] = []

    def stub(section: Section) -> Section:
        row = Measure(name="x", at={}, subset="all", value=1.0, low=0.0, high=2.0, replicates=[1.0])

        def measure(context: ProbeContext) -> SectionResult:
            names.append(section.name)
            return SectionResult([row])

        return dataclasses.replace(section, measure=measure)

    for module in (probe_measure, encode):  # it collects garbage, which takes a third of a second
        monkeypatch.setattr(module, "release", lambda device: None)
    monkeypatch.setattr(probe_run, "SECTIONS", tuple(map(stub, probe_run.SECTIONS)))
    context = SimpleNamespace(transformer=SimpleNamespace(device=torch.device("cpu")), has_drawn=lambda wanted: False)
    monkeypatch.setattr(probe_measure, "open_context", lambda model, data, *rest: with_settings(context, data.settings))
    return names


def with_settings(context: Any, settings: Settings) -> Any:
    context.settings = settings
    return context


def test_a_measure_is_made_anew_when_anything_that_decides_it_changes(
    tiny_model_dir: Path, plain: Path, judge: Path, tmp_path: Path, measured: list[str]
) -> None:
    model, data, out = tmp_path / "model", tmp_path / "data", tmp_path / "out"
    shutil.copytree(tiny_model_dir, model)
    shutil.copytree(plain, data)

    def made(cached: bool = False, **changed: Any) -> list[str]:
        measured.clear()
        options = {"prompts": 3, "guidance": [1], "steps": [2, 4], "data": data, "out": out, "quick": True, **changed}
        if cached:  # the probe's own cache is of others, and not taken for theirs
            with pytest.raises(DataError, match="this cache was made with"):
                probe(str(model), **options)
            shutil.rmtree(out / "cache")
        probe(str(model), **options)
        return measured.copy()

    assert made() == SECTIONS
    assert made() == []
    for name, change in UNDECIDING.items():
        change(model)
        assert made() == [], name
    model, data = model.rename(tmp_path / "another model"), data.rename(tmp_path / "other data")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert made() == []
    finally:
        torch.set_num_threads(before)
    for name, change in DECIDING.items():
        change(model)
        assert made(name in CACHED) == SECTIONS, name
    assert made() == []
    others: list[dict[str, Any]] = [
        {"dtype": "bf16"},
        {"seed": 1},
        {"judge": judge},
        {"batch": 2},
        {"resolution": 48},
    ]
    for changed in others:
        assert made(**changed) == SECTIONS, changed
    change_json(model / "libreflux.json", guidance=2.0)
    assert made() == SECTIONS
    (data / "0.txt").write_text("something else")
    assert made() == SECTIONS
    assert made() == []


def test_what_a_model_draws_for_a_probe_is_drawn_anew_when_what_decides_it_changes(tmp_path: Path) -> None:
    wanted = PictureBatch(("a cat",), (0,), 1.0, 2)
    drawn = Drawn(torch.ones(1, 16, 4, 4), torch.ones(1), torch.ones(1))
    made: list[str] = []

    class Context(ProbeContext):
        def draw_batch(self, batch: PictureBatch) -> Drawn:
            made.append(self.identity)
            return drawn

    context = Context.__new__(Context)
    context.out = tmp_path
    context.identity, context.older_identity = "today", "then"
    assert not context.has_drawn(wanted)
    context.drawn(wanted), context.drawn(wanted)
    assert made == ["today"]
    assert context.has_drawn(wanted)
    context.identity, context.older_identity = "tomorrow", "today"  # as an older version named it: it is kept
    assert context.has_drawn(wanted)
    assert torch.equal(context.drawn(wanted).latents, drawn.latents)
    assert made == ["today"]
    context.identity = "next week"  # under its new name, so that no later change takes it for its own
    assert not context.has_drawn(wanted)
