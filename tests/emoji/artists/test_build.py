"""The stages: what a step trains on, a resumed base to the bit, the folders and recipes of the students."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image, ImageOps
from safetensors.torch import load_file

from libreflux.emoji.artists import captions, held_out, scenes
from libreflux.emoji.artists.build import base, layout, pictures, reading, students
from libreflux.emoji.artists.subjects import LOOKS, SIDE, all_subjects, drawing, unseen_subjects
from libreflux.errors import DataError
from libreflux.files import atomic_save_safetensors
from libreflux.flow.sigmas import Uniform

COUNT = 8
LAST = 1_000_000


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
    monkeypatch.setattr(base, "READ_BEHIND", 0)
    monkeypatch.setattr(reading, "BATCH", 4)
    monkeypatch.setattr(reading, "train", partial(reading.train, steps=1))
    base.train(work, steps=2, count=COUNT, batch=2)
    whole = (work / "base.safetensors").read_bytes()
    (work / "base.safetensors").unlink()
    base.train(work, steps=1, count=COUNT, batch=2)
    base.train(work, steps=2, count=COUNT, batch=2)
    gone_on = (work / "base.safetensors").read_bytes()
    assert gone_on[-LAST:] == whole[-LAST:]  # without the header, which tells seconds
    assert len(whole) > LAST


def test_parts_of_a_step_are_its_pictures(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "make_transformer", tiny_transformer)
    monkeypatch.setattr(base, "READ_BEHIND", 0)
    monkeypatch.setattr(base, "LAYOUT_SHARE", 0.0)  # of its tokens not all are asked
    monkeypatch.setattr(reading, "BATCH", 4)
    monkeypatch.setattr(reading, "train", partial(reading.train, steps=1))

    def trained(at_a_time: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(base, "AT_A_TIME", {"cpu": at_a_time})
        base.train(work, steps=1, count=COUNT, batch=4)
        found = load_file(work / "base.safetensors")
        (work / "base.safetensors").unlink()
        return {name: tensor for name, tensor in found.items() if name.startswith("exp_avg/transformer")}

    whole, apart = trained(4), trained(1)
    assert any(bool(tensor.any()) for tensor in whole.values())
    for name, tensor in whole.items():
        torch.testing.assert_close(apart[name], tensor, rtol=1e-3, atol=1e-6)


def test_long_captions_have_every_noise_level_as_often_as_others() -> None:
    for start, share in ((0, 1 / 8), (base.SHAPES_UNTIL, 1 / 3)):
        steps = range(start, start + base.SHAPES_UNTIL)
        flat = [isinstance(base.law_of(step, 0), Uniform) for step in steps]
        of_long = [flat[i] for i, step in enumerate(steps) if step % base.LONG_EVERY == base.LONG_EVERY - 1]
        assert np.mean(flat) == pytest.approx(share, abs=0.03)
        assert np.mean(of_long) == pytest.approx(share, abs=0.08)


def test_the_layout_is_where_the_drawing_is() -> None:
    """A picture put together again from the drawings by the layout's own places resembles the scene."""
    shown, put = [], []
    for index in range(40):
        what = held_out.training_scene(1, index)
        answers = dict(zip(layout.QUESTIONS, layout.labels(what).reshape(-1, layout.GRID, layout.GRID), strict=True))
        picture = scenes.render(what)
        for row, column in np.argwhere(answers["subject"] > 0).tolist():
            subject = all_subjects()[answers["subject"][row, column] - 1]
            assert subject in [figure.subject for figure in what.figures]
            side = picture.width // layout.GRID
            shown.append(np.asarray(picture)[row * side + side // 2, column * side + side // 2])
            whole = drawing(subject.name, LOOKS[answers["look"][row, column]])
            if answers["mirrored"][row, column]:
                whole = ImageOps.mirror(whole)
            part = SIDE // layout.PARTS
            across, down = int(answers["across"][row, column]), int(answers["down"][row, column])
            across = layout.PARTS - 1 - across if answers["mirrored"][row, column] else across
            box = (across * part, down * part, (across + 1) * part, (down + 1) * part)
            put.append(np.asarray(whole.convert("RGBa").crop(box).convert("RGBA")).reshape(-1, 4))
    nearest = [
        np.abs(pixels[pixels[:, 3] > 128, :3].astype(int) - seen).sum(-1).min()
        for seen, pixels in zip(shown, put, strict=True)
        if (pixels[:, 3] > 128).any()
    ]
    assert np.mean(np.array(nearest) < 60) > 0.9


def test_a_reader_is_asked_what_a_caption_tells() -> None:
    asked = reading.questions()
    texts, right = reading.batch_at(1)
    for text, row in zip(texts, right, strict=True):
        assert [fact for fact, answer in row.items() if answer not in asked[fact]] == []
        told = [row[fact] for fact in ("first", "second", "look", "colour", "other colour") if fact in row]
        assert [word for word in told if word not in text] == []
        assert bool(text) == ("first" in row)


def test_encoders_learn_to_read_captions_and_go_on_with_the_same_bits(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH", 16)
    monkeypatch.setattr(reading, "cosine", lambda step, steps: 1.0)
    whole = reading.train(work, base.make_text(work / "tokenizers"), steps=4)
    losses = (work / "text.safetensors").read_bytes()
    (work / "text.safetensors").unlink()
    reading.train(work, base.make_text(work / "tokenizers"), steps=2)
    reading.train(work, base.make_text(work / "tokenizers"), steps=4)
    assert (work / "text.safetensors").read_bytes()[-LAST:] == losses[-LAST:]
    assert not any(parameter.requires_grad for parameter in whole.text_encoder.parameters())


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
