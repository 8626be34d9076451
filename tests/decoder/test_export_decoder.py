"""export to=onnx vae=...: the decoder's frames against diffusers' VAE, generate.py up to the picture, refusals.

The same for ExecuTorch where it is installed, and its rewritten graph everywhere.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import error_line, run_alone, small_wan
from PIL import Image
from safetensors.torch import save_file
from vaes import tiny_weights

from fastlightgen.config import main
from fastlightgen.export import export
from fastlightgen.flow import ladder
from fastlightgen.models.folder.weights import load_model, save_model
from fastlightgen.pipelines import executorch_folder, executorch_rules, onnx_folder, step_decoder
from fastlightgen.pipelines.step_decoder import read_decoder
from fastlightgen.pipelines.world import Pipeline
from fastlightgen.world.shapes import WORLD

SIZE, LATENT = "32x48x5", (1, 16, 2, 4, 6)
CARD = {"ladder": ladder(2, 5.0), "shift": 5.0, "guidance": 1.0, "stage": 3, "sampler": "ode"}
KINDS = ("wan_t2v", "hunyuan_t2v")


@pytest.fixture(scope="module")
def students(tmp_path_factory, pipeline):
    """kind -> model folder."""
    root = tmp_path_factory.mktemp("students")
    return {kind: save_model(load_model(pipeline(kind) / "transformer"), root / kind, **CARD) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(students, tmp_path_factory, pipeline):
    pytest.importorskip("onnxruntime")
    root = tmp_path_factory.mktemp("onnx")
    for kind, student in students.items():
        words = [f"model={student}", "to=onnx", f"out={root / kind}", f"vae={pipeline(kind)}", f"size={SIZE}"]
        main(export, "export", [*words, "threads=1"])
    return {kind: root / kind for kind in students}


def latents(seed: int = 3) -> torch.Tensor:
    return torch.randn(LATENT, generator=torch.Generator().manual_seed(seed))


def wishes(folder: Path, card: dict) -> Path:
    """The inputs of a real student's step, any numbers."""
    folder.mkdir()
    for name, shape in card["inputs"].items():
        value = np.array([7]) if name == "text_len" else np.random.default_rng(1).standard_normal(shape, np.float32)
        np.save(folder / f"{name}.npy", value)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_decodes_what_the_pipeline_decodes(folders, pipeline, kind):
    """The pipeline's own way from latents to pixels; 1e-4 of 1 is far below a level of 255."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folders[kind] / "decoder.onnx"), providers=["CPUExecutionProvider"])
    assert [(i.name, tuple(i.shape)) for i in session.get_inputs()] == [("latents", LATENT)]
    found = session.run(None, {"latents": latents().numpy()})[0]
    encoders = Pipeline(pipeline(kind), torch.device("cpu"), torch.float32, SIZE).encoders
    wanted = (encoders.decode(latents()[0]) * 0.5 + 0.5).clamp(0, 1).numpy()
    assert found.shape == (1, *wanted.shape) == (1, 3, 5, 32, 48)
    assert wanted.std() > 0.05 and np.abs(found[0] - wanted).max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_without_torch(folders, pipeline, tmp_path, kind):
    """Frames are the decoded latents of the same folder without its decoder; the picture shows them."""
    folder, card = folders[kind], json.loads((folders[kind] / "fastlightgen.json").read_text())
    assert card["decoder"] == "decoder.onnx"
    wish = wishes(tmp_path / "wish", card)
    np.save(tmp_path / "noise.npy", latents().numpy())
    banned = ["torch", "PIL", "onnx", "diffusers"]
    for file in ("a.npy", "a.png"):
        given = (f"inputs={wish}", f"noise={tmp_path / 'noise.npy'}", f"out={tmp_path / file}")
        done = run_alone(folder, banned, *given)
        assert done.returncode == 0, done.stderr
    frames = np.load(tmp_path / "a.npy")
    with Image.open(tmp_path / "a.png") as film:
        assert film.n_frames == 5 and film.size == (48, 32)
        film.seek(4)
        assert np.array_equal(np.asarray(film.convert("RGB")), frames[4])

    import onnxruntime

    step = onnxruntime.InferenceSession(str(folder / "step.onnx"), providers=["CPUExecutionProvider"])
    x, times = latents().numpy(), [*CARD["ladder"], 0.0]
    arrays = {name: np.load(wish / f"{name}.npy") for name in card["inputs"]}
    for t, after in zip(times, times[1:], strict=False):
        x = x + (after - t) * step.run(None, {"x_t": x, "t": np.array([t], np.float32), **arrays})[0]
    wanted = Pipeline(pipeline(kind), torch.device("cpu"), torch.float32, SIZE).frames(torch.from_numpy(x))[0]
    assert frames.shape == wanted.shape == (5, 32, 48, 3) and wanted.std() > 5
    assert np.abs(frames.astype(int) - wanted).max() <= 1


def test_the_readme_says_how(folders):
    text = (folders["wan_t2v"] / "README.md").read_text()
    assert "python generate.py inputs=FOLDER out=clip.png" in text and "latents.npy" not in text
    assert "`decoder.onnx` makes them: latents 1 x 16 x 2 x 4 x 6 to frames" in text


def tiny(folder: Path) -> Path:
    save_file(tiny_weights(channels=16), folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


@torch.no_grad()
def test_a_tiny_decoder(students, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    decoder = read_decoder(str(tiny(tmp_path)), load_model(students["wan_t2v"]), False)
    onnx_folder.write_program(decoder, {"latents": latents()}, "frames", tmp_path / "decoder.onnx")
    session = ort.InferenceSession(str(tmp_path / "decoder.onnx"), providers=["CPUExecutionProvider"])
    wanted = (decoder.vae.decode(latents(4)) + 1) / 2
    assert np.abs(session.run(None, {"latents": latents(4).numpy()})[0] - wanted.numpy()).max() <= 1e-4


def test_refusals(students, tmp_path, capsys, pipeline, monkeypatch):
    def said(**given: object) -> str:
        words = {"to": "onnx", "out": tmp_path / "out", "size": SIZE, "threads": 1} | given
        line = error_line(capsys, lambda: main(export, "export", [f"{k}={v}" for k, v in words.items()]))
        assert not list(tmp_path.glob("*out*"))
        return line

    wan = students["wan_t2v"]
    shapes = save_model(small_wan(1), tmp_path / "shapes", **CARD | {"world": WORLD})
    assert "clips of the built-in world have a decoder of their own" in said(model=shapes, vae="any", size="")
    assert "has no config.json; give a VAE's folder" in said(model=wan, vae=tmp_path)
    assert "is a AutoencoderKLHunyuanVideo15; wanted" in said(model=wan, vae=pipeline("hunyuan15_t2v"))
    save_file(tiny_weights(channels=4), tmp_path / "other.safetensors")
    assert "decodes latents of 4 channels" in said(model=wan, vae=tmp_path / "other.safetensors")
    assert "vae=x: is for to=diffusers, onnx and executorch" in said(
        model=wan, vae="x", to="lora", teacher=wan, size=""
    )
    monkeypatch.setattr(step_decoder, "MOST_PIXELS", 32 * 48 * 4)
    monkeypatch.setattr(executorch_folder, "need_executorch", lambda: None)
    line = said(model=wan, vae=pipeline("wan_t2v"), to="executorch")
    assert "a clip of 32x48x5 is decoded in many minutes" in line and line.endswith("give a smaller size=\n")


def test_rewritten_operations_are_torchs_own():
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((1, 3, 5, 6, 8), (4, 3, 3, 3, 3), (4,)))
    for stride, padding in (((1, 1, 1), (0, 0, 0)), ((2, 1, 1), (1, 1, 1)), ((1, 2, 2), (0, 1, 1))):
        found, wanted = executorch_rules.conv3d(x, w, b, stride, padding), F.conv3d(x, w, b, stride, padding)
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
        assert found.is_contiguous()
    flat = w[:, :, :1]
    torch.testing.assert_close(executorch_rules.conv3d(x, flat, b), F.conv3d(x, flat, b), atol=1e-12, rtol=0)
    assert torch.equal(executorch_rules.enlarged(x, None, (2.0, 2.0, 3.0)), F.interpolate(x, scale_factor=(2, 2, 3)))
    pictures = x[0].transpose(0, 1)
    wanted = F.interpolate(pictures, (12, 8), mode="nearest-exact")
    assert torch.equal(executorch_rules.enlarged(pictures, (12, 8), None), wanted)
    with pytest.raises(ValueError, match="enlarges 6 to 9, which is no whole number of times"):
        executorch_rules.enlarged(pictures, (9, 8), None)
    found = executorch_rules.length(x, 2, [1], True)
    torch.testing.assert_close(found, x.norm(dim=1, keepdim=True), atol=1e-12, rtol=0)
    assert executorch_rules.length(x, 1, [1]) is NotImplemented


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_rewritten_decoder_is_the_decoder(students, pipeline, kind):
    """Nothing is left that XNNPACK has no operation for; sums in another order are within 1e-5."""
    decoder = read_decoder(str(pipeline(kind)), load_model(students[kind]), False)
    program = executorch_folder.traced(decoder, {"latents": latents()})
    kinds = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not [
        name for name in kinds if any(word in name for word in ("conv3d", "vector_norm", "upsample", "attention"))
    ]
    torch.testing.assert_close(program.module()(latents()), decoder(latents()), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "tiny"])
def test_executorch_decodes(students, pipeline, tmp_path, capsys, kind):
    """Where the package is installed; a clip by generate.py with nothing of this package."""
    pytest.importorskip("executorch", exc_type=ImportError)
    vae = tiny(tmp_path) if kind == "tiny" else pipeline(kind)
    student = students["wan_t2v" if kind == "tiny" else kind]
    words = [f"model={student}", "to=executorch", f"out={tmp_path / 'pte'}", f"vae={vae}", f"size={SIZE}", "threads=1"]
    main(export, "export", words)
    assert "decoder.pte" in capsys.readouterr().out
    decoder = read_decoder(str(vae), load_model(student), False)
    found = executorch_folder.predict(tmp_path / "pte/decoder.pte", {"latents": latents()})
    assert (found - decoder(latents())).abs().max() <= 1e-4
    wish = wishes(tmp_path / "wish", json.loads((tmp_path / "pte/fastlightgen.json").read_text()))
    np.save(tmp_path / "noise.npy", latents().numpy())
    given = (f"inputs={wish}", f"noise={tmp_path / 'noise.npy'}", f"out={tmp_path / 'a.npy'}")
    done = run_alone(tmp_path / "pte", ["onnxruntime", "diffusers"], *given)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "a.npy").shape == (5, 32, 48, 3)
