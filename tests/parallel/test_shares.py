"""Shares of a batch together give the same clips, draws and update as the batch, in one process or several."""

import pytest
import torch
from helpers import KEPT, PRUNED, batches, config, crop, small_wan

from fastlightgen.data.source import CacheSource
from fastlightgen.engine.local import LocalEngine
from fastlightgen.rng import generator, normal_like, rand, randn, rows, share
from fastlightgen.stages.prune import Prune
from fastlightgen.world.source import ShapesSource


@pytest.mark.parametrize("draw", [rand, randn, lambda n, gen: normal_like(torch.empty(n, 2, 3), gen)])
def test_the_shares_of_a_draw_are_the_draw(draw):
    parts = []
    for index in range(3):
        with share(index, 3):
            parts.append(draw(2, generator(1, 2)))
    assert torch.equal(torch.cat(parts), draw(6, generator(1, 2)))


def test_every_clip_belongs_to_one_share():
    seen = []
    for index in range(4):
        with share(index, 4):
            seen += rows(12)
    assert seen == list(range(12)) == list(rows(12))


def test_the_clips_of_a_share_are_those_of_the_batch():
    source = ShapesSource(3)
    whole, part = source.batch(5, 6), source.batch(5, 6, range(2, 4))
    assert torch.equal(part.x0, whole.x0[2:4]) and torch.equal(part.cond.text, whole.cond.text[2:4])


def test_the_clips_of_a_share_from_a_cache():
    """A cache whose reader returns the clips' numbers; 11 clips train, in a seeded order."""
    source = CacheSource.__new__(CacheSource)
    source.seed, source.groups, source._read = 0, [list(range(11))], list
    whole = source.batch(3, 4)
    assert len(set(whole)) == 4 and source.batch(3, 4, range(1, 3)) == whole[1:3]


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_of_one_process_take_the_whole_batch_s_step(micro_batch):
    """In float64 only the order of a sum of four differs; 1e-12 is several thousand roundings."""

    def run(micro: int):
        source = ShapesSource(0)

        def batch(step: int):
            b = crop(source.batch(step, 4, rows(4)))
            b.x0 = b.x0.double()
            return b

        cfg = config(2, "batch=4", "warmup=0", "lr=1e-3", "text_dropout=0.5")
        stage = Prune(cfg, small_wan().double(), PRUNED, batch, lambda: batches(2, torch.float64)(9), {})
        engine = LocalEngine(torch.device("cpu"), "float32", 4, micro)
        engine.prepare(stage)
        records = [engine.apply(update, step) for step in range(3) for update in stage.updates(step)]
        return records, stage.net.state_dict()

    (whole, w), (parts, p) = run(0), run(micro_batch)
    for a, b in zip(whole, parts, strict=True):
        assert b == pytest.approx(a, rel=1e-9)
    assert KEPT and all(torch.allclose(p[k], w[k], rtol=1e-9, atol=1e-12) for k in w)
