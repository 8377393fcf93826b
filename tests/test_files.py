from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from libreflux import files
from libreflux.errors import RunError

KILLED_AT = {
    "half_written": "files.Path.write_bytes = lambda path, data: (open(path, 'wb').write(data[:9]), die())",
    "before_sync": "os.fsync = lambda handle: die()",
    "before_rename": "os.replace = lambda old, new: die()",
    "after_rename": "real = os.replace; os.replace = lambda old, new: (real(old, new), die())",
}
PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from libreflux import files
def die(): os.kill(os.getpid(), signal.SIGKILL)
"""


def run(code: str, *args: object) -> int:
    return subprocess.run([sys.executable, "-c", PREAMBLE + code, *map(str, args)], check=False).returncode


@contextmanager
def background(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """A process that has printed its first line, killed at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, *map(str, args)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().strip() == "ready"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("moment", KILLED_AT)
def test_a_killed_write_leaves_the_old_file_or_the_new_one(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "state.json"
    files.atomic_write_text(path, "old" * 100)
    code = f"{KILLED_AT[moment]}\nfiles.atomic_write_text(Path(sys.argv[1]), 'new' * 100)"
    assert run(code, path) == -signal.SIGKILL
    assert path.read_text() == ("new" if moment == "after_rename" else "old") * 100


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a" / "numbers.json"
    with pytest.raises(ValueError, match="JSON"):
        files.atomic_write_json(path, {"loss": float("nan")})
    files.atomic_write_json(path, {"loss": 1.0, "name": "é"})
    with pytest.raises(TypeError):
        files.atomic_write_bytes(path, "text")  # type: ignore[arg-type]
    assert json.loads(path.read_text(encoding="utf-8")) == {"loss": 1.0, "name": "é"}
    assert os.listdir(path.parent) == ["numbers.json"]


def test_a_write_that_the_disk_refuses_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path, tensors = tmp_path / "x", {"w": torch.zeros(99)}

    def stage() -> None:
        with files.staged_dir(path) as folder:
            save_file(tensors, folder / "w")

    writes: list[Callable[[], object]] = [
        partial(files.atomic_write_bytes, path, bytes(99)),
        partial(files.atomic_save_safetensors, tensors, path),
        stage,
    ]
    for write in writes:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))  # as on a full disk, but for the error's number
        try:
            with pytest.raises(RunError) as refusal:
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert str(refusal.value).startswith(f"{path}: File too large; hint: make room")
    assert os.listdir(tmp_path) == []


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    files.atomic_write_text(tmp_path / "ours", "x")
    files.atomic_save_safetensors({"w": torch.zeros(2)}, tmp_path / "tensors")
    with files.staged_dir(tmp_path / "folder") as staging:
        save_file({"w": torch.zeros(2)}, staging / "theirs")  # safetensors makes it 0600
    (tmp_path / "plain").write_text("x")
    (tmp_path / "plain_folder").mkdir()
    for name in ("ours", "tensors", "folder/theirs"):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode, name
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain_folder").stat().st_mode


