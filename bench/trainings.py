"""What bench/reproduce.py trains and compares: trainings, rows of its table, pairs of rows."""

from dataclasses import dataclass, field
from typing import Any

from fastlightgen.config import preset


@dataclass(frozen=True)
class Training:
    """One stage with the preset's settings (configs/model/tiny.yaml), and what this training changes."""

    stage: int
    after: str = ""  # the training whose result it starts from
    keys: tuple[str, ...] = ()
    inputs: dict[str, str] = field(default_factory=dict)  # other keys that name the model of a training


@dataclass(frozen=True)
class Row:
    """A model and how it is sampled."""

    title: str
    model: str  # a training, or a preset
    plan: dict[str, Any] = field(default_factory=dict)
    few: bool = False  # take the student's ladder and sampler
    keep: bool = False  # run only the blocks that Stage I keeps
    group: str = "main"


STUDENT = preset("tiny")["stage3"]
# The preset is for a demo of eight minutes. The rows train about twice as long.
FIRST, RATIO, UPDATES, STEPS = STUDENT["critic_start"], 2, 110, 300  # ratio and updates of Stage III, steps of Stage II
HALF = UPDATES // 2  # updates of the student in the ablations
REGRESSION = 2 * STEPS  # steps of Stage II that take about the time of Stages II and III
LONG = 120  # updates of the student after the regression, with ratio=1


def updates(count: int, ratio: int = RATIO) -> tuple[str, ...]:
    """The length of a Stage III with `count` updates of the student.

    A cycle of shared rollouts costs 11.5 K + 3 K ratio block forwards (docs/method.md), K blocks kept: 14.5 K, 17.5 K
    and 26.5 K for ratios 1, 2 and 5.
    """
    return (f"iters={FIRST + count * ratio}", f"ratio={ratio}", "ema=0.9")


# Rivals of Stage III: three settings of each, tried with training seed 99 for half of the time. LCM had seven, because
# its first three made Stage II's network worse, and the last two ran for the whole time, because more steps can make
# it worse too. FastLightGen's own learning rates had as many trials (docs/results.md).
# Lightning Video ends with DMD2 without a discriminator.
CRITICS = tuple((f"lr={lr:g}", f"lr_fake={2 * lr:g}") for lr in (2e-4, 4e-4, 8e-4))
BEST = ("choose=best", "choose_every=48")
WHOLE = ("lcm-try-5", "lcm-try-6")  # trials that run for the whole time
TRIALS: dict[str, tuple[tuple[str, ...], ...]] = {
    "dmd2": CRITICS,
    "dmd2-no-gan": CRITICS,
    "magicdistillation": (("lr_fake=8e-4",), ("lr_fake=2e-3",), ("lr_fake=5e-3",)),
    "lcm": (
        ("lr=1e-4",),
        ("lr=3e-4",),
        ("lr=1e-3",),
        ("lr=2e-5",),
        ("lr=2e-5", "target=ema"),
        ("lr=2e-5", "target=ema", *BEST),
        ("lr=5e-5", "target=ema", "target_decay=0.99", *BEST),
    ),
    "stage3-regression": (("lr=4e-4",), ("lr=1e-3",), ("lr=2e-3",)),
}
# The trial with the smallest distance, bench/results/rival-trials.json.
CHOSEN = {"dmd2": 2, "dmd2-no-gan": 2, "magicdistillation": 0, "lcm": 5, "stage3-regression": 2}
METHODS: dict[str, tuple[str, ...]] = {
    "dmd2": ("method=dmd2",),
    "dmd2-no-gan": ("method=dmd2", "gan=0"),
    "magicdistillation": ("method=magicdistillation",),
    "lcm": ("method=lcm", "ema=0.9", "warmup=10"),
    "stage3-regression": ("method=regression", "lr_schedule=cosine", "ema=0.9", "warmup=10"),
}
# Updates of the student in the time that FastLightGen's Stage III takes for its 110: 312 s of a core. Seconds per step,
# a critic's where there is one: FastLightGen 1.30, the others 2.64, 1.64, 3.23, 1.08, 0.93.
EQUAL = {"dmd2": 49, "dmd2-no-gan": 85, "magicdistillation": 38, "lcm": 289, "stage3-regression": 335}


