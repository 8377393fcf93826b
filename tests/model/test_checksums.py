"""Single bits flipped in every file of an int8 model folder: each is named, none draws another picture."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from libreflux import checksums
from libreflux.errors import ModelError
from libreflux.model import checksums as folder_sums
from libreflux.model import int8_files
from libreflux.model.int8_files import share_equal
from libreflux.model.locate import EMOJI, WEIGHTS
from libreflux.model.opening import open_model
from libreflux.model.quantise import quantise_folder
from libreflux.model.save import LiveParts, save_model
from libreflux.sample.pipeline import LibreFluxPipeline
from opened import Opened, opened

PLACES = (0.0, 0.03, 0.31, 0.62, 0.999)
"""Where in a file, as shares of its size: the length of a header and a header among them."""


@pytest.fixture(scope="module")
def int8_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 model in several shards; read it only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_files, "SHARD_BYTES", 100_000)
        return quantise_folder(tiny_model_dir, tmp_path_factory.mktemp("sums") / "int8")


def flip(file: Path, share: float, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[int(share * (len(data) - 1))] ^= 1 << bit
    file.write_bytes(data)


def read(folder: Path, file: str) -> None:
    """Opens what has to be opened for the file to be read."""
    source, part = open_model(folder), file.partition("/")[0]
    if part in ("transformer", "vae"):
        getattr(source, f"load_{part}")()
    elif part.startswith(("text_encoder", "tokenizer")):
        source.load_text()
    elif part == "scheduler":
        assert source.scheduler is not None


def test_every_flipped_bit_of_every_file_is_named(int8_dir: Path, tmp_path: Path) -> None:
    files = sorted(path.relative_to(int8_dir).as_posix() for path in int8_dir.rglob("*") if path.is_file())
    assert len([name for name in files if name.startswith("transformer/diffusion")]) == 3  # two shards and their index
    assert {name.partition("/")[0] for name in files} >= {"vae", "text_encoder", "text_encoder_2", "checksums.json"}
    folder = Path(shutil.copytree(int8_dir, tmp_path / "model"))
    for number, name in enumerate(files):
        whole = (folder / name).read_bytes()
        for place in PLACES[number % 2 :: 2]:
            flip(folder / name, place, bit=number % 8)
            with pytest.raises(ModelError) as error:
                read(folder, name)
            line = str(error.value)
            assert str(folder / name) in line, line
            assert "; hint: " in line, line
            assert "\n" not in line, line
            (folder / name).write_bytes(whole)
    opened(folder)


def test_damage_in_a_large_file_names_the_chunk_and_the_tensors_there(
    int8_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_sums, "CHUNK", 2048)
    monkeypatch.setattr(checksums, "AT_ONCE", 512)
    monkeypatch.setattr(folder_sums, "SEGMENT", 3)  # several threads read one file
    folder = Path(shutil.copytree(int8_dir, tmp_path / "model"))
    int8_files.write_all_checksums(folder)
    [*_, file] = sorted((folder / "transformer").glob("*.safetensors"))
    ranges = int8_files.RangedFile(file).ranges
    name, where = max(ranges.items(), key=lambda one: one[1].end - one[1].start)
    assert where.end - where.start > 1024
    open_model(folder).load_transformer()
    data = bytearray(file.read_bytes())
    data[(where.start + where.end) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(ModelError, match=rf"{file.name}: damaged (in|between) .*{name.split('.')[0]}"):
        open_model(folder).load_transformer()


def test_a_folder_without_checksums_opens_as_ever_with_one_line(
    int8_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = Path(shutil.copytree(int8_dir, tmp_path / "old"))
    (old / "checksums.json").unlink()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same(opened(old), opened(int8_dir))
    [told] = [record.getMessage() for record in caplog.records if "checksums.json" in record.getMessage()]
    assert str(old) in told
    assert "export it again" in told
    saved = opened(old).save(tmp_path / "new")
    assert (saved / "checksums.json").is_file()
    assert_same(opened(saved), opened(old))


def assert_same(one: Opened, other: Opened) -> None:
    assert one.facts == other.facts
    first, second = one.transformer.state_dict(), other.transformer.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_what_an_index_names_of_a_neighbour_is_compared_too(int8_dir: Path, tmp_path: Path) -> None:
    first, second = (Path(shutil.copytree(int8_dir, tmp_path / name)) for name in ("first", "second"))
    share_equal(second / "transformer", first / "transformer")
    open_model(second).load_transformer()
    [file, *_] = sorted((first / "transformer").glob("*.safetensors"))
    flip(file, 0.7)
    (first / "checksums.json").unlink()  # second has its own sums of what it reads
    with pytest.raises(ModelError, match=rf"first/transformer/{file.name}: damaged"):
        open_model(second).load_transformer()


def test_damage_is_not_copied_and_given_sums_anew(int8_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(int8_dir, tmp_path / "model"))
    model = open_model(folder)
    live = LiveParts(transformer=model.load_transformer())
    flip(folder / "vae" / "diffusion_pytorch_model.safetensors", 0.9)
    with pytest.raises(ModelError, match=r"vae/diffusion_pytorch_model\.safetensors: damaged"):
        save_model(tmp_path / "copy", model.facts, live, model)
    assert not (tmp_path / "copy").exists()


def test_missing_and_added_files_are_told(int8_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(int8_dir, tmp_path / "model"))
    config = folder / "tokenizer" / "tokenizer_config.json"
    whole = config.read_bytes()
    config.unlink()
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: missing: it is in checksums\.json"):
        open_model(folder).load_text()
    config.write_bytes(whole)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(vae, vae.with_name("other.safetensors"))
    with pytest.raises(ModelError, match=r"other\.safetensors: is not in checksums\.json"):
        open_model(folder).load_vae()


@pytest.mark.parametrize("name", EMOJI)
def test_the_shipped_family_has_checksums_of_all_its_files(name: str) -> None:
    table = folder_sums.read_table(WEIGHTS / name)
    assert table is not None
    there = [path for path in (WEIGHTS / name).rglob("*") if path.is_file() and path.name != "checksums.json"]
    assert {path.relative_to(WEIGHTS / name).as_posix() for path in there} <= table.keys()
    with folder_sums.verified(WEIGHTS / name, [WEIGHTS / name / place for place in table]):
        pass


def test_a_pipeline_that_is_saved_leaves_a_model_that_opens(
    tiny_model_dir: Path, int8_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(int8_dir, tmp_path / "model"))
    with pytest.raises(ModelError, match="does not write int8"):
        LibreFluxPipeline.from_pretrained(folder).save_pretrained(folder)
    LibreFluxPipeline.from_pretrained(folder)
    assert (folder / "checksums.json").is_file()
    stale = tmp_path / "dense"
    stale.mkdir()
    (stale / "checksums.json").write_text("{}")
    LibreFluxPipeline.from_pretrained(tiny_model_dir).save_pretrained(stale)
    LibreFluxPipeline.from_pretrained(stale)
