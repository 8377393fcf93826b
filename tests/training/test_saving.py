"""A checkpoint is written from the live state, tensor by tensor; a state that does not exist yet is one too."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from libreflux.errors import RunError
from libreflux.files import atomic_save_safetensors
from libreflux.model.stream import save_live
from libreflux.recipe import Recipe
from libreflux.training import checkpoint, saving
from libreflux.training.callbacks import Callbacks
from libreflux.training.live_bytes import LiveBytes
from libreflux.training.loop import open_for_training
from libreflux.training.optimizer8 import AdamW8bit
from libreflux.training.ranks import Ranks


def test_neither_device_nor_host_holds_a_second_copy_while_saving(
    recipe_tree: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = recipe_tree(tmp_path / "run", optimizer={"kind": "adamw_bf16", "learning_rate": 1e-3})
    training = open_for_training(Recipe.model_validate(tree), tmp_path / "run", None, Callbacks(), Ranks(), "cpu")
    training.take_step()
    state = {**training.adapter.state_dict(), **training.optimizer.state_dict_tensors(), **training.averages.tensors()}
    sizes = [tensor.nbytes for tensor in state.values()]
    training.run.mkdir()
    monkeypatch.setattr(Tensor, "cpu", Tensor.clone)  # as if each came from a card
    with checkpoint.Metrics(training.run, 0) as metrics, LiveBytes() as counted:
        saved = saving.save(training, metrics, Callbacks())
    assert max(sizes) <= counted.peak < 1.1 * max(sizes) < sum(sizes) / 20
    kept = [load_file(path) for path in (saved.adapter, saved.optimizer, saved.averages)]
    for name, tensor in state.items():
        assert any(name in file and file[name].equal(tensor) for file in kept), name


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of that name whose AdamW8bit keeps, as the real one does, state from the first step on."""

    class Fake(torch.optim.Optimizer):
        def __init__(self, parameters: Any, **defaults: Any) -> None:
            super().__init__(parameters, defaults)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    own = self.state[p]
                    if not own:
                        own |= {"step": 0, "state1": torch.zeros(p.shape, dtype=torch.uint8), "absmax1": torch.ones(1)}
                    own["step"] += 1
                    own["state1"] += 1
                    own["absmax1"].mul_(0.5).add_(p.grad.abs().max())
                    p.add_(p.grad.sign() * own["absmax1"], alpha=-group["lr"] / own["step"])

    module: Any = types.ModuleType("bitsandbytes")
    module.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    module.optim = types.SimpleNamespace(AdamW8bit=Fake)
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_8_bit_moments_that_do_not_exist_yet_are_resumed(bitsandbytes: None, tmp_path: Path) -> None:
    """Of a run whose steps so far were all skipped; and those that do exist, to the bit."""

    def made() -> tuple[list[tuple[str, nn.Parameter]], AdamW8bit]:
        rows = [(name, nn.Parameter(torch.full((4,), 0.5))) for name in ("a", "b")]
        return rows, AdamW8bit(rows)

    grads = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    through, whole = made()
    for grad in grads:
        whole.step(1e-2, grad)
    for done in (0, 2):
        rows, before = made()
        for grad in grads[:done]:
            before.step(1e-2, grad)
        path = tmp_path / f"{done}.safetensors"
        save_live(path, before.state_dict_tensors())
        second, after = made()
        with torch.no_grad():
            for (_, new), (_, old) in zip(second, rows, strict=True):
                new.copy_(old)
        after.load_state_tensors(load_file(path))
        for grad in grads[done:]:
            after.step(1e-2, grad)
        assert all(one.equal(other) for (_, one), (_, other) in zip(second, through, strict=True))
        state = after.state_dict_tensors()
        assert state.keys() == whole.state_dict_tensors().keys()
        assert len(state) == 6
        assert all(tensor.equal(state[name]) for name, tensor in whole.state_dict_tensors().items())
    half = {name: tensor for name, tensor in state.items() if name.startswith("a.")}
    atomic_save_safetensors(half, tmp_path / "half")
    with pytest.raises(RunError, match="optimizer state lacks b"):
        made()[1].load_state_tensors(load_file(tmp_path / "half"))
