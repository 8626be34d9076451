"""Stage I for `train`: the sweep, the ranking and its plot; for search=calibrated a short Stage II per candidate."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fastlightgen.atomic import write_json
from fastlightgen.config import Run, StageConfig, method_for, result_of
from fastlightgen.data.source import Source
from fastlightgen.engine.folder import StageFolder
from fastlightgen.engine.hang import HangWatch
from fastlightgen.engine.local import LocalEngine, pick_device
from fastlightgen.engine.loop import Engine, interruptible
from fastlightgen.engine.scores import Scores
from fastlightgen.metrics.frechet import features
from fastlightgen.metrics.importance import plot_importance
from fastlightgen.metrics.latent import latent_features
from fastlightgen.models.folder.weights import read_card
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import say
from fastlightgen.planner.fit import check_fit
from fastlightgen.stages.build import Builder
from fastlightgen.stages.earlier import price
from fastlightgen.stages.rank import Config as RankConfig
from fastlightgen.stages.rank import rank
from fastlightgen.stages.recovery import calibrate, recovery
from fastlightgen.stages.scores import held_out_error
from fastlightgen.world.codec import Codec
from fastlightgen.world.shapes import WORLD


def rank_blocks(cfg: RankConfig, source: Source, folder: StageFolder, run_stage: Callable[[Any], None]) -> None:
    """Run Stage I and write importance.json and its plot; `run_stage` runs the Stage II of a recovery."""
    device = pick_device(cfg.device)
    for line in price(cfg, source, device):
        say(line)
    if cfg.search == "calibrated":
        check_fit(recovery(cfg, folder.path), source, device, cfg.ratio)
    scores, found = swept(cfg, source, folder)
    record = {"model": cfg.model, "data_hash": source.name, **made_on(cfg)} | found
    if cfg.search == "calibrated":
        record = calibrate(cfg, record, folder.path, scores.sweep, partial(recovered_error, source, run_stage))
    if ranks.rank():
        return
    plot_importance(record, folder.path / "importance.png")
    write_json(folder.result, record)
    scores.clear()
    say(f"stage 1: keeps blocks {record['kept']}, drops {record['pruned']}: {folder.result}")


def swept(cfg: Any, source: Source, folder: StageFolder) -> tuple[Scores, dict[str, Any]]:
    """Score the blocks. The network is gone afterwards: search=calibrated needs its memory."""
    engine = make_engine(cfg, pick_device(cfg.device))
    with_ = Builder(cfg, source, engine.device, engine.place)
    model, costs = method_for(cfg).build(cfg, with_)
    with HangWatch(cfg.timeout, 1):
        engine.place(model)
        if cfg.engine == "deepspeed":
            with_.check_teacher(model)
        with interruptible() as signals:
            scores = Scores(folder, source.name, signals, cfg.overwrite, cfg.progress)
            return scores, rank(cfg, model, with_.batches, costs, scores.sweep, features_of(source))


def recovered_error(source: Source, run_stage: Callable[[Any], None], cfg: Any, keep: Sequence[int]) -> float:
    """Run a short Stage II, and return the x0 error of its pruned path on held-out clips."""
    run_stage(cfg)
    engine = make_engine(cfg, pick_device(cfg.device))
    with_ = Builder(cfg, source, engine.device, engine.place)
    result = result_of(cfg.run, 2)
    net = with_.load(result).requires_grad_(False)
    with_.read_guidance(cfg.teacher_guidance, net, read_card(result))
    engine.place(net)
    return held_out_error(net, with_.held_out(), cfg, keep)


def features_of(source: Source) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what measures clips from their latents: in pixels if the source has a codec, else in the latents."""
    return (lambda x0: features(Codec().decode(x0))) if source.name == "shapes" else latent_features


def make_engine(cfg: StageConfig, device: torch.device) -> Engine:
    """Create the engine that the configuration names."""
    if cfg.engine == "local":
        return LocalEngine(device, cfg.dtype, cfg.batch, cfg.micro_batch if int(cfg.stage) != 1 else 0)
    from fastlightgen.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(device, cfg)


def made_on(cfg: Run) -> dict[str, int]:
    """Return the version of the built-in world, on which a stage's results depend; {} with data=CACHE."""
    return {"world": WORLD} if cfg.data == "shapes" else {}
