"""Write a model as single .safetensors files with the names that Black Forest Labs and ComfyUI give."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor

from libreflux.errors import ModelError
from libreflux.files import staged_dir
from libreflux.model.facts import Facts
from libreflux.model.finite import each_finite, name_of
from libreflux.model.int8 import int8_layers
from libreflux.model.keys import OWN_BLOCKS, Row, count_blocks, transformer_rows, vae_rows
from libreflux.model.single_file import FACTS_KEY, TOKENIZERS
from libreflux.model.stream import stream_safetensors
from libreflux.model.text import TextEncoders


def save_files(
    out: Path,
    name: str,
    facts: Facts,
    transformer: FluxTransformer2DModel,
    vae: AutoencoderKL,
    text: TextEncoders,
    extras: Mapping[str, str] | None = None,
) -> list[str]:
    """Write a model as a folder that ComfyUI finds its parts in and `find_comfyui` reads.

    `flux1-<name>`, `clip_l`, `t5xxl` and `ae`, each a .safetensors with its configuration in the metadata, and the
    tokenizers. The folder appears complete or not at all; tensors are written one by one.

    Args:
        out: the folder.
        name: of the model, see `transformer_file`.
        facts: the model's.
        transformer, vae, text: its parts, in floating point.
        extras: further files, name -> text.

    Returns:
        Names of the files, in order.

    Raises:
        ModelError: the transformer is int8.
        RunError: `out` exists.
    """
    with staged_dir(Path(out)) as staging:
        for file, content in (extras or {}).items():
            (staging / file).write_text(content, encoding="utf-8")
        save_transformer(transformer, facts, staging / transformer_file(name))
        rows = vae_rows(len(vae.config.block_out_channels), vae.config.layers_per_block)
        _write(staging / "ae.safetensors", rows, vae.state_dict(), _config("vae", vae))
        clip = {f"text_model.{key}": tensor for key, tensor in text.text_encoder.state_dict().items()}
        _write(staging / "clip_l.safetensors", _same(clip), clip, _config("text_encoder", text.text_encoder))
        t5 = text.text_encoder_2
        tied = set(t5.all_tied_weights_keys)
        kept = {key: tensor for key, tensor in t5.state_dict().items() if key not in tied}
        _write(staging / "t5xxl.safetensors", _same(kept), kept, _config("text_encoder_2", t5))
        for part, folder in TOKENIZERS.items():
            getattr(text, part).save_pretrained(staging / folder)
        return sorted(path.name for path in staging.glob("*.safetensors"))


def transformer_file(name: str) -> str:
    """The name of a transformer's file: flux1-<last part of the model's name>.safetensors."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].removesuffix(".safetensors")
    return f"flux1-{re.sub(r'[^A-Za-z0-9._-]+', '-', last).removeprefix('flux1-') or 'model'}.safetensors"


def save_transformer(transformer: FluxTransformer2DModel, facts: Facts, path: Path) -> None:
    """Write a transformer as one file with BFL's names, atomically.

    Its metadata carry the configuration and the facts, so that `open_model` needs no guess.

    Raises:
        ModelError: it is int8.
    """
    if int8_layers(transformer):
        hint = "load it with quantise=False"
        raise ModelError("has no transformer in floating point", where=name_of(transformer), hint=hint)
    state = transformer.state_dict()
    double, single = (count_blocks(state, kind) for kind in OWN_BLOCKS)
    rows = transformer_rows(double, single, guidance=bool(transformer.config.guidance_embeds))
    told = {name: value for name, value in dataclasses.asdict(facts).items() if name != "parts_from"}
    metadata = _config("transformer", transformer) | {FACTS_KEY: json.dumps(told, sort_keys=True)}
    _write(path, rows, state, metadata)


def _write(path: Path, rows: Sequence[Row], state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    used = [row for row in rows if row.parts[0] in state]
    if left := set(state) - {part for row in used for part in row.parts}:
        raise ModelError(f"no name for {min(left)} in files of this kind", where=path)
    layout: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for row in used:
        joined = row.join([state[part].to("meta") for part in row.parts])
        layout[row.bfl] = (joined.dtype, tuple(joined.shape))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for row in used:
            parts = [(part, state[part]) for part in row.parts]
            yield row.bfl, row.join([tensor for _, tensor in each_finite(parts, path.name)])

    stream_safetensors(path, layout, tensors(), {"format": "pt", **metadata})


def _same(state: Mapping[str, Tensor]) -> list[Row]:
    return [Row(name, (name,)) for name in state]


def _config(part: str, module: Any) -> dict[str, str]:
    """A part's configuration as metadata, without the place that it was read from."""
    values = dict(module.config) if part in ("transformer", "vae") else module.config.to_dict()
    kept = {name: value for name, value in values.items() if not name.startswith("_") and value is not None}
    return {f"{part}_config": json.dumps(kept, sort_keys=True, default=str)}
