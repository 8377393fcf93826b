from __future__ import annotations

import pytest
import torch

from libreflux.data.batches import Batches
from libreflux.data.cache import Cache
from libreflux.data.crops import View
from libreflux.data.order import step_plan
from libreflux.data.sources import Sample
from libreflux.errors import DataError
from libreflux.recipe import DataSource

SQUARE = View("square", 32)
Prepared = tuple[Cache, list[tuple[DataSource, list[Sample]]]]


def test_batches_pair_each_picture_with_its_own_captions(prepared: Prepared) -> None:
    cache, [(source, samples)] = prepared
    dropping = source.model_copy(update={"caption_dropout": 0.5, "repeats": 2})
    batches = Batches(cache, [(dropping, samples)], views=[SQUARE], seed=3)
    assert len(batches) == 7
    known = {sample.id: sample for sample in samples}
    crops: dict[str, list[int]] = {sample.id: [] for sample in samples}
    dropped = 0
    for step in range(8):  # two epochs of four steps, the last one short
        for unit in step_plan(3, step, batches.samples, 1, 2, 2):
            if not unit.items:
                continue
            batch = batches.batch(unit)
            assert len(batch) == len(unit.items) == len(batch.latents) == len(batch.text)
            assert batch.slots == unit.slots
            for index, name in enumerate(batch.sample_ids):
                own = [cache.latents(name, SQUARE.name(crop, "white")) for crop in range(2)]
                [crop] = [number for number, one in enumerate(own) if torch.equal(one, batch.latents[index])]
                crops[name].append(crop)
                caption = batch.captions[index]
                assert caption in ("", *known[name].captions)
                assert torch.equal(batch.text.tokens[index], cache.text([caption]).tokens[0])
                assert torch.equal(batch.text.pooled[index], cache.text([caption]).pooled[0])
                dropped += caption == ""
    assert {tuple(sorted(seen)) for seen in crops.values()} == {(0, 0, 1, 1)}  # every crop as often as the other
    assert 4 <= dropped <= 24  # of 28, half expected; outside is less likely than 1 in 10,000


def test_a_batch_is_a_function_of_its_unit_alone(prepared: Prepared) -> None:
    cache, sources = prepared
    one, two = (Batches(Cache(cache.folder), sources, views=[SQUARE], seed=0) for _ in range(2))
    units = [unit for step in range(6) for unit in step_plan(0, step, one.samples, 1, 3, 1)]
    forward = [one.batch(unit) for unit in units]
    backward = [two.batch(unit) for unit in reversed(units)][::-1]
    for first, second in zip(forward, backward, strict=True):
        assert first.captions == second.captions
        assert torch.equal(first.latents, second.latents)
    other = Batches(cache, sources, views=[SQUARE], seed=1)
    assert [other.batch(unit).captions for unit in units] != [batch.captions for batch in forward]
    assert one.fingerprint() == two.fingerprint()


def test_batches_refuse_what_was_not_prepared(prepared: Prepared) -> None:
    cache, [(source, samples)] = prepared
    with pytest.raises(DataError, match=r"\.png: not in the cache; hint: run `libreflux prepare`"):
        Batches(cache, [(source, samples)], views=[View("square", 64)], seed=0)
    stranger = Sample(samples[0].id, samples[0].file, ("never said",), ("",))
    with pytest.raises(DataError, match="a caption of it is not in the cache"):
        Batches(cache, [(source, [stranger])], views=[SQUARE], seed=0)


def test_weights_that_show_next_to_nothing_are_refused(prepared: Prepared) -> None:
    cache, [(source, samples)] = prepared
    rare = source.model_copy(update={"weight": 1e-7})
    with pytest.raises(DataError, match=r"data\.weight: an epoch shows 7e-07 pictures on average; hint: raise"):
        Batches(cache, [(rare, samples)], views=[SQUARE], seed=0)
    beside = Batches(cache, [(rare, samples), (source, samples)], views=[SQUARE], seed=0)
    assert {
        item for step in range(4) for unit in step_plan(0, step, beside.samples, 1, 3, 1) for item in unit.items
    } <= {*range(7, 14)}
