"""A progress line on terminals of every width: the note gives way first, the count and the time left last."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from libreflux.adapter.targets import brief, lokr_row, table
from libreflux.cli import progress as module
from libreflux.cli.average import told_sources
from libreflux.cli.progress import fitted, progress, rate
from libreflux.printing import counted, readable

NOTE = "loss 0.1234, gradient 0.512, 3.1 pictures/s, 19.7 GB"
LONG = {
    "what": "training",
    "count": "12345/20000",
    "rate": "3.1 s/step",
    "took": "1:02:30",
    "left": "left 6:35:30",
    "note": NOTE,
}
JOBS = [
    ("training", "step", NOTE),
    ("preparing", "item", "12.3 crops/s"),
    ("drawing", "step", "a red fox that jumps over a dog, seed 12345"),
    ("exporting", "layer", ""),
    ("probing", "evaluation", "memory on 文字化け and wide letters 文字化け"),
]


@pytest.mark.parametrize("width", [200, 120, 100, 80, 60, 50, 40, 30])
@pytest.mark.parametrize(
    "note", [NOTE, "", "one word that is longer than any line has room for " * 3, "文字化け, " * 30]
)
def test_parts_give_way_in_their_order(width: int, note: str) -> None:
    shown = fitted(width, {**LONG, "note": note})
    sizes = [part if isinstance(part, int) else cell_len(part) for part in shown.values()]
    assert sum(sizes) + len(sizes) - 1 <= width
    assert (shown["count"], shown["left"]) == (LONG["count"], LONG["left"])
    kept = [name for name in ("what", "bar", "rate", "took", "note") if name in shown]
    assert kept == ["what", "bar", "rate", "took", "note"][: len(kept)]  # none while one before it is left out
    assert {**LONG, "note": shown.get("note", "")} | shown == {**LONG, **shown, "note": shown.get("note", "")}


@pytest.mark.parametrize(
    ("width", "bar", "note"),
    [(200, 40, NOTE), (80, 15, "loss 0.1234"), (72, 10, "loss 0.…"), (66, 13, ""), (40, None, "")],
)
def test_the_note_is_cut_between_its_parts_and_the_bar_takes_what_is_left(
    width: int, bar: int | None, note: str
) -> None:
    shown = fitted(width, LONG)
    assert (shown.get("bar"), shown.get("note", "")) == (bar, note)


@pytest.mark.parametrize("width", [120, 80, 60, 40])
@pytest.mark.parametrize(("what", "unit", "note"), JOBS)
def test_a_terminal_shows_how_far_a_job_is(what: str, unit: str, note: str, width: int) -> None:
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=width, color_system=None)
    with progress(what, unit, console) as report:
        report(12340, 20000, note)
        report(12345, 20000, note)
    lines = [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.getvalue())) if line]
    assert max(map(cell_len, lines)) <= width
    last = lines[-1]
    assert "12345/20000" in last
    assert re.search(r"left (-:--|\d)", last)
    assert "…" not in last[:20]
    assert (what in last) == (width >= 40)
    assert (note in last) == (width == 120) or not note or cell_len(note) < 20


@pytest.mark.parametrize(
    ("number", "told"), [(0.01234, "0.0123"), (1.234, "1.23"), (99.94, "99.9"), (110.4, "110"), (12345.6, "12,346")]
)
def test_no_number_has_an_exponent_because_it_is_large(number: float, told: str) -> None:
    assert readable(number) == told
    assert (readable(110.0, 2), readable(1.25, 2)) == ("110", "1.2")
    assert (rate(2500, "step"), rate(1 / 4000, "step")) == ("2,500 steps/s", "4,000 s/step")


@pytest.mark.parametrize("width", [120, 97, 80, 60, 40])
def test_the_table_of_layers_keeps_to_the_width(width: int) -> None:
    rows = [lokr_row(f"single_transformer_blocks.{n}.norm.linear", 3072, 9216, 8, "**") for n in range(38)]
    rows += [lokr_row("x_embedder", 64, 3072, 4, "**")]
    lines = table(rows, width).split("\n")
    assert max(map(len, lines)) <= width
    assert [re.split(r"\s{2,}", line)[-1] for line in lines] == ["parameters", "16,812,416", "12,304", "16,824,720"]
    assert "linear     38       8" in lines[1]
    assert table(rows, 200) == table(rows)
    assert brief(rows) == "lokr of factor 8 on 38 layers, lokr of factor 4 on 1 layer, 16,824,720 parameters"


def test_what_is_printed_beside_a_bar_goes_where_stdout_goes() -> None:
    """`libreflux generate … > paths.txt`, with the bar on a terminal."""
    out, err = io.StringIO(), io.StringIO()
    console = Console(file=err, force_terminal=True, width=80)
    with contextlib.redirect_stdout(out), progress("drawing", console=console) as report:
        report(1, 2)
        print("a/long/path.png")
        report(2, 2)
    assert out.getvalue() == "a/long/path.png\n"
    assert "path.png" not in err.getvalue()


def test_a_job_that_does_nothing_leaves_no_bar() -> None:
    err = io.StringIO()
    with progress("preparing", console=Console(file=err, force_terminal=True, width=80)):
        pass
    assert "preparing" not in err.getvalue()


def plain_lines(*reports: tuple[int, int], begun: bool) -> list[str]:
    """What a job says that is no live bar, of reports half a second apart."""
    now, err = [0.0], io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.time, "monotonic", lambda: now[0])
        with progress("training", console=Console(file=err, width=80)) as report:
            for number, (done, total) in enumerate(reports):
                report(done, total, begun=begun and number == 0)
                now[0] += 0.5
    return err.getvalue().splitlines()


def test_a_rate_is_of_what_was_done_since_the_job_began() -> None:
    assert plain_lines((0, 1), (1, 1), begun=True) == ["training: 1/1, 2 steps/s, took 0:00"]
    assert plain_lines((1, 2), (2, 2), begun=True) == ["training: 2/2, 2 steps/s, took 0:00"]  # resumed after one
    assert plain_lines((2, 3), (3, 3), begun=False) == ["training: 3/3, 2 steps/s, took 0:00"]


def test_a_live_bar_stands_there_before_the_first_step() -> None:
    err = io.StringIO()
    with progress("training", console=Console(file=err, force_terminal=True, width=80)) as report:
        report(0, 4, begun=True)
    assert "0/4" in err.getvalue()
    assert "/s" not in err.getvalue()
    err = io.StringIO()
    with progress("training", console=Console(file=err, force_terminal=True, width=80)) as report:
        report(0, 1, begun=True)
        report(1, 1)
    assert "1/1" in err.getvalue()
    assert "/s" not in err.getvalue()  # of one step there is no rate yet


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([3], "1 source, step 3"),
        ([2, 4], "2 sources, steps 2 to 4"),
        ([3, 3], "2 sources, step 3"),
        ([500, 20_000], "2 sources, steps 500 to 20,000"),
    ],
)
def test_averages_name_their_sources(steps: list[int], told: str) -> None:
    assert told_sources(steps) == told


def test_a_count_and_what_it_counts() -> None:
    assert [counted(count, "picture") for count in (0, 1, 2, 1200)] == [
        "0 pictures",
        "1 picture",
        "2 pictures",
        "1,200 pictures",
    ]
    assert counted(2, "process", "processes") == "2 processes"
    assert counted(1, "process", "processes") == "1 process"
