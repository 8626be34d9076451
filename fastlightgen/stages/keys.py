"""Keys that the methods of Stage III share; a method's own keys stand in its own file."""

from dataclasses import dataclass

from fastlightgen.config import GUIDANCES, TEACHER_GUIDANCE, ConfigError, StudentKeys, field
from fastlightgen.stages.rollouts import Order


@dataclass(kw_only=True)
class FewStepKeys(StudentKeys):
    """Keys of every method of Stage III: its student samples in a few steps."""

    lr: float = field(2e-6, "learning rate of the student", lo=0, everyday=True)
    steps: int = field(4, "sampling steps of the student", lo=1, hi=8, everyday=True)
    teacher_guidance: str = field("null", TEACHER_GUIDANCE, choices=GUIDANCES)
    sampler: str = field("stochastic", "how the student goes from step to step", choices=("stochastic", "ode"))
    ema: float = field(
        0.99, "decay of the student's averaged weights; 0 keeps no average", lo=0, below=1, everyday=True
    )
    ema_start: int = field(0, "student updates before averaging starts", lo=0)
    student_mode: str = field(
        "copy",
        "what trains in the student; copy: all of its weights; lora: low-rank adapters on frozen weights, which are "
        "the teacher's own where it starts from them",
        choices=("copy", "lora"),
        everyday=True,
    )
    student_rank: int = field(64, "student_mode=lora: rank of the student's adapters", lo=1, hi=10_000)
    student_lr: float = field(0.0, "student_mode=lora: learning rate of the student's adapters; 0: ten times lr", lo=0)
    stage2_model: str = field("", "model folder that Stage II left; empty: RUN/stage2/model")
    start_model: str = field(
        "", "model folder whose pruned path the student starts from; empty: the Stage II network itself"
    )

    @property
    def own_lr(self) -> float:
        """Return the learning rate of what trains in the student."""
        return self.lr if self.student_mode == "copy" else self.student_lr or 10 * self.lr


@dataclass(kw_only=True)
class MatchingKeys(FewStepKeys):
    """Keys of methods with a critic: a network that learns the scores of the student's own clips."""

    iters: int = field(
        3000, "iterations: updates of the critic, or with count=generator of the student", lo=1, everyday=True
    )
    betas: list[float] = field([0.0, 0.999], "AdamW's two decay rates", lo=0, below=1)
    clip: float = field(10.0, "largest gradient norm", above=0)
    warmup: int = field(0, "steps over which the learning rates rise from 0", lo=0)
    lr_fake: float = field(
        0.0, "learning rate of the critic; 0: 4e-7, or 5e-5 for low-rank adapters", lo=0, everyday=True
    )
    rollout: str = field(
        "simulate",
        "the student's inputs; simulate: its own steps from noise; data: noised clips",
        choices=("simulate", "data"),
    )
    rungs: str = field(
        "cycled",
        "the rung at which an update leaves the ladder; cycled: each rung once per `steps` updates; random: any",
        choices=("cycled", "random"),
    )
    rollouts: str = field(
        "fresh",
        "fresh: each update has its own prompts and rollout; shared: `ratio` critic updates and the next student "
        "update share prompts and one rollout of all rungs",
        choices=("fresh", "shared"),
    )
    ratio: int = field(5, "critic updates per student update", lo=1, everyday=True)
    count: str = field(
        "outer", "what iters counts; outer: critic updates; generator: student updates", choices=("outer", "generator")
    )
    critic_start: int = field(
        100, "critic updates before the first student update, a multiple of ratio; iters counts them too", lo=0
    )
    t_clamp: list[float] = field([0.02, 0.98], "range of the score's time after the shift", lo=0, hi=1)
    normaliser: str = field(
        "dmd", "dmd: divide the gradient by mean |x0 - x0_real|; none: do not", choices=("dmd", "none")
    )
    score_shift: float = field(0.0, "time shift of the score's time; 0: same as shift", lo=0, hi=1_000)

    def check(self) -> None:
        super().check()
        self.check_ordered("t_clamp")
        critics = self.iters * self.order.critics_per_step
        if self.critic_start % self.ratio:  # then updates of the student would fall between the lines of the log
            near = self.critic_start // self.ratio * self.ratio
            raise ConfigError(
                f"critic_start={self.critic_start}: wanted a multiple of ratio={self.ratio}; give critic_start={near}"
            )
        if self.critic_start >= critics:
            least = self.critic_start // self.order.critics_per_step + 1
            raise ConfigError(
                f"critic_start={self.critic_start}: iters={self.iters} leaves no update of the student, which follows "
                f"{self.critic_start} of the critic; give critic_start=0, or iters={least} or more"
            )

    @property
    def adapters(self) -> int:
        """Rank of the low-rank adapters that are the critic's trained weights; 0: it trains weights of its own."""
        return 0

    @property
    def critic_lr(self) -> float:
        """Return the critic's learning rate: that of Self-Forcing-Plus, or for adapters that of DMD2's recipe."""
        return self.lr_fake or (5e-5 if self.adapters else 4e-7)

    @property
    def order(self) -> Order:
        """Return the order of the updates.

        count=outer (DMD2): the critic is updated at every iteration, the student at every ratio-th.
        count=generator: the student is updated at every iteration, followed by `ratio` critic updates.
        """
        return Order(self.ratio, 1 if self.count == "outer" else self.ratio, self.critic_start)

    @property
    def updates(self) -> tuple[float, float]:
        """Return the mean numbers of student and critic updates per iteration."""
        critics = self.order.critics_per_step
        start = self.critic_start / (self.iters * critics)  # share of the iterations without the student
        return (1 - start) * critics / self.ratio, critics
