"""Models that are loaded by several threads at once: the libraries change torch for the process while they load."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from libreflux.model.opening import open_model


def test_threads_load_at_the_same_time(tiny_model_dir: Path) -> None:
    before = nn.Module.register_parameter, nn.Module.__init__, torch.get_default_dtype(), nn.init.normal_
    source = open_model(tiny_model_dir)
    ways = (source.load_text, source.load_transformer, source.load_vae) * 4
    with ThreadPoolExecutor(6) as pool:
        done = [pool.submit(way) for way in ways]
    assert [one.exception() for one in done] == [None] * len(ways)
    assert before == (nn.Module.register_parameter, nn.Module.__init__, torch.get_default_dtype(), nn.init.normal_)
    assert torch.equal(done[1].result().proj_out.weight, done[4].result().proj_out.weight)
