"""Clips during training: their contents, their steps, and that training computes the same without them."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from helpers import assert_same, result, run_train, write_inputs

from fastlightgen.models.folder.weights import load_model
from fastlightgen.models.sample import PREVIEW_STEPS, sample
from fastlightgen.rng import generator
from fastlightgen.world.builtin import BuiltIn
from fastlightgen.world.source import ShapesSource


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_training_does_not_notice(inputs, tmp_path, stage):
    for name, every in (("with", 3), ("without", 0)):
        run_train(f"stage={stage}", f"run={tmp_path / name}", *inputs[stage], f"sample_every={every}")
    assert_same(result(tmp_path / "with", stage), result(tmp_path / "without", stage))
    samples = tmp_path / "with" / f"stage{stage}" / "samples"
    assert sorted(p.name for p in samples.iterdir()) == [f"step-{n:06d}.gif" for n in (3, 6, 7)]
    assert not (tmp_path / "without" / f"stage{stage}" / "samples").exists()


def test_the_last_clips_are_the_models(inputs, tmp_path, monkeypatch):
    """The last clips of Stage III: the saved student's, of the first held-out prompts, each from its own noise."""
    seen = {}
    monkeypatch.setattr(
        "fastlightgen.engine.preview.write_clips", lambda file, clips, fps: seen.update({file.name: (clips, fps)})
    )
    run_train("stage=3", f"run={tmp_path}", *inputs[3], "sample_every=100", "ema=0")
    folder = tmp_path / "stage3" / "model"
    model, card = load_model(folder), json.loads((folder / "fastlightgen.json").read_text())
    [(clips, fps)] = [seen.pop("step-000007.gif")]
    assert fps == BuiltIn.fps and len(clips) == 4 and not seen
    source = ShapesSource(0)
    for i, clip in enumerate(clips):
        batch = source.held_out(i, 1)
        noise = torch.randn(batch.x0.shape, generator=generator(0, 9, i))
        x0 = sample(model, batch.cond, None, noise, card["ladder"], 1.0, "stochastic", seed=0)
        assert np.array_equal(clip, BuiltIn().frames(x0)[0])


def test_many_step_networks_are_shown_in_few_steps(inputs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("fastlightgen.engine.preview.sample", lambda **how: seen.append(how) or how["noise"])
    run_train("stage=2", f"run={tmp_path}", *inputs[2], "sample_every=100")
    assert len(seen) == 4 and len(seen[0]["times"]) == PREVIEW_STEPS
    assert seen[0]["keep"] == [0, 3] and seen[0]["guidance"] == 2.0 and seen[0]["times"][1] == pytest.approx(21 / 22)


class Still:
    embeds_guidance = False

    def __call__(self, x, *_):
        return x

    def with_given(self, x, cond):
        return x


def test_a_signal_is_heard_between_clips(tmp_path):
    from fastlightgen.engine.preview import Preview

    made, world = [], BuiltIn()
    world.frames = lambda x: made.append(x) or BuiltIn().frames(x)
    preview = Preview(ShapesSource(0), world, 0, torch.device("cpu"))
    how = {"model": Still(), "times": [1.0], "guidance": 1.0, "kind": "ode"}
    preview.write(tmp_path, 5, how, lambda: len(made) == 2)
    assert len(made) == 2 and list(tmp_path.iterdir()) == []
    preview.write(tmp_path, 5, how, lambda: False)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005.gif"]


@pytest.mark.parametrize("save", [3, 5])
def test_clips_that_a_signal_prevented_are_made_when_the_run_goes_on(inputs, tmp_path, monkeypatch, save):
    """A run stopped between the checkpoint of step 3 and its clips ends with the same files as an unstopped one."""
    words = (*inputs[3], "sample_every=3", f"save_every={save}")
    run_train("stage=3", f"run={tmp_path / 'whole'}", *words)
    with monkeypatch.context() as patch:
        patch.setattr(
            "fastlightgen.engine.preview.sample", lambda **how: os.kill(os.getpid(), signal.SIGTERM) or how["noise"]
        )
        with pytest.raises(SystemExit):
            run_train("stage=3", f"run={tmp_path / 'cut'}", *words)
    stage = tmp_path / "cut" / "stage3"
    assert [p.name for p in (stage / "checkpoints").iterdir()] == ["step-000003"]
    run_train("stage=3", f"run={tmp_path / 'cut'}", *words)
    for file in ("samples.jsonl", *(f"samples/step-{n:06d}.gif" for n in (3, 6, 7))):
        assert (stage / file).read_bytes() == (tmp_path / "whole" / "stage3" / file).read_bytes(), file
    assert_same(result(tmp_path / "whole", 3), result(tmp_path / "cut", 3))
