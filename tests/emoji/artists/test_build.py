"""The stages: what a step trains on, a resumed base to the bit, the folders and recipes of the students."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image

from libreflux.emoji.artists import captions, held_out
from libreflux.emoji.artists.build import base, pictures, students
from libreflux.emoji.artists.subjects import all_subjects, unseen_subjects
from libreflux.errors import DataError
from libreflux.files import atomic_save_safetensors

COUNT = 8
LAST = 4_000_000


def tiny_transformer() -> FluxTransformer2DModel:
    torch.manual_seed(1)
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )


def test_the_shipped_subjects_are_the_listed_ones() -> None:
    listed = pictures.wanted((Path(pictures.__file__).parent.parent / "subjects.txt").read_text("utf-8"))
    assert [(entry.name, entry.unseen) for entry in listed] == [(s.name, s.unseen) for s in all_subjects()]


def test_a_package_that_is_missing_or_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="package not found"):
        pictures.build(tmp_path)
    (tmp_path / pictures.FLUENT).write_bytes(b"another")
    with pytest.raises(DataError, match="sha256 is"):
        pictures.build(tmp_path)


def test_captions_of_a_step_are_those_of_its_rows() -> None:
    texts = [captions.captions(held_out.training_scene(0, index)) for index in range(COUNT)]
    for step in (0, 1, base.LONG_EVERY - 1):
        rows, told = base.batch_at(step, 0, texts, 32)
        assert [text for row, text in zip(rows, told, strict=True) if text and text not in texts[row].values()] == []
        assert (rows, told) == base.batch_at(step, 0, texts, 32)
    rows, told = base.batch_at(base.LONG_EVERY - 1, 0, texts, 32)
    assert {text for row, text in zip(rows, told, strict=True) if text} <= {row["long"] for row in texts}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with random latents of `COUNT` scenes, in two files."""
    monkeypatch.setattr(base, "CHUNK", COUNT // 2)
    texts = [captions.captions(held_out.training_scene(base.SCENE_SEED, index)) for index in range(COUNT)]
    monkeypatch.setattr(base, "_corpus", lambda: [text for row in texts for text in row.values()])
    (tmp_path / "latents").mkdir()
    draw = torch.Generator().manual_seed(0)
    for number in range(2):
        packed = torch.randn(COUNT // 2, 64, 64, generator=draw).bfloat16()
        atomic_save_safetensors({"packed": packed}, tmp_path / "latents" / f"{number:03d}.safetensors", {})
        rows = texts[number * COUNT // 2 : (number + 1) * COUNT // 2]
        (tmp_path / "latents" / f"{number:03d}.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path


def test_a_base_that_is_gone_on_with_has_the_same_bits(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "trapezoid", lambda step, steps: 1.0)
    monkeypatch.setattr(base, "make_transformer", tiny_transformer)
    base.train(work, steps=2, count=COUNT, batch=2)
    whole = (work / "base.safetensors").read_bytes()
    (work / "base.safetensors").unlink()
    base.train(work, steps=1, count=COUNT, batch=2)
    base.train(work, steps=2, count=COUNT, batch=2)
    gone_on = (work / "base.safetensors").read_bytes()
    assert gone_on[-LAST:] == whole[-LAST:]  # without the header, which tells seconds
    assert len(whole) > LAST


def test_students_see_no_held_out_picture_and_the_freed_one_no_other_subject(tmp_path: Path) -> None:
    names = set(students.seen_subjects())
    folder = students.write_pictures(tmp_path / "freeing", 12, 1, names)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 12
    others = {subject.name for subject in all_subjects()} - names
    assert [row for row in rows if any(row["captions"]["bare"] in (f"a {name}", f"an {name}") for name in others)] == []
    assert Image.open(folder / rows[0]["file_name"]).size == (128, 128)
    assert names.isdisjoint(subject.name for subject in unseen_subjects())


def test_teaching_prompts_are_captions_of_training_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(students, "TAUGHT", 20)
    lines = students.teaching_prompts(tmp_path).read_text("utf-8").splitlines()
    told = [captions.captions(held_out.training_scene(students.TEACH_SEED, index)).values() for index in range(20)]
    assert [line for line, texts in zip(lines, told, strict=True) if line not in texts] == []


def test_the_recipes_are_valid_and_name_what_they_start_from(tmp_path: Path) -> None:
    guided, adversarial = students.guided_recipe(tmp_path), students.adversarial_recipe(tmp_path)
    assert guided.distil is not None
    assert guided.distil.guidance == students.GUIDANCE
    assert adversarial.distil is not None
    assert adversarial.distil.adversarial is not None
    assert str(adversarial.adapter.init_from) == str(tmp_path / "runs" / "guided" / "adapter.safetensors")
    assert students.freeing_recipe(tmp_path, tmp_path / "m" / "schnell", "libre").objective == "flow"
