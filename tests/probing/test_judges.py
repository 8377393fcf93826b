"""Judges: their file, what is refused, and the shipped one on pictures that it was not trained on."""

from __future__ import annotations

import re
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
from libreflux.probing.judges import FIRST_WIDTHS, Judge, load_judge, score
from libreflux.probing.metrics.image_stats import Look, accuracies, log_probability
from libreflux.probing.subjects import ParsedPrompt


@pytest.fixture
def judge() -> Judge:
    torch.manual_seed(0)
    questions = {"subject": ["fox", "hot dog"], "colour": ["red", "blue", "white"], "size": ["small", "large"]}
    return Judge(questions, placed=["size"]).eval().requires_grad_(False)


def test_a_judge_is_read_back_and_judges_alike(judge: Judge, tmp_path: Path) -> None:
    judge.save(tmp_path / "judge.safetensors")
    again = load_judge(tmp_path / "judge.safetensors")
    assert (again.questions, again.placed) == (judge.questions, judge.placed)
    pixels = torch.rand(5, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rounded = judge.bfloat16().float()
    torch.testing.assert_close(again(pixels).features, rounded(pixels).features)
    for question, logits in rounded(pixels).answers.items():
        torch.testing.assert_close(again(pixels).answers[question], logits)
    wanted = [{"subject": name, "colour": colour} for name in ("fox", "hot dog") for colour in ("red", "blue")]
    found, seen = score(again, pixels, [*wanted, {}], batch=2), again(pixels)
    told = [again.subjects[best] for best in seen.answers["subject"].argmax(1)]
    assert found.right["subject"].tolist() == [*(a == b["subject"] for a, b in zip(told, wanted, strict=False)), True]
    assert found.asked["subject"].tolist() == [True] * 4 + [False]
    assert not found.asked["size"].any()
    assert (found.all == (found.right["subject"] & found.right["colour"])).all()
    assert found.features.shape == (5, 256)


def test_a_judge_of_the_first_schema_is_read(tmp_path: Path) -> None:
    torch.manual_seed(1)
    made = Judge({"subject": ["fox", "owl"], "colour": ["red"]}, widths=FIRST_WIDTHS).eval()
    state = {re.sub(r"heads\.(\w+)\.", r"\1_head.", name): value.clone() for name, value in made.state_dict().items()}
    save_file(
        state, tmp_path / "first.safetensors", {"schema": "1", "subjects": '["fox", "owl"]', "colours": '["red"]'}
    )
    again, pixels = load_judge(tmp_path / "first.safetensors"), torch.zeros(1, 3, 32, 32)
    assert again.questions == {"subject": ("fox", "owl"), "colour": ("red",)}
    torch.testing.assert_close(again(pixels).answers["subject"], made(pixels).answers["subject"])


def test_what_is_no_judge_is_refused(judge: Judge, tmp_path: Path) -> None:
    judge.save(tmp_path / "judge.safetensors")
    state = {name: value.clone() for name, value in judge.state_dict().items()}
    other = tmp_path / "other.safetensors"
    meta = {"schema": "1", "subjects": '["a"]', "colours": '["b"]'}
    listed = {"schema": "2", "questions": "[]", "placed": "[]", "widths": "[8]"}
    broken: list[tuple[dict[str, torch.Tensor], dict[str, str]]] = [
        ({"a": torch.zeros(1)}, meta),
        (state, {"schema": "3"}),
        (state, meta),
        (state, {}),
        (state, listed),
    ]
    for tensors, metadata in broken:
        save_file(tensors, other, metadata)
        with pytest.raises(ModelError, match="judge"):
            load_judge(other)
    with pytest.raises(ModelError, match="no such judge"):
        load_judge(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("question", ["all", "type", "a.b", ""])
def test_a_question_that_cannot_be_is_refused(question: str) -> None:
    with pytest.raises(ModelError, match="cannot be a question"):
        Judge({question: ["yes", "no"]})


def test_accuracy_counts_only_what_the_judge_knows(judge: Judge) -> None:
    seen = judge(torch.zeros(1, 3, 32, 32))
    told = {question: names[seen.answers[question][0].argmax()] for question, names in judge.questions.items()}
    subject, colour = told["subject"], told["colour"]
    wrong = next(name for name in judge.colours if name != colour)
    named = [
        {"subject": subject, "colour": colour},
        told | {"colour": wrong},
        {"subject": subject},
        {},
        {"colour": "mud"},
        {"colour": colour, "subject": "zebra"},
    ]
    seen = judge(torch.zeros(6, 3, 32, 32))
    look = Look(np.zeros(6), np.zeros(6), seen)
    found = accuracies(look, judge, [ParsedPrompt("", one) for one in named])
    np.testing.assert_array_equal(found["all"], [1, 0, 1, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(found["subject"], [1, 1, 1, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(found["size"], [np.nan, 1, np.nan, np.nan, np.nan, np.nan])
    wanted = log_probability(look, judge, "colour", [colour] * 6)
    np.testing.assert_allclose(wanted, seen.answers["colour"].detach().double().max(dim=1).values)


@pytest.mark.skipif(not JUDGE.is_file(), reason="the judge is not in this build yet")
def test_the_shipped_judge_knows_pictures_that_it_was_not_trained_on() -> None:
    chosen = [scenes()[0][row] for row in split()[1][::20]]
    pixels = torch.stack([torch.from_numpy(np.array(compose.render(what))).permute(2, 0, 1) for what in chosen])
    found = score(
        load_judge(JUDGE),
        pixels / 127.5 - 1,
        [{"subject": what.subject.name, "colour": what.colour} for what in chosen],
    )
    assert found.all.float().mean() > 0.95
