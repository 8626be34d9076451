"""The stages of the cases of worker.py: built from files, or with networks of a few thousand parameters."""

from dataclasses import replace
from functools import partial

import torch
from helpers import KEPT, PRUNED, config, crop, small_hunyuan, small_wan

from fastlightgen.config import load, method_for
from fastlightgen.data.source import Batch
from fastlightgen.models.lora import attach_lora
from fastlightgen.parallel import ranks
from fastlightgen.rng import generator, rows
from fastlightgen.stages import distill, prune, teacher
from fastlightgen.stages.build import Builder
from fastlightgen.stages.distill import Distill
from fastlightgen.stages.networks import Networks
from fastlightgen.stages.prune import Prune
from fastlightgen.stages.teacher import Teacher
from fastlightgen.world.source import ShapesSource

BATCH = 4
CPU = torch.device("cpu")
REPLACE = {"image_condition_type": "token_replace", "in_channels": 12}
NETWORKS = {
    "wan": small_wan,
    "hunyuan": partial(small_hunyuan, 2, 2),
    "hunyuan token replace": partial(small_hunyuan, 2, 2, **REPLACE),
}


def clips(batch: Batch, family: str, size: int) -> Batch:
    """Crop every clip to a corner; for token_replace its first frame becomes the image."""
    batch = crop(batch, size)
    if "replace" not in family:
        return batch
    return Batch(batch.x0, *(replace(c, image=batch.x0[:, :, :1]) for c in (batch.cond, batch.null)))


def batches(step: int, family: str = "wan", size: int = 4) -> Batch:
    return clips(ShapesSource(0).batch(step, BATCH, rows(BATCH)), family, size)


def configured(case: dict):
    """Return the configuration of a case."""
    return config(case["stage"], f"batch={BATCH}", "iters=100", "warmup=0", "lr=1e-3", *case.get("words", []))


def make(number: int, words: list[str], family: str = "wan", size: int = 4):
    """Return a stage whose networks have a few thousand parameters."""
    network, made = NETWORKS[family], partial(batches, family=family, size=size)
    cfg = configured({"stage": number, "words": words})
    if number == 0:
        return Teacher(cfg, network(), made, {})
    if number == 2:
        net = network()
        net.checkpointing = cfg.checkpointing
        return Prune(cfg, net, PRUNED, made, lambda: clips(ShapesSource(0).held_out(0, 4), family, size), {})
    teacher = network(seed=1).requires_grad_(False)
    student = network(seed=1).prune(KEPT)
    lora = cfg.fake_mode == "lora"
    fake = teacher if lora else network(seed=1).prune(KEPT)
    trained = attach_lora(teacher, cfg.lora_rank, generator(0, 7)) if lora else fake
    return Distill(cfg, Networks(student, teacher, KEPT, fake, KEPT if lora else None, trained, lora, None), made, {})


def new_stage(case: dict):
    """Return the stage of a case: built from its files, or with networks of its own."""
    if "method" in case:
        return rival(case)
    if "files" not in case:
        return make(case["stage"], case.get("words", []), case.get("family", "wan"), case.get("size", 4))
    cfg = built_with(case)
    return BUILDS[case["stage"]](cfg, Cropped(cfg, ShapesSource(0), CPU))


def rival(case: dict):
    """Return a stage of another method, built from model folders as the train command does."""
    engine = [] if ranks.size() == 1 else ["engine=deepspeed", f"zero={case.get('zero', 3)}"]
    words = [f"stage={case['stage']}", "run=unused", f"method={case['method']}", f"batch={BATCH}", "shift=3"]
    words += ["iters=100", "warmup=0", "dtype=float32", "lr=1e-3"]
    given = dict(w.split("=", 1) for w in [*words, *engine, *case["words"]])
    cfg = load([f"{k}={v}" for k, v in given.items()])
    return method_for(cfg).build(cfg, Cropped(cfg, ShapesSource(0), CPU))


class Cropped(Builder):
    """Gives a stage small clips."""

    def batches(self, step: int) -> Batch:
        return batches(step)


def built_with(case: dict):
    """Return the configuration of a case that is built from files."""
    words = ["engine=deepspeed", f"dtype={case['dtype']}", f"zero={case['zero']}", *case["words"]]
    return configured(case | {"words": words})


BUILDS = {0: teacher.build, 2: prune.build, 3: distill.build}
