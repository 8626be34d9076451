"""Files of tensors: the checksum sees every kind of damage that a disk makes, and is cheap."""

import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlightgen.files import tensors
from fastlightgen.files.tensors import checksum


def by_hand(data: bytes) -> int:
    """The definition: CRC-32 of the 64-bit sums of blocks of 4 KiB, then of the rest."""
    blocks = len(data) // 4096
    sums = b""
    for k in range(blocks):
        words = [int.from_bytes(data[4096 * k + i : 4096 * k + i + 8], "little") for i in range(0, 4096, 8)]
        sums += (sum(words) % 2**64).to_bytes(8, "little")
    return zlib.crc32(data[4096 * blocks :], zlib.crc32(sums))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 4096, 5001])
def test_against_the_definition(kind, count):
    value = torch.from_numpy(np.random.default_rng(0).integers(0, 255, count)).to(kind)
    assert checksum(value) == by_hand(value.view(torch.uint8).numpy().tobytes() if count else b"")


def test_the_value_counts_and_not_its_place_in_memory():
    value = torch.randn(7, 300)
    apart = torch.randn(10, 300)[3:]
    apart.copy_(value)
    odd = torch.zeros(len(value.flatten()) * 4 + 1, dtype=torch.uint8)[1:]
    odd.copy_(value.flatten().view(torch.uint8))
    assert checksum(value) == checksum(apart) == checksum(value.t().contiguous().t()) == checksum(odd)


def test_every_single_bit_counts():
    value = torch.randn(2_500)  # two blocks and a rest
    right, data = checksum(value), value.view(torch.uint8)
    for place in np.random.default_rng(0).integers(0, len(data) * 8, 500):
        data[place // 8] ^= 1 << (place % 8)
        assert checksum(value) != right
        data[place // 8] ^= 1 << (place % 8)
    assert checksum(value) == right


def test_moved_and_lost_blocks_count():
    value = torch.randn(4 * 1024)
    moved, lost = value.clone(), value.clone()
    moved[:1024], moved[1024:2048] = value[1024:2048], value[:1024]
    lost[2048:3072] = 0
    assert len({checksum(v) for v in (value, moved, lost, value[:-1])}) == 4


def test_a_file_is_verified(tmp_path):
    file, values = tmp_path / "a.safetensors", {"w": torch.randn(3_000), "b": torch.arange(3)}
    tensors.save_tensors(file, values, tensors.summed(values))
    assert torch.equal(tensors.read_tensors(file)["w"], values["w"]) and not list(tmp_path.glob("*.tmp"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] + bytes([whole[-100] ^ 4]) + whole[-99:])
    with pytest.raises(ValueError, match=r"a.safetensors: (w|b) is damaged \(its checksum is wrong\)"):
        tensors.read_tensors(file)
    held = load_file(file)
    save_file({"b": held["b"]}, file, tensors.summed(values))
    with pytest.raises(ValueError, match="a.safetensors: lacks w"):
        tensors.read_tensors(file)
    save_file(held, file)  # of another program: no checksums, nothing to compare
    assert tensors.read_tensors(file).keys() == {"w", "b"}


def test_others_may_read_what_they_may_read_of_any_new_file(tmp_path):
    """safetensors makes files for their owner alone; a student must be readable for colleagues."""
    (tmp_path / "plain").touch()
    tensors.save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="No such file|cannot|Error"):
        tensors.write_tensors(tmp_path / "absent" / "a.safetensors", {"w": torch.zeros(3)})
