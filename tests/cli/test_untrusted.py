"""Pictures, adapters and model folders of strangers: nothing is fetched, obeyed or run for them; one line each."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from libreflux.errors import DataError, ModelError
from libreflux.model.facts import Facts
from libreflux.probing.results import Result, read_result
from libreflux.sample.export_script import diffusers_script
from libreflux.sample.metadata import GenerationRecord, png_bytes
from libreflux.workflows.probe_compare import distilled_from

HUB_ID = "nobody/nothing"
ESCAPES = "\x1b]0;mine\x07\x1b[2J"
SHOWN = "\\x1b]0;mine\\x07\\x1b[2J"


def record(**changes: Any) -> str:
    """What a picture says of itself, with changes."""
    values = {"schema": 1, "prompt": "a fox", "seed": 1, "steps": 1, "guidance": 1.0, "width": 32, "height": 32}
    return json.dumps(values | {"model": "emoji-libre"} | changes)


def png(path: Path, text: str, *, zipped: bool = False) -> Path:
    info = PngInfo()
    info.add_text("libreflux", text, zip=zipped)
    Image.new("RGB", (32, 32)).save(path, pnginfo=info)
    return path


def huge_png(path: Path) -> None:
    """A few bytes that promise 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + rows + chunk(b"IEND", b""))


def postscript(path: Path) -> None:
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n%%EOF\n")


PICTURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a text that unpacks to megabytes": (lambda path: png(path, "a" * 2_000_000, zipped=True), "not a readable pict"),
    "a decompression bomb": (huge_png, "not a readable picture"),
    "PostScript, for which Pillow starts a program": (postscript, "not a readable picture"),
    "deep JSON": (lambda path: png(path, "[" * 100_000), "damaged record (nested too deeply)"),
    "half a surrogate pair": (lambda path: png(path, record(prompt="\ud83d")), "damaged record (half a character"),
    "a list": (lambda path: png(path, "[1]"), "damaged record"),
    "sizes of a million": (
        lambda path: png(path, record(width=10**6, height=10**6)),
        "damaged record (width cannot be 1000000",
    ),
    "more pixels than any picture": (
        lambda path: png(path, record(width=16384, height=16384)),
        "16384 x 16384 pixels are more than 67 million",
    ),
    "steps without end": (lambda path: png(path, record(steps=10**9)), "num_inference_steps cannot be 1000000000"),
    "sigmas without end": (
        lambda path: png(path, record(sigmas=[1 - n / 20_000 for n in range(20_000)])),
        "sigmas cannot be [1",
    ),
    "first steps beyond the last": (
        lambda path: png(path, record(first_steps_from="emoji-base:9", first_steps_guidance=3.0)),
        "damaged record (first_steps_from leaves none of 1 step",
    ),
    "NAG without its numbers": (lambda path: png(path, record(nag=4.0)), "damaged record (nag_tau is missing"),
    "a weight beyond all numbers": (
        lambda path: png(path, record(adapters=[{"file": "a", "weight": 10**400}])),
        "drawn with 1 adapter",
    ),
    "a model on the hub": (
        lambda path: png(path, record(model=HUB_ID)),
        f"its model {HUB_ID} is not at hand (not downloaded before)",
    ),
    "a model in no folder": (lambda path: png(path, record(model="no/such/x")), "is not at hand (no such model"),
    "a model of escapes": (lambda path: png(path, record(model=ESCAPES)), f"its model {SHOWN} is not at hand"),
    "a key of escapes": (lambda path: png(path, record(**{ESCAPES: 1})), SHOWN),
}


def one_line(outcome: tuple[int, str, str], *parts: str) -> None:
    code, out, err = outcome
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("libreflux: error: ")
    assert "; hint: " in err
    assert "\x1b" not in err
    for part in parts:
        assert part in err


