"""The state of a run under DeepSpeed: averages, checkpoints and results of networks whose weights are sharded."""

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
from fastlightgen.parallel import ranks

NAME = "deepspeed"  # of the engine, in its checkpoints


@dataclass
class ShardedState:
    """Reads and writes the networks that an engine trains. Every method is called on all ranks."""

    device: torch.device
    roles: dict[str, Role]
    engines: dict[str, Any]  # DeepSpeed's engine of each role
    averages: dict[str, list[Tensor]]  # role -> average of this rank's part of the float32 weights
    count: dict[str, int]  # role -> updates done

    @torch.no_grad()
    def average(self, name: str) -> None:
        role = self.roles[name]
        rate = averaging_rate(role.ema, self.count[name] - role.ema_start)
        for average, master in zip(self.averages[name], shards.masters(self.engines[name].optimizer), strict=True):
            average.lerp_(master.detach(), rate)

    def save(self, folder: Path, step: int, keep: int, every: int, good: int = 0) -> checkpoint.Saving:
        """Each rank writes its share of every role's weights, moments and average."""
        share = shards.Share()
        for name, role in self.roles.items():
            trained = [(key, p) for key, p in role.net.named_parameters() if p.requires_grad]
            for kind in ("weight", *(shards.MOMENTS if self.count[name] else ())):
                HERE.at(f"the checkpoint, {kind} of {name}")
                for key, p in trained:
                    share.add(f"{name}/{kind}/{key}", shards.get(p, kind))
            if name in self.averages:
                with shards.swapped(self.engines[name].optimizer, self.averages[name]):
                    for key, p in trained:
                        share.add(f"{name}/ema/{key}", shards.get(p))
            if role.carried is not None:
                for key, p in role.carried.named_parameters():
                    with shards.whole(p) as value:
                        share.add(f"{name}/carried/{key}", value)
        meta = {"count": dict(self.count), "engine": NAME, "ranks": ranks.size()}
        files = {checkpoint.rank_file(ranks.rank()): share.tensors}
        return checkpoint.save(folder, step, files, meta, keep, every, good)

    def load(self, folder: Path) -> int:
        """The step of the newest checkpoint, read by any number of ranks; 0 where there is none."""
        step, meta, files = checkpoint.latest(folder, NAME)
        if not step:
            return 0
        stored = checkpoint.reading(folder, step, lambda: shards.Stored(files))
        self.count = dict(meta["count"])

        def whole(name: str) -> Tensor:
            HERE.at("reading the checkpoint")
            return checkpoint.reading(folder, step, lambda: stored[name]).to(self.device)

        for name, role in self.roles.items():
            optimizer = self.engines[name].optimizer
            trained = [(key, p) for key, p in role.net.named_parameters() if p.requires_grad]
            if name in self.averages:
                for key, p in trained:
                    shards.put(p, whole(f"{name}/ema/{key}"))
                self.averages[name] = [m.detach().clone() for m in shards.masters(optimizer)]
            if self.count[name]:
                shards.start_states(optimizer, self.count[name])
            for kind in ("weight", *(shards.MOMENTS if self.count[name] else ())):
                for key, p in trained:
                    shards.put(p, whole(f"{name}/{kind}/{key}"), kind)
            if role.carried is not None:
                for key, p in role.carried.named_parameters():
                    shards.put_frozen(p, whole(f"{name}/carried/{key}"))
        return step

    @torch.no_grad()
    def finish(self) -> None:
        """Swap the averaged weights in, where there are any."""
        for name, average in self.averages.items():
            for master, value in zip(shards.masters(self.engines[name].optimizer), average, strict=True):
                master.copy_(value)
            for p in self.roles[name].net.parameters():
                if p.requires_grad:
                    shards.put(p, shards.get(p).clone())

    def save_model(self, net: VideoDiT, folder: Path, dtype: torch.dtype | None = None, **card) -> None:
        """Every rank takes part in gathering, one tensor at a time; rank 0 writes, one file's tensors in memory."""
        state = net.state_dict(keep_vars=True)
        trained = {id(p) for role in self.roles.values() for p in role.net.parameters() if p.requires_grad}

        def get(key: str) -> Tensor:
            HERE.at("writing the result")
            p = state[key]
            if id(p) in trained:
                return shards.get(p).detach().to("cpu", dtype or torch.float32).contiguous()
            with shards.whole(p) as value:
                return value.detach().to("cpu", dtype or torch.float32, copy=True).contiguous()

        if ranks.rank() == 0:
            shapes = {key: torch.empty(shards.shape(p), device="meta") for key, p in state.items()}
            save_model(net, folder, dtype, state=shapes, get=get, **card)
        else:
            for key in state:
                get(key)
        ranks.barrier()
