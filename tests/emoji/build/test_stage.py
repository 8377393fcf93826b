"""The build's optimiser against torch's, and its stages resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from libreflux.emoji.build.muon import Muon, orthogonalise
from libreflux.emoji.build.stage import Stage, cosine


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (1, 8, 8)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_scales(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    spread = s.clamp_min(0.1 * s.max())  # nothing near singular: a few steps cannot lift that
    found = orthogonalise(u @ torch.diag_embed(spread) @ vh).double()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.4
    assert values.max() < 1.4
    rotated = u.mT @ found @ vh.mT
    off = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 0.05


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_muon_follows_torchs(shape: tuple[int, int]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own = Muon([ours], lr=1e-2)
    reference = torch.optim.Muon(
        [theirs], lr=1e-2, weight_decay=0.0, momentum=0.95, ns_steps=4, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(5):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(10 + step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        own.step()
        reference.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def _stage(file: Path) -> tuple[nn.Module, Stage]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    return net, Stage(file, {"net": net}, lr=1e-3, matrix_lr=1e-2, average=0.9, edge=("net.3",))


def test_a_stopped_stage_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    def train(file: Path, limit: int) -> nn.Module:
        net, stage = _stage(file)
        stage.resume()

        def loss(step: int) -> torch.Tensor:
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            return (net(x) - x).square().mean()

        for reached in stage.run(6, loss, cosine, every=2):
            if reached == limit:
                break
        stage.use_average()
        return net

    whole = train(tmp_path / "whole.safetensors", 6)
    train(tmp_path / "parts.safetensors", 2)
    train(tmp_path / "parts.safetensors", 4)
    resumed = train(tmp_path / "parts.safetensors", 6)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_in_parts_trains_as_their_sum(tmp_path: Path) -> None:
    def train(file: Path, parts: bool) -> tuple[nn.Module, str]:
        file.parent.mkdir()
        net, stage = _stage(file)

        def losses(step: int) -> list[torch.Tensor]:
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            return [(net(some) - some).square().mean() / 2 for some in x.chunk(2)]

        for _ in stage.run(20, losses if parts else lambda step: sum(losses(step), torch.zeros(())), cosine):
            pass
        return net, stage.file.with_suffix(".jsonl").read_text()

    whole, told = train(tmp_path / "whole" / "a.safetensors", False)
    apart, told_apart = train(tmp_path / "apart" / "a.safetensors", True)
    for a, b in zip(whole.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert json.loads(told)["loss"] == pytest.approx(json.loads(told_apart)["loss"], rel=1e-4)
