"""export to=onnx: onnxruntime against the network, generate.py without torch against `generate`, README.md itself."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_line, run_alone, small_hunyuan, small_wan
from PIL import Image

from fastlightgen.config import SHAPES_PROMPT, main
from fastlightgen.export import export
from fastlightgen.files import tensors
from fastlightgen.flow import ladder
from fastlightgen.generate import generate
from fastlightgen.models.families import family_of
from fastlightgen.models.folder.weights import load_model, save_model
from fastlightgen.models.sample import sample
from fastlightgen.pipelines import onnx_folder, step_generate
from fastlightgen.rng import generator
from fastlightgen.world.shapes import WORLD

ort = pytest.importorskip("onnxruntime")

LATENT, STEPS, SEED = (1, 12, 8, 10, 10), 3, 5
SIZE, REAL_LATENT = "32x48x5", (1, 16, 2, 4, 6)
CARD = {"ladder": ladder(STEPS, 3.0), "shift": 3.0, "guidance": 1.0, "stage": 3, "world": WORLD}
REAL = {"ladder": ladder(4, 5.0), "shift": 5.0, "guidance": 1.0, "stage": 3}
NAMES = ("wan", "hunyuan", "real")


def spread(model):
    """Weights large enough that every part of the network shows in its prediction."""
    torch.manual_seed(1)
    for p in model.requires_grad_(False).parameters():
        p.add_(torch.randn_like(p) * 0.05)
    return model


def words(folder: Path, out: Path, *more: str) -> list[str]:
    return [f"model={folder}", "to=onnx", f"out={out}", "threads=1", *more]


@pytest.fixture(scope="module")
def students(tmp_path_factory, pipeline):
    """name -> model folder: of the built-in world with either sampler, and of real videos."""
    root = tmp_path_factory.mktemp("students")
    return {
        "wan": save_model(spread(small_wan(1)), root / "wan", sampler="stochastic", **CARD),
        "hunyuan": save_model(spread(small_hunyuan(1, 1)), root / "hunyuan", sampler="ode", **CARD),
        "real": save_model(
            load_model(pipeline("wan_t2v") / "transformer").prune([2]), root / "real", sampler="stochastic", **REAL
        ),
    }


@pytest.fixture(scope="module")
def folders(students, tmp_path_factory):
    """name -> the folder that the export wrote."""
    root = tmp_path_factory.mktemp("onnx")
    for name, folder in students.items():
        main(export, "export", words(folder, root / name, *[f"size={SIZE}"] * (name == "real")))
    return {name: root / name for name in students}


def step(folder: Path):
    return ort.InferenceSession(str(folder / "step.onnx"), providers=["CPUExecutionProvider"])


TORCH = ("torch", "PIL", "onnx")  # what generate.py does without


def noises(shape: tuple[int, ...], file: Path) -> Path:
    """The noise of `generate seed=SEED`: the first, and those after each step."""
    first = torch.randn(shape, generator=generator(SEED))
    np.save(file, torch.cat([first, *(torch.randn(shape, generator=generator(SEED, i)) for i in range(3))]).numpy())
    return file


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_predicts_what_the_network_predicts(students, folders, name):
    """1e-4, the limit of the export's purpose; float32 rounding alone makes 1e-6 of predictions near 1."""
    session, card = step(folders[name]), json.loads((folders[name] / "fastlightgen.json").read_text())
    model, g = load_model(students[name]).eval(), torch.Generator().manual_seed(7)
    given = {i.name: torch.randn(i.shape, generator=g) for i in session.get_inputs()}
    assert card["inputs"] == {i.name: i.shape for i in session.get_inputs()[2:]}
    given["t"] = torch.tensor([0.37])
    cuts = (3, 16) if "text_len" in given else (0,)
    for length in cuts:  # the network cuts off the padding, the file masks it
        if length:
            given["text_len"] = torch.tensor([length])
        session_out = session.run(None, {k: v.numpy() for k, v in given.items()})[0]
        cond = family_of(model.config).cond(**{k: v for k, v in given.items() if k not in ("x_t", "t")})
        if model.embeds_guidance:
            cond = replace(cond, guidance=torch.ones(1))
        with torch.no_grad():
            v = model(given["x_t"], given["t"], cond)
        assert v.abs().max() > 0.1
        assert np.abs(session_out - v.numpy()).max() <= 1e-4


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_the_same_clip_without_torch(students, folders, tmp_path, name):
    out = tmp_path / "a.png"
    said = [f"model={students[name]}", f"prompt={SHAPES_PROMPT}", f"out={out}", f"seed={SEED}"]
    main(generate, "generate", [*said, "device=cpu", "dtype=float32", "threads=1", "progress=false"])
    sheet = np.asarray(Image.open(out)).astype(int)  # one row of 8 frames
    wanted = sheet.reshape(len(sheet), 8, -1, 3).swapaxes(0, 1)
    given = [f"prompt={SHAPES_PROMPT}", f"noise={noises(LATENT, tmp_path / 'noise.npy')}"]
    for file in ("b.npy", "b.png"):
        done = run_alone(folders[name], TORCH, *given, f"out={tmp_path / file}")
        assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "b.npy")
    assert found.dtype == np.uint8 and found.shape == wanted.shape and wanted.std() > 5
    assert np.abs(found - wanted).max() <= 2
    with Image.open(tmp_path / "b.png") as film:  # Pillow reads the animation
        assert film.n_frames == 8 and film.info["duration"] == pytest.approx(1000 / 6, abs=1)
        for i in range(8):
            film.seek(i)
            assert np.array_equal(np.asarray(film.convert("RGB")), found[i])


