"""benchmarks/freedom.py and benchmarks/finetune.py: their tables and statistics, on planted results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import features, finetune
from benchmarks.freedom import COLUMNS, MAIN, Found, arms_of, csv_rows, parsed, table

from libreflux import plainjson
from libreflux.emoji import compose
from libreflux.probing.metrics.bootstrap import mean, measured
from libreflux.probing.metrics.telling import Telling
from libreflux.probing.results import Result


def result(name: str, level: float, seed: int) -> Result:
    values = level + 0.05 * np.random.default_rng(seed).standard_normal(40)
    at = {"guidance": 4.0}
    rows = measured("clipped", at, mean(values), 40, {"all": np.arange(40)}, seed=0)
    return Result(model={"name": name}, settings={"own_guidance": 1.0}, versions={}, seconds=1.0, measures=rows)


def test_the_table_and_the_csv_have_every_arm_over_its_seeds() -> None:
    found = Found(
        ends={"schnell": result("s", 1.0, 0), "base": result("b", 0.0, 1)},
        arms={MAIN: [result("m", 0.2, 2), result("m", 0.3, 3)], "recipe on random": [result("r", 1.5, 4)]},
    )
    text = table(found)
    assert "| measure | n | schnell | recipe (freedom) | recipe on random (freedom) | base |" in text
    assert "clipped, guidance 4 | 40 |" in text
    assert f"{MAIN}: 2, recipe on random: 1" in text
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in csv_rows(found)]
    by_arm = {row["arm"]: row for row in rows}
    assert set(by_arm) == {"schnell", "base", MAIN, "recipe on random"}
    main = by_arm[MAIN]
    assert (main["seeds"], main["n"], main["freedom"]) == ("2", "40", "75")
    assert int(main["freedom_low"]) < 75 <= int(main["freedom_high"])
    assert by_arm["recipe on random"]["freedom"] == "-50"
    assert by_arm["schnell"]["freedom"] == ""


def test_every_arm_is_asked_for(tmp_path: Path) -> None:
    words = ["--work", str(tmp_path), "--random", "m", "--pictures", str(tmp_path), "--precision", "int8,bf16"]
    arms = arms_of(parsed([*words, "--other", "openmoji=o"]))
    assert [(one.name, one.precision, len(one.seeds)) for one in arms] == [
        ("recipe", "int8", 3),
        ("recipe on base", "int8", 1),
        ("recipe on random", "int8", 1),
        ("recipe on openmoji", "int8", 1),
        ("recipe, bf16", "bf16", 3),
    ]


def pictures(look: str, seed: int) -> torch.Tensor:
    found = []
    for index in range(24):
        picture = compose.LOOKS[look].picture(compose.render(compose.scene(seed, index, pairs=0.0), 64))
        found.append(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1))
    return torch.stack(found).float().div(127.5).sub(1)


def test_a_judge_of_a_look_is_right_on_other_pictures_and_says_how_often() -> None:
    judge = finetune.Judge(pictures("pencil", 1), pictures("plain", 2))
    assert judge(pictures("pencil", 3)).mean() > 0.9
    assert judge(pictures("plain", 4)).mean() < 0.1
    assert judge.asked == (12, 12)
    assert judge.told.startswith("The judge is right on other real pictures: 12 of 12 of the set [0.76, 1.00]")


def test_intervals_are_over_seeds_and_prompts_and_a_single_share_is_wilsons() -> None:
    one = finetune.interval(np.ones((1, 24)))
    assert one == pytest.approx((1, 0.862, 1), abs=1e-3)
    apart = np.stack([np.full(24, level) for level in (0.2, 0.5, 0.8)])
    value, low, high = finetune.interval(apart)
    assert value == pytest.approx(0.5)
    assert low < 0.1  # Student's t of three seeds reaches 0.37 to both sides
    assert high > 0.9
    same = finetune.interval(np.ones((3, 24)))
    assert same == pytest.approx((1, 0.862, 1), abs=1e-3)


def test_the_interval_of_a_loss_is_students_over_seeds() -> None:
    value, low, high = finetune.loss_interval([0.2, 0.5, 0.8], [1e-6] * 3)
    assert value == pytest.approx(0.5)
    assert (0.5 - low, high - 0.5) == pytest.approx((0.745, 0.745), abs=0.001)  # 4.303 · 0.3 / √3
    assert finetune.loss_interval([0.5], [0.1]) == pytest.approx((0.5, 0.304, 0.696))


def test_features_that_nobody_trained_are_functions_of_the_picture() -> None:
    pixels = pictures("plain", 5)[:3]
    for name, feature in features.plain_features().items():
        found = feature(pixels)
        assert len(found) == 3, name
        assert torch.isfinite(found).all(), name
        assert torch.equal(found, features.plain_features()[name](pixels)), name


def test_the_choice_is_written_before_the_other_half_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, ...]] = []

    def compared(_args: object, rows: np.ndarray, *_others: object) -> list[Telling]:
        seen.append(tuple(rows))
        assert (tmp_path / "choice.json").is_file() == (len(seen) == 2)
        return []

    monkeypatch.setattr(features, "compared", compared)
    data = compose.write_folder(tmp_path / "pictures", 8, 1)
    features.main(["--work", str(tmp_path), "--quick", "--data", str(data)])
    assert not set(seen[0]) & set(seen[1])
    assert plainjson.parse((tmp_path / "measured.json").read_text("utf-8"))["chosen"] is None
    assert f"Of {len(seen[1])} pictures: intervals of fewer than 30 are too narrow." in capsys.readouterr().out


def test_the_halves_that_choose_and_measure_share_no_caption(tmp_path: Path) -> None:
    captions = [f"a {number % 12} on red" for number in range(48)]
    choosing, measuring = features.halves_by_caption(captions, 0)
    assert sorted([*choosing, *measuring]) == list(range(48))
    assert not {captions[row] for row in choosing} & {captions[row] for row in measuring}
    with pytest.raises(SystemExit, match="fewer than two captions"):
        features.halves_by_caption([""] * 8, 0)
    assert features.few(choosing) == "Of 24 pictures: intervals of fewer than 30 are too narrow. "
    assert features.few(np.arange(30)) == ""
    judge = tmp_path / "judge.safetensors"
    judge.write_bytes(b"one")
    before = features.judge_digest(judge)
    judge.write_bytes(b"two")
    assert features.judge_digest(judge) != before
    black, white = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert features.told_of(["a", "b"], black) != features.told_of(["a", "b"], white)
