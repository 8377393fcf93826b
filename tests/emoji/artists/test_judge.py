"""The judge: what it may answer, what it is asked, how pairs are cut, and that it learns."""

from pathlib import Path

import pytest
import torch

from libreflux.emoji.artists import held_out, judge, scenes
from libreflux.emoji.artists.build import judge as training
from libreflux.emoji.artists.captions import ALL, Told
from libreflux.errors import ModelError


def test_every_answer_to_a_scene_is_one_that_the_judge_may_give() -> None:
    names = judge.heads()
    for index in range(300):
        what = scenes.scene(2, index)
        for figure in what.figures:
            found = judge.answers(figure, what.background)
            assert [head for head, answer in found.items() if answer not in names[head]] == []


def test_a_caption_asks_what_it_tells() -> None:
    assert judge.asked_of(Told()) == {"subject"}
    assert judge.asked_of(Told(look=True, place=True)) == {"subject", "look", "place"}
    assert judge.asked_of(ALL) == set(judge.heads())


@pytest.mark.parametrize("relation", list(scenes.RELATIONS))
def test_the_first_half_is_where_the_first_figure_stands(relation: str) -> None:
    pixels = torch.zeros(1, 3, 128, 128)
    dx, dy = scenes.RELATIONS[relation]
    where = [slice(None), slice(None)]
    where[1 if dx else 0] = slice(0, 64) if dx + dy < 0 else slice(64, 128)
    pixels[:, :, where[0], where[1]] = 1
    first, second = judge.halves(pixels, relation)
    assert (float(first.mean()), float(second.mean())) == (1.0, 0.0)
    assert first.shape == pixels.shape


class Knows(judge.SceneJudge):
    """Answers rightly whatever it is shown, in the order in which it is asked: whole pictures first."""

    def __init__(self, answers: list[dict[str, str]]) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        features = torch.zeros(len(pixels), 4)
        if len(pixels) > 1:
            return {"features": features}
        answer = self.answers.pop(0)
        found = {}
        for head, names in judge.heads().items():
            found[head] = torch.zeros(1, len(names))
            found[head][0, names.index(answer[head])] = 1
        return found | {"features": features}


def test_a_picture_is_right_when_all_that_was_asked_is() -> None:
    what = [held_out.training_scene(1, index, pairs=0.0) for index in range(3)]
    truth = [judge.answers(scene.figures[0], scene.background) for scene in what]
    truth[1] |= {"size": next(size for size in judge.SIZES if size != truth[1]["size"])}
    pixels = torch.zeros(3, 3, 128, 128)
    asked = judge.mark(Knows([dict(answer) for answer in truth]), pixels, what, [ALL] * 3)
    assert asked.all_right.tolist() == [True, False, True]
    bare = judge.mark(Knows([dict(answer) for answer in truth]), pixels, what, [Told()] * 3)
    assert bare.all_right.tolist() == [True, True, True]


def test_of_a_pair_both_must_be_right() -> None:
    what = [held_out.training_scene(1, index, pairs=1.0) for index in range(2)]
    truth = [judge.answers(figure, scene.background) for scene in what for figure in scene.figures]
    truth[3] |= {"subject": next(name for name in judge.heads()["subject"] if name != truth[3]["subject"])}
    found = judge.mark(Knows(truth), torch.zeros(2, 3, 128, 128), what, [Told(background=True)] * 2)
    assert found.all_right.tolist() == [True, False]
    assert not found.asked["background"].any()


def test_a_saved_judge_answers_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = judge.SceneJudge().bfloat16().float()
    made.save(tmp_path / "judge.safetensors")
    pixels = torch.randn(2, 3, 128, 128)
    torch.testing.assert_close(judge.load(tmp_path / "judge.safetensors")(pixels)["look"], made(pixels)["look"])


def test_another_file_is_no_judge(tmp_path: Path) -> None:
    (tmp_path / "judge.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="not a judge"):
        judge.load(tmp_path / "judge.safetensors")


def test_a_batch_is_a_function_of_its_step_and_asks_of_halves_what_they_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BATCH", 12)
    monkeypatch.setattr(training, "THROUGH", 8)
    given_back = torch.zeros(8, 3, 128, 128, dtype=torch.uint8)
    pixels, labels = training.batch_at(5, given_back)
    again, _ = training.batch_at(5, given_back)
    assert torch.equal(pixels, again)
    assert pixels.shape == (12, 3, 128, 128)
    assert {frozenset(row) for row in labels} == {frozenset(judge.heads()), frozenset({"subject", "look"})}
