"""Pictures drawn again from what they say of themselves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from libreflux.sample.metadata import open_png, read_record, save_png
from libreflux.sample.pipeline import LibreFluxPipeline
from tiny import tiny_transformer

OPTIONS = [
    "--negative",
    "a rocket",
    "--guidance",
    4,
    "--guidance-start",
    0.25,
    "--guidance-stop",
    0.75,
    "--guidance-rescale",
    0.7,
    "--batch-cfg",
    "on",
    "--sigmas",
    "1,0.8,0.5,0.3",
    "--seed",
    9,
    "--width",
    48,
    "--tile",
    "--prompt-2",
    "a tree, tall",
    "--negative-2",
    "",
    "--max-tokens",
    4,
]


@pytest.fixture(scope="module")
def drawn(run: Callable, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drawn") / "a.png"
    result = run("generate", "a fox, ünïcödé", "--model", tiny_model_dir, *OPTIONS, "--out", path)
    assert result.code == 0, result.err
    return path


def test_every_option_reaches_the_picture_and_its_record(drawn: Path) -> None:
    record = read_record(drawn)
    assert (record.guidance_start, record.guidance_stop, record.guidance_rescale) == (0.25, 0.75, 0.7)
    assert (record.steps, record.sigmas, record.max_tokens) == (4, [1, 0.8, 0.5, 0.3], 4)
    assert (record.prompt_2, record.negative, record.negative_2) == ("a tree, tall", "a rocket", "")
    assert (record.batch_cfg, record.tile, record.width, record.height) == (True, True, 48, 32)
    assert (
        "CFG start: 0.25, CFG stop: 0.75, CFG rescale: 0.7, CFG in one pass: True"
        in Image.open(drawn).info["parameters"]
    )


def test_remade_bit_for_bit(run: Callable, drawn: Path, tmp_path: Path) -> None:
    again = run("generate", "--remake", drawn, "--out", tmp_path / "b.png")
    assert again.code == 0
    assert again.out.strip() == str(tmp_path / "b.png")
    assert f"bit for bit the pixels of {drawn}" in again.err
    assert " was " not in again.err
    assert (tmp_path / "b.png").read_bytes() == drawn.read_bytes()
    bare = run("generate", "--remake", drawn, "--no-metadata", "--out", tmp_path / "folder")
    assert bare.out.strip() == str(tmp_path / "folder" / "a-again.png")
    with Image.open(bare.out.strip()) as image, Image.open(drawn) as original:
        assert not image.info.keys() & {"parameters", "libreflux"}
        assert image.tobytes() == original.tobytes()


def test_a_picture_of_then_with_a_guidance_below_one_is_remade_as_then(
    run: Callable, tiny_model_dir: Path, tmp_path: Path
) -> None:
    words = ["generate", "a fox", "--model", tiny_model_dir, "--steps", 2, "--seed", 3, "--negative", "a dog"]
    for name, scale in (("plain", 1), ("weak", 0.5)):
        given = [*words, "--guidance", scale] if scale != 1 else [*words[:-2], "--guidance", scale]
        assert run(*given, "--out", tmp_path / f"{name}.png").code == 0
    plain, weak = (tmp_path / f"{name}.png" for name in ("plain", "weak"))
    told = json.loads(open_png(weak).info["libreflux"])
    assert told.pop("below_one")  # as an older version, which drew with the prompt alone
    info = PngInfo()
    info.add_text("libreflux", json.dumps(told))
    with Image.open(plain) as image:
        image.save(tmp_path / "then.png", pnginfo=info)
    for name in ("then", "weak"):
        again = run("generate", "--remake", tmp_path / f"{name}.png", "--out", tmp_path / f"{name}-again.png")
        assert "bit for bit the pixels" in again.err
    assert np.asarray(Image.open(weak)).tolist() != np.asarray(Image.open(plain)).tolist()


def test_every_option_is_the_pipelines_own(tiny_model_dir: Path, drawn: Path) -> None:
    pipe = LibreFluxPipeline.from_pretrained(tiny_model_dir)
    (expected,) = pipe(
        "a fox, ünïcödé",
        "a rocket",
        32,
        48,
        guidance_scale=4.0,
        seeds=9,
        prompt_2="a tree, tall",
        negative_prompt_2="",
        sigmas=[1.0, 0.8, 0.5, 0.3],
        max_sequence_length=4,
        guidance_start=0.25,
        guidance_stop=0.75,
        guidance_rescale=0.7,
        batch_cfg=True,
        tile=True,
    ).images
    with Image.open(drawn) as image:
        assert image.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        ["--sigmas", "1,0.8,0.5,0.2"],
        ["--prompt-2", "a tree"],
        ["--negative-2", "x"],
        ["--max-tokens", 3],
    ],
)
def test_each_new_option_changes_the_pixels(
    run: Callable, tiny_model_dir: Path, drawn: Path, tmp_path: Path, change: list[object]
) -> None:
    at = OPTIONS.index(change[0])
    options = [*OPTIONS[:at], *change, *OPTIONS[at + 2 :]]
    args = ["generate", "a fox, ünïcödé", "--model", tiny_model_dir, *options, "--out", tmp_path / "x.png"]
    assert run(*args).code == 0
    with Image.open(tmp_path / "x.png") as image, Image.open(drawn) as original:
        assert image.tobytes() != original.tobytes()


def test_each_prompt_has_its_own_second_one(run: Callable, tiny_model_dir: Path, tmp_path: Path) -> None:
    common = ["--model", tiny_model_dir, "--steps", 1, "--out", tmp_path]
    both = run("generate", "a", "b", "--prompt-2", "a fox", "--prompt-2", "an owl", "--count", 2, *common)
    assert both.code == 0, both.err
    told = [read_record(path) for path in sorted(tmp_path.iterdir())]
    assert [(one.prompt, one.prompt_2, one.seed) for one in told] == [
        ("a", "a fox", 0),
        ("a", "a fox", 1),
        ("b", "an owl", 0),
        ("b", "an owl", 1),
    ]


def test_the_embedded_guidance_of_a_distilled_model(run: Callable, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "dev")
    tiny_transformer(guidance_embeds=True).save_pretrained(model / "transformer")
    facts = json.loads((model / "libreflux.json").read_text()) | {"guidance_embeds": True, "guidance": 3.5}
    (model / "libreflux.json").write_text(json.dumps(facts))
    found: dict[Path, float | None] = {}
    for given in ([], ["--embedded-guidance", 3.5], ["--embedded-guidance", 1.5]):
        out = tmp_path / f"{len(found)}.png"
        assert run("generate", "a fox", "--model", model, "--steps", 1, *given, "--out", out).code == 0
        found[out] = read_record(out).embedded_guidance
    first, same, other = (path.read_bytes() for path in found)
    assert list(found.values()) == [3.5, 3.5, 1.5]
    assert first == same != other
    assert run("generate", "--remake", out, "--out", tmp_path / "again.png").code == 0
    assert (tmp_path / "again.png").read_bytes() == other


def test_without_metadata_nothing_is_said(run: Callable, tiny_model_dir: Path, drawn: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    args = ["generate", "a fox, ünïcödé", "--model", tiny_model_dir, *OPTIONS, "--no-metadata", "--out", out]
    assert run(*args).code == 0
    with Image.open(out) as image, Image.open(drawn) as original:
        assert image.info.keys() <= {"dpi"}
        assert image.tobytes() == original.tobytes()
    refused = run("generate", "--remake", out)
    assert refused.code == 2
    assert "says nothing of how it was made; hint: " in refused.err


def test_other_weights_are_told(run: Callable, tiny_model_dir: Path, drawn: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    moved = run("generate", "--remake", drawn, "--model", model, "--out", tmp_path / "m.png")
    assert moved.code == 0
    assert "bit for bit" in moved.err
    assert " was " not in moved.err
    tiny_transformer(seed=5).save_pretrained(model / "transformer")
    other = run("generate", "--remake", drawn, "--model", model, "--out", tmp_path / "o.png")
    assert other.code == 0
    assert "the transformer's hash was " in other.err
    assert "of its pixels differ" in other.err
    before, after = (np.asarray(Image.open(path)) for path in (drawn, tmp_path / "o.png"))
    assert (before != after).any()


def test_a_picture_of_a_former_family_is_refused_and_draws_with_its_own_model(
    run: Callable, tiny_model_dir: Path, drawn: Path, tmp_path: Path
) -> None:
    former = tmp_path / "former.png"
    with Image.open(drawn) as image:
        save_png(image, former, dataclasses.replace(read_record(drawn), model="emoji-libre"))
    refused = run("generate", "--remake", former, "--out", tmp_path / "r.png")
    assert refused.code == 2
    told = read_record(drawn).hashes["transformer"][:10]
    assert f"was drawn by a former emoji-libre, {told}, that this version does not have; hint: " in refused.err
    assert "or give a copy by --model" in refused.err
    assert len(refused.err.splitlines()) == 1
    assert not (tmp_path / "r.png").exists()
    again = run("generate", "--remake", former, "--model", tiny_model_dir, "--out", tmp_path / "r.png")
    assert again.code == 0
    assert "bit for bit" in again.err


def test_a_picture_of_a_former_family_in_its_first_steps_is_refused(
    run: Callable, tiny_model_dir: Path, drawn: Path, tmp_path: Path
) -> None:
    former, record = tmp_path / "former.png", read_record(drawn)
    hashes = {**record.hashes, "first_transformer": "0" * 64}
    with Image.open(drawn) as image:
        by = dataclasses.replace(record, hashes=hashes, first_steps_from="emoji-base:1", first_steps_guidance=1.0)
        save_png(image, former, by)
    refused = run("generate", "--remake", former, "--out", tmp_path / "r.png")
    assert refused.code == 2
    assert "was drawn by a former emoji-base, 0000000000, " in refused.err
    assert "or give a copy by --first-steps-from" in refused.err


def test_another_models_picture_may_be_drawn_by_a_model_of_the_family(
    run: Callable, drawn: Path, tmp_path: Path
) -> None:
    again = run("generate", "--remake", drawn, "--model", "emoji-schnell", "--out", tmp_path / "r.png")
    assert again.code == 0, again.err
    assert "the transformer's hash was " in again.err


def test_adapters_are_asked_for_and_keep_their_weight(
    run: Callable, tiny_model_dir: Path, trained: Path, tmp_path: Path
) -> None:
    first = tmp_path / "a.png"
    args = ["generate", "a fox", "--model", tiny_model_dir, "--adapter", f"{trained}:0.5", "--out", first]
    assert run(*args).code == 0
    missing = run("generate", "--remake", first, "--out", tmp_path / "b.png")
    assert missing.code == 2
    assert f"drawn with 1 adapter, not 0; hint: give --adapter {trained}, from" in missing.err
    other = run("generate", "--remake", first, "--adapter", f"{trained}:0.4", "--out", tmp_path / "b.png")
    assert other.code == 2
    assert "weight 0.4 is not the picture's, 0.5" in other.err
    again = run("generate", "--remake", first, "--adapter", trained, "--out", tmp_path / "b.png")
    assert again.code == 0, again.err
    assert (tmp_path / "b.png").read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("runs/my run/a.safetensors:0.5", "runs/my run/a.safetensors"),
        ("HOME/a.safetensors", "~/a.safetensors"),
        ("./a.safetensors", "./a.safetensors"),
    ],
)
def test_an_adapters_path_is_kept_as_it_was_typed(
    run: Callable,
    tiny_model_dir: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    kept: str,
) -> None:
    home = tmp_path / "home"
    (home / "runs" / "my run").mkdir(parents=True)
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    for folder in (home, home / "runs" / "my run"):
        shutil.copy(trained, folder / "a.safetensors")
    words = ["--model", tiny_model_dir, "--adapter", given.replace("HOME", str(home)), "--steps", 1, "--out", "a.png"]
    assert run("generate", "a fox", *words).code == 0
    [row] = read_record(home / "a.png").adapters
    assert set(row) == {"file", "sha256", "weight", "path"}
    assert row["path"] == kept
    assert str(home).encode() not in (home / "a.png").read_bytes()
    named = "'runs/my run/a.safetensors'" if " " in kept else kept
    assert f"give --adapter {named}, from" in run("generate", "--remake", "a.png").err


def test_a_picture_from_before_paths_were_kept_names_the_adapters_file(
    run: Callable, tiny_model_dir: Path, trained: Path, tmp_path: Path
) -> None:
    first, older = tmp_path / "a.png", tmp_path / "b.png"
    words = ["--model", tiny_model_dir, "--steps", 1, "--adapter", trained]
    assert run("generate", "a fox", *words, "--out", first).code == 0
    record = read_record(first)
    rows = [{key: value for key, value in row.items() if key != "path"} for row in record.adapters]
    save_png(Image.open(first), older, dataclasses.replace(record, adapters=rows))
    assert f"give --adapter {trained.name}, from" in run("generate", "--remake", older).err
    again = run("generate", "--remake", older, "--adapter", trained, "--out", tmp_path / "c.png")
    assert again.code == 0
    assert "bit for bit" in again.err
    assert " was " not in again.err


def test_a_picture_is_not_replaced_by_its_copy(run: Callable, drawn: Path) -> None:
    before = drawn.read_bytes()
    refused = run("generate", "--remake", drawn, "--out", drawn)
    assert refused.code == 2
    assert "would replace the picture itself; hint: " in refused.err
    assert drawn.read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"steps": "many"}, "steps: "),
        ({"steps": -3}, "num_inference_steps cannot be -3"),
        ({"width": 40}, "width cannot be 40"),
        ({"guidance": float("nan")}, "guidance_scale cannot be nan"),
        ({"guidance_start": 1.0}, "is not below the stop"),
        ({"batch_cfg": "perhaps"}, "batch_cfg: "),
        ({"adapters": [{"file": "x"}]}, "drawn with 1 adapter, not 0"),
        ({"model": "no/such/model/here"}, "no such model"),
        ({"embedded_guidance": float("nan")}, "embedded_guidance cannot be nan"),
        ({"colour": 1}, "colour"),
        ({"sigmas": [0.5, 0.7, 0.3, 0.1]}, "sigmas cannot be [0.5, 0.7"),
        ({"sigmas": [0.5]}, "1 sigma for 4 steps"),
        ({"max_tokens": 1000}, "max_tokens: cannot be 1000"),
        ({"quantize": "int4"}, "quantize: "),
        ({"embedded_guidance": 3.5}, "no guidance embedding"),
    ],
)
def test_a_damaged_record_is_one_line(
    run: Callable, drawn: Path, tmp_path: Path, changed: dict[str, object], told: str
) -> None:
    with Image.open(drawn) as image:
        record = json.loads(image.info["libreflux"]) | changed
        info = PngInfo()
        info.add_text("libreflux", json.dumps(record))
        image.save(tmp_path / "x.png", pnginfo=info)
    refused = run("generate", "--remake", tmp_path / "x.png", "--out", tmp_path / "y.png")
    lines = [line for line in refused.err.splitlines() if not line.startswith("drawing")]
    assert refused.code == 2, refused.err
    assert len(lines) == 1, refused.err
    assert told in lines[0], refused.err
    assert "; hint: " in lines[0], refused.err
    assert "pydantic" not in refused.err
    assert not (tmp_path / "y.png").exists()
