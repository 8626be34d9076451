"""Every key of the commands that measure pipelines: speed and vbench."""

from dataclasses import dataclass

from fastlightgen.config.fields import REQUIRED, Checked, ConfigError, field
from fastlightgen.config.limits import MOST_CLIPS, MOST_STEPS, MOST_THREADS, parse_size
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


@dataclass(kw_only=True)
class Speed(Checked):
    """time clips of a pipeline by part, also against stock diffusers"""

    model: str = field(REQUIRED, "a pipeline folder, or a model folder with pipeline=", everyday=True)
    pipeline: str = field("", "pipeline folder with VAE and encoders for a model folder", everyday=True)
    teacher: str = field("", "a pipeline or model folder to compare with; empty: none", everyday=True)
    stock: bool = field(True, "also time diffusers' own pipeline with the same weights", everyday=True)
    out: str = field("", "JSON file to write; empty: none", everyday=True)
    prompt: str = field("", "what the clips show; empty: a cat")
    image: str = field("", "picture to start from; empty: a random one, which takes as long")
    size: str = field("", f"{SIZE}, for example 480x832x81; empty: the family's own", everyday=True)
    steps: int = field(0, STEPS, lo=0, hi=MOST_STEPS, everyday=True)
    guidance: float = field(-1.0, GUIDANCE, everyday=True)
    turns: int = field(3, "clips of each that count, after one that does not", lo=1, hi=MOST_CLIPS, everyday=True)
    allow_pt: bool = field(False, ALLOW_PT)
    seed: int = field(0, "decides the noise", lo=0, hi=MAX_SEED)
    device: str = field("auto", DEVICE, choices=DEVICES, everyday=True)
    dtype: str = field("auto", DTYPE, choices=DTYPES)
    threads: int = field(0, THREADS, lo=0, hi=MOST_THREADS)
    progress: bool = field(True, "show a progress bar")
    dry_run: bool = field(False, DRY_RUN)

    def check(self) -> None:
        if self.size:
            parse_size(self.size)


@dataclass(kw_only=True)
class VBench(Checked):
    """VBench-I2V: write its videos, start it, print the averages"""

    prompts: str = field(REQUIRED, "VBench's vbench2_beta_i2v/vbench2_i2v_full_info.json", everyday=True)
    out: str = field(REQUIRED, "folder for videos and results; an interrupted one is continued", everyday=True)
    model: str = field("", "a model folder or a pipeline folder; empty: write no videos", everyday=True)
    pipeline: str = field("", "pipeline folder with VAE and encoders for a model folder", everyday=True)
    images: str = field("", "folder of VBench's pictures of one ratio, data/crop/16-9", everyday=True)
    dimensions: str = field(
        "papers",
        "papers: the 7 that the papers average (355 prompts); total: also the 3 of VBench's total (763 more)",
        choices=("papers", "total"),
        everyday=True,
    )
    ratio: str = field("16-9", "ratio of the pictures", choices=("1-1", "8-5", "7-4", "16-9"), everyday=True)
    samples: int = field(5, "videos per prompt; VBench expects 5", lo=1, hi=5, everyday=True)
    vbench: str = field("", "folder of a checkout of VBench, with its pictures", everyday=True)
    python: str = field("", "python of VBench's environment; empty: print how to start it", everyday=True)
    allow_pt: bool = field(False, ALLOW_PT)
    negative: str = field("", "prompt to steer away from, where guidance is not 1")
    size: str = field("", f"{SIZE}, for example 480x832x81; empty: the family's own", everyday=True)
    steps: int = field(0, STEPS, lo=0, hi=MOST_STEPS, everyday=True)
    guidance: float = field(-1.0, GUIDANCE, everyday=True)
    sampler: str = field("auto", SAMPLER, choices=SAMPLERS)
    force: bool = field(False, FORCE)
    seed: int = field(0, "decides the noise", lo=0, hi=MAX_SEED - 10_000, everyday=True)
    rank: int = field(
        -1, "number of this process, of `ranks` that share the videos; -1: one process", lo=-1, hi=MOST_CLIPS
    )
    ranks: int = field(0, "processes that share the videos; 0: one", lo=0, hi=MOST_CLIPS)
    device: str = field("auto", DEVICE, choices=DEVICES, everyday=True)
    dtype: str = field("auto", DTYPE, choices=DTYPES)
    threads: int = field(0, THREADS, lo=0, hi=MOST_THREADS)
    progress: bool = field(True, "show a progress bar")
    dry_run: bool = field(False, DRY_RUN)

    def check(self) -> None:
        if self.model and not self.images:
            raise ConfigError("images is required with model=: give images=FOLDER, VBench's data/crop/16-9")
        if self.python and not self.vbench:
            raise ConfigError("vbench is required with python=: give vbench=FOLDER, a checkout of VBench")
        if (self.rank >= 0) != (self.ranks > 0) or (self.ranks and self.rank >= self.ranks):
            raise ConfigError(f"rank={self.rank}, ranks={self.ranks}: give both or neither, rank from 0 to ranks - 1")
        if self.size:
            parse_size(self.size)
