"""The shim itself: its number formats are exact, and it detects the synchronisation mistakes of a kernel."""

import pytest
import simt as shim
import torch

RIGHT, NO_BARRIER, HALF_AT_BARRIER, HALF_AT_SHUFFLE = range(4)
THREADS = 64


def neighbours(kind: int, salt: float) -> tuple[int, list[float]]:
    """Each thread stores a number in shared memory and reads its neighbour's; `kind` selects the mistake."""
    out = torch.full((THREADS,), float("nan"))
    return shim.selftest(kind, salt, out), out.tolist()


def test_a_kernel_with_its_barrier_is_right(simt):
    assert neighbours(RIGHT, 100.0) == (0, [100.0 + (i + 1) % THREADS for i in range(THREADS)])


def test_a_missing_barrier_shows(simt):
    error, got = neighbours(NO_BARRIER, 200.0)
    assert error == 0 and got != [200.0 + (i + 1) % THREADS for i in range(THREADS)]


@pytest.mark.parametrize("kind", [HALF_AT_BARRIER, HALF_AT_SHUFFLE])
def test_threads_that_do_not_meet_are_reported(simt, kind: int):
    assert neighbours(kind, 300.0)[0] == 719  # cudaErrorLaunchFailure
    assert neighbours(RIGHT, 1.0)[0] == 0  # the next launch is not affected


def test_conversions_of_the_shim():
    """The shim's half and bfloat16 are torch's, bit for bit: every half, and floats around every rounding boundary."""
    if shim.COMPILER is None:
        pytest.skip("g++ is not installed")
    bits = torch.arange(-(2**31), 2**31 - 1, 65521, dtype=torch.int64)
    edges = torch.cat([bits + d for d in range(-2, 3)]).clamp(-(2**31), 2**31 - 1).to(torch.int32)
    ties = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16) + 0x8000
    x = torch.cat([edges, ties]).view(torch.float32)
    half, brain = torch.empty_like(x), torch.empty_like(x)
    shim.convert(x, half, brain)
    for got, dtype in ((half, torch.float16), (brain, torch.bfloat16)):
        torch.testing.assert_close(got, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
