from __future__ import annotations

import ntpath
import posixpath
from pathlib import Path

import pytest

from libreflux.adapter.io import AdapterFile
from libreflux.cli.progress import rate
from libreflux.errors import AdapterError
from libreflux.model.facts import KNOWN, freed
from libreflux.printing import clock
from libreflux.values import adapter_argument
from libreflux.workflows.adapters import (
    adapted_facts,
    as_typed,
    default_model,
    result_name,
)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
        ("odd:name.safetensors", ("odd:name.safetensors", 1.0)),
        ("C:/x/a.safetensors:2", ("C:/x/a.safetensors", 2.0)),
        ("C:/x/a.safetensors", ("C:/x/a.safetensors", 1.0)),
    ],
)
def test_adapter_argument(text: str, wanted: tuple[str, float]) -> None:
    assert adapter_argument(text) == wanted


@pytest.mark.parametrize("text", ["a.safetensors:", "a.safetensors:nan", "a.safetensors:inf", ":1", "a:b"])
def test_bad_weights_are_refused(text: str) -> None:
    with pytest.raises(AdapterError, match="is no weight"):
        adapter_argument(text)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (r"C:\Users\me\runs\a", "~/runs/a"),
        ("c:/users/ME/runs/a", "~/runs/a"),
        (r"C:\Users\me", r"C:\Users\me"),
        (r"C:\Users\mean\a", r"C:\Users\mean\a"),
        (r"D:\runs\a", r"D:\runs\a"),
        (r"runs\a", r"runs\a"),
    ],
)
def test_a_home_of_windows_is_kept_as_any_other(monkeypatch: pytest.MonkeyPatch, given: str, kept: str) -> None:
    monkeypatch.setenv("USERPROFILE", "C:\\Users\\me")
    assert as_typed(given, ntpath) == kept


@pytest.mark.parametrize(
    ("home", "given", "kept"),
    [
        ("/home/me", "/home/me/a b", "~/a b"),
        ("/home/me/", "/home/me/a\\b", "~/a\\b"),
        ("/home/me", "/home/me", "/home/me"),
        ("/home/me", "/home/mean/a", "/home/mean/a"),
        ("/home/me", "/Home/me/a", "/Home/me/a"),
        ("/", "/a", "/a"),
        ("me", "me/a", "me/a"),
    ],
)
def test_a_home_that_the_shell_wrote_out(monkeypatch: pytest.MonkeyPatch, home: str, given: str, kept: str) -> None:
    monkeypatch.setenv("HOME", home)
    assert as_typed(given, posixpath) == kept


def test_clock_and_rate() -> None:
    assert [clock(s) for s in (0, 75, 3700)] == ["0:00", "1:15", "1:01:40"]
    assert rate(2.5, "pass") == "2.5 passes/s"
    assert (rate(2.5, "step"), rate(0.25, "step"), rate(0, "step")) == ("2.5 steps/s", "4 s/step", "")


def test_what_is_trained_on_a_few_step_student_is_drawn_as_a_free_model() -> None:
    schnell = KNOWN["black-forest-labs/FLUX.1-schnell"]
    free = freed(schnell)
    assert (free.steps, free.guidance, free.max_tokens) == (28, 3.5, 512)
    assert freed(free) == free
    assert freed(KNOWN["black-forest-labs/FLUX.1-dev"]) == KNOWN["black-forest-labs/FLUX.1-dev"]
    said = {"text_padding": "drop", "max_tokens": "512", "sampling_steps": "28", "guidance": "3.5"}
    facts = adapted_facts(schnell, [(AdapterFile("a", {}, said), 1.0)])
    assert (facts.text_padding, facts.steps, facts.guidance, facts.max_tokens) == ("drop", 28, 3.5, 512)
    assert adapted_facts(schnell, [(AdapterFile("lycoris", {}, {}), 1.0)]) == schnell


def test_the_demo_model_says_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    assert default_model([]) == "emoji-libre"
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "emoji-libre is a demo model: emoji only, 128 px",
        "for photographs: `model` jimmycarter/LibreFLUX (34 GB)",
    ]
    assert all(len(line) <= 80 for line in lines)


def test_a_result_is_named_by_its_model_and_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    file = run / "adapter.safetensors"
    file.touch()
    assert result_name("org/a model", []) == "a-model"
    assert result_name("emoji-base", [run]) == result_name("emoji-base", [file]) == "emoji-base+my-run"
    monkeypatch.chdir(run)
    assert result_name(".", [Path("adapter.safetensors")]) == "my-run+my-run"
