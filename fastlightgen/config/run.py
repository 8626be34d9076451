"""The keys that every training stage has, and help texts that several commands share."""

from dataclasses import dataclass, fields

from fastlightgen.config.fields import REQUIRED, Checked, ConfigError, field, show
from fastlightgen.config.limits import MOST_CLIPS, MOST_THREADS

MAX_SEED = 2**31 - 1  # leaves room to count up and fits every generator
DEVICES, SAMPLERS = ("auto", "cpu", "cuda"), ("auto", "ode", "stochastic")
DEVICE = "where to compute; auto takes the GPU if there is one"
THREADS = "CPU threads; 0: torch's choice, but no more than the cores that this process may use"
ALLOW_PT = "also read weights from .pt, .pth and .bin files, as plain tensors"
EXPERTS = ("high", "low")  # of a model with two networks: the one for the noisier times, and the other one
DTYPES = ("auto", "float32", "bfloat16")
DTYPE = (
    "type the networks compute in; auto: bfloat16 for a released network on a GPU, float32 on a CPU and for the "
    "built-in world"
)
DRY_RUN = "print the resolved configuration and exit"
SIZE = "HEIGHTxWIDTHxFRAMES"
STEPS = (
    "sampling steps; a guided step evaluates the network twice; 0: the model's own (a student's ladder, the preset's "
    "steps for a teacher)"
)
GUIDANCE = "classifier-free guidance; 1 turns it off, a negative number takes the model's own"
FORCE = "sample a student with steps, guidance or a sampler that it was not trained for"
SAMPLER = "ode: Euler; stochastic: predict x0, noise again; auto: stochastic for students, ode for teachers"

# Keys that mean nothing to engine=local, and the error for a user who gives them.
ONE_PROCESS = {
    "zero": "is one process and shards nothing; leave it out or use engine=deepspeed",
    "offload": "keeps everything on its device; use offload=none",
    "sequence_parallel": "is one process, which has no other to share with; "
    "use sequence_parallel=1 or engine=deepspeed",
    "timeout": "waits for no other process; leave it out or use engine=deepspeed",
}


def compute_type(dtype: str, gpu: bool, real: bool) -> str:
    """The type that `dtype` stands for; `real`: the network is not one of the built-in world."""
    return dtype if dtype != "auto" else "bfloat16" if gpu and real else "float32"


