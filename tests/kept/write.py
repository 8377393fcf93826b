"""Writes every format that libreflux keeps, small, into one archive: what the tests beside this open again.

    PYTHONPATH=<src of a version> python tests/kept/write.py tests/kept/<commit>.tar.xz

The archive of a released version is never written anew: a later format gets an archive of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image

COMMANDS = {
    "train": ["train", "recipe.yaml", "steps=2"],
    "probe": shlex.split(
        "probe emoji-base --data pictures --quick --pictures 2 --prompts 2 --guidance 1 --steps 1,2 --resolution 32 "
        "--out probe"
    ),
    "grid": shlex.split("grid 'a red apple' --model emoji-base --steps 1,2 --width 32 --height 32 --out grid"),
}
RECIPE = """\
model: emoji-base
data: [{path: pictures}]
resolution: 32
adapter: {targets: [{layers: "transformer_blocks.0.attn.to_q", factor: 8}]}
batch: 1
steps: 4
ema: [0.1]
optimizer: {learning_rate: 1e-3}
samples: {every: 2, prompts: [a red apple], guidance: [1]}
save: {every: 2}
cache: cache
out: run
"""
ROWS = 12  # of the input by which an int8 transformer is known


def write_pictures(folder: Path) -> None:
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 60, 200 - 80 * number)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number} of a red apple\n")


def write_int8(folder: Path) -> None:
    from libreflux.model.facts import Facts, write_facts
    from libreflux.model.int8_files import write_int8 as write_tensors
    from libreflux.model.locate import PARTS
    from libreflux.model.opening import open_model

    torch.manual_seed(0)
    size = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 1}
    dense = FluxTransformer2DModel(
        **size, in_channels=64, joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6)
    )
    dense.save_pretrained(folder.parent / "dense" / "transformer")
    for model in (folder, folder.parent / "dense"):
        for part in PARTS:  # empty but for the transformer: a model is looked for by its folders
            (model / part).mkdir(parents=True, exist_ok=True)
        FlowMatchEulerDiscreteScheduler().save_pretrained(model / "scheduler")
        shutil.copy(EMOJI / "model_index.json", model)
        write_facts(model, Facts())
    found = open_model(folder.parent / "dense").load_transformer(quantise=True)
    (folder / "transformer").rmdir()
    write_tensors(folder / "transformer", json.loads(found.to_json_string()), found.state_dict().items())
    (folder / "told.json").write_text(json.dumps({"mean_square": mean_square(found)}))
    shutil.rmtree(folder.parent / "dense")


@torch.no_grad()
def mean_square(transformer: FluxTransformer2DModel) -> float:
    """Of what it says of one made-up input."""
    config = transformer.config
    told = transformer(
        hidden_states=torch.linspace(-1, 1, ROWS * config.in_channels).reshape(1, ROWS, config.in_channels),
        encoder_hidden_states=torch.linspace(-1, 1, 3 * config.joint_attention_dim).reshape(1, 3, -1),
        pooled_projections=torch.linspace(-1, 1, config.pooled_projection_dim)[None],
        timestep=torch.tensor([0.5]),
        img_ids=torch.arange(ROWS * 3).reshape(ROWS, 3) % 5,
        txt_ids=torch.zeros(3, 3),
    )
    return float(told.sample.square().mean())


def main(archive: Path) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_pictures(folder / "pictures")
        (folder / "recipe.yaml").write_text(RECIPE)
        write_int8(folder / "int8")
        for command in COMMANDS.values():
            subprocess.run([sys.executable, "-m", "libreflux", *command], cwd=folder, check=True, env=os.environ)
        with tarfile.open(archive, "w:xz", preset=9) as packed:
            packed.add(folder, ".", filter=_of_nobody)


def _of_nobody(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return None if info.name.endswith((".lock", ".html")) else info


if __name__ == "__main__":
    import libreflux

    EMOJI = Path(libreflux.__file__).parent / "emoji" / "weights" / "emoji-base"
    main(Path(sys.argv[1]).resolve())
