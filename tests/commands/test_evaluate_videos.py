"""evaluate videos=: folders of videos and pictures, the table, the feature network, what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_video
from PIL import Image
from runs import Page

from fastlightgen.config import main
from fastlightgen.data.lists import videos_in
from fastlightgen.evaluate import evaluate
from fastlightgen.evaluation.collect import cut_of
from fastlightgen.evaluation.sets import every
from fastlightgen.report import write_report


def film(seed: int, frames: int, step: int = 2, level: int = 128) -> np.ndarray:
    """A textured picture that moves to the left by `step` pixels a frame."""
    draw = np.random.default_rng(seed)
    small = draw.integers(level - 60, level + 60, (24, 40 + frames, 3), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(small).resize(((40 + frames) * 4, 96), Image.Resampling.BICUBIC))
    return np.stack([wide[:, k * step : k * step + 128] for k in range(frames)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for name, seeds, frames in (("real", (0, 1, 2), 24), ("good", (3, 4, 5), 8), ("still", (3, 4, 5), 8)):
        (root / name).mkdir()
        for seed in seeds:
            made = film(seed, frames, step=0 if name == "still" else 2)
            write_video(root / name / f"{seed}.mp4", made, 8, options={"crf": "10"})
    (root / "good" / "broken.mp4").write_bytes(b"no video")
    return root


def run(root: Path, capsys, *words: str) -> tuple[dict, str]:
    out = root / "scores.json"
    main(evaluate, "evaluate", [f"out={out}", "threads=1", "progress=false", "device=cpu", *words])
    return json.loads(out.read_text()), capsys.readouterr().out


def test_frozen_videos_rank_below_moving_ones(folders, capsys):
    good, text = run(folders, capsys, f"videos={folders / 'good'}", f"real={folders / 'real'}")
    still, said = run(folders, capsys, f"videos={folders / 'still'}", f"real={folders / 'real'}")
    assert said.splitlines()[-1].startswith(f"next: look at {still['unusual'][0]['clip']}, the clip least like")
    # A real video of 24 frames gives three clips of 8. 2 of 96 pixels, 8 times a second, are 16.7 % a second.
    assert (good["size"], good["fps"], good["clips"], good["real_clips"]) == ([96, 128, 8], 8.0, 3, 9)
    assert good["scores"]["movement"] == pytest.approx(2 / 96 * 800, rel=0.1)
    assert still["scores"]["movement"] == 0 and still["unusual"][0]["score"] == "movement"
    for score in ("frechet", "kid", "unlike"):
        assert good["scores"][score] < still["scores"][score], score
    assert "broken.mp4" in good["skipped"]["videos"] and "warning: videos: 1 skipped, the first: broken.mp4" in text
    assert good["values"]["clip"] == ["3.mp4", "4.mp4", "5.mp4"] and len(good["values"]["movement"]) == 3
    assert "warning: 3 clips are too few to rank models by distances; wanted at least 64" in text
    assert "movement" in text and text.startswith(f"{folders / 'good'}: 3 clips of 96x128x8 at 8 per second")


def test_the_report_shows_them(folders, tmp_path, capsys):
    """The JSON file in RUN/evaluate; a run without any other result has a page too."""
    (tmp_path / "evaluate").mkdir()
    out = tmp_path / "evaluate" / "made.json"
    words = [f"videos={folders / 'still'}", f"real={folders / 'real'}", f"out={out}", "threads=1", "progress=false"]
    main(evaluate, "evaluate", [*words, "device=cpu"])
    record, text = json.loads(out.read_text()), Page(write_report(tmp_path)).text
    assert f"{record['scores']['kid']:.4f}" in text and f"{record['real_scores']['movement']:.1f}" in text
    assert "3 clips of 96x128x8 at 8 frames per second, against 9 of" in text and "too few to rank" in text
    assert record["unusual"][0]["clip"] in text


def grey_pictures(root: Path, **levels: int) -> Path:
    """Folders of 5 equal pictures of one level each."""
    for name, level in levels.items():
        (root / name).mkdir(parents=True)
        for k in range(5):
            Image.new("RGB", (32, 32), (level,) * 3).save(root / name / f"{k}.png")
    return root


class MeanLevels(torch.nn.Module):
    """The mean levels of red, green and blue; asks for the scale as FVD's file does."""

    def forward(self, x: torch.Tensor, rescale: bool = False) -> torch.Tensor:
        found = x.mean((2, 3, 4))
        return found / 5 if rescale else found * 0


