"""Single files as other programs write them: quantised, in several dtypes, under other names; and large ones."""

from __future__ import annotations

import json
import mmap
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from libreflux.errors import ModelError
from libreflux.model.facts import Facts
from libreflux.model.int8 import quantise_weight
from libreflux.model.latents import image_ids
from libreflux.model.opening import open_model
from libreflux.model.ranges import RangedFile
from libreflux.model.single_file import SingleFiles, load_text_encoder, load_transformer, transformer_config
from libreflux.model.single_save import save_transformer
from libreflux.model.tensor_file import TensorFile
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from opened import opened
from tiny import tiny_transformer

FP8, INT8, FP32 = torch.float8_e4m3fn, torch.int8, torch.float32
LAYER = "double_blocks.0.img_attn.proj"  # 32 x 32: a scale on the wrong axis has the right shape
FUSED = "double_blocks.0.img_attn.qkv"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "flux1-tiny.safetensors"
    save_transformer(tiny_transformer(), Facts(), path)
    return path


@pytest.fixture
def made(whole: Path, tmp_path: Path) -> Callable[..., TensorFile]:
    """Writes the tiny transformer with other tensors, and opens it."""

    def write(tensors: Tensors, metadata: dict[str, str] | None = None, rename: str = "") -> TensorFile:
        path = tmp_path / "made.safetensors"
        told = TensorFile(whole, "transformer").metadata | (metadata or {})
        save_file({rename + name: tensor.contiguous() for name, tensor in tensors.items()}, path, told)
        return TensorFile(path, "transformer")

    return write


def look(file: TensorFile) -> Tensor:
    transformer = load_transformer(file, transformer_config(file))
    generator = torch.Generator().manual_seed(3)
    text = TextConditioning([torch.randn(5, 24, generator=generator)], torch.randn(1, 16, generator=generator))
    with torch.no_grad():
        return velocity(
            transformer, torch.randn(1, 4, 64, generator=generator), torch.tensor([0.6]), text, image_ids(4, 4)
        )


def quantised(weight: Tensor, dtype: torch.dtype, per: str) -> tuple[Tensor, Tensor]:
    """(q, scale) as ComfyUI's kitchen and its converters store them; a scale per row is [rows, 1] or [rows]."""
    largest = weight.abs().max() if per == "tensor" else weight.abs().amax(1, keepdim=True)
    scale = largest / (127 if dtype == INT8 else 448)
    q = (weight / scale).round().to(INT8) if dtype == INT8 else (weight / scale).to(FP8)
    return q, scale.flatten() if per == "flat row" else scale


@pytest.mark.parametrize("marked", ["no marks", "tensors", "metadata", "metadata with the prefix"])
@pytest.mark.parametrize("per", ["tensor", "row", "flat row"])
@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_scaled_weights(
    whole: Path, made: Callable[..., TensorFile], dtype: torch.dtype, per: str, marked: str
) -> None:
    tensors, metadata = load_file(whole), {}
    prefix = "model.diffusion_model." if marked.endswith("prefix") else ""
    ending = ".scale_weight" if marked == "no marks" else ".weight_scale"
    mark = {"format": "int8_tensorwise" if dtype == INT8 else "float8_e4m3fn", "full_precision_matrix_mult": True}
    dense = {}
    for layer in (LAYER, FUSED):
        # Rows, and columns, of unlike sizes: the scale of another axis would be far off.
        weight = tensors[f"{layer}.weight"] * torch.logspace(-2, 1, len(tensors[f"{layer}.weight"]))[:, None]
        tensors[f"{layer}.weight"], tensors[layer + ending] = quantised(weight, dtype, per)
        scale = tensors[layer + ending].reshape(-1, 1) if per != "tensor" else tensors[layer + ending]
        dense[layer] = tensors[f"{layer}.weight"].float() * scale
        tensors[f"{layer}.input_scale"] = torch.tensor(3.0)
        if marked == "tensors":
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    if marked.startswith("metadata"):
        layers = {prefix + layer: mark for layer in (LAYER, FUSED)}
        metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    file = made(tensors, metadata, rename=prefix)
    transformer = load_transformer(file, transformer_config(file), dtype=torch.bfloat16)
    own = "transformer_blocks.0.attn"
    for layer, name in ((LAYER, f"{own}.to_out.0"), (FUSED, f"{own}.to_q")):
        weight = transformer.get_submodule(name).weight
        assert torch.equal(weight, dense[layer][:32].bfloat16())
    assert look(file).isfinite().all()


