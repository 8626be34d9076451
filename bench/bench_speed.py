"""Time whole clips: a 4-step student with 70% of the blocks against its teacher's 50 guided steps (by count 35.7x)."""

import copy

import pytest
import torch
from timing import seconds

from fastlightgen.flow import ladder
from fastlightgen.models.sample import sample
from fastlightgen.models.wan.model import WanConfig, WanModel

# Large enough that matrix products dominate. With 10 blocks, 30% of them is a whole number.
WIDE = WanConfig(
    num_attention_heads=8,
    attention_head_dim=64,
    ffn_dim=2048,
    num_layers=10,
    text_dim=64,
    freq_dim=64,
    rope_max_seq_len=64,
)
KEEP = [0, 1, 2, 3, 5, 7, 9]
THEORY = 50 * 2 * 10 / (4 * len(KEEP))


@pytest.mark.benchmark(group="clip")
def bench_speedup(benchmark):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = WanModel(WIDE).to(device).requires_grad_(False)
    student = copy.deepcopy(teacher).prune(KEEP)
    x, _, cond, null = teacher.example_inputs(1, size=(5, 16, 16))

    def teacher_clip():
        sample(teacher, cond, null, x, ladder(50, 5.0), 5.0, "ode")

    def student_clip():
        sample(student, cond, None, x, ladder(4, 5.0), 1.0, "stochastic")

    student_clip()  # warm-up
    pairs = [(seconds(teacher_clip), seconds(student_clip)) for _ in range(3)]
    benchmark.pedantic(student_clip, rounds=3)
    ratio = sorted(a for a, _ in pairs)[1] / sorted(b for _, b in pairs)[1]
    benchmark.extra_info |= {"measured": ratio, "theory": THEORY, "measured/theory": ratio / THEORY}
    print(f"\nspeedup: {ratio:.1f}x measured, {THEORY:.1f}x by block counts, quotient {ratio / THEORY:.3f}")
