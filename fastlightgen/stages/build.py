"""From a configuration to a stage: which networks it needs, where they come from, what is checked before it starts."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from fastlightgen.blocks import read_importance
from fastlightgen.config import Stage0, Stage1, Stage2, Stage3, numbers, preset, presets
from fastlightgen.data.source import Batch, Source
from fastlightgen.engine.folder import StageFolder, read_run
from fastlightgen.engine.shards import keeper, shape
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.folder.weights import digest, load_model, read_card, trained_folder
from fastlightgen.models.lora import attach_lora
from fastlightgen.parallel.clock import clock
from fastlightgen.parallel.log import say
from fastlightgen.rng import generator, rows
from fastlightgen.stages.check import check_source, check_teacher
from fastlightgen.stages.distill import Distill, Networks
from fastlightgen.stages.prune import Prune
from fastlightgen.stages.teacher import Teacher

Batches = Callable[[int], Batch]


def set_checkpointing(cfg, source: Source, *nets: VideoDiT) -> None:
    """Switch activation checkpointing on for the networks that train, and say what a block boundary costs."""
    if not cfg.checkpointing:
        return
    for net in nets:
        net.checkpointing, net.keep_attention = True, min(cfg.keep_attention, net.num_blocks)
    size = nets[0].hidden_bytes(source.batch(0, cfg.batch).x0) / cfg.sequence_parallel / 2**20
    say(f"checkpointing: {size:.1f} MiB per block, and as much for each of {cfg.keep_attention} kept attention outputs")


def batches_of(cfg, source: Source, device: torch.device) -> Batches:
    def batches(step: int) -> Batch:
        with clock.part("data"):
            return source.batch(step, cfg.batch, rows(cfg.batch)).to(device)

    return batches


def check_data(cfg, source: Source, net: VideoDiT, card: dict) -> None:
    """Stop before a cache that was not made for this network; look whether the teacher knows its clips."""
    check_source(source, net, card, cfg.data)
    if cfg.engine == "local":  # a sharding engine places the networks first
        check_teacher(cfg, net, source)


def load(cfg, model: str | Path, device: torch.device) -> VideoDiT:
    """A network where the engine wants it: float32 under engine=local; under deepspeed in the type that computes, and
    with zero=3 only this rank's share of every weight."""
    if cfg.engine == "local":
        return load_model(model, device, seed=cfg.seed, allow_pt=cfg.allow_pt)
    keep = keeper(cfg, device)
    return load_model(model, "cpu" if keep else device, getattr(torch, cfg.dtype), cfg.seed, cfg.allow_pt, keep)


def another(cfg, net: VideoDiT, model: str | Path, device: torch.device) -> VideoDiT:
    """A copy of a network that `load` has just made of `model`; shares of weights are read once more."""
    return load(cfg, model, device) if keeper(cfg, device) else copy.deepcopy(net)


def card_of(source: Source) -> dict:
    """What a model's card keeps of its data: the VAE, which a later cache must share."""
    return {"vae": source.description["vae"]} if "vae" in source.description else {}


def build_teacher(cfg: Stage0, source: Source, device: torch.device) -> Teacher:
    net = load(cfg, cfg.init or cfg.model, device)
    set_checkpointing(cfg, source, net)
    start = cfg.init or cfg.model
    card = preset(start)["inference"] if start in presets() else read_card(start)
    check_source(source, net, card, cfg.data)
    kept = {k: card.get(k) for k in ("steps", "guidance")} | card_of(source)
    return Teacher(cfg, net, batches_of(cfg, source, device), kept)


def build_ranking(cfg: Stage1, source: Source, device: torch.device) -> tuple[VideoDiT, list[float]]:
    """The model, and what dropping each of its blocks saves in the unit of `ratio`."""
    model = load(cfg, trained_folder(cfg.model), device).requires_grad_(False)
    check_data(cfg, source, model, read_card(trained_folder(cfg.model)))
    costs = [1.0] * model.num_blocks
    if cfg.ratio_unit == "params":
        costs = [float(sum(shape(p).numel() for p in b.parameters())) for b in model.blocks]
    elif cfg.ratio_unit == "flops":
        batch = source.batch(0, 1)
        costs = [float(f) for f in model.block_flops(batch.x0, batch.cond)]
    return model, costs


def build_prune(cfg: Stage2, source: Source, device: torch.device) -> Prune:
    folder = trained_folder(cfg.teacher or cfg.model)
    net = load(cfg, folder, device)
    ranking = read_importance(cfg.importance or Path(cfg.run) / "stage1" / "importance.json", net.num_blocks)
    card = {"source": str(folder)} | {k: read_card(folder).get(k) for k in ("steps", "guidance")} | card_of(source)
    check_data(cfg, source, net, read_card(folder))

    set_checkpointing(cfg, source, net)

    def held_out() -> Batch:
        return source.held_out(0, 32)  # the guard moves what it looks at

    target = another(cfg, net, folder, device) if cfg.target != "self" else None
    return Prune(cfg, net, ranking["pruned"], batches_of(cfg, source, device), held_out, card, target)


def build_distill(cfg: Stage3, source: Source, device: torch.device) -> Distill:
    folder = Path(cfg.stage2_model or Path(cfg.run) / "stage2" / "model")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: there is no Stage II model; run stage=2 with the same run= first, or give stage2_model="
        )
    card = read_card(folder)
    keep: Sequence[int] | None = card.get("pruned_path")
    if keep is None:
        raise ValueError(f"{folder}/fastlightgen.json: names no pruned_path; wanted a model that stage=2 made")
    teacher = load(cfg, folder, device).requires_grad_(False)
    check_data(cfg, source, teacher, card)
    student = another(cfg, teacher, folder, device).requires_grad_(True).prune(keep)
    original = None
    if cfg.strong == "original":
        original = load(cfg, trained_folder(cfg.model), device).requires_grad_(False)
    fake_keep = keep if cfg.fake_arch == "pruned" else None
    if cfg.fake_mode == "lora":  # literally shared weights: the adapters count for the fake's predictions only
        fake, trained = teacher, attach_lora(teacher, cfg.lora_rank, generator(cfg.seed, 7))
    else:
        fake = another(cfg, teacher, folder, device).requires_grad_(True)
        fake, fake_keep = (fake.prune(keep), None) if fake_keep is not None else (fake, None)
        trained = fake
    set_checkpointing(cfg, source, student, fake)
    nets = Networks(student, teacher, list(keep), fake, fake_keep, trained, cfg.fake_mode == "lora", original)
    kept = {"source": card.get("source"), "kept_blocks": list(keep)} | card_of(source)
    return Distill(cfg, nets, batches_of(cfg, source, device), kept)


def stage_folder(cfg, number: int) -> StageFolder:
    """The stage's folder, opened for exactly this configuration and these inputs of earlier stages."""
    config, names = asdict(cfg), list(numbers(cfg))
    if number == 2:
        ranking = Path(cfg.importance or Path(cfg.run) / "stage1" / "importance.json")
        config["ranking_used"] = digest(ranking) if ranking.is_file() else None
        names.append("ranking_used")
    if number == 3 and not cfg.stage2_model:
        made = read_run(Path(cfg.run)).get("stage2") or {}
        config["stage2_made_with"] = {k: made[k] for k in [*numbers(Stage2(run=cfg.run)), "ranking_used"] if k in made}
        names.append("stage2_made_with")
    return StageFolder(cfg.run, number, config, names, cfg.overwrite)
