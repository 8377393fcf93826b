"""One pass of an adapted emoji model on the card and on the CPU: velocity, loss and the adapter's gradients."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from gpu.alone import DEVICE
from libreflux.adapter import plan
from libreflux.adapter.adapter import Adapter
from libreflux.model.attention import check_gradients, lengths_to_check
from libreflux.model.compiling import CompiledBlocks
from libreflux.model.latents import image_ids, pack
from libreflux.model.numerics import pinned
from libreflux.model.offload import BlockOffload, blocks_of
from libreflux.model.opening import open_model
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from libreflux.recipe import AdapterSpec
from libreflux.training.objective import NoisedBatch, flow_matching_loss

LENGTHS = {"alike": (7, 7), "masked": (12, 7)}  # tokens of the prompts; a batch of one length has no mask
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
SIDE = 16  # of the latents
SPEC: dict[str, Any] = {
    "kind": "lokr",
    "init": "perturbed",
    "targets": [{"layers": "**.attn.**", "factor": 4}, {"layers": "**.proj_*", "factor": 4}],
}


class Adapted:
    """emoji-schnell with a LoKr on a device: the same numbers on every device."""

    def __init__(self, precision: str, device: str) -> None:
        dtype, quantise = PRECISIONS[precision], precision == "int8"
        self.net = open_model("emoji-schnell").load_transformer(dtype=dtype, device=device, quantise=quantise)
        self.device, spec = device, AdapterSpec.model_validate(SPEC)
        layers = plan.plan(spec, self.net).layers
        self.adapter: Adapter = plan.build(spec, self.net, layers, dtype=torch.float32, seed=0)

    def passed(self, lengths: tuple[int, ...], checkpointing: bool) -> dict[str, Tensor]:
        """Velocity, loss and flat gradient of one batch, all fp32 on the CPU."""
        config, made = self.net.config, torch.Generator().manual_seed(1)
        tokens = [torch.randn(length, config.joint_attention_dim, generator=made) for length in lengths]
        text = TextConditioning(tokens, torch.randn(len(lengths), config.pooled_projection_dim, generator=made))
        latents = torch.randn(len(lengths), config.in_channels // 4, SIDE, SIDE, generator=made)
        noise, sigma = torch.randn(latents.shape, generator=made), torch.rand(len(lengths), generator=made)
        text = text.to(self.device)
        latents, noise, sigma = (each.to(self.device) for each in (latents, noise, sigma))
        (self.net.enable_gradient_checkpointing if checkpointing else self.net.disable_gradient_checkpointing)()
        with torch.no_grad():
            ids = image_ids(SIDE, SIDE, device=latents.device)
            drawn = velocity(self.net.eval(), pack(latents), sigma, text, ids)
        with pinned(self.device):  # as a training run is, its backward pass too
            losses = flow_matching_loss(self.net.train(), NoisedBatch(latents, noise, sigma, text))
            gradient = torch.autograd.grad(losses.mean(), list(self.adapter.parameters()))
        found = {
            "velocity": drawn,
            "loss": losses.detach(),
            "gradient": torch.cat([each.flatten() for each in gradient]),
        }
        return {name: tensor.float().cpu() for name, tensor in found.items()}


def compare(precision: str) -> dict[str, dict[str, float]]:
    """Relative errors of the card against the CPU, in norm, by what the batch is; also the CPU's gradient norm."""
    ours, reference = Adapted(precision, DEVICE), Adapted(precision, "cpu")
    ours.adapter.load_state_dict(reference.adapter.state_dict())  # a card draws first values of its own
    found = {}
    for (kind, lengths), checkpointing in itertools.product(LENGTHS.items(), (False, True)):
        name = f"{kind}{', checkpointing' if checkpointing else ''}"
        print(precision, name, flush=True)  # who crashes is named by the end of the log
        there, here = ours.passed(lengths, checkpointing), reference.passed(lengths, checkpointing)
        errors = {key: float((there[key] - here[key]).norm() / here[key].norm()) for key in here}
        found[name] = {**errors, "norm": float(here["gradient"].norm())}
        print(found[name], flush=True)
    return found


def offloaded(precision: str) -> dict[str, dict[str, float]]:
    """Relative errors, in norm, of passes on the card with all blocks waiting in RAM against passes without.

    Each twice: the second one finds copies of the first one's memory.
    """
    plain, waiting = Adapted(precision, DEVICE), Adapted(precision, DEVICE)
    BlockOffload(waiting.net, len(blocks_of(waiting.net)), DEVICE)
    found = {}
    for (kind, lengths), again in itertools.product(LENGTHS.items(), (False, True)):
        one, other = waiting.passed(lengths, checkpointing=True), plain.passed(lengths, checkpointing=True)
        errors = {key: float((one[key] - other[key]).norm() / other[key].norm()) for key in one}
        found[f"{kind}{', again' if again else ''}"] = {**errors, "norm": float(other["gradient"].norm())}
    homes = {tensor.device.type for block in blocks_of(waiting.net) for tensor in block.buffers()}
    assert homes <= {"cpu"}
    return found


def compiled(precision: str) -> dict[str, Any]:
    """Relative errors, in norm, of compiled blocks against plain ones on the card; graphs, kinds, seconds."""
    net, lengths = Adapted(precision, DEVICE), [(7, 7), (9, 9), (20, 20)]
    plain = [net.passed(each, checkpointing=True) for each in lengths]
    blocks = CompiledBlocks(net.net)
    errors: dict[str, float] = {}
    for each, wanted in zip(lengths, plain, strict=True):
        found = net.passed(each, checkpointing=True)
        for key, tensor in wanted.items():
            error = float((found[key] - tensor).norm() / tensor.norm())
            errors[key] = max(errors.get(key, 0.0), error)
    return {"errors": errors, "graphs": blocks.graphs, "kinds": blocks.kinds, "seconds": blocks.seconds}


def attention(head_dim: int, dtype: str) -> float:
    """The largest relative error of attention's gradients on the card."""
    lengths = lengths_to_check(65, 1100)
    return check_gradients(head_dim=head_dim, dtype=PRECISIONS[dtype], lengths=lengths, device=DEVICE)


def failed_assertion() -> str:
    """The line of a kernel that failed: an index out of range of an embedding, which CUDA finds while it computes."""
    from libreflux.errors import DeviceError
    from libreflux.model import device_faults

    table = torch.zeros(4, 8, device=DEVICE)
    try:
        with device_faults.explained("reading an embedding", "a smaller table", "start again"):
            torch.nn.functional.embedding(torch.tensor([7], device=DEVICE), table)
            torch.cuda.synchronize()
    except DeviceError as error:
        return str(error)
    raise AssertionError("nothing was raised")
