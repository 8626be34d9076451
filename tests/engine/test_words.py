"""What a training run says: sizes by hand, the critic by its name, clips that take their time, Stage I's samples."""

import pytest
import torch
from helpers import empty_sweep, run_train, small_wan, write_inputs

from fastlightgen.engine.local import LocalEngine
from fastlightgen.engine.roles import Role, Update, in_words, title
from fastlightgen.stages.search import without
from fastlightgen.stages.sweep import score_sets


class Two:
    """A stage with two roles, of 100 and 3000 numbers."""

    iters, number = 1, 3
    roles = {
        name: Role(torch.nn.Linear(10, rows, bias=False), 1e-3, (0.9, 0.99), 0.0, 1.0, ema=ema, title=words)
        for name, rows, ema, words in (("student", 10, 0.9, ""), ("fake", 300, 0.0, "critic"))
    }


def test_the_estimate_by_hand():
    """Weight, gradient, two moments, average: 4 bytes each; a checkpoint has no gradients."""
    engine = LocalEngine(torch.device("cpu"), "float32")
    engine.prepare(Two())
    assert engine.estimate() == (
        "trains student 100 parameters, critic 3K parameters; 50 kB for weights, gradients and AdamW, "
        "plus activations; while a checkpoint is written a copy of it, 37.6 kB, waits in host memory"
    )
    assert 100 * 20 + 3000 * 16 == 50_000 and 100 * 16 + 3000 * 12 == 37_600


def test_the_critic_has_one_name():
    """Files and keys say fake; sentences say critic."""
    roles = Two.roles
    assert title("student", roles) == "student"
    names = {key: in_words(key, roles) for key in ("fake_loss", "student_loss", "loss", "fakes_loss")}
    assert names == {"fake_loss": "critic_loss"} | {key: key for key in ("student_loss", "loss", "fakes_loss")}
    engine = LocalEngine(torch.device("cpu"), "float32")
    engine.prepare(Two())
    weight = roles["fake"].net.weight
    with pytest.raises(ValueError, match="^step 1, critic: loss is nan"):
        engine.apply(Update("fake", lambda: (weight.sum() * torch.nan, {})), 0)


def test_stage_1_counts_scores_block_by_block():
    """Two clips at one time, the 4 single skips and the full pass: 10 scores, in parts after each of 4 blocks."""
    model, ticks = small_wan(), []
    x_t, t, cond, _ = model.example_inputs(batch=2, size=(1, 4, 4))
    keeps = [without(4, i) for i in range(4)] + [None]

    def scores(memory: float) -> torch.Tensor:
        sweep = empty_sweep(5, 2)
        sweep.tick = ticks.append
        return score_sets(model, [(x_t, t, x_t, cond)], keeps, "elbo", memory, sweep)

    whole = scores(4.0)
    assert ticks == [2, 3, 2, 3, 0] and whole.shape == (5, 2)
    ticks.clear()
    tight = 1.1 * 2 * model.hidden_bytes(x_t) / 1e9  # GB: one candidate at a time
    assert torch.equal(scores(tight), whole)
    assert sum(ticks) == 10 and ticks[:4] == [0, 1, 0, 1]  # a walk that skips block 0: three blocks, then the rest


def test_a_run_without_a_terminal(tmp_path, capsys):
    """No carriage returns; the last line before the clips says what takes the time."""
    words = [w for w in write_inputs(tmp_path)[3] if w != "progress=false"]
    run_train("stage=3", f"run={tmp_path / 'run'}", *words, "sample_every=100", "progress=true")
    out, err = capsys.readouterr()
    assert "\r" not in out + err and "fake" not in out + err
    assert "trains student " in out and "critic " in out
    assert [line for line in err.splitlines() if line.startswith("stage 3, making clips: 100% 7/7")]
    assert "critic_loss=" in err and "student_loss=" in err
