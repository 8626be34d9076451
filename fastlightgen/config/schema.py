"""Every key of every training stage: name, type, default, range and meaning. The defaults are the paper's settings.

`train` receives one root class: Stage0 .. Stage3 or StageAll. The stages share `Run` (run.py); what is special to a
stage stands in its ...Keys class, which is also that stage's section of StageAll. The other commands' keys are in
commands.py.
"""
# ruff: noqa: RUF009  `field` and `section` are dataclasses.field with checks: lists come from a default_factory

from dataclasses import asdict, dataclass, fields

from fastlightgen.config.fields import Checked, ConfigError, field, section
from fastlightgen.config.run import GUIDANCE, SAMPLER, SAMPLERS, STEPS, Run

TIMES = ("uniform", "logit_normal")
SCHEDULE = "after the warm-up: hold the learning rate, or let it fall to 0"


@dataclass(kw_only=True)
class Batch(Checked):
    batch: int = field(1, "clips per step", lo=1)
    shift: float = field(5.0, "time shift s: t -> s t / (1 + (s - 1) t)", above=0)


@dataclass(kw_only=True)
class Training(Batch):
    """Keys of every section that trains; the optimizer is AdamW."""

    iters: int = field(1000, "iterations", lo=1)
    lr: float = field(1e-3, "learning rate", lo=0)
    betas: list[float] = field([0.9, 0.999], "AdamW's two decay rates", lo=0, below=1)
    weight_decay: float = field(0.01, "AdamW's weight decay", lo=0)
    clip: float = field(1.0, "largest gradient norm", above=0)
    warmup: int = field(100, "steps over which the learning rate rises from 0", lo=0)
    lr_schedule: str = field("constant", SCHEDULE, choices=("constant", "cosine"))
    checkpointing: bool = field(False, "keep one hidden tensor per block, compute the rest again in the backward pass")
    keep_attention: int = field(
        0, "checkpointing: blocks that keep their self-attention outputs, one hidden tensor each", lo=0
    )

    def check(self) -> None:
        super().check()
        self.check_ordered("betas")


@dataclass(kw_only=True)
class TeacherKeys(Training):
    iters: int = field(2000, "optimizer steps", lo=1)
    lr_schedule: str = field("cosine", SCHEDULE, choices=("constant", "cosine"))
    text_dropout: float = field(0.1, "probability of the empty prompt, which guidance needs", lo=0, hi=1)
    ema: float = field(0.0, "decay of the averaged weights; 0 keeps no average", lo=0, below=1)
    time: str = field("uniform", "how t is drawn before the shift", choices=TIMES)
    init: str = field("", "model folder to start from; empty: random weights of the preset")
    save_dtype: str = field("float32", "type of the saved weights", choices=("float32", "bfloat16"))


@dataclass(kw_only=True)
class RankKeys(Batch):
    batch: int = field(16, "clips per network call", lo=1)
    ratio: float = field(0.3, "share of the network to drop", above=0, below=1)
    ratio_unit: str = field("blocks", "what `ratio` counts", choices=("blocks", "params", "flops"))
    units: str = field(
        "all",
        "which blocks may be dropped, of how many `ratio` counts; all; HunyuanVideo also: double, single, "
        "per_list (the ratio of each list)",
        choices=("all", "double", "single", "per_list"),
    )
    search: str = field(
        "single_skip",
        "single_skip: each block alone; iterative: least harmful first, then again; exhaustive: all subsets (tests)",
        choices=("single_skip", "iterative", "exhaustive"),
    )
    score: str = field("elbo", "elbo: error against the data; output_mse: change of v", choices=("elbo", "output_mse"))
    clips: int = field(64, "clips of the evaluation set", lo=1)
    timesteps: int = field(8, "stratified times per clip", lo=1)
    t_range: list[float] = field([0.02, 0.98], "range of the times before the shift", lo=0, hi=1)
    protect_first: int = field(0, "blocks at the start that are never dropped", lo=0)
    protect_last: int = field(0, "blocks at the end that are never dropped", lo=0)
    memory: float = field(
        4.0, "GiB for the hidden states of candidates that are walked together", above=0, numbers=False
    )

    def check(self) -> None:
        super().check()
        self.check_ordered("t_range")


@dataclass(kw_only=True)
class PruneKeys(Training):
    iters: int = field(4000, "optimizer steps", lo=1)
    lr: float = field(1e-5, "learning rate", lo=0)
    alpha: float = field(1.0, "weight of distillation; 1 - alpha weighs the data (Eq. 7)", lo=0, hi=1)
    drop: str = field(
        "joint", "joint: one coin for all pruned blocks; independent: one each", choices=("joint", "independent")
    )
    p: float = field(0.5, "probability that a coin drops its blocks", lo=0, hi=1)
    full_drop_prob: float = field(0.5, "drop=independent: share of steps that drop every pruned block", lo=0, hi=1)
    estimator: str = field(
        "full", "full: both paths every step; sampled: one path, by the coin", choices=("full", "sampled")
    )
    target: str = field(
        "frozen",
        "what both paths follow; frozen: the teacher; self: the unpruned path (Eq. 6 as printed); ema: its average",
        choices=("frozen", "self", "ema"),
    )
    target_decay: float = field(0.999, "target=ema: decay of the average", lo=0, below=1)
    kappa_unpruned: float = field(1.0, "weight of the unpruned path's distance to the target", lo=0)
    text_dropout: float = field(0.1, "probability of the empty prompt, which Eq. 9 needs", lo=0, hi=1)
    guard: float = field(
        1.5, "stop when the unpruned path's held-out error exceeds this multiple of its start", above=1, numbers=False
    )
    guard_every: int = field(50, "steps between two looks at the held-out error", lo=1, numbers=False)
    time: str = field("uniform", "how t is drawn before the shift", choices=TIMES)
    importance: str = field("", "Stage I's ranking; empty: RUN/stage1/importance.json")
    teacher: str = field("", "model folder of the teacher; empty: model")

    def check(self) -> None:
        super().check()
        if self.estimator == "sampled" and self.drop == "independent":
            raise ConfigError(
                "estimator=sampled: the coin belongs to drop=joint; with drop=independent use estimator=full"
            )
        if self.estimator == "sampled" and not 0 < self.p < 1:
            raise ConfigError(f"p={self.p}: estimator=sampled divides by p and 1 - p; wanted > 0 and < 1")


