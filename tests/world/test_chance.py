"""Random numbers of the built-in world: a hash that Python integers reproduce, balanced, independent bits."""

import numpy as np

from fastlightgen.world.chance import signs, uniforms


def scalar_hash(seed: int, split: int, clip: int, slot: int) -> int:
    """Splitmix64 in Python integers, which cannot wrap by accident."""

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    key = mix((2 * seed + split + 1) * golden % 2**64)
    return mix((mix((key + clip * golden) % 2**64) + (slot + 1) * golden) % 2**64)


def test_uniforms_match_a_scalar_hash():
    expected = [(scalar_hash(9, 1, 6, slot) >> 11) * 2.0**-53 for slot in range(3)]
    assert uniforms(9, "test", [6], 3)[0].tolist() == expected


def test_signs_match_a_scalar_hash():
    """Bit k of a clip is bit k % 64 of the hash of slot 2^20 + k // 64: its bytes in order, high bits first."""
    expected = []
    for k in range(150):
        word = scalar_hash(3, 0, 11, 2**20 + k // 64)
        byte = word >> 8 * (k % 64 // 8) & 255
        expected.append(1.0 if byte >> (7 - k % 8) & 1 else -1.0)
    assert signs(3, "train", [4, 11], 150)[1].tolist() == expected


def test_splits_do_not_overlap():
    train, test = (uniforms(0, split, range(2000), 4) for split in ("train", "test"))
    assert len(np.unique(np.concatenate([train, test]), axis=0)) == 4000


def test_bits_are_balanced_and_independent():
    """Correlations of n independent signs have the standard deviation n^-1/2.

    Beyond 5.5 deviations lie 4e-8 of them: one false alarm in a hundred among all pairs of 768 bits, or of 1,000 clips.
    """
    bits = signs(0, "train", range(1000), 768)
    for rows in (bits, bits.T):  # clips, places
        n = rows.shape[1]
        assert abs(rows.mean(1)).max() < 5.5 * n**-0.5
        pairs = (rows @ rows.T / n)[np.triu_indices(len(rows), 1)]
        assert abs(pairs).max() < 5.5 * n**-0.5
        assert abs(pairs.std() * n**0.5 - 1) < 0.01  # up to 500,000 pairs: its error is below .002
    # nor do they depend on the numbers that decide the caption and the camera
    numbers = uniforms(0, "train", range(1000), 40) - 0.5
    assert abs(bits.T @ numbers / (1000 / 12) ** 0.5).max() < 5.5
