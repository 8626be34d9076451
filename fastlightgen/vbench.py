"""python -m fastlightgen.vbench model=DIR prompts=FILE images=DIR out=DIR ...: VBench-I2V, from videos to averages."""

import shlex
import subprocess
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from fastlightgen.atomic import write_json
from fastlightgen.config import ConfigError, VBench, compute_type, main
from fastlightgen.data.frames import check_suffix, write_clips
from fastlightgen.engine.local import pick_device
from fastlightgen.evaluation import vbench as suite
from fastlightgen.evaluation.vbench import Prompt, read_prompts, read_results, summary
from fastlightgen.files.border import read_json
from fastlightgen.files.schema import record
from fastlightgen.models.experts import Model
from fastlightgen.models.folder.pair import load_sampler, sampler_card
from fastlightgen.models.folder.released import sampling
from fastlightgen.models.folder.weights import trained_folder
from fastlightgen.models.sample import sample, sampling_plan
from fastlightgen.parallel.log import bar, say
from fastlightgen.parallel.threads import set_threads
from fastlightgen.pipelines.export import check_fits, is_pipeline
from fastlightgen.pipelines.world import Pipeline

CRF = "10"  # quality of the H.264 videos, as VBench's README asks
MADE = "videos.json"  # what made the videos; beside their folder, in which VBench expects nothing but videos
TITLES = {
    "average_6": "average of 6 dimensions (FastLightGen, Tables 1 and 2)",
    "average_7": "average of 7 dimensions (Tables 4 to 9)",
    "quality": "VBench's quality score",
    "i2v": "VBench's I2V score",
    "total": "VBench's total score",
}


def vbench(cfg: VBench) -> None:
    """Write the videos that are missing, start VBench or print how, and print the averages of its results."""
    set_threads(cfg.threads)
    out, dimensions = Path(cfg.out), suite.SETS[cfg.dimensions]
    prompts = read_prompts(cfg.prompts, dimensions)
    wanted = [(prompt, k) for prompt in prompts for k in range(cfg.samples)]
    if cfg.model:
        write_videos(cfg, out, wanted)
    missing = [prompt.file(k) for prompt, k in wanted if not (out / "videos" / prompt.file(k)).is_file()]
    if missing:
        say(f"{out / 'videos'}: {len(wanted) - len(missing)} of {len(wanted)} videos; the first missing: {missing[0]}")
        say(f"next: the same command {'for the other ranks' if cfg.model else 'with model=DIR, which writes them'}")
        return
    found = read_results(out / "results")
    left = [dimension for dimension in dimensions if dimension not in found]
    if left and cfg.python:
        start(cfg, out, left)
        found = read_results(out / "results")
    elif left:
        say(f"{out / 'videos'}: {len(wanted)} videos. Start VBench in its own environment, once per dimension:")
        say(f"  cd {shlex.quote(cfg.vbench or 'VBENCH')}")
        for dimension in left:
            say(f"  {shlex.join(words(cfg, out, dimension))}")
        say("then the same command again reads its results")
    for line in report(found):
        say(line)
    write_json(out / "scores.json", {"scores": found, **summary(found)})
    if not left or cfg.python:
        say("next: the same command with model=TEACHER out=OTHER, to compare")


def report(found: dict[str, float]) -> list[str]:
    """The lines that are printed of the results."""
    lines = [f"{dimension:24}{value:8.4f}" for dimension, value in found.items()]
    for key, value in summary(found).items():
        lines += [] if value is None else [f"{key:24}{value:8.4f}  {TITLES[key]}"]
    return lines


def words(cfg: VBench, out: Path, dimension: str) -> list[str]:
    python = cfg.python or "python"
    return suite.command(python, out / "videos", out / "results", Path(cfg.prompts), cfg.ratio, dimension)


