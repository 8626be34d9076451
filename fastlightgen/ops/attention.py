"""Softmax attention is torch's: FLG_ATTENTION=auto|flash3|... says by which of its kernels, decided once per process.

`auto` on Hopper: FlashAttention-3 where it is installed, else cuDNN; elsewhere what torch takes by itself. It is a
preference: calls that the kernel does not take go to the next. A named kernel is a demand, and such calls an error;
only that FlashAttention reads no mask on a GPU, so that calls with one go to the next all the same. CPU tensors know
the demands `flash` and `math`. In a compilation torch chooses.
"""

import importlib.util
import os
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as switch
from torch.nn.attention import SDPBackend, sdpa_kernel

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
KERNELS = {
    "flash3": FLASH,
    "flash4": FLASH,
    "cudnn": CUDNN,
    "flash": FLASH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# FlashAttention newer than torch's own: torch's name of it, the module that it imports, the GPUs that it runs on.
NEWER = {
    "flash3": ("FA3", "flash_attn_interface", (9,)),
    "flash4": ("FA4", "flash_attn.cute.interface", (9, 10)),
}
IN_ORDER = [CUDNN, FLASH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ON_CPU = ("flash", "math")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of [B, L, heads, head_dim] tensors -> [B, L, D]; `mask` is true where a key may be read."""
    args = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask
    if torch.compiler.is_compiling() or (kernels := _kernels(q.is_cuda, mask is not None)) is None:
        out = F.scaled_dot_product_attention(*args)
    else:
        try:
            with sdpa_kernel(kernels, set_priority=True):  # 13 us
                out = F.scaled_dot_product_attention(*args)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            got = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {q.dtype}"
            name = os.environ["FLG_ATTENTION"]
            raise ValueError(f"FLG_ATTENTION={name}: it does not take {got}; set FLG_ATTENTION=auto") from None
    return out.transpose(1, 2).flatten(2)


@lru_cache
def _kernels(on_gpu: bool, masked: bool) -> list[SDPBackend] | None:
    """Those that may compute a call, the first that takes it does; None: what torch chooses."""
    name, demanded, _ = choice()
    if name is None or not (on_gpu or name in ON_CPU):
        return None
    first = KERNELS[name]
    if demanded and not (masked and first == FLASH):
        return [first]
    return [first, *(kernel for kernel in IN_ORDER if kernel != first)]


@lru_cache
def choice() -> tuple[str | None, bool, str]:
    """The kernel of this process (None: torch's own choice), whether it was demanded, and why it is that one."""
    wanted = os.environ.get("FLG_ATTENTION", "auto")
    if wanted == "auto":
        if not torch.cuda.is_available():
            return None, False, "no CUDA device is visible"
        if torch.cuda.get_device_capability()[0] != 9:
            return None, False, "the GPU is no Hopper"
        lost: dict[str, str] = {}
        for name in ("flash3", "cudnn"):
            if not (reason := _why_not(name)):
                return name, False, _listed(lost) or "it is installed"
            lost[name] = reason
        return None, False, _listed(lost)
    if wanted not in KERNELS:
        raise ValueError(f"FLG_ATTENTION: got {wanted!r}, wanted one of auto, {', '.join(KERNELS)}; unset it for auto")
    if reason := _why_not(wanted):
        raise ValueError(f"FLG_ATTENTION: got {wanted!r}, which is not there: {reason}; or set FLG_ATTENTION=auto")
    return wanted, True, "chosen by FLG_ATTENTION"


def _listed(lost: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in lost.items())


def describe() -> str:
    """One line for the start of a command, e.g. `attention: cudnn (flash3: flash_attn_interface is not installed)`."""
    name, _, why = choice()
    flash = name is not None and KERNELS[name] == FLASH and torch.cuda.is_available()
    masked = ", calls with a mask: cudnn" if flash else ""
    return f"attention: {name or 'as torch chooses'} ({why}){masked}"


def _why_not(name: str) -> str:
    """Why this process cannot use a kernel; empty when it can, and then FlashAttention-3 and newer are switched on."""
    if name == "math" or (name in ON_CPU and not torch.cuda.is_available()):
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if name in NEWER:
        return _switch_on(*NEWER[name])
    # Asked of torch itself, with what every network here has: 16 bits, heads of 128 channels.
    q = torch.empty(1, 2, 256, 128, dtype=torch.bfloat16, device="cuda")
    takes = getattr(torch.backends.cuda, f"can_use_{name}_attention")
    if takes(torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False), False):
        return ""
    return f"torch {torch.__version__} does not offer it for {torch.cuda.get_device_name()}"


def _switch_on(impl: str, module: str, gpus: tuple[int, ...]) -> str:
    """Put an installed FlashAttention in the place of torch's own; why not, or nothing."""
    major, minor = torch.cuda.get_device_capability()
    if major not in gpus:
        return f"it runs on compute capability {' and '.join(f'{n}.x' for n in gpus)}, this GPU has {major}.{minor}"
    if not hasattr(switch, "list_flash_attention_impls") or impl not in switch.list_flash_attention_impls():
        return f"torch {torch.__version__} has no switch for it; install a newer torch"
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the package around it is missing
        found = None
    if found is None:
        return f"{module} is not installed"
    try:
        switch.activate_flash_attention_impl(impl)
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        return f"{module} does not load: {' '.join(str(error).split())}"
    return ""
