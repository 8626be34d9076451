"""qk_norm_rope in real numbers, for torch.compile: Inductor does not generate code for complex ones."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlightgen.ops.qk_norm_rope.reference import Rope, per_token


def turns(rope: Rope, tokens: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token [L, 1, head_dim / 2], computed once per clip; text tokens turn by nothing."""
    turn = torch.view_as_real(per_token(rope, torch.float32))
    still = turn.new_tensor([1.0, 0.0]).expand(tokens - len(turn), *turn.shape[1:])
    cos, sin = torch.cat([turn, still]).unbind(-1)
    return cos.contiguous(), sin.contiguous()


def real_qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _norm_rope(q, q_weight, cos, sin, eps), _norm_rope(k, k_weight, cos, sin, eps)


def _norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    heads = x.float().unflatten(-1, (-1, 2 * cos.shape[-1]))
    if weight.shape[-1] == x.shape[-1]:
        heads = F.rms_norm(heads.flatten(-2), weight.shape, weight.float(), eps).view_as(heads)
    else:
        heads = F.rms_norm(heads, weight.shape, weight.float(), eps)
    a, b = heads.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-3).to(x.dtype)
