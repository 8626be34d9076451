"""Runs of a model with two experts: one run for each, and what the run of the low-noise one needs of the other.

models/experts.py describes the design. A command for both experts is the ordinary command for one, twice: with the
model folder and the times of `high` in RUN/high, then with those of `low` in RUN/low.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlightgen import flow
from fastlightgen.config import EXPERTS, ConfigError, method_for, result_of
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.cost import Network
from fastlightgen.models.folder.experts import expert_of, experts_of
from fastlightgen.models.folder.files import CHECKSUMS, digest
from fastlightgen.models.folder.networks import config_of
from fastlightgen.models.folder.weights import read_card
from fastlightgen.planner.step import Net, Walk
from fastlightgen.planner.walk import Route
from fastlightgen.stages.build import Builder

STARTS = ("model", "teacher", "init", "stage2_model", "start_model")  # keys that may name both experts


def runs_of(cfg: Any) -> list[Any]:
    """The runs that a command stands for: that of the configuration itself, or one for each expert to train."""
    pair, alone = experts_of(cfg.model), expert_of(cfg.model)
    if pair is None:
        return [of_one(cfg, *alone) if alone else without_experts(cfg)]
    names = EXPERTS if cfg.expert in ("auto", "both") else (cfg.expert,)
    return [changed(cfg, name, cfg.boundary or pair.boundary, f"{cfg.run}/{name}") for name in names]


def of_one(cfg: Any, name: str, boundary: float) -> Any:
    """The run of an expert whose own folder is given."""
    if cfg.expert not in ("auto", name):
        raise ConfigError(f"expert={cfg.expert}: model={cfg.model} is the {name}-noise expert; leave expert= out")
    return changed(cfg, name, cfg.boundary or boundary, cfg.run)


def without_experts(cfg: Any) -> Any:
    for key, default in (("expert", "auto"), ("boundary", 0.0), ("partner", "")):
        if (value := getattr(cfg, key)) != default:
            raise ConfigError(
                f"{key}={value}: model={cfg.model} has one network, and only models with two, as Wan2.2 A14B, have "
                f"experts; leave {key}= out, or give the folder that holds both"
            )
    return cfg


def changed(cfg: Any, name: str, boundary: float, run: str) -> Any:
    """The configuration of one expert's run."""
    given = {key: vars(cfg)[key] for key in STARTS if vars(cfg).get(key)}
    own = {key: pair.of(name) for key, value in given.items() if (pair := experts_of(value))}
    out = replace(cfg, expert=name, boundary=boundary, run=run, **own)
    out.origins = cfg.origins
    return out


def join(cfg: Any) -> bool:
    """Link the results of both experts below that of the stage in the run of `cfg`; False if one is not finished."""
    for stage in (2, 3) if cfg.stage == "all" else (int(cfg.stage),):
        shared, results = result_of(cfg.run, stage), {name: result_of(f"{cfg.run}/{name}", stage) for name in EXPERTS}
        if not all(place.exists() for place in results.values()):
            return False
        for name, place in results.items():
            if place.is_dir() and not (shared / name).is_symlink():
                shared.mkdir(parents=True, exist_ok=True)
                (shared / name).symlink_to(os.path.relpath(place, shared), target_is_directory=True)
    return True


def check_expert_run(cfg: Any) -> None:
    """Raise what would stop the stage of an expert, before anything large is read."""
    if not cfg.boundary:
        return
    method = method_for(cfg)
    if reason := method.unfit.get(cfg.expert):
        raise ValueError(f"method={method.name}: not for expert={cfg.expert}: {reason}; use another method for it")
    for key, value in (("score", "frechet"), ("choose", "best")):
        if vars(cfg).get(key) == value and not needs_partner(cfg):
            raise ValueError(
                f"{key}={value}: makes clips, which take both experts, and this is the run of expert={cfg.expert} "
                f"alone; leave {key}= out"
            )
    if cfg.stage == "3":
        flow.rungs_between(flow.ladder(cfg.steps, cfg.shift), cfg.bounds)
    if needs_partner(cfg):
        check_partner(cfg)


def needs_partner(cfg: Any) -> bool:
    """Does the student walk down rungs that belong to the other expert?"""
    return cfg.expert == "low" and cfg.stage == "3" and vars(cfg).get("rollout") == "simulate"


def partner_folder(cfg: Any) -> Path:
    return Path(cfg.partner) if cfg.partner else result_of(Path(cfg.run).parent / "high", 3)


def partner(cfg: Any, with_: Builder) -> VideoDiT | None:
    """The frozen student of the high-noise expert, which begins the rollouts of the low-noise one; else None."""
    return with_.load(check_partner(cfg)).requires_grad_(False) if needs_partner(cfg) else None


def check_partner(cfg: Any) -> Path:
    """The folder of the partner; raise unless it is a student that samples with the same ladder."""
    folder = partner_folder(cfg)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"partner={folder}: there is no model folder; train expert=high first, give partner=, or let the rollouts "
            "start from noised clips (rollout=data)"
        )
    card = read_card(folder)
    wanted = {"expert": "high", "boundary": cfg.boundary, "ladder": flow.ladder(cfg.steps, cfg.shift)}
    for key, value in (wanted | {"sampler": cfg.sampler}).items():
        if card.get(key) != value:
            raise ValueError(
                f"partner={folder}: has {key} {card.get(key)}, this run {value}; both experts sample with one ladder"
            )
    return folder


def partner_used(cfg: Any) -> dict[str, Any]:
    """The partner among the inputs of a stage: another one makes another student."""
    file = partner_folder(cfg) / CHECKSUMS
    return {"partner_used": digest(file) if file.is_file() else None} if needs_partner(cfg) else {}


def partner_net(cfg: Any, net: Network, student: Net) -> dict[str, Net]:
    """The partner, for the planner: as large as the student, as long as it is not there."""
    if not needs_partner(cfg):
        return {}
    folder = partner_folder(cfg)
    if not (cfg.partner or cfg.run) or not (folder / "config.json").is_file():
        return {"partner": replace(student, updates=0, averaged=False, adapters=0, apart=False)}
    return {"partner": Net(network=net.of(config_of(folder)))}


def rollout_walks(cfg: Any) -> list[Walk]:
    """The walks without gradient that make the clips of an iteration, for the planner."""
    own = flow.rungs_between(flow.ladder(cfg.steps, cfg.shift), cfg.bounds)
    students, critics = cfg.updates
    shared = cfg.rollouts == "shared"  # one walk of the ladder for `ratio` critic updates
    early = (len(own) - 1) / 2 if cfg.rollout == "simulate" else 0  # mean number of own steps before the exit
    steps = len(own) * critics / cfg.ratio if shared else students * early + critics * (early + 1)
    walked = [Walk("student", [Route()], steps)]
    if needs_partner(cfg):
        walked.append(Walk("partner", [Route()], own.start * (critics / cfg.ratio if shared else students + critics)))
    return walked