@dataclass(kw_only=True)
class Run(Checked):
    """Keys of every training stage."""

    stage: str = field(REQUIRED, "which stage to run", choices=("0", "1", "2", "3", "all"))
    run: str = field(
        REQUIRED,
        "run folder: results, checkpoints, log; default: runs/NAME of the model",
        numbers=False,
        everyday=True,
    )
    model: str = field(
        "tiny", "a preset, or a model folder (diffusers' or the original repository's format)", everyday=True
    )
    preset: str = field(
        "default",
        "settings of the stages; default: what this project recommends; paper: the paper's. Those of the model's own "
        "preset win",
        choices=("default", "paper"),
        numbers=False,  # the settings themselves are compared
        everyday=True,
    )
    data: str = field("shapes", "a preset, or a folder with a latent cache", everyday=True)
    data_check: str = field(
        "warn",
        "a cache that the teacher does not know, found before stages 1 to 3; warn, stop, or off: do not look",
        choices=("warn", "stop", "off"),
        numbers=False,
    )
    negative: str = field(
        "empty",
        "the null prompt, of Eq. 9 and of dropped texts; empty: the cache's null_prompt; official: the negative prompt "
        "that the model's authors publish, which a cache holds too",
        choices=("empty", "official"),
    )
    earlier: str = field(
        "auto",
        "what happens when the results of earlier stages are missing; run: run those first; refuse: name their "
        "commands; auto: run for a model that ships with its weights and data=shapes, else refuse",
        choices=("auto", "run", "refuse"),
        numbers=False,
    )
    seed: int = field(0, "decides every random number of the run", lo=0, hi=MAX_SEED, everyday=True)
    device: str = field("auto", DEVICE, choices=DEVICES, numbers=False, everyday=True)
    dtype: str = field("auto", DTYPE, choices=DTYPES, everyday=True)
    fp8: str = field(
        "off",
        "linear layers in float8; frozen: those of predictions without gradient (teacher, target, rollouts, clips), on "
        "GPUs from sm_89 on, with dtype=bfloat16; a CPU computes the same numbers, only slower",
        choices=("off", "frozen"),
    )
    allow_pt: bool = field(False, ALLOW_PT, numbers=False)
    expert: str = field(
        "auto",
        "of a model with two networks (Wan2.2 A14B) the one to train; high: at the times from the boundary up; low: "
        "below it; both: one after the other; auto: both, or the one that model= names",
        choices=("auto", *EXPERTS, "both"),
    )
    boundary: float = field(0.0, "the time at which two experts meet; 0: the model's own", lo=0, below=1)
    partner: str = field(
        "",
        "stage=3 expert=low: model folder of the student of expert=high, which begins the rollouts; empty: that of the "
        "same run",
        numbers=False,
    )
    engine: str = field(
        "local",
        "what runs the steps; local: one process; deepspeed: one process per GPU, started by torchrun",
        choices=("local", "deepspeed"),
        numbers=False,
        everyday=True,
    )
    zero: int = field(
        3, "engine=deepspeed shards: 1 optimizer states, 2 and gradients, 3 and weights", lo=1, hi=3, numbers=False
    )
    offload: str = field(
        "none",
        "engine=deepspeed: what waits in host memory; optimizer: AdamW's states; all: the weights too",
        choices=("none", "optimizer", "all"),
        numbers=False,
    )
    sequence_parallel: int = field(
        1,
        "engine=deepspeed: processes that share the tokens of one clip; a divisor of the heads and of all processes",
        lo=1,
        hi=MOST_THREADS,
        numbers=False,
    )
    micro_batch: int = field(
        0,
        "clips per process (with sequence_parallel: per group) in one forward pass, of `batch` per step; 0: all of its "
        "share",
        lo=0,
        hi=MOST_CLIPS,
        numbers=False,
    )
    fit: str = field(
        "refuse",
        "a stage that does not fit into memory by the planner's count; refuse, warn, or off: do not look",
        choices=("refuse", "warn", "off"),
        numbers=False,
    )
    timeout: float = field(
        1800,
        "engine=deepspeed: seconds after which a rank that waits for another gives up; after a third of them without "
        "progress the run ends and names the rank that the others wait for",
        above=0,
        numbers=False,
    )
    log_every: int = field(10, "steps between two lines of metrics.jsonl", lo=1, numbers=False)
    save_every: int = field(250, "steps between two checkpoints", lo=1, numbers=False)
    keep: int = field(2, "how many of the latest checkpoints stay on disk", lo=1, numbers=False)
    damaged: str = field(
        "previous",
        "when the newest checkpoint is damaged; previous: put it aside and continue from the one before; refuse: stop",
        choices=("previous", "refuse"),
        numbers=False,
    )
    keep_every: int = field(0, "besides them the checkpoints of every so many steps; 0: none", lo=0, numbers=False)
    sample_every: int = field(
        200,
        "steps between two sets of clips in samples/, and a last one at the end; 0: none",
        lo=0,
        numbers=False,
        everyday=True,
    )
    pipeline: str = field(
        "",
        "pipeline folder whose VAE shows the clips of a cache; empty: model, if it is one",
        numbers=False,
        everyday=True,
    )
    alarms: str = field(
        "warn",
        "drift of the clips, of the student's contrast, of the loss; warn; stop: end the run; off: do not look",
        choices=("warn", "stop", "off"),
        numbers=False,
    )
    tensorboard: bool = field(False, "log to RUN/stageN/tensorboard as well", numbers=False)
    wandb: str = field("", "log to this Weights & Biases project as well; empty: do not", numbers=False)
    trackio: str = field("", "log to this Trackio project as well; empty: do not", numbers=False)
    overwrite: bool = field(False, "start anew in a run folder that is in use", numbers=False, everyday=True)
    threads: int = field(0, THREADS, lo=0, hi=MOST_THREADS, numbers=False, everyday=True)
    progress: bool = field(True, "show a progress bar", numbers=False)
    dry_run: bool = field(False, DRY_RUN, numbers=False)

    @property
    def bounds(self) -> tuple[float, float]:
        """The times at which the trained network predicts."""
        return {"high": (self.boundary, 1.0), "low": (0.0, self.boundary)}.get(self.expert, (0.0, 1.0))

    def check(self) -> None:
        super().check()
        if self.fp8 != "off" and self.stage == "0":
            raise ConfigError(f"fp8={self.fp8}: stage=0 has gradients in all its predictions but clips; use fp8=off")
        if self.engine == "deepspeed" and self.offload == "all" and self.zero < 3:
            raise ConfigError(f"offload=all: weights can wait in host memory under zero=3 only, not zero={self.zero}")
        if self.engine == "local":
            for f in fields(Run):
                if f.name in ONE_PROCESS and (value := getattr(self, f.name)) != f.default:
                    raise ConfigError(f"{f.name}={show(value)}: engine=local {ONE_PROCESS[f.name]}")
