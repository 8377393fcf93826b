"""Blocks that wait in RAM: the same bits, two of them on the device at a time, adapters never away.

A CPU stands in for the card. What a module holds while its block is away is NaN here, so that a use without the copy
shows.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.adapter.adapter import Adapter, attach
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.errors import OptionError
from libreflux.model import offload
from libreflux.model.int8 import quantise_model
from libreflux.model.numerics import enable_checkpointing
from libreflux.model.offload import (
    ALIGNED,
    BlockOffload,
    block_names,
    blocks_of,
    check_count,
    check_device,
    following,
    frozen_sizes,
    saved_bytes,
    spread,
    waiting_bytes,
    waiting_names,
)
from libreflux.model.opening import open_model
from libreflux.model.single_file import SingleFiles

BLOCKS = 5


def poisoned(home: Tensor) -> Tensor:
    return torch.full_like(home, 101 if home.dtype == torch.int8 else torch.nan)


@pytest.fixture(autouse=True)
def away_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "at_rest", poisoned)


class Copies:
    """Which copies are alive, those that autograd alone still holds included."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[int] = []
        self.most = self.live = 0
        own = BlockOffload._fetch

        def fetch(offloaded: BlockOffload, waiting: offload._Waiting) -> list[Tensor]:
            fresh = waiting.copies is None
            copies = own(offloaded, waiting)
            if fresh:
                self.order.append(offloaded._waiting.index(waiting))
                for copy in copies:
                    size = copy.untyped_storage().nbytes()
                    self.live += size
                    weakref.finalize(copy.untyped_storage(), self._freed, size)
                self.most = max(self.most, self.live)
            return copies

        monkeypatch.setattr(BlockOffload, "_fetch", fetch)

    def _freed(self, size: int) -> None:
        self.live -= size


def network(base: str) -> tuple[FluxTransformer2DModel, Adapter]:
    torch.manual_seed(0)
    made = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=BLOCKS - 2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    if base != "fp32":
        made.bfloat16()
    if base == "int8":
        quantise_model(made)
    layers = resolve(linear_shapes(made), [Target(layers="**.attn.**", factor=4), Target(layers="**.norm*.**", rank=2)])
    adapter = attach(made, layers, init="perturbed", scale=0.1)
    return made, adapter


def passed(made: FluxTransformer2DModel) -> Tensor:
    random = torch.Generator().manual_seed(1)
    dtype = made.dtype
    out: Tensor = made(
        hidden_states=torch.randn(1, 6, 16, generator=random).to(dtype),
        encoder_hidden_states=torch.randn(1, 4, 24, generator=random).to(dtype),
        pooled_projections=torch.randn(1, 16, generator=random).to(dtype),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(6, 3),
        txt_ids=torch.zeros(4, 3),
    ).sample
    return out


def gradients(made: FluxTransformer2DModel, adapter: Adapter) -> list[Tensor]:
    passed(made).float().square().sum().backward()
    found = [parameter.grad for parameter in adapter.parameters()]
    for parameter in adapter.parameters():
        parameter.grad = None
    grown = [each for each in found if each is not None]
    assert sum(bool(each.any()) for each in grown) > len(found) / 2
    return grown


