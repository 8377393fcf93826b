"""Models that are known by name: planned and listed without a network, a log-in or a download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from libreflux.errors import ModelError
from libreflux.model.facts import KNOWN
from libreflux.model.known import planned_model
from libreflux.model.locate import EMOJI
from libreflux.model.opening import open_model
from libreflux.training import trace
from libreflux.workflows.known_models import WORDS

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
DEV = "black-forest-labs/FLUX.1-dev"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache of the hub, and nobody who answers."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("hub_id", KNOWN)
def test_a_known_model_that_cannot_be_had_is_planned_with_its_sizes(no_network: None, hub_id: str) -> None:
    with planned_model(hub_id) as (folder, notice):
        assert notice is not None
        assert "hub cannot be reached; planned with its known sizes" in notice
        assert ("`hf auth login`" in notice) == (hub_id == DEV)
        opened = open_model(folder)
        assert opened.facts == KNOWN[hub_id]
        transformer = trace.meta_transformer(opened.part_config("transformer"), torch.float32)
        configs = opened.part_config("text_encoder"), opened.part_config("text_encoder_2")
        clip, t5 = trace.meta_encoders(*configs, torch.float32)
        vae = trace.meta_vae(opened.part_config("vae"))
    assert isinstance(transformer, FluxTransformer2DModel)
    guided = KNOWN[hub_id].guidance_embeds
    millions = [round(sum(p.numel() for p in part.parameters()) / 1e6) for part in (transformer, clip, t5, vae)]
    assert millions == [11901 if guided else 11891, 123, 4762, 84]
    assert not Path(folder).exists()


@pytest.mark.parametrize("name", ["org/unknown", f"{DEV}-2", "no/such/model/here"])
def test_an_unknown_model_is_not_planned(no_network: None, name: str) -> None:
    with pytest.raises(ModelError), planned_model(name):
        pass


@pytest.mark.parametrize("hub_id", [DEV, "black-forest-labs/FLUX.1-schnell"])
def test_a_gated_model_is_planned_and_its_login_named(
    no_network: None, monkeypatch: pytest.MonkeyPatch, hub_id: str
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def gated(*_: object, **__: object) -> str:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with planned_model(hub_id) as (_, notice):
        assert notice is not None
        assert "asks for a login" in notice
        assert "log in with `hf auth login`" in notice


def test_a_revision_that_is_not_there_is_not_planned(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    def missing(*_: object, **__: object) -> str:
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(ModelError, match="no such revision"), planned_model(f"{DEV}@gone"):
        pass


def test_a_dry_run_of_flux_without_a_network(
    no_network: None, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a newcomer has it: no model, no pictures, no card; it ends as the training would, in 2."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    changes = ("device=cuda", "resolution=512", "crop=square", "samples={every: 0}", "held_out={share: 0}")
    done = run("train", RECIPES / "flux-24gb-style.yaml", *changes, "--dry-run")
    assert done.code == 2
    (fault,) = (line for line in done.err.splitlines() if not line.startswith("estimating the run"))
    assert fault.startswith("libreflux: error: photos: no such folder")
    lines = done.out.splitlines()
    assert lines[0].startswith("black-forest-labs/FLUX.1-schnell: not downloaded before")
    assert lines[2].startswith("for a card: at its peak (")
    assert "holds it" in " ".join(lines[2:4])
    assert "adapter: lora of rank 16 on 304 layers, 35,487,744 parameters" in lines
    assert len(lines) < 45
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80


def test_models_lists_what_is_known_by_name(no_network: None, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run("models")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    names = [line for line in done.out.splitlines() if line and not line.startswith(" ") and " " not in line]
    assert names == [*EMOJI, *KNOWN]
    assert set(WORDS) == set(names)
    text = " ".join(done.out.split())
    assert text.count("in this package") == 3
    assert text.count("not downloaded") == len(KNOWN)
    assert text.count("asks for a log-in and consent") == 1
    assert "flux-1-dev-non-commercial-license, asks for a log-in" in text
