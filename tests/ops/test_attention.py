"""The choice of torch's attention kernel, its messages, and the attention outputs that a checkpoint keeps."""

from contextlib import contextmanager

import pytest
import rule
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from fastlightgen.models.recompute import recomputed
from fastlightgen.ops import attend, attention, attention_cpu

FLASH, CUDNN, EFFICIENT, MATH = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@pytest.fixture(autouse=True)
def undecided():
    """Every test makes its own choice of kernel."""
    for decided in (attention.choice, attention._kernels):
        decided.cache_clear()
    yield
    for decided in (attention.choice, attention._kernels):
        decided.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Imitate a machine with a GPU for the queries of attention.py; return the list of activated kernels."""
    on = []

    def pretend(major: int, installed: tuple[str, ...] = (), cudnn: bool = True, impls=("FA3", "FA4"), broken=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "some GPU")
        monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
        monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *_: None)
        monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda *_: cudnn)

        def find(name: str):
            if name.startswith("flash_attn.") and name not in installed:
                raise ModuleNotFoundError(name)  # find_spec raises this when the parent package is missing
            return name if name in installed else None

        def activate(impl: str) -> None:
            if broken is not None:
                raise broken
            on.append(impl)

        monkeypatch.setattr(attention.importlib.util, "find_spec", find)
        monkeypatch.setattr(attention.switch, "list_flash_attention_impls", lambda: list(impls))
        monkeypatch.setattr(attention.switch, "activate_flash_attention_impl", activate)
        return on

    return pretend


def exact(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v of each head in float64."""
    return formula(q.double(), k.double(), v.double(), mask)


def formula(q, k, v, mask=None):
    """The same in the dtype of its arguments."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("wanted", ["auto", "math", "flash"])
def test_every_choice_of_a_cpu_is_attention(monkeypatch, wanted: str, masked: bool):
    monkeypatch.setenv("FLG_ATTENTION", wanted)
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 8)
    mask = (torch.arange(7) < torch.tensor([[4], [7]]))[:, None, None] if masked else None
    # Sums of 8 and 7 terms in float32: about 1e-7 of values below 10.
    torch.testing.assert_close(attend(q, k, v, mask).double(), exact(q, k, v, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", ["math", "flash"])
def test_a_demand_reaches_torch(monkeypatch, wanted: str):
    """The kernel named by FLG_ATTENTION is the one that runs."""
    monkeypatch.setenv("FLG_ATTENTION", wanted)
    q = torch.randn(1, 5, 2, 8)
    with torch.profiler.profile() as seen:
        attend(q, q, q)
    flash = any("flash_attention_for_cpu" in event.name for event in seen.events())
    assert flash == (wanted == "flash")


def test_a_demand_that_a_call_cannot_meet(monkeypatch):
    monkeypatch.setenv("FLG_ATTENTION", "flash")
    q, v = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 4)
    wanted = r"^FLG_ATTENTION=flash: it does not take q \(1, 5, 2, 8\), .* v \(1, 5, 2, 4\), torch.float32; set FLG_ATT"
    with pytest.raises(ValueError, match=wanted):
        attend(q, q, v)


def test_hopper_takes_flash_attention_3_where_it_is_installed(gpu):
    on = gpu(9, installed=("flash_attn_interface",))
    assert attention.describe() == "attention: flash3 (it is installed), calls with a mask: cudnn"
    assert on == ["FA3"]
    assert attention._kernels(True, False) == [FLASH, CUDNN, EFFICIENT, MATH]  # a preference
    assert attention._kernels(False, False) is None  # CPU tensors of the same process
    attention.describe()
    assert on == ["FA3"]  # activated once


def test_hopper_without_it_takes_cudnn(gpu):
    assert gpu(9) == []
    assert attention.describe() == "attention: cudnn (flash3: flash_attn_interface is not installed)"
    assert attention._kernels(True, True)[:2] == [CUDNN, FLASH]


def test_hopper_without_either(gpu):
    gpu(9, installed=("flash_attn_interface",), cudnn=False, broken=ImportError("undefined symbol:\n _ZN3c10"))
    said = attention.describe()
    flash = "flash3: flash_attn_interface does not load: undefined symbol: _ZN3c10"
    cudnn = f"cudnn: torch {torch.__version__} does not offer it for some GPU"
    assert said == f"attention: as torch chooses ({flash}; {cudnn})"
    assert attention._kernels(True, False) is None


@pytest.mark.parametrize("major", [8, 10])
def test_other_gpus_are_left_to_torch(gpu, major: int):
    assert gpu(major, installed=("flash_attn_interface",)) == []
    assert attention.describe() == "attention: as torch chooses (the GPU is no Hopper)"


def test_a_demand_on_a_gpu(gpu, monkeypatch):
    monkeypatch.setenv("FLG_ATTENTION", "flash4")
    assert gpu(10, installed=("flash_attn.cute.interface",)) == []
    assert attention.describe() == "attention: flash4 (chosen by FLG_ATTENTION), calls with a mask: cudnn"
    assert attention._kernels(True, False) == [FLASH]
    assert attention._kernels(True, True) == [FLASH, CUDNN, EFFICIENT, MATH]  # FlashAttention has no mask


MISSING = {
    "no such kernel": ("best", {"major": 9}, "got 'best', wanted one of auto, flash3, "),
    "not installed": ("flash3", {"major": 9}, "got 'flash3', which is not available: flash_attn_interface is not inst"),
    "no package": ("flash4", {"major": 9}, "flash_attn.cute.interface is not installed"),
    "another GPU": ("flash3", {"major": 8}, r"it runs on compute capability 9.x, this GPU has 8.0"),
    "an older torch": ("flash3", {"major": 9, "impls": ()}, "has no switch for it; install a newer torch"),
    "no cuDNN": ("cudnn", {"major": 9, "cudnn": False}, "does not offer it for some GPU"),
}


@pytest.mark.parametrize("why", MISSING)
def test_what_is_not_there_is_named(gpu, monkeypatch, why: str):
    wanted, machine, words = MISSING[why]
    monkeypatch.setenv("FLG_ATTENTION", wanted)
    gpu(**machine)
    with pytest.raises(ValueError, match=rf"^FLG_ATTENTION: .*{words}.*auto$") as raised:
        attention.choice()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wanted", ["flash3", "flash4", "cudnn", "efficient"])
def test_without_a_gpu(monkeypatch, wanted: str):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    monkeypatch.setenv("FLG_ATTENTION", wanted)
    with pytest.raises(ValueError, match=f"got '{wanted}', which is not available: no CUDA device is visible"):
        attention.choice()


@contextmanager
def replaced(calls: list):
    """Replace torch's CPU kernel in the way torch's switch installs FlashAttention-3 (_fa3.py)."""
    lib = torch.library.Library("aten", "IMPL")

    def forward(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        calls.append(tuple(q.shape))
        logits = q @ k.mT / q.shape[-1] ** 0.5
        return logits.softmax(-1) @ v, logits.logsumexp(-1)

    lib.impl("_scaled_dot_product_flash_attention_for_cpu", forward, "CPU")
    try:
        yield
    finally:
        lib._destroy()


@pytest.mark.filterwarnings("ignore:.*Overriding a previously registered kernel.*")
@pytest.mark.parametrize(("recompute", "times"), [("attention", 1), ("all", 2)])
def test_a_checkpoint_keeps_what_a_switched_in_kernel_made(recompute: str, times: int):
    """A checkpoint must see the kernel as one operation; otherwise it would run the kernel again in the backward."""
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    calls = []
    with replaced(calls):
        part = rule.Part(lambda q: attend(2 * q, q, q).sin())
        out = recomputed(part, part.run, recompute, q)
        out.sum().backward()
    assert calls == [(1, 2, 5, 8)] * times
    want = q.detach().double().requires_grad_()
    exact(2 * want, want, want).sin().sum().backward()
    torch.testing.assert_close(q.grad.double(), want.grad, rtol=1e-4, atol=1e-5)  # float32, sums of 5 to 8 terms


def flash_on_a_cpu(q, k, v):
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("clips", "heads", "queries", "keys"),
    [(16, 4, 200, 16), (5, 3, 200, 200), (1, 1, 1, 1), (2, 2, 700, 700)],  # 65, 6, all, and one head at a time
)
def test_the_kernel_of_a_cpu_is_as_exact_as_torchs(monkeypatch, clips, heads, queries, keys, dtype):
    """Output and gradients in 16 bits, against float64; torch's flash kernel is the measure."""
    called = []
    monkeypatch.setattr(attention_cpu, "attend", lambda *qkv: called.append(1) or attention_cpu.Attention.apply(*qkv))
    sizes = {"q": queries, "k": keys, "v": keys}
    inputs = {name: torch.randn(clips, tokens, heads, 32).to(dtype) for name, tokens in sizes.items()}
    exactly = rule.results(formula, inputs, torch.float64)
    rule.check(rule.results(attend, inputs), rule.results(flash_on_a_cpu, inputs), exactly, keys)
    assert called


