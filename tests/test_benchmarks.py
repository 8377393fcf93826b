"""benchmarks/speed runs, says what it found, and its arithmetic is right. No time is asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.speed import flops, layer, passes
from benchmarks.speed.__main__ import main
from benchmarks.speed.operations import Operations
from benchmarks.speed.page import page
from benchmarks.speed.ratios import Measured, ratio, ratio_through
from benchmarks.speed.results import Row, text
from benchmarks.speed.sizes import SIZES, empty_network, network
from benchmarks.speed.timing import Contender, groups, take_turns
from torch.utils.flop_counter import FlopCounterMode

from libreflux.model.opening import open_model

ROOT = Path(__file__).parent.parent
EMOJI = ("--size", "emoji", "--device", "cpu", "--quick")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two parts and the file of both."""
    out = tmp_path_factory.mktemp("bench")
    assert main(["limits", "--here", *EMOJI, "--out", str(out)]) == 0
    assert main(["layer", "--here", *EMOJI, "--out", str(out)]) == 0
    assert main(["layer", *EMOJI, "--out", str(out), "--json", str(out / "all" / "run.json")]) == 0
    return out


def test_a_run_leaves_its_parts_and_one_file_of_all(run: Path) -> None:
    tree = json.loads((run / "all" / "run.json").read_text())
    assert [part["part"] for part in tree["parts"]] == ["limits", "layer"]
    limits, adapted = tree["parts"]
    assert limits["limits"]["bf16"] > 0
    assert limits["machine"]["versions"]["torch"] == torch.__version__
    found = {one["name"]: one for one in adapted["rows"][0]["contenders"]}
    assert set(found) == {layer.BARE, layer.OURS_LAYER, "lycoris, rebuilding W", "lycoris, bypass"}
    for one in found.values():
        assert one["low"] <= one["median"] <= one["high"]
        assert len(one["seconds"]) == one["rounds"] == 3
    assert found[layer.BARE]["operations"] < found[layer.OURS_LAYER]["operations"]


def test_what_is_there_is_not_measured_again(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.glob("*.json")}
    assert main(["layer", *EMOJI, "--out", str(run)]) == 0
    assert {path: path.read_bytes() for path in run.glob("*.json")} == before
    printed = capfd.readouterr().out
    assert "LoKr factor 4 on 256 → 1024" in printed
    assert "— layer …" not in printed


def test_a_part_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert main(["limits", *EMOJI, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "limits.json").read_text())["limits"]["int8"] > 0


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["no-such-part", *EMOJI, "--out", str(tmp_path)])


def test_the_page_has_the_figures_of_a_run(run: Path) -> None:
    written = page([run / "all" / "run.json"])
    assert "**LoKr factor 4 on 256 → 1024, forward and backward, 128 rows**" in written
    assert "| lycoris, bypass |" in written
    assert "the emoji transformer" in written
    with pytest.raises(ValueError, match="holds no parts"):
        page([run / "layer.json"])


def test_the_page_in_docs_is_the_one_of_the_recorded_runs() -> None:
    written = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert written == page(), "python -m benchmarks.speed page > docs/performance.md"


def test_what_cannot_be_imported_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lycoris", None)
    monkeypatch.setitem(sys.modules, "lycoris.modules.lokr", None)
    found = take_turns(layer.contenders(SIZES["emoji"], 8, "cpu"), rounds=1, device="cpu", room=1e9)
    reasons = {one.name: one.reason for one in found}
    assert reasons[layer.OURS_LAYER] is None
    assert str(reasons["lycoris, bypass"]).startswith("skipped: ")
    told = text({"part": "layer", "rows": [Row("a row", (), None, found).as_json(None)], "figures": []})
    assert "lycoris, bypass: skipped: " in told


def test_a_failure_is_told_and_the_others_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    def broken() -> Any:
        raise RuntimeError("no such kernel\nand more")

    found = take_turns(
        [Contender("whole", lambda: lambda: None), Contender("broken", broken, ours=True)],
        rounds=2,
        device="cpu",
        room=1e9,
    )
    assert len(found[0].seconds) == 2
    assert found[1].reason == "failed: RuntimeError: no such kernel"
    assert "no such kernel" in capfd.readouterr().err


def test_ratios_are_medians_over_shared_rounds() -> None:
    stack = Measured("stack", seconds={"0.0": 4.0, "0.1": 9.0, "0.2": 10.0})
    ours = Measured("ours", seconds={"0.0": 2.0, "0.1": 3.0, "0.2": 2.0, "1.0": 1.0})
    late = Measured("late", seconds={"1.0": 0.5})
    assert ratio(stack.seconds, ours.seconds) == 3.0  # of 2, 3 and 5
    assert ratio(stack.seconds, late.seconds) is None
    assert ratio_through(stack, late, [stack, ours, late]) == 6.0
    row = Row("work", ("stack",), 3e12, [stack, ours, late]).as_json(limit=2.0)
    first, second, third = row["contenders"]
    assert row["limit_seconds"] == 1.5
    assert (first["median"], first["low"], first["high"], first["times_faster_than"]) == (9.0, 4.0, 10.0, {})
    assert (second["median"], second["times_faster_than"], second["share_of_limit"]) == (2.0, {"stack": 3.0}, 0.75)
    assert third["times_faster_than"] == {"stack": 6.0}


def test_contenders_that_do_not_fit_together_meet_the_first_one_each() -> None:
    made = [Contender(name, lambda: lambda: None, bytes=size) for name, size in zip("abcd", (2, 3, 3, 9), strict=True)]
    named = [[one.name for one in group] for group in groups(made, room=8)]
    assert named == [["a", "b", "c"], ["a", "d"]]
    assert [[one.name for one in group] for group in groups(made, room=100)] == [["a", "b", "c", "d"]]


def test_operations_are_counted_without_views() -> None:
    with Operations() as operations:
        (torch.ones(4, 4).t().reshape(16)[2:] * 2 + 1).sum()
    assert operations.seen["mul"] == operations.seen["add"] == operations.seen["sum"] == 1
    assert not {"t", "view", "slice"} & set(operations.seen)


def test_the_emoji_size_is_that_of_the_emoji_transformer() -> None:
    config = open_model("emoji-base").part_config("transformer")
    ours = SIZES["emoji"].config
    assert {name: list(value) if isinstance(value, tuple) else value for name, value in ours.items()} == {
        name: config[name] for name in ours
    }


def test_the_slice_has_the_adapter_that_is_told() -> None:
    adapter = passes.adapted(SIZES["slice"], empty_network(SIZES["slice"]).to(torch.bfloat16))
    assert round(sum(one.numel() for one in adapter.parameters()) / 1e6) == 78


def test_counted_products_are_those_of_the_network() -> None:
    size, text_tokens = SIZES["emoji"], 24
    run = passes.own_step(size, 64, text_tokens, "cpu", "bf16")
    with FlopCounterMode(display=False) as counter:
        run()
    counted = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counted.items() if "scaled_dot" not in str(operation))
    ours = flops.training_flops(size, 16, text_tokens) - 4 * flops.forward_flops(size, 16, text_tokens)[1]
    assert ours == pytest.approx(products, rel=0.1)  # the network's ends and its modulations are left out
    assert network(size, "cpu").dtype == torch.bfloat16
