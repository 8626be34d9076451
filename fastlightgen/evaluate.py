"""python -m fastlightgen.evaluate model=DIR out=FILE.json ...: measures scores, speed and size on held-out prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastlightgen.atomic import check_place, write_json
from fastlightgen.blocks import read_importance
from fastlightgen.config import SHAPES_PROMPT, Evaluate, Run, command, for_evaluate, for_stage, main, method_for
from fastlightgen.data.frames import to_uint8
from fastlightgen.data.version import check_model, check_version, same_latents
from fastlightgen.engine.local import pick_device
from fastlightgen.evaluation.latents import evaluate_latents
from fastlightgen.evaluation.videos import evaluate_videos
from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import SHIPPED
from fastlightgen.files.tensors import save_tensors
from fastlightgen.metrics.intervals import MIN_CLIPS, Resampled, interval
from fastlightgen.metrics.speed import Speed, clocked, counted, warning
from fastlightgen.models.folder.pair import load_sampler, sampler_card
from fastlightgen.models.folder.weights import config_of, read_card, read_tensors, trained_folder
from fastlightgen.models.sample import plan_record, sampling_plan
from fastlightgen.parallel.log import say
from fastlightgen.parallel.threads import set_threads
from fastlightgen.world.diversity import redraw
from fastlightgen.world.score import caption_spreads, clip_values, compared, resampled, scores_of
from fastlightgen.world.shapes import WORLD, Clips, Shapes
from fastlightgen.world.source import ShapesSource
from fastlightgen.world.subject import Subject, draw
from fastlightgen.world.timing import batch_of, speedup, timed

Values = dict[str, Tensor]  # of each clip


@dataclass
class Result:
    """The measurements of a model."""

    record: dict
    shown: Tensor  # the clips to show
    values: Values
    resampled: dict[str, Resampled]  # of each score


def load_subject(cfg: Evaluate, model: str, name: str, title: str) -> Subject:
    """Load a model folder and make its sampling plan from its card and the configuration."""
    folder = trained_folder(model)
    if not same_latents(config_of(folder), ShapesSource.description):
        raise ValueError(
            f"model={model}: makes latents of real videos, and data=shapes is the toy's data; give data=CACHE, or "
            "measure its videos (videos=FOLDER real=FOLDER)"
        )
    check_model(folder, ShapesSource.description)
    card = sampler_card(folder)
    keep = None
    if cfg.path == "pruned":
        keep = card.get("pruned_path")
        if keep is None and card.get("stage") != 2:  # other methods of Stage II leave the pruned network alone
            raise ValueError(f"path=pruned: {folder} names no pruned_path; wanted a model that stage=2 made")
    net = load_sampler(folder, pick_device(cfg.device), allow_pt=cfg.allow_pt).requires_grad_(False)
    plan = sampling_plan(card, cfg.steps, cfg.guidance, cfg.sampler, net.released, force=cfg.force)
    return Subject(name, title, net, folder, plan, keep)


def measure(cfg: Evaluate, subject: Subject, teacher: Result | None = None) -> Result:
    """Measure a subject, also against a teacher. A teacher with shipped values samples only the clips to show."""
    shipped = shipped_values(cfg, subject)
    count = cfg.clips if shipped is None else min(cfg.show, cfg.clips)
    clips, asked, _ = draw(cfg, subject, count)
    record = {
        "name": subject.name,
        "title": subject.title,
        "model": str(subject.folder),
        "world": WORLD,
        "num_params": subject.num_params,
        "num_blocks": len(subject.keep or range(subject.model.num_blocks)),
        "kept_blocks": subject.keep or sampler_card(subject.folder).get("kept_blocks"),
        "sampler": plan_record(subject.plan, subject.model.embeds_guidance),
        "shown": shown(cfg, asked),
    }
    say(f"{subject.title}: computing the scores of {cfg.clips} clips and their 95% intervals ...")
    if shipped is not None:
        record["note"] = "scores that ship with this model, measured when it was trained"
        return scored(cfg, record, clips, *shipped, teacher)
    spread = None
    if cfg.noises > 1:
        more, again, _ = draw(cfg, subject, cfg.clips // cfg.noises * cfg.noises, cfg.noises)
        spread = caption_spreads(more, again, cfg.noises)
    return measured(cfg, record, clips, asked, spread, teacher)


def measured(
    cfg: Evaluate, record: dict, clips: Tensor, asked: Clips, spread: Tensor | None, teacher: Result | None = None
) -> Result:
    """Measure clips and add their scores to a record."""
    values, attributes = clip_values(clips, asked, cfg.seed)
    if spread is not None:
        values["spread"] = spread
    return scored(cfg, record, clips, values, attributes, teacher)


def scored(
    cfg: Evaluate, record: dict, clips: Tensor, values: Values, attributes: dict, teacher: Result | None
) -> Result:
    """Add the scores of measured clips to a record, with their 95% intervals, and the differences to the teacher."""
    theirs = teacher.values["features"] if teacher else None
    found = resampled(values, cfg.seed, theirs)
    scores = scores_of(values, cfg.seed, theirs)
    record |= {"clips": cfg.clips, "seed": cfg.seed, "scores": scores, "attributes": attributes}
    record |= {"intervals": {name: interval(f) for name, f in found.items()}}
    if teacher:
        record["against_teacher"] = compared(found, teacher.resampled, cfg.seed)
    if not found:
        record["note"] = f"{cfg.clips} clips are too few to rank models; wanted at least {MIN_CLIPS}"
    return Result(record, clips[: cfg.show], values, found)


def shown(cfg: Evaluate, asked: Clips) -> list[dict]:
    """The prompts of the clips to show."""
    prompts = zip(asked.captions, asked.has_first.tolist(), strict=True)
    return [{"caption": caption, "has_first": first} for caption, first in prompts][: cfg.show]


def shipped_values(cfg: Evaluate, subject: Subject) -> tuple[Values, dict] | None:
    """Return the values of the clips that ship with a model, and its adherence by attribute, if they fit `cfg`.

    They were measured with the subject's plan and this seed, of the same clips and noise, and perhaps of more of them.
    show=0 asks for a new measurement.
    """
    path = subject.folder / "scores.json"
    if not path.is_file() or subject.keep is not None or cfg.show == 0:
        return None
    found = read_json(path, SHIPPED, "delete it, or measure again with show=0")
    remedy = "delete the file, or measure again with show=0"
    check_version(path, "measured", found, ShapesSource.description, remedy)
    for record in found["records"]:
        same = record["plan"] == subject.plan and record["seed"] == cfg.seed
        if same and cfg.clips <= record["clips"] and cfg.noises in (1, record["noises"]):
            values = {k: v.double() for k, v in read_tensors([subject.folder / record["values"]]).items()}
            captions = values.pop("spread")[: cfg.clips // cfg.noises]
            values = {k: v[: cfg.clips] for k, v in values.items()}
            return values | ({"spread": captions} if cfg.noises > 1 else {}), record["attributes"]
    return None


def real_result(cfg: Evaluate) -> Result:
    """Measure the held-out real clips: the scores of a perfect model."""
    say(f"real clips: computing the scores of {cfg.clips} clips and their 95% intervals ...")
    world = Shapes(seed=cfg.seed, split="test")
    asked, spread = world.batch(range(cfg.clips)), None
    record = {"name": "real", "title": "Real clips", "world": WORLD, "shown": shown(cfg, asked)}
    if cfg.noises > 1:
        again = redraw(world, cfg.clips // cfg.noises, cfg.noises)
        spread = caption_spreads(again.video, again, cfg.noises)
    return measured(cfg, record, asked.video, asked, spread)


def write(path: Path, result: Result) -> None:
    """Write the record, NAME.json, the values of each clip, and the clips to show as uint8 [K,F,H,W,3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = to_uint8(result.shown).permute(0, 1, 3, 4, 2).contiguous()
    save_tensors(path.with_suffix(".safetensors"), {"video": frames})
    save_tensors(path.with_suffix(".values.safetensors"), result.values, {"world": str(WORLD)})
    write_json(path, result.record)


def with_times(cfg: Evaluate, results: Sequence[Result], seconds: Sequence[Sequence[float]]) -> None:
    """Add the median seconds per clip, and the batch that they were measured with, to the records."""
    for result, times in zip(results, seconds, strict=True):
        result.record |= {"seconds_per_clip": median(times), "batch": batch_of(cfg)}


def say_speed(speed: Speed) -> None:
    say(f"speedup: {counted(speed)}; {clocked(speed)}")
    if text := warning(speed):
        say(f"warning: {text}")


def can_score(cfg: Run) -> bool:
    """Return whether stage=all can evaluate its models; say so if it cannot."""
    if cfg.data != "shapes":
        say(f"data={cfg.data}: no evaluation at the end: `evaluate data=` measures the student on held-out clips")
    if cfg.boundary:
        say(f"expert={cfg.expert}: no evaluation at the end: clips take both experts")
    return cfg.data == "shapes" and not cfg.boundary


def evaluate_run(cfg: Run) -> None:
    """The last step of stage=all: evaluate teacher, teacher in few steps, untrained pruned model, Stage II, student."""
    run = Path(cfg.run)
    student_folder, stage2_folder = str(run / "stage3" / "model"), str(run / "stage2" / "model")
    base = for_evaluate(cfg, model=student_folder, teacher=cfg.model, out=str(run / "evaluate" / "student.json"))
    card = read_card(student_folder)
    # The models that the student is compared with take its ladder and sampler, and the guidance that is their own.
    few = replace(base, steps=len(card["ladder"]), guidance=-1.0, sampler=card["sampler"])
    n, kept = len(card["ladder"]), len(card["kept_blocks"])
    steps = "1 step" if n == 1 else f"{n} steps"

    made_by = {n: method_for(for_stage(cfg, n)).title for n in (2, 3)}
    student = load_subject(base, student_folder, "student", f"{made_by[3]}, {steps}, {kept} blocks")
    teacher = load_subject(base, cfg.model, "teacher", "Teacher")
    teacher.title = f"Teacher, {len(teacher.plan['times'])} steps, guidance {teacher.plan['guidance']:g}"
    shortened = load_subject(few, cfg.model, "teacher-few", f"Teacher, only {steps}")
    ranking = read_importance(run / "stage1" / "importance.json", teacher.model.num_blocks)
    pruned = replace(
        shortened, name="pruned", title=f"Pruned to {kept} blocks, untrained, {steps}", keep=ranking["kept"]
    )
    stage2 = load_subject(
        replace(few, path="pruned"), stage2_folder, "stage2-few", f"{made_by[2]}, {steps}, {kept} blocks"
    )

    for subject in (shortened, pruned, stage2):
        subject.plan |= {"times": student.plan["times"]}
    write(run / "evaluate" / "real.json", real_result(base))
    subjects = (teacher, shortened, pruned, stage2, student)
    results: list[Result] = []
    for subject in subjects:
        results.append(result := measure(base, subject, results[0] if results else None))
        record, s = result.record, result.record["scores"]
        say(f"{record['title']}: adherence {s['adherence']:.3f}, Frechet distance {s['frechet']:.2f}")
    same_steps = compared(results[-1].resampled, results[1].resampled, base.seed)
    results[-1].record["against"] = {"teacher-few": same_steps}
    seconds = timed(base, subjects)
    with_times(base, results, seconds)
    for subject, result in zip(subjects, results, strict=True):
        write(run / "evaluate" / f"{subject.name}.json", result)
    record = speedup(base, teacher, student, [seconds[0], seconds[-1]])
    write_json(run / "evaluate" / "speed.json", record)
    say_speed(record)


def listed(record: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in record["scores"].items())


def evaluate(cfg: Evaluate) -> None:
    """Evaluate a model and, if teacher= is given, the teacher and the speedup; on a cache; or any videos."""
    check_place(cfg.out)
    if cfg.videos:
        return evaluate_videos(cfg)
    if cfg.data != "shapes":
        return evaluate_latents(cfg)
    set_threads(cfg.threads)
    torch.set_flush_denormal(True)  # denormal numbers slow CPUs down
    out = Path(cfg.out)
    subject, more = load_subject(cfg, cfg.model, out.stem, cfg.model), dict[str, Any]()
    if cfg.teacher:
        own = replace(cfg, steps=0, guidance=-1.0, sampler="auto", path="full")
        teacher = load_subject(own, cfg.teacher, "teacher", cfg.teacher)
        best = measure(cfg, teacher)
        result, seconds = measure(cfg, subject, best), timed(cfg, [teacher, subject])
        with_times(cfg, [best, result], seconds)
        more = {"teacher": best.record, "speed": speedup(cfg, teacher, subject, seconds)}
    else:
        result = measure(cfg, subject)
        with_times(cfg, [result], timed(cfg, [subject]))
    record = result.record | {"plan": subject.plan} | more
    write(out, replace(result, record=record))
    say(f"{out}: {listed(record)}")
    if more:
        say(f"teacher={cfg.teacher}: {listed(more['teacher'])}")
        say_speed(more["speed"])
    if out.parent.name == "evaluate" and (run := out.parent.parent / "config.yaml").is_file():
        say(f"next: {command('report', run=run.parent)}")
    else:
        say(f"next: {command('generate', model=cfg.model, prompt=SHAPES_PROMPT, out=out.with_name('clip.gif'))}")


if __name__ == "__main__":
    main(evaluate, "evaluate")
