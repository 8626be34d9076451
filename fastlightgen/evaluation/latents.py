"""evaluate model=DIR data=CACHE: measures a network on the clips of a latent cache that training holds out.

The network samples latents for the conditions of these clips; they are compared with the clips' own latents, so neither
a VAE nor a feature network is needed. A teacher samples from the same noise.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastlightgen.atomic import write_json
from fastlightgen.config import Evaluate, command, compute_type
from fastlightgen.data.source import Batch, Source
from fastlightgen.engine.local import pick_device
from fastlightgen.evaluation import sets
from fastlightgen.evaluation.sets import Statistics, differences, distances, intervals_of, means, scores_of
from fastlightgen.files.tensors import save_tensors
from fastlightgen.metrics.frechet import normalise
from fastlightgen.metrics.intervals import MIN_CLIPS, Resampled, resample_all
from fastlightgen.metrics.latent import latent_features
from fastlightgen.models.experts import Model
from fastlightgen.models.folder.pair import load_sampler, sampler_card
from fastlightgen.models.folder.weights import trained_folder
from fastlightgen.models.sample import plan_record, sample, sampling_plan
from fastlightgen.parallel.log import bar, say
from fastlightgen.parallel.threads import set_threads
from fastlightgen.rng import generator
from fastlightgen.stages.check import check_source
from fastlightgen.world.source import open_source

NAMES = ("features", "energies", "real_features", "real_energies")  # what scores need of each clip
PURPOSE = 15  # of these random draws
GOALS = {"frechet": "low", "kid": "low"} | dict.fromkeys(("precision", "recall", "coverage"), "high")
GOALS |= dict.fromkeys(("motion", "detail", "contrast"), "one")
AT_ONCE = 2_000_000  # numbers of the latents of one network call: one clip of 480x832x81, more of small ones


@dataclass
class Sampled:
    """A network with its plan, and what was measured of its latents."""

    net: Model
    folder: Path
    plan: dict[str, Any]
    keep: list[int] | None
    features: list[Tensor] = field(default_factory=list)
    energies: list[Tensor] = field(default_factory=list)
    away: list[Tensor] = field(default_factory=list)  # to the teacher
    seconds: list[float] = field(default_factory=list)  # per clip

    def values(self, real: "Sampled") -> dict[str, Tensor]:
        """What was measured of each clip: features [n,D], energies [n,3], the distance to the teacher [n]."""
        found = {"features": torch.cat(self.features), "energies": torch.cat(self.energies)}
        found |= {"real_features": torch.cat(real.features), "real_energies": torch.cat(real.energies)}
        return found | ({"away": torch.cat(self.away)} if self.away else {})


def evaluate_latents(cfg: Evaluate) -> None:
    """Sample the held-out clips, print a table, and write a JSON file."""
    set_threads(cfg.threads)
    if cfg.noises > 1:
        raise ValueError(f"noises={cfg.noises}: diversity is measured in the built-in world only; leave noises= out")
    source, device = open_source(cfg.data, cfg.seed), pick_device(cfg.device)
    clips = int(min(cfg.clips, source.num_held_out))
    if clips < MIN_CLIPS:
        say(f"warning: data={cfg.data} holds out {clips} clips; distances of fewer than {MIN_CLIPS} rank no models")
    student = opened(cfg, cfg.model, source, device)
    subjects = {"teacher": opened(cfg, cfg.teacher, source, device, own=True)} if cfg.teacher else {}
    subjects |= {"student": student}
    real = Sampled(student.net, student.folder, {}, None)
    with bar(clips * len(subjects), "sampling", cfg.progress, unit="clip") as ticks:
        for first, batch in batches(cfg, source, clips):
            note(real, batch.x0)
            made: dict[str, Tensor] = {}
            for name, subject in subjects.items():
                made[name] = draw(cfg, subject, batch.to(device), first)
                note(subject, made[name], made.get("teacher") if name == "student" else None)
                ticks.update(len(batch.x0))
    values = {name: subject.values(real) for name, subject in subjects.items()}
    found = {name: statistics(value) for name, value in values.items()}
    record = {name: measured(cfg, subject, found[name]) for name, subject in subjects.items()}
    out = dict(record["student"])
    if cfg.teacher:
        away = differences(found["student"], found["teacher"], GOALS, cfg.seed)
        out |= {"teacher": record["teacher"], "against_teacher": away}
    path = Path(cfg.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path.with_suffix(".values.safetensors"), values["student"])
    write_json(path, out | {"data": cfg.data, "data_hash": source.name, "clips": clips, "seed": cfg.seed})
    for name in subjects:
        listed = ", ".join(f"{score} {value:.4g}" for score, value in record[name]["scores"].items())
        folder = subjects[name].folder
        say(f"{folder}: {listed}; {record[name]['seconds_per_clip']:.3g} s a clip")
    if against := out.get("against_teacher"):
        say("against the teacher: " + ", ".join(f"{score} {away['verdict']}" for score, away in against.items()))
    say(f"next: {command('speed', model=cfg.model, pipeline='PIPELINE')}")


def opened(cfg: Evaluate, model: str, source: Source, device: torch.device, own: bool = False) -> Sampled:
    """Load a network; `own`: with its own sampling plan, whatever the keys ask of the student."""
    folder = trained_folder(model)
    card = sampler_card(folder)
    keep = None
    if cfg.path == "pruned" and not own and (keep := card.get("pruned_path")) is None:
        raise ValueError(f"path=pruned: {folder} names no pruned_path; wanted a model that stage=2 made")
    dtype = getattr(torch, compute_type("auto", device.type == "cuda", cfg.data != "shapes"))
    net = load_sampler(folder, device, dtype, cfg.allow_pt).requires_grad_(False)
    check_source(source, net, card, cfg.data)
    asked = (0, -1.0, "auto") if own else (cfg.steps, cfg.guidance, cfg.sampler)
    return Sampled(net, folder, sampling_plan(card, *asked, net.released, force=cfg.force), keep)


def batches(cfg: Evaluate, source: Source, clips: int) -> Iterator[tuple[int, Batch]]:
    """Yield (number of the first clip, clips)."""
    size = max(1, min(cfg.batch, AT_ONCE // source.held_out(0, 1).x0.numel()))
    for first in range(0, clips, size):
        yield first, source.held_out(first, min(size, clips - first))


def draw(cfg: Evaluate, subject: Sampled, batch: Batch, first: int) -> Tensor:
    """Sample latents; the noise depends on the seed and on the number of the clip."""
    each = [
        torch.randn(batch.x0.shape[1:], generator=generator(cfg.seed, PURPOSE, first + i)) for i in range(len(batch.x0))
    ]
    noise, start = torch.stack(each).to(batch.x0.device), time.perf_counter()
    x0 = sample(
        subject.net, batch.cond, batch.null, noise, **subject.plan, seed=cfg.seed + first, keep=subject.keep
    )  # fmt: skip
    found = x0.float().cpu()  # waits for the GPU
    subject.seconds.append((time.perf_counter() - start) / len(found))
    return found


def note(subject: Sampled, x0: Tensor, teacher: Tensor | None = None) -> None:
    """Measure latents [B,C,F,H,W]."""
    subject.features.append(latent_features(x0))
    subject.energies.append(torch.stack([motion(x0), detail(x0), x0.double().flatten(1).var(1)], 1))
    if teacher is not None:
        away = (x0.double() - teacher).flatten(1).square().sum(1)
        subject.away.append(away / teacher.double().flatten(1).square().sum(1))


def motion(x0: Tensor) -> Tensor:
    """Mean square of the differences between frames of each clip [B]; 0 for one frame."""
    return x0.double().diff(dim=2).flatten(1).square().sum(1) / x0[0].numel()


def detail(x0: Tensor) -> Tensor:
    """Mean square of the differences between neighbours in rows and in columns [B]."""
    rows, columns = (x0.double().diff(dim=axis).flatten(1).square().mean(1) for axis in (3, 4))
    return (rows + columns) / 2


def statistics(values: Mapping[str, Tensor]) -> Statistics:
    """The scores against the clips of the cache."""
    if lacking := [name for name in NAMES if name not in values]:
        raise ValueError(f"the values of the clips lack {', '.join(lacking)}; measure them again")
    ratio = values["energies"] / values["real_energies"].mean(0)
    found = dict(zip(("motion", "detail", "contrast"), ratio.T, strict=True))
    if "away" in values:
        found["to_teacher"] = values["away"]
    return means(found) | distances(values["real_features"], values["features"], normalise)


def resampled(values: Mapping[str, Tensor], seed: int) -> dict[str, Resampled]:
    return resample_all(statistics(values), seed)


def compared(model: Mapping[str, Resampled], other: Mapping[str, Resampled], _seed: int) -> dict[str, dict]:
    """The differences to another model; unlike those of the built-in world, they need no reference of a seed."""
    return sets.compared(model, other, GOALS)


def measured(cfg: Evaluate, subject: Sampled, found: Statistics) -> dict[str, Any]:
    """The record of a network."""
    return {
        "title": str(subject.folder),
        "model": str(subject.folder),
        "num_params": sum(p.numel() for p in subject.net.parameters()),
        "num_blocks": len(subject.keep or range(subject.net.num_blocks)),
        "sampler": plan_record(subject.plan, subject.net.embeds_guidance),
        "scores": scores_of(found),
        "intervals": intervals_of(found, cfg.seed),
        "seconds_per_clip": median(subject.seconds),
    }