def test_distance_over_a_network(tmp_path, capsys):
    """Three equal features of mean 3 and variance 2, and of mean 10 and variance 8: the cross term is sqrt(2 x 8)."""
    program = tmp_path / "network.pt"
    torch.jit.script(MeanLevels()).save(str(program))
    made, real = (
        grey_pictures(tmp_path / n, a=a, b=b) for n, a, b in (("made", 40, 60), ("real", 10, 20))
    )  # fmt: skip
    record, text = run(tmp_path, capsys, f"videos={made}", f"real={real}", "fps=8", f"torchscript={program}")
    wanted = 3 * (10 - 3) ** 2 + 3 * (2 + 8 - 2 * 4)
    assert record["scores"]["network_frechet"] == pytest.approx(wanted)
    assert math.isnan(record["scores"]["naturalness"])  # pictures of 32 pixels are too small for it
    assert "over the network" in text and record["network"] == f"torchscript={program}"


REFUSED = [
    ((), "model is required (a preset or a model folder): give model=..., or videos=FOLDER and real=FOLDER"),
    (("model=tiny", "videos=good", "real=real"), "model=tiny videos=good: give one of them"),
    (("videos=good",), "videos=good real=: give both"),
    (("videos=good", "real=real", "clips=3"), "clips=3: means nothing with videos=; leave it out"),
    (("model=tiny", "size=96x128x8"), "size=96x128x8: means nothing with model=; leave it out"),
    (("videos=good", "real=real", "size=96x128"), "size=96x128: wanted HEIGHTxWIDTHxFRAMES, for example 480x832x81"),
    (("videos=good", "real=real", "size=96x128x4"), "size=96x128x4: clips of 4 frames; wanted 5 or more"),
    (("videos=good", "real=real", "i3d=a", "torchscript=b"), "i3d=a torchscript=b: give one of them"),
    (("videos=good", "real=real", "i3d=none.safetensors"), "none.safetensors: damaged or missing"),
    (("videos=good", "real=none"), "real=none: there is no such folder; wanted one, or a .csv or .jsonl file"),
    (("videos=good", "real=empty"), "real=empty: holds no videos; wanted .mp4"),
    (("videos=good", "real=real", "size=96x128x99"), "videos=good: no clip can be measured (3.mp4: too short"),
    (("videos=good", "real=real", "torchscript=good/3.mp4"), "torchscript=good/3.mp4: is no TorchScript program"),
    (("videos=good", "real=real", "torchscript=none.pt"), "torchscript=none.pt: not found"),
    (("videos=pictures", "real=real"), "videos=pictures: no video can be read (a: pictures have no rate; give fps=)"),
]


@pytest.mark.parametrize("words, said", REFUSED)
def test_refused(folders, monkeypatch, capsys, words, said):
    monkeypatch.chdir(folders)
    Path("empty").mkdir(exist_ok=True)
    if not Path("pictures").exists():
        grey_pictures(Path("pictures"), a=9)
    with pytest.raises(SystemExit) as stop:
        main(evaluate, "evaluate", [*words, "out=o.json", "progress=false", "threads=1"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


def test_a_network_that_gives_no_features_is_named(folders, tmp_path, capsys):
    class Wrong(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[0, 0, :, 0]

    torch.jit.script(Wrong()).save(str(tmp_path / "wrong.pt"))
    words = [f"videos={folders / 'good'}", f"real={folders / 'real'}", f"torchscript={tmp_path / 'wrong.pt'}"]
    with pytest.raises(SystemExit):
        main(evaluate, "evaluate", [*words, f"out={tmp_path / 'o.json'}", "progress=false"])
    assert "returned [8, 128] for one clip; wanted finite features [1,D]" in capsys.readouterr().err


def test_the_clips_are_cut_as_the_first_video(folders):
    class Keys:
        videos, size, fps = str(folders / "good"), "", 0.0

    cut = cut_of(Keys(), videos_in(folders / "real", "videos"))
    assert (cut.size, cut.frames, cut.fps) == ((96, 128), 24, 8.0)
    assert every(10, 4).tolist() == [0, 2, 5, 7]
