"""The timer of the benches against a model of a GPU: a host clock, and a queue that the GPU works off in order."""

from types import SimpleNamespace

import device_time
import pytest

RATE = 2e9  # cycles of the spin per second


class Gpu:
    """Host calls advance `now`; work queued at `now` begins when the work before it has ended."""

    def __init__(self):
        self.now = self.free = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool):
                self.at = None

            def record(self) -> None:
                gpu.now += 1e-6
                self.at = max(gpu.now, gpu.free)

            def query(self) -> bool:
                return self.at <= gpu.now

            def elapsed_time(self, other) -> float:
                return (other.at - self.at) * 1e3

        self.Event = Event

    def is_available(self) -> bool:
        return True

    def launch(self, host: float, device: float) -> None:
        self.now += host
        self.free = max(self.now, self.free) + device

    def _sleep(self, cycles: int) -> None:
        self.launch(5e-6, cycles / RATE)

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(device_time, "torch", SimpleNamespace(cuda=gpu))
    monkeypatch.setattr(device_time, "time", SimpleNamespace(perf_counter=lambda: gpu.now))
    return gpu


def test_the_model_shows_what_an_idle_gpu_costs(gpu: Gpu):
    """Events around a call on an idle GPU, without a spin, time the host's 17 us instead of the kernel's 5."""
    start, end = gpu.Event(True), gpu.Event(True)
    start.record()
    gpu.launch(17e-6, 5e-6)
    end.record()
    assert start.elapsed_time(end) == pytest.approx(22e-3)  # ms


@pytest.mark.parametrize(("launches", "host", "device"), [(1, 17e-6, 5e-6), (300, 10e-6, 2e-6), (1, 1e-3, 0.4)])
def test_samples_hold_the_time_on_the_gpu(gpu: Gpu, launches: int, host: float, device: float):
    def call():
        for _ in range(launches):
            gpu.launch(host, device)

    found = device_time.sampled([call], 9)
    assert found.seconds == pytest.approx([launches * device] * 9, rel=1e-6)
    assert found.host == pytest.approx(launches * host)
    assert not found.waits


def test_a_call_slower_than_its_first_time_gets_a_longer_spin(gpu: Gpu):
    """The host may be interrupted: the sample is taken again."""
    slow = iter([0.0] * 3 + [2e-3] + [0.0] * 20)  # the first three are the warm-up and the guess of the spin

    found = device_time.sampled([lambda: gpu.launch(17e-6 + next(slow), 5e-6)], 5)
    assert found.seconds == pytest.approx([5e-6] * 5) and not found.waits


def test_a_call_that_waits_for_the_gpu_is_marked(gpu: Gpu):
    def call():
        gpu.launch(17e-6, 5e-6)
        gpu.synchronize()
        gpu.now += 1e-3

    found = device_time.sampled([call], 3)
    assert found.waits and found.columns()["waits"] is True
    assert min(found.seconds) > 1e-3


def test_the_spread_is_that_of_the_samples():
    columns = device_time.Samples([n * 1e-6 for n in range(100, 0, -1)]).columns()
    assert columns == pytest.approx({"us": 50.5, "us_low": 11, "us_high": 90, "rounds": 100})
