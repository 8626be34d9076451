"""Which code computes an operator: FLG_OPS=auto|cuda|triton|reference, decided once per process and said aloud."""

import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

BACKENDS = ("cuda", "triton", "reference")  # in the order in which `auto` prefers them
INTERFACE = 3  # of bindings/module.cpp
LIB = torch.library.Library("fastlightgen", "DEF")  # every operator is torch.ops.fastlightgen.<name>


@lru_cache
def extension() -> ModuleType | None:
    """The compiled module, or None where there is none, or one that does not load (said once)."""
    if importlib.util.find_spec("fastlightgen._C") is None:
        return None
    try:
        module = importlib.import_module("fastlightgen._C")
        if module.interface != INTERFACE:
            raise ImportError(f"it was made from other sources, interface {module.interface} instead of {INTERFACE}")
    except (ImportError, AttributeError) as error:
        warnings.warn(f"fastlightgen._C is not used: {error}; `pip install -e .` builds it anew", stacklevel=2)
        return None
    return module


def compiled() -> ModuleType:
    """The compiled module of a process whose backend is `cuda`: there it exists."""
    module = extension()
    assert module is not None, "the backend cuda was chosen without fastlightgen._C"
    return module


def parts() -> dict[str, tuple[bool, str]]:
    """Name of each part -> (is it there, how it was built or why not): the end of every installation prints it."""
    report = Path(__file__).parents[1] / "_build.json"
    said = json.loads(report.read_text()) if report.exists() else {}
    said = {part: state.removeprefix("not built: ") for part, state in said.items()}
    ext = extension()
    unknown = "the installation left no report; run `pip install -e .`"
    return {
        "C++ extension": (ext is not None, said.get("C++ extension", unknown)),
        "CUDA kernels": (ext is not None and ext.cuda_built(), said.get("CUDA kernels", unknown)),
        "CUTLASS products": (gemm_built(), said.get("CUTLASS products", unknown)),
        "Triton kernels": _triton(),
    }


def gemm_built() -> bool:
    """Are the products with fused epilogues (csrc/gemm) there?"""
    return (ext := extension()) is not None and ext.gemm_built()


def _triton() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed (it comes with torch's CUDA build)"
    return True, "compiled at their first call"


def _why_not(backend: str) -> str:
    """Why this process cannot use a backend; empty when it can."""
    if backend == "reference" or (backend == "triton" and _triton()[0] and interpreted()):
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if backend == "triton":
        there, detail = _triton()
        return "" if there else detail
    there, detail = parts()["CUDA kernels"]
    if not there:
        return f"not built ({detail}); `FLG_BUILD_CUDA=1 pip install -e .` shows why"
    major, minor = torch.cuda.get_device_capability()
    archs = [arch.rstrip("af") for arch in compiled().archs().split(";")]
    if f"{major}{minor}" not in archs:
        return f"built for sm_{'/'.join(archs)}, not sm_{major}{minor}; rebuild with FLG_CUDA_ARCHS={major}{minor}"
    return ""


def register(
    schema: str, compute: Callable, fake: Callable, setup: Callable | None = None, gradient: Callable | None = None
) -> Callable:
    """An operator torch.ops.fastlightgen.<name> for CPU and CUDA; with `gradient`, autograd's formula.

    Returns what calls it. The dispatcher costs 3 us and more, so it takes part only where somebody listens to it.
    """
    name = schema[: schema.index("(")]
    LIB.define(schema)
    for device in ("CPU", "CUDA"):
        LIB.impl(name, compute, device)
    torch.library.register_fake(f"fastlightgen::{name}", fake, lib=LIB)
    op = getattr(torch.ops.fastlightgen, name).default
    if gradient is None:
        return lambda *args: compute(*args) if unobserved(args) else op(*args)
    assert setup is not None, f"{name}: an operator with a gradient says what it saves"
    recorded = _recorded(name, op, compute, setup, gradient)

    def eager(*args):
        wanted = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        return recorded(*args) if wanted else compute(*args) if unobserved(args) else _below_autograd(op, args)

    LIB.impl(name, eager, "Autograd")
    return lambda *args: op(*args) if torch.compiler.is_compiling() else eager(*args)


PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, float}


def unobserved(args: tuple) -> bool:
    """Are these ordinary tensors, with no compiler, mode (a profiler of operations, a checkpoint's) or transform on?"""
    return (
        PLAIN.issuperset(map(type, args))
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _below_autograd(op: Callable, args: tuple):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _recorded(name: str, op: Callable, compute: Callable, setup: Callable, gradient: Callable) -> Callable:
    """What torch.library.register_autograd would make, at a fraction of its 30 us per call."""

    def forward(ctx, *args):  # setup_context as a method of its own costs an inspect.signature per call
        out = compute(*args) if unobserved(args) else _below_autograd(op, args)
        setup(ctx, args, out)
        return out

    backward = torch.autograd.function.once_differentiable(gradient)  # no second derivative, and it says so
    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: type[torch.autograd.Function] = type(name, (torch.autograd.Function,), parts)
    return function.apply


@lru_cache
def kernels(op: str, backend: str) -> ModuleType:
    """The launchers of an operator: fastlightgen/ops/<op>/<backend>.py, imported at its first call."""
    return importlib.import_module(f"fastlightgen.ops.{op}.{backend}")


def queue(x: torch.Tensor) -> tuple[int, int]:
    """Device index and current stream of a GPU tensor: where its kernels are enqueued."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def check(op: str, error: int, x: torch.Tensor) -> None:
    """Raises on a cudaError that a launcher returned."""
    if error:
        words = compiled().error_string(error)
        got = f"{tuple(x.shape)} {x.dtype}"
        raise RuntimeError(f"{op}: cudaError {error}, {words}, for {got}; set FLG_OPS=reference to go on without it")


def interpreted() -> bool:
    """Triton's interpreter runs its kernels on CPU tensors: for tests, never chosen by itself."""
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
        raise ValueError(f"FLG_OPS: got {wanted!r}, which is not there: {reason}; or set FLG_OPS=auto")
    return wanted


@lru_cache
def backend_for(device_type: str) -> str:
    """CPU tensors are computed by the reference, whatever the GPU's backend (except under Triton's interpreter)."""
    chosen = backend()
    return chosen if device_type == "cuda" or (chosen == "triton" and interpreted()) else "reference"


def describe() -> str:
    """One line for the start of every command, e.g. `operators: reference (no CUDA device is visible)`."""
    chosen = backend()
    if os.environ.get("FLG_OPS", "auto") != "auto":
        return f"operators: {chosen} (chosen by FLG_OPS)"
    if not torch.cuda.is_available():
        return f"operators: {chosen} (no CUDA device is visible)"
    lost = [f"{b}: {_why_not(b)}" for b in BACKENDS[: BACKENDS.index(chosen)]]
    return f"operators: {chosen}" + (f" ({'; '.join(lost)})" if lost else "")
