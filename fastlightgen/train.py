"""python -m fastlightgen.train stage=0|1|2|3|all|decoder run=DIR ...: train or continue one stage, or all of them."""

import os
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastlightgen.config import (
    EXPERTS,
    StageConfig,
    after_stage,
    compute_type,
    exit_code,
    main,
    method_for,
    numbers,
    report,
    settings,
    unset_type,
    with_type,
)
from fastlightgen.data.source import Source
from fastlightgen.data.version import check_latents
from fastlightgen.engine.choice import Choice
from fastlightgen.engine.folder import CLIPS, StageFolder
from fastlightgen.engine.hang import HangWatch
from fastlightgen.engine.local import LocalEngine, pick_device
from fastlightgen.engine.loop import Engine, stoppable
from fastlightgen.engine.loop import train as train_loop
from fastlightgen.engine.preview import Preview, World, turns
from fastlightgen.engine.roles import Stage
from fastlightgen.engine.writers import check_installed
from fastlightgen.evaluate import can_score, evaluate_run
from fastlightgen.models.experts import TwoExperts
from fastlightgen.models.folder.experts import experts_of
from fastlightgen.ops import attention, describe, float8
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import say
from fastlightgen.parallel.threads import again, set_threads
from fastlightgen.pipelines.export import vae_folder
from fastlightgen.pipelines.world import Pipeline
from fastlightgen.planner.fit import check_fit
from fastlightgen.report import write_report
from fastlightgen.rng import generator, rand
from fastlightgen.stages.build import Builder
from fastlightgen.stages.check import shift_of_teacher
from fastlightgen.stages.earlier import announcement, stages_of
from fastlightgen.stages.experts import check_expert_run, join, runs_of
from fastlightgen.train_decoder import train_decoder
from fastlightgen.train_rank import features_of, made_on, make_engine, rank_blocks
from fastlightgen.world.builtin import BuiltIn
from fastlightgen.world.source import open_source

OWN = ("run", "device", "threads", "progress")  # keys that may differ between the processes of a run


def train(cfg: Any) -> None:
    """Run the command. With several ranks this function ends the process and does not return."""
    with stoppable() if ranks.launched() == 1 else nullcontext():
        train_all(cfg)


def train_all(cfg: Any) -> None:
    """The work of `train`."""
    if cfg.stage == "decoder":
        train_decoder(cfg)
        return
    try:
        cfg = settled(cfg)
        set_up(cfg)
        run_all(cfg)
    except (Exception, KeyboardInterrupt) as err:
        if ranks.size() == 1:
            raise
        end(err)
    ranks.leave()


def settled(cfg: Any) -> Any:
    """Return the configuration with the type that dtype=auto stands for on this device."""
    on_gpu = pick_device(cfg.device).type == "cuda"
    return with_type(cfg, compute_type(cfg.dtype, on_gpu, cfg.data != "shapes"))


def run_all(cfg: Any) -> None:
    """Run the command: of a model with two experts for both of them in turn, or for the one that `expert` names."""
    runs = runs_of(cfg)
    for one in runs:
        run(one)
    if experts_of(cfg.model) is None:
        say(f"next: {after_stage(runs[0])}")
    elif ranks.from_first(ranks.rank() == 0 and join(cfg)):
        say(f"next: {after_stage(cfg)}")
    else:
        other = next(name for name in EXPERTS if name != cfg.expert)
        say(f"next: the same command with expert={other}")


def run(cfg: Any) -> None:
    """Run one stage, after the earlier ones that it needs, or all of them with the evaluation and the report."""
    say("\n".join([*settings(cfg), *shift_of_teacher(cfg)]))
    say(describe())
    say(attention.describe())
    scored = cfg.stage != "all" or can_score(cfg)  # says now, before three stages, that there will be no evaluation
    stages = stages_of(cfg)
    if cfg.stage != "all" and len(stages) > 1:
        source, device = open_source(cfg.data, cfg.seed, cfg.negative), pick_device(cfg.device)
        say("\n".join(announcement(stages, source, device)))
    for one in stages:
        choose_threads(cfg)
        # Check before Stage I, which is the first, that the later stages fit too.
        run_stage(one, stages[1:] if one.stage == "1" else (), one.ratio if one.stage == "1" else None)
    if cfg.stage == "all" and ranks.rank() == 0:
        if scored:
            choose_threads(cfg)
            evaluate_run(cfg)
        say(f"report: {write_report(Path(cfg.run))}")


def choose_threads(cfg: Any) -> None:
    """Between the parts of a command that has several, see how many cores are free now."""
    if cfg.stage == "all" and ranks.launched() == 1 and (line := again(cfg.threads)):
        say(line)


def check_start(cfg: Any) -> None:
    """For dry_run=true: raise what would stop the start of the command before it reads weights."""
    if cfg.stage == "decoder":
        return
    first, source = stages_of(runs_of(cfg)[0])[0], open_source(cfg.data, cfg.seed, cfg.negative)
    check_latents(method_for(first).subject(first, None)[0], source.description)


def end(err: BaseException) -> NoReturn:
    """End this rank after an error. One rank reports it; if another rank has ended early, the error names that one."""
    if isinstance(err, RuntimeError) and ranks.lost_partner(err) and (missing := ranks.gone()):
        err = ValueError(f"rank {', '.join(map(str, missing))} of {ranks.size()} has gone; {ranks.GO_ON}")
    if not isinstance(err, ValueError | OSError | KeyboardInterrupt) or os.environ.get("FLG_DEBUG") == "1":
        traceback.print_exception(err)  # a mistake in the program: every rank prints its own
        ranks.end_process(1)
    if ranks.speaks_first():
        report(type(err)(f"rank {ranks.rank()}: {err}") if ranks.rank() and isinstance(err, ValueError) else err)
    ranks.end_process(exit_code(err))


