"""python -m fastlightgen.train stage=0|1|2|3|all run=DIR ...: train, or continue, one stage or all of them."""

import json
from pathlib import Path

from fastlightgen.config import StageAll, for_stage, main


def train(cfg) -> None:
    from fastlightgen.engine.log import say
    from fastlightgen.ops.dispatch import describe

    set_up(cfg)
    say(describe())
    if not isinstance(cfg, StageAll):
        run_stage(cfg)
        return
    for number in (1, 2, 3):
        run_stage(for_stage(cfg, number))
    from fastlightgen.evaluate import evaluate_run
    from fastlightgen.report import write_report

    evaluate_run(cfg)
    say(f"report: {write_report(Path(cfg.run))}")


def set_up(cfg) -> None:
    """Process-wide settings: threads, and numbers too small for full speed on a CPU flushed to zero."""
    import torch

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.set_flush_denormal(True)


def run_stage(cfg) -> None:
    """Run, continue, or find complete one stage of a run folder."""
    from fastlightgen.data.source import open_source
    from fastlightgen.engine.local import LocalEngine, pick_device
    from fastlightgen.engine.log import say
    from fastlightgen.engine.loop import train as train_loop
    from fastlightgen.stages import build

    number = int(cfg.stage)
    device, source = pick_device(cfg.device), open_source(cfg.data, cfg.seed)
    folder = build.stage_folder(cfg, number)
    try:
        if folder.complete:
            say(f"stage {number}: {folder.result} is there, nothing to do (overwrite=true starts anew)")
        elif number == 1:
            rank_blocks(cfg, source, device, folder)
        else:
            make = {0: build.build_teacher, 2: build.build_prune, 3: build.build_distill}[number]
            stage = make(cfg, source, device)
            train_loop(stage, LocalEngine(device, cfg.dtype), folder, cfg, preview_of(cfg, source, device))
            say(f"stage {number}: {folder.result}")
    finally:
        folder.close()


def preview_of(cfg, source, device):
    """What turns held-out prompts into clips during training, or None."""
    import torch

    from fastlightgen.data.pipeline import is_pipeline
    from fastlightgen.data.preview import Preview
    from fastlightgen.data.worlds import BuiltIn, Pipeline
    from fastlightgen.engine.log import say

    if not cfg.sample_every:
        return None
    if source.name == "shapes":
        world = BuiltIn()
    elif folder := cfg.pipeline or (cfg.model if is_pipeline(cfg.model) else ""):
        world = Pipeline(Path(folder), device, torch.float32, decode_only=True)
    else:
        say("no clips are made during training: give pipeline=FOLDER, whose VAE can show those of a cache")
        return None
    return Preview(source, world.frames, world.fps, cfg.seed, device).write


def rank_blocks(cfg, source, device, folder) -> None:
    """Stage I writes importance.json and its picture."""
    from fastlightgen.engine.log import bar, say
    from fastlightgen.metrics.importance import plot_importance
    from fastlightgen.stages import build
    from fastlightgen.stages.rank import rank

    model, costs = build.build_ranking(cfg, source, device)
    batches = build.batches_of(cfg, source, device)
    record = {"model": cfg.model, "data_hash": source.name} | rank(
        cfg, model, batches, costs, lambda total, title: bar(total, title, cfg.progress)
    )
    plot_importance(record, folder.path / "importance.png")
    temporary = folder.path / "importance.tmp"
    temporary.write_text(json.dumps(record, indent=1))
    temporary.rename(folder.result)
    say(f"stage 1: keeps blocks {record['kept']}, drops {record['pruned']}: {folder.result}")


if __name__ == "__main__":
    main(train, "train")
