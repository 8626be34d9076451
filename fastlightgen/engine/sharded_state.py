"""Averages, checkpoints and model folders of networks whose weights DeepSpeed shards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlightgen.engine import checkpoint, shards
from fastlightgen.engine.ema import averaging_rate
from fastlightgen.engine.hang import HERE
from fastlightgen.engine.roles import Role
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.folder.weights import save_model
from fastlightgen.models.lora import merged, plain_parts
from fastlightgen.parallel import ranks

NAME = "deepspeed"  # the engine's name in state.json


@dataclass
class ShardedState:
    """Reads and writes the networks that an engine trains. All ranks call every method together."""

    device: torch.device
    roles: dict[str, Role]
    engines: dict[str, Any]  # DeepSpeed's engine of each role
    averages: dict[str, list[Tensor]]  # role -> average of this rank's partition of the float32 weights
    count: dict[str, int]  # role -> optimizer steps taken

    @torch.no_grad()
    def average(self, name: str) -> None:
        """Update the average of one role; each rank updates its own partition."""
        role = self.roles[name]
        rate = averaging_rate(role.ema, self.count[name] - role.ema_start)
        for average, master in zip(self.averages[name], shards.masters(self.engines[name].optimizer), strict=True):
            average.lerp_(master.detach(), rate)

    def save(self, folder: Path, step: int, keep: int, every: int, good: int = 0) -> checkpoint.Saving:
        """Gather every tensor in turn; one rank copies each to host memory. Then start writing in the background."""
        own = shards.RankFile()
        for name, role in self.roles.items():
            trained = [(key, p) for key, p in role.net.named_parameters() if p.requires_grad]
            # DeepSpeed creates the moments in the first optimizer step.
            for kind in ("weight", *(shards.MOMENTS if self.count[name] else ())):
                HERE.at(f"the checkpoint, {kind} of {name}")
                for key, p in trained:
                    own.add(f"{name}/{kind}/{key}", shards.get(p, kind))
            if name in self.averages:
                with shards.swapped(self.engines[name].optimizer, self.averages[name]):
                    for key, p in trained:
                        own.add(f"{name}/ema/{key}", shards.get(p))
            if role.carried is not None:
                for key, p in role.carried.named_parameters():
                    with shards.gathered_weight(p) as value:
                        own.add(f"{name}/carried/{key}", value)
        meta = {"count": dict(self.count), "engine": NAME, "ranks": ranks.size()}
        files = {checkpoint.rank_file(ranks.rank()): own.tensors}
        return checkpoint.save(folder, step, files, meta, keep, every, good)

    def load(self, folder: Path) -> int:
        """Load the newest checkpoint and return its step; 0 if there is none. Any number of ranks may have saved it."""
        step, meta, files = checkpoint.latest(folder, NAME)
        if not step:
            return 0
        stored = checkpoint.reading(folder, step, lambda: shards.Stored(files))
        found = {name: stored.shape(name) for name in stored if name.split("/")[1] == "weight"}
        wanted = {
            f"{name}/weight/{key}": shards.shape(p)
            for name, role in self.roles.items()
            for key, p in role.net.named_parameters()
            if p.requires_grad
        }
        checkpoint.require_same(folder, step, found, wanted)
        self.count = dict(meta["count"])

        def read(name: str) -> Tensor:
            HERE.at("reading the checkpoint")
            return checkpoint.reading(folder, step, lambda: stored[name]).to(self.device)

        for name, role in self.roles.items():
            optimizer = self.engines[name].optimizer
            trained = [(key, p) for key, p in role.net.named_parameters() if p.requires_grad]
            if name in self.averages:
                # DeepSpeed alone knows how a parameter maps to its flat buffers. So put the average in place of the
                # weights, copy the buffers, and read the weights over it below.
                for key, p in trained:
                    shards.put(p, read(f"{name}/ema/{key}"))
                self.averages[name] = [m.detach().clone() for m in shards.masters(optimizer)]
            if self.count[name]:
                shards.start_states(optimizer, self.count[name])
            for kind in ("weight", *(shards.MOMENTS if self.count[name] else ())):
                for key, p in trained:
                    shards.put(p, read(f"{name}/{kind}/{key}"), kind)
            if role.carried is not None:
                for key, p in role.carried.named_parameters():
                    shards.put_frozen(p, read(f"{name}/carried/{key}"))
        return step

    @torch.no_grad()
    def finish(self) -> None:
        """Replace the weights by their average, in roles that keep one."""
        for name, average in self.averages.items():
            for master, value in zip(shards.masters(self.engines[name].optimizer), average, strict=True):
                master.copy_(value)
            for p in self.roles[name].net.parameters():
                if p.requires_grad:  # copy the new float32 weight to the one that the network computes with
                    shards.put(p, shards.get(p).clone())

    def save_model(self, net: VideoDiT, folder: Path, dtype: torch.dtype | None = None, **card) -> None:
        """Write a model folder. All ranks gather one tensor at a time; rank 0 holds one file's tensors."""
        parts = plain_parts(net)
        trained = {id(p) for role in self.roles.values() for p in role.net.parameters() if p.requires_grad}

        def whole(p: Any) -> Tensor:
            HERE.at("writing the result")
            if id(p) in trained:
                return shards.get(p).detach().to("cpu", torch.float32)
            with shards.gathered_weight(p) as value:
                return value.detach().to("cpu", torch.float32, copy=True)

        def get(key: str) -> Tensor:
            return merged([whole(p) for p in parts[key]]).to(dtype or torch.float32).contiguous()

        # Rank 0 asks for the tensors in the order of `parts`; the other ranks gather along in the same order.
        if ranks.rank() == 0:
            shapes = {key: torch.empty(shards.shape(of[0]), device="meta") for key, of in parts.items()}
            save_model(net, folder, dtype, state=shapes, get=get, **card)
        else:
            for key in parts:
                get(key)
        ranks.barrier()
