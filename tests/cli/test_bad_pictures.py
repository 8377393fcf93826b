"""A folder of everything that is called a picture: training uses what can be used and lists the rest with a reason."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

from odd_pictures import UNUSABLE, UNUSUAL, noise, saved
from rights import bound_by_modes

STRANGE = {
    "loop": "Too many levels of symbolic links",
    "gone": "No such file",
    "pipe": "not a regular file",
    "secret": "Permission denied",
}


def write_corpus(folder: Path) -> tuple[dict[str, str], set[str]]:
    """File name → what its reason says, and the ids of the pictures that can be used; each has a caption."""
    folder.mkdir()
    reasons, usable = {}, set()
    for name, (suffix, reason, make) in UNUSABLE.items():
        (folder / f"{name}.{suffix}").write_bytes(make())
        reasons[f"{name}.{suffix}"] = reason
    for name, (suffix, make) in UNUSUAL.items():
        data = make()
        (folder / f"odd_{name}.{suffix}").write_bytes(data)
        usable.add(hashlib.sha256(data).hexdigest()[:32])
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "secret.png").write_bytes(saved(noise(seed=9), "PNG"))
    (folder / "secret.png").chmod(0)
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"a picture called {path.stem}", encoding="utf-8")
    (folder / "folder.png").mkdir()  # no picture at all, so nothing to say of it
    return reasons | {f"{name}.png": reason for name, reason in STRANGE.items()}, usable


def test_a_run_over_bad_pictures_uses_the_good_ones(run: Callable, recipe: Path, tmp_path: Path) -> None:
    reasons, usable = write_corpus(tmp_path / "data")
    assert len(reasons) >= 25
    assert len(usable) >= 25
    command = ["train", recipe, f"data.0.path={tmp_path / 'data'}", f"out={tmp_path / 'run'}", "steps=2"]
    with bound_by_modes():
        refusal = run(*command)
        done = run(*command, "max_quarantined=0.9")
    assert refusal.code == 2
    told = f"{len(reasons)} of {len(reasons) + len(usable)} pictures cannot be used"
    assert told in refusal.err.splitlines()[-1]
    assert "hint:" in refusal.err.splitlines()[-1]
    assert done.code == 0, done.err
    lines = (tmp_path / "run" / "cache" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    found = {Path(row["path"]).name: row["reason"] for row in map(json.loads, lines)}
    assert found.keys() == reasons.keys()
    assert [(name, found[name]) for name, reason in reasons.items() if reason.lower() not in found[name].lower()] == []
    index = sqlite3.connect(tmp_path / "run" / "cache" / "index.sqlite3")
    assert index.execute("SELECT count(*) FROM latents").fetchone() == (len(usable),)
    index.close()
    assert f"{len(usable)} pictures" in done.err

    (tmp_path / "data" / "secret.png").chmod(0o644)  # mended without a new modification time
    again = run(*command, "max_quarantined=0.9", f"out={tmp_path / 'other'}", f"cache={tmp_path / 'run' / 'cache'}")
    assert again.code == 0
    assert f"{len(usable) + 1} pictures" in again.err
