"""Every key of the commands beside `train`: name, type, default, range and meaning."""
# ruff: noqa: RUF009  `field` is dataclasses.field with checks: lists come from a default_factory

from dataclasses import asdict, dataclass

from fastlightgen.config.fields import REQUIRED, Checked, field
from fastlightgen.config.schema import (
    DEVICE,
    DEVICES,
    DRY_RUN,
    GUIDANCE,
    MAX_SEED,
    SAMPLER,
    SAMPLERS,
    STEPS,
    THREADS,
    EvaluateKeys,
    StageAll,
)


@dataclass(kw_only=True)
class Evaluate(EvaluateKeys):
    """measure a model: quality, speed, size"""

    model: str = field(REQUIRED, "a preset or a model folder")
    out: str = field(REQUIRED, "JSON file to write")
    teacher: str = field("", "model folder to compare with; empty: none")
    path: str = field("full", "which blocks of a Stage II model run", choices=("full", "pruned"))
    data: str = field("shapes", "a preset, or a folder with a latent cache")
    seed: int = field(0, "decides clips and noise", lo=0, hi=MAX_SEED)
    device: str = field("auto", DEVICE, choices=DEVICES)
    threads: int = field(0, THREADS, lo=0)
    progress: bool = field(True, "show a progress bar")
    dry_run: bool = field(False, DRY_RUN)


@dataclass(kw_only=True)
class Generate(Checked):
    """sample clips from a prompt"""

    model: str = field(REQUIRED, "a preset or a model folder")
    prompt: str = field(REQUIRED, "what the clip shows")
    out: str = field(REQUIRED, "file to write: .mp4, .gif or .png")
    image: str = field("", "picture to start from; empty: text only")
    count: int = field(1, "number of clips", lo=1)
    steps: int = field(0, STEPS, lo=0)
    guidance: float = field(-1.0, GUIDANCE)
    sampler: str = field("auto", SAMPLER, choices=SAMPLERS)
    seed: int = field(0, "decides the noise", lo=0, hi=MAX_SEED)
    device: str = field("auto", DEVICE, choices=DEVICES)
    threads: int = field(0, THREADS, lo=0)
    dry_run: bool = field(False, DRY_RUN)


@dataclass(kw_only=True)
class Report(Checked):
    """write one self-contained HTML page about a run"""

    run: str = field(REQUIRED, "run folder")
    out: str = field("", "HTML file to write; empty: RUN/report.html")
    dry_run: bool = field(False, DRY_RUN)


COMMANDS = {"generate": Generate, "evaluate": Evaluate, "report": Report}


def for_evaluate(cfg: StageAll, model: str, teacher: str, out: str) -> Evaluate:
    """The evaluation that ends `stage=all`."""
    common = {key: getattr(cfg, key) for key in ("data", "seed", "device", "threads", "progress")}
    return Evaluate(model=model, teacher=teacher, out=out, **common, **asdict(cfg.evaluate))
