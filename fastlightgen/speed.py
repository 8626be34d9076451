"""python -m fastlightgen.speed model=DIR pipeline=DIR ...: seconds, operations, parameters and memory of a clip."""

import tempfile
from functools import partial
from pathlib import Path

import torch

from fastlightgen.atomic import write_json
from fastlightgen.config import PROMPT, Speed, command, compute_type, main
from fastlightgen.data.version import same_latents
from fastlightgen.engine.local import pick_device
from fastlightgen.evaluation import speed as timing
from fastlightgen.evaluation.speed import Clip, Subject
from fastlightgen.models.folder.pair import load_sampler, sampler_card
from fastlightgen.models.folder.weights import config_of, trained_folder
from fastlightgen.models.sample import sampling_plan
from fastlightgen.parallel.log import bar, say, size
from fastlightgen.parallel.threads import set_threads
from fastlightgen.pipelines.export import check_fits, is_pipeline
from fastlightgen.pipelines.stock import need_diffusers
from fastlightgen.pipelines.world import Pipeline
from fastlightgen.world.source import ShapesSource


def speed(cfg: Speed) -> None:
    """Time the model, its teacher, and stock diffusers with their weights; print a table and write a JSON file."""
    need_diffusers()
    set_threads(cfg.threads)
    device = pick_device(cfg.device)
    worlds: dict[Path, Pipeline] = {}
    subjects = [opened(cfg, cfg.model, "model", device, worlds)]
    if cfg.teacher:
        subjects.insert(0, opened(cfg, cfg.teacher, "teacher", device, worlds))
    if cfg.stock:
        own = [s for s in subjects if s.net.cfg.is_stock]
        subjects += [
            Subject(f"{s.name}, stock diffusers", s.net, s.world, s.plan, timing.stock_networks(s.net)) for s in own
        ]
    with (
        tempfile.TemporaryDirectory() as folder,
        bar((cfg.turns + 1) * len(subjects), "timing", cfg.progress, unit="clip") as ticks,
    ):
        timing.timed(subjects, cfg.turns, partial(clip_of, cfg, Path(folder)), ticks.update)
        wish = subjects[0].world.wish(cfg.prompt or PROMPT, None, first_picture(cfg, subjects[0], Path(folder)), 1)
    records = [timing.measured(subject, wish) for subject in subjects]
    memory, of = timing.peak_memory(device)
    by_name = {record["name"]: record for record in records}
    model = by_name["model"]
    found = {other: timing.compared(by_name[other], model) for other in by_name if other != "model"}
    for line in timing.table(records):
        say(line)
    say(f"peak memory {size(memory)} {of}; {cfg.turns} clips each of {'x'.join(map(str, subjects[0].world.size))}")
    for other, comparison in found.items():
        say(f"model against {other}: {comparison['reason']}")
    if cfg.out:
        about = {"device": device_name(device), "threads": torch.get_num_threads(), "size": subjects[0].world.size}
        about |= {"peak_memory": memory, "peak_memory_of": of, "turns": cfg.turns}
        write_json(Path(cfg.out), about | {"records": records, "speedups": found})
    more = {"pipeline": cfg.pipeline} if cfg.pipeline else {}
    more |= {"image": "first.png"} if subjects[0].world.encoders.from_image else {}
    say(f"next: {command('generate', model=cfg.model, **more, prompt=PROMPT, out='clip.mp4')}")


def opened(cfg: Speed, model: str, name: str, device: torch.device, worlds: dict[Path, Pipeline]) -> Subject:
    """Load a network and the parts of its pipeline, which networks of one pipeline share."""
    folder = trained_folder(model)
    pipeline = folder if is_pipeline(folder) else Path(cfg.pipeline)
    if not is_pipeline(pipeline):
        if same_latents(config_of(folder), ShapesSource.description):
            raise ValueError(f"{name}={model}: the built-in world has no pipeline; `evaluate` times its models")
        raise ValueError(f"pipeline is required: {name}={model} is no pipeline folder; give that of its teacher")
    dtype = getattr(torch, compute_type(cfg.dtype, device.type == "cuda", True))
    if pipeline not in worlds:
        worlds[pipeline] = Pipeline(pipeline, device, dtype, cfg.size, card=sampler_card(trained_folder(cfg.model)))
    world = worlds[pipeline]
    net = load_sampler(folder, device, dtype, cfg.allow_pt).eval().requires_grad_(False)
    if pipeline != folder:
        check_fits(net.config, pipeline)
    asked = (cfg.steps, cfg.guidance) if name == "model" else (0, -1.0)
    return Subject(name, net, world, sampling_plan(sampler_card(folder), *asked, "auto", world.defaults, force=True))


def first_picture(cfg: Speed, subject: Subject, folder: Path) -> str:
    """The picture that a clip begins with; "" for a pipeline that takes none."""
    if not subject.world.encoders.from_image:
        return ""
    return cfg.image or timing.random_picture(folder, *subject.world.size[:2])


def clip_of(cfg: Speed, folder: Path, subject: Subject) -> Clip:
    run = timing.own_clip if subject.stock is None else timing.stock_clip
    return run(subject, cfg.prompt or PROMPT, "", first_picture(cfg, subject, folder), cfg.seed)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main(speed, "speed")
