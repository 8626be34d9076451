"""Every key of the commands beside `train`: name, type, default, range and meaning."""
# ruff: noqa: RUF009  `field` is dataclasses.field with checks: lists come from a default_factory

from dataclasses import asdict, dataclass

from fastlightgen.config.fields import REQUIRED, Checked, ConfigError, field
from fastlightgen.config.run import (
    ALLOW_PT,
    DEVICE,
    DEVICES,
    DRY_RUN,
    GUIDANCE,
    MAX_SEED,
    SAMPLER,
    SAMPLERS,
    STEPS,
    THREADS,
)
from fastlightgen.config.schema import EvaluateKeys, StageAll


@dataclass(kw_only=True)
class Evaluate(EvaluateKeys):
    """measure a model: quality, speed, size"""

    model: str = field(REQUIRED, "a preset or a model folder")
    out: str = field(REQUIRED, "JSON file to write")
    teacher: str = field("", "model folder to compare with; empty: none")
    path: str = field("full", "which blocks of a Stage II model run", choices=("full", "pruned"))
    allow_pt: bool = field(False, ALLOW_PT)
    data: str = field("shapes", "a preset, or a folder with a latent cache")
    seed: int = field(0, "decides clips and noise", lo=0, hi=MAX_SEED)
    device: str = field("auto", DEVICE, choices=DEVICES)
    threads: int = field(0, THREADS, lo=0)
    progress: bool = field(True, "show a progress bar")
    dry_run: bool = field(False, DRY_RUN)


@dataclass(kw_only=True)
class Generate(Checked):
    """sample clips from a prompt"""

    model: str = field(REQUIRED, "a preset, a model folder or a pipeline folder")
    allow_pt: bool = field(False, ALLOW_PT)
    prompt: str = field("", "what the clip shows")
    prompts: str = field(
        "", "instead of prompt: a file with one per line, or .jsonl with prompt and image; out-000 ..."
    )
    out: str = field(REQUIRED, "file to write: .mp4, .gif or .png")
    pipeline: str = field("", "pipeline folder with VAE and encoders for a model folder; empty: the built-in world")
    image: str = field("", "picture to start from; empty: text only")
    negative: str = field("", "prompt to steer away from, where guidance is not 1")
    size: str = field("", "HEIGHTxWIDTHxFRAMES, for example 480x832x81; empty: the family's own")
    count: int = field(1, "number of clips", lo=1)
    steps: int = field(0, STEPS, lo=0)
    guidance: float = field(-1.0, GUIDANCE)
    sampler: str = field("auto", SAMPLER, choices=SAMPLERS)
    seed: int = field(0, "decides the noise", lo=0, hi=MAX_SEED)
    device: str = field("auto", DEVICE, choices=DEVICES)
    dtype: str = field("auto", "auto: bfloat16 for a real network on a GPU", choices=("auto", "float32", "bfloat16"))
    threads: int = field(0, THREADS, lo=0)
    progress: bool = field(True, "show a progress bar")
    dry_run: bool = field(False, DRY_RUN)

    def check(self) -> None:
        if bool(self.prompt) == bool(self.prompts):
            raise ConfigError("prompt is required: give prompt=TEXT or prompts=FILE, one of them")


@dataclass(kw_only=True)
class Export(Checked):
    """write a pipeline folder that stock diffusers loads"""

    model: str = field(REQUIRED, "a model folder")
    pipeline: str = field(REQUIRED, "pipeline folder of the teacher: VAE, encoders and tokenizers come from it")
    out: str = field(REQUIRED, "folder to write")
    dtype: str = field("bfloat16", "type of the written network", choices=("bfloat16", "float32"))
    link: bool = field(False, "link the parts that stay as they are instead of copying them")
    lora: str = field("", "LoRA file trained on the teacher, to renumber for the model; empty: none")
    original: bool = field(False, "also write the network in the format of the family's original repository")
    threads: int = field(0, THREADS, lo=0)
    progress: bool = field(True, "show a progress bar")
    dry_run: bool = field(False, DRY_RUN)