@pytest.mark.parametrize("base", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("count", [3, BLOCKS])
def test_passes_and_gradients_have_the_same_bits(base: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, waiting = network(base), network(base)
    for made, _ in (plain, waiting):
        enable_checkpointing(made)
    copies = Copies(monkeypatch)
    BlockOffload(waiting[0], count, "cpu")
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(passed(waiting[0]), passed(plain[0]))
        for one, other in zip(gradients(*waiting), gradients(*plain), strict=True):
            assert torch.equal(one, other)
    sizes = sorted(sum(frozen_sizes(block)) for block in blocks_of(plain[0]))
    assert copies.most <= sizes[-1] + sizes[-2]
    drawn = [*range(count), 0]  # the first one comes again at the end, for the next pass
    trained = [*range(1, count), *reversed(range(count - 1))]  # the last one stays for the turn, the first for the next
    assert copies.order[: count + 1] == drawn
    assert copies.order[count + 1 :] == [*trained, *range(1, count), 0, *trained]


def test_a_use_without_the_copy_shows() -> None:
    """The check of the check: where nothing is fetched, the result is NaN."""
    made, _ = network("int8")
    BlockOffload(made, 3, "cpu")
    for block in blocks_of(made):
        block._forward_pre_hooks.clear()
    assert passed(made).isnan().all()


def test_what_waits_is_frozen_and_adapters_never_move() -> None:
    made, adapter = network("int8")
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in adapter.named_parameters()}
    BlockOffload(made, BLOCKS, "cpu")
    for name, parameter in adapter.named_parameters():
        assert before[name] == (parameter, parameter.data_ptr())
        assert not parameter.isnan().any()
    away = [tensor for block in blocks_of(made) for tensor in frozen(block)]
    assert away
    assert all(bool((tensor == 101).all() if tensor.dtype == torch.int8 else tensor.isnan().all()) for tensor in away)
    rest = [tensor for name, tensor in made.state_dict().items() if "blocks" not in name]
    assert not any(tensor.isnan().any() for tensor in rest)


def frozen(block: nn.Module) -> Iterator[Tensor]:
    yield from (parameter for parameter in block.parameters() if not parameter.requires_grad)
    yield from block.buffers()


def test_all_else_moves_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "at_rest", lambda home: home)
    made, adapter = network("int8")
    numbers = [tensor.clone() for block in blocks_of(made) for tensor in frozen(block)]
    BlockOffload(made, BLOCKS, "meta")
    assert {parameter.device.type for parameter in adapter.parameters()} == {"meta"}
    assert made.device.type == "meta"
    assert made.x_embedder.weight.is_meta
    homes = [tensor for block in blocks_of(made) for tensor in frozen(block)]
    assert all(torch.equal(one, other) for one, other in zip(homes, numbers, strict=True))
    assert len({home.untyped_storage().data_ptr() for home in homes}) == 1  # they share one piece of memory


class Stream:
    """A CUDA stream's calls, written down."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.events += 1
        self.log.append(f"copy {self.events}")
        return f"copy {self.events}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


def test_copies_run_beside_the_computation_and_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA's streams: each side waits for the other one exactly where it must."""
    log: list[str] = []
    computing, copying = Stream("computing", log), Stream("copying", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: computing)

    def on(stream: Stream) -> contextlib.nullcontext[None]:
        log.append(f"on {stream.name}")
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "stream", on)
    made, _ = network("int8")
    waiting = BlockOffload(made, 3, "cpu")
    waiting._side = copying  # type: ignore[assignment]
    for index, block in enumerate(blocks_of(made)):
        block.register_forward_hook(lambda *_, index=index: log.append(f"block {index}"))
    with torch.no_grad():
        passed(made)

    def fetched(number: int) -> list[str]:
        return ["copying waits for computing", "on copying", f"copy {number}"]

    expected = [*fetched(1), "computing waits for copy 1", *fetched(2), "block 0", "block 1"]
    expected += ["computing waits for copy 2", *fetched(3), "block 2", "block 3"]
    expected += ["computing waits for copy 3", *fetched(4), "block 4"]
    assert log == expected
    waiting.release()  # of a copy under way the memory is given back after it
    assert log[len(expected) :] == ["computing waits for copy 4"]


