"""A model in single .safetensors files, one per part or one for all, as Black Forest Labs and ComfyUI store it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from libreflux import plainjson
from libreflux.errors import ModelError, OptionHint
from libreflux.model.int8 import int8_layers, quantise_model, quantise_weight
from libreflux.model.keep_fp32 import dtype_of
from libreflux.model.keys import BFL_BLOCKS, Row, config_of, count_blocks, renamed, transformer_rows, vae_rows
from libreflux.model.parts import check_layers
from libreflux.model.tensor_file import TensorFile
from libreflux.places import did_you_mean
from libreflux.printing import get_logger

logger = get_logger(__name__)

FACTS_KEY = "libreflux"
"""Of the metadata of a file that we wrote: the model's facts, as in libreflux.json."""
CONFIGS = Path(__file__).resolve().parent / "configs"
TOKENIZERS = {"tokenizer": "sd1_tokenizer", "tokenizer_2": "t5_tokenizer"}
"""Folders of ComfyUI's own installation that hold FLUX's tokenizers."""

_COMFYUI = {
    "transformer": "flux1-*.safetensors",
    "text_encoder": "clip_l*.safetensors",
    "text_encoder_2": "t5xxl*.safetensors",
    "vae": "ae*.safetensors",
}
_KIND = "the file is of another kind of model"


@dataclass(frozen=True, kw_only=True)
class SingleFiles:
    """Where the parts of a model are.

    Attributes:
        transformer: a .safetensors file with BFL's names or diffusers'; other parts may lie in it too.
        text_encoder: CLIP's file; None: in the transformer's, or the base's.
        text_encoder_2: T5's file; None likewise.
        vae: the VAE's file; None likewise.
        tokenizer: folder of CLIP's tokenizer; None: the base's.
        tokenizer_2: folder of T5's tokenizer; None: the base's.
        base: the model that has the rest, see `locate`.
    """

    transformer: Path
    text_encoder: Path | None = None
    text_encoder_2: Path | None = None
    vae: Path | None = None
    tokenizer: Path | None = None
    tokenizer_2: Path | None = None
    base: str | None = None

    def __str__(self) -> str:
        return str(self.transformer)

    def holder(self, part: str) -> TensorFile | None:
        """The file that holds a part, None where it is the base's."""
        if own := getattr(self, part):
            return TensorFile(own, part)
        inside = TensorFile(self.transformer, part)
        return inside if inside.prefix else None


def find_comfyui(folder: Path, *, transformer: Path | None = None, base: str | None = None) -> SingleFiles:
    """A model of the files below a ComfyUI folder: `flux1-*`, `clip_l*`, `t5xxl*` and `ae*`, and its tokenizers.

    Of several text encoders or VAEs the largest file is taken, which is the least rounded one, and named.

    Args:
        folder: of ComfyUI, of its models, or with the files themselves.
        transformer: None: the one `flux1-*` there.
        base: see `SingleFiles`.

    Raises:
        ModelError: no such folder, or not exactly one `flux1-*` and none named.
    """
    if not folder.is_dir():
        raise ModelError(
            "no such folder", where=folder, hint=did_you_mean(folder, "name ComfyUI's folder, or its models")
        )
    found: dict[str, Path] = {}
    for part, pattern in _COMFYUI.items():
        files = sorted(file for file in folder.rglob(pattern) if file.is_file())
        if part == "vae":  # ae, ae_bf16, ae-flux: not aesthetic-…
            files = [file for file in files if not file.name[2].isalpha()]
        if part == "transformer" and transformer is None and len(files) != 1:
            named = ", ".join(file.name for file in files[:3]) or "none"
            hint = OptionHint("name the transformer with `model` FILE")
            raise ModelError(f"{len(files)} files are called flux1-*.safetensors ({named})", where=folder, hint=hint)
        if files:
            found[part] = max(files, key=lambda file: file.stat().st_size)
        if len(files) > 1 and part != "transformer":
            logger.warning("%s is taken for the %s: the largest of %d", found[part], part, len(files))
    for part, name in TOKENIZERS.items():
        if folders := sorted(one for one in folder.rglob(name) if one.is_dir()):
            found[part] = folders[0]
    return SingleFiles(**{**found, "transformer": transformer or found["transformer"]}, base=base)


