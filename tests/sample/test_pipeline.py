"""The pipeline: against diffusers' own on equal terms, and what diffusers' cannot do, against two passes by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from libreflux.errors import ModelError, RecipeError
from libreflux.flow.guidance import cfg
from libreflux.flow.schedule import ladder
from libreflux.model.facts import Facts
from libreflux.model.latents import image_ids, pack
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from libreflux.sample.guidance import GuidedVelocity
from libreflux.sample.metadata import png_bytes
from libreflux.sample.noise import choose_seeds, noise
from libreflux.sample.pipeline import LibreFluxPipeline
from opened import Opened, pictures_of, tensor_of
from tiny import tiny_transformer

LONG, SHORT = "a small green frog sits under a tall tree, and the sky behind it is orange", "a fox"


class Calls:
    """The batch sizes of the transformer's calls while the block runs."""

    def __init__(self, pipe: LibreFluxPipeline) -> None:
        self.pipe = pipe
        self.batches: list[int] = []

    def __enter__(self) -> list[int]:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.batches.append(kwargs["hidden_states"].shape[0])

        self.handle = self.pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
        return self.batches

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_equals_diffusers_flux_pipeline_where_nothing_is_padded(
    pipe: LibreFluxPipeline, tiny_model_dir: Path, scale: float
) -> None:
    theirs = FluxPipeline.from_pretrained(tiny_model_dir)
    theirs.set_progress_bar_config(disable=True)
    text, negative = pipe.encode_prompt("a red apple on blue"), pipe.encode_prompt("a fox on the rocket")
    assert text.lengths == negative.lengths  # diffusers takes no others
    same: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 4, "output_type": "pt"}
    expected = theirs(
        prompt_embeds=text.tokens[0][None],
        pooled_prompt_embeds=text.pooled,
        negative_prompt_embeds=negative.tokens[0][None],
        negative_pooled_prompt_embeds=negative.pooled,
        true_cfg_scale=scale,
        latents=pack(noise([7], 16, 4, 6)),
        **same,
    ).images
    ours = tensor_of(pipe("a red apple on blue", "a fox on the rocket", guidance_scale=scale, seeds=7, **same))
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
    other = tensor_of(pipe("a fox", height=32, width=48, guidance_scale=scale, seeds=7, output_type="pt"))
    assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("scale", "skip", "batches"),
    [
        (1.0, 0, [2] * 5),
        (3.0, 0, [4] * 5),
        (3.0, 2, [2, 2, 4, 4, 4]),
        (3.0, 4, [2, 2, 2, 2, 4]),
        (1.0, 5, [2] * 5),
        (0.5, 0, [4] * 5),
        (0.0, 0, [2] * 5),
    ],
)
def test_passes(pipe: LibreFluxPipeline, scale: float, skip: int, batches: list[int]) -> None:
    with Calls(pipe) as seen:
        pipe([LONG, SHORT], guidance_scale=scale, no_cfg_until=skip, num_inference_steps=5, seeds=0, batch_cfg=True)
    assert seen == batches


def test_guidance_one_does_not_read_the_negative(pipe: LibreFluxPipeline) -> None:
    a, b = (tensor_of(pipe(SHORT, n, guidance_scale=1.0, seeds=1, output_type="latent")) for n in ("", "a rocket"))
    assert torch.equal(a, b)
    a, b = (tensor_of(pipe(SHORT, n, guidance_scale=2.0, seeds=1, output_type="latent")) for n in ("", "a rocket"))
    assert (a - b).abs().max() > 1e-3