@dataclass(kw_only=True)
class Encode(Checked):
    """turn videos and captions into a latent cache"""

    videos: str = field(REQUIRED, "folder of videos with NAME.txt captions, or a .csv or .jsonl list of clips")
    pipeline: str = field(REQUIRED, "folder of a diffusers pipeline, whose VAE, text and image encoders are used")
    out: str = field(REQUIRED, "folder of the cache; an interrupted one is continued")
    buckets: str = field("", "sizes that clips are cropped to, as [480x832,832x480]; empty: the pipeline's own")
    frames: int = field(0, "frames per clip, for Wan and HunyuanVideo 4 k + 1; 0: the pipeline's own, 81 or 129", lo=0)
    fps: float = field(0.0, "frames per second; 0: the pipeline's own, 16 for Wan, 24 for HunyuanVideo", lo=0)
    min_dover: float = field(80.0, "lists with a column dover: skip the clips whose score is below this")
    null_prompt: str = field("", "prompt of the null prediction, which guidance needs")
    dtype: str = field("bfloat16", "type that text encoders compute in", choices=("bfloat16", "float32"))
    save_dtype: str = field("float16", "type of saved latents", choices=("float16", "bfloat16", "float32"))
    tiling: bool = field(False, "VAE in overlapping tiles: less memory, slightly other latents")
    shard: int = field(16, "clips per file; an interruption costs at most one file's work", lo=1)
    workers: int = field(2, "processes that decode videos; 0: none beside this one", lo=0)
    rank: int = field(-1, "number of this process, of `ranks` that share the work; -1: RANK of torchrun, or 0", lo=-1)
    ranks: int = field(0, "processes that share the work; 0: WORLD_SIZE of torchrun, or 1", lo=0)
    device: str = field("auto", DEVICE, choices=DEVICES)
    threads: int = field(0, THREADS, lo=0)
    progress: bool = field(True, "show a progress bar")
    dry_run: bool = field(False, DRY_RUN)

    def check(self) -> None:
        if self.ranks and self.rank >= self.ranks:
            raise ConfigError(f"rank={self.rank}: with ranks={self.ranks} the ranks are 0 to {self.ranks - 1}")
        if (self.rank >= 0) != (self.ranks > 0):
            raise ConfigError(f"rank={self.rank}, ranks={self.ranks}: give both, or neither")
        parse_buckets(self.buckets)


def parse_buckets(text: str) -> list[tuple[int, int]]:
    """ "[480x832,832x480]" as [(480, 832), (832, 480)], heights first."""
    sizes = [part.strip().split("x") for part in text.strip("[] ").split(",") if part.strip()]
    if not all(len(size) == 2 and all(n.isdecimal() and int(n) for n in size) for size in sizes):
        raise ConfigError(f"buckets={text}: wanted HEIGHTxWIDTH, for example [480x832,832x480]")
    return [(int(height), int(width)) for height, width in sizes]


@dataclass(kw_only=True)
class Report(Checked):
    """write one self-contained HTML page about a run"""

    run: str = field(REQUIRED, "run folder")
    out: str = field("", "HTML file to write; empty: RUN/report.html")
    dry_run: bool = field(False, DRY_RUN)


GPUS = ("h100-80gb", "h200", "a100-80gb", "4090")


