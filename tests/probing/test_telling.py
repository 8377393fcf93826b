"""Features chosen by telling a model from a worse one."""

from __future__ import annotations

import json

import torch

from libreflux.probing.metrics.telling import Telling, most_telling, telling


def planted(shift: float, count: int = 60) -> list[Telling]:
    """A feature that the worse model moves by `shift`, and one that says nothing."""
    random = torch.Generator().manual_seed(3)
    found = []
    for name, moved in (("told", shift), ("mute", 0.0)):
        good, real = torch.randn(count, 4, generator=random), torch.randn(50, 4, generator=random)
        worse = good + moved + 0.05 * torch.randn(count, 4, generator=random)
        found += telling(name, "noise", good, worse, real)
    return found


def test_the_feature_that_tells_is_chosen_and_intervals_are_paired() -> None:
    found = planted(1.0)
    chosen = most_telling(found)
    assert chosen is not None
    assert chosen[0] == "told"
    rows = {(one.feature, one.distance): one for one in found}
    assert rows["told", "FD"].apart
    assert rows["told", "KD"].tells
    assert not rows["mute", "KD"].apart
    one = rows["told", "FD"]
    assert one.difference[2] - one.difference[1] < one.worse[2] - one.worse[1] + one.good[2] - one.good[1]
    json.dumps(one.as_json(), allow_nan=False)


def test_a_feature_has_to_tell_it_from_every_worse_model_and_none_may() -> None:
    strong = [one for one in planted(1.0) if one.feature == "told"]
    mute = [one for one in planted(1.0) if one.feature == "mute"]
    renamed = [
        Telling(
            **{**one.__dict__, "feature": "told", "against": "steps", "effect": -1.0, "difference": (-0.1, -0.2, 0.1)}
        )
        for one in mute
    ]
    assert most_telling([*strong, *renamed]) is None
    assert most_telling([]) is None