def test_one_batch_of_unequal_lengths_is_two_passes(pipe: LibreFluxPipeline) -> None:
    positive, negative = pipe.encode_prompt([LONG, SHORT]), pipe.encode_prompt(["", LONG + " on blue"])
    assert len(set(positive.lengths + negative.lengths)) == 4
    ids, x = image_ids(4, 4), torch.randn(2, 4, 64)
    with torch.no_grad():
        one = GuidedVelocity(pipe.transformer, positive, negative, ids, scale=4.0, batch_cfg=True)(x, 0.7, 0)
        sigma = torch.full((2,), 0.7)
        v_cond = torch.cat([velocity(pipe.transformer, x[[i]], sigma[:1], positive.index([i]), ids) for i in range(2)])
        v_unc = torch.cat([velocity(pipe.transformer, x[[i]], sigma[:1], negative.index([i]), ids) for i in range(2)])
    torch.testing.assert_close(one, cfg(v_cond, v_unc, 4.0), atol=1e-5, rtol=0)


def test_guidance_one_equals_the_formula_at_one(pipe: LibreFluxPipeline) -> None:
    single = tensor_of(pipe(LONG, guidance_scale=1.0, seeds=3, output_type="latent"))
    nearly = tensor_of(pipe(LONG, guidance_scale=1.0 + 1e-6, seeds=3, output_type="latent"))
    torch.testing.assert_close(single, nearly, atol=1e-4, rtol=0)


def test_the_whole_loop_by_hand(pipe: LibreFluxPipeline) -> None:
    """One prompt, guidance 2.5 from step 1 on, 3 steps, shift 1: Euler as the equations have it."""
    out = pipe(SHORT, LONG, guidance_scale=2.5, no_cfg_until=1, num_inference_steps=3, seeds=5, output_type="latent")
    positive, negative = pipe.encode_prompt(SHORT), pipe.encode_prompt(LONG)
    x, ids, sigmas = pack(noise([5], 16, 4, 4)), image_ids(4, 4), [1.0, 2 / 3, 1 / 3, 0.0]
    with torch.no_grad():
        for i in range(3):
            sigma = torch.tensor([sigmas[i]])
            v = velocity(pipe.transformer, x, sigma, positive, ids)
            if i >= 1:
                v_uncond = velocity(pipe.transformer, x, sigma, negative, ids)
                v = v_uncond + 2.5 * (v - v_uncond)
            x = x + (sigmas[i + 1] - sigmas[i]) * v
    torch.testing.assert_close(pack(tensor_of(out)), x, atol=1e-5, rtol=0)


def test_same_seed_same_bytes(pipe: LibreFluxPipeline) -> None:
    first, second, other = (png_bytes(pictures_of(pipe(SHORT, seeds=seed))[0]) for seed in (11, 11, 12))
    assert first == second != other


def test_a_picture_does_not_depend_on_its_batch(pipe: LibreFluxPipeline) -> None:
    together = tensor_of(pipe([LONG, SHORT, "a rocket"], seeds=[5, 6, 7], guidance_scale=3.0, output_type="latent"))
    for i, (prompt, seed) in enumerate([(LONG, 5), (SHORT, 6), ("a rocket", 7)]):
        alone = tensor_of(pipe(prompt, seeds=[seed], guidance_scale=3.0, output_type="latent"))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)
    assert torch.equal(noise([5, 6], 16, 4, 4)[1], noise([6], 16, 4, 4)[0])
    assert not torch.equal(noise([5], 16, 4, 4), noise([6], 16, 4, 4))


def test_pictures_per_prompt_keep_their_own_text(pipe: LibreFluxPipeline) -> None:
    """Prompts of different lengths, each with its negative: tokens, masks, pooled and negatives repeat together."""
    out = pipe([LONG, SHORT], ["", "a rocket"], num_images_per_prompt=2, seeds=20, output_type="latent")
    assert out.seeds == [20, 21, 22, 23]
    order = [(LONG, "", 20), (LONG, "", 21), (SHORT, "a rocket", 22), (SHORT, "a rocket", 23)]
    for i, (prompt, negative, seed) in enumerate(order):
        alone = tensor_of(pipe(prompt, negative, seeds=seed, output_type="latent"))
        torch.testing.assert_close(out.images[i : i + 1], alone, atol=1e-5, rtol=0)


