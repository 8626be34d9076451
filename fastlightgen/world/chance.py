"""Random numbers of the built-in world: hashes of (seed, split, clip, slot), so clips do not depend on their order.

B clips.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "test")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, splitmix64's increment
_FIRST_WORD = 1 << 20  # slots from here on give bits


def _mix(x: NDArray) -> NDArray:
    """The splitmix64 finaliser: a bijection of uint64 whose output bits look independent."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _words(seed: int, split: str, indices: Sequence[int], start: int, slots: int) -> NDArray:
    """Return uint64 [B, slots]: the hashes of slots start, start + 1, ..."""
    key = _mix(np.array([2 * seed + SPLITS.index(split) + 1], np.uint64) * _GOLDEN)
    clip = _mix(key + np.asarray(indices, np.uint64) * _GOLDEN)
    return _mix(clip[:, None] + (np.arange(start, start + slots, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)


def uniforms(seed: int, split: str, indices: Sequence[int], slots: int) -> NDArray:
    """Return [B, slots] numbers in [0, 1)."""
    # The upper 53 bits fill a float64's mantissa.
    return (_words(seed, split, indices, 0, slots) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def signs(seed: int, split: str, indices: Sequence[int], count: int) -> NDArray:
    """Return [B, count] numbers -1.0 or 1.0, 64 from each hash."""
    words = _words(seed, split, indices, _FIRST_WORD, -(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8).reshape(len(words), -1), axis=1, count=count)
    return 2.0 * bits - 1.0
