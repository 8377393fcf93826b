"""The usual arguments of a diffusers pipeline, against diffusers' own where it has them."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image
from torch import Tensor

import libreflux
from libreflux.errors import RecipeError
from libreflux.model.facts import Facts
from libreflux.model.latents import encode, pack
from libreflux.model.opening import open_model
from libreflux.sample.guidance import BatchCfg
from libreflux.sample.noise import noise
from libreflux.sample.output import decoded
from libreflux.sample.pipeline import LibreFluxPipeline
from opened import Opened, pictures_of, tensor_of

LONG, SHORT = "a small green frog sits under a tall tree, and the sky behind it is orange", "a fox"


@pytest.fixture(scope="module")
def theirs(tiny_model_dir: Path) -> FluxPipeline:
    made = FluxPipeline.from_pretrained(tiny_model_dir)
    made.set_progress_bar_config(disable=True)
    return made


def test_prompt_2_is_t5s_as_in_diffusers(pipe: LibreFluxPipeline, theirs: FluxPipeline) -> None:
    both = pipe.encode_prompt(LONG, SHORT)
    tokens, pooled, _ = theirs.encode_prompt(LONG, SHORT, max_sequence_length=both.lengths[0])
    torch.testing.assert_close(both.tokens[0], tokens[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(both.pooled, pooled, atol=1e-5, rtol=0)
    assert not torch.equal(both.pooled, pipe.encode_prompt(SHORT).pooled)
    [expected] = pictures_of(
        pipe(prompt_conditioning=both, negative_conditioning=pipe.encode_prompt("", SHORT), seeds=1)
    )
    [drawn] = pictures_of(pipe(LONG, prompt_2=SHORT, negative_prompt_2=SHORT, seeds=1))
    [other] = pictures_of(pipe(LONG, negative_prompt_2=SHORT, seeds=1))
    assert drawn.tobytes() == expected.tobytes() != other.tobytes()


def test_sigmas_latents_and_arrays_as_in_diffusers(
    model: Opened, pipe: LibreFluxPipeline, theirs: FluxPipeline
) -> None:
    """An own ladder is shifted, packed and unpacked latents are one start, "np" is what it is there."""
    theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipe.facts = Facts(shift=2.0)
    text, start, sigmas = pipe.encode_prompt(SHORT), noise([7], 16, 4, 6), [0.9, 0.5, 0.05]
    same: dict[str, Any] = {"height": 32, "width": 48, "output_type": "np", "sigmas": sigmas, "return_dict": False}
    (expected,) = theirs(
        prompt_embeds=text.tokens[0][None], pooled_prompt_embeds=text.pooled, latents=pack(start), **same
    )
    for latents in (start, pack(start)):
        (ours,) = pipe(SHORT, guidance_scale=1.0, latents=latents, **same)
        assert ours.shape == (1, 32, 48, 3)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, atol=2e-5)
    assert pipe(SHORT, latents=torch.randn(1, 4, 64)).seeds == []
    even, default = (
        tensor_of(pipe(SHORT, seeds=1, output_type="latent", **given))
        for given in ({"sigmas": [1.0, 0.75, 0.5, 0.25]}, {"num_inference_steps": 4})
    )
    assert torch.equal(even, default)


def test_max_sequence_length_cuts(pipe: LibreFluxPipeline, caplog: pytest.LogCaptureFixture) -> None:
    cut = pipe.encode_prompt(LONG, max_sequence_length=5)
    assert cut.lengths == [5]
    assert "the model reads 5" in caplog.text
    short, whole, by_hand = (
        tensor_of(pipe(seeds=1, guidance_scale=1.0, output_type="latent", **given))
        for given in ({"prompt": LONG, "max_sequence_length": 5}, {"prompt": LONG}, {"prompt_conditioning": cut})
    )
    assert torch.equal(short, by_hand)
    assert not torch.equal(short, whole)


def test_a_generator_of_its_own_makes_a_picture_independent_of_its_batch(pipe: LibreFluxPipeline) -> None:
    def own(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    together = pipe([LONG, SHORT], generator=[own(1), own(2)], output_type="latent")
    alone = pipe(SHORT, generator=own(2), output_type="latent")
    assert together.seeds[1:] == alone.seeds
    torch.testing.assert_close(together.images[1:], alone.images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("padding", ["drop", "bias"])
@pytest.mark.parametrize("how", [True, False, "auto"])
def test_generators_of_several_pictures_per_prompt(pipe: LibreFluxPipeline, padding: str, how: BatchCfg) -> None:
    """Two prompts of two pictures, each with its generator: every one is, decoded, what it is alone in two passes."""

    def own(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    pipe.facts = Facts(text_padding=padding, max_tokens=32)
    common: dict[str, Any] = {
        "guidance_scale": 4.0,
        "guidance_rescale": 0.5,
        "num_inference_steps": 3,
        "output_type": "pt",
    }
    generators = [own(seed) for seed in (3, 4, 5, 3)]
    together = tensor_of(
        pipe([LONG, SHORT], [SHORT, ""], num_images_per_prompt=2, generator=generators, batch_cfg=how, **common)
    )
    rows = [(LONG, SHORT, 3), (LONG, SHORT, 4), (SHORT, "", 5), (SHORT, "", 3)]
    alone = [
        tensor_of(pipe(text, negative, generator=own(seed), batch_cfg=False, **common)) for text, negative, seed in rows
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    assert min((a - b).abs().max() for a, b in itertools.combinations(alone, 2)) > 1e-3


def test_the_callback_sees_and_replaces_what_diffusers_shows(pipe: LibreFluxPipeline, theirs: FluxPipeline) -> None:
    text, start = pipe.encode_prompt(SHORT), pack(noise([7], 16, 4, 4))
    seen: dict[object, list[tuple[int, float, Tensor]]] = {pipe: [], theirs: []}

    def halve(owner: object, index: int, timestep: Tensor, tensors: dict) -> dict:
        seen[owner].append((index, float(timestep), tensors["latents"].clone()))
        return {"latents": tensors["latents"] / 2} if index == 1 else {}

    theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    common: dict[str, Any] = {
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "output_type": "pt",
        "callback_on_step_end": halve,
    }
    expected = theirs(
        prompt_embeds=text.tokens[0][None], pooled_prompt_embeds=text.pooled, latents=start, **common
    ).images
    ours = tensor_of(pipe(SHORT, guidance_scale=1.0, latents=start, **common))
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
    assert len(seen[pipe]) == 4
    for mine, other in zip(seen[pipe], seen[theirs], strict=True):
        assert mine[:2] == other[:2]
        torch.testing.assert_close(mine[2], other[2], atol=2e-5, rtol=0)


def test_what_differs_from_diffusers_is_written_down() -> None:
    """Every argument is there by its name, or the class says what is in its place."""
    ours, there = (set(inspect.signature(kind.__call__).parameters) for kind in (LibreFluxPipeline, FluxPipeline))
    told = LibreFluxPipeline.__doc__ or ""
    image_prompts = {name for name in there if "ip_adapter" in name}
    missing = there - ours - image_prompts
    assert missing == {
        "true_cfg_scale",
        "joint_attention_kwargs",
        "prompt_embeds",
        "pooled_prompt_embeds",
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
    }
    assert all(f"`{name.removeprefix('negative_')}`" in told for name in missing)
    assert "`ip_adapter_image`" in told


def test_no_negative_prompt_is_an_empty_one(pipe: LibreFluxPipeline) -> None:
    none, empty, other = (
        tensor_of(pipe(SHORT, negative, seeds=1, output_type="latent", batch_cfg=False))
        for negative in (None, "", LONG)
    )
    assert torch.equal(none, empty)
    assert not torch.equal(none, other)


def test_the_callback_replaces_text(pipe: LibreFluxPipeline) -> None:
    """From the second step on another prompt; and None, or nothing, changes nothing."""
    other = pipe.encode_prompt(LONG)

    def swap(owner: LibreFluxPipeline, index: int, timestep: Tensor, tensors: dict) -> dict | None:
        assert set(tensors) == {"prompt_conditioning", "negative_conditioning"}
        return {"prompt_conditioning": other} if index == 0 else None

    names = ["prompt_conditioning", "negative_conditioning"]
    common: dict[str, Any] = {"seeds": 1, "output_type": "latent", "num_inference_steps": 2}
    swapped = tensor_of(pipe(SHORT, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=names, **common))
    middle: list[Tensor] = []
    pipe(SHORT, callback_on_step=lambda step: middle.append(step.x), **common)
    second = tensor_of(pipe(LONG, latents=middle[0], sigmas=[0.5], output_type="latent"))
    torch.testing.assert_close(swapped, second, atol=1e-6, rtol=0)
    assert not torch.equal(swapped, tensor_of(pipe(SHORT, **common)))


def test_an_interrupted_call_ends_after_its_step(pipe: LibreFluxPipeline) -> None:
    calls = []

    def stop(owner: LibreFluxPipeline, index: int, *_: object) -> None:
        calls.append(index)
        owner.interrupt = index == 1

    assert not pipe.interrupt
    early = tensor_of(pipe(SHORT, seeds=1, callback_on_step_end=stop, output_type="latent"))
    assert calls == [0, 1]
    assert pipe.interrupt
    states: list[Tensor] = []
    whole = tensor_of(pipe(SHORT, seeds=1, callback_on_step=lambda step: states.append(step.x), output_type="latent"))
    assert len(states) == 4
    assert not pipe.interrupt
    assert torch.equal(pack(early), states[1])
    assert not torch.equal(early, whole)


def test_steps_show_what_comes(pipe: LibreFluxPipeline) -> None:
    shown = []
    for pair in pipe.steps([LONG, SHORT], seeds=1, guidance_scale=2.0):
        assert torch.is_grad_enabled()  # the caller's own
        shown.append(pair)
    drawn = pictures_of(pipe([LONG, SHORT], seeds=1, guidance_scale=2.0))
    assert [step.index for step, _ in shown] == [0, 1, 2, 3]
    assert shown[-1][0].sigma_next == 0
    assert [image.tobytes() for image in shown[-1][1]] == [image.tobytes() for image in drawn]
    # one step from where the first one started, straight to 0, is where the first preview points
    (one,) = tensor_of(pipe(SHORT, seeds=2, guidance_scale=2.0, sigmas=[1.0], output_type="pt"))
    preview = next(pipe.steps(SHORT, seeds=2, guidance_scale=2.0))[1][0]
    difference = np.asarray(preview, dtype=float) / 255 - one.permute(1, 2, 0).numpy()
    assert np.abs(difference).max() <= 0.51 / 255
    with pytest.raises(RecipeError, match=r"output_type: has no effect on steps\(\)"):
        next(pipe.steps(SHORT, output_type="pt"))
    with pytest.raises(TypeError, match="guidance_scal"):
        next(pipe.steps(SHORT, guidance_scal=3))  # type: ignore[call-arg]


def test_tiles_bound_what_the_decoder_sees(pipe: LibreFluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny VAE was made for 32 pixels: a tile is at most 4 latents wide, and whole pictures come together."""
    widest: list[int] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: widest.append(max(args[0].shape[-2:])))
    sizes: dict[str, Any] = {"seeds": 1, "height": 64, "width": 96, "num_inference_steps": 1, "output_type": "pt"}
    whole, tiled = (tensor_of(pipe(SHORT, tile=tile, **sizes)) for tile in (None, True))
    assert widest[0] == 12
    assert max(widest[1:]) == 4
    assert not pipe.vae.use_tiling
    assert whole.shape == tiled.shape
    assert not torch.equal(whole, tiled)
    monkeypatch.setattr("libreflux.sample.output.TILE_ABOVE", 95)
    assert torch.equal(tensor_of(pipe(SHORT, **sizes)), tiled)
    assert torch.equal(tensor_of(pipe(SHORT, tile=False, **sizes)), whole)


def test_tiles_are_nearly_the_whole_picture() -> None:
    """With the trained VAE of the emoji family, made for 128 pixels: 256 x 192 from the latents of a real picture."""
    vae = open_model("emoji-base").load_vae(dtype=torch.float32)
    picture = next(iter(sorted(Path(libreflux.__file__).parent.glob("emoji/pictures/*.webp"))))
    image = Image.open(picture).convert("RGBA").resize((256, 192))
    canvas = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    pixels = torch.from_numpy(np.asarray(canvas, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    whole, tiled = (decoded(vae, encode(vae, pixels), tile) for tile in (False, True))
    assert 0 < (whole - tiled).abs().mean() < 0.01