@pytest.mark.parametrize("case", PICTURES)
def test_a_picture_to_be_remade(libreflux: Callable, tmp_path: Path, case: str) -> None:
    make, told = PICTURES[case]
    make(tmp_path / "x.png")
    one_line(libreflux(tmp_path, "generate", "--remake", "x.png", "--out", "y.png"), "x.png", told)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_picture_that_differs_obeys_nobody(libreflux: Callable, tiny_model_dir: Path, tmp_path: Path) -> None:
    record = GenerationRecord(
        prompt="a fox",
        seed=1,
        steps=1,
        guidance=1.0,
        width=32,
        height=32,
        model=str(tiny_model_dir),
        device=ESCAPES,
        versions={ESCAPES: "1"},
        hashes={"transformer": ESCAPES},
    )
    (tmp_path / "x.png").write_bytes(png_bytes(Image.new("RGB", (32, 32)), record))
    code, out, err = libreflux(tmp_path, "generate", "--remake", "x.png", "--out", "y.png")
    assert code == 0
    assert out == "y.png\n"
    assert "\x1b" not in err
    assert err.count(SHOWN) == 3
    assert "of its pixels differ" in err


def test_only_the_users_word_asks_the_network(libreflux: Callable, tmp_path: Path) -> None:
    png(tmp_path / "x.png", record(model=HUB_ID))
    code, _, err = libreflux(tmp_path, "generate", "--remake", "x.png", "--model", HUB_ID)
    assert code == 97, err
    assert err.startswith("socket.getaddrinfo"), err


def adapter(path: Path, **metadata: str) -> Path:
    prefix = "lycoris_transformer_blocks_0_attn_to_q"
    tensors = {f"{prefix}.lora_down.weight": torch.zeros(2, 32), f"{prefix}.lora_up.weight": torch.zeros(32, 2)}
    save_file(tensors | {f"{prefix}.alpha": torch.tensor(2.0)}, path, metadata)
    return path


