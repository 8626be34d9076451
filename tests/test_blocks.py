"""Block sets, the ranking file, masks that are equal on every rank, and the random generators behind them."""

import json

import pytest
import torch

from fastlightgen.blocks import check_keep, draw_keep, num_dropped, read_importance
from fastlightgen.rng import generator, normal_like


def test_check_keep():
    assert check_keep(None, 4) == {0, 1, 2, 3}
    assert check_keep([3, 1, 1], 4) == {1, 3} == check_keep(torch.tensor([1, 3]), 4)
    with pytest.raises(ValueError, match="keep: names no block; at least one must run"):
        check_keep([], 4)
    for strangers in ([4], [-1]):
        with pytest.raises(ValueError, match=rf"keep: blocks \[{strangers[0]}\].*blocks 0 to 3"):
            check_keep([0, *strangers], 4)


@pytest.mark.parametrize(
    ("blocks", "ratio", "dropped"),
    # Wan 14B and 1.3B and HunyuanVideo at the paper's ratios, a tie (rounds up), and the ends.
    [(40, 0.3, 12), (40, 0.5, 20), (40, 0.7, 28), (30, 0.3, 9), (30, 0.7, 21), (60, 0.3, 18), (5, 0.5, 3)]
    + [(12, 0.0, 1), (12, 1.0, 11)],
)
def test_num_dropped(blocks: int, ratio: float, dropped: int):
    assert num_dropped(blocks, ratio) == dropped


def test_draw_keep_drops_only_pruned_blocks_with_the_stated_frequency():
    pruned, count = [2, 5, 7], 4000
    draws = [draw_keep(pruned, 8, 0.5, 0.25, generator(0, step)) for step in range(count)]
    assert all(set(range(8)) - set(pruned) <= set(keep) and keep == sorted(keep) for keep in draws)
    # All three are dropped by the common coin or by three single ones. Tolerance: five standard errors.
    for gone, wanted in [({2, 5, 7}, 0.25 + 0.75 / 8), (set(), 0.75 / 8), ({2}, 0.75 / 8)]:
        share = sum(set(range(8)) - set(keep) == gone for keep in draws) / count
        assert share == pytest.approx(wanted, abs=5 * (wanted * (1 - wanted) / count) ** 0.5)
    assert draw_keep(pruned, 8, 0.0, 1.0, generator(0)) == [0, 1, 3, 4, 6]
    assert draw_keep(pruned, 8, 0.0, 0.0, generator(0)) == list(range(8))


def test_masks_depend_on_the_keys_alone():
    torch.manual_seed(1)
    first = [draw_keep(range(20), 40, 0.5, 0.1, generator(7, 3, step)) for step in range(5)]
    torch.manual_seed(2)
    torch.rand(10)
    assert first == [draw_keep(range(20), 40, 0.5, 0.1, generator(7, 3, step)) for step in range(5)]
    assert len({tuple(keep) for keep in first}) > 1


def write(path, **changes):
    record = {"units": [{}] * 4, "kept": [0, 3], "pruned": [1, 2]} | changes
    path.write_text(json.dumps({k: v for k, v in record.items() if v != "absent"}))
    return path


def test_ranking_file(tmp_path):
    path = tmp_path / "importance.json"
    with pytest.raises(ValueError, match="not found; run stage=1"):
        read_importance(path, 4)
    assert read_importance(write(path), 4)["kept"] == [0, 3]
    with pytest.raises(ValueError, match="ranks 4 blocks, but the model has 5"):
        read_importance(path, 5)


@pytest.mark.parametrize(
    "changes", [{"kept": "absent"}, {"units": "absent"}, {"kept": None}, {"pruned": [1, "x"]}, {"kept": []}]
)
def test_ranking_file_with_a_hole(tmp_path, changes):
    with pytest.raises(ValueError, match="importance.json.*; wanted a ranking: run stage=1 again"):
        read_importance(write(tmp_path / "importance.json", **changes), 4)


@pytest.mark.parametrize("changes", [{"kept": [0]}, {"kept": [0, 1]}])
def test_ranking_file_that_is_no_partition(tmp_path, changes):
    with pytest.raises(ValueError, match="run stage=1 for this model"):
        read_importance(write(tmp_path / "importance.json", **changes), 4)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_ranking_file_that_is_no_record(tmp_path, text):
    (tmp_path / "importance.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="importance.json.*wanted a ranking"):
        read_importance(tmp_path / "importance.json", 4)


def test_generator_is_splitmix64():
    # The published first outputs of splitmix64 seeded with 0 and 1; the lowest bit is dropped for torch.
    assert generator(0).initial_seed() == 0xE220A8397B1DCDAF >> 1
    assert generator(1).initial_seed() == 0x910A2DEC89025CC1 >> 1
    keys = [(0,), (0, 0), (0, 1), (1, 0), (1,), (-1,), (2**64 + 5,), (5, 5)]
    assert len({generator(*key).initial_seed() for key in keys}) == len(keys)


def test_normal_like_has_the_shape_and_dtype_and_leaves_the_global_state():
    x = torch.zeros(3, 4, dtype=torch.bfloat16)
    state = torch.random.get_rng_state()
    a, b = normal_like(x, generator(1, 2)), normal_like(x, generator(1, 2))
    assert torch.equal(a, b) and a.dtype == x.dtype and a.shape == x.shape
    assert torch.equal(torch.random.get_rng_state(), state)
