"""Activation checkpointing: keep a block's input, compute the rest again in the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

T = TypeVar("T")

# The names that FLG_ATTENTION's kernels have in torch's dispatcher. `math` is missing: it is many operations, and none
# of them is attention. FlashAttention-3 and -4 run under the name of torch's own flash attention.
_ATTENTION = [
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
]


def _save_self_attention(_ctx: Any, op: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep the output of self-attention, which is one hidden tensor and costs most to recompute; recompute the rest."""
    is_self_attention = op in _ATTENTION and args[0].shape[-2] == args[1].shape[-2]
    return CheckpointPolicy.MUST_SAVE if is_self_attention else CheckpointPolicy.PREFER_RECOMPUTE


class Switched:
    """A module that can be turned off."""

    on: bool


@contextmanager
def as_it_was(switches: list[tuple[Switched, bool]], inner: AbstractContextManager) -> Iterator[None]:
    """Adapters as they were in the forward pass: by the time of the backward pass they may be switched differently."""
    now = [module.on for module, _ in switches]
    for module, on in switches:
        module.on = on
    try:
        with inner:
            yield
    finally:
        for (module, _), on in zip(switches, now, strict=True):
            module.on = on


def recomputed(block: nn.Module, run: Callable[..., T], recompute: str, *args: object) -> T:
    """run(*args), a method of `block`, under activation checkpointing.

    `recompute`: "all" keeps the arguments alone, "attention" the self-attention outputs as well.
    """
    switches: list[tuple[Switched, bool]] = [(m, m.on) for m in block.modules() if isinstance(m, Switched)]

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        first: AbstractContextManager = nullcontext()
        again: AbstractContextManager = nullcontext()
        if recompute == "attention":
            first, again = create_selective_checkpoint_contexts(_save_self_attention)
        return first, as_it_was(switches, again)

    return checkpoint(run, *args, use_reentrant=False, context_fn=contexts)
