"""Read and write weights and AdamW states by name, although DeepSpeed keeps them in flat partitions.

A checkpoint names a tensor ROLE/KIND/PARAMETER. The ranks gather one full tensor at a time, and one of them keeps it
for its file. So the files are of similar size, and any number of ranks can read the checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from fastlightgen.config import StageConfig
from fastlightgen.engine.checkpoint import host_copy
from fastlightgen.files.tensors import open_tensors
from fastlightgen.models.base import VideoDiT
from fastlightgen.parallel import ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
PERSISTENT = 1e5  # elements; up to this size a parameter stays complete on every rank (DeepSpeed's default)


class Sharded(nn.Parameter):
    """The attributes that DeepSpeed's ZeRO-3 adds to a parameter; for type annotations."""

    ds_tensor: Tensor  # this rank's partition, flat; the last rank's is padded
    ds_shape: torch.Size  # full shape
    _z3_optimizer: Any  # DeepSpeed's optimizer of the network

    def convert_to_zero_parameters(self, param_list: list[nn.Parameter]) -> None: ...


def is_sharded(p: Tensor) -> TypeGuard[Sharded]:
    """Return whether ZeRO-3 has partitioned the parameter."""
    return hasattr(p, "ds_tensor")


def shape(p: Tensor) -> torch.Size:
    """Full, unsharded shape."""
    return p.ds_shape if is_sharded(p) else p.shape


Keep = Callable[[nn.Parameter], None]


class Engine(Protocol):
    """The keys that say which engine runs."""

    engine: str
    zero: int


def separate(cfg: Engine) -> bool:
    """Are the networks sharded one by one (ZeRO-3), so that no two of them can share weights?"""
    return cfg.engine == "deepspeed" and cfg.zero == 3


def keeper(cfg: StageConfig, device: torch.device) -> Callable[[VideoDiT], Keep] | None:
    """Callback that shards each parameter as it loads (ZeRO-3), or None."""
    if not separate(cfg):
        return None

    def of(net: VideoDiT) -> Keep:
        """Return the callback for the parameters of one network."""
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero_config(cfg, net, device)}
        first: list[nn.Parameter] = []

        def keep(p: nn.Parameter) -> None:
            """Replace a loaded parameter by this rank's partition of it."""
            if first and is_sharded(first[0]):
                first[0].convert_to_zero_parameters(param_list=[p])
                return
            import deepspeed

            # The first parameter starts ZeRO-3, which needs a module; the others then convert with its settings.
            holder = nn.Module()
            holder.p = p
            deepspeed.zero.Init(module=holder, config_dict_or_path=config, dtype=p.dtype)
            first.append(p)

        return keep

    return of


