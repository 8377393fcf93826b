"""The judge: what it may answer, what it is asked, how pairs are cut, and that it learns."""

import pytest
import torch

from libreflux.emoji.artists import held_out, judge, scenes
from libreflux.emoji.artists.build import judge as training
from libreflux.emoji.artists.captions import ALL, Told
from libreflux.probing.judges import COLOUR, SUBJECT, Judge, Verdict


def test_every_answer_to_a_scene_is_one_that_the_judge_may_give() -> None:
    names = judge.questions()
    for index in range(300):
        what = scenes.scene(2, index)
        for figure in what.figures:
            found = judge.answers(figure, what.background)
            assert [head for head, answer in found.items() if answer not in names[head]] == []


def test_a_caption_asks_what_it_tells() -> None:
    assert judge.asked_of(Told()) == {"subject"}
    assert judge.asked_of(Told(look=True, place=True)) == {"subject", "look", "place"}
    assert judge.asked_of(ALL) == set(judge.questions()) - {COLOUR}


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


class Knows(Judge):
    """Answers rightly whatever it is shown, in the order in which it is asked: whole pictures first."""

    def __init__(self, answers: list[dict[str, str]]) -> None:
        super().__init__(judge.questions())
        self.told = answers

    def forward(self, pixels: torch.Tensor) -> Verdict:
        features = torch.zeros(len(pixels), 4)
        if len(pixels) > 1:
            return Verdict({}, features)
        told = self.told.pop(0)
        found = {}
        for question, names in self.questions.items():
            found[question] = torch.zeros(1, len(names))
            if question in told:
                found[question][0, names.index(told[question])] = 1
        return Verdict(found, features)


def test_a_picture_is_right_when_all_that_was_asked_is() -> None:
    what = [held_out.training_scene(1, index, pairs=0.0) for index in range(3)]
    truth = [judge.answers(scene.figures[0], scene.background) for scene in what]
    truth[1] |= {"size": next(size for size in judge.SIZES if size != truth[1]["size"])}
    pixels = torch.zeros(3, 3, 128, 128)
    asked = judge.mark(Knows([dict(answer) for answer in truth]), pixels, what, [ALL] * 3)
    assert asked.all.tolist() == [True, False, True]
    bare = judge.mark(Knows([dict(answer) for answer in truth]), pixels, what, [Told()] * 3)
    assert bare.all.tolist() == [True, True, True]


def test_of_a_pair_both_must_be_right() -> None:
    what = [held_out.training_scene(1, index, pairs=1.0) for index in range(2)]
    truth = [judge.answers(figure, scene.background) for scene in what for figure in scene.figures]
    truth[3] |= {"subject": next(name for name in judge.questions()[SUBJECT] if name != truth[3]["subject"])}
    found = judge.mark(Knows(truth), torch.zeros(2, 3, 128, 128), what, [Told(background=True)] * 2)
    assert found.all.tolist() == [True, False]
    assert not found.asked["background"].any()


def test_a_batch_is_a_function_of_its_step_and_asks_of_halves_what_they_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BATCH", 12)
    monkeypatch.setattr(training, "THROUGH", 8)
    given_back = torch.zeros(8, 3, 128, 128, dtype=torch.uint8)
    pixels, labels = training.batch_at(5, given_back)
    again, _ = training.batch_at(5, given_back)
    assert torch.equal(pixels, again)
    assert pixels.shape == (12, 3, 128, 128)
    whole = frozenset(judge.questions())
    assert {frozenset(row) for row in labels} == {whole, whole - {COLOUR}, frozenset({SUBJECT, "look"})}
