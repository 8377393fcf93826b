from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from PIL import Image

from caching import prepare
from libreflux import files
from libreflux.data.cache import Cache
from libreflux.data.crops import View, cut
from libreflux.data.pictures import load_rgb
from libreflux.data.prepare import prepare_recipe
from libreflux.data.sources import Sample
from libreflux.errors import DataError, LibrefluxError, RunError
from libreflux.model import latents
from libreflux.model.opening import open_model
from libreflux.recipe import DataSource, load_recipe
from rights import bound_by_modes

SQUARE = View("square", 32)
Prepared = tuple[Cache, list[tuple[DataSource, list[Sample]]]]


def run(model: Path, data: Path, out: Path, **changed: Any) -> Prepared:
    source = DataSource(path=str(data), crops_per_picture=changed.pop("crops", 1))
    return prepare(str(model), [source], out=out, **{"views": [SQUARE], "text_padding": "drop", **changed})


def refusal(model: Path, data: Path, out: Path, **changed: Any) -> str:
    with pytest.raises(LibrefluxError) as caught:
        run(model, data, out, **changed)
    line = str(caught.value)
    assert "\n" not in line
    return line


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix == ".safetensors"
    }


def states(folder: Path) -> dict[str, tuple[int, int]]:
    found = {path.name: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}


def rows(cache: Path, table: str) -> list[tuple[str, ...]]:
    index = sqlite3.connect(cache / "index.sqlite3")
    try:
        return sorted(index.execute(f"SELECT * FROM {table}"))
    finally:
        index.close()


def test_latents_are_the_encoders_of_their_own_crop(prepared: Prepared, tiny_model_dir: Path) -> None:
    cache, [(source, samples)] = prepared
    vae = open_model(tiny_model_dir).load_vae(dtype=torch.float32)
    for sample in samples:
        for index in range(2):
            crop = cut(load_rgb(sample.path), SQUARE, index, sample.id)
            pixels = rearrange(torch.tensor(crop), "h w c -> 1 c h w") / 127.5 - 1
            stored = cache.latents(sample.id, SQUARE.name(index, source.background))
            assert stored.dtype == torch.float32
            assert stored.shape == (16, 4, 4)
            torch.testing.assert_close(stored, latents.encode(vae, pixels)[0], rtol=0, atol=1e-6)


def test_text_is_the_encoders_without_padding(prepared: Prepared, tiny_model_dir: Path) -> None:
    cache, [(_, samples)] = prepared
    encoders = open_model(tiny_model_dir).load_text(dtype=torch.float32)
    captions = ["", *(caption for sample in samples for caption in sample.captions)]
    stored = cache.text(captions)
    assert len(set(stored.lengths)) > 4
    for index, caption in enumerate(captions):
        alone = encoders.encode([caption], padding="drop", max_tokens=512)
        assert stored.tokens[index].dtype == torch.bfloat16
        assert stored.tokens[index].shape == alone.tokens[0].shape
        torch.testing.assert_close(stored.tokens[index].float(), alone.tokens[0], rtol=2**-7, atol=1e-4)
        torch.testing.assert_close(stored.pooled[index].float(), alone.pooled[0], rtol=2**-7, atol=1e-4)


def test_a_shared_caption_is_stored_once_and_the_disk_holds_no_padding(prepared: Prepared) -> None:
    cache, [(_, samples)] = prepared
    distinct = {caption for sample in samples for caption in sample.captions} | {""}
    assert len(rows(cache.folder, "texts")) == len(distinct) == 2 * len(samples) + 2
    lengths = cache.text(sorted(distinct)).lengths
    numbers = 24 * sum(lengths) + 16 * len(distinct)
    stored = sum(len(data) for name, data in snapshot(cache.folder).items() if "texts" in name)
    assert stored < 2 * numbers + 400 * len(distinct)  # bf16, and a header entry or two for each


def test_preparing_again_touches_nothing(prepared: Prepared, tiny_model_dir: Path, pictures: Path) -> None:
    cache, _ = prepared
    before = states(cache.folder)
    told: list[tuple[int, int, str]] = []
    again, _ = run(tiny_model_dir, pictures, cache.folder, crops=2, progress=lambda *now: told.append(now))
    assert states(cache.folder) == before
    assert told == []
    assert again.settings == cache.settings


def test_progress_counts_to_the_end(tmp_path: Path, tiny_model_dir: Path, pictures: Path) -> None:
    told: list[tuple[int, int, str]] = []
    run(tiny_model_dir, pictures, tmp_path / "c", prompts=["a fox"], progress=lambda *now: told.append(now))
    done, totals, notes = zip(*told, strict=True)
    assert totals[0] == 7
    # checks, crops, captions with the shared and the empty one, a prompt
    assert totals[-1] == 7 + 7 + 2 * 7 + 2 + 1
    assert list(done) == sorted(set(done))
    assert done[-1] == totals[-1]
    assert any(note.endswith("crops/s") for note in notes)
    assert notes[-1].endswith("kB a caption")


