"""python -m fastlightgen.generate model=DIR prompt=... out=FILE.mp4|gif|png ...: samples clips."""

import time
from contextlib import contextmanager
from pathlib import Path

import torch

from fastlightgen.config import Generate, command, compute_type, main
from fastlightgen.data.frames import check_suffix, write_clips
from fastlightgen.data.version import check_model, same_latents
from fastlightgen.engine.local import pick_device
from fastlightgen.files.border import parsed, read_text
from fastlightgen.files.kinds import PROMPT
from fastlightgen.models.families import depth
from fastlightgen.models.folder.networks import full_depth
from fastlightgen.models.folder.pair import load_sampler, sampler_card
from fastlightgen.models.folder.weights import config_of, trained_folder
from fastlightgen.models.sample import sample, sampling_plan
from fastlightgen.parallel.log import bar, say, size
from fastlightgen.parallel.threads import set_threads
from fastlightgen.pipelines.export import check_fits, is_pipeline
from fastlightgen.pipelines.world import Pipeline
from fastlightgen.planner.fit import host_free
from fastlightgen.world.builtin import BuiltIn
from fastlightgen.world.source import ShapesSource


def generate(cfg: Generate) -> None:
    """Sample `count` clips of every prompt.

    The encoders are released before the network is loaded, so that they never occupy memory at the same time.
    """
    out, asked = check_suffix(cfg.out), read_prompts(cfg)
    set_threads(cfg.threads)
    device, clock = pick_device(cfg.device), Clock()
    folder = trained_folder(cfg.model)
    pipeline = Path(cfg.pipeline) if cfg.pipeline else folder if is_pipeline(folder) else None
    if pipeline is None:
        if cfg.vae:
            raise ValueError(f"vae={cfg.vae}: decodes real videos; the built-in world has no VAE, leave vae= out")
        if not same_latents(config_of(folder), ShapesSource.description):
            raise ValueError(
                f"pipeline is required: model={cfg.model} makes latents of real videos; give pipeline=FOLDER, the "
                "pipeline of its teacher with VAE and encoders, or model=FOLDER of a pipeline that `export` wrote"
            )
        check_model(folder, ShapesSource.description)
    dtype = getattr(torch, compute_type(cfg.dtype, device.type == "cuda", pipeline is not None))
    card = sampler_card(folder)
    with clock("load"):
        world = Pipeline(pipeline, device, dtype, cfg.size, vae=cfg.vae, card=card) if pipeline else BuiltIn(cfg.size)
    if isinstance(world, Pipeline):
        check_memory(cfg, *world.size)
    plan = sampling_plan(card, cfg.steps, cfg.guidance, cfg.sampler, world.defaults, force=cfg.force)
    if not card:
        warn_without_card(cfg, folder, pipeline, plan)
    negative = negative_of(cfg, world) if plan["guidance"] != 1.0 else None  # without guidance nothing reads it
    with clock("text"):
        wishes = [world.wish(prompt, negative, image, cfg.count) for prompt, image in asked]
        world.release()
    with clock("load"):
        model = load_sampler(folder, device, dtype, cfg.allow_pt).requires_grad_(False)
    if pipeline and pipeline != folder:
        check_fits(model.config, pipeline)

    total = len(wishes) * len(plan["times"])
    with bar(total, "sampling", cfg.progress and total > 1) as progress:
        for number, wish in enumerate(wishes):
            noise, wish = wish.start(cfg.seed, device), wish.to(device)
            with clock("sample"):
                x0 = sample(model, wish.cond, wish.null, noise, **plan, seed=cfg.seed, tick=progress.update)
            with clock("decode"):
                frames = world.frames(x0)
            file = out.with_stem(f"{out.stem}-{number:03d}") if cfg.prompts else out  # NAME-000.mp4, NAME-001.mp4, ...
            with clock("write"):
                write_clips(file, frames, world.fps)
    where = f"{out.with_stem(f'{out.stem}-000')} ... {len(wishes)} files" if cfg.prompts else str(out)
    say(f"{where}: {cfg.count} clip(s), {len(plan['times'])} steps, guidance {guidance_of(plan)}; {clock}")
    say(f"next: {following(cfg, pipeline)}")


def guidance_of(plan: dict) -> str:
    """The guidance in words, of two experts both."""
    return " and ".join(f"{plan[key]:g}" for key in ("guidance", "guidance_2") if key in plan)


def check_memory(cfg: Generate, height: int, width: int, frames: int) -> None:
    """Raise ValueError if this host has no room for the clips in float32, and once more while they are cut to bytes."""
    need = 2 * 4 * 3 * cfg.count * height * width * frames
    if need > (free := host_free()):
        raise ValueError(
            f"count={cfg.count} size={height}x{width}x{frames}: the clips alone take {size(need)} of memory, "
            f"{size(free)} are free; use fewer or smaller ones"
        )


def following(cfg: Generate, pipeline: Path | None) -> str:
    """What to do after a clip: measure a model of the built-in world, export one for diffusers, use an exported one."""
    if pipeline is None:
        return command("evaluate", model=cfg.model, out=Path(cfg.out).with_name("scores.json"))
    if cfg.pipeline:
        return command("export", model=cfg.model, pipeline=cfg.pipeline, out="student")
    return f"in Python, without this package: diffusers.DiffusionPipeline.from_pretrained({cfg.model!r})"


def warn_without_card(cfg: Generate, folder: Path, pipeline: Path | None, plan: dict) -> None:
    """Warn if a pruned network has no fastlightgen.json, so that its own steps and guidance are unknown."""
    blocks, full = depth(config_of(folder)), full_depth(folder, pipeline)
    if blocks < full and not (cfg.steps and cfg.guidance >= 0):
        say(
            f"warning: {folder} has {blocks} of {full} blocks and no fastlightgen.json, so it is sampled as a teacher: "
            f"{len(plan['times'])} steps, guidance {plan['guidance']:g}; copy the student's fastlightgen.json into it, "
            "or give steps= and guidance="
        )


def negative_of(cfg: Generate, world: Pipeline | BuiltIn) -> str:
    """The prompt to steer away from; for `official` the text that the model's authors publish."""
    if cfg.negative != "official":
        return cfg.negative
    if not world.official_negative:
        raise ValueError("negative=official: nobody publishes one for this model; give a text, or leave negative= out")
    return world.official_negative


def read_prompts(cfg: Generate) -> list[tuple[str, str]]:
    """Return (prompt, picture) pairs from the command line, or from a file with one prompt or JSON object per line."""
    if cfg.prompt:
        return [(cfg.prompt, cfg.image)]
    path = Path(cfg.prompts)
    try:
        lines = [line.strip() for line in read_text(path).split("\n")]
    except ValueError as err:
        raise ValueError(f"prompts={err}; give a text file or JSON lines") from None
    asked = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        row = {"prompt": line}
        if path.suffix in (".jsonl", ".json"):
            row = parsed(line, PROMPT, f"prompts={path}, line {number}", 'wanted {"prompt": "...", "image": "FILE"}')
        # Picture names are relative to the folder of the list.
        image = str(path.parent / row["image"]) if row.get("image") else cfg.image
        asked.append((row["prompt"], image))
    if not asked:
        raise ValueError(f"prompts={path}: is empty; write one prompt per line")
    return asked


class Clock:
    """Measures the seconds of each part of a command; `with clock("load"):` adds to the part "load"."""

    def __init__(self):
        self.parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str):
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels run asynchronously: wait for them before reading the time
        self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.2f} s" for part, seconds in self.parts.items())


if __name__ == "__main__":
    main(generate, "generate")