def test_safetensors_keep_values_metadata_and_strided_views(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open

    weight = torch.arange(6.0, requires_grad=True).reshape(2, 3)
    files.atomic_save_safetensors({"w": weight.T}, tmp_path / "w.safetensors", {"schema": "1"})
    with safe_open(tmp_path / "w.safetensors", framework="pt") as opened:
        assert torch.equal(opened.get_tensor("w"), weight.detach().T)
        assert opened.metadata() == {"schema": "1"}


def test_a_staged_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "runs" / "model"
    with files.staged_dir(final) as staging:
        (staging / "part").mkdir()
        (staging / "part" / "w").write_text("x")
        assert staging.parent == final.parent
        assert not final.exists()
    assert (final / "part" / "w").read_text() == "x"
    assert os.listdir(final.parent) == ["model"]


def test_a_failed_staged_folder_disappears_and_an_existing_one_is_refused(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with pytest.raises(FileNotFoundError), files.staged_dir(final) as staging:
        (staging / "no such folder" / "w").write_text("x")
    assert os.listdir(tmp_path) == []
    final.mkdir()
    with pytest.raises(RunError, match=r"model: already exists; hint:"), files.staged_dir(final):
        pass
    final.rmdir()
    with pytest.raises(RunError, match="already exists"), files.staged_dir(final) as staging:
        final.mkdir()  # somebody else was faster
    assert os.listdir(tmp_path) == ["model"]


STAGE = """
with files.staged_dir(Path(sys.argv[1])) as staging:
    (staging / "w").write_text("x")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_stager_left_is_swept_and_a_live_one_is_not(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with background(STAGE, final):
        [left, lock] = sorted(tmp_path.iterdir())
        assert lock.name == f"{left.name}.lock"
        with files.staged_dir(tmp_path / "model2"):
            pass
        with pytest.raises(FileNotFoundError), files.staged_dir(final) as staging:
            (staging / "no such folder" / "w").write_text("x")
        assert left.exists()
    assert left.exists()
    with files.staged_dir(final):
        assert not left.exists()
    assert sorted(os.listdir(tmp_path)) == ["model", "model2"]


def test_a_manifest_sees_every_damage(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "weights").write_bytes(b"0123456789")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(RunError, match="no manifest"):
        files.verify_manifest(tmp_path)
    files.write_manifest(tmp_path)
    files.verify_manifest(tmp_path)
    listed = json.loads((tmp_path / "manifest.json").read_text())
    assert listed["schema"] == 1
    assert set(listed["files"]) == {"deep/weights", "state.json"}

    weights = tmp_path / "deep" / "weights"
    weights.write_bytes(b"0123456788")
    with pytest.raises(RunError, match=r"deep/weights: damaged: its SHA-256"):
        files.verify_manifest(tmp_path)
    weights.write_bytes(b"012345678")
    with pytest.raises(RunError, match=r"deep/weights: damaged: 9 bytes instead of 10"):
        files.verify_manifest(tmp_path)
    weights.unlink()
    with pytest.raises(RunError, match=r"deep/weights: listed in the manifest but missing"):
        files.verify_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "[]\n", "{\n", '{"schema": 1}\n', '{"schema": 1, "files": {"a": {}}}\n'])
def test_a_bad_manifest_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(RunError, match="unreadable manifest"):
        files.verify_manifest(tmp_path)


def test_a_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema": 2, "files": {}}\n')
    with pytest.raises(RunError, match="schema 2 is not 1"):
        files.verify_manifest(tmp_path)


HOLD = """
with files.lock(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_lock_has_one_holder_and_dies_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with background(HOLD, folder) as holder:
        with pytest.raises(RunError, match=f"run: in use by process {holder.pid}; hint:"), files.lock(folder):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with files.lock(folder):
            assert (folder / ".lock").read_text() == f"{os.getpid()}\n"
            with pytest.raises(RunError, match="in use"), files.lock(folder):
                pass
    with files.lock(folder):
        pass


def test_a_lock_on_a_folder_that_its_last_holder_removed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lock = tmp_path / "run", fcntl.flock
    removed: list[Path] = []

    def flock(handle: int, how: int) -> None:
        if not removed:
            removed.append(folder)
            shutil.rmtree(folder)
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.lock(folder), pytest.raises(RunError, match=f"in use by process {os.getpid()}"), files.lock(folder):
        pass
    assert removed


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_file(tmp_path / "abc") == expected


def test_equal_tensors_and_metadata_are_equal_bytes(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open

    tensors = {"b": torch.arange(5.0), "a": torch.ones(3, dtype=torch.bfloat16)}
    metadata = {name: f'"{name}" \u00fc\n' for name in "qwertyuiop"}  # ten keys: 3.6 million orders
    written = []
    for number in range(3):
        path = tmp_path / f"{number}.safetensors"
        files.atomic_save_safetensors(tensors, path, metadata)
        written.append(path.read_bytes())
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == metadata
            assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert written[0] == written[1] == written[2]