def test_new_pictures_are_added_and_old_ones_kept(tmp_path: Path, tiny_model_dir: Path, pictures: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "c"
    shutil.copytree(pictures, data)
    first = json.loads((data / "metadata.jsonl").read_text().splitlines()[0])
    (data / "metadata.jsonl").write_text(json.dumps(first))
    for path in sorted(data.glob("*.png"))[1:]:
        path.unlink()
    run(tiny_model_dir, data, out)
    before = snapshot(out)
    cache, [(_, samples)] = run(tiny_model_dir, pictures, out, prompts=["a fox"])
    assert {name: snapshot(out)[name] for name in before} == before
    assert len(samples) == 7
    assert len(rows(out, "latents")) == 7
    assert len(cache.text(["a fox", ""])) == 2


MOMENTS = ["progress 0.05", "rename 3", "progress 0.4", "commit 2", "rename 2", "progress 0.7", "none"]


def test_killed_prepares_end_like_an_unbroken_one(
    tmp_path: Path, prepared: Prepared, tiny_model_dir: Path, pictures: Path
) -> None:
    out = tmp_path / "cache"
    script = Path(__file__).parent / "killed_prepares.py"
    command = [sys.executable, str(script), str(tiny_model_dir), str(pictures), str(out), json.dumps(MOMENTS)]
    # As many threads as here, or the last bits differ; waiting ones sleep, or many processes starve one another.
    waiting = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "passive"}
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=waiting).stdout
    statuses = json.loads(output.splitlines()[-1])
    assert statuses == [[moment, signal.SIGKILL if moment != "none" else 0] for moment in MOMENTS]
    cache, _ = prepared
    assert snapshot(out) == snapshot(cache.folder)  # no stray file, no missing one, every bit alike
    for table in ("latents", "texts", "shards", "settings"):
        assert rows(out, table) == rows(cache.folder, table)


def test_a_lost_or_cut_shard_is_made_again(tmp_path: Path, prepared: Prepared, tiny_model_dir: Path) -> None:
    cache, [(source, samples)] = prepared
    out = tmp_path / "cache"
    shutil.copytree(cache.folder, out)
    lost, cut = out / "shards" / "latents-00000001.safetensors", out / "shards" / "texts-00000000.safetensors"
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    (out / "shards" / "latents-00000099.safetensors").write_bytes(b"x")  # left by a kill
    (out / "shards" / "somebodys.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"latents-00000001\.safetensors: missing or cut short; hint: run"):
        Cache(out)
    again, _ = run(tiny_model_dir, Path(source.path), out, crops=2)
    for sample in samples:
        for index in range(2):
            name = SQUARE.name(index, "white")
            assert torch.equal(again.latents(sample.id, name), cache.latents(sample.id, name))
        for ours, theirs in zip(again.text(sample.captions).tokens, cache.text(sample.captions).tokens, strict=True):
            assert torch.equal(ours, theirs)
    assert not (out / "shards" / "latents-00000099.safetensors").exists()
    assert (out / "shards" / "somebodys.tar").exists()


def test_damage_inside_a_shard_is_one_line(tmp_path: Path, prepared: Prepared) -> None:
    cache, [(_, samples)] = prepared
    out = tmp_path / "cache"
    shutil.copytree(cache.folder, out)
    for shard in (out / "shards").glob("latents-*"):
        data = bytearray(shard.read_bytes())
        data[:8] = b"\xff" * 8
        shard.write_bytes(data)
    with pytest.raises(DataError, match="damaged shard"):
        Cache(out).latents(samples[0].id, SQUARE.name(0, "white"))
    opened, shards = Cache(out), list((out / "shards").glob("latents-*"))
    for shard in shards:
        shard.chmod(0)
    with bound_by_modes(), pytest.raises(DataError, match=r"safetensors: cannot be read; hint: make it readable"):
        opened.latents(samples[0].id, SQUARE.name(0, "white"))
    for shard in shards:
        shard.unlink()
    with pytest.raises(DataError, match=r"has gone since the cache was opened; hint: run `libreflux prepare` again"):
        opened.latents(samples[0].id, SQUARE.name(0, "white"))
    (out / "index.sqlite3").write_bytes(b"not a database, not at all, by no means" * 10)
    with pytest.raises(DataError, match=r"index\.sqlite3: damaged index"):
        Cache(out)


def copy_model(model: Path, out: Path, part: str) -> Path:
    """The model with one weight of ``part`` changed, or with other facts."""
    shutil.copytree(model, out)
    if part == "facts":
        path = out / "libreflux.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "max_tokens": 64}))
        return out
    from safetensors.torch import load_file, save_file

    [path] = (out / part).glob("*.safetensors")
    weights = load_file(path)
    first = min(weights)
    save_file({**weights, first: weights[first] + 1}, path, metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"text_padding": "trim"}, "text_padding drop, now trim"),
        ({"text_precision": "bf16"}, "made with text_precision float32, now bfloat16;"),
        ({"part": "vae"}, "made with vae "),
        ({"part": "text_encoder"}, "made with text_encoders "),
        ({"part": "text_encoder_2"}, "made with text_encoders "),
        ({"part": "facts"}, "max_tokens 512, now 64"),
    ],
)
def test_a_cache_of_other_settings_is_refused(
    tmp_path: Path, prepared: Prepared, tiny_model_dir: Path, pictures: Path, changed: dict[str, Any], told: str
) -> None:
    cache, _ = prepared
    before = states(cache.folder)
    model = tiny_model_dir
    if "part" in changed:
        model = copy_model(tiny_model_dir, tmp_path / "model", changed["part"])
        changed = {}
    line = refusal(model, pictures, cache.folder, crops=2, **changed)
    assert told in line
    assert "hint: use another cache folder" in line
    assert states(cache.folder) == before


