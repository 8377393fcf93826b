"""Captions by a tiny random vision-language model through the real path: processor, batches, generation, int8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import is_torchvision_available

import libreflux
from libreflux.captioning import vision_model
from libreflux.captioning.asking import Question, Wording
from libreflux.captioning.vision_folder import find_vision_model, identity
from libreflux.captioning.vision_model import Draws, VisionModel, load_vision_model
from libreflux.data.sources import read_source
from libreflux.errors import ModelError
from libreflux.model.int8 import Int8Linear
from libreflux.recipe import DataSource
from vlm import make_tiny_qwen, make_tiny_vlm

CPU = torch.device("cpu")
COLOURS = ["red", "green", "blue", "white", "black"]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vlm(tmp_path_factory.mktemp("vlm") / "tiny-vlm")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for colour in COLOURS:
        Image.new("RGB", (48, 32), colour).save(folder / f"{colour}.png")
    return folder


def opened(file: str) -> Image.Image:
    return Image.new("RGB", (48, 32), file)


def ask(vlm: Path, questions: list[Question], batch: int, temperature: float = 0.0, **how: Any) -> dict[Question, str]:
    loaded = load_vision_model(vlm, how.get("dtype", "fp32"), how.get("quantize"), CPU)
    model = VisionModel(loaded, Wording(12, temperature, 3), opened, batch)
    left = iter(questions)
    return {question: answer.text for question, answer in model.answers(lambda: next(left, None))}


def test_captions_of_a_folder_are_data_for_training(vlm: Path, photos: Path) -> None:
    given: dict[str, Any] = {
        "captions": {"one": "a fox", "two": "the red owl on a lake"},
        "device": "cpu",
        "max_tokens": 24,
    }
    made = libreflux.caption(photos, model=str(vlm), batch=3, tries=4, **given)
    assert made.written + len(made.failed) == 10
    assert made.written >= 3
    assert {row[2] for row in made.failed} <= {"cut", "repeating", "empty"}
    again = libreflux.caption(photos, model=str(vlm), batch=2, tries=4, **given)
    assert (again.written, again.kept, again.failed) == (0, made.written, made.failed)
    rows = [json.loads(line) for line in made.file.read_text("utf-8").splitlines()]
    for picture in {*COLOURS} - {row["file_name"][:-4] for row in rows}:
        (photos / f"{picture}.png").unlink()
    samples, _ = read_source(DataSource(path=str(photos)))
    assert sum(len(one.captions) for one in samples) <= made.written
    assert {kind for one in samples for kind in one.kinds} <= {"one", "two"}


def test_the_example_of_the_docstring_runs(
    vlm: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photos.parent)
    (photos.parent / "my-vlm").symlink_to(vlm)
    for colour in COLOURS[1:]:
        (photos / f"{colour}.png").unlink()
    code = (libreflux.caption.__doc__ or "").partition("Example::\n\n")[2].partition("\n\nArgs:")[0]
    exec("if True:\n" + code, {})
    assert capsys.readouterr().out.split()[1] == "photos/.caption/index.html"


QUESTIONS = [
    Question(colour, "x", prompt) for colour in COLOURS for prompt in ("a fox", "the big red owl on a lake in snow")
]


def test_answers_do_not_depend_on_what_is_asked_beside_them(vlm: Path) -> None:
    for temperature in (0.0, 0.9):
        alone = ask(vlm, QUESTIONS, 1, temperature)
        assert ask(vlm, QUESTIONS, 4, temperature) == alone
        assert ask(vlm, QUESTIONS[::-1], 10, temperature) == alone
    assert len({*alone.values()}) > 5


def test_the_picture_and_the_prompt_decide(vlm: Path) -> None:
    found = ask(vlm, QUESTIONS, 10)
    assert len({found[one] for one in QUESTIONS[::2]}) > 1
    assert any(found[one] != found[two] for one, two in zip(QUESTIONS[::2], QUESTIONS[1::2], strict=True))


def test_an_answer_that_is_asked_for_again_is_another_and_the_same_each_time(vlm: Path) -> None:
    again = [Question("red", "x", "a fox", attempt) for attempt in range(4)]
    first = ask(vlm, again, 4)
    assert first == ask(vlm, again, 1)
    assert len({*first.values()}) > 2


def test_draws_have_the_distribution_of_their_temperature() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, float("-inf")])
    drawn = [int(Draws([(0.7, seed)])(torch.zeros(1, 1), logits[None])[0].argmax()) for seed in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(shares, torch.softmax(logits / 0.7, 0), atol=0.025, rtol=0)
    assert torch.equal(Draws([(0.0, 1)])(torch.zeros(1, 1), logits[None])[0], logits)


def test_greedy_answers_are_what_transformers_says_itself(vlm: Path) -> None:
    loaded = load_vision_model(vlm, "fp32", None, CPU)
    inputs = loaded.processor(text="USER <image> a fox ASSISTANT ", images=opened("red"), return_tensors="pt")
    made = loaded.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = loaded.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert ask(vlm, [Question("red", "x", "a fox")], 1) == {Question("red", "x", "a fox"): text}


def test_an_answer_is_cut_unless_it_ends_by_itself(vlm: Path) -> None:
    loaded = load_vision_model(vlm, "fp32", None, CPU)
    questions = [Question("red", "x", "a fox"), Question("blue", "x", "an owl")]

    def cuts() -> list[bool]:
        left = iter(questions)
        model = VisionModel(loaded, Wording(5, 0.0, 0), opened, 2)
        return [answer.cut for _, answer in model.answers(lambda: next(left, None))]

    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()
        bias = torch.nn.Parameter(torch.zeros(loaded.model.lm_head.out_features))
        loaded.model.lm_head.bias = bias
        bias[9] = 1.0
    assert cuts() == [True, True]
    with torch.no_grad():
        bias[loaded.model.generation_config.eos_token_id] = 2.0
    assert cuts() == [False, False]


def test_int8_is_of_the_language_model_and_near_to_the_original(vlm: Path, photos: Path) -> None:
    plain, int8 = (load_vision_model(vlm, "fp32", kind, CPU) for kind in (None, "int8"))
    layers = [name for name, module in int8.model.named_modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 14
    assert all("language_model" in name for name in layers)
    inputs = plain.processor(text="USER <image> a fox ASSISTANT ", images=opened("red"), return_tensors="pt")
    with torch.inference_mode():
        wanted, found = (one.model(**inputs).logits.double() for one in (plain, int8))
    error = float((found - wanted).norm() / wanted.norm())
    assert 0 < error < 0.05
    made = libreflux.caption(
        photos, model=str(vlm), captions={"s": "a fox"}, max_tokens=12, quantize="int8", dtype="bf16", device="cpu"
    )
    assert made.written + len(made.failed) == 5


def test_bf16_weights_compute(vlm: Path) -> None:
    loaded = load_vision_model(vlm, "bf16", None, CPU)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert len(ask(vlm, QUESTIONS[:2], 2, dtype="bf16")) == 2


def test_a_model_for_videos_too_needs_no_torchvision_for_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2.5-VL, whose part for videos cannot even be imported without it."""
    folder = make_tiny_qwen(tmp_path / "qwen")
    questions = [
        Question(colour, "x", prompt) for colour in ("red", "blue") for prompt in ("a fox", "the owl on a tree")
    ]
    found = ask(folder, questions, 4)
    assert found == ask(folder, questions, 1)
    assert all(found.values())
    loaded = load_vision_model(folder, "fp32", "int8", CPU)
    assert any(isinstance(module, Int8Linear) for module in loaded.model.modules())
    assert "Qwen2_5_VLProcessor" in type(loaded.processor).__name__

    def wide(file: str) -> Image.Image:
        return Image.new("RGB", (301, 1)) if file == "wide" else opened(file)

    left = iter([questions[0], Question("wide", "x", "a fox"), questions[1]])
    answers = dict(VisionModel(loaded, Wording(12, 0.0, 3), wide, 3).answers(lambda: next(left, None)))
    assert [one.fault for one in answers.values()] == [None, "unreadable", None]
    assert "aspect ratio" in answers[Question("wide", "x", "a fox")].text
    monkeypatch.setattr(vision_model, "PROCESSOR_MAPPING", {})
    if not is_torchvision_available():
        with pytest.raises(ModelError, match=r"its processor cannot be used \(.*orchvision"):
            load_vision_model(folder, "fp32", None, CPU)


