"""One way to run the command line, in this process; what its tests share: a small trained run, and what probes need."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from libreflux.cli import main
from libreflux.emoji import compose


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def run(*args: object) -> Result:
    """`libreflux ARGS`: exit code, stdout and stderr. An exception that would print a traceback is raised."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["libreflux", *map(str, args)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            return Result(int(end.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="session", name="run")
def run_fixture() -> Callable[..., Result]:
    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five composed pictures with captions."""
    return compose.write_folder(tmp_path_factory.mktemp("data") / "pictures", 5, 1)


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained judge of emoji; read it, do not write into it."""
    import torch

    from libreflux.probing.judges import Judge

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    Judge({"subject": [subject.name for subject in compose.subjects()], "colour": list(compose.COLOURS)}).save(path)
    return path


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one subject: compose.write_folder with no pair, its short captions alone; read them only."""
    folder = tmp_path_factory.mktemp("probed") / "plain"
    folder.mkdir()
    for index in range(5):
        what = compose.scene(5, index, pairs=0.0)
        compose.render(what).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(compose.short_caption(what))
    return folder


RECIPE = """\
model: {model}
base: fp32
data: [{{path: {pictures}}}]
resolution: 32
adapter: {{targets: [{{layers: "transformer_blocks.*.attn.**", factor: 4}}]}}
batch: 2
steps: 3
optimizer: {{learning_rate: 1e-2}}
samples: {{every: 3, prompts: ["a red apple"], guidance: [1, 3]}}
save: {{every: 2}}
out: {out}
"""


@pytest.fixture(scope="session")
def recipe(tiny_model_dir: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "r.yaml"
    path.write_text(RECIPE.format(model=tiny_model_dir, pictures=pictures, out=folder / "run"))
    return path


@pytest.fixture(scope="session")
def trained(recipe: Path) -> Path:
    """The adapter that `libreflux train` made."""
    result = run("train", recipe)
    assert result.code == 0, result.err
    return recipe.parent / "run" / "adapter.safetensors"


@pytest.fixture(scope="session")
def libreflux(tiny_model_dir: Path) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs `libreflux ARGS` in a working folder, in a process of its own, on a terminal of this encoding."""
    script = Path(__file__).with_name("forked_cli.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, str(script), str(tiny_model_dir)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(cwd: Path, *args: object, encoding: str = "utf-8") -> tuple[int, str, str]:
            asked = {"args": [*map(str, args)], "cwd": str(cwd), "encoding": encoding}
            print(json.dumps(asked), file=process.stdin, flush=True)
            assert process.stdout is not None
            code, out, err = json.loads(process.stdout.readline())
            return code, out, err

        yield run
        process.stdin.close()