def test_ready_conditioning_needs_no_encoders(pipe: LibreFluxPipeline, model: Opened) -> None:
    text, empty = pipe.encode_prompt([LONG, SHORT]), pipe.encode_prompt("")
    expected = tensor_of(pipe([LONG, SHORT], seeds=1, output_type="latent"))
    bare = LibreFluxPipeline.from_parts(model.transformer, model.vae, facts=model.facts)
    bare.set_progress_bar_config(disable=True)
    out = bare(prompt_conditioning=text, negative_conditioning=empty, seeds=1, output_type="latent")
    assert torch.equal(tensor_of(out), expected)
    with pytest.raises(ModelError, match="no text encoders; hint: pass prompt_conditioning"):
        bare(SHORT)


def test_a_transformer_in_training_is_left_as_it_was(pipe: LibreFluxPipeline, model: Opened) -> None:
    live = tiny_transformer().train().requires_grad_(True)
    before = copy.deepcopy(live.state_dict())
    text = pipe.encode_prompt([SHORT])
    bare = LibreFluxPipeline.from_parts(live, model.vae, facts=model.facts)
    bare.set_progress_bar_config(disable=True)
    bare(prompt_conditioning=text, guidance_scale=1.0, seeds=0)
    assert live.training
    assert all(p.requires_grad and p.grad is None for p in live.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in live.state_dict().items())
    velocity(live, torch.randn(1, 4, 64), torch.tensor([0.5]), text, image_ids(4, 4)).sum().backward()  # still trains


def test_defaults_are_the_models_own(model: Opened) -> None:
    facts = Facts(steps=3, guidance=1.0, shift=2.0)
    pipe = LibreFluxPipeline.from_parts(model.transformer, model.vae, model.text, facts)
    pipe.set_progress_bar_config(disable=True)
    sigmas: list[float] = []
    with Calls(pipe) as seen:
        out = pipe(SHORT, callback_on_step=lambda step: sigmas.append(step.sigma))
    assert seen == [1, 1, 1]
    assert sigmas == ladder(3, 2.0)[:-1].tolist()
    assert out.images[0].size == (32, 32)
    assert len(out.seeds) == 1
    shifted = replace(model, facts=Facts(steps=2, shift=None)).pipeline()
    shifted.set_progress_bar_config(disable=True)
    sigmas.clear()
    shifted(SHORT, guidance_scale=1.0, callback_on_step=lambda step: sigmas.append(step.sigma))
    assert 0.5 < sigmas[1] < 0.65  # dev's rule, e^mu slightly below 1.65 for 4 tokens


def test_a_guidance_distilled_model_gets_its_embedded_guidance(model: Opened) -> None:
    dev = tiny_transformer(guidance_embeds=True)
    facts = Facts(steps=2, guidance=3.5, guidance_embeds=True)
    pipe = LibreFluxPipeline.from_parts(dev, model.vae, model.text, facts)
    pipe.set_progress_bar_config(disable=True)
    guidance: list[Tensor] = []
    dev.register_forward_pre_hook(lambda m, a, kwargs: guidance.append(kwargs["guidance"]), with_kwargs=True)
    default = tensor_of(pipe(SHORT, seeds=0, output_type="latent"))
    assert [g.tolist() for g in guidance] == [[3.5], [3.5]]  # embedded, in single passes: no CFG unless asked for
    assert not torch.equal(default, tensor_of(pipe(SHORT, embedded_guidance=1.0, seeds=0, output_type="latent")))


def test_seeds() -> None:
    assert choose_seeds(5, None, 3) == [5, 6, 7]
    assert choose_seeds([9, 2], None, 2) == [9, 2]
    one, again = (choose_seeds(None, torch.Generator().manual_seed(1), 3) for _ in range(2))
    assert one == again
    assert len(set(one)) == 3
    each = choose_seeds(None, [torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)], 2)
    assert each == [one[0], one[0]]
    assert choose_seeds(None, None, 4) != choose_seeds(None, None, 4)
    with pytest.raises(RecipeError, match="2 seeds for 3 pictures"):
        choose_seeds([1, 2], None, 3)


