"""Activation checkpointing: keep a block's input and recompute the rest in the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

T = TypeVar("T")

# The names of FLG_ATTENTION's kernels in torch's dispatcher. FlashAttention-3 and -4 run under the name of torch's own
# flash attention. `math` has no entry: it is a sequence of matmuls and a softmax, with no attention operator to keep.
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
    """Keep the output of self-attention, one hidden tensor and the most expensive to recompute; recompute the rest."""
    # Self-attention has as many queries as keys: q and k are [B, heads, tokens, head_dim].
    is_self_attention = op in _ATTENTION and args[0].shape[-2] == args[1].shape[-2]
    return CheckpointPolicy.MUST_SAVE if is_self_attention else CheckpointPolicy.PREFER_RECOMPUTE


class Switched:
    """A module that can be switched, such as a LoRA adapter: 0 is off, other numbers are its strength."""

    on: float


@contextmanager
def as_it_was(switches: list[tuple[Switched, float]], inner: AbstractContextManager) -> Iterator[None]:
    """Set the switches as they were in the forward pass: they may have changed before the backward pass recomputes."""
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
    """Call run(*args), a method of `block`, under activation checkpointing.

    `recompute`: "all" keeps the arguments alone; "attention" keeps the self-attention outputs too.
    """
    switches: list[tuple[Switched, float]] = [(m, m.on) for m in block.modules() if isinstance(m, Switched)]

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        forward: AbstractContextManager = nullcontext()
        recomputation: AbstractContextManager = nullcontext()
        if recompute == "attention":
            forward, recomputation = create_selective_checkpoint_contexts(_save_self_attention)
        return forward, as_it_was(switches, recomputation)

    return checkpoint(run, *args, use_reentrant=False, context_fn=contexts)
