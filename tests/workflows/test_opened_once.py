"""Whatever a user wants done, each model is located, checked and told about once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import libreflux
from libreflux.emoji import compose
from libreflux.model.opening import FolderSource
from workflows.quick import measure_less


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each model has been opened."""
    found: Counter[str] = Counter()
    real = FolderSource.__init__

    def counted(self: FolderSource, name: str, *rest: Any) -> None:
        found[name] += 1
        real(self, name, *rest)

    monkeypatch.setattr(FolderSource, "__init__", counted)
    return found


@pytest.fixture
def watched(tiny_model_dir: Path, pictures: Path, tmp_path: Path) -> dict[str, Any]:
    """With sample sheets, held-out pictures, and captions that are encoded while training."""
    return {
        "model": str(tiny_model_dir),
        "base": "fp32",
        "data": [{"path": str(pictures)}],
        "held_out": {"path": str(compose.write_folder(tmp_path / "apart", 2, 7)), "every": 1, "sigmas": [0.5]},
        "resolution": 32,
        "text_cache": "none",
        "adapter": {"targets": [{"layers": "transformer_blocks.*.attn.**", "factor": 4}]},
        "steps": 1,
        "samples": {"every": 1, "at_start": True, "prompts": ["a red apple"], "guidance": [1]},
        "out": str(tmp_path / "run"),
    }


def test_drawing(opened: Counter[str], tiny_model_dir: Path, trained: Path, tmp_path: Path) -> None:
    model = str(tiny_model_dir)
    libreflux.generate("a fox", model=model, adapters=[str(trained)], steps=1, out=tmp_path / "a.png")
    assert opened == {model: 1}
    opened.clear()
    libreflux.remake(tmp_path / "a.png", adapters=[str(trained)])
    assert opened == {model: 1}
    opened.clear()
    libreflux.grid(["a fox", "an owl"], model=model, steps=[1, 2], out=tmp_path / "grid")
    assert opened == {model: 1}


def test_training_and_its_dry_run(opened: Counter[str], watched: dict[str, Any]) -> None:
    libreflux.dry_run(watched)
    assert opened == {watched["model"]: 1}
    opened.clear()
    libreflux.train(watched)
    assert opened == {watched["model"]: 1}
    opened.clear()
    libreflux.prepare(libreflux.Recipe.model_validate(watched))
    assert opened == {watched["model"]: 1}


def test_probing(
    opened: Counter[str], tiny_model_dir: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_less(monkeypatch)
    model = str(tiny_model_dir)
    numbers: dict[str, Any] = {"quick": True, "pictures": 2, "prompts": 2, "guidance": [1], "steps": [1]}
    libreflux.probe(model, against=model, data=str(pictures), out=str(tmp_path / "probe"), **numbers)
    assert opened == {model: 2}  # once as the model, once as what it is compared with


def test_new_files(opened: Counter[str], tiny_model_dir: Path, trained: Path, tmp_path: Path) -> None:
    model = str(tiny_model_dir)
    made: list[Callable[[], object]] = [
        lambda: libreflux.merge(model, adapters=[str(trained)], out=tmp_path / "merged"),
        lambda: libreflux.export(model, int8=True, out=tmp_path / "int8"),
        lambda: libreflux.export(model, program="bfl", out=tmp_path / "bfl.safetensors"),
    ]
    for make in made:
        make()
        assert opened == {model: 1}
        opened.clear()
