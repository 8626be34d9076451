"""The stages that a command runs, among them earlier ones whose results the run folder lacks, and their time."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastlightgen.config import (
    GPUS,
    command,
    compute_type,
    find_preset_weights,
    for_stage,
    keys_for,
    load,
    method_for,
    result_of,
    unset_type,
    with_type,
    words,
)
from fastlightgen.data.source import Batch, Source
from fastlightgen.engine import checkpoint
from fastlightgen.engine.scores import measured
from fastlightgen.models.cost import Network
from fastlightgen.models.families import network
from fastlightgen.models.folder.networks import trained_folder
from fastlightgen.models.folder.weights import load_model
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import say
from fastlightgen.planner.budget import budget, paper_efficiency
from fastlightgen.planner.fit import kind_of, plan_of
from fastlightgen.planner.step import undropped
from fastlightgen.planner.walk import Route, walk
from fastlightgen.stages.recovery import recovery
from fastlightgen.stages.start import require_fitting

LONGEST = 5.0  # seconds after which no further step is measured
STEPS = 3  # training steps whose median time gives the speed of this machine


def stages_of(cfg: Any) -> list[Any]:
    """The stages that the command runs, in order; raise if a later one cannot start from what an earlier one leaves."""
    if cfg.stage != "all":
        return [*missing(cfg), cfg]
    stages = [for_stage(cfg, n) for n in (1, 2, 3)]
    require_fitting(*stages[1:])
    return stages


def missing(cfg: Any) -> list[Any]:
    """The configurations of the stages to run before `cfg`, in order; raise if the key `earlier` refuses to run them.

    They have the keys of `cfg` that all stages share, and their own defaults.
    """
    before = chain(cfg)
    if before:
        trained_folder(cfg.model)  # a preset without weights is refused before any command is named
    shipped = find_preset_weights(cfg.model) is not None and cfg.data == "shapes"
    if before and not (cfg.earlier == "run" or (cfg.earlier == "auto" and shipped)):
        commands = " && ".join(command("train", **keys_for(cfg, one.stage)) for one in before)
        raise ValueError(
            f"{result_of(cfg.run, int(before[-1].stage))}: does not exist, and stage={cfg.stage} needs it; "
            f"first run: {commands} (earlier=run does it for you)"
        )
    return before


def chain(cfg: Any) -> list[Any]:
    stage = method_for(cfg).needs(cfg)
    results = [result_of(cfg.run, int(number)) for number in (cfg.stage, stage) if number]
    lacks = bool(stage) and not results[1].exists() and (cfg.overwrite or not results[0].exists())
    if not ranks.from_first(lacks):
        return []
    before = load(words(keys_for(cfg, stage)))
    if unset_type(cfg):
        before = with_type(before, cfg.dtype)
    return [*chain(before), before]


def announcement(stages: Sequence[Any], source: Source, device: torch.device) -> list[str]:
    """Say which stages run before the last one of `stages`, and how long all of them will take.

    The time is an estimate: the operations that the planner counts, at the speed of a training step of the teacher that
    is measured here and now. It leaves out the optimizer, checkpoints and clips.
    """
    *before, last = stages
    ratio = load(words(keys_for(last, "1"))).ratio
    speed = measured_speed(last, source, device)
    parts = [left(one) for one in stages]
    seconds = [operations(one, source, ratio) * part / speed for one, part in zip(stages, parts, strict=True)]
    names = " and ".join(f"stage {one.stage}" for one in before)
    first = "it runs" if len(before) == 1 else "they run"
    whole = [f"stage {one.stage}" for one in stages]
    rest = [f"the {part:.0%} of {name} that is left" if part < 1 else name for name, part in zip(whole, parts)]
    times = ", ".join(f"{span(s)} for {name}" for name, s in zip(rest, seconds, strict=True))
    return [
        f"stage {last.stage} needs {names}, which {last.run} lacks: {first} first (earlier=refuse: stop instead)",
        f"  {span(sum(seconds))} in all: {times}; estimated from the operations, at the {speed / 1e9:.3g} "
        "GFLOP/s that a training step reached just now",
    ]


def price(cfg: Any, source: Source, device: torch.device) -> list[str]:
    """Say how long a Stage I will take that makes clips or trains: much longer than a usual one."""
    works: list[tuple[str, Any, float]] = []
    if cfg.score == "frechet":
        works.append(
            (f"score=frechet: each candidate makes {cfg.clips} clips in {cfg.score_steps} steps", cfg, left(cfg))
        )
    if cfg.search == "calibrated":
        own = recovery(cfg, cfg.run)
        what = f"search=calibrated: then trains {cfg.candidates} candidates for {own.iters} steps each"
        works.append((what, own, float(cfg.candidates)))
    if not works:
        return []
    flops = [operations(one, source, cfg.ratio) * times for _, one, times in works]
    if (found := speed_of(cfg, source, device)) is None:
        return [f"{what}: {f / 1e15:.3g} PFLOP per process" for (what, *_), f in zip(works, flops, strict=True)]
    speed, how = found
    times = [f"{what}: {span(f / speed)}" for (what, *_), f in zip(works, flops, strict=True)]
    return [*times, f"  estimated from the operations, {sum(flops) / 1e15:.3g} PFLOP per process, at {how}"]


def left(cfg: Any) -> float:
    """The share of a stage that is still to do: it goes on from its saved scores, or from its last checkpoint."""
    folder = Path(cfg.run) / f"stage{cfg.stage}"
    if cfg.overwrite:
        return 1.0
    if cfg.stage == "1":
        known, total = measured(folder)
        return 1 - known / max(total, 1)
    done = [0, *checkpoint.steps(folder / "checkpoints")][-1]
    return max(0.0, 1 - done / cfg.iters)


def span(seconds: float) -> str:
    """A time in words, rounded: an estimate has no more digits."""
    if seconds < 10:
        return "less than 10 s"
    if seconds < 90:
        return f"about {5 * round(seconds / 5)} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def operations(cfg: Any, source: Source, ratio: float) -> float:
    """Floating-point operations of one process in a stage, if Stage I drops `ratio` of the blocks."""
    config, keep = method_for(cfg).subject(cfg, partial(undropped, ratio=ratio))
    planned = budget(cost_of(config, source.largest()), plan_of(cfg, ranks.size(), ranks.size(), "cpu"), keep)
    return planned.flops * planned.iters


def speed_of(cfg: Any, source: Source, device: torch.device) -> tuple[float, str] | None:
    """Operations per second of one process, and how that is known; None on a GPU whose peak is not known.

    On a GPU only the built-in world's small networks are measured: a step of a released network, without the settings
    of its recipe, can need more memory than there is.
    """
    if device.type == "cpu" or "world" in source.description:
        speed = measured_speed(cfg, source, device)
        return speed, f"the {speed / 1e9:.3g} GFLOP/s that a training step reached just now"
    if (kind := kind_of(device)) is None:
        return None
    share, dtype = paper_efficiency(), compute_type(cfg.dtype, gpu=True, real=True)
    return share * getattr(GPUS[kind], dtype), f"{share:.1%} of the GPU's peak, not measured here"


def measured_speed(cfg: Any, source: Source, device: torch.device) -> float:
    """Operations per second of one process in a training step (forward and backward pass) of the teacher."""
    say("measuring how fast a training step is here ...")
    clips = max(1, cfg.batch * cfg.sequence_parallel // ranks.size())
    net, batch = load_model(trained_folder(cfg.model), device), source.batch(0, clips).to(device)
    seconds: list[float] = []
    for _ in range(1 + STEPS):
        if sum(seconds) > LONGEST:
            break
        start = time.perf_counter()
        net(batch.x0, torch.full((clips,), 0.5, device=device), batch.cond).square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    counted = walk(cost_of(net.config, batch), [Route(grad=True)]).flops  # of one clip
    return clips * counted / median(seconds[1:] or seconds)  # the first step also warms up


def cost_of(config: dict[str, Any], batch: Batch) -> Network:
    frames, height, width = batch.x0.shape[2:]
    return network(config, (frames, height, width), batch.cond.text.shape[1])