def transformer_config(file: TensorFile, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration of the transformer in a file: as its own metadata say, else by its shapes.

    Args:
        file: of the transformer.
        base: the base's configuration, for what no shape tells.

    Raises:
        ModelError: not a FLUX.1 transformer.
    """
    if own := file.metadata.get("transformer_config"):
        with _built(file.path):
            return _told_config(own, file)
    file.check_formats()
    try:
        config = config_of(_shapes(file))
    except ModelError as error:
        raise ModelError(f"not a FLUX.1 transformer: {error.what}", where=file.path, hint=error.hint) from None
    rope = (base or {}).get("axes_dims_rope")
    if "axes_dims_rope" not in config and (rope is None or sum(rope) != config["attention_head_dim"]):
        hint = OptionHint("name with `base` the model that it was made from")
        raise ModelError("no size in it tells how positions are encoded", where=file.path, hint=hint)
    return {"axes_dims_rope": rope} | config


def load_transformer(
    file: TensorFile,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    quantise: bool = False,
    device: torch.device | str = "cpu",
    waiting: tuple[str, ...] = (),
) -> FluxTransformer2DModel:
    """The transformer in a file, frozen and in evaluation mode; dense tensors on the CPU stay mapped.

    Args:
        file: of the transformer.
        config: see `transformer_config`.
        dtype: of what is not int8; None: the file's main one, see `TensorFile.dtype`.
        quantise: in int8, tensor by tensor.
        device: where to.
        waiting: first parts of names that go back to RAM, once they were quantised on the device.

    Raises:
        ModelError: a tensor is missing, left over, or of another shape.
    """
    with _built(file.path), torch.device("meta"):
        empty = FluxTransformer2DModel.from_config(dict(config))
    empty.register_to_config(_name_or_path=str(file.path))  # as diffusers does, for errors
    wanted, dtype = empty.state_dict(), dtype or file.dtype
    int8 = set(quantise_model(empty)) if quantise else set()
    for name, tensor in _tensors(file, rows_of(file), wanted):
        layer, _, attribute = name.rpartition(".")
        tensor = tensor.to(device)
        if layer in int8 and attribute == "weight":
            q, scale = quantise_weight(tensor, name)
            found = {name: q, f"{layer}.scale": scale}
        else:
            found = {name: tensor.to(dtype)}
        for part, value in found.items():
            _place(empty, part, value.cpu() if name.startswith(waiting) else value)
    assert not int8 or int8 == set(int8_layers(empty))
    return empty.requires_grad_(False).eval()


def load_vae(
    file: TensorFile,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> AutoencoderKL:
    """The VAE in a file with BFL's names or diffusers', frozen and in evaluation mode; errors as `load_transformer`."""
    with _built(file.path), torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config))
    wanted = vae.state_dict()
    own = any(".down_blocks." in name for name in file.shapes)
    rows = [] if own else vae_rows(len(vae.config.block_out_channels), vae.config.layers_per_block)
    return cast(AutoencoderKL, _filled(vae, _tensors(file, rows, wanted), dtype or file.dtype, device))


def load_text_encoder(
    file: TensorFile,
    part: str,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    as_stored: bool = False,
) -> CLIPTextModel | T5EncoderModel:
    """CLIP (`text_encoder`) or T5 (`text_encoder_2`) in a file with transformers' names.

    Args:
        file: of the encoder.
        part: which.
        config: see `file_config`.
        dtype: of all but what `kept.dtype_of` keeps in fp32; None: the file's main one.
        device: where to.
        as_stored: each tensor in the dtype that it has in the file, for whoever converts it before it computes.

    Raises:
        ModelError: see `load_transformer`.
    """
    with _built(file.path), init_empty_weights(include_buffers=False):
        model: Any = (
            CLIPTextModel(CLIPTextConfig(**config)) if part == "text_encoder" else T5EncoderModel(T5Config(**config))
        )
    tied = set(model.all_tied_weights_keys)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    model = _filled(model, _tensors(file, [], wanted), None if as_stored else dtype or file.dtype, device)
    model.tie_weights()
    return model


def file_config(file: TensorFile, part: str) -> dict[str, Any]:
    """The configuration of the VAE or a text encoder in a file: as its own metadata say, else FLUX.1's."""
    with _built(file.path):
        text = file.metadata.get(f"{part}_config") or (CONFIGS / f"{part}.json").read_text(encoding="utf-8")
        return _told_config(text, file)


def _told_config(text: str, file: TensorFile) -> dict[str, Any]:
    config = {str(key): value for key, value in plainjson.parse(text).items()}
    check_layers(config, file.path, max(1, len(file.shapes)))
    return config


def _filled(
    model: Any, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None, device: torch.device | str
) -> Any:
    for name, tensor in tensors:
        tensor = tensor.to(device)
        _place(model, name, tensor if dtype is None else tensor.to(dtype_of(model, name, dtype)))
    for name, buffer in list(model.named_buffers()):  # those that no file holds
        _place(model, name, buffer.to(device))
    return model.requires_grad_(False).eval()


def _place(root: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = root.get_submodule(path)
    is_parameter = attribute in module._parameters
    setattr(module, attribute, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def rows_of(file: TensorFile) -> list[Row]:
    """The names of the transformer in a file with BFL's names; none if it has diffusers'."""
    if any(name.startswith("transformer_blocks.") for name in file.shapes):
        return []
    double, single = (count_blocks(file.shapes, kind) for kind in BFL_BLOCKS)
    return transformer_rows(double, single, guidance="guidance_in.in_layer.weight" in file.shapes)


def _shapes(file: TensorFile) -> dict[str, tuple[int, ...]]:
    """Shapes under diffusers' names, of the layers that both have alike."""
    rows = rows_of(file)
    alike = {row.bfl: row.parts[0] for row in rows if len(row.parts) == 1}
    return {alike.get(name, name): shape for name, shape in file.shapes.items()} if rows else file.shapes


def _tensors(file: TensorFile, rows: Sequence[Row], wanted: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    file.check_formats()
    same = [Row(name, (name,)) for name in wanted]
    try:
        yield from renamed(rows or same, wanted, file.read, list(file.shapes))
    except ModelError as error:
        raise ModelError(error.what, where=file.path, hint=error.hint or _KIND) from None


@contextlib.contextmanager
def _built(where: Path) -> Iterator[None]:
    """Whatever a library says of a configuration, on one line."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ModelError(f"its configuration builds no model ({first})", where=where, hint=_KIND) from error