def set_up(cfg: StageConfig) -> None:
    """Set the number of threads, join the other ranks, and check that all ranks run the same command."""
    check_installed(cfg)
    if cfg.fp8 != "off" and (why := float8.refusal(pick_device(cfg.device), getattr(torch, cfg.dtype))):
        raise ValueError(f"fp8={cfg.fp8}: {why}; use fp8=off")
    line = set_threads(cfg.threads)
    if pick_device(cfg.device).type == "cpu" and ranks.launched() == 1:
        say(line)
    torch.set_flush_denormal(True)  # denormal numbers slow a CPU down
    if cfg.engine == "local" and ranks.launched() > 1:
        raise ValueError(
            f"engine=local: runs in one process, {ranks.launched()} were launched; launch one, or use engine=deepspeed"
        )
    if cfg.engine == "deepspeed":
        device = pick_device(cfg.device)
        ranks.join(device, cfg.timeout)
        ranks.agree("stage", cfg.stage)
        ranks.agree_on_keys({k: v for k, v in asdict(cfg).items() if k not in OWN})
        ranks.agree("the random numbers", draws(cfg.seed))


def draws(seed: int) -> list[float]:
    """Return random numbers of all purposes, to compare across ranks. Ranks with different masks would hang."""
    return [x for purpose in range(8) for x in rand(2, generator(seed, purpose, 0)).tolist()]


def run_stage(cfg: Any, later: Sequence[StageConfig] = (), ratio: float | None = None) -> None:
    """Run or continue one stage of a run folder; do nothing if it is complete.

    `later`: further stages whose memory is checked first, assuming that Stage I drops `ratio` of the blocks.
    """
    number, method = int(cfg.stage), method_for(cfg)
    check_expert_run(cfg)
    device, source = pick_device(cfg.device), open_source(cfg.data, cfg.seed, cfg.negative)
    folder = open_folder(cfg, source)
    try:
        if folder.complete:
            say(f"stage {number}: {folder.result} exists, nothing to do (overwrite=true starts anew)")
            return
        check_latents(method.subject(cfg, None)[0], source.description)
        if source.name != "shapes":
            say(f"null prompt: {shortened(source.null_prompt)!r} (negative={cfg.negative})")
        check_fit(cfg, source, device)
        for other in later:
            check_fit(other, source, device, ratio)
        if number == 1:
            rank_blocks(cfg, source, folder, run_stage)
            return
        engine = make_engine(cfg, device)
        choice = choice_of(cfg, engine, source, folder)
        builder = Builder(cfg, source, device, engine.place)
        made = method.build(cfg, builder)
        with HangWatch(cfg.timeout, number):
            train_stage(cfg, builder, folder, engine, made, choice)
    except BaseException:
        folder.undo()
        raise
    finally:
        folder.close()


def shortened(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def open_folder(cfg: StageConfig, source: Source) -> StageFolder:
    """Open the stage's folder for this configuration and the results of earlier stages that it depends on."""
    inputs = dict(method_for(cfg).inputs(cfg)) | made_on(cfg)
    decisive = [*numbers(cfg), *inputs]
    config = asdict(cfg) | inputs | {CLIPS: source.name}
    return StageFolder(cfg.run, int(cfg.stage), config, decisive, cfg.overwrite, auto_type=bool(unset_type(cfg)))


def train_stage(
    cfg: StageConfig, with_: Builder, folder: StageFolder, engine: Engine, stage: Stage, choice: Choice | None
) -> None:
    """Train a stage. With engine=deepspeed the teacher is checked after it is placed, because it is sharded."""
    look = None
    if cfg.engine == "deepspeed" and stage.teacher is not None:
        look = partial(with_.check_teacher, stage.teacher)
    preview = preview_of(cfg, with_.source, engine.device) if makes_clips(cfg, stage) else None
    train_loop(stage, engine, folder, cfg, preview, look, choice)
    say(f"stage {stage.number}: {folder.result}")


def makes_clips(cfg: StageConfig, stage: Stage) -> bool:
    """Return whether the stage has all networks that a clip takes; one of two experts alone makes none."""
    whole = not cfg.boundary or isinstance(stage.sampler()["model"], TwoExperts)
    if not whole and cfg.sample_every:
        say(f"no clips are made during training: they take both experts, and this stage has expert={cfg.expert} alone")
    return whole


def choice_of(cfg: Any, engine: Engine, source: Source, folder: StageFolder) -> Choice | None:
    """Return what chooses the weights that become the result (choose=best), or None."""
    if vars(cfg).get("choose") != "best":
        return None
    if not isinstance(engine, LocalEngine):
        raise ValueError(
            "choose=best: works with engine=local only; use choose=last, and keep_every= to choose among checkpoints"
        )
    return Choice(cfg, engine, source, folder.path, features_of(source))


def preview_of(cfg: StageConfig, source: Source, device: torch.device) -> Preview | None:
    """Return the maker of clips during training, or None if there is none."""
    if not cfg.sample_every:
        return None
    world: World | None = None  # stays None on ranks that decode no clips: a VAE takes memory
    shows = any(reports for _, reports in turns(cfg.sequence_parallel))
    if source.name == "shapes":
        world = BuiltIn()
    elif not (folder := vae_folder(cfg)):
        say("no clips are made during training: give pipeline=FOLDER, whose VAE can show those of a cache")
        return None
    elif shows:
        world = Pipeline(Path(folder), device, torch.float32, decode_only=True)
    return Preview(source, world, cfg.seed, device, cfg.sequence_parallel)


if __name__ == "__main__":
    main(train, "train", check=check_start)