def broken(vlm: Path, folder: Path, *, drop: str = "", **config: Any) -> Path:
    """A copy without a tensor, or with other keys in config.json."""
    folder.mkdir()
    for file in vlm.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if drop:
        tensors = load_file(folder / "model.safetensors")
        del tensors[next(name for name in sorted(tensors) if drop in name)]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text("utf-8")) | config
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_models_that_cannot_be_asked_are_refused_in_one_line(vlm: Path, tmp_path: Path) -> None:
    cases = {
        "missing keys: ": broken(vlm, tmp_path / "missing", drop="q_proj"),
        "is quantised by fp8": broken(vlm, tmp_path / "fp8", quantization_config={"quant_method": "fp8"}),
        "cannot be loaded": broken(vlm, tmp_path / "text", model_type="llama", architectures=["LlamaForCausalLM"]),
        "has no chat template": make_tiny_vlm(tmp_path / "no-chat", chat=False),
    }
    pickled = broken(vlm, tmp_path / "pickle")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    cases["cannot be loaded (OSError"] = pickled
    for told, folder in cases.items():
        with pytest.raises(ModelError) as error:
            load_vision_model(folder, "stored", None, CPU)
        assert told in str(error.value), str(error.value)
        assert folder.name in str(error.value)
        assert "\n" not in str(error.value)


