"""Every key of the commands beside `train` and `plan`: name, type, default, range and meaning."""

from dataclasses import asdict, dataclass
from typing import Any

from fastlightgen.config.exporting import Export
from fastlightgen.config.fields import REQUIRED, Checked, ConfigError, clipped, field, show
from fastlightgen.config.limits import (
    MOST_CLIPS,
    MOST_FPS,
    MOST_FRAMES,
    MOST_STEPS,
    MOST_THREADS,
    MOST_WORKERS,
    parse_size,
    sides,
)
from fastlightgen.config.measuring import Speed, VBench
from fastlightgen.config.run import (
    ALLOW_PT,
    DEVICE,
    DEVICES,
    DRY_RUN,
    DTYPE,
    DTYPES,
    FORCE,
    GUIDANCE,
    MAX_SEED,
    SAMPLER,
    SAMPLERS,
    SIZE,
    STEPS,
    THREADS,
)

# Keys of `evaluate` that the other kind of evaluation does not read.
OF_MODELS = ("teacher", "path", "allow_pt", "data", "clips", "batch", "steps", "guidance", "sampler", "noises", "force")
OF_VIDEOS = ("size", "fps", "i3d", "torchscript")


@dataclass(kw_only=True)
class EvaluateKeys(Checked):
    """Keys of an evaluation, alone or at the end of stage=all."""

    clips: int = field(
        128, "held-out clips; more of them rank closer models", lo=1, hi=MOST_CLIPS, numbers=False, everyday=True
    )
    batch: int = field(64, "clips per network call", lo=1, hi=MOST_CLIPS, numbers=False)
    steps: int = field(0, STEPS, lo=0, hi=MOST_STEPS, numbers=False, everyday=True)
    guidance: float = field(-1.0, GUIDANCE, numbers=False, everyday=True)
    sampler: str = field("auto", SAMPLER, choices=SAMPLERS, numbers=False)
    show: int = field(8, "clips kept for the report", lo=0, hi=1_000, numbers=False)
    noises: int = field(
        1, "clips per caption, of `clips` more, to measure diversity; 1: do not", lo=1, hi=MOST_CLIPS, numbers=False
    )
    seed: int = field(0, "decides held-out clips, reference and noise", lo=0, hi=MAX_SEED, numbers=False, everyday=True)

    def check(self) -> None:
        if self.clips < self.noises:
            raise ConfigError(f"noises={self.noises}: wanted at most clips={self.clips}; raise clips=")


@dataclass(kw_only=True)
class Evaluate(EvaluateKeys):
    """measure a model or any videos: quality, speed, size"""

    model: str = field("", "a preset or a model folder; empty: measure `videos` instead", everyday=True)
    out: str = field(REQUIRED, "JSON file to write", everyday=True)
    teacher: str = field("", "model folder to compare with; empty: none", everyday=True)
    videos: str = field("", "instead of model: a folder of videos, or a .csv or .jsonl list", everyday=True)
    real: str = field("", "real videos that `videos` are compared with: a folder or a list", everyday=True)
    size: str = field("", f"clips of `videos` and `real`, as {SIZE}; empty: those of the first video")
    fps: float = field(0.0, "frames per second of these clips; 0: those of the first video", lo=0)
    i3d: str = field("", "weights of I3D as safetensors, for FVD of these clips; empty: none")
    torchscript: str = field(
        "",
        "a TorchScript program that gives features of these clips, such as FVD's I3D; it is executed: trust its maker",
    )
    path: str = field("full", "which blocks of a Stage II model run", choices=("full", "pruned"))
    force: bool = field(False, FORCE)
    allow_pt: bool = field(False, ALLOW_PT)
    data: str = field("shapes", "a preset, or a folder with a latent cache", everyday=True)
    device: str = field("auto", DEVICE, choices=DEVICES, everyday=True)
    threads: int = field(0, THREADS, lo=0, hi=MOST_THREADS)
    progress: bool = field(True, "show a progress bar")
    dry_run: bool = field(False, DRY_RUN)

    def check(self) -> None:
        super().check()
        if self.model and self.videos:
            raise ConfigError(f"model={self.model} videos={self.videos}: give one of them, not both")
        if not self.model and not self.videos:
            raise ConfigError(
                "model is required (a preset or a model folder): give model=..., or videos=FOLDER and real=FOLDER"
            )
        if bool(self.videos) != bool(self.real):
            raise ConfigError(f"videos={self.videos} real={self.real}: give both, the videos to measure and real ones")
        for key in OF_MODELS if self.videos else OF_VIDEOS:
            if getattr(self, key) != self.__dataclass_fields__[key].default:
                other = "videos" if self.videos else "model"
                raise ConfigError(f"{key}={show(getattr(self, key))}: means nothing with {other}=; leave it out")
        if self.i3d and self.torchscript:
            raise ConfigError(f"i3d={self.i3d} torchscript={self.torchscript}: give one of them")
        if self.size:
            parse_size(self.size)