def rival(name: str, which: int, share: float = 1.0, after: str = "stage2") -> Training:
    """A method of Stage III with one of its settings, for a share of the equal time."""
    count = int(EQUAL[name] * share)
    length = (f"iters={count}",) if name in ("lcm", "stage3-regression") else updates(count)  # the others have a critic
    return Training(3, after, (*METHODS[name], *TRIALS[name][which], *length))


def rival_of_stage2(name: str, lr: float, steps: int = STEPS) -> Training:
    """A method of Stage II with one of its learning rates."""
    keys = {
        "icmd": ("method=icmd",),
        "f3-blocks": ("method=f3", "f3=block", "recover=true"),
        "lightning-2": ("method=lightning", "prune_heads=1", "prune_ffn=0.5"),
    }
    return Training(2, "rank" if name == "icmd" else "", (*keys[name], f"iters={steps}", f"lr={lr:g}"))


# Rivals of Stage II: learning rates tried for half of the steps; the second is the preset's. Where the three do not
# differ by more than chance, the row keeps it.
RATES = (5e-4, 1e-3, 2e-3)
STAGE2_CHOSEN = {"icmd": 2, "f3-blocks": 1, "lightning-2": 1}
# Stage III after the regression: (updates, keys) that were tried. The rows have the first, and the second, which
# follows captions better. The last is not nearer to the data than by chance, and takes twice as long.
GUIDED = ("beta1=1.25", "guidance_times=below")
LONG_TRIALS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (LONG, ()),
    (LONG, GUIDED),
    (LONG, ("beta1=1.5", "guidance_times=below")),
    (LONG, ("lr_schedule=cosine",)),
    (2 * LONG, ("lr_schedule=cosine",)),
)
TUNED, TUNED_CLIPS = 99, 1  # training seed and evaluate.seed of trials, which no row uses
TRAININGS: dict[str, Training] = {
    "rank": Training(1),
    "stage2": Training(2, "rank", (f"iters={STEPS}",)),
    "student": Training(3, "stage2", updates(UPDATES)),
    "student-long": Training(3, "regression", updates(LONG, 1)),
    "student-follow": Training(3, "regression", (*updates(LONG, 1), *GUIDED)),
    "student-fp8": Training(3, "stage2", (*updates(UPDATES), "fp8=frozen")),
    # The guided regression alone, for the time of Stages II and III: Stage II with more steps.
    "regression": Training(2, "rank", (f"iters={REGRESSION}", "p=0.9")),
    # The paper's order: Stage II follows the plain teacher, and all guidance comes from Eq. 9.
    "stage2-plain": Training(2, "rank", (f"iters={STEPS}", "guided=1")),
    "student-plain": Training(3, "stage2-plain", (*updates(UPDATES), "beta1=2")),
    # Ablations: one key of Stage III changed, and half of its steps.
    "short": Training(3, "stage2", updates(HALF)),
    "beta2-0": Training(3, "stage2", (*updates(HALF), "beta2=0", "a2=0", "b2=0")),
    "beta2-.5": Training(3, "stage2", (*updates(HALF), "beta2=0.5")),
    "beta2-1": Training(3, "stage2", (*updates(HALF), "beta2=1")),
    "ratio-1": Training(3, "stage2", updates(round(HALF * 17.5 / 14.5), 1)),
    "ratio-5": Training(3, "stage2", updates(round(HALF * 17.5 / 26.5), 5)),
    "fresh": Training(3, "stage2", (*updates(HALF), "rollouts=fresh")),
    # Decoupled noise ranges of Eq. 9's guidance part. It needs a Stage III that brings the guidance.
    "plain-short": Training(3, "stage2-plain", (*updates(HALF), "beta1=2")),
    "plain-below": Training(3, "stage2-plain", (*updates(HALF), "beta1=2", "guidance_times=below")),
    "plain-above": Training(3, "stage2-plain", (*updates(HALF), "beta1=2", "guidance_times=above")),
    # Eq. 7's weight of distillation. The rest is the data, which has no guidance.
    **{f"stage2-alpha-{a}": Training(2, "rank", (f"iters={STEPS}", f"alpha={a}")) for a in ("0", ".5")},
    **{f"alpha-{a}": Training(3, f"stage2-alpha-{a}", updates(HALF)) for a in ("0", ".5")},
    # Searches of Stage I, each followed by the same Stage II.
    "rank-iterative": Training(1, "", ("search=iterative",)),
    "rank-calibrated": Training(1, "", ("search=calibrated", "recovery=iters=40,warmup=4")),
    **{f"stage2-{s}": Training(2, f"rank-{s}", (f"iters={STEPS}",)) for s in ("iterative", "calibrated")},
    # Rivals of Stage II, with the preset's schedule, sampled like the teacher. "f3-attention" trains nothing.
    "f3-attention": Training(2, "", ("method=f3",)),
    **{name: rival_of_stage2(name, RATES[which]) for name, which in STAGE2_CHOSEN.items()},
    **{
        f"{name}-try-{i}": rival_of_stage2(name, lr, STEPS // 2) for name in STAGE2_CHOSEN for i, lr in enumerate(RATES)
    },
    **{
        f"long-try-{i}": Training(3, "regression", (*updates(count, 1), *keys))
        for i, (count, keys) in enumerate(LONG_TRIALS)
    },
    **{name: rival(name, CHOSEN[name]) for name in TRIALS},
    **{
        f"{name}-try-{i}": rival(name, i, 1.0 if f"{name}-try-{i}" in WHOLE else 0.5)
        for name, tried in TRIALS.items()
        for i in range(len(tried))
    },
    "lightning": rival("dmd2-no-gan", CHOSEN["dmd2-no-gan"], after="lightning-2"),
}
ROWS: dict[str, Row] = {
    "teacher-50": Row("teacher, 50 steps", "tiny"),
    "teacher-28": Row("teacher, 28 steps", "tiny", {"steps": 28}),
    "teacher-4": Row("teacher, 4 steps", "tiny", few=True),
    "pruned-28": Row("blocks dropped, nothing trained, 28 steps", "tiny", {"steps": 28}, keep=True),
    "pruned-4": Row("blocks dropped, nothing trained, 4 steps", "tiny", few=True, keep=True),
    "stage2-28": Row("Stage II, pruned path, 28 steps", "stage2", {"steps": 28, "path": "pruned"}),
    "stage2-4": Row("Stage II, pruned path, 4 steps", "stage2", {"path": "pruned"}, few=True),
    "regression": Row("guided regression alone, 4 steps", "regression", {"path": "pruned"}, few=True),
    "regression-28": Row("the same, 28 steps", "regression", {"steps": 28, "path": "pruned"}),
    "student-plain": Row("student, Stage II without guidance", "student-plain"),
    "student": Row("student", "student"),
    "student-long": Row("student after the regression", "student-long"),
    "student-follow": Row("the same, beta1 = 1.25", "student-follow"),
    "student-fp8": Row("student, streams without gradient in float8", "student-fp8", group="fp8"),
    "short": Row("student, half the steps of Stage III", "short", group="ablations"),
    "beta2-0": Row("beta2 = 0", "beta2-0", group="ablations"),
    "beta2-.5": Row("beta2 = .5", "beta2-.5", group="ablations"),
    "beta2-1": Row("beta2 = 1", "beta2-1", group="ablations"),
    "ratio-1": Row("1 critic update per student update, the same time", "ratio-1", group="ablations"),
    "ratio-5": Row("5 critic updates per student update, the same time", "ratio-5", group="ablations"),
    "fresh": Row("fresh rollouts, the same updates", "fresh", group="ablations"),
    "plain-short": Row("Stage II without guidance, half the steps", "plain-short", group="ablations"),
    "plain-below": Row("guidance at cleaner times", "plain-below", group="ablations"),
    "plain-above": Row("guidance at noisier times", "plain-above", group="ablations"),
    "alpha-0": Row("alpha = 0: Stage II follows the data", "alpha-0", group="ablations"),
    "alpha-.5": Row("alpha = .5", "alpha-.5", group="ablations"),
    **{
        f"{s}-4": Row(
            f"search={s}, Stage II, pruned path, 4 steps", f"stage2-{s}", {"path": "pruned"}, True, group="searches"
        )
        for s in ("iterative", "calibrated")
    },
    "icmd": Row("ICMD, 28 steps", "icmd", {"steps": 28}, group="rivals"),
    "f3-attention": Row("F3-Pruning, attention, untrained, 28 steps", "f3-attention", {"steps": 28}, group="rivals"),
    "f3-blocks": Row("F3-Pruning, blocks, trained, 28 steps", "f3-blocks", {"steps": 28}, group="rivals"),
    "stage3-regression": Row("guided regression after Stage II", "stage3-regression", group="rivals"),
    "dmd2": Row("DMD2", "dmd2", group="rivals"),
    "dmd2-no-gan": Row("DMD2 without its discriminator", "dmd2-no-gan", group="rivals"),
    "lcm": Row("LCM", "lcm", group="rivals"),
    "magicdistillation": Row("MagicDistillation", "magicdistillation", group="rivals"),
    "lightning": Row("Lightning Video", "lightning", group="rivals"),
    **{
        name: Row(name, name, {"steps": 28} if TRAININGS[name].stage == 2 else {}, group="trials")
        for name in TRAININGS
        if "-try-" in name
    },
}
PAIRS = (  # (row, the row that it is compared with)
    ("teacher-4", "teacher-50"),
    ("pruned-28", "teacher-28"),
    ("stage2-28", "teacher-28"),
    ("stage2-4", "teacher-28"),
    ("regression-28", "teacher-28"),
    ("student", "teacher-50"),
    ("student", "teacher-4"),
    ("student", "stage2-4"),
    ("student", "regression"),
    ("student", "student-plain"),
    ("student-long", "teacher-50"),
    ("student-long", "teacher-4"),
    ("student-long", "stage2-4"),
    ("student-long", "regression"),
    ("student-long", "student"),
    ("student-follow", "teacher-50"),
    ("student-follow", "teacher-4"),
    ("student-follow", "stage2-4"),
    ("student-follow", "regression"),
    ("student-follow", "student"),
    ("student-follow", "student-long"),
    ("student-fp8", "student"),
    ("beta2-0", "short"),
    ("beta2-.5", "short"),
    ("beta2-1", "short"),
    ("ratio-1", "short"),
    ("ratio-5", "short"),
    ("fresh", "short"),
    ("alpha-0", "short"),
    ("alpha-.5", "short"),
    ("plain-short", "short"),
    ("plain-below", "plain-short"),
    ("plain-above", "plain-short"),
    ("student", "stage3-regression"),
    ("student", "dmd2"),
    ("student", "dmd2-no-gan"),
    ("student", "lcm"),
    ("student", "magicdistillation"),
    ("iterative-4", "stage2-4"),
    ("calibrated-4", "stage2-4"),
    ("icmd", "stage2-28"),
    ("f3-attention", "stage2-28"),
    ("f3-blocks", "stage2-28"),
    ("student", "lightning"),
)


def varies(name: str) -> bool:
    """Whether a row depends on the training seed. A preset's weights do not, unless Stage I chooses its blocks."""
    return ROWS[name].model in TRAININGS or ROWS[name].keep
