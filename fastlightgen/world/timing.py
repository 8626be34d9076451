"""The seconds that models take for a clip, measured in turn, so that a busy moment of the machine meets all of them."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from fastlightgen.config import Evaluate
from fastlightgen.metrics.speed import Speed
from fastlightgen.parallel.log import say
from fastlightgen.world.shapes import Shapes
from fastlightgen.world.source import shapes_batch
from fastlightgen.world.subject import Subject, draw

TURNS = 3  # measurements of every model; their median is shown
CLIPS = 4  # of each measurement, as one batch


def timed(cfg: Evaluate, subjects: Sequence[Subject]) -> list[list[float]]:
    """Seconds per clip of each subject in each turn. All make the same clips, with one batch.

    Every second turn goes backwards: what gets slower or faster steadily then favours nobody.
    """
    say(f"timing: each model makes {batch_of(cfg)} clips, {TURNS} times in turn ...")
    once = replace(cfg, progress=False, batch=batch_of(cfg))
    draw(once, subjects[-1], once.batch)  # warm-up; a student, whose run is short, comes last
    seconds: list[list[float]] = [[] for _ in subjects]
    for turn in range(TURNS):
        places = range(len(subjects))
        for i in places if turn % 2 == 0 else reversed(places):
            seconds[i].append(draw(once, subjects[i], once.batch)[2])
    return seconds


def batch_of(cfg: Evaluate) -> int:
    return min(CLIPS, cfg.clips, cfg.batch)


def speedup(cfg: Evaluate, teacher: Subject, student: Subject, seconds: Sequence[Sequence[float]]) -> Speed:
    """The speedup by counting and by the clock; `seconds`: what `timed` returned for teacher and student.

    Counting takes the blocks alone: the teacher's evaluations times the operations of its blocks, divided by the same
    product of the student.
    """
    clip = shapes_batch(Shapes(seed=cfg.seed, split="test").batch(range(1)))
    all_, kept = teacher.block_flops(clip), student.block_flops(clip)
    alike = len({*all_, *kept}) == 1
    size = len if alike else lambda flops: f"{sum(flops) / 1e9:.3g} GFLOP"  # equal blocks: count them
    theirs, own = seconds
    ratios = [a / b for a, b in zip(theirs, own, strict=True)]
    return {
        "theory": teacher.evaluations * sum(all_) / (student.evaluations * sum(kept)),
        "theory_formula": f"{teacher.evaluations} x {size(all_)} / ({student.evaluations} x {size(kept)})",
        "measured": median(theirs) / median(own),
        "measured_range": [min(ratios), max(ratios)],
        "teacher_seconds": median(theirs),
        "student_seconds": median(own),
        "batch": batch_of(cfg),
    }