def test_readme_takes_a_real_student_to_frames(students, folders, pipeline, tmp_path, monkeypatch):
    """The README's own lines make the inputs and decode the latents; the sampler of the package says what they are."""
    text = (folders["real"] / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("PIPELINE", str(pipeline("wan_t2v")))
    before, after = code.split("# After generate.py")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    names: dict = {}
    exec(before, names)
    file = noises(REAL_LATENT, tmp_path / "noise.npy")
    done = run_alone(
        folders["real"], TORCH, f"inputs={tmp_path / 'FOLDER'}", f"out={tmp_path / 'latents.npy'}", f"noise={file}"
    )
    assert done.returncode == 0, done.stderr
    exec("#" + after, names)
    assert names["frames"].shape == (1, 5, 32, 48, 3)
    cond, first = names["wish"].cond, torch.from_numpy(np.load(file)[:1])
    model = load_model(students["real"]).eval()
    wanted = sample(model, cond, None, first, ladder(4, 5.0), 1.0, "stochastic", SEED)
    assert np.abs(np.load(tmp_path / "latents.npy") - wanted.numpy()).max() <= 1e-4 * wanted.abs().max()

    mixed = np.load(file)  # by hand, as `Wish.start` mixes it
    hint = np.full((1, 16, 1, 4, 6), 300.0, np.float32)
    mixed[0] = 0.999 * mixed[0] + 0.001 * hint[0]
    np.save(tmp_path / "mixed.npy", mixed)
    run_alone(
        folders["real"],
        TORCH,
        f"inputs={tmp_path / 'FOLDER'}",
        f"out={tmp_path / 'a.npy'}",
        f"noise={tmp_path / 'mixed.npy'}",
    )
    np.save(tmp_path / "FOLDER" / "hint.npy", hint)
    run_alone(folders["real"], TORCH, f"inputs={tmp_path / 'FOLDER'}", f"out={tmp_path / 'b.npy'}", f"noise={file}")
    hinted = np.load(tmp_path / "b.npy")
    assert np.abs(hinted - np.load(tmp_path / "a.npy")).max() <= 1e-4
    assert np.abs(hinted - np.load(tmp_path / "latents.npy")).max() > 1e-3


def test_eight_bits(students, folders, tmp_path, capsys, monkeypatch):
    def traced(module, inputs, output, file):
        shutil.copy(folders["wan"] / "step.onnx", file)

    monkeypatch.setattr(onnx_folder, "write_program", traced)  # a trace takes seconds
    capsys.readouterr()
    main(export, "export", words(students["wan"], tmp_path / "q", "quant=int8"))
    said = capsys.readouterr().out
    plain, small = step(folders["wan"]), step(tmp_path / "q")
    g = torch.Generator().manual_seed(3)
    given = {i.name: torch.randn(i.shape, generator=g).numpy() for i in plain.get_inputs()}
    given["t"] = np.array([0.6], np.float32)
    a, b = (s.run(None, given)[0] for s in (plain, small))
    error = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert 1e-4 < error < 0.1  # 7 bits per weight and 8 per activation, at most 1 % in each of about 10 products
    printed = float(re.search(r"\(relative ([\de.-]+)\)", said)[1])
    assert error / 3 < printed < error * 3
    import onnx

    graph = onnx.load(tmp_path / "q" / "step.onnx").graph
    stored = {i.data_type for i in graph.initializer if len(i.dims) == 2 and max(i.dims) == i.dims[0]}
    assert onnx.TensorProto.INT8 in stored
    # Every product with a weight of the blocks is in 8 bits: 10 per block, text and output layers.
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) >= 13
    assert json.loads((tmp_path / "q" / "fastlightgen.json").read_text())["weights"] == "int8"
    assert not list((tmp_path / "q").glob("plain*"))


def test_large_networks_are_not_run_and_keep_weights_beside_the_file(students, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_folder, "LARGEST", 0)
    monkeypatch.setattr(onnx_folder, "MOST_FLOPS", 0)
    main(export, "export", words(students["wan"], tmp_path / "big"))
    assert "the same weights bit for bit" in capsys.readouterr().out
    assert (tmp_path / "big" / "step.onnx.data").stat().st_size > 4 * 10_000
    given = {i.name: np.full(i.shape, 0.5, np.float32) for i in step(folders["wan"]).get_inputs()}
    one, other = (step(folder).run(None, given)[0] for folder in (folders["wan"], tmp_path / "big"))
    assert np.array_equal(one, other)
    model = load_model(students["wan"]).requires_grad_(False)
    model.blocks[0].ffn.net[2].weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"does not hold blocks\.0\.ffn\.net\.2\.weight as it is"):
        onnx_folder.check_weights(model, tmp_path / "big" / "step.onnx")


