"""The builder that hands a method its networks and batches, and runs the checks before a stage starts."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastlightgen.blocks import read_importance
from fastlightgen.config import StageConfig, TrainingKeys, presets
from fastlightgen.data.source import Batch, Source
from fastlightgen.data.version import check_model, check_version
from fastlightgen.engine.roles import Values
from fastlightgen.engine.shards import keeper
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.float8 import in_float8
from fastlightgen.models.folder.weights import file_values, load_model
from fastlightgen.parallel.clock import clock
from fastlightgen.parallel.log import say
from fastlightgen.rng import rows
from fastlightgen.stages.check import check_expert, check_source, check_teacher, require_embedded

HELD_OUT = 32  # held-out clips on which a guard measures


class Builder:
    """Gives a method its networks and batches."""

    guidance: float | None = None  # teacher_guidance=embedded: the scale that the networks read in every batch

    def __init__(
        self, cfg: StageConfig, source: Source, device: torch.device, place: Callable[[VideoDiT], object] | None = None
    ):
        """`place`: the engine's, for a method that walks a network while it builds."""
        self.cfg, self.source, self.device, self.place = cfg, source, device, place

    def load(self, model: str | Path) -> VideoDiT:
        """Load a network: in `dtype`; in float32 with engine=local, except in Stage I, which trains nothing.

        With zero=3 each weight is sharded as it loads: the rank keeps its partition only. There is no float8 copy of
        the weights then, which would undo the sharding: it is made of a block's gathered weights in every call.
        """
        cfg = self.cfg
        if cfg.stage != "0":  # Stage 0 may adapt a network to another version of the built-in world
            check_model(model, self.source.description)
        keep, dtype = keeper(cfg, self.device), torch.float32
        if cfg.engine == "deepspeed" or (cfg.stage == "1" and cfg.dtype == "bfloat16"):
            dtype = getattr(torch, cfg.dtype)
        net = load_model(model, "cpu" if keep else self.device, dtype, cfg.seed, cfg.allow_pt, keep)
        return net if cfg.fp8 == "off" else in_float8(net, keeps=keep is None)

    def copy(self, net: VideoDiT, model: str | Path) -> VideoDiT:
        """Copy a network that `load` has read from `model`; under ZeRO-3 read the model folder once more."""
        return self.load(model) if keeper(self.cfg, self.device) else copy.deepcopy(net)

    def file_values(self, model: str | Path, keep: Sequence[int] | None = None) -> Values | None:
        """Return the reader of `model`'s float32 values for `Role.file_values`; `keep`: blocks of a pruned network.

        A preset's random weights have no file, and one generator draws them all in turn, so that no rank can draw a
        tensor alone. With dtype=bfloat16 their training starts from rounded values.
        """
        return None if str(model) in presets() else partial(file_values, model, keep, self.cfg.allow_pt)

    def batches(self, step: int) -> Batch:
        """Return this process's clips of a step, on its device."""
        with clock.part("data"):
            return self.with_guidance(self.source.batch(step, self.cfg.batch, rows(self.cfg.batch)).to(self.device))

    def held_out(self) -> Batch:
        """Return clips that training never uses, on the CPU."""
        return self.with_guidance(self.source.held_out(0, HELD_OUT))

    def with_guidance(self, batch: Batch) -> Batch:
        return batch if self.guidance is None else batch.with_guidance(self.guidance)

    def read_guidance(self, kind: str, net: VideoDiT, card: dict[str, Any]) -> None:
        """Follow the key teacher_guidance; with embedded, every batch carries the scale of the teacher from now on.

        The card or the family names that scale. Without it, such a network reads 1: the plain prediction.
        """
        learned = card.get("teacher_guidance", "null")
        if card.get("stage") == 2 and learned != kind:
            raise ValueError(
                f"teacher_guidance={kind}: Stage II learned with teacher_guidance={learned}; give both stages the same"
            )
        if kind == "embedded":
            require_embedded(net.embeds_guidance)
            self.guidance = float(card.get("guidance") or net.released["guidance"])

    def ranking(self, path: Path, num_blocks: int) -> dict[str, Any]:
        """Read Stage I's ranking; raise if it was made for other blocks or on another version of the built-in world."""
        record = read_importance(path, num_blocks)
        if record.get("data_hash") == "shapes":
            check_version(path, "made", record, self.source.description, "run stage=1 again with overwrite=true")
        return record

    def check_source(self, net: VideoDiT, card: dict[str, Any]) -> None:
        """Raise if the cache was made for another network; warn if Stage II learned with another null prompt."""
        check_source(self.source, net, card, self.cfg.data)
        check_expert(self.cfg, card)
        learned, now = card.get("negative", "empty"), self.cfg.negative
        if card.get("stage") == 2 and learned != now:
            say(f"warning: negative={now}: Stage II learned with negative={learned}; its pruned path knows that one")

    def check_data(self, net: VideoDiT, card: dict[str, Any]) -> None:
        """Raise if the cache was made for another network; check that the teacher can reproduce its clips."""
        self.check_source(net, card)
        if self.cfg.engine == "local":  # with deepspeed `train_stage` checks, after the teacher is placed
            self.check_teacher(net)

    def check_teacher(self, net: VideoDiT) -> None:
        """Warn or raise (data_check) if the teacher cannot reproduce the clips."""
        check_teacher(self.cfg, net, self.source)

    def checkpoint(self, keys: TrainingKeys, *nets: VideoDiT) -> None:
        """Switch activation checkpointing on, if configured, and print the memory that each block then keeps."""
        if not keys.checkpointing:
            return
        for net in nets:
            net.checkpointing, net.keep_attention = True, min(keys.keep_attention, net.num_blocks)
        clip = self.source.batch(0, self.cfg.batch).x0
        size = nets[0].hidden_bytes(clip) / self.cfg.sequence_parallel / 2**20
        say(
            f"checkpointing: {size:.1f} MiB per block, and as much for each of {keys.keep_attention} kept attention "
            "outputs"
        )

    def card(self, **values: Any) -> dict[str, Any]:
        """Return a model card: the given values, and what later data and stages must have in common with this run.

        That is the VAE of a cache or the version of the built-in world, the null prompt, and the teacher's guidance.
        Size and rate of a cache's clips are those that the model is sampled with.
        """
        made_with = self.source.description
        values |= {key: made_with[key] for key in ("vae", "world", "clips") if key in made_with}
        values |= {key: getattr(self.cfg, key) for key in ("expert", "boundary") if self.cfg.boundary}
        values |= {"negative": "official"} if self.cfg.negative == "official" else {}
        return values | ({"teacher_guidance": "embedded"} if self.guidance is not None else {})