@dataclass(kw_only=True)
class Generate(Checked):
    """sample clips from a prompt"""

    model: str = field(REQUIRED, "a preset, a model folder or a pipeline folder", everyday=True)
    allow_pt: bool = field(False, ALLOW_PT)
    prompt: str = field("", "what the clip shows", everyday=True)
    prompts: str = field(
        "", "instead of prompt: a file with one per line, or .jsonl with prompt and image; out-000 ...", everyday=True
    )
    out: str = field(REQUIRED, "file to write: .mp4, .gif or .png", everyday=True)
    pipeline: str = field(
        "", "pipeline folder with VAE and encoders for a model folder; empty: the built-in world", everyday=True
    )
    vae: str = field(
        "",
        "what decodes in place of the pipeline's VAE: a folder that stage=decoder wrote, or a file in TAEHV's layout",
        everyday=True,
    )
    image: str = field("", "picture to start from; empty: text only", everyday=True)
    negative: str = field(
        "",
        "prompt to steer away from, where guidance is not 1; official: the one that the model's authors publish",
        everyday=True,
    )
    size: str = field("", f"{SIZE}, for example 480x832x81; empty: the family's own", everyday=True)
    count: int = field(1, "number of clips", lo=1, hi=1_000, everyday=True)
    steps: int = field(0, STEPS, lo=0, hi=MOST_STEPS, everyday=True)
    guidance: float = field(-1.0, GUIDANCE, everyday=True)
    sampler: str = field("auto", SAMPLER, choices=SAMPLERS)
    force: bool = field(False, FORCE)
    seed: int = field(0, "decides the noise", lo=0, hi=MAX_SEED, everyday=True)
    device: str = field("auto", DEVICE, choices=DEVICES, everyday=True)
    dtype: str = field("auto", DTYPE, choices=DTYPES)
    threads: int = field(0, THREADS, lo=0, hi=MOST_THREADS)
    progress: bool = field(True, "show a progress bar")
    dry_run: bool = field(False, DRY_RUN)

    def check(self) -> None:
        if bool(self.prompt) == bool(self.prompts):
            raise ConfigError("prompt is required: give prompt=TEXT or prompts=FILE, one of them")


@dataclass(kw_only=True)
class Encode(Checked):
    """turn videos and captions into a latent cache"""

    videos: str = field(
        REQUIRED,
        "a .csv or .jsonl list of clips, or a folder of videos with a list or NAME.txt captions",
        everyday=True,
    )
    pipeline: str = field(
        REQUIRED, "folder of a diffusers pipeline, whose VAE, text and image encoders are used", everyday=True
    )
    out: str = field(
        REQUIRED, "folder of the cache; an interrupted one is continued, new clips are added", everyday=True
    )
    buckets: str = field(
        "", "sizes that clips are cropped to, as [480x832,832x480]; empty: the pipeline's own", everyday=True
    )
    frames: int = field(
        0,
        "frames per clip, for Wan and HunyuanVideo 4 k + 1; 0: the pipeline's own, 81 to 129",
        lo=0,
        hi=MOST_FRAMES,
        everyday=True,
    )
    fps: float = field(
        0.0,
        "frames per second; 0: the pipeline's own, 16 for Wan2.1, else 24",
        lo=0,
        hi=MOST_FPS,
        everyday=True,
    )
    min_dover: float = field(80.0, "lists with a column dover: skip the clips whose score is below this")
    null_prompt: str = field("", "prompt of the null prediction, which guidance needs", everyday=True)
    first_frame: bool = field(False, "Wan2.2 TI2V: store each clip's first frame as given, for image-to-video")
    dtype: str = field("bfloat16", "type that text encoders compute in", choices=("bfloat16", "float32"))
    save_dtype: str = field("float16", "type of saved latents", choices=("float16", "bfloat16", "float32"))
    tiling: bool = field(False, "VAE in overlapping tiles: less memory, slightly other latents")
    shard: int = field(16, "clips per file; an interruption costs at most one file's work", lo=1, hi=MOST_CLIPS)
    workers: int = field(2, "processes that decode videos; 0: none beside this one", lo=0, hi=MOST_WORKERS)
    rank: int = field(
        -1, "number of this process, of `ranks` that share the work; -1: RANK of torchrun, or 0", lo=-1, hi=MOST_CLIPS
    )
    ranks: int = field(0, "processes that share the work; 0: WORLD_SIZE of torchrun, or 1", lo=0, hi=MOST_CLIPS)
    device: str = field("auto", DEVICE, choices=DEVICES, everyday=True)
    threads: int = field(0, THREADS, lo=0, hi=MOST_THREADS)
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
    sizes = [sides("buckets", part) for part in text.strip("[] ").split(",") if part.strip()]
    if not all(len(size) == 2 for size in sizes):
        raise ConfigError(f"buckets={clipped(text)}: wanted HEIGHTxWIDTH, for example [480x832,832x480]")
    return [(height, width) for height, width in sizes]


@dataclass(kw_only=True)
class Report(Checked):
    """write one self-contained HTML page about a run"""

    run: str = field("", "run folder", everyday=True)
    runs: str = field("", "instead of run: folders to compare, with commas between them", everyday=True)
    out: str = field("", "HTML file to write; empty: RUN/report.html, or runs.html", everyday=True)
    dry_run: bool = field(False, DRY_RUN)

    def check(self) -> None:
        if not (self.run or self.runs):
            raise ConfigError("run is required: give run=DIR, or runs=A,B to compare several")
        if self.run and self.runs:
            raise ConfigError(f"run={self.run}: give run= or runs=, one of them")
        folders = [name.strip().rstrip("/") for name in self.runs.split(",") if name.strip()]
        if self.runs and not (2 <= len(folders) <= 8 and len(set(folders)) == len(folders)):
            raise ConfigError(f"runs={self.runs}: wanted 2 to 8 different folders with commas between them")


COMMANDS = {
    "generate": Generate,
    "encode": Encode,
    "export": Export,
    "evaluate": Evaluate,
    "report": Report,
    "speed": Speed,
    "vbench": VBench,
}


def for_evaluate(cfg: Any, model: str, teacher: str, out: str) -> Evaluate:
    """The evaluation that ends `stage=all`; its seed is evaluate.seed, so that runs of any seed meet the same clips."""
    common = {key: getattr(cfg, key) for key in ("data", "device", "threads", "progress", "allow_pt")}
    return Evaluate(model=model, teacher=teacher, out=out, force=True, **common, **asdict(cfg.evaluate))
