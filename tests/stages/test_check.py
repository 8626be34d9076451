"""The check of the data before training: its errors against closed forms; the shipped teacher passes it."""

import pytest
import torch
from helpers import config
from torch import nn

from fastlightgen.data.source import Batch
from fastlightgen.models.base import Cond
from fastlightgen.models.folder.weights import load_model, trained_folder
from fastlightgen.stages import check
from fastlightgen.stages.check import TIMES, check_teacher, filter_error, relative_error, teacher_errors
from fastlightgen.world.source import ShapesSource


class World:
    """A source of the built-in world's clips that looks like a cache; `change` spoils the clips."""

    description = {"family": "wan"}

    def __init__(self, change=lambda x: x, clips: int = 9):
        self.source, self.change, self.num_held_out = ShapesSource(0), change, clips

    def held_out(self, start: int, size: int) -> Batch:
        batch = self.source.held_out(start, size)
        return Batch(self.change(batch.x0), batch.cond, batch.null)


class Known(nn.Module):
    """A network that always predicts one clip: v = (x_t - x0) / t + offset."""

    device = torch.device("cpu")

    def __init__(self, x0, offset=0.0):
        super().__init__()
        self.x0, self.offset = x0, offset

    def forward(self, x_t, t, cond):
        return (x_t - self.x0) / t + self.offset


class OneClip:
    description = {"family": "wan"}

    def __init__(self, x0):
        self.x0 = x0

    def held_out(self, start, size):
        return Batch(self.x0, Cond(torch.zeros(1, 1, 1)), Cond(torch.zeros(1, 1, 1)))


def test_errors_by_hand():
    """An error d in v gives an error t d in x0, so a relative error of t^2 d^2 / var."""
    x0 = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = teacher_errors(Known(x0, 0.5), OneClip(x0), 0)
    assert list(found) == list(TIMES)
    for t, (error, _) in found.items():
        assert error == pytest.approx((t * 0.5) ** 2 / float(x0.var()), rel=1e-4)
    assert relative_error(x0, x0) == 0


def test_the_filter_is_the_best_factor():
    """Against least squares on 2e5 numbers. Their x0 and noise correlate by 0.2 %, which moves the error by 1 %."""
    g = torch.Generator().manual_seed(0)
    x0, noise = 1.7 * torch.randn(200_000, generator=g), torch.randn(200_000, generator=g)
    for t in TIMES:
        x_t = (1 - t) * x0 + t * noise
        best = relative_error((x_t @ x0) / (x_t @ x_t) * x_t, x0)
        assert filter_error(x0, t) == pytest.approx(best, rel=0.02)


def test_the_shipped_teacher_knows_its_world_and_no_other(capsys, monkeypatch):
    """Latents with permuted channels or a wrong scale, as of another VAE, fail the check."""
    monkeypatch.setattr(check, "CLIPS", 1)
    cfg = config(2)
    model = load_model(trained_folder("tiny")).requires_grad_(False)
    check_teacher(cfg, model, World())
    out = capsys.readouterr().out
    assert "x0 error on 1 held-out clip," in out and "warning" not in out
    check_teacher(cfg, model, World(lambda x: x.flip(1)))
    assert "warning: data=shapes: the teacher does not know these latents" in capsys.readouterr().out
    with pytest.raises(ValueError, match="check that the cache was made with its pipeline, or go on with"):
        check_teacher(config(2, "data_check=stop"), model, World(lambda x: 3 * x))
    capsys.readouterr()
    check_teacher(config(2, "data_check=off"), model, World(lambda x: x.flip(1)))
    check_teacher(cfg, model, ShapesSource(0))  # not checked: the built-in world is no cache
    assert capsys.readouterr().out == ""