def test_code_beside_a_model_is_never_run(vlm: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()\nclass M: pass\n"
    maps = {"AutoModelForImageTextToText": "evil.M", "AutoConfig": "evil.M", "AutoProcessor": "evil.M"}
    known = broken(vlm, tmp_path / "known", auto_map=maps)
    unknown = broken(vlm, tmp_path / "unknown", auto_map=maps, model_type="evil")
    for folder in (known, unknown):
        (folder / "evil.py").write_text(code, encoding="utf-8")
    load_vision_model(known, "stored", None, CPU)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_vision_model(unknown, "stored", None, CPU)
    assert not mark.exists()


def test_a_model_is_found_by_its_folder_and_a_hub_id_downloads_no_code(
    vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    wanted: list[dict[str, Any]] = []

    def snapshot(**given: Any) -> str:
        wanted.append(given)
        if given.get("local_files_only"):
            raise OSError("nothing here")
        return str(vlm)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert find_vision_model(str(vlm)) == vlm
    for odd in ("nowhere", str(tmp_path / "x"), "./a/b", "a/../b", "a/b/c"):
        with pytest.raises(ModelError, match="no such folder"):
            find_vision_model(odd)
    assert not wanted
    assert find_vision_model("org/name@v1") == vlm
    assert [(one["repo_id"], one["revision"]) for one in wanted] == [("org/name", "v1")] * 2
    published = ["config.json", "model-1.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    others = ["model.py", "pytorch_model.bin", "onnx/config.json", "consolidated.safetensors", "a.gguf"]
    rules = {name: wanted[-1][name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*published, *others], **rules)) == published


def test_another_template_is_another_model(vlm: Path, tmp_path: Path) -> None:
    copy = broken(vlm, tmp_path / "copy")
    (copy / "config.json").write_bytes((vlm / "config.json").read_bytes())
    assert identity(copy) == identity(vlm)
    (copy / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert identity(copy) != identity(vlm)