def test_nothing_is_kept_of_an_interrupted_pass() -> None:
    """An error inside a block leaves it away, and the next pass is right."""
    plain, (made, _) = network("fp32"), network("fp32")
    waiting = BlockOffload(made, BLOCKS, "cpu")
    fails = blocks_of(made)[2].register_forward_hook(lambda *_: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        passed(made)
    assert all(bool(tensor.isnan().all()) for tensor in frozen(blocks_of(made)[2]))
    fails.remove()
    with torch.no_grad():
        assert torch.equal(passed(made), passed(plain[0]))
    assert waiting.present == [0]
    waiting.release()
    assert waiting.present == []


@pytest.mark.parametrize("blocks", [3, 7, 57])
def test_waiting_blocks_are_spread_evenly(blocks: int) -> None:
    for count in range(1, blocks + 1):
        chosen = spread(count, blocks)
        assert len(set(chosen)) == count
        assert set(chosen) <= set(range(blocks))
        gaps = {after - before for before, after in itertools.pairwise(chosen)}
        assert not gaps or max(gaps) - min(gaps) <= 1
    assert spread(blocks, blocks) == list(range(blocks))
    assert spread(0, blocks) == []


def test_saved_bytes_leave_room_for_two_neighbours() -> None:
    sizes = [[10, 1], [20], [7], [30], [2]]
    assert [saved_bytes(sizes, count) for count in (0, 1, 2)] == [0, 0, 0]
    assert spread(3, 5) == [0, 2, 4]
    assert saved_bytes(sizes, 3) == 20 - 18
    assert saved_bytes(sizes, 5) == 70 - 37


def test_pinned_memory_is_counted_as_torch_takes_it() -> None:
    chunk = offload.CHUNK
    assert waiting_bytes([[1]] * 3, 3) == 1024  # 3 × 256, rounded up to a power of two
    assert waiting_bytes([[chunk]] * 3, 3) == 3 * chunk
    assert waiting_bytes([[chunk // 2, chunk // 2 - 5]] * 3, 3) == 3 * chunk
    assert waiting_bytes([[chunk // 2 + ALIGNED]] * 3, 3) == 3 * chunk  # no two of them share a piece
    assert waiting_bytes([[chunk + 1]] * 3, 0) == 0


def test_the_order_is_foreseen_both_ways() -> None:
    visited: list[int] = []
    index, last = 0, None
    for _ in range(12):  # two passes, forward and back, of three
        visited.append(index)
        index, last = following(index, last, 3, gradient=True), index
    assert visited == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0]
    assert [following(index, None, 3, gradient=False) for index in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("stored", ["dense", "single file"])
def test_what_waits_is_quantised_on_the_device_and_comes_back(
    stored: str, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back: list[Tensor] = []
    name: str | SingleFiles = str(tiny_model_dir)
    if stored == "single file":
        name = SingleFiles(
            transformer=next((tiny_model_dir / "transformer").glob("*.safetensors")), base=str(tiny_model_dir)
        )
    source = open_model(name)
    names = waiting_names(source.config, 1)
    plain = source.load_transformer(quantise=True)

    def to_ram(tensor: Tensor) -> Tensor:
        back.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "cpu", to_ram)
    found = source.load_transformer(quantise=True, waiting=names)
    block = found.get_submodule(names[0]).state_dict()
    assert {tensor.data_ptr() for tensor in back} == {tensor.data_ptr() for tensor in block.values()}
    assert any(tensor.dtype == torch.int8 for tensor in back)
    for key, tensor in plain.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor)


def test_dense_weights_stay_mapped_where_blocks_wait(tiny_model_dir: Path) -> None:
    found = open_model(tiny_model_dir).load_transformer(device="meta", waiting=["transformer_blocks.0"])
    assert found.device.type == "cpu"


def test_blocks_have_the_names_that_the_configuration_tells() -> None:
    made, _ = network("fp32")
    names = block_names(made.config)
    assert [made.get_submodule(name) for name in names] == blocks_of(made)
    assert waiting_names(made.config, 3) == [names[index] for index in spread(3, BLOCKS)]
    assert len(block_names({})) == 57  # FLUX.1's


def test_counts_and_devices_of_no_use_are_refused() -> None:
    for count in (0, 3, 57):
        check_count(count, 57)
    with pytest.raises(OptionError, match="58 cannot wait, the model has 57 blocks"):
        check_count(58, 57)
    with pytest.raises(OptionError, match="2 would save nothing"):
        check_count(2, 57)
    check_device("cuda:1")
    with pytest.raises(OptionError, match="of no use on cpu"):
        check_device(torch.device("cpu"))