def start(cfg: VBench, out: Path, dimensions: Sequence[str]) -> None:
    """Run VBench for each dimension; its results are kept one by one, so that a failure costs one dimension."""
    (out / "results").mkdir(parents=True, exist_ok=True)
    if not (Path(cfg.vbench) / "evaluate_i2v.py").is_file():
        raise ValueError(f"vbench={cfg.vbench}: holds no evaluate_i2v.py; give the folder of a checkout of VBench")
    for dimension in dimensions:
        line = words(cfg, out, dimension)
        say(f"vbench: {dimension}: {shlex.join(line)}")
        try:
            done = subprocess.run(line, cwd=cfg.vbench, check=False)
        except OSError as err:
            raise ValueError(f"python={cfg.python}: cannot be started ({err.strerror}); give a python") from None
        if done.returncode:
            raise ValueError(f"vbench: {dimension} ended with exit code {done.returncode}; see its output above")


def write_videos(cfg: VBench, out: Path, wanted: Sequence[tuple[Prompt, int]]) -> None:
    """Sample the videos that are missing, this process's share of them."""
    own = list(wanted)[max(cfg.rank, 0) :: max(cfg.ranks, 1)]
    folder, images = trained_folder(cfg.model), Path(cfg.images)
    absent = [prompt.image for prompt, _ in own if not (images / prompt.image).is_file()]
    if absent:
        raise ValueError(
            f"images={cfg.images}: {absent[0]!r} is missing ({len(set(absent))} pictures in all); give VBench's "
            "data/crop/RATIO"
        )
    pipeline = Path(cfg.pipeline) if cfg.pipeline else folder
    if not is_pipeline(pipeline):
        raise ValueError(f"pipeline is required: model={cfg.model} is no pipeline folder; give that of its teacher")
    defaults, card = dict(sampling(pipeline).values), sampler_card(folder)
    plan = sampling_plan(card, cfg.steps, cfg.guidance, cfg.sampler, defaults, force=cfg.force)
    size = cfg.size or card.get("clips", defaults)["size"]
    left = [(prompt, k) for prompt, k in own if not (out / "videos" / prompt.file(k)).is_file()]
    note(cfg, out, plan, size)
    if left:
        check_suffix(str(out / "videos" / "a.mp4"))
        device = pick_device(cfg.device)
        dtype = getattr(torch, compute_type(cfg.dtype, device.type == "cuda", True))
        world = Pipeline(pipeline, device, dtype, size)
        if not world.encoders.from_image:
            raise ValueError(f"pipeline={pipeline}: makes videos from text alone; VBench-I2V begins with a picture")
        model = load_sampler(folder, device, dtype, cfg.allow_pt).requires_grad_(False)
        if pipeline != folder:
            check_fits(model.config, pipeline)
        with bar(len(left), "VBench-I2V videos", cfg.progress, unit="video") as ticks:
            for prompt, k, frames in made(cfg, world, model, plan, left):
                write_clips(out / "videos" / prompt.file(k), frames, world.fps, crf=CRF)
                ticks.update()


def made(
    cfg: VBench, world: Pipeline, model: Model, plan: dict[str, Any], left: Sequence[tuple[Prompt, int]]
) -> Iterator[tuple[Prompt, int, NDArray]]:
    """Yield (prompt, number, frames) of each video; its noise depends on the seed, the prompt's place, the number."""
    device = next(model.parameters()).device
    for prompt, group in groupby(left, key=lambda pair: pair[0]):  # encode each prompt once
        negative = cfg.negative if plan["guidance"] != 1.0 else None
        wish = world.wish(prompt.text, negative, str(Path(cfg.images) / prompt.image), 1).to(device)
        for _, k in group:
            seed = cfg.seed + suite.SAMPLES * prompt.number + k
            x0 = sample(model, wish.cond, wish.null, wish.start(seed, device), **plan, seed=seed)
            yield prompt, k, world.frames(x0)


def note(cfg: VBench, out: Path, plan: dict[str, Any], size: str) -> None:
    """Write what makes the videos; refuse a folder with videos that something else made."""
    about = {"model": cfg.model, "pipeline": cfg.pipeline, "plan": plan, "size": size, "seed": cfg.seed}
    about |= {"negative": cfg.negative}
    path = out / MADE
    if path.is_file():
        before = read_json(path, record({}), "delete the folder, or give another out=")
        for key, value in about.items():
            if before.get(key) != value:
                raise ConfigError(
                    f"out={out}: its videos were made with {key} {before.get(key)}, now {value}; give another out="
                )
    else:
        write_json(path, about)


if __name__ == "__main__":
    main(vbench, "vbench")
