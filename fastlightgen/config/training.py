"""Keys that several stages and methods share; a method's own keys stand in its own file."""

from dataclasses import dataclass

from fastlightgen.config.fields import Checked, field
from fastlightgen.config.limits import MOST_CLIPS

TIMES = ("uniform", "logit_normal")
SCHEDULE = "after the warm-up: hold the learning rate, or let it fall to 0"
GUIDANCES = ("null", "embedded")
TEACHER_GUIDANCE = (
    "what guides the teacher; null: the null prompt; embedded: the scale that a guidance-distilled network reads, "
    "without a null prompt and beta1"
)


@dataclass(kw_only=True)
class BatchKeys(Checked):
    """Keys of every stage that draws clips."""

    batch: int = field(16, "clips per step, of all processes together", lo=1, hi=MOST_CLIPS, everyday=True)
    shift: float = field(5.0, "time shift s: t -> s t / (1 + (s - 1) t)", lo=0.01, hi=1_000, everyday=True)


@dataclass(kw_only=True)
class TrainingKeys(BatchKeys):
    """Keys of every stage that trains; the optimizer is AdamW."""

    iters: int = field(1000, "iterations", lo=1, everyday=True)
    lr: float = field(1e-3, "learning rate", lo=0, everyday=True)
    betas: list[float] = field([0.9, 0.999], "AdamW's two decay rates", lo=0, below=1)
    weight_decay: float = field(0.01, "AdamW's weight decay", lo=0)
    clip: float = field(1.0, "largest gradient norm", above=0)
    warmup: int = field(100, "steps over which the learning rate rises from 0", lo=0)
    lr_schedule: str = field("constant", SCHEDULE, choices=("constant", "cosine"))
    checkpointing: bool = field(
        False, "keep one hidden tensor per block, compute the rest again in the backward pass", everyday=True
    )
    keep_attention: int = field(
        0, "checkpointing: blocks that keep their self-attention outputs, one hidden tensor each", lo=0
    )

    def check(self) -> None:
        super().check()
        self.check_ordered("betas")


@dataclass(kw_only=True)
class StudentKeys(TrainingKeys):
    """Keys of methods of Stage III; they train a role named `student`."""

    choose: str = field(
        "last",
        "the result; last: the last weights; best: those whose clips of held-out prompts come nearest to real ones",
        choices=("last", "best"),
        everyday=True,
    )
    choose_every: int = field(50, "choose=best: updates of the student between two looks", lo=1)
    choose_clips: int = field(64, "choose=best: held-out prompts", lo=8, hi=MOST_CLIPS)