def test_which_calls_it_takes():
    q = torch.randn(1, 2, 8, 32)
    half, long = q.bfloat16(), torch.randn(1, 1, 1025, 8).bfloat16()
    assert attention_cpu.takes(half, half, half)
    assert not attention_cpu.takes(q, q, q)
    assert not attention_cpu.takes(half, half, q)
    assert not attention_cpu.takes(long, long, long)
    assert not attention_cpu.takes(half, half[:, :, :0], half[:, :, :0])
    with FlopCounterMode(display=False):  # a mode that observes operators sees torch's
        assert not attention_cpu.takes(half, half, half)
    with torch.autocast("cpu", torch.bfloat16):  # torch's operator would round q, k and v to bfloat16 too
        assert attention_cpu.takes(q, half, q)
        assert attend(q, q, q).dtype == torch.bfloat16
        torch.testing.assert_close(attend(q, q, q), attend(half, half, half), rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", attention.KERNELS)
def test_gpu(monkeypatch, name: str, masked: bool):
    """All usable kernels, forward and backward, with at most twice the error of torch's plain operations."""
    if reason := attention._why_not(name):
        pytest.skip(reason)
    monkeypatch.setenv("FLG_ATTENTION", name)
    inputs = {n: torch.randn(2, 333, 4, 128).to("cuda", torch.bfloat16) for n in "qkv"}
    mask = (torch.arange(333) < torch.tensor([[300], [333]]))[:, None, None].cuda() if masked else None
    exactly = rule.results(lambda **a: formula(**a, mask=mask), inputs, torch.float64)
    own = rule.results(lambda **a: formula(**a, mask=mask), inputs)
    try:
        rule.check(rule.results(lambda **a: attend(**a, mask=mask), inputs), own, exactly, 333)
    finally:
        if name in attention.NEWER:
            attention.switch.restore_flash_attention_impl()
