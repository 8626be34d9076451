"""Activation checkpointing: keep a block's input, compute the rest again in the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# What every kernel of FLG_ATTENTION is to torch's dispatcher, but `math`, which is many operations and keeps nothing.
# FlashAttention-3 and -4 take the place of torch's own under its name.
_ATTENTION = [
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
]


def _save_self_attention(_ctx, op, *args, **_kwargs) -> CheckpointPolicy:
    """Attention is quadratic in the tokens: keep its output (a hidden tensor) and compute the rest again."""
    keep = op in _ATTENTION and args[0].shape[-2] == args[1].shape[-2]
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class Switched:
    """A module that can be turned off."""

    on: bool


@contextmanager
def as_it_was(switches: list[tuple[Switched, bool]], inner) -> Iterator[None]:
    """The backward pass comes when adapters that took part may be off again."""
    now = [module.on for module, _ in switches]
    for module, on in switches:
        module.on = on
    try:
        with inner:
            yield
    finally:
        for (module, _), on in zip(switches, now, strict=True):
            module.on = on


def recomputed(run, recompute: str, *args):
    """run(*args) of a block under activation checkpointing; "attention" keeps the self-attention outputs."""
    switches = [(m, m.on) for m in run.__self__.modules() if isinstance(m, Switched)]

    def contexts():
        keeps = recompute == "attention"
        first, again = (
            create_selective_checkpoint_contexts(_save_self_attention) if keeps else (nullcontext(), nullcontext())
        )
        return first, as_it_was(switches, again)

    return checkpoint(run, *args, use_reentrant=False, context_fn=contexts)
