"""Parts are read straight to where they run, in the dtype they run in; "meta" stands for a card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import modeling_utils
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from libreflux.errors import ModelError
from libreflux.model.load import one_line
from libreflux.model.opening import open_model
from libreflux.model.single_file import SingleFiles, find_comfyui
from opened import Opened, opened


class HostBytes(TorchDispatchMode):
    """The most bytes of tensors that were made on the CPU and lived at once; what is mapped is not made."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if function in (aten._to_copy.default, aten.clone.default, aten.empty.memory_format):
            storage = found.untyped_storage()
            self._made = [(ref, size) for ref, size in self._made if not ref.expired()]
            self._made += [(StorageWeakRef(storage), storage.nbytes())] if found.device.type == "cpu" else []
            self.peak = max(self.peak, sum(size for _, size in self._made))
        return found


def modules(model: Opened) -> list[torch.nn.Module]:
    return [model.transformer, model.vae, model.text.text_encoder, model.text.text_encoder_2]


@pytest.fixture(scope="module", params=["folder", "files"])
def source(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "folder":
        return tiny_model_dir
    out = tmp_path_factory.mktemp("files") / "comfy"
    opened(tiny_model_dir).save_files(out)
    return find_comfyui(out)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_no_part_is_on_the_host_as_a_whole(
    source: Path | SingleFiles, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a dispatch mode sees its own thread
    with HostBytes() as host:
        whole = opened(source, dtype=dtype)
    with HostBytes() as host_of_card:
        there = opened(source, dtype=dtype, device="meta")
    largest = max(4 * one.numel() for module in modules(whole) for one in module.parameters())  # stored in fp32
    size = sum(one.nbytes for module in modules(whole) for one in module.parameters())
    assert host_of_card.peak <= 1.5 * largest < size / 4  # one tensor as it is stored, and once converted
    if dtype is not None:
        assert host.peak >= size  # the count sees what is made
    for mine, yours in zip(modules(whole), modules(there), strict=True):
        wanted, found = mine.state_dict(), yours.state_dict()
        assert {name: (one.shape, one.dtype) for name, one in wanted.items()} == {
            name: (one.shape, one.dtype) for name, one in found.items()
        }
        assert {one.device.type for one in [*yours.parameters(), *yours.buffers()]} == {"meta"}
        assert not yours.training
        assert not any(one.requires_grad for one in yours.parameters())
        assert not hasattr(yours, "_hf_hook")
        assert not hasattr(yours, "hf_device_map")


def damaged(model: Path, out: Path, part: str, name: str | None, added: str | None) -> Path:
    shutil.copytree(model, out)
    [file] = (out / part).glob("*.safetensors")
    tensors = load_file(file)
    if name is not None:
        del tensors[name]
    if added is not None:
        tensors[added] = torch.zeros(3)
    save_file(tensors, file, {"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("part", "name", "added", "told"),
    [
        ("transformer", "x_embedder.weight", None, "missing keys: x_embedder.weight"),
        ("transformer", None, "one_more.weight", "unexpected keys: one_more.weight"),
        ("vae", "encoder.conv_in.bias", None, "missing keys: encoder.conv_in.bias"),
        ("vae", None, "one_more.weight", "unexpected keys: one_more.weight"),
        ("text_encoder_2", "encoder.final_layer_norm.weight", None, "missing keys: encoder.final_layer_norm.weight"),
        ("text_encoder", "final_layer_norm.bias", None, "missing keys:"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_missing_is_named_on_either_way(
    tiny_model_dir: Path,
    tmp_path: Path,
    part: str,
    name: str | None,
    added: str | None,
    told: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dispatch(model: torch.nn.Module, **_: object) -> None:
        # As on a card, where tensors that no file had cannot be moved.
        if name is not None:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    monkeypatch.setattr(modeling_utils, "dispatch_model", dispatch)
    if part == "text_encoder":
        [file] = (tiny_model_dir / part).glob("*.safetensors")
        name = next(key for key in load_file(file) if key.endswith(str(name)))
    broken = damaged(tiny_model_dir, tmp_path / "m", part, name, added)
    asked = "text" if part.startswith("text") else part
    with pytest.raises(ModelError, match=told):
        getattr(open_model(broken), f"load_{asked}")(device=device)
    if asked == "text":
        with pytest.raises(ModelError, match=told):
            open_model(broken).load_text(dtype=torch.float32, device=device, by_block=True)


def test_a_part_that_cannot_be_made_leaves_torchs_default_dtype(tiny_model_dir: Path, tmp_path: Path) -> None:
    """diffusers sets it to the part's while it makes one, and does not put it back where that fails."""
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "m"))
    (model / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL", "in_channels": "x"}')
    with pytest.raises(ModelError):
        open_model(model).load_vae(dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


def test_a_panic_of_the_tokenizers_library_is_one_line() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(ModelError, match=r"model: cannot be loaded \(charsmap\); hint: "), one_line(Path("model")):
        raise panic("charsmap")
    with pytest.raises(KeyboardInterrupt), one_line(Path("model")):
        raise KeyboardInterrupt
