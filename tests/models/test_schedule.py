"""The schedule of a walk against schedules written by hand."""

import subprocess
import sys
from itertools import combinations

import pytest

from fastlightgen.models.schedule import Fork, Group, Run, Schedule, Step, read_once, schedule

N = 6
PRUNED, FULL = [0, 1, 4, 5], list(range(N))
COND, NULL = "cond", "null"


def group(*members: int, grad: bool = False) -> Group:
    return Group(members, grad)


def run(whole: Group, *parts: Group) -> Run:
    """A group runs a block; without `parts` it has one prompt and does not split."""
    return Run(whole, list(parts) or [whole])


def calls(plan: Schedule) -> int:
    """Number of block evaluations."""
    return sum(len(r.parts) for step in plan.steps for r in step.runs)


def visits(plan: Schedule) -> list[tuple[int, int]]:
    """(index, number of groups that run it) of each block that runs."""
    return [(step.block, len(step.runs)) for step in plan.steps]


def test_the_dual_walk():
    """The pruned path with gradient and the full path without: they split at block 2, the first dropped one."""
    both, pruned, full = group(0, 1, grad=True), group(0, grad=True), group(1)
    plan = schedule([PRUNED, FULL], [COND, COND], [0, 0], [True, False], N)
    assert plan == Schedule(
        everyone=both,
        prompts=[both],
        starts=[both],
        steps=[
            Step(0, [], [run(both)]),
            Step(1, [], [run(both)]),
            Step(2, [Fork(both, inside=full, outside=pruned)], [run(full)]),
            Step(3, [], [run(full)]),
            Step(4, [], [run(full), run(pruned)]),
            Step(5, [], [run(full), run(pruned)]),
        ],
        ends=[run(full), run(pruned)],
    )
    assert calls(plan) == 8  # N + K - p = 6 + 4 - 2


def test_the_dual_walk_of_every_mask():
    for keep in (list(keep) for size in range(1, N + 1) for keep in combinations(range(N), size)):
        first_dropped = next((i for i in range(N) if i not in keep), N)
        plan = schedule([keep, FULL], [COND, COND], [0, 0], [False, False], N)
        assert calls(plan) == N + len(keep) - first_dropped
        assert [len(step.forks) for step in plan.steps] == [int(i == first_dropped) for i in range(N)]


def test_the_three_streams_of_the_teacher():
    """v_p(c), v_p(null), v_u(c): prompts split in block 0, where the text enters, block sets before block 2."""
    three, conds, null = group(0, 1, 2), group(0, 2), group(1)
    weak, strong = group(0), group(2)
    plan = schedule([PRUNED, PRUNED, FULL], [COND, NULL, COND], [0, 0, 0], [False] * 3, N)
    assert plan == Schedule(
        everyone=three,
        prompts=[conds, null],
        starts=[three],
        steps=[
            Step(0, [], [run(three, conds, null)]),
            Step(1, [], [run(conds), run(null)]),
            Step(2, [Fork(conds, inside=strong, outside=weak)], [run(strong)]),
            Step(3, [], [run(strong)]),
            Step(4, [], [run(strong), run(weak), run(null)]),
            Step(5, [], [run(strong), run(weak), run(null)]),
        ],
        ends=[run(strong), run(weak), run(null)],
    )
    assert calls(plan) == (6 + 4 - 2) + 4


def test_prompts_of_hunyuan_video_never_merge():
    """HunyuanVideo's first hidden states contain the text, so different prompts have different start states."""
    plan = schedule([PRUNED, PRUNED, FULL], [COND, NULL, COND], [COND, NULL, COND], [False] * 3, N)
    assert plan.starts == plan.prompts == [group(0, 2), group(1)]
    assert visits(plan) == [(0, 2), (1, 2), (2, 1), (3, 1), (4, 3), (5, 3)]
    assert all(r.parts == [r.group] for step in plan.steps for r in step.runs)
    assert calls(plan) == 12


def test_prompts_stay_merged_while_their_streams_wait():
    """Streams 1 and 2 skip blocks 0 and 1 together; their texts first enter in block 2."""
    plan = schedule([FULL, [2, 3], [2]], [COND, NULL, COND], [0] * 3, [False] * 3, N)
    waiting = group(1, 2)
    assert plan.steps[0] == Step(0, [Fork(group(0, 1, 2), inside=group(0), outside=waiting)], [run(group(0))])
    assert plan.steps[2] == Step(2, [], [run(group(0)), run(waiting, group(1), group(2))])
    assert visits(plan) == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 1), (5, 1)]
    assert [end.group for end in plan.ends] == [group(0), group(1), group(2)]


def test_a_block_that_no_stream_runs_has_no_step():
    plan = schedule([[1, 4], [1, 3]], [COND, COND], [0, 0], [False, False], N)
    assert visits(plan) == [(1, 1), (3, 1), (4, 1)]
    assert [len(step.forks) for step in plan.steps] == [0, 1, 0]


def test_the_sweep_of_stage_1():
    """Every block skipped alone, and none: trunk N, tails N - 1, ..., 0; one fork per block."""
    keeps = [[j for j in range(N) if j != i] for i in range(N)] + [FULL]
    plan = schedule(keeps, [COND] * (N + 1), [0] * (N + 1), [False] * (N + 1), N)
    assert calls(plan) == N * (N + 1) // 2
    assert all(step.forks[0].outside == group(step.block) and len(step.forks) == 1 for step in plan.steps)


def test_twins_stay_together_to_the_end():
    """A group carries gradient if one of its streams does."""
    twins = group(0, 1, grad=True)
    plan = schedule([PRUNED, PRUNED], [COND, COND], [0, 0], [False, True], N)
    assert plan.ends == [run(twins)] and all(step.runs == [run(twins)] for step in plan.steps)


def test_without_blocks_the_prompts_part_at_the_end():
    plan = schedule([[], []], [COND, NULL], [0, 0], [True, False], 0)
    assert plan.steps == [] and plan.ends == [run(group(0, 1, grad=True), group(0, grad=True), group(1))]


@pytest.mark.parametrize("flags", [(True, False), (False, True)])
def test_a_block_reads_each_prompt_once(flags):
    """Reading carries gradient if one of the parts with that prompt does."""
    read = read_once([(COND, flags[0]), (NULL, False), (COND, flags[1])])
    assert list(read.items()) == [(COND, True), (NULL, False)]


def test_it_needs_no_torch():
    code = "import sys, fastlightgen.models.schedule; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
