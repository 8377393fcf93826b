"""Captions come beside what is there: lists and side-cars of others, killed processes, several parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import libreflux
from libreflux.captioning import lists
from libreflux.captioning.journal import ANSWERS, KEPT, Entry, Journal, part_folder
from libreflux.data.sources import read_source
from libreflux.errors import DataError, RunError
from libreflux.files import lock
from libreflux.recipe import DataSource
from libreflux.workflows.caption import CaptionResult
from served import Asked, Said, says, serving

BOTH = {"short": "S", "long": "L"}


def well(asked: Asked, number: int) -> Said:
    return says(f"{asked.prompt} of {asked.key[1][0]}")


def paint(folder: Path, count: int) -> Path:
    (folder / "sub").mkdir(parents=True)
    for index in range(count):
        name = f"sub/{index}.png" if index % 2 else f"{index}.png"
        Image.new("RGB", (32, 32), (16 * index, 200, 96)).save(folder / name)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return paint(tmp_path / "photos", 4)


def caption(photos: Path, url: str, **more: Any) -> CaptionResult:
    return libreflux.caption(photos, endpoint=url, **{"captions": BOTH, "batch": 1, **more})


def table(photos: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (photos / "metadata.jsonl").read_text("utf-8").splitlines()]


def captions_of(photos: Path) -> dict[str, dict[str, str]]:
    samples, _ = read_source(DataSource(path=str(photos)))
    return {Path(one.file).name: dict(zip(one.captions, one.kinds, strict=True)) for one in samples}


def beside_others(photos: Path) -> list[str]:
    """A side-car, a plain row, named rows in the list of the folder and in that of a sub-folder."""
    lines = [
        '{"text": "by hand",  "file_name": "0.png"}',
        '{"file_name":"./2.png","captions":{"short":"hand-made"},"n":1}',
    ]
    (photos / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (photos / "2.txt").write_text("a side-car\n", encoding="utf-8")
    nested = {"file_name": "1.png", "captions": {"long": "of the sub-folder", "title": "One"}}
    (photos / "sub" / "metadata.jsonl").write_text(json.dumps(nested) + "\n", encoding="utf-8")
    return lines


def test_what_is_there_stays_and_what_lacks_comes_beside_it(photos: Path) -> None:
    lines = beside_others(photos)
    nested = (photos / "sub" / "metadata.jsonl").read_bytes()
    with serving(well) as served:
        made = caption(photos, served.url)
        assert (made.written, made.kept, made.skipped) == (6, 2, 0)
        assert caption(photos, served.url).written == 0
    assert (photos / "metadata.jsonl").read_text("utf-8").splitlines()[:2] == lines
    assert (photos / "sub" / "metadata.jsonl").read_bytes() == nested
    assert captions_of(photos) == {
        "0.png": {"by hand": "", "S of 0": "short", "L of 0": "long"},
        "1.png": {"of the sub-folder": "long", "One": "title", "S of 1": "short"},
        "2.png": {"hand-made": "short", "L of 2": "long", "a side-car": ""},
        "3.png": {"S of 3": "short", "L of 3": "long"},
    }


def test_marks_line_ends_links_and_odd_names_of_a_list_stay(photos: Path) -> None:
    own = photos.parent / "kept" / "list.jsonl"
    own.parent.mkdir()
    lines = [
        b'{"file_name": "0.png",  "text": "x \\u00e9"}',
        b"",
        '{"file_name": "0.png", "captions": {"title": "Füchse\u2028im Schnee"}, "n": 1.50}'.encode(),
    ]
    own.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    (photos / "metadata.jsonl").symlink_to(own)
    odd = 'a "b"\n\u2028ä \\n.png'
    (photos / "2.png").rename(photos / odd)
    with serving(well) as served:
        assert caption(photos, served.url).written == 8
        assert caption(photos, served.url).written == 0
    assert (photos / "metadata.jsonl").is_symlink()
    raw = own.read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf" + lines[0] + b"\r\n" + lines[2] + b"\r\n")
    assert raw.count(b"\n") == raw.count(b"\r\n") == 6
    found = captions_of(photos)
    assert found["0.png"] == {"x é": "", "Füchse im Schnee": "title", "S of 0": "short", "L of 0": "long"}
    assert found[odd] == {"S of 2": "short", "L of 2": "long"}


def test_pictures_with_other_captions_are_left_alone_if_wanted(photos: Path) -> None:
    beside_others(photos)
    with serving(well) as served:
        made = caption(photos, served.url, existing="skip")
        assert caption(photos, served.url, existing="skip").written == 0
    assert (made.written, made.skipped, made.uncaptioned) == (2, 3, 0)
    assert captions_of(photos)["3.png"] == {"S of 3": "short", "L of 3": "long"}
    assert "S of 0" not in captions_of(photos)["0.png"]


def test_only_overwrite_replaces_captions_and_only_those_of_its_names(photos: Path) -> None:
    beside_others(photos)
    with serving(well) as served:
        caption(photos, served.url)
        other = {"short": "T"}
        assert caption(photos, served.url, captions=other).written == 0
        made = caption(photos, served.url, captions=other, existing="overwrite")
        assert caption(photos, served.url, captions=other, existing="overwrite").written == 0
    assert made.written == 4
    assert captions_of(photos) == {
        "0.png": {"by hand": "", "T of 0": "short", "L of 0": "long"},
        "1.png": {"of the sub-folder": "long", "One": "title", "T of 1": "short"},
        "2.png": {"T of 2": "short", "L of 2": "long", "a side-car": ""},
        "3.png": {"T of 3": "short", "L of 3": "long"},
    }
    assert table(photos)[1]["n"] == 1
    with serving(lambda asked, number: says("anew")) as served:
        caption(photos, served.url, captions={"long": "M"}, existing="overwrite")
    assert captions_of(photos)["1.png"] == {"anew": "long", "One": "title", "T of 1": "short"}


def test_a_caption_that_was_mended_by_hand_stays_and_one_that_was_removed_comes_again(photos: Path) -> None:
    with serving(well) as served:
        caption(photos, served.url)
        lines = (photos / "metadata.jsonl").read_text("utf-8").splitlines()
        mended = [lines[0].replace("S of 0", "mine"), *lines[2:]]
        (photos / "metadata.jsonl").write_text("\n".join(mended) + "\n", encoding="utf-8")
        assert caption(photos, served.url).written == 2
    assert captions_of(photos)["0.png"] == {"mine": "short", "L of 0": "long"}
    assert captions_of(photos)["2.png"] == {"S of 2": "short", "L of 2": "long"}


def test_two_parts_together_are_one_whole(photos: Path, tmp_path: Path) -> None:
    whole = paint(tmp_path / "whole", 4)
    with serving(well) as served:
        caption(whole, served.url)
        first, second = (caption(photos, served.url, shard=f"{number}/2") for number in (2, 1))
    assert first.pictures
    assert second.pictures
    assert (first.pictures + second.pictures, first.written + second.written) == (4, 8)
    assert (photos / "metadata.jsonl").read_bytes() == (whole / "metadata.jsonl").read_bytes()
    assert (photos / KEPT / "index.html").read_text("utf-8") == (
        (whole / KEPT / "index.html").read_text("utf-8").replace("Captions of whole", "Captions of photos")
    )


def at_work(photos: Path, url: str, part: str, failures: list[BaseException]) -> threading.Thread:
    """Captions a part, when it is started."""

    def work() -> None:
        try:
            caption(photos, url, shard=part)
        except BaseException as error:
            failures.append(error)

    return threading.Thread(target=work)


def test_parts_at_work_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    photos = paint(tmp_path / "photos", 12)
    meet = threading.Barrier(2, timeout=20)

    def answer(asked: Asked, number: int) -> Said:
        if number < 2:
            meet.wait()  # both are under way
        return well(asked, number)

    failures: list[BaseException] = []
    with serving(answer) as served:
        workers = [at_work(photos, served.url, part, failures) for part in ("1/2", "2/2")]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not failures
    assert sum(len(row["captions"]) for row in table(photos)) == 24
    assert len(served.asked) == 24


def test_under_torchrun_a_process_captions_its_own_part(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with serving(well) as served:
        made = caption(photos, served.url)
        monkeypatch.undo()
        assert caption(photos, served.url, shard="2/2").kept == made.written > 0
    assert made.part == (1, 2)


def command(photos: Path, url: str) -> subprocess.Popen[str]:
    words = ["caption", photos, "--endpoint", url, "--caption", "short=S", "--caption", "long=L", "--batch", 1]
    code = "from libreflux.cli import main; main()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    full = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_a_process_that_was_killed_goes_on_and_asks_nothing_twice_but_what_was_under_way(photos: Path) -> None:
    fifth, reached = threading.Event(), threading.Event()

    def answer(asked: Asked, number: int) -> Said:
        if number == 4:
            reached.set()
            fifth.wait(30)
        return well(asked, number)

    with serving(answer) as served:
        killed = command(photos, served.url)
        assert reached.wait(60)
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
        fifth.set()
        assert not (photos / "metadata.jsonl").exists(), "it had no time to write it"
        again = command(photos, served.url)
        out, err = again.communicate(timeout=60)
        assert again.returncode == 0, err
    asked = Counter(one.key for one in served.asked)
    assert len(asked) == 8
    assert [key for key, count in asked.items() if count > 1] == [served.asked[4].key]
    assert out.splitlines()[0] == "4 captions of 4 pictures written, 4 were there"
    assert captions_of(photos)["3.png"] == {"S of 3": "short", "L of 3": "long"}
    assert not list((photos / KEPT).rglob(ANSWERS))


def test_a_line_that_was_cut_by_the_kill_is_asked_again_and_a_damaged_one_is_named(photos: Path) -> None:
    folder = part_folder(photos / KEPT, (1, 3))  # of a process that had another share
    with lock(folder):
        Journal(folder).add(Entry("0.png", "short", "from the journal", "abc"))
    with open(folder / ANSWERS, "a", encoding="utf-8") as file:
        file.write('{"file": "2.png", "name": "sh')
    with serving(well) as served:
        made = caption(photos, served.url, captions={"short": "S"})
    assert (made.written, made.kept) == (3, 1)
    assert captions_of(photos)["0.png"] == {"from the journal": "short"}
    for damage in ('{"file": "2.png"}\n', "[]\n", '{"file": 1, "name": "a", "caption": "b", "by": "c"}\n'):
        (folder / ANSWERS).write_text(damage, encoding="utf-8")
        with serving(well) as served, pytest.raises(RunError, match="line 1 cannot be read"):
            caption(photos, served.url)
    (folder / ANSWERS).unlink()


def test_what_happened_after_a_kill_counts_for_more_than_its_journal(photos: Path) -> None:
    """A picture was removed; a caption that was brought in already was mended by hand."""
    with serving(well) as served:
        caption(photos, served.url, captions={"short": "S"})
        by = table(photos)[0]["captioned_by"]["short"]
        text = (photos / "metadata.jsonl").read_text("utf-8").replace("S of 0", "mine")
        (photos / "metadata.jsonl").write_text(text, encoding="utf-8")
        (photos / "extra.png").write_bytes((photos / "0.png").read_bytes())
        journal = Journal(part_folder(photos / KEPT, (0, 1)))
        for file in ("0.png", "extra.png"):
            journal.add(Entry(file, "short", "S of 0", by, over=True))
        (photos / "extra.png").unlink()
        assert caption(photos, served.url, captions={"short": "S"}, existing="overwrite").written == 0
    assert captions_of(photos)["0.png"] == {"mine": "short"}
    assert not list((photos / KEPT).rglob(ANSWERS))


def test_a_part_whose_old_journal_another_process_brings_in_begins_when_that_is_done(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when all processes of torchrun were killed and start again."""
    Journal(old_part(photos, (1, 2))).add(Entry("0.png", "short", "of the journal", "abc"))
    reading = threading.Event()
    real = lists.read_journal

    def slowly(folder: Path) -> list[Entry]:
        if folder.name == "part-2-of-2" and not reading.is_set():
            reading.set()
            time.sleep(0.5)
        return real(folder)

    monkeypatch.setattr(lists, "read_journal", slowly)
    failures: list[BaseException] = []
    with serving(well) as served:
        workers = [at_work(photos, served.url, part, failures) for part in ("1/2", "2/2")]
        workers[0].start()
        assert reading.wait(20)
        workers[1].start()
        for worker in workers:
            worker.join()
    assert not failures
    assert captions_of(photos)["0.png"] == {"of the journal": "short", "L of 0": "long"}


