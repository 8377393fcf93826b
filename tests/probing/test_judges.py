"""Judges: their file, what is refused, and the shipped one on pictures that it was not trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from libreflux.emoji import compose
from libreflux.emoji.build.base import scenes
from libreflux.emoji.build.judge import split
from libreflux.emoji.held_out import JUDGE
from libreflux.errors import ModelError
from libreflux.probing.judges import Judge, load_judge, score
from libreflux.probing.metrics.image_stats import Look, accuracies, log_probability
from libreflux.probing.subjects import ParsedPrompt


@pytest.fixture
def judge() -> Judge:
    torch.manual_seed(0)
    return Judge(["fox", "hot dog"], ["red", "blue", "white"]).eval().requires_grad_(False)


def test_a_judge_is_read_back_and_judges_alike(judge: Judge, tmp_path: Path) -> None:
    judge.save(tmp_path / "judge.safetensors")
    again = load_judge(tmp_path / "judge.safetensors")
    assert (again.subjects, again.colours) == (judge.subjects, judge.colours)
    pixels = torch.rand(5, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rounded = judge.bfloat16().float()
    torch.testing.assert_close(again(pixels).features, rounded(pixels).features)
    wanted = [("fox", "red"), ("hot dog", "blue"), ("fox", "white"), ("fox", "blue"), ("hot dog", "red")]
    found, seen = score(again, pixels, wanted, batch=2), again(pixels)
    told = [again.subjects[best] for best in seen.subjects.argmax(1)]
    assert found.subject.tolist() == [a == b for a, (b, _) in zip(told, wanted, strict=True)]
    assert (found.both == (found.subject & found.colour)).all()
    assert found.features.shape == (5, 192)


def test_what_is_no_judge_is_refused(judge: Judge, tmp_path: Path) -> None:
    judge.save(tmp_path / "judge.safetensors")
    state = {name: value.clone() for name, value in judge.state_dict().items()}
    other = tmp_path / "other.safetensors"
    meta = {"schema": "1", "subjects": '["a"]', "colours": '["b"]'}
    for tensors, metadata in (({"a": torch.zeros(1)}, meta), (state, {"schema": "2"}), (state, meta), (state, {})):
        save_file(tensors, other, metadata)
        with pytest.raises(ModelError, match="judge"):
            load_judge(other)
    with pytest.raises(ModelError, match="no such judge"):
        load_judge(tmp_path / "absent.safetensors")


def test_accuracy_counts_only_what_the_judge_knows(judge: Judge) -> None:
    seen = judge(torch.zeros(3, 3, 32, 32))
    look = Look(np.zeros(3), np.zeros(3), seen)
    subject, colour = judge.subjects[seen.subjects[0].argmax()], judge.colours[seen.colours[0].argmax()]
    wrong = next(name for name in judge.colours if name != colour)
    found = accuracies(
        look,
        judge,
        [ParsedPrompt("", subject, colour), ParsedPrompt("", subject, wrong), ParsedPrompt("", subject, None)],
    )
    np.testing.assert_array_equal(found["both"], [1, 0, np.nan])
    np.testing.assert_array_equal(found["subject"], [1, 1, 1])
    wanted = log_probability(look, judge, "colour", [colour] * 3)
    np.testing.assert_allclose(wanted, seen.colours.detach().double().max(dim=1).values)


@pytest.mark.skipif(not JUDGE.is_file(), reason="the judge is not in this build yet")
def test_the_shipped_judge_knows_pictures_that_it_was_not_trained_on() -> None:
    chosen = [scenes()[0][row] for row in split()[1][::20]]
    pixels = torch.stack([torch.from_numpy(np.array(compose.render(what))).permute(2, 0, 1) for what in chosen])
    found = score(load_judge(JUDGE), pixels / 127.5 - 1, [(what.subject.name, what.colour) for what in chosen])
    assert found.both.float().mean() > 0.95