def test_from_pretrained_and_a_bf16_model(tiny_model_dir: Path) -> None:
    pipe = LibreFluxPipeline.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.facts.steps == 4
    x: list[Tensor] = []
    pixels = tensor_of(pipe(SHORT, seeds=1, output_type="pt", callback_on_step=lambda step: x.append(step.x)))
    assert {t.dtype for t in x} == {torch.float32}
    assert pixels.dtype == torch.float32  # accumulated in fp32
    assert pixels.shape == (1, 3, 32, 32)
    assert 0 <= pixels.min() < pixels.max() <= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"height": 40}, "height: cannot be 40; hint: use a multiple of 16"),
        ({"width": 0}, "width: cannot be 0"),
        ({"num_inference_steps": 0}, "num_inference_steps: cannot be 0"),
        ({"guidance_scale": -1.0}, "guidance_scale: cannot be -1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale: cannot be nan"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: cannot be 0"),
        ({"no_cfg_until": -1}, "no_cfg_until: cannot be -1"),
        ({"no_cfg_until": 4}, "no_cfg_until: leaves no step of 4 guided; hint: use fewer, or guidance 1"),
        ({"no_cfg_until": 99, "guidance_stop": 0.5}, "no_cfg_until: leaves no step of 4 guided"),
        ({"no_cfg_until": 2, "guidance_stop": 0.5}, "no step of 4 is guided from 0.5 to 0.5"),
        ({"no_cfg_until": 2, "sigmas": [1.0, 0.5]}, "no_cfg_until: leaves no step of 2 guided"),
        ({"output_type": "gif"}, "output_type: cannot be 'gif'"),
        ({"num_inference_steps": -3}, "num_inference_steps: cannot be -3"),
        ({"embedded_guidance": float("inf")}, "embedded_guidance: cannot be inf"),
        ({"guidance_start": 1.5}, "guidance_start: cannot be 1.5; hint: use a fraction"),
        ({"guidance_stop": float("nan")}, "guidance_stop: cannot be nan"),
        ({"guidance_start": 0.5, "guidance_stop": 0.5}, "guidance_start: 0.5 is not below the stop, 0.5"),
        ({"guidance_start": 0.3, "guidance_stop": 0.4}, "no step of 4 is guided from 0.3 to 0.4"),
        ({"guidance_start": 0.5, "no_cfg_until": 1}, "both no_cfg_until and guidance_start"),
        ({"guidance_rescale": -0.1}, "guidance_rescale: cannot be -0.1"),
        ({"batch_cfg": "yes"}, "batch_cfg: cannot be 'yes'"),
        ({"sigmas": []}, "sigmas: cannot be"),
        ({"sigmas": [1.0, 0.5, 0.5]}, "sigmas: cannot be .* hint: use falling numbers"),
        ({"sigmas": [1.0, 0.5, 0.0]}, "sigmas: cannot be"),
        ({"sigmas": [float("nan"), 0.5]}, "sigmas: cannot be"),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "2 sigmas for 3 steps"),
        ({"latents": torch.zeros(1, 16, 4, 6)}, r"latents: have shape \(1, 16, 4, 6\); hint: use \(1, 16, 4, 4\)"),
        ({"latents": torch.zeros(2, 4, 64)}, r"latents: have shape \(2, 4, 64\)"),
        ({"latents": torch.full((1, 4, 64), torch.nan)}, "latents: are not all finite"),
        ({"latents": torch.zeros(1, 4, 64), "seeds": 1}, "both latents and a source of noise"),
        ({"seeds": 1, "generator": torch.Generator()}, "both seeds and a generator"),
        ({"max_sequence_length": 0}, "max_sequence_length: cannot be 0; hint: use 1 to 512"),
        ({"max_sequence_length": 513}, "max_sequence_length: cannot be 513"),
        ({"prompt_2": ["a", "b"]}, "2 second prompts for 1 prompt"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "no tensor is called 'x'"),
        ({"callback_on_step_end": lambda *_: {"y": 1}}, "callback_on_step_end: no tensor is called 'y'"),
        ({"seeds": [1, 2]}, "2 seeds for 1 picture"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompt"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": (), "negative_prompt": []}, "no prompt"),
        ({"negative_prompt": []}, "no negative_prompt"),
        ({"prompt_conditioning": TextConditioning([torch.zeros(1, 24)], torch.zeros(1, 16))}, "both prompt and its"),
    ],
)
def test_wrong_values_are_named(pipe: LibreFluxPipeline, values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        pipe(**({"prompt": SHORT} | values))


WHOLE = ("height", "width", "num_inference_steps", "no_cfg_until", "num_images_per_prompt", "max_sequence_length")
REAL = ("guidance_scale", "embedded_guidance", "guidance_start", "guidance_stop", "guidance_rescale")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in WHOLE for value in (32.0, "32", True, [32])),
        *((name, value) for name in REAL for value in ("0.5", False, [0.5], 1j)),
        *(("batch_cfg", value) for value in (1, 0.0, "True")),
        *((name, value) for name in ("tile", "return_dict") for value in (0, 1, "no", "auto")),
        *(("seeds", value) for value in (1.5, "7", True, [1.0], ["7"], [True])),
        ("sigmas", [True, 0.5]),
        ("sigmas", ["1", "0.5"]),
    ],
)
def test_values_of_another_kind_are_refused(pipe: LibreFluxPipeline, name: str, value: Any) -> None:
    """A text is true and True is 1: neither passes for what it is not."""
    with pytest.raises(RecipeError, match=f"{name}: cannot be"):
        pipe(SHORT, **{name: value})


