"""Weights and AdamW states by name: out of DeepSpeed's flat partitions, into them, and onto disk one share per rank.

A tensor's name is ROLE/KIND/PARAMETER. Each is gathered whole, one at a time, and kept by one rank, so that a
checkpoint is spread over the ranks' files and can be read by any number of ranks.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastlightgen.config import StageConfig
from fastlightgen.engine.checkpoint import held
from fastlightgen.models.base import VideoDiT
from fastlightgen.parallel import ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
PERSISTENT = 1e5  # DeepSpeed's default: parameters up to this size are not worth sharding


class Sharded(nn.Parameter):
    """What DeepSpeed's ZeRO-3 adds to a parameter; for type annotations."""

    ds_tensor: Tensor  # this rank's part, flat and padded
    ds_shape: torch.Size

    def convert_to_zero_parameters(self, param_list: list[nn.Parameter]) -> None: ...


def is_sharded(p: Tensor) -> TypeGuard[Sharded]:
    """Has ZeRO-3 left only this rank's part of the parameter here?"""
    return hasattr(p, "ds_tensor")


def shape(p: Tensor) -> torch.Size:
    """Full, unsharded shape."""
    return p.ds_shape if is_sharded(p) else p.shape


Keep = Callable[[nn.Parameter], None]


def keeper(cfg: StageConfig, device: torch.device) -> Callable[[VideoDiT], Keep] | None:
    """Callback that shards each parameter as it loads (ZeRO-3), or None."""
    if cfg.engine != "deepspeed" or cfg.zero < 3:
        return None

    def of(net: VideoDiT) -> Keep:
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero_config(cfg, net, device)}
        first: list[nn.Parameter] = []

        def keep(p: nn.Parameter) -> None:
            if first and is_sharded(first[0]):
                first[0].convert_to_zero_parameters(param_list=[p])
                return
            import deepspeed

            holder = nn.Module()
            holder.p = p
            deepspeed.zero.Init(module=holder, config_dict_or_path=config, dtype=p.dtype)
            first.append(p)

        return keep

    return of


def zero_config(cfg: StageConfig, net: VideoDiT, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's ZeRO settings for one network: what it shards and what it offloads."""
    cuda, sizes = device.type == "cuda", [shape(p).numel() for p in net.parameters()]
    blocks = [sum(shape(p).numel() for p in b.parameters()) for b in net.blocks]
    zero: dict[str, Any] = {
        "stage": cfg.zero,
        "overlap_comm": cuda,
        # a small network is sharded too: its blocks' matrices are above the limit
        "stage3_param_persistence_threshold": int(min(PERSISTENT, max(sizes) // 8)),
        # While a block runs, the next one is fetched: so much is asked for, and the parameter that exceeds it.
        "stage3_prefetch_bucket_size": max(0, min(blocks) - max(sizes)),
    }
    if not any(p.requires_grad for p in net.parameters()):  # then nothing is kept for a backward pass
        zero["stage3_max_live_parameters"] = sum(sizes) - sum(blocks) + 2 * max(blocks)
    if cfg.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if cfg.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return zero


def get(p: nn.Parameter, kind: str = "weight") -> Tensor:
    """The whole float32 weight, or one of its moments; every rank takes part."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return safe_get_full_fp32_param(p) if kind == "weight" else safe_get_full_optimizer_state(p, kind)


@torch.no_grad()
def put(p: nn.Parameter, value: Tensor, kind: str = "weight") -> None:
    """The reverse of `get`: this rank keeps its part of `value`; of a weight also what the network computes with."""
    if is_sharded(p):
        put_partition(p, value, kind)
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if kind == "weight":
        safe_set_full_fp32_param(p, value)
        p.copy_(value)
    else:
        safe_set_full_optimizer_state(p, value, kind)


def put_partition(p: Sharded, value: Tensor, kind: str) -> None:
    """ZeRO-3. DeepSpeed's own setter fails where a parameter is no multiple of the ranks; the last part is padded."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    if kind == "weight":
        safe_set_local_fp32_param(p, part_of(p, value))
        put_frozen(p, value)
    else:
        safe_set_local_optimizer_state(p, part_of(p, value), kind)


def part_of(p: Sharded, value: Tensor) -> Tensor:
    """This rank's partition of a whole value."""
    size, flat = p.ds_tensor.numel(), value.flatten()
    padded = torch.cat([flat, flat.new_zeros(size * ranks.size() - flat.numel())])
    return padded[size * ranks.rank() :][:size]


@torch.no_grad()
def put_frozen(p: nn.Parameter, value: Tensor) -> None:
    """What the network computes with; all of it for a weight without an optimizer."""
    if is_sharded(p):
        p.ds_tensor.copy_(part_of(p, value))
    if p.numel():  # small ones are whole on every rank
        p.copy_(value)


def masters(optimizer) -> list[Tensor]:
    """This rank's share of the float32 weights, in the flat buffers of DeepSpeed's optimizers."""
    for key in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, key):
            return list(getattr(optimizer, key))
    raise AssertionError(f"{type(optimizer)}: unknown DeepSpeed optimizer")


def start_states(optimizer, count: int) -> None:
    """AdamW's states after `count` updates, as zeros: DeepSpeed makes them in its first step only."""
    base = optimizer.optimizer
    steps = torch.tensor(float(count)) if isinstance(base, torch.optim.AdamW) else count
    for master in masters(optimizer):
        base.state[master] = {"step": steps} | {key: torch.zeros_like(master) for key in MOMENTS}
        if isinstance(steps, Tensor):
            steps = steps.clone()
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


@contextmanager
def swapped(optimizer, others: list[Tensor]) -> Iterator[None]:
    """The float32 weights are `others` inside this context (an average, to read it by name)."""
    before = [m.detach().clone() for m in masters(optimizer)]
    with torch.no_grad():
        for master, other in zip(masters(optimizer), others, strict=True):
            master.copy_(other)
        yield
        for master, old in zip(masters(optimizer), before, strict=True):
            master.copy_(old)


@contextmanager
def whole(p: Tensor) -> Iterator[Tensor]:
    """A weight as the network computes with it, gathered where it is sharded."""
    if not hasattr(p, "ds_id"):
        yield p
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([p]):
        yield p


class Share:
    """The tensors that this rank writes. Each goes to the rank that has the fewest bytes so far."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}
        self.bytes = [0] * ranks.size()

    def add(self, name: str, value: Tensor) -> None:
        taker = self.bytes.index(min(self.bytes))
        self.bytes[taker] += value.nbytes
        if taker == ranks.rank():
            self.tensors[name] = held(value)


class Stored(Mapping):
    """The tensors of all ranks' files by name, read when they are asked for."""

    def __init__(self, files: list[Path]):
        self.where: dict[str, Any] = {}
        for file in files:
            opened = safe_open(file, framework="pt")
            self.where |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        return self.where[name].get_tensor(name)

    def __iter__(self):
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)
