"""Names of the parts of a FLUX model in other programs: tables, read both ways.

Black Forest Labs' own names ("BFL") are also ComfyUI's and kohya's. A BFL layer may hold several of diffusers' layers,
one below another in its rows: that is how q, k and v are fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from libreflux.errors import ModelError

BFL_BLOCKS = ("double_blocks", "single_blocks")
OWN_BLOCKS = ("transformer_blocks", "single_transformer_blocks")


@dataclass(frozen=True)
class Row:
    """One BFL name and what diffusers calls it.

    Attributes:
        bfl: BFL's name, of a layer or of a tensor.
        parts: diffusers' names, whose rows follow one another in BFL's.
        swapped: the two halves of its rows are exchanged (shift, scale in BFL; scale, shift in diffusers).
        pointwise: a 1 x 1 convolution in BFL, a linear in diffusers.
    """

    bfl: str
    parts: tuple[str, ...]
    swapped: bool = False
    pointwise: bool = False

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """BFL's tensor of diffusers' ones."""
        whole = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        whole = swap_halves(whole) if self.swapped else whole
        return whole[..., None, None] if self.pointwise and whole.ndim == 2 else whole

    def split(self, tensor: Tensor, heights: Sequence[int]) -> list[Tensor]:
        """Diffusers' tensors of BFL's, with these numbers of rows; views where nothing is swapped."""
        if self.pointwise and tensor.ndim == 4:
            tensor = tensor[..., 0, 0]
        return list((swap_halves(tensor) if self.swapped else tensor).split(list(heights)))


def swap_halves(tensor: Tensor) -> Tensor:
    """The second half of the rows before the first; its own inverse."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


_EMBEDDERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
}
_GUIDANCE = {
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}
_DOUBLE: dict[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE: dict[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_LAST = (
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
    Row("final_layer.linear", ("proj_out",)),
)


def layer_rows(double: int, single: int, *, guidance: bool) -> list[Row]:
    """Every linear layer of a FLUX transformer.

    Args:
        double: number of double blocks.
        single: number of single blocks.
        guidance: it has the guidance embedding.
    """
    rows = [Row(bfl, (own,)) for bfl, own in (_EMBEDDERS | (_GUIDANCE if guidance else {})).items()]
    counts, tables = (double, single), (_DOUBLE, _SINGLE)
    for blocks, own_blocks, count, table in zip(BFL_BLOCKS, OWN_BLOCKS, counts, tables, strict=True):
        for index in range(count):
            rows += [
                Row(f"{blocks}.{index}.{bfl}", tuple(f"{own_blocks}.{index}.{part}" for part in parts))
                for bfl, parts in table.items()
            ]
    return [*rows, *_LAST]


def transformer_rows(double: int, single: int, *, guidance: bool) -> list[Row]:
    """Every tensor of a FLUX transformer; arguments as of `layer_rows`."""
    rows = [
        Row(f"{row.bfl}.{kind}", tuple(f"{part}.{kind}" for part in row.parts), row.swapped)
        for row in layer_rows(double, single, guidance=guidance)
        for kind in ("weight", "bias")
    ]
    counts, tables = (double, single), (_DOUBLE_NORMS, _SINGLE_NORMS)
    for blocks, own_blocks, count, table in zip(BFL_BLOCKS, OWN_BLOCKS, counts, tables, strict=True):
        rows += [
            Row(f"{blocks}.{index}.{bfl}.scale", (f"{own_blocks}.{index}.{own}.weight",))
            for index in range(count)
            for bfl, own in table.items()
        ]
    return rows


_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def vae_rows(levels: int, layers: int, *, attention: bool = True) -> list[Row]:
    """Every tensor that a FLUX VAE may have; a ResNet block has a shortcut only where it changes its width.

    Args:
        levels: resolutions, `len(block_out_channels)`.
        layers: ResNet blocks at each of the encoder's, `layers_per_block`; the decoder has one more.
        attention: there is attention in the middle.
    """
    names: dict[str, str] = {}
    for side, blocks, own_blocks, count in (
        ("encoder", "down", "down_blocks", layers),
        ("decoder", "up", "up_blocks", layers + 1),
    ):
        names |= {f"{side}.{one}": f"{side}.{one}" for one in ("conv_in", "conv_out")}
        names[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        resnets = {f"{side}.mid.block_{n + 1}": f"{side}.mid_block.resnets.{n}" for n in range(2)}
        for level in range(levels):
            here = level if side == "encoder" else levels - 1 - level  # BFL counts both from the picture
            block, own = f"{side}.{blocks}.{here}", f"{side}.{own_blocks}.{level}"
            resnets |= {f"{block}.block.{n}": f"{own}.resnets.{n}" for n in range(count)}
            names[f"{block}.{blocks}sample.conv"] = f"{own}.{blocks}samplers.0.conv"
        for block, own in resnets.items():
            names |= {f"{block}.{one}": f"{own}.{one}" for one in ("norm1", "conv1", "norm2", "conv2")}
            names[f"{block}.nin_shortcut"] = f"{own}.conv_shortcut"
        if attention:
            own = f"{side}.mid_block.attentions.0"
            names |= {f"{side}.mid.attn_1.{bfl}": f"{own}.{name}" for bfl, name in _ATTENTION.items()}
    return [
        Row(f"{bfl}.{kind}", (f"{own}.{kind}",), pointwise=".attn_1." in bfl and "norm" not in bfl)
        for bfl, own in names.items()
        for kind in ("weight", "bias")
    ]


def config_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, object]:
    """The configuration of diffusers' FluxTransformer2DModel that tensors of these shapes belong to.

    Args:
        shapes: diffusers' tensor name -> shape.

    Returns:
        All but `axes_dims_rope`, which no shape tells: 16, 56 and 56 where heads are 128 wide, else absent.

    Raises:
        ModelError: a tensor that every FLUX.1 transformer has is not there.
    """

    def shape(name: str, dimensions: int = 2) -> Sequence[int]:
        if len(shapes.get(name, ())) != dimensions:
            raise ModelError(f"{name} is missing", hint="use a FLUX.1 transformer, with BFL's names or diffusers'")
        return shapes[name]

    [head] = shape("transformer_blocks.0.attn.norm_q.weight", 1)
    width, channels = shape("x_embedder.weight")
    out = shape("proj_out.weight")[0]
    config: dict[str, object] = {
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": count_blocks(shapes, OWN_BLOCKS[0]),
        "num_single_layers": count_blocks(shapes, OWN_BLOCKS[1]),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shape("context_embedder.weight")[1],
        "pooled_projection_dim": shape("time_text_embed.text_embedder.linear_1.weight")[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }
    return config | ({"axes_dims_rope": (16, 56, 56)} if head == 128 else {})


def count_blocks(names: Iterable[str], kind: str) -> int:
    """How many blocks of a kind ("double_blocks", "transformer_blocks", ...) there are among tensor names."""
    return len({name.split(".")[1] for name in names if name.startswith(f"{kind}.")})


def renamed(
    rows: Sequence[Row], wanted: Mapping[str, Tensor], read: Callable[[str], Tensor], stored: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """Diffusers' tensors of a file with BFL's names, one after another.

    Args:
        rows: of tensors.
        wanted: diffusers name -> tensor of the right shape, on the meta device.
        read: BFL name -> tensor.
        stored: the BFL names that there are.

    Raises:
        ModelError: a tensor is missing, left over, or of another shape.
    """
    used = [row for row in rows if row.parts[0] in wanted]
    _refuse("missing keys", {row.bfl for row in used} - set(stored))
    _refuse("unexpected keys", set(stored) - {row.bfl for row in used})
    _refuse("no name for", set(wanted) - {part for row in used for part in row.parts})
    for row in used:
        tensor = read(row.bfl)
        heights = [wanted[part].shape[0] for part in row.parts]
        if tensor.ndim == 0 or tensor.shape[0] != sum(heights):
            raise ModelError(f"{row.bfl} has shape {tuple(tensor.shape)}, not {sum(heights)} rows")
        for part, piece in zip(row.parts, row.split(tensor, heights), strict=True):
            if piece.shape != wanted[part].shape:
                raise ModelError(f"{row.bfl} has shape {tuple(tensor.shape)}, {part} is {tuple(wanted[part].shape)}")
            yield part, piece


def _refuse(what: str, names: set[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ModelError(f"{what}: {min(names)}{more}", hint="the file is of another kind of model")
