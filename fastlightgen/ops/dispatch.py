"""Selects the code that computes the operators: FLG_OPS=auto|cuda|triton|reference, once per process."""

import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

BACKENDS = ("cuda", "triton", "reference")  # `auto` takes the first usable one
INTERFACE = 5  # must equal `interface` in bindings/module.cpp
LIB = torch.library.Library("fastlightgen", "DEF")  # registers operators as torch.ops.fastlightgen.<name>


@lru_cache
def extension() -> ModuleType | None:
    """The compiled module, or None if it is absent or does not load (with one warning)."""
    if importlib.util.find_spec("fastlightgen._C") is None:
        return None
    try:
        module = importlib.import_module("fastlightgen._C")
        if module.interface != INTERFACE:
            raise ImportError(f"it was built from other sources, interface {module.interface} instead of {INTERFACE}")
    except (ImportError, AttributeError) as error:
        warnings.warn(f"fastlightgen._C is not used: {error}; `pip install -e .` rebuilds it", stacklevel=2)
        return None
    return module


def compiled() -> ModuleType:
    """The compiled module; only for code of the `cuda` backend, which requires it."""
    module = extension()
    assert module is not None, "the backend cuda was chosen without fastlightgen._C"
    return module


def parts() -> dict[str, tuple[bool, str]]:
    """For each part: whether it was built, and how it was built or why it was not (from setup.py's report)."""
    report = Path(__file__).parents[1] / "_build.json"
    states = json.loads(report.read_text()) if report.exists() else {}
    states = {part: state.removeprefix("not built: ") for part, state in states.items()}
    ext = extension()
    unknown = "the installation left no report; run `pip install -e .`"
    return {
        "C++ extension": (ext is not None, states.get("C++ extension", unknown)),
        "CUDA kernels": (ext is not None and ext.cuda_built(), states.get("CUDA kernels", unknown)),
        "CUTLASS products": (gemm_built(), states.get("CUTLASS products", unknown)),
        "Triton kernels": _triton(),
    }


def gemm_built() -> bool:
    """Whether the matrix products with fused epilogues (csrc/gemm) were built."""
    return (ext := extension()) is not None and ext.gemm_built()


def _triton() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed (it comes with torch's CUDA build)"
    return True, "compiled at the first call"


def _why_not(backend: str) -> str:
    """The reason why this process cannot use a backend, or "" if it can."""
    if backend == "reference" or (backend == "triton" and _triton()[0] and interpreted()):
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if backend == "triton":
        installed, detail = _triton()
        return "" if installed else detail
    built, detail = parts()["CUDA kernels"]
    if not built:
        return f"not built ({detail}); `FLG_BUILD_CUDA=1 pip install -e .` shows why"
    major, minor = torch.cuda.get_device_capability()
    archs = [arch.rstrip("af") for arch in compiled().archs().split(";")]  # "90a" -> "90"
    if f"{major}{minor}" not in archs:
        return f"built for sm_{'/'.join(archs)}, not sm_{major}{minor}; rebuild with FLG_CUDA_ARCHS={major}{minor}"
    return ""


def register(
    schema: str, compute: Callable, fake: Callable, setup: Callable | None = None, gradient: Callable | None = None
) -> Callable:
    """Register torch.ops.fastlightgen.<name> for CPU and CUDA and return a function that calls it.

    `compute` is the implementation, `fake` gives the shapes under torch.compile; `setup` saves tensors for `gradient`,
    the backward formula. Torch's dispatcher costs at least 3 us per call, so the returned function bypasses it unless
    a compiler, mode or transform is active (`unobserved`).
    """
    name = schema[: schema.index("(")]
    LIB.define(schema)
    for device in ("CPU", "CUDA"):
        LIB.impl(name, compute, device)
    torch.library.register_fake(f"fastlightgen::{name}", fake, lib=LIB)
    op = getattr(torch.ops.fastlightgen, name).default
    if gradient is None:
        return lambda *args: compute(*args) if unobserved(args) else op(*args)
    assert setup is not None, f"{name}: an operator with a gradient needs setup to save tensors for it"
    recorded = _recorded(name, op, compute, setup, gradient)

    def eager(*args):
        # With gradients: the autograd function. Without: the bare kernel, or the dispatcher if something observes.
        wanted = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        return recorded(*args) if wanted else compute(*args) if unobserved(args) else _below_autograd(op, args)

    LIB.impl(name, eager, "Autograd")
    return lambda *args: op(*args) if torch.compiler.is_compiling() else eager(*args)


# Subclasses, such as fake tensors, go through the dispatcher.
PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, float}