@dataclass(kw_only=True)
class DistillKeys(Training):
    lr: float = field(5e-7, "learning rate of the generator", lo=0)
    lr_fake: float = field(5e-7, "learning rate of the fake score network (critic)", lo=0)
    betas: list[float] = field([0.0, 0.999], "AdamW's two decay rates", lo=0, below=1)
    clip: float = field(10.0, "largest gradient norm", above=0)
    warmup: int = field(0, "steps over which the learning rates rise from 0", lo=0)
    method: str = field("fastlightgen", "how the generator is trained", choices=("fastlightgen",))
    beta1: float = field(3.5, "Eq. 9: weight of the prompt, v_pc - v_pn; the centre of its interval")
    beta2: float = field(0.25, "Eq. 9: weight of the strong teacher, v_uc - v_pc; the centre of its interval")
    a1: float = field(1.0, "beta1 is drawn from [beta1 - a1, beta1 + b1]", lo=0)
    b1: float = field(1.0, "see a1", lo=0)
    a2: float = field(0.1, "beta2 is drawn from [beta2 - a2, beta2 + b2]", lo=0)
    b2: float = field(0.1, "see a2", lo=0)
    steps: int = field(4, "sampling steps of the student", lo=1, hi=8)
    rollout: str = field(
        "simulate",
        "the generator's inputs; simulate: its own steps from noise; data: noised clips",
        choices=("simulate", "data"),
    )
    ratio: int = field(5, "critic updates per generator update", lo=1)
    count: str = field(
        "outer", "what iters counts; outer: critic updates; generator: its updates", choices=("outer", "generator")
    )
    t_clamp: list[float] = field([0.02, 0.98], "range of the score's time after the shift", lo=0, hi=1)
    fake_arch: str = field("pruned", "blocks of the critic", choices=("pruned", "full"))
    fake_mode: str = field("copy", "copy: own weights; lora: low-rank change of Stage II's", choices=("copy", "lora"))
    lora_rank: int = field(16, "fake_mode=lora: rank", lo=1)
    strong: str = field(
        "stage2", "the strong teacher in Eq. 9; original: before Stage II", choices=("stage2", "original")
    )
    sampler: str = field("stochastic", "how the student goes from step to step", choices=("stochastic", "ode"))
    ema: float = field(0.0, "decay of the generator's averaged weights; 0 keeps no average", lo=0, below=1)
    ema_start: int = field(0, "generator updates before averaging starts", lo=0)
    normaliser: str = field(
        "dmd", "dmd: divide the gradient by mean |x0 - x0_real|; none: do not", choices=("dmd", "none")
    )
    score_shift: float = field(0.0, "time shift of the score's time; 0: same as shift", lo=0)
    stage2_model: str = field("", "model folder that Stage II left; empty: RUN/stage2/model")

    def check(self) -> None:
        super().check()
        self.check_ordered("t_clamp")


@dataclass(kw_only=True)
class EvaluateKeys(Checked):
    clips: int = field(512, "held-out clips", lo=1, numbers=False)
    batch: int = field(64, "clips per network call", lo=1, numbers=False)
    steps: int = field(0, STEPS, lo=0, numbers=False)
    guidance: float = field(-1.0, GUIDANCE, numbers=False)
    sampler: str = field("auto", SAMPLER, choices=SAMPLERS, numbers=False)
    show: int = field(8, "clips kept for the report", lo=0, numbers=False)


@dataclass(kw_only=True)
class Stage0(TeacherKeys, Run):
    """train a teacher by flow matching"""

    stage: str = field("0", "which stage to run", choices=("0",))


@dataclass(kw_only=True)
class Stage1(RankKeys, Run):
    """rank the blocks and choose those to drop"""

    stage: str = field("1", "which stage to run", choices=("1",))


@dataclass(kw_only=True)
class Stage2(PruneKeys, Run):
    """train the network to work with and without the chosen blocks"""

    stage: str = field("2", "which stage to run", choices=("2",))


@dataclass(kw_only=True)
class Stage3(DistillKeys, Run):
    """distil the pruned network to a few sampling steps"""

    stage: str = field("3", "which stage to run", choices=("3",))


@dataclass(kw_only=True)
class StageAll(Run):
    """stages 1, 2 and 3, then the evaluation and the report"""

    stage: str = field("all", "which stage to run", choices=("all",))
    stage1: RankKeys = section(RankKeys, "keys of stage 1")
    stage2: PruneKeys = section(PruneKeys, "keys of stage 2")
    stage3: DistillKeys = section(DistillKeys, "keys of stage 3")
    evaluate: EvaluateKeys = section(EvaluateKeys, "keys of the evaluation", numbers=False)


STAGES = {"0": Stage0, "1": Stage1, "2": Stage2, "3": Stage3, "all": StageAll}


def for_stage(cfg: StageAll, stage: int) -> Stage1 | Stage2 | Stage3:
    """The configuration of one stage of `stage=all`."""
    common = {f.name: getattr(cfg, f.name) for f in fields(Run) if f.name != "stage"}
    return STAGES[str(stage)](**common, **asdict(getattr(cfg, f"stage{stage}")))