def old_part(photos: Path, part: tuple[int, int]) -> Path:
    folder = part_folder(photos / KEPT, part)
    folder.mkdir(parents=True)
    return folder


def test_a_part_that_is_at_work_is_not_begun_twice(photos: Path) -> None:
    with serving(well) as served:
        with lock(part_folder(photos / KEPT, (0, 1))), pytest.raises(RunError, match="in use by process"):
            caption(photos, served.url)
        assert not served.asked


def test_lists_that_prepare_would_refuse_are_refused_before_anybody_is_asked(photos: Path) -> None:
    wrong = {"metadata.jsonl": '{"file_name": "gone.png", "text": "x"}\n', "0.txt": " \n"}
    for name, text in wrong.items():
        (photos / name).write_text(text, encoding="utf-8")
        with serving(well) as served, pytest.raises(DataError):
            caption(photos, served.url)
        assert not served.asked
        (photos / name).unlink()
    with serving(well) as served, pytest.raises(DataError, match="no such folder"):
        caption(photos / "nowhere", served.url)
    (photos / "sub" / "empty").mkdir()
    with serving(well) as served, pytest.raises(DataError, match="no picture"):
        caption(photos / "sub" / "empty", served.url)


def test_what_captions_were_made_by_is_kept(photos: Path) -> None:
    with serving(well) as served:
        caption(photos, served.url, captions={"short": "S"}, seed=3)
    by = {row["captioned_by"]["short"] for row in table(photos)}
    assert len(by) == 1
    kept = json.loads((photos / KEPT / "settings" / f"{by.pop()}.json").read_text("utf-8"))
    assert (kept["schema"], kept["model"], kept["prompt"], kept["seed"]) == (1, "tiny", "S", 3)