def test_the_folder_speaks_of_the_student_alone(folders):
    for folder in folders.values():
        assert {p.name for p in folder.iterdir()} == {
            "step.onnx", "fastlightgen.json", "generate.py", "README.md", "manifest.json"
        }  # fmt: skip
        root = str(Path(onnx_folder.__file__).parents[2]).encode()
        assert all(root not in p.read_bytes() for p in folder.iterdir())  # a trace notes where the code stands
    card = json.loads((folders["real"] / "fastlightgen.json").read_text())
    assert (card["ladder"], card["sampler"], card["shift"]) == (ladder(4, 5.0), "stochastic", 5.0)
    assert (card["size"], card["latent"], card["fps"]) == (SIZE, list(REAL_LATENT), 16)
    assert card["inputs"] == {"text": [1, 512, 32]} and "world" not in card


def test_what_it_cannot_carry_is_refused_before_anything_is_written(students, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def said(folder, *more: str) -> str:
        line = error_line(capsys, lambda *w: main(export, "export", list(w)), *words(folder, out, *more))
        assert not list(tmp_path.glob("*out*"))
        return line

    wan = students["wan"]
    assert "wanted a student of Stage III" in said("tiny")
    guided = save_model(small_wan(1), tmp_path / "guided", **CARD | {"guidance": 2.0})
    assert "takes guidance 2, two predictions per step" in said(guided)
    assert "size=32x48x5: clips of the built-in world have one size" in said(wan, "size=32x48x5")
    assert "size=33x48x5: height and width must be multiples of 16" in said(students["real"], "size=33x48x5")
    assert "to=onnx has none, int8" in said(wan, "quant=fp8")
    assert "takes no pipeline=" in said(wan, "pipeline=p")
    words_of_a_file = [f"model={wan}", "to=onnx", f"out={tmp_path / 'x.onnx'}"]
    line = error_line(capsys, lambda *w: main(export, "export", list(w)), *words_of_a_file)
    assert "to=onnx writes a folder; give a name without .onnx" in line
    monkeypatch.setattr(onnx_folder, "PACKAGES", ("onnx", "no_such_package"))
    assert "no_such_package is not installed: pip install 'fastlightgen[onnx]'" in said(wan)


def test_generate_refuses_in_one_line(folders, tmp_path):
    for name, given, wanted in (
        (
            "wan",
            ["prompt=a pink ball"],
            "wanted at most 15 of these words: a moves then goes on stops turns back with r",
        ),
        ("wan", ["out=x.png"], "prompt is required"),
        ("wan", ["prompt=a", "out=x.mp4"], "wanted a name that ends in .npy or .png"),
        ("real", ["prompt=a"], "inputs is required"),
        ("wan", ["steps=3"], "steps: unknown; the keys are prompt="),
    ):
        done = run_alone(folders[name], TORCH, *given)
        assert done.returncode == 1 and wanted in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_generate_refuses_damaged_files(folders, tmp_path):
    """One flipped bit, one byte less, another program. Without manifest.json nothing is compared."""
    folder = shutil.copytree(folders["wan"], tmp_path / "student")
    given = [f"prompt={SHAPES_PROMPT}", f"out={tmp_path / 'a.png'}"]
    manifest = folder / "manifest.json"
    names = json.loads(manifest.read_text())["files"]
    assert set(names) == {path.name for path in folder.iterdir()} - {"README.md", "manifest.json"}
    for name in ("step.onnx", "fastlightgen.json"):
        whole = (folder / name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for damaged in (bytes(flipped), whole[:-1]):
            (folder / name).write_bytes(damaged)
            ended = run_alone(folder, TORCH, *given)
            said = f"{folder / name}: is damaged or missing; copy the folder again, or delete manifest.json if you"
            assert (
                ended.returncode == 1 and ended.stderr == f"{said} changed it\n" and not (tmp_path / "a.png").exists()
            )
        (folder / name).write_bytes(whole)
    (folder / "generate.py").write_text((folder / "generate.py").read_text() + "\n# mine\n")
    assert "generate.py: is damaged or missing" in run_alone(folder, TORCH, *given).stderr
    manifest.unlink()
    assert run_alone(folder, TORCH, *given).returncode == 0 and (tmp_path / "a.png").is_file()


def test_the_checksum_of_generate_is_that_of_the_manifest(tmp_path):
    for size in (0, 1, 4095, 4096, 10_000, (1 << 22) + 4_100):
        (tmp_path / "f").write_bytes(np.random.default_rng(size).bytes(size))
        assert step_generate.checksum(tmp_path / "f") == tensors.file_checksum(tmp_path / "f")[1]