def test_numbers_of_numpy_and_torch_are_numbers(pipe: LibreFluxPipeline) -> None:
    plain = tensor_of(pipe(SHORT, seeds=3, guidance_scale=2.0, num_inference_steps=2, output_type="latent"))
    common: dict[str, Any] = {"guidance_scale": torch.tensor(2.0), "num_inference_steps": np.int64(2)}
    given: list[Any] = [np.int64(3), [np.int32(3)], torch.tensor([3]), np.array([3])]
    for seeds in given:
        assert torch.equal(tensor_of(pipe(SHORT, seeds=seeds, output_type="latent", **common)), plain)


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", "bf16", torch.bfloat16])
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_a_dtype_is_read_by_name(tiny_model_dir: Path, name: Any, argument: str) -> None:
    pipe = LibreFluxPipeline.from_pretrained(tiny_model_dir, **{argument: name}, device="auto")
    assert {pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.text_encoder_2.dtype} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *(
            ({"dtype": value}, "dtype: cannot be")
            for value in ("int4", "half?", torch.int8, torch.float8_e4m3fn, 16, "")
        ),
        ({"torch_dtype": {"transformer": torch.bfloat16}}, "torch_dtype: cannot be"),
        (
            {"dtype": torch.float32, "torch_dtype": torch.bfloat16},
            "dtype: is torch.float32, torch_dtype torch.bfloat16",
        ),
        *(({"quantise": value}, "quantise: cannot be") for value in ("int8", "no", 8)),
    ],
)
def test_what_a_model_cannot_be_opened_as_is_refused(tiny_model_dir: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        LibreFluxPipeline.from_pretrained(tiny_model_dir, **given)


def test_embedded_guidance_without_embedding_is_refused(pipe: LibreFluxPipeline) -> None:
    with pytest.raises(ModelError, match="no guidance embedding"):
        pipe(SHORT, embedded_guidance=3.5)