ADAPTERS: dict[str, tuple[list[str], dict[str, str], str]] = {
    "generate, a model on the hub": (["generate", "x"], {"model": HUB_ID}, f"its model {HUB_ID} is not at hand"),
    "grid, a model on the hub": (["grid", "x"], {"model": HUB_ID}, f"its model {HUB_ID} is not at hand"),
    "a model of escapes": (["generate", "x"], {"model": ESCAPES}, f"its model {SHOWN} is not at hand"),
    "steps without end": (["generate", "x", "--model", "MODEL"], {"sampling_steps": "999999"}, "steps cannot be 99"),
    "tokens without end": (["generate", "x", "--model", "MODEL"], {"max_tokens": "999999"}, "max_tokens cannot be"),
    "digits without end": (["generate", "x", "--model", "MODEL"], {"max_tokens": "9" * 5000}, "damaged metadata"),
    "a padding of escapes": (["generate", "x", "--model", "MODEL"], {"text_padding": ESCAPES}, "cannot be"),
    "a deep key map": (["generate", "x", "--model", "MODEL"], {"key_map": "[" * 99_999}, "unreadable key_map"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_what_an_adapter_says(libreflux: Callable, tiny_model_dir: Path, tmp_path: Path, case: str) -> None:
    args, metadata, told = ADAPTERS[case]
    adapter(tmp_path / "a.safetensors", **metadata)
    words = [str(tiny_model_dir) if word == "MODEL" else word for word in args]
    one_line(libreflux(tmp_path, *words, "--adapter", "a.safetensors", "--out", "o"), "a.safetensors", told)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_adapter_of_another_base_obeys_nobody(libreflux: Callable, tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "a.safetensors", model=ESCAPES, model_hash=ESCAPES)
    args = ["--model", tiny_model_dir, "--adapter", "a.safetensors", "--steps", 1, "--out", "y.png"]
    code, _, err = libreflux(tmp_path, "generate", "a fox", *args)
    assert code == 0
    assert "was trained on other weights" in err
    assert "\\x1b]0;mine" in err
    assert "\x1b" not in err


@pytest.mark.parametrize("told", [HUB_ID, "../../x", "emoji-base@../x"])
def test_what_a_model_was_distilled_from_is_not_fetched(
    told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def download(**wanted: Any) -> str:
        asked.append(wanted)
        raise OSError("not stored")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    result = Result(model={"name": "m", "distilled_from": told}, settings={}, versions={}, seconds=0.0)
    assert distilled_from("m", result) is None
    assert all(one["local_files_only"] for one in asked)
    assert "which is not here" in caplog.text


def changed(folder: Path, name: str, **values: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("size", ["128); import os; os.abort(#", 10**6, -1, [64, 64], 10**30])
def test_a_vae_cannot_choose_any_size(libreflux: Callable, tiny_model_dir: Path, tmp_path: Path, size: object) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    changed(model, "vae/config.json", sample_size=size)
    for args in (["generate", "x"], ["export", "--for", "diffusers"]):
        out = ["--out", "o"] if args[0] == "export" else ["--out", "y.png"]
        model_args = [model] if args[0] == "export" else ["--model", model]
        one_line(libreflux(tmp_path, args[0], *args[1:], *model_args, *out), "vae" if isinstance(size, str) else "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_script_for_diffusers_has_numbers_where_numbers_belong() -> None:
    for name, value in (("steps", "1); x("), ("guidance", "1); x("), ("max_tokens", "1); x("), ("text_padding", "x")):
        values = {"schema": 1, "text_padding": "drop", "max_tokens": 512, "steps": 4, "guidance": 3.0, "shift": 1.0}
        rows = values | {"guidance_embeds": False, "licence": "x", "lineage": {}, name: value}
        with pytest.raises(ModelError, match=name):
            Facts.from_dict(rows, "libreflux.json")
    script = diffusers_script(Facts(), size=128, dtype="float32")
    assert script is not None
    assert compile(script, "draw.py", "exec")


@pytest.mark.parametrize(
    "file", ["../secret.png", "/etc/hostname", "link.png", "pictures/../../secret.png", "x.txt", 7]
)
def test_a_result_names_no_file_outside_its_folder(tmp_path: Path, file: object) -> None:
    folder = tmp_path / "probe"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "x.txt").write_text("x")
    rows = {"schema": 1, "model": {}, "settings": {}, "versions": {}, "seconds": 1.0, "measures": []}
    (folder / "probe.json").write_text(json.dumps(rows | {"pictures": [{"file": file, "at": {}, "purpose": "seeds"}]}))
    with pytest.raises(DataError, match="no result of a probe"):
        read_result(folder)


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("config.json", {"auto_map": {"AutoModel": "code.Model"}}, "names Python code of its own"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "code.P"}}, "names Python code of its own"),
        ("config.json", {"_attn_implementation": "someone/kernel"}, "names code of the hub, someone/kernel"),
        ("config.json", {"vision_config": {"attn_implementation": "a/b"}}, "names code of the hub, a/b"),
        ("config.json", {"quantization_config": {"quant_method": "torchao"}}, "is quantised by torchao"),
        ("adapter_config.json", {"base_model_name_or_path": HUB_ID}, "is an adapter, not a model"),
        ("preprocessor_config.json", {"crop_size": {"height": 10**6, "width": 10**6}}, "inputs of 1000000 pixels"),
    ],
)
def test_a_vision_model_runs_no_code_of_its_own(
    libreflux: Callable, tmp_path: Path, name: str, values: dict[str, Any], told: str
) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path / "clip"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    (folder / "code.py").write_text("raise SystemExit(77)")
    (folder / name).touch()
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text() or "{}")) | values))
    one_line(libreflux(tmp_path, "probe", "emoji-base", "--features", "clip", "--out", "o"), "clip", told)


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "a \udcff fox"],
        ["grid", "a \udcff fox"],
        ["generate", "x", "--negative", "\udce9"],
        ["train", "r.yaml", "samples.prompts.0=\udce9"],
        ["prepare", "data-\udcff", "--out", "o"],
    ],
)
def test_an_argument_that_is_not_utf8(libreflux: Callable, tmp_path: Path, args: list[str]) -> None:
    one_line(libreflux(tmp_path, *args), "is not UTF-8", "\\udc")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--width", 1_000_000, "--height", 1_000_000], "--width: cannot be 1000000"),
        (["--width", 16384, "--height", 16384], "--width: 16384 x 16384 pixels"),
        (["--steps", 1_000_000], "--steps: cannot be 1000000"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "grid"])
def test_sizes_without_end(libreflux: Callable, tmp_path: Path, verb: str, args: list[object], told: str) -> None:
    one_line(libreflux(tmp_path, verb, "x", "--model", "no/such/model", *args), told)
    assert not list(tmp_path.iterdir())


def test_a_name_that_the_terminal_cannot_print_costs_no_picture(
    libreflux: Callable, tiny_model_dir: Path, tmp_path: Path
) -> None:
    args = ["generate", "a fox", "--model", tiny_model_dir, "--steps", 1, "--out", "狐.png"]
    code, out, err = libreflux(tmp_path, *args, encoding="ascii")
    assert (code, out) == (0, "\\u72d0.png\n"), err
    assert (tmp_path / "狐.png").is_file()
