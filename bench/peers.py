"""Public kernels that do most of the work of ours: norms without gate, or without the mean. They need a GPU."""

import importlib
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

import pytest
from kernels import GPU, draw
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Cases = list[dict[str, Tensor]]


@lru_cache
def failing(module: str) -> str:
    """Why a module cannot be imported, or "". Packages that do not fit together raise more than ImportError."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{module}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def imported(module: str) -> ModuleType:
    """A module of a peer, or skip the bench."""
    if reason := failing(module):
        pytest.skip(reason)
    return importlib.import_module(module)


def liger_modulated(cases: Cases) -> tuple[Callable, Cases]:
    """RMS norm, scale and shift; its gradients of scale and shift are added with atomics."""
    norm = imported("liger_kernel.ops.modulated_rms_norm").LigerModulatedRMSNormFunction
    in_place = False  # True writes dx over the incoming gradient, which the timer uses again
    return lambda x, scale, shift: norm.apply(x, None, scale, shift, 1e-6, 0.0, "llama", in_place), cases


def liger_layer_norm(cases: Cases) -> tuple[Callable, Cases]:
    """LayerNorm with weight and bias, which are the same for all samples."""
    norm = imported("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return lambda x, weight, bias: norm.apply(x, weight, bias, 1e-6), weighted(cases, "x", "weight", "bias")


def quack_rmsnorm(cases: Cases) -> tuple[Callable, Cases]:
    """RMS norm with a weight."""
    rmsnorm = imported("quack").rmsnorm
    return lambda x, weight: rmsnorm(x.flatten(0, -2), weight, eps=1e-6).view_as(x), weighted(cases, "x", "weight")


def liger_fused_add(cases: Cases) -> tuple[Callable, Cases]:
    """x + y and its RMS norm, without gate, scale and shift."""
    norm = imported("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
    return lambda x, y, weight: norm.apply(x, y, weight, 1e-6), weighted(cases, "x", "y", "weight")


def weighted(cases: Cases, *names: str) -> Cases:
    """The tensors of the cases under these names; a vector for a name that the cases do not have."""
    dim = cases[0]["x"].shape[-1]
    return [{n: case[n] if n in case else draw(dim) for n in names} for case in cases]


def with_cudnn(call: Callable) -> Callable:
    """The call, in which torch takes cuDNN's attention where it can. Without a GPU there is none."""

    def with_it(*args):
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            return call(*args)

    return with_it if GPU else call


NORM = {  # for norm_modulate
    "liger modulated_rms_norm": liger_modulated,
    "liger layer_norm": liger_layer_norm,
    "quack rmsnorm": quack_rmsnorm,
}
RESIDUAL = {"liger fused_add_rms_norm": liger_fused_add}  # for gate_residual_norm_modulate


def peer(name: str, cases: Cases) -> tuple[Callable, Cases]:
    """A public norm and its inputs, made from those of our operator."""
    if not GPU:
        pytest.skip("it needs a GPU")
    return (NORM | RESIDUAL)[name](cases)
