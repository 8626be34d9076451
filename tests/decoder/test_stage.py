"""stage=decoder from the command line: training, resuming to the same bits, and input that cannot be used."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers import assert_same, untimed, write_video
from safetensors.torch import load_file, save_file
from vaes import small_vae, write_videos

from fastlightgen.config import main
from fastlightgen.decoder.clips import Clips, video_rows
from fastlightgen.decoder.folder import read_vae
from fastlightgen.engine.log import read_metrics
from fastlightgen.train import train

SMALL = "size=32x40 frames=5 batch=2 score_clips=2 iters=4 save_every=2 log_every=1 warmup=1 lr=1e-3 threads=1".split()
SMALL += "adversarial_start=0.25 adversarial_width=4 progress=false workers=1 device=cpu".split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("decoder")
    small_vae("wan").save_pretrained(root / "wan")
    small_vae("hunyuan").save_pretrained(root / "hunyuan")
    write_videos(root / "videos")
    return root


def run(inputs, *words: str, vae: str = "wan") -> None:
    given = dict(w.split("=", 1) for w in [f"vae={inputs / vae}", f"videos={inputs / 'videos'}", *SMALL, *words])
    main(train, "train", ["stage=decoder", *(f"{k}={v}" for k, v in given.items())])


def refused(capsys, inputs, *words: str, vae: str = "wan") -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(inputs, *words, vae=vae)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    return err


def result(run_folder) -> dict:
    latest = max((run_folder / "decoder" / "checkpoints").glob("step-*"))
    return {
        "vae": load_file(run_folder / "decoder" / "model" / "diffusion_pytorch_model.safetensors"),
        "state": {f.name: load_file(f) for f in sorted(latest.glob("*.safetensors"))},
        "card": json.loads((run_folder / "decoder" / "model" / "fastlightgen.json").read_text()),
        "metrics": [untimed(r) for r in read_metrics(run_folder / "decoder" / "metrics.jsonl")],
    }


@pytest.mark.parametrize("vae", ["wan", "hunyuan"])
def test_trains_and_resumes_to_the_same_bits(inputs, tmp_path, monkeypatch, capsys, vae):
    run(inputs, f"run={tmp_path / 'straight'}", vae=vae)
    wanted = result(tmp_path / "straight")
    first = load_file(tmp_path / "straight/decoder/pruned/diffusion_pytorch_model.safetensors")
    moved = {k for k, v in wanted["vae"].items() if not torch.equal(v.nan_to_num(), first[k].nan_to_num())}
    assert moved == {k for k in first if k.startswith("decoder.")}  # the decoder, all of it, and nothing else
    assert "discriminator_loss" in wanted["metrics"][1] and "discriminator_loss" not in wanted["metrics"][0]

    stop = Clips.__call__

    def interrupting(self, step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return stop(self, step)

    monkeypatch.setattr(Clips, "__call__", interrupting)
    with pytest.raises(SystemExit) as stopped:
        run(inputs, f"run={tmp_path / 'twice'}", vae=vae)
    assert stopped.value.code == 130 and "saved step 3 of 4" in capsys.readouterr().err
    monkeypatch.undo()
    run(inputs, f"run={tmp_path / 'twice'}", vae=vae)
    assert "continues at step 3 of 4" in capsys.readouterr().out
    got = result(tmp_path / "twice")
    for part in (wanted, got):
        part["vae"] = {k: v.nan_to_num() for k, v in part["vae"].items()}  # an encoder that is not there is NaN
    assert_same(got, wanted)
    run(inputs, f"run={tmp_path / 'twice'}", vae=vae)
    assert "exists, nothing to do" in capsys.readouterr().out


def test_micro_batches_see_the_same_clips(inputs, tmp_path):
    """The reconstruction of a batch in two shares is the mean of the same clips."""
    for name, word in (("one", "micro_batch=0"), ("two", "micro_batch=1")):
        run(inputs, f"run={tmp_path / name}", word, "iters=1", "adversarial=0")
    one, two = (result(tmp_path / name)["metrics"][0]["reconstruction"] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)


def test_fine_tuning_lowers_the_error(inputs, tmp_path):
    """A grey clip, 0.57 away from what random weights decode, is learnt within a few steps."""
    (tmp_path / "grey").mkdir()
    write_video(tmp_path / "grey" / "grey.mp4", np.full((12, 64, 80, 3), 200, np.uint8), 16)
    words = ["iters=12", "adversarial=0", "lr=2e-2", "save_every=12", "lr_schedule=constant"]
    run(inputs, f"run={tmp_path / 'run'}", f"videos={tmp_path / 'grey'}", *words)
    errors = [r["reconstruction"] for r in result(tmp_path / "run")["metrics"]]
    assert errors[0] > 0.4 and errors[-1] < 0.5 * errors[0]


def test_clips_depend_on_their_number_alone(inputs):
    rows = video_rows(str(inputs / "videos"))
    ahead, alone = (Clips(rows, 16, 5, (32, 40), 2, 3, 7, workers) for workers in (2, 0))
    batches = [ahead(step) for step in range(3)]
    assert batches[0].shape == (2, 3, 5, 32, 40) and batches[0].min() >= -1 and batches[0].max() <= 1
    assert torch.equal(batches[2], alone(2)) and torch.equal(batches[1][1], alone.draw(3))
    assert not torch.equal(batches[0], batches[1])


def test_a_video_that_cannot_be_read_is_passed_over(inputs, tmp_path):
    shutil.copytree(inputs / "videos", tmp_path / "videos")
    (tmp_path / "videos" / "2.mp4").write_bytes(b"no video")
    clips = Clips(video_rows(str(tmp_path / "videos")), 16, 5, (32, 40), 1, 1, 0, 0)
    assert len({clips.draw(n).sum().item() for n in range(12)}) > 6
    with pytest.raises(ValueError, match="20 clips in a row cannot be read, the last 2.mp4: cannot be opened"):
        Clips(video_rows(str(tmp_path / "videos"))[2:], 16, 5, (32, 40), 1, 1, 0, 0).draw(0)


def test_bad_input(inputs, tmp_path, capsys):
    out = f"run={tmp_path / 'run'}"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert "is a AutoencoderKL; wanted AutoencoderKLWan or" in refused(capsys, inputs, out, f"vae={tmp_path / 'other'}")
    assert "has no config.json" in refused(capsys, inputs, out, f"vae={inputs / 'videos'}")
    residual = json.loads((inputs / "wan" / "config.json").read_text()) | {"is_residual": True}
    (tmp_path / "other" / "config.json").write_text(json.dumps(residual))
    assert "is the VAE of Wan 2.2" in refused(capsys, inputs, out, f"vae={tmp_path / 'other'}")
    shutil.copytree(inputs / "wan", tmp_path / "cut")
    file = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cannot be loaded" in refused(capsys, inputs, out, f"vae={tmp_path / 'cut'}")
    shutil.copy(inputs / "hunyuan" / file.name, file)
    assert "does not fit its config.json" in refused(capsys, inputs, out, f"vae={tmp_path / 'cut'}")
    save_file({"features.0.weight": torch.zeros(4, 1, 3, 3)}, tmp_path / "vgg.safetensors")
    err = refused(capsys, inputs, out, f"perceptual={tmp_path / 'vgg.safetensors'}")
    assert "features.0.weight is [4, 1, 3, 3], wanted [4, 3, 3, 3]" in err
    assert "frames=6: wanted 4 k + 1" in refused(capsys, inputs, out, "frames=6")
    assert "size=30x40: wanted multiples of 8" in refused(capsys, inputs, out, "size=30x40")
    assert "size=32: wanted HEIGHTxWIDTH" in refused(capsys, inputs, out, "size=32").replace("buckets", "size")
    assert "holds no videos" in refused(capsys, inputs, out, f"videos={inputs / 'wan'}")
    assert "model is a key of" in refused(capsys, inputs, out, "model=tiny")
    assert not (tmp_path / "run" / "decoder" / "model").exists()


def test_another_pruning_is_refused(inputs, tmp_path, capsys):
    run(inputs, f"run={tmp_path}", "iters=1", "adversarial=0")
    err = refused(capsys, inputs, f"run={tmp_path}", "iters=1", "adversarial=0", "keep_channels=0.25")
    assert "keep_channels: 0.5 -> 0.25" in err


def test_the_result_is_a_vae(inputs, tmp_path):
    """A run reads its pipeline's VAE from the result of another run, which still has its encoder."""
    run(inputs, f"run={tmp_path / 'a'}", "iters=1", "adversarial=0")
    again = f"vae={tmp_path / 'a' / 'decoder' / 'model'}"
    run(inputs, f"run={tmp_path / 'b'}", again, "iters=1", "adversarial=0")
    assert read_vae(tmp_path / "b" / "decoder" / "model").config.decoder_base_dim == 2
