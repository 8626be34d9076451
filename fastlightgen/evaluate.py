"""python -m fastlightgen.evaluate model=DIR out=FILE.json ...: measures scores, speed and size on held-out prompts."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastlightgen.atomic import write_json
from fastlightgen.blocks import read_importance
from fastlightgen.config import Evaluate, Run, for_evaluate, for_stage, main, method_for
from fastlightgen.data.frames import to_uint8
from fastlightgen.data.source import Batch
from fastlightgen.data.version import check_model, check_version
from fastlightgen.engine.local import pick_device
from fastlightgen.metrics.intervals import MIN_CLIPS, Resampled, interval
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.folder.weights import load_model, read_card, read_json, trained_folder
from fastlightgen.models.sample import sample, sampling_plan
from fastlightgen.parallel.log import bar, say
from fastlightgen.rng import generator
from fastlightgen.world.codec import Codec
from fastlightgen.world.diversity import redraw
from fastlightgen.world.score import caption_spreads, clip_values, compared, resampled, scores_of
from fastlightgen.world.shapes import WORLD, Clips, Shapes
from fastlightgen.world.source import ShapesSource, shapes_batch


@dataclass
class Subject:
    """A network to evaluate, with its sampling plan."""

    name: str  # of its files
    title: str  # in reports
    model: VideoDiT
    folder: Path
    plan: dict  # arguments of models.sample.sample
    keep: list[int] | None = None  # the blocks that run; None: all

    @property
    def evaluations(self) -> int:
        """Network evaluations per clip: two per step with guidance, unless the network embeds the guidance."""
        single = self.plan["guidance"] == 1.0 or self.model.embeds_guidance
        return len(self.plan["times"]) * (1 if single else 2)

    def block_flops(self, batch: Batch) -> list[int]:
        """Floating-point operations of each running block in one evaluation."""
        flops = self.model.block_flops(batch.x0, batch.cond)
        return [f for i, f in enumerate(flops) if self.keep is None or i in self.keep]


@dataclass
class Result:
    """The measurements of a model."""

    record: dict
    shown: Tensor  # the clips to show
    values: dict[str, Tensor]  # of each clip; empty if the scores came with the model
    resampled: dict[str, Resampled]  # of each score


def load_subject(cfg: Evaluate, model: str, name: str, title: str) -> Subject:
    """Load a model folder and make its sampling plan from its card and the configuration."""
    folder = trained_folder(model)
    check_model(folder, ShapesSource.description)
    card = read_card(folder)
    keep = None
    if cfg.path == "pruned":
        keep = card.get("pruned_path")
        if keep is None:
            raise ValueError(f"path=pruned: {folder} names no pruned_path; wanted a model that stage=2 made")
    net = load_model(folder, pick_device(cfg.device), allow_pt=cfg.allow_pt).requires_grad_(False)
    plan = sampling_plan(card, cfg.steps, cfg.guidance, cfg.sampler, net.released)
    return Subject(name, title, net, folder, plan, keep)


def draw(cfg: Evaluate, subject: Subject, count: int, noises: int = 1) -> tuple[Tensor, Clips, float]:
    """Sample `count` clips: (clips [n,F,3,H,W], the real clips with their prompts, seconds per clip).

    The noise depends on the seed and the clip's position only, so that all subjects start from the same noise. With
    several noises per prompt, the clips of a prompt follow each other, and no first frame is given.
    """
    if cfg.data != "shapes":
        raise ValueError(f"data={cfg.data}: only clips of data=shapes can be scored, because their truth is known")
    world, made, asked, seconds = Shapes(seed=cfg.seed, split="test"), [], [], 0.0
    purpose = 8  # of the random numbers
    if noises > 1:
        world.first_frame_prob, purpose = 0.0, 12
    device = next(subject.model.parameters()).device
    with bar(count, f"sampling {subject.title}", cfg.progress) as progress:
        for start in range(0, count, cfg.batch):
            clips = world.batch([i // noises for i in range(start, min(start + cfg.batch, count))])
            batch = shapes_batch(clips).to(device)
            noise = torch.randn(batch.x0.shape, generator=generator(cfg.seed, purpose, start)).to(device)
            clock = time.perf_counter()
            x0 = sample(
                subject.model, batch.cond, batch.null, noise, **subject.plan, seed=cfg.seed + start, keep=subject.keep
            )
            made.append(Codec().decode(x0.float().cpu()))  # the copy to the CPU waits for the GPU
            seconds += time.perf_counter() - clock
            asked.append(clips)
            progress.update(len(noise))
    return torch.cat(made), join(asked), seconds / count


def join(parts: list[Clips]) -> Clips:
    """Concatenate clips; the truth, which no score reads, is that of the first part."""
    captions = [c for part in parts for c in part.captions]
    return Clips(torch.cat([p.video for p in parts]), captions, torch.cat([p.has_first for p in parts]), parts[0].truth)


def measure(cfg: Evaluate, subject: Subject) -> Result:
    """Measure a subject. A teacher with shipped scores samples only the clips to show."""
    shipped = shipped_scores(cfg, subject)
    count = cfg.clips if shipped is None else min(cfg.show, cfg.clips)
    clips, asked, seconds = draw(cfg, subject, count)
    record = {
        "name": subject.name,
        "title": subject.title,
        "model": str(subject.folder),
        "world": WORLD,
        "num_params": num_params(subject),
        "num_blocks": len(subject.keep or range(subject.model.num_blocks)),
        "kept_blocks": subject.keep or read_card(subject.folder).get("kept_blocks"),
        "sampler": {
            "kind": subject.plan["kind"],
            "steps": len(subject.plan["times"]),
            "guidance": subject.plan["guidance"],
            "evaluations": subject.evaluations,
        },
        "seconds_per_clip": seconds,
        "batch": min(cfg.batch, count),
    }
    if shipped is None:
        spread = None
        if cfg.noises > 1:
            more, again, _ = draw(cfg, subject, cfg.clips // cfg.noises * cfg.noises, cfg.noises)
            spread = caption_spreads(more, again, cfg.noises)
        return measured(cfg, record, clips, asked, spread)
    record |= {"scores": shipped["scores"], "attributes": shipped["attributes"], "clips": shipped["clips"]}
    record |= {"seed": cfg.seed, "shown": shown(cfg, asked)}
    record["note"] = "scores that ship with this model, measured when it was trained"
    return Result(record, clips[: cfg.show], {}, {})


def measured(cfg: Evaluate, record: dict, clips: Tensor, asked: Clips, spread: Tensor | None) -> Result:
    """Add the scores of clips to a record, with their 95% intervals."""
    values, attributes = clip_values(clips, asked, cfg.seed)
    if spread is not None:
        values["spread"] = spread
    found = resampled(values, cfg.seed)
    record |= {"clips": cfg.clips, "seed": cfg.seed, "scores": scores_of(values, cfg.seed), "attributes": attributes}
    record |= {"intervals": {name: interval(f) for name, f in found.items()}, "shown": shown(cfg, asked)}
    if not found:
        record["note"] = f"{cfg.clips} clips are too few to rank models; wanted at least {MIN_CLIPS}"
    return Result(record, clips[: cfg.show], values, found)


def shown(cfg: Evaluate, asked: Clips) -> list[dict]:
    """The prompts of the clips to show."""
    prompts = zip(asked.captions, asked.has_first.tolist(), strict=True)
    return [{"caption": caption, "has_first": first} for caption, first in prompts][: cfg.show]


def num_params(subject: Subject) -> int:
    """Parameters of the network without the blocks that do not run."""
    model = subject.model
    dropped = [b for i, b in enumerate(model.blocks) if subject.keep is not None and i not in subject.keep]
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for b in dropped for p in b.parameters())


def shipped_scores(cfg: Evaluate, subject: Subject) -> dict | None:
    """Return the record in the model folder's scores.json that was measured with this plan, or None.

    show=0 asks for a new measurement, so it ignores shipped scores.
    """
    path = subject.folder / "scores.json"
    if not path.is_file() or subject.keep is not None or cfg.show == 0:
        return None
    found = [r for r in read_json(path)["records"] if r["plan"] == subject.plan]
    for record in found:
        remedy = "delete the file, or measure again with show=0"
        check_version(path, "measured", record, ShapesSource.description, remedy)
    return found[0] if found else None


def real_result(cfg: Evaluate) -> Result:
    """Measure the held-out real clips: the scores of a perfect model."""
    world = Shapes(seed=cfg.seed, split="test")
    asked, spread = world.batch(range(cfg.clips)), None
    if cfg.noises > 1:
        again = redraw(world, cfg.clips // cfg.noises, cfg.noises)
        spread = caption_spreads(again.video, again, cfg.noises)
    return measured(cfg, {"name": "real", "title": "Real clips", "world": WORLD}, asked.video, asked, spread)


def write(path: Path, result: Result) -> None:
    """Write the record, NAME.json, the values of each clip, and the clips to show as uint8 [K,F,H,W,3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = to_uint8(result.shown).permute(0, 1, 3, 4, 2).contiguous()
    save_file({"video": frames}, path.with_suffix(".safetensors"))
    if result.values:
        save_file(result.values, path.with_suffix(".values.safetensors"), {"world": str(WORLD)})
    write_json(path, result.record)


def speed(cfg: Evaluate, teacher: Subject, student: Subject) -> dict:
    """Measure the seconds per clip of teacher and student, and predict the speedup from their blocks.

    Both run in this process with the same batch. The prediction counts blocks alone: the teacher's evaluations times
    the operations of its blocks, divided by the same product for the student.
    """
    once = replace(cfg, progress=False)
    count = min(cfg.show or 8, cfg.clips)
    draw(once, student, count)  # warm-up
    # A student's run is short and its time noisy: take the best of three.
    seconds = [draw(once, teacher, count)[2], min(draw(once, student, count)[2] for _ in range(3))]
    clip = shapes_batch(Shapes(seed=cfg.seed, split="test").batch(range(1)))
    all_, kept = teacher.block_flops(clip), student.block_flops(clip)
    alike = len({*all_, *kept}) == 1
    size = len if alike else lambda flops: f"{sum(flops) / 1e9:.3g} GFLOP"  # equal blocks: count them
    formula = f"{teacher.evaluations} x {size(all_)} / ({student.evaluations} x {size(kept)})"
    return {
        "theory": teacher.evaluations * sum(all_) / (student.evaluations * sum(kept)),
        "theory_formula": formula,
        "measured": seconds[0] / seconds[1],
        "teacher_seconds": seconds[0],
        "student_seconds": seconds[1],
        "batch": count,
    }


def evaluate_run(cfg: Run) -> None:
    """The last step of stage=all: evaluate teacher, teacher in few steps, untrained pruned model, Stage II, student."""
    run = Path(cfg.run)
    student_folder, stage2_folder = str(run / "stage3" / "model"), str(run / "stage2" / "model")
    base = for_evaluate(cfg, model=student_folder, teacher=cfg.model, out=str(run / "evaluate" / "student.json"))
    card = read_card(student_folder)
    # The student's sampling plan, for the models that it is compared with.
    few = replace(base, steps=len(card["ladder"]), guidance=1.0, sampler=card["sampler"])
    n, kept = len(card["ladder"]), len(card["kept_blocks"])
    steps = "1 step" if n == 1 else f"{n} steps"

    made_by = {n: method_for(for_stage(cfg, n)).title for n in (2, 3)}
    student = load_subject(base, student_folder, "student", f"{made_by[3]}, {steps}, {kept} blocks")
    teacher = load_subject(base, cfg.model, "teacher", "Teacher")
    teacher.title = f"Teacher, {len(teacher.plan['times'])} steps, guidance {teacher.plan['guidance']:g}"
    guided = replace(few, guidance=-1.0, sampler="ode")  # -1: the model's own guidance
    shortened = load_subject(guided, cfg.model, "teacher-few", f"Teacher, only {steps}")
    ranking = read_importance(run / "stage1" / "importance.json", teacher.model.num_blocks)
    pruned = replace(
        shortened, name="pruned", title=f"Pruned to {kept} blocks, untrained, {steps}", keep=ranking["kept"]
    )
    stage2 = load_subject(
        replace(few, path="pruned"), stage2_folder, "stage2-few", f"{made_by[2]}, {steps}, {kept} blocks"
    )

    write(run / "evaluate" / "real.json", real_result(base))
    resamples: dict[str, Resampled] = {}  # of the teacher, which is the first
    for subject in (teacher, shortened, pruned, stage2, student):
        result = measure(base, subject)
        record, s = result.record, result.record["scores"]
        if subject is teacher:
            resamples = result.resampled
        else:
            record["against_teacher"] = compared(result.resampled, resamples, base.seed)
        write(run / "evaluate" / f"{subject.name}.json", result)
        took = f"{record['seconds_per_clip']:.3f} s a clip"
        say(f"{record['title']}: adherence {s['adherence']:.3f}, Frechet distance {s['frechet']:.2f}, {took}")
    record = speed(base, teacher, student)
    write_json(run / "evaluate" / "speed.json", record)
    theory = f"{record['theory']:.1f}x by counting blocks ({record['theory_formula']})"
    say(f"speedup: {record['measured']:.1f}x measured, {theory}")


def evaluate(cfg: Evaluate) -> None:
    """Evaluate a model and, if teacher= is given, the teacher and the speedup."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.set_flush_denormal(True)  # denormal numbers slow CPUs down
    out = Path(cfg.out)
    subject, teacher = load_subject(cfg, cfg.model, out.stem, cfg.model), None
    if cfg.teacher:  # load it before the long measurement, which an unusable folder would waste
        own = replace(cfg, steps=0, guidance=-1.0, sampler="auto", path="full")
        teacher = load_subject(own, cfg.teacher, "teacher", cfg.teacher)
    result = measure(cfg, subject)
    record = result.record | {"plan": subject.plan}
    if teacher:
        best = measure(cfg, teacher)
        record |= {"teacher": best.record, "speed": speed(cfg, teacher, subject)}
        record["against_teacher"] = compared(result.resampled, best.resampled, cfg.seed)
    write(out, replace(result, record=record))
    say(f"{out}: " + ", ".join(f"{k} {v:.4g}" for k, v in record["scores"].items()))


if __name__ == "__main__":
    main(evaluate, "evaluate")
