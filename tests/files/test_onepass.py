"""A tensor is read once: its checksum, its copy, and numbers that are not finite, compiled and with torch."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_tensors import by_hand

from fastlightgen.files import onepass

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LARGEST = {kind: torch.finfo(kind).max for kind in KINDS}


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    """Each test runs with the compiled function and without it."""
    if request.param == "torch":
        monkeypatch.setattr(onepass, "compiled", lambda: None)
    elif onepass.compiled() is None:
        pytest.skip("the C++ extension was not built")


def drawn(kind: torch.dtype, count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0)).to(kind)


@pytest.mark.parametrize("kind", [*KINDS, torch.int64, torch.uint8])
@pytest.mark.parametrize("count", [0, 1, 511, 4096, 5001, 3 << 20])
def test_checksum_and_copy(way, kind, count):
    value, into = drawn(kind, count), torch.full((count,), 7).to(kind)
    total, finite = onepass.read_once(value, into)
    assert finite and torch.equal(into, value)
    if count < 10_000:
        assert total == by_hand(value.view(torch.uint8).numpy().tobytes())
    assert total == onepass.read_once(value)[0]


def test_both_ways_agree(monkeypatch):
    if onepass.compiled() is None:
        pytest.skip("the C++ extension was not built")
    values = [drawn(kind, count) for kind in KINDS for count in (77, 1 << 21, (3 << 20) + 5)]
    found = [onepass.read_once(v) for v in values]
    monkeypatch.setattr(onepass, "compiled", lambda: None)
    assert [onepass.read_once(v) for v in values] == found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads, copies", [(1, False), (3, False), (1, True), (3, True)])
def test_every_number_that_is_not_finite_is_seen(way, kind, threads, copies):
    """At both ends, around a block, between two pieces and in the rest behind the last block; and nothing else is."""
    before, count = torch.get_num_threads(), (5 << 20) + 3
    value = torch.full((count,), LARGEST[kind], dtype=kind)  # the sum of these is not finite
    value[1::2] = -LARGEST[kind]
    try:
        torch.set_num_threads(threads)
        into = torch.empty_like(value) if copies else None
        assert onepass.read_once(value, into)[1]
        for place in (0, 1, 2, 3, 511, 512, 2047, 2048, (1 << 20) - 1, 1 << 20, 1 << 21, count - 4, count - 1):
            for bad in (math.nan, -math.nan, math.inf, -math.inf):
                kept, value[place] = value[place].clone(), bad
                assert not onepass.read_once(value, into)[1], (place, bad)
                value[place] = kept
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_opposite_infinities_do_not_cancel(way, kind):
    value = torch.zeros(4096, dtype=kind)
    value[0], value[1] = math.inf, -math.inf
    assert not onepass.read_once(value)[1] and not onepass.read_once(value[:2])[1]


@pytest.mark.parametrize("other", KINDS)
def test_another_type_is_made_on_the_way(way, other):
    value = drawn(torch.bfloat16, (3 << 20) + 1)
    into = torch.empty(len(value), dtype=other)
    assert onepass.read_once(value, into) == onepass.read_once(value) and torch.equal(into, value.to(other))


def test_a_tensor_that_begins_anywhere(way):
    value, held = drawn(torch.bfloat16, 300_001), torch.zeros(300_004, dtype=torch.bfloat16)
    for begin in (1, 2, 3):
        apart = held[begin : begin + len(value)]
        apart.copy_(value)
        into = torch.zeros_like(value)
        assert onepass.read_once(apart, into) == onepass.read_once(value) and torch.equal(into, value)
    square = value[: 200 * 1500].view(200, 1500)
    assert onepass.read_once(square.t()) == onepass.read_once(square.t().contiguous())


def test_several_tensors_at_once(way):
    """Of several types and sizes, to be copied, to be copied in another type, and only to be read."""
    values = [drawn(kind, count) for kind in KINDS for count in (0, 77, 2048 * 4, (1 << 20) + 5)]
    values[3][7] = values[7][-1] = math.nan  # one is only read, the other is copied
    targets = [(None, torch.empty_like(v), torch.empty(len(v)))[k % 3] for k, v in enumerate(values)]
    found = onepass.read_all(list(zip(values, targets, strict=True)))
    assert found == [onepass.read_once(v) for v in values]
    assert [k for k, (_, finite) in enumerate(found) if not finite] == [3, 7]
    for value, target in zip(values, targets, strict=True):
        assert target is None or torch.equal(*(v.nan_to_num(5) for v in (target, value.to(target.dtype))))


def test_a_copy_of_another_shape_is_refused(way):
    for value, into in ((torch.ones(9000), torch.ones(8000)), (torch.ones(4), torch.ones(2, 2))):
        with pytest.raises(ValueError, match="a copy of"):
            onepass.read_once(value, into)
    with torch.device("meta"):  # a default device of the caller
        assert onepass.read_once(torch.ones(9000, device="cpu"))[1]


def test_a_module_with_older_functions_is_left_alone(monkeypatch):
    onepass.compiled.cache_clear()
    monkeypatch.setattr(onepass.importlib, "import_module", lambda name: SimpleNamespace(read_blocks=None))
    try:
        assert onepass.compiled() is None
    finally:
        onepass.compiled.cache_clear()
