"""Real processes that wait for each other: a slow one ends nothing, a lost one ends all, in one line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from libreflux.errors import RunError
from libreflux.training import loop
from libreflux.training.callbacks import Callbacks
from libreflux.training.ranks import Ranks, joined

TIMEOUT = 1.5  # seconds
LATE = 2.0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _live(act: Callable[[Ranks], Any], environment: dict[str, str], out: Connection) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        with joined("cpu", TIMEOUT) as ranks:
            out.send(("did", act(ranks)))
    except RunError as error:
        out.send(("refused", str(error)))
    except BaseException:
        out.send(("raised", traceback.format_exc()))


def together(act: Callable[[Ranks], Any], world: int = 2) -> list[tuple[str, Any]]:
    """What each of some processes returned or raised; ("died", None) for one that said nothing."""
    forks, port = multiprocessing.get_context("fork"), free_port()
    processes, heard = [], []
    for rank in range(world):
        inlet, outlet = forks.Pipe(duplex=False)
        named = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in named.items()}
        processes.append(forks.Process(target=_live, args=(act, environment, outlet), daemon=True))
        processes[-1].start()
        outlet.close()
        heard.append(inlet)
    told = []
    for inlet in heard:
        assert inlet.poll(60), "a process waits for ever"
        try:
            told.append(inlet.recv())
        except EOFError:
            told.append(("died", None))
    for process in processes:
        process.join(30)
        assert process.exitcode is not None
    return told


def _late_words(ranks: Ranks) -> Any:
    def first() -> str:
        time.sleep(LATE)
        return "prepared"

    if ranks.rank == 1:
        time.sleep(LATE)
    heard = [ranks.agree_max(10 * ranks.rank), ranks.gather(ranks.rank), ranks.in_turn(first, lambda: "read")]
    total = torch.full((3,), float(ranks.rank + 1))
    ranks.sum_(total)
    return [*heard, total.tolist()]


def test_a_slow_process_is_waited_for_beyond_the_time_out() -> None:
    told = together(_late_words)
    assert told == [("did", [10, [0, 1], said, [3.0] * 3]) for said in ("prepared", "read")]


def _late_sum(ranks: Ranks) -> None:
    if ranks.rank == 1:
        time.sleep(2 * TIMEOUT)
    ranks.sum_(torch.zeros(3))


def test_the_sum_of_the_gradient_has_a_strict_time_out() -> None:
    for rank, (kind, line) in enumerate(together(_late_sum)):
        assert kind == "refused"
        assert f"process {rank} of 2: another process was lost while waiting for the sum" in line


def _one_dies(ranks: Ranks) -> None:
    ranks.meet()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.gather("a word")


def test_a_killed_process_ends_the_others_in_one_line() -> None:
    """Three processes, of which a ring's neighbours alone are connected to the dead one at a time."""
    told = together(_one_dies, 3)
    assert told[1] == ("died", None)
    for rank in (0, 2):
        kind, line = told[rank]
        assert kind == "refused", line
        assert line.startswith(f"process {rank} of 3: another process was lost while waiting for word from the others")
        assert "hint: look at the log of the process that died; the same torchrun command goes on" in line
        assert "\n" not in line
        assert "/pytorch/" not in line
        assert len(line) < 300


def _first_fails(ranks: Ranks) -> None:
    def first() -> None:
        raise RunError("no room", where="there")

    ranks.in_turn(first, lambda: None)


def test_a_process_that_failed_says_so_itself() -> None:
    assert together(_first_fails) == [
        ("refused", "there: no room"),
        ("refused", "process 1: the first process failed (RunError: there: no room)"),
    ]


def test_what_a_card_raises_is_not_called_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error: illegal access")):

        def fails(flat: torch.Tensor, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(dist, "all_reduce", fails)
        with pytest.raises(type(error)):
            Ranks(0, 2).sum_(torch.zeros(1))


def test_nccl_is_told_the_card_and_words_go_through_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: calls.append((backend, more)))

    def new_group(backend: str, timeout: object) -> str:
        calls.append((backend, timeout))
        return "words"

    monkeypatch.setattr(dist, "new_group", new_group)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with joined("cuda:1", 5.0) as ranks:
        assert (ranks.rank, ranks.world, ranks.words) == (1, 2, "words")
    (backend, more), (words, patience) = calls
    assert (backend, more["device_id"], more["timeout"].total_seconds()) == ("nccl", torch.device("cuda:1"), 5)
    assert words == "gloo"
    assert patience.days > 300
    with pytest.raises(RunError, match="WORLD_SIZE without LOCAL_RANK"), joined("cuda"):
        pass


def test_no_process_looks_through_the_cache_while_others_prepare_their_part(
    recipe_tree: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first one would encode again what is not there yet."""
    from libreflux.recipe import Recipe

    began = tmp_path / "times"
    began.mkdir()
    real, all_of_it = loop.prepare_cache, loop.prepare_recipe

    def part_of(recipe: Recipe, source: Any, part: tuple[int, int], **more: Any) -> Any:
        if part[0] == 1:
            time.sleep(LATE)
        made = real(recipe, source, part=part, **more)
        (began / f"part-{part[0]}").touch()
        return made

    def whole(*args: Any, **more: Any) -> Any:
        assert len(list(began.iterdir())) == 2
        return all_of_it(*args, **more)

    monkeypatch.setattr(loop, "prepare_cache", part_of)
    monkeypatch.setattr(loop, "prepare_recipe", whole)
    recipe = Recipe.model_validate(recipe_tree(tmp_path / "run", ema=[]))

    def opened(ranks: Ranks) -> int:
        return len(loop.open_for_training(recipe, tmp_path / "run", None, Callbacks(), ranks, "cpu").batches)

    assert together(opened) == [("did", 5)] * 2
