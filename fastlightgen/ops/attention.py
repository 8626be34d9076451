"""Softmax attention by torch; FLG_ATTENTION=auto|flash3|... selects its kernel once per process.

`auto` prefers FlashAttention-3 on Hopper if it is installed, else cuDNN; on other GPUs torch chooses. A call that the
preferred kernel does not support goes to the next one. A named kernel is mandatory: a call that it does not support is
an error. One exception: FlashAttention has no mask on a GPU, so calls with a mask go to the next kernel. On the CPU
only `flash` and `math` have an effect; `auto` takes attention_cpu.py for small calls in 16 bits. Under torch.compile
torch chooses.
"""

import importlib.util
import os
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as switch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlightgen.ops import attention_cpu

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
KERNELS = {
    "flash3": FLASH,
    "flash4": FLASH,
    "cudnn": CUDNN,
    "flash": FLASH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# FlashAttention versions outside torch: torch's name, the Python module, the major compute capabilities they support.
NEWER = {
    "flash3": ("FA3", "flash_attn_interface", (9,)),
    "flash4": ("FA4", "flash_attn.cute.interface", (9, 10)),
}
# The order in which a call falls back to other kernels.
IN_ORDER = [CUDNN, FLASH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ON_CPU = ("flash", "math")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of [B, L, heads, head_dim] tensors -> [B, L, D]; `mask` is true where a key may be read."""
    if mask is not None and torch.compiler.is_exporting():
        mask = mask.expand(-1, -1, q.shape[1], -1)  # onnxruntime takes no mask that all queries share
    args = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask  # torch wants [B, heads, L, head_dim]
    if torch.compiler.is_compiling() or (kernels := _kernels(q.is_cuda, mask is not None)) is None:
        ours = mask is None and attention_cpu.takes(*args[:3])
        out = attention_cpu.attend(*args[:3]) if ours else F.scaled_dot_product_attention(*args)
    else:
        try:
            with sdpa_kernel(kernels, set_priority=True):  # costs 13 us per call
                out = F.scaled_dot_product_attention(*args)
        except RuntimeError as error:
            # Torch has no exception type for this case; other errors pass through.
            if "No available kernel" not in str(error):
                raise
            got = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {q.dtype}"
            name = os.environ["FLG_ATTENTION"]
            raise ValueError(f"FLG_ATTENTION={name}: it does not take {got}; set FLG_ATTENTION=auto") from None
    return out.transpose(1, 2).flatten(2)


@lru_cache
def _kernels(on_gpu: bool, masked: bool) -> list[SDPBackend] | None:
    """Kernels to try in this order for a call; None leaves the choice to torch."""
    name, mandatory, _ = choice()
    if name is None or not (on_gpu or name in ON_CPU):
        return None
    first = KERNELS[name]
    if mandatory and not (masked and first == FLASH):  # FlashAttention has no mask
        return [first]
    return [first, *(kernel for kernel in IN_ORDER if kernel != first)]


@lru_cache
def choice() -> tuple[str | None, bool, str]:
    """The kernel of this process (None: torch chooses), whether it is mandatory, and the reason for the choice."""
    wanted = os.environ.get("FLG_ATTENTION", "auto")
    if wanted == "auto":
        if not torch.cuda.is_available():
            return None, False, "no CUDA device is visible"
        if torch.cuda.get_device_capability()[0] != 9:
            return None, False, "the GPU is no Hopper"
        rejected: dict[str, str] = {}
        for name in ("flash3", "cudnn"):
            if not (reason := _why_not(name)):
                return name, False, _listed(rejected) or "it is installed"
            rejected[name] = reason
        return None, False, _listed(rejected)
    if wanted not in KERNELS:
        raise ValueError(f"FLG_ATTENTION: got {wanted!r}, wanted one of auto, {', '.join(KERNELS)}; unset it for auto")
    if reason := _why_not(wanted):
        raise ValueError(f"FLG_ATTENTION: got {wanted!r}, which is not available: {reason}; or set FLG_ATTENTION=auto")
    return wanted, True, "chosen by FLG_ATTENTION"


def _listed(rejected: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in rejected.items())


def describe() -> str:
    """One line for the start of a command, e.g. `attention: cudnn (flash3: flash_attn_interface is not installed)`."""
    name, _, why = choice()
    # FlashAttention has no mask, so masked calls use the next kernel.
    flash = name is not None and KERNELS[name] == FLASH and torch.cuda.is_available()
    masked = ", calls with a mask: cudnn" if flash else ""
    return f"attention: {name or 'as torch chooses'} ({why}){masked}"


def _why_not(name: str) -> str:
    """Return the reason why this process cannot use a kernel, or "". Usable FlashAttention-3 and -4 are activated."""
    if name == "math" or (name in ON_CPU and not torch.cuda.is_available()):
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if name in NEWER:
        return _switch_on(*NEWER[name])
    # Ask torch about a call like those of the networks here: 16 bits, heads of 128 channels.
    q = torch.empty(1, 2, 256, 128, dtype=torch.bfloat16, device="cuda")
    takes = getattr(torch.backends.cuda, f"can_use_{name}_attention")
    if takes(torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False), False):
        return ""
    return f"torch {torch.__version__} does not offer it for {torch.cuda.get_device_name()}"


def _switch_on(impl: str, module: str, gpus: tuple[int, ...]) -> str:
    """Replace torch's FlashAttention by the installed module; return the reason if that fails, else ""."""
    major, minor = torch.cuda.get_device_capability()
    if major not in gpus:
        return f"it runs on compute capability {' and '.join(f'{n}.x' for n in gpus)}, this GPU has {major}.{minor}"
    if not hasattr(switch, "list_flash_attention_impls") or impl not in switch.list_flash_attention_impls():
        return f"torch {torch.__version__} has no switch for it; install a newer torch"
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # find_spec raises it when the parent package is missing
        found = None
    if found is None:
        return f"{module} is not installed"
    try:
        # Replaces torch's flash kernel, so that SDPBackend.FLASH_ATTENTION means this one from now on.
        switch.activate_flash_attention_impl(impl)
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        return f"{module} does not load: {' '.join(str(error).split())}"
    return ""
