"""How many blocks of a transformer wait in RAM while pictures are drawn: as asked, or as few as the card asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from libreflux.model import offload
from libreflux.model.int8 import int8_layers, quantise_model
from libreflux.printing import counted, get_logger
from libreflux.sample.metadata import GenerationRecord
from libreflux.training import trace
from libreflux.training.memory_plan import free_memory
from libreflux.training.phases import CARD_RESERVE, libraries
from libreflux.values import is_guided
from libreflux.workflows.picture_options import OffloadBlocks

log = get_logger(__name__)


def let_wait(
    transformer: FluxTransformer2DModel,
    asked: OffloadBlocks,
    vae: AutoencoderKL,
    records: Sequence[GenerationRecord],
    tokens: int,
    device: torch.device,
) -> int:
    """Brings a transformer to the device, but for the blocks that wait, and returns how many those are.

    Args:
        transformer: on the CPU, with its adapters.
        asked: how many; "auto": as few as the device's free memory asks for, on a CPU none.
        vae: on the device.
        records: the pictures.
        tokens: of the longest text.
        device: what computes.
    """
    count = _fewest(transformer, vae, records, tokens, device) if asked == "auto" else asked
    if count:
        offload.BlockOffload(transformer, count, device)
    else:
        transformer.to(device)
    return count


def _fewest(
    transformer: FluxTransformer2DModel,
    vae: AutoencoderKL,
    records: Sequence[GenerationRecord],
    tokens: int,
    device: torch.device,
) -> int:
    if device.type not in offload.DEVICES:
        return 0
    blocks = [offload.frozen_sizes(block) for block in offload.blocks_of(transformer)]
    held, free = trace.weights_of(transformer), free_memory(device)
    computing = activations(transformer, vae, records, tokens)

    def fits(count: int) -> bool:
        needed = held - offload.saved_bytes(blocks, count) + computing + libraries(False, computing)
        return CARD_RESERVE * needed <= free

    count = offload.fewest(len(blocks), fits)
    log.info("%s of %s wait in RAM", count, counted(len(blocks), "block"))
    return count


def activations(
    transformer: FluxTransformer2DModel, vae: AutoencoderKL, records: Sequence[GenerationRecord], tokens: int
) -> int:
    """Peak bytes beside the weights while the largest of these pictures is drawn, adapters' own left out."""
    empty = trace.meta_transformer(dict(transformer.config), transformer.dtype)
    if int8_layers(transformer):
        quantise_model(empty)
    largest = max(records, key=lambda record: record.width * record.height)
    two = any(record.nag or (is_guided(record.scale) and record.batch_cfg is not False) for record in records)
    size = (largest.height // 8, largest.width // 8)
    guidance = 1.0 if transformer.config.guidance_embeds else None
    batch = max(record.batch for record in records)
    passed = trace.trace_pass(empty, batch * (1 + two), size, tokens, guidance, backward=False)
    side = max(max(record.width, record.height) for record in records)
    return max(passed, batch * trace.trace_decode(trace.meta_vae(dict(vae.config)), side))
