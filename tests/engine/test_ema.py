"""The averaged weights: the recursion against a computation by hand; a run saves the average."""

import json

import pytest
import torch
from helpers import batches, config, run_train, small_wan, write_inputs
from safetensors.torch import load_file

from fastlightgen.engine.ema import Ema
from fastlightgen.engine.local import LocalEngine
from fastlightgen.stages.teacher import Teacher


def test_recursion():
    """Up to `start` the weights themselves, then their even mean, until 1 / (n + 1) falls below 1 - decay."""
    net = torch.nn.Linear(1, 1, bias=False)
    ema = Ema(net, decay=0.75, start=2)
    shadow, values = None, [5.0, -1.0, 2.0, 7.0, 0.5, 3.0, 4.0]
    for count, value in enumerate(values, 1):
        net.weight.data.fill_(value)
        ema.update(net)
        if count <= 2:
            shadow = value
        else:
            rate = max(0.25, 1 / (count - 2 + 1))
            shadow = (1 - rate) * shadow + rate * value
        assert ema.shadow["weight"].item() == pytest.approx(shadow)
        if count == 5:
            assert shadow == pytest.approx((-1.0 + 2.0 + 7.0 + 0.5) / 4)  # an even mean so far
    ema.copy_to(net)
    assert net.weight.item() == pytest.approx(shadow)


def test_only_what_trains_is_averaged():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net[0].requires_grad_(False)
    assert set(Ema(net, 0.9, 0).shadow) == {"1.weight", "1.bias"}


def test_the_engine_averages_after_every_update_of_the_role():
    stage = Teacher(config(0, "ema=0.5", "warmup=0", "lr=0.01"), small_wan(), batches(2), {})
    engine = LocalEngine(torch.device("cpu"), "float32")
    engine.prepare(stage)
    name = "blocks.0.ffn.net.2.bias"
    shadow = stage.net.get_parameter(name).detach().double()
    for step in range(3):
        engine.apply(stage.updates(step)[0], step)
        shadow = 0.5 * shadow + 0.5 * stage.net.get_parameter(name).detach().double()
    assert torch.allclose(engine.emas["teacher"].shadow[name].double(), shadow, atol=1e-7)
    engine.finish()
    assert torch.allclose(stage.net.get_parameter(name).double(), shadow, atol=1e-7)


@pytest.mark.parametrize(
    "stage, role, words", [(0, "teacher", ["ema=0.8"]), (3, "student", ["ema=0.8", "ema_start=1"])]
)
def test_the_saved_model_is_the_average(tmp_path, stage, role, words):
    run_train(f"stage={stage}", f"run={tmp_path}/r", *write_inputs(tmp_path)[stage], *words, "warmup=0")
    folder = tmp_path / f"r/stage{stage}"
    latest = max((folder / "checkpoints").glob("step-*"))
    saved = load_file(folder / "model/diffusion_pytorch_model.safetensors")
    average, live = (load_file(latest / f"{role}{suffix}.safetensors") for suffix in ("-ema", ""))
    assert saved.keys() == average.keys()
    assert all(torch.equal(v, average[k]) for k, v in saved.items())
    assert any(not torch.equal(v, live[k]) for k, v in saved.items())
    updates = json.loads((latest / "state.json").read_text())["count"]
    assert updates == ({"teacher": 7} if stage == 0 else {"student": 4, "fake": 7})