@dataclass(kw_only=True)
class Plan(Checked):
    """what a run needs in memory, operations, traffic and time, by arithmetic, before anything is started"""

    model: str = field("wan2.1-i2v-14b", "a preset or a model folder")
    stage: str = field("3", "which stage to plan", choices=("0", "1", "2", "3"))
    size: str = field("480x832x81", "height x width x frames of the clips, in pixels")
    text_tokens: int = field(0, "tokens of a prompt; 0: what the family is used with", lo=0)
    gpu: str = field("h100-80gb", "kind of GPU; cpu: processes on a CPU in place of GPUs", choices=(*GPUS, "cpu"))
    gpus: int = field(16, "GPUs in all", lo=1)
    gpus_per_node: int = field(8, "GPUs in one host", lo=1)
    engine: str = field(
        "deepspeed",
        "deepspeed: bfloat16 weights, float32 master weights; local: one process, float32 weights",
        choices=("deepspeed", "local"),
    )
    dtype: str = field("bfloat16", "type the networks compute in", choices=("bfloat16", "float32"))
    zero: int = field(3, "what DeepSpeed shards: 1 optimizer states, 2 and gradients, 3 and weights", lo=0, hi=3)
    offload: str = field("none", "what waits in host memory", choices=("none", "optimizer", "all"))
    sequence_parallel: int = field(1, "GPUs that share one clip's tokens; a divisor of the heads", lo=1)
    batch: int = field(1, "clips per GPU (with sequence_parallel: per group) and micro-batch", lo=1)
    accumulation: int = field(1, "micro-batches per optimizer step", lo=1)
    checkpointing: bool = field(True, "keep one hidden tensor per block, compute the rest again in the backward pass")
    keep_attention: int = field(0, "checkpointing: blocks that keep their self-attention outputs", lo=0)
    previews: bool = field(True, "a pipeline's VAE shows clips during training (pipeline= and sample_every= of train)")
    ema: float = field(0.0, "stages 0 and 3: decay of the averaged weights; 0 keeps no average", lo=0, below=1)
    iters: int = field(0, "iterations; 0: the stage's default, in stage 1 what its clips and timesteps need", lo=0)
    efficiency: float = field(
        0.0, "share of the GPU's peak that the run reaches; 0: what the paper's figures imply", lo=0, hi=1
    )
    ratio: float = field(0.3, "share of the blocks that is dropped", above=0, below=1)
    prefix: int = field(-1, "first dropped block (they are taken to be adjacent); -1: in the middle", lo=-1)
    clips: int = field(64, "stage 1: clips of the evaluation set", lo=1)
    timesteps: int = field(8, "stage 1: times per clip", lo=1)
    memory: float = field(4.0, "stage 1: GiB for the hidden states of candidates that are walked together", above=0)
    alpha: float = field(1.0, "stage 2: weight of distillation", lo=0, hi=1)
    target: str = field("frozen", "stage 2: what both paths follow", choices=("frozen", "self", "ema"))
    kappa_unpruned: float = field(1.0, "stage 2: weight of the unpruned path's distance to the target", lo=0)
    estimator: str = field("full", "stage 2: both paths every step, or one by a coin", choices=("full", "sampled"))
    p: float = field(0.5, "stage 2, estimator=sampled: probability of the pruned path", above=0, below=1)
    steps: int = field(4, "stage 3: sampling steps of the student", lo=1, hi=8)
    rollout: str = field("simulate", "stage 3: the generator's inputs", choices=("simulate", "data"))
    critics: int = field(5, "stage 3: critic updates per generator update", lo=1)
    count: str = field("outer", "stage 3: what iters counts", choices=("outer", "generator"))
    fake_arch: str = field("pruned", "stage 3: blocks of the critic", choices=("pruned", "full"))
    fake_mode: str = field("copy", "stage 3: the critic's weights", choices=("copy", "lora"))
    lora_rank: int = field(16, "stage 3, fake_mode=lora: rank", lo=1)
    strong: str = field("stage2", "stage 3: the strong teacher in Eq. 9", choices=("stage2", "original"))
    table: bool = field(False, "instead: what fits on each kind of GPU, for every preset and stage")
    out: str = field("", "JSON file to write as well; empty: none")
    dry_run: bool = field(False, DRY_RUN)

    def check(self) -> None:
        if self.engine == "local" and self.gpus > 1:
            raise ConfigError(f"gpus={self.gpus}: engine=local is one process; use gpus=1 or engine=deepspeed")
        if self.engine == "deepspeed" and self.offload == "optimizer" and self.zero == 0:
            raise ConfigError("offload=optimizer: needs sharded optimizer states; use zero=1 or more")
        if self.engine == "deepspeed" and self.offload == "all" and self.zero < 3:
            raise ConfigError(f"offload=all: weights can wait in host memory under zero=3 only, not zero={self.zero}")
        if self.engine == "local" and self.offload != "none":
            raise ConfigError(f"offload={self.offload}: engine=local keeps everything on its device; use offload=none")
        if self.gpus % self.sequence_parallel:
            raise ConfigError(
                f"sequence_parallel={self.sequence_parallel}: gpus={self.gpus} is not a multiple of it; change one"
            )


COMMANDS = {
    "generate": Generate,
    "encode": Encode,
    "export": Export,
    "evaluate": Evaluate,
    "report": Report,
    "plan": Plan,
}


def for_evaluate(cfg: StageAll, model: str, teacher: str, out: str) -> Evaluate:
    """The evaluation that ends `stage=all`."""
    common = {key: getattr(cfg, key) for key in ("data", "seed", "device", "threads", "progress", "allow_pt")}
    return Evaluate(model=model, teacher=teacher, out=out, **common, **asdict(cfg.evaluate))
