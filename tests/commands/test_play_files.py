"""What docs/play holds: few bytes, the runtime that its note names, the package's teacher, a trained student."""

import gzip
import hashlib
import json
from functools import partial

import pytest
import torch
from play import PAGE, maker

from fastlightgen.flow import rollout
from fastlightgen.metrics.texture import energy
from fastlightgen.models.folder.weights import load_model, trained_folder
from fastlightgen.rng import generator
from fastlightgen.world.captions import tokenise
from fastlightgen.world.codec import Codec
from fastlightgen.world.reader import adherence, read
from fastlightgen.world.shapes import Shapes

ort = pytest.importorskip("onnxruntime")

MOST = 12_000_000  # bytes


def test_what_ships():
    """The files are small and complete, and the runtime is the one that its note names."""
    files = {str(path.relative_to(PAGE)): path for path in PAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert sum(path.stat().st_size for path in files.values()) < MOST
    sizes = json.loads((PAGE / "play.json").read_text())["bytes"]
    assert sizes == {name: files[name].stat().st_size for name in sizes} and len(sizes) == 3
    note = files["onnxruntime/SOURCE.txt"].read_text()
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm.gz"):
        data = files[f"onnxruntime/{name}"].read_bytes()
        data = gzip.decompress(data) if name.endswith(".gz") else data
        assert hashlib.sha256(data).hexdigest() in note
    assert "MIT License" in files["onnxruntime/LICENSE"].read_text()


def test_the_teacher_is_the_one_of_the_package():
    make, teacher = maker(), load_model(trained_folder("tiny")).requires_grad_(False).eval()
    inputs = make.example(teacher, json.loads((PAGE / "play.json").read_text()))
    assert make.error(teacher, inputs, PAGE / "teacher.net.gz") < 1e-5  # float32 alone gives 3e-7


def test_the_student_is_one_of_stage_3(tmp_path):
    """README.md: adherence 0.90 and 0.81 of the real texture; Stage II has 0.87 and 0.47, a pruned network 0.71."""
    page = json.loads((PAGE / "play.json").read_text())
    way, latent = page["ways"]["student"], page["latent"]
    session = ort.InferenceSession(str(maker().unpack(PAGE / "student.net.gz", tmp_path)))
    real = Shapes(split="test").batch(range(24))
    image = torch.zeros(1, 1 + latent[1], *latent[2:]).numpy()

    def predict(text, x, t):
        given = {"x_t": x.numpy(), "t": torch.tensor([t]).numpy(), "text": text[None].numpy(), "image": image}
        return torch.from_numpy(session.run(None, given)[0])

    def clip(number, text):
        noise, *fresh = (torch.randn(latent, generator=generator(number, i)) for i in range(len(way["times"])))
        return rollout(partial(predict, text), noise, way["times"], way["sampler"], fresh.__getitem__)

    clips = [clip(number, text) for number, text in enumerate(tokenise(real.captions)[0])]
    video = Codec().decode(torch.cat(clips)).clamp(0, 1)
    values, _ = adherence(read(video), real.captions)
    assert values.mean() > 0.8
    assert energy(video).mean() > 0.65 * energy(real.video).mean()
