"""Sequence parallelism on four real ranks, in groups of two and four, against one process. gloo on the CPU."""

import json
import re

import pytest
import sequence_worker
from helpers import config, small_wan
from launch import finish, launch

from fastlightgen.models.families import network
from fastlightgen.parallel import ranks
from fastlightgen.parallel.sequence import SequenceGroup
from fastlightgen.parallel.shares import Part
from fastlightgen.planner.walk import Route, walk

# Weights of the last block that compute text alone: HunyuanVideo-1.5 drops its text there.
ENDS = {
    "hunyuan15 i2v": re.compile(r"transformer_blocks\.3\.(attn\.(to_add_out|add_q_proj|norm_added_q)|ff_context)\.")
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("sequence") / "results.json"
    process = launch(4, sequence_worker.__file__, str(file), module=False)
    _, err = finish(process)
    assert process.returncode == 0, err[-4000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("network", sequence_worker.NETWORKS)
@pytest.mark.parametrize("case", sequence_worker.CASES)
def test_predictions_and_gradients_are_those_of_one_process(results, network, case):
    """Sums differ in their order: by at most some hundred roundings, 6e-8 each, or 1.1e-16 in float64."""
    found = results[f"{network}, {case}"]
    limit = 1e-12 if "float64" in case else 1e-5
    assert found["v"] <= limit and found["gradients"] <= limit
    assert found["own"] <= limit, f"relative to its own largest entry, the gradient of {found['worst']}"
    left = [key for key in found["left"] if not (network in ENDS and ENDS[network].match(key))]
    assert len(left) < 0.01 * found["tensors"]  # all but the refiner's key bias, which softmax cancels
    groups = 4 // sequence_worker.CASES[case][0]
    assert found["predictions"] == groups  # bit-equal within a group, so that its ranks take the same steps
    assert found["calls"] == 1  # as many block evaluations as one process


# The four streams call blocks 11 times, 8 of them with gradient; the last prediction adds 2 calls. Wan's prompts share
# block 0 up to its text, so that two calls have one self-attention.
CALLS, GRAD, PREDICTIONS, GRAD_PREDICTIONS = 13, 8, 5, 3


@pytest.mark.parametrize("network", sequence_worker.NETWORKS)
@pytest.mark.parametrize("case", sequence_worker.CASES)
def test_the_order_of_the_exchanges_is_the_same_on_all_ranks(results, network, case):
    """Two per self-attention and one per prediction, as many in the backward pass; recomputed blocks repeat theirs."""
    found, recomputed = results[f"{network}, {case}"], "checkpointing" in case
    attentions = CALLS - ("wan" in network) + GRAD * (1 + recomputed)
    assert found["orders"] == 1 and found["exchanges"] == 2 * attentions + PREDICTIONS + GRAD_PREDICTIONS


def test_bytes_on_the_wire(results):
    """A rank receives q, k, v of others' tokens for its heads, and others' heads for its tokens and the text."""
    frames, rows, cols, dim = 2, 6, 5, 32
    own = [frames * n * cols for n in (2, 2, 1, 1)]
    assert sum(own) == frames * rows * cols
    wan = [3 * (sum(own) - n) * dim // 4 + 3 * n * dim // 4 for n in own]
    assert results["wire"]["wan t2v"] == wan
    _, _, cond, _ = sequence_worker.build(sequence_worker.HUNYUAN, 0).example_inputs(1, 0, (frames, 12, 10))
    text = int(cond.text_len)
    assert results["wire"]["hunyuan t2v"] == [n + 3 * text * dim // 4 for n in wan]


def test_operations_are_those_that_the_planner_counts(results):
    """A rank computes linear layers for its own tokens and the text, attention for all tokens of its heads."""
    own = [2 * n * 5 for n in (2, 2, 1, 1)]
    for name, found in results["operations"].items():
        model = sequence_worker.build(sequence_worker.NETWORKS[name], 0)
        _, _, cond, _ = model.example_inputs(1, 0, (2, 12, 10))
        text = cond.text.shape[1] if "wan" in name else int(cond.text_len)
        net = network(model.config, (2, 12, 10), text)
        planned = [walk(net.divided(Part(n / sum(own), 4)), [Route(grad=True)]).flops for n in own]
        assert found == pytest.approx(planned, rel=0 if "wan" in name else 0.01), name


@pytest.mark.parametrize(
    "size, grid, axis, sizes",
    [
        (2, (21, 30, 52), 2, [26, 26]),  # 480 x 832: even in both, columns
        (4, (21, 30, 52), 2, [13, 13, 13, 13]),
        (8, (21, 30, 52), 1, [4, 4, 4, 4, 4, 4, 3, 3]),  # 4 of 30 is less than 7 of 52
        (8, (21, 45, 80), 2, [10] * 8),
        (3, (1, 2, 3), 2, [1, 1, 1]),
        (3, (1, 3, 2), 1, [1, 1, 1]),
    ],
)
def test_the_axis_with_fewer_tokens_on_the_largest_rank(size, grid, axis, sizes):
    cut = SequenceGroup(None, 0, size).cut(grid)
    assert (cut.axis, cut.sizes) == (axis, sizes)
    assert cut.tokens == [n * grid[0] * grid[1] * grid[2] // grid[axis] for n in sizes]


def test_sizes_that_do_not_divide():
    with pytest.raises(
        ValueError, match="sequence_parallel=3: does not divide the network's 2 heads; use one of 1, 2$"
    ):
        SequenceGroup(None, 0, 3).attach(small_wan())
    with pytest.raises(
        ValueError, match="sequence_parallel=4: the latent has 2 rows and 3 columns of patches, wanted 4"
    ):
        SequenceGroup(None, 0, 4).cut((5, 2, 3))
    with pytest.raises(
        ValueError, match="sequence_parallel=2: does not divide the number of processes, 1; use one of 1$"
    ):
        ranks.sequence_group(2, 1.0)
    with pytest.raises(ValueError, match="sequence_parallel=2: engine=local is one process.* or engine=deepspeed"):
        config(2, "sequence_parallel=2")
    with pytest.raises(ValueError, match="batch=3: is not a multiple of 2, which is 2 groups of 4 ranks with 1 clips"):
        ranks.accumulation(3, 0, 8, 4)
    assert ranks.accumulation(6, 1, 8, 4) == 3