def zero_config(cfg: StageConfig, net: VideoDiT, device: torch.device) -> dict[str, Any]:
    """Return DeepSpeed's ZeRO settings for one network. All sizes are numbers of elements."""
    cuda, sizes = device.type == "cuda", [shape(p).numel() for p in net.parameters()]
    blocks = [sum(shape(p).numel() for p in b.parameters()) for b in net.blocks]
    zero: dict[str, Any] = {
        "stage": cfg.zero,
        "overlap_comm": cuda,
        # Below DeepSpeed's default for small networks, so that the matrices of their blocks are sharded too.
        "stage3_param_persistence_threshold": int(min(PERSISTENT, max(sizes) // 8)),
        # While a block runs, DeepSpeed fetches parameters until their sum reaches this size. The last may exceed it,
        # so subtract the largest parameter: together they are then at most one block.
        "stage3_prefetch_bucket_size": max(0, min(blocks) - max(sizes)),
    }
    if not any(p.requires_grad for p in net.parameters()):  # no backward pass will need a block again
        # Room for the parameters outside the blocks, the running block and the next one.
        zero["stage3_max_live_parameters"] = sum(sizes) - sum(blocks) + 2 * max(blocks)
    if cfg.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if cfg.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return zero


def get(p: nn.Parameter, kind: str = "weight") -> Tensor:
    """Gather the full float32 weight, or one of its moments. All ranks call this together."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return safe_get_full_fp32_param(p) if kind == "weight" else safe_get_full_optimizer_state(p, kind)


@torch.no_grad()
def put(p: nn.Parameter, value: Tensor, kind: str = "weight") -> None:
    """Store this rank's partition of a full `value`; the reverse of `get`.

    A weight exists twice: the optimizer's float32 copy and the one that the network computes with. Both are set.
    """
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
    """`put` under ZeRO-3. DeepSpeed's own setter fails for parameters that do not divide evenly among the ranks."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    if kind == "weight":
        safe_set_local_fp32_param(p, part_of(p, value))
        put_frozen(p, value)
    else:
        safe_set_local_optimizer_state(p, part_of(p, value), kind)


def part_of(p: Sharded, value: Tensor) -> Tensor:
    """Cut this rank's partition from a full value, flat; zeros pad the last one."""
    size, flat = p.ds_tensor.numel(), value.flatten()
    padded = torch.cat([flat, flat.new_zeros(size * ranks.size() - flat.numel())])
    return padded[size * ranks.rank() :][:size]


@torch.no_grad()
def put_frozen(p: nn.Parameter, value: Tensor) -> None:
    """Set the weight that the network computes with. A frozen network has no other copy."""
    if is_sharded(p):
        p.ds_tensor.copy_(part_of(p, value))
    if p.numel():  # complete here: not sharded, or small enough to stay on every rank
        p.copy_(value)


def note_change(net: nn.Module) -> None:
    """Tell torch that an optimizer step changed the weights: DeepSpeed writes them where autograd does not look."""
    torch.autograd.graph.increment_version(list(net.parameters()))


def parts(p: nn.Parameter) -> tuple[Tensor, Tensor]:
    """Return this rank's part of a trained weight, flat: of its float32 master, and of the weight computed with."""
    if is_sharded(p):
        # DeepSpeed's safe_get_local_fp32_param would copy an offloaded part to the GPU.
        master = p._z3_optimizer._get_fp32_opt_state_partition(p, release_swap_buffers=False)[0]
        size = p.ds_tensor.numel()
        own = max(0, min(size, p.ds_shape.numel() - size * ranks.rank()))  # the padding holds anything
        return master[:own], p.ds_tensor[:own]
    fragment = p._hp_mapping  # type: ignore[attr-defined]  # set by DeepSpeed; None if all of p is on other ranks
    if fragment is None:
        return p.new_empty(0, dtype=torch.float32), p.new_empty(0)
    place = fragment.lp_fragment_address
    return fragment.get_hp_fragment(), p.flatten().narrow(0, place.start, place.numel)


def masters(optimizer) -> list[Tensor]:
    """Return this rank's partition of the float32 weights: the flat buffers of DeepSpeed's optimizer."""
    for key in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, key):
            return list(getattr(optimizer, key))
    raise AssertionError(f"{type(optimizer)}: has none of the known float32 buffers of DeepSpeed's optimizers")


def start_states(optimizer, count: int) -> None:
    """Create AdamW's states with zero moments and step `count`; `put` then fills them.

    DeepSpeed itself creates them only in its first optimizer step.
    """
    base = optimizer.optimizer
    steps = torch.tensor(float(count)) if isinstance(base, torch.optim.AdamW) else count
    for master in masters(optimizer):
        base.state[master] = {"step": steps} | {key: torch.zeros_like(master) for key in MOMENTS}
        if isinstance(steps, Tensor):  # torch's AdamW increments the tensor in place: one for each buffer
            steps = steps.clone()
    # ZeRO-1 and 2 link parameters to their states at the end of the first step; do it now, so that `put` finds them.
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


@contextmanager
def swapped(optimizer, others: list[Tensor]) -> Iterator[None]:
    """Replace the float32 weights by `others` inside this context, so that `get` reads an average by name."""
    before = [m.detach().clone() for m in masters(optimizer)]
    with torch.no_grad():
        for master, other in zip(masters(optimizer), others, strict=True):
            master.copy_(other)
        yield
        for master, old in zip(masters(optimizer), before, strict=True):
            master.copy_(old)


@contextmanager
def gathered_weight(p: Tensor) -> Iterator[Tensor]:
    """Yield the full weight that the network computes with; gather it first if it is sharded."""
    if not hasattr(p, "ds_id"):
        yield p
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([p]):
        yield p


class RankFile:
    """The tensors that this rank writes. All ranks add every tensor; the rank with the fewest bytes so far keeps it."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}
        self.bytes = [0] * ranks.size()

    def add(self, name: str, value: Tensor) -> None:
        taker = self.bytes.index(min(self.bytes))
        self.bytes[taker] += value.nbytes
        if taker == ranks.rank():
            self.tensors[name] = host_copy(value)


class Stored(Mapping):
    """Maps names to the tensors of all files of a checkpoint; each access reads from disk."""

    def __init__(self, files: list[Path]):
        self.where: dict[str, Any] = {}
        for file in files:
            opened = open_tensors(file)
            self.where |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        return self.where[name].get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, from the file's header."""
        return self.where[name].get_slice(name).get_shape()

    def __iter__(self):
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)