def _int8_bare(tensors: Tensors) -> dict[str, str]:
    tensors[f"{LAYER}.weight"] = torch.ones(32, 32, dtype=INT8)
    return {}


def _marked(mark: dict[str, object]) -> Callable[[Tensors], dict[str, str]]:
    def change(tensors: Tensors) -> dict[str, str]:
        tensors[f"{LAYER}.weight"], tensors[f"{LAYER}.weight_scale"] = quantised(
            tensors[f"{LAYER}.weight"], INT8 if "int8" in str(mark["format"]) else FP8, "tensor"
        )
        tensors[f"{LAYER}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
        return {}

    return change


def _with(weight: Tensor, **others: Tensor) -> Callable[[Tensors], dict[str, str]]:
    def change(tensors: Tensors) -> dict[str, str]:
        tensors[f"{LAYER}.weight"] = weight
        tensors.update({f"{LAYER}.{name}": tensor for name, tensor in others.items()})
        return {}

    return change


EIGHT, BYTES = torch.ones(32, 32).to(FP8), torch.ones(32, 16, dtype=torch.uint8)
REFUSED: dict[str, tuple[Callable[[Tensors], dict[str, str] | None], str]] = {
    "int8 without a scale": (_int8_bare, "I8 without a scale"),
    "mxfp8, marked": (_marked({"format": "mxfp8"}), "mxfp8"),
    "mxfp8": (_with(EIGHT, weight_scale=torch.ones(128, 4, dtype=torch.uint8)), "mxfp8"),
    "nvfp4, marked": (_marked({"format": "nvfp4"}), "nvfp4"),
    "nvfp4": (_with(BYTES, weight_scale=EIGHT, weight_scale_2=torch.tensor(1.0)), "nvfp4"),
    "a rotated int8": (_marked({"format": "int8_tensorwise", "convrot": True}), "int8_tensorwise with convrot"),
    "w4a8": (_with(BYTES, weight_codebook=torch.ones(16)), "asym_w4a8_int8"),
    "blocks": (_with(EIGHT, weight_scale=torch.ones(2, 2)), r"blocks \(\(2, 2\) scales for \(32, 32\)\)"),
    "columns": (_with(EIGHT, weight_scale=torch.ones(1, 32)), r"blocks \(\(1, 32\)"),
    "DeepSeek's": (_with(EIGHT, weight_scale_inv=torch.ones(1, 1)), "fp8 in blocks"),
    "GPTQ": (_with(torch.ones(32, 32), qweight=BYTES), "GPTQ"),
    "bytes": (_with(BYTES), "stores U8"),
    "integers": (_with(torch.ones(32, 32, dtype=torch.int32)), "stores I32"),
    "a scale for what is dense": (_with(torch.ones(32, 32), weight_scale=torch.tensor(2.0)), "scales F32"),
    "a damaged mark": (_with(EIGHT, comfy_quant=torch.ones(3, dtype=torch.uint8)), "cannot read how it is quantised"),
    "a mark that is too long": (_with(EIGHT, comfy_quant=torch.zeros(20_000, dtype=torch.uint8)), "has 20000 bytes"),
    "bitsandbytes": (lambda tensors: tensors.update({"img_in.weight.absmax": torch.ones(2)}), "bitsandbytes"),
}


@pytest.mark.parametrize("bare", [False, True], ids=["with its config", "by its shapes"])
@pytest.mark.parametrize("case", REFUSED)
def test_other_formats_are_refused_by_name(
    whole: Path, made: Callable[..., TensorFile], tmp_path: Path, case: str, bare: bool
) -> None:
    change, words = REFUSED[case]
    tensors = load_file(whole)
    change(tensors)
    path = made(tensors).path
    if bare:
        path = tmp_path / "bare.safetensors"
        save_file(tensors, path)
    with pytest.raises(ModelError, match=words) as told:
        open_model(SingleFiles(transformer=path)).load_transformer()
    assert path.name in str(told.value)


@pytest.mark.parametrize(
    ("linears", "rest", "main"),
    [
        (torch.bfloat16, FP32, torch.bfloat16),
        (FP8, FP32, torch.bfloat16),
        (FP8, torch.float16, torch.bfloat16),
        (torch.float16, FP32, torch.float16),
        (FP32, torch.bfloat16, FP32),
    ],
)
def test_one_file_of_two_dtypes_is_drawn_in_its_main_one(
    whole: Path, made: Callable[..., TensorFile], linears: torch.dtype, rest: torch.dtype, main: torch.dtype
) -> None:
    tensors = {name: one.to(linears if one.ndim == 2 else rest) for name, one in load_file(whole).items()}
    file = made(tensors)
    transformer = load_transformer(file, transformer_config(file))
    assert {one.dtype for one in transformer.parameters()} == {main}
    assert torch.equal(transformer.x_embedder.weight, tensors["img_in.weight"].to(main))
    expected = look(TensorFile(whole, "transformer"))
    # fp8 has 3 bits after the first: the error of a product of many is some percent
    assert float((look(file) - expected).norm() / expected.norm()) < (0.1 if linears == FP8 else 0.02)


@pytest.mark.parametrize("linears", [torch.float16, FP8], ids=["fp16", "fp8"])
def test_t5_of_two_dtypes(tiny_model_dir: Path, tmp_path: Path, linears: torch.dtype) -> None:
    """With ComfyUI's logit_scale, and `wo` in fp32 as transformers saves a T5 in fp16."""
    stored = load_file(tiny_model_dir / "text_encoder_2" / "model.safetensors")
    config = json.loads((tiny_model_dir / "text_encoder_2" / "config.json").read_text())
    tensors = {n: t.to(FP32 if ".wo." in n else linears if t.ndim == 2 else FP32) for n, t in stored.items()}
    save_file(tensors | {"logit_scale": torch.tensor(4.6)}, tmp_path / "t5xxl.safetensors")
    t5 = load_text_encoder(TensorFile(tmp_path / "t5xxl.safetensors", "text_encoder_2"), "text_encoder_2", config)
    whole = load_text_encoder(
        TensorFile(tiny_model_dir / "text_encoder_2" / "model.safetensors", "text_encoder_2"), "text_encoder_2", config
    )
    main = torch.float16 if linears == torch.float16 else torch.bfloat16
    assert t5.dtype == main
    ids = torch.arange(6)[None]
    with torch.no_grad():
        one, other = (model(input_ids=ids).last_hidden_state.float() for model in (t5, whole))
    assert float((one - other).norm() / other.norm()) < (0.005 if main == torch.float16 else 0.15)


WRAPPERS = ["transformer.", "model.", "module.", "model.diffusion_model.", "module.model.", "_orig_mod."]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("names", ["bfl", "diffusers"])
def test_what_stands_before_all_names(
    whole: Path, tiny_model_dir: Path, tmp_path: Path, names: str, wrapper: str
) -> None:
    source = whole if names == "bfl" else tiny_model_dir / "transformer" / "diffusion_pytorch_model.safetensors"
    expected = tiny_transformer().state_dict()
    save_file({wrapper + name: one for name, one in load_file(source).items()}, tmp_path / "wrapped.safetensors")
    files = SingleFiles(transformer=tmp_path / "wrapped.safetensors", base=str(tiny_model_dir))
    found = open_model(files).load_transformer()
    assert all(torch.equal(one, expected[name]) for name, one in found.state_dict().items())


def test_comfyuis_name_of_the_norms(whole: Path, made: Callable[..., TensorFile]) -> None:
    stored = load_file(whole)
    renamed = {
        n.replace("_norm.scale", "_norm.weight"): torch.rand_like(t) if "_norm" in n else t for n, t in stored.items()
    }
    assert "single_blocks.1.norm.query_norm.weight" in renamed
    file = made(renamed)
    transformer = load_transformer(file, transformer_config(file))
    found = transformer.get_submodule("single_transformer_blocks.1.attn.norm_q").weight
    assert torch.equal(found, renamed["single_blocks.1.norm.query_norm.weight"])


def test_a_file_is_mapped_tensor_by_tensor(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never as a whole: Linux refuses to map privately what is larger than memory and swap."""
    lengths: list[int] = []
    real = mmap.mmap

    def counted(handle: int, length: int, *args: Any, **options: Any) -> mmap.mmap:
        lengths.append(length)
        return real(handle, length, *args, **options)

    monkeypatch.setattr(mmap, "mmap", counted)
    transformer = open_model(SingleFiles(transformer=whole)).load_transformer(quantise=True)
    assert transformer.dtype == FP32
    tensors = load_file(whole)
    assert len(lengths) == len(tensors)
    assert max(lengths) <= max(one.nbytes for one in tensors.values()) + mmap.ALLOCATIONGRANULARITY


def test_where_nothing_can_be_mapped_it_is_read(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    stored = RangedFile(whole)
    assert all(torch.equal(stored.read(name), one) for name, one in load_file(whole).items())


def test_a_tensor_may_be_written_to_and_the_file_stays(whole: Path) -> None:
    before = whole.read_bytes()
    RangedFile(whole).read("img_in.weight").zero_()
    assert whole.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts this process's memory as Linux tells it")
def test_a_file_larger_than_memory_is_quantised(tmp_path: Path) -> None:
    save_file({f"{n}.weight": torch.ones(1000, 1000) for n in range(25)}, tmp_path / "large.safetensors")  # 100 MB
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 50_000_000, hard))
    try:
        file = RangedFile(tmp_path / "large.safetensors")
        scales = [float(quantise_weight(file.read(name))[1][0]) for name in file.ranges]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert scales == [pytest.approx(1 / 127, rel=0.01)] * 25


def _header(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[bytes], bytes]:
    def made(raw: bytes) -> bytes:
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        change(header)
        new = json.dumps(header).encode()
        return len(new).to_bytes(8, "little") + new + raw[8 + size :]

    return made


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut in the header": lambda raw: raw[:100],
    "cut at the end": lambda raw: raw[:-1],
    "more at the end": lambda raw: raw + b"x",
    "no JSON": lambda raw: raw[:8] + b"x" + raw[9:],
    "a list": lambda raw: (2).to_bytes(8, "little") + b"[]",
    "deep": lambda raw: (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "overlapping": _header(lambda h: h.update(more=h["img_in.bias"])),
    "negative": _header(lambda h: h["img_in.bias"].update(shape=[-32])),
    "too many rows": _header(lambda h: h["img_in.bias"].update(shape=[33])),
    "past the end": _header(lambda h: h["img_in.bias"].update(data_offsets=[0, 2**62])),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header(whole: Path, tmp_path: Path, case: str) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(DAMAGED[case](whole.read_bytes()))
    with pytest.raises(SafetensorError, match="it"):
        RangedFile(path)
    with pytest.raises(ModelError, match=r"damaged.safetensors: cannot be read"):
        TensorFile(path, "transformer")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name: {name: torch.ones(2, 2, dtype=INT8)}, "stores I8"),
        (lambda name: {f"{name}_scale": torch.tensor(2.0)}, "scales beside its weights"),
        (lambda name: {f"{name}.absmax": torch.tensor(2.0)}, "bitsandbytes"),
    ],
    ids=["int8", "scales", "bitsandbytes"],
)
def test_a_folder_of_quantised_tensors(
    tiny_model_dir: Path, tmp_path: Path, part: str, change: Callable[[str], Tensors], words: str
) -> None:
    """transformers leaves out what it has no place for, diffusers would cast the integers: both unscaled."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    [file] = (tmp_path / "model" / part).glob("*.safetensors")
    tensors = load_file(file)
    name = min(name for name in tensors if name.endswith("weight") and tensors[name].ndim > 1)
    save_file(tensors | change(name), file, {"format": "pt"})
    with pytest.raises(ModelError, match=words):
        opened(tmp_path / "model")
