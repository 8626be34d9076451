"""Activation checkpointing: keep a block's input, compute the rest again in the backward pass."""

from functools import partial

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


def recomputed(run, recompute: str, *args):
    """run(*args) under activation checkpointing; "attention" keeps the self-attention outputs."""
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _save_self_attention)}
    return checkpoint(run, *args, use_reentrant=False, **(contexts if recompute == "attention" else {}))
