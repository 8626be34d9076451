"""The specification of linear_gelu_tanh."""

import torch.nn.functional as F
from torch import Tensor


def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU(x weight^T + bias) by the tanh formula."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
