"""Sections' own mathematics against theorems, and padding on a real tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from libreflux import seeding
from libreflux.flow.guidance import cfg
from libreflux.model.opening import open_model
from libreflux.model.text import TextConditioning
from libreflux.probing.context import OWN
from libreflux.probing.drawing import mean_square
from libreflux.probing.held_out import model_velocity
from libreflux.probing.metrics.bootstrap import mean
from libreflux.probing.metrics.distances import (
    frechet_distance,
    frechet_replicates,
    frechet_together,
    kernel_distance,
    kernel_replicates,
)
from libreflux.probing.metrics.measures import moments, resampled
from libreflux.probing.results import Measure
from libreflux.probing.sections import padding
from libreflux.probing.sections.guidance import best_of, first_above
from libreflux.probing.sections.velocity_metrics import keeping, measures_of, other_captions
from libreflux.probing.settings import Settings, rungs
from mixture import MEANS, SHARES, STDS, null, prompted
from tiny import CAPTIONS

PICTURES, SIGMAS = 120, (0.3, 0.7)


def exact_measures(scale: float) -> dict[tuple[str, float, str], Measure]:
    """Of the mixture's exact velocities, the conditional one guided by `scale`."""
    random = seeding.rng(0, "sections")
    labels = torch.from_numpy((random.random((PICTURES, 1, 16, 16)) < SHARES[1]).astype(np.int64))
    mean_, std = torch.tensor(MEANS, dtype=torch.float64)[labels], torch.tensor(STDS, dtype=torch.float64)[labels]
    x0 = mean_ + std * torch.from_numpy(random.standard_normal(labels.shape))
    told, ids = prompted(labels), [f"{number:032x}" for number in range(PICTURES)]
    conditional, kept = keeping(lambda x, s: cfg(told(x, s), null(x, s), scale))
    empty, kept_empty = keeping(null)
    guided, unguided = (moments(field, x0, ids, SIGMAS) for field in (conditional, empty))
    gap = np.stack([mean_square(a - b).numpy() for a, b in zip(kept, kept_empty, strict=True)], axis=1)
    rows = measures_of(guided, unguided, gap, gap, {"all": np.arange(PICTURES)}, Settings())
    return {(row.name, float(row.at.get("sigma", 0)), str(row.at.get("text", ""))): row for row in rows}


def test_exact_velocities_have_slope_one_and_respond_by_what_the_prompt_is_worth() -> None:
    found = exact_measures(1.0)
    for sigma in SIGMAS:
        slope = found["slope", sigma, "caption"]
        assert slope.reference == 1
        assert slope.low - 0.005 < 1 < slope.high + 0.005
        # E[v_c | x] = v_u, so E‖v_c − v_u‖² is the loss that the prompt takes away, and ‖v_c‖² what is explained.
        power = 1 + sum(s * (m * m + d * d) for s, m, d in zip(SHARES, MEANS, STDS, strict=True))
        response = (found["prompt_gain", sigma, ""].value / (power - found["loss", sigma, "caption"].value)) ** 0.5
        assert found["guidance_response", sigma, ""].value == pytest.approx(response, rel=0.05)
    assert found["negative", 0.0, ""].value == pytest.approx(1)


def test_injected_guidance_lowers_the_slope_and_raises_the_response() -> None:
    plain, sharp = exact_measures(1.0), exact_measures(3.0)
    for sigma in SIGMAS:
        assert sharp["slope", sigma, "caption"].high < 0.97
        key = ("guidance_response", sigma, "")
        assert sharp[key].low > plain[key].high


def test_another_caption_is_another() -> None:
    assert other_captions(["a", "a", "b"]) == ["b", "b", "a"]
    assert other_captions(["a", "a"]) == ["a", "a"]


def test_where_quality_peaks_and_clipping_starts() -> None:
    weights = np.full((2, 3), 1 / 3)
    heights = {1.0: 0.2, 2.0: 0.7, 4.0: 0.7, 8.0: 0.1}
    by_scale = {scale: mean(np.full(3, height)) for scale, height in heights.items()}
    assert best_of(by_scale)(weights).tolist() == [2, 2]
    assert first_above(by_scale, 0.5)(weights).tolist() == [2, 2]
    assert np.isnan(first_above(by_scale, 0.9)(weights)).all()


def test_distances_by_weights_are_the_distances_and_a_kernel_resample_is_not_biased() -> None:
    draw = torch.Generator().manual_seed(0)
    for count, size in ((60, 5), (12, 30)):
        a, b = torch.randn(count, size, generator=draw), 1.3 * torch.randn(50, size, generator=draw) + 0.2
        equal = np.full((1, count), 1 / count)
        assert frechet_replicates(a, b, equal) == pytest.approx(frechet_distance(a, b), rel=1e-6)
        assert kernel_replicates(a, b, equal) == pytest.approx(kernel_distance(a, b), rel=1e-9)
        some, others = resampled(count, replicates=20), resampled(50, replicates=20)
        assert frechet_together(a, b, some, others) == pytest.approx(frechet_replicates(a, b, some, others), rel=1e-6)
        many = kernel_replicates(a, b, resampled(count, replicates=2000))
        assert many.mean() == pytest.approx(kernel_distance(a, b), abs=4 * many.std() / 2000**0.5)


def test_rungs_are_those_of_a_few_step_students_own_ladder(tiny_model_dir: Path) -> None:
    facts = open_model(tiny_model_dir).facts  # four steps
    assert rungs(facts, (0.1, 0.25, 0.5, 0.7, 0.75)) == (0.25, 0.5, 0.75)


@pytest.mark.parametrize("own", ["drop", "trim"])
def test_padding_changes_nothing_under_drop_and_something_under_trim(tiny_model_dir: Path, own: str) -> None:
    import dataclasses

    source = open_model(tiny_model_dir)
    facts = dataclasses.replace(source.facts, text_padding=own, max_tokens=64)
    settings = Settings(padding_tokens=(6, 40, 500))
    texts = padding.encode(source.load_text(), facts, CAPTIONS, settings)
    assert {tokens for _, tokens in texts} == {6, 40}  # 500 are more than it reads
    for (which, tokens), text in texts.items():
        whole = which in ("keep", "bias")
        assert all(length == 64 if whole else tokens - 3 <= length <= tokens for length in text.lengths)
    latents = torch.randn(5, 16, 4, 4, generator=torch.Generator().manual_seed(0))

    def gap(one: list[TextConditioning], two: list[TextConditioning]) -> float:
        transformer = padding.exact(source.load_transformer())
        with torch.no_grad():
            above, below = padding.differences(
                lambda text: model_velocity(transformer, text), latents, list("abcde"), one, two, (0.5, 0.9), 0
            )
        return float(np.sqrt(above.sum() / below.sum()))

    short = padding.alone(texts[OWN, 6])
    further, other = (gap(short, padding.alone(texts[name, 6])) for name in (own, {"drop": "trim"}.get(own, "drop")))
    assert other > 1e-4
    assert further == 0 if own == "drop" else further > 1e-4
    beside = [TextConditioning.cat([text, texts[OWN, 40].index([0])]) for text in short]
    assert 0 <= gap(short, beside) < 2e-6