def unobserved(args: tuple) -> bool:
    """Whether all tensors are plain ones and no compiler, dispatch mode (such as a FLOP counter) or transform runs."""
    return (
        PLAIN.issuperset(map(type, args))
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _below_autograd(op: Callable, args: tuple):
    """Call an operator through the dispatcher, skipping its autograd key: the caller handles gradients."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _recorded(name: str, op: Callable, compute: Callable, setup: Callable, gradient: Callable) -> Callable:
    """Does the work of torch.library.register_autograd, which costs 30 us per call, at a fraction of that time."""

    def forward(ctx, *args):  # a separate setup_context method would cost an inspect.signature per call
        out = compute(*args) if unobserved(args) else _below_autograd(op, args)
        setup(ctx, args, out)
        return out

    backward = torch.autograd.function.once_differentiable(gradient)  # a second derivative raises an error
    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: type[torch.autograd.Function] = type(name, (torch.autograd.Function,), parts)
    return function.apply


@lru_cache
def kernels(op: str, backend: str) -> ModuleType:
    """Import the module that launches an operator's kernels, fastlightgen/ops/<op>/<backend>.py, at the first call."""
    return importlib.import_module(f"fastlightgen.ops.{op}.{backend}")


def queue(x: torch.Tensor) -> tuple[int, int]:
    """Device index and current CUDA stream for kernels that work on x."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def check(op: str, error: int, x: torch.Tensor) -> None:
    """Raise RuntimeError if a launcher returned a cudaError."""
    if error:
        words = compiled().error_string(error)
        got = f"{tuple(x.shape)} {x.dtype}"
        raise RuntimeError(f"{op}: cudaError {error}, {words}, for {got}; set FLG_OPS=reference to go on without it")


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on CPU tensors. For tests; `auto` never selects it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def backend() -> str:
    """The backend of this process for tensors on a GPU."""
    wanted = os.environ.get("FLG_OPS", "auto")
    if wanted == "auto":
        usable = (b for b in BACKENDS if torch.cuda.is_available() and not _why_not(b))
        return next(usable, "reference")
    if wanted not in BACKENDS:
        raise ValueError(f"FLG_OPS: got {wanted!r}, wanted one of auto, {', '.join(BACKENDS)}; unset it for auto")
    if reason := _why_not(wanted):
        raise ValueError(f"FLG_OPS: got {wanted!r}, which is not available: {reason}; or set FLG_OPS=auto")
    return wanted


@lru_cache
def backend_for(device_type: str) -> str:
    """The backend for tensors of a device type: on the CPU the reference, except under Triton's interpreter."""
    chosen = backend()
    return chosen if device_type == "cuda" or (chosen == "triton" and interpreted()) else "reference"


def describe() -> str:
    """The line that every command prints at its start, such as `operators: reference (no CUDA device is visible)`."""
    chosen = backend()
    if os.environ.get("FLG_OPS", "auto") != "auto":
        return f"operators: {chosen} (chosen by FLG_OPS)"
    if not torch.cuda.is_available():
        return f"operators: {chosen} (no CUDA device is visible)"
    rejected = [f"{b}: {_why_not(b)}" for b in BACKENDS[: BACKENDS.index(chosen)]]
    return f"operators: {chosen}" + (f" ({'; '.join(rejected)})" if rejected else "")