def test_another_transformer_may_use_the_cache(
    tmp_path: Path, prepared: Prepared, tiny_model_dir: Path, pictures: Path
) -> None:
    cache, _ = prepared
    before = snapshot(cache.folder)
    model = copy_model(tiny_model_dir, tmp_path / "model", "transformer")
    run(model, pictures, cache.folder, crops=2)
    assert snapshot(cache.folder) == before


@pytest.mark.parametrize("wrong", ["cut", "bare", "weights", "model", "padding"])
def test_what_is_refused_leaves_nothing_behind(
    tmp_path: Path, tiny_model_dir: Path, pictures: Path, wrong: str
) -> None:
    data, out, model, changed = tmp_path / "data", tmp_path / "out" / "cache", tiny_model_dir, {}
    shutil.copytree(pictures, data)
    last = data / "006.png"
    if wrong == "cut":
        last.write_bytes(last.read_bytes()[:1000])
        told = "006.png: unreadable picture"
    elif wrong == "bare":
        Image.new("RGB", (32, 32)).save(data / "007.png")
        told = "007.png: this picture has no caption; hint:"
    elif wrong == "weights":
        source = DataSource(path=str(data), captions={"tags": 1})
        with pytest.raises(DataError, match="no caption is named 'tags'"):
            prepare(str(model), [source], views=[SQUARE], text_padding="drop", out=out)
        assert not out.parent.exists()
        return
    elif wrong == "model":
        model, told = tmp_path / "none", "no such model"
    else:
        changed, told = {"text_padding": "bias"}, "not supported yet"
    assert told in refusal(model, data, out, **changed)
    assert not out.parent.exists()


def test_two_writers_exclude_each_other(tmp_path: Path, tiny_model_dir: Path, pictures: Path) -> None:
    out = tmp_path / "c"
    with files.lock(out), pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        run(tiny_model_dir, pictures, out)
    run(tiny_model_dir, pictures, out)
    with files.lock(out):
        run(tiny_model_dir, pictures, out)  # nothing to write, so nothing to lock


def test_enlarged_pictures_are_counted(
    tmp_path: Path, tiny_model_dir: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run(tiny_model_dir, pictures, tmp_path / "c", views=[View("square", 48)])
    # Sides (40 + i) x (48 - i) for i of 0 to 6: only the shorter one counts, and it never exceeds 44.
    assert "7 of 7 pictures are smaller than their crops and are enlarged" in caplog.text


def test_a_cache_that_is_not_there_is_refused(tmp_path: Path, prepared: Prepared) -> None:
    with pytest.raises(DataError, match="no cache in this folder; hint: run `libreflux prepare`"):
        Cache(tmp_path)
    sqlite3.connect(tmp_path / "index.sqlite3").close()
    (tmp_path / "index.sqlite3").touch()
    with pytest.raises(DataError, match="never begun"):
        Cache(tmp_path)
    cache, _ = prepared
    with pytest.raises(DataError, match="caption 'unheard of' is not here"):
        cache.text(["unheard of"])
    with pytest.raises(DataError, match="crop x of picture y is not here"):
        cache.latents("y", "x")


def test_a_recipe_is_prepared_with_its_sample_prompts(tmp_path: Path, tiny_model_dir: Path, pictures: Path) -> None:
    recipe = load_recipe(
        None,
        [
            f"model={tiny_model_dir}",
            f"data.0.path={pictures}",
            "resolution=32",
            "steps=1",
            f"out={tmp_path / 'run'}",
            "samples.prompts=[a fox on a rocket]",
        ],
    )
    batches, _ = prepare_recipe(recipe)
    assert batches.cache.folder == tmp_path / "run" / "cache"
    assert len(batches) == 7
    assert len(batches.cache.text(["a fox on a rocket"])) == 1
