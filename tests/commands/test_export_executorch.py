"""export to=executorch: its runtime against the network, generate.py in a process of its own, the rewritten graph."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import error_line, run_alone, small_wan

from fastlightgen.config import SHAPES_PROMPT, main
from fastlightgen.export import export
from fastlightgen.flow import ladder
from fastlightgen.models.folder.weights import load_model, save_model
from fastlightgen.pipelines import executorch_folder
from fastlightgen.pipelines import executorch_rules as rules
from fastlightgen.pipelines.step_generate import decode, read_prompt
from fastlightgen.rng import generator
from fastlightgen.world.shapes import WORLD

LATENT, STEPS = (1, 12, 8, 10, 10), 3
CARD = {"ladder": ladder(STEPS, 3.0), "shift": 3.0, "guidance": 1.0, "stage": 3, "world": WORLD, "sampler": "ode"}
ROUNDING = {"atol": 1e-12, "rtol": 0}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rewritten_operations_are_torchs_own():
    q, k, v = (random(2, 3, n, 8, seed=i) for i, n in enumerate((5, 7, 7)))
    known = F.scaled_dot_product_attention
    torch.testing.assert_close(rules.attention(q, k, v), known(q, k, v), **ROUNDING)
    mask = random(5, 7, seed=3) > 0
    mask[:, 0] = True
    torch.testing.assert_close(rules.attention(q, k, v, mask), known(q, k, v, mask), **ROUNDING)
    x, w, b = random(2, 5, 8), random(8, seed=1), random(8, seed=2)
    torch.testing.assert_close(rules.rms_norm(x, [8], w, 1e-6), F.rms_norm(x, [8], w, 1e-6), **ROUNDING)
    torch.testing.assert_close(rules.layer_norm(x, [8], w, b, 1e-6), F.layer_norm(x, [8], w, b, 1e-6), **ROUNDING)
    x = 3 * random(50)
    near = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(rules.gelu(x, approximate="tanh"), near, **ROUNDING)
    assert rules.gelu(x) is NotImplemented and (near - F.gelu(x)).abs().max() > 1e-4
    x, w, b = random(1, 3, 2, 4, 9), random(6, 3, 1, 2, 3, seed=1), random(6, seed=2)
    torch.testing.assert_close(rules.conv3d(x, w, b, (1, 2, 3)), F.conv3d(x, w, b, (1, 2, 3)), **ROUNDING)
    x, order = random(1, 2, 3, 2, 2, 3, 2), (0, 6, 1, 2, 4, 3, 5)
    assert torch.equal(rules.permute(x, order), x.permute(order))
    assert rules.permute(x[0], (1, 0, 2, 3, 4, 5)) is NotImplemented


@torch.no_grad()
def test_the_rewritten_network_is_the_network():
    """No tensor has more dimensions than XNNPACK takes. Float32 sums in another order are within 1e-5."""
    model = small_wan(2).requires_grad_(False).eval()
    settings = executorch_folder.settings_of(model, CARD, "", True)
    inputs = executorch_folder.example(model, settings)
    step = executorch_folder.Step(model, list(inputs)[2:], 1.0).eval()
    program = executorch_folder.traced(step, inputs)
    shapes = [n.meta["val"].shape for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert shapes and max(map(len, shapes)) <= 6
    kinds = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not [kind for kind in kinds if any(word in kind for word in ("conv", "norm", "attention"))]
    found = program.module()(*inputs.values())
    wanted = step(*inputs.values())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_refusals(tmp_path, capsys, monkeypatch):
    def said(*more: str) -> str:
        words = ["model=tiny", "to=executorch", f"out={tmp_path / 'out'}", "threads=1"]
        given = dict(word.split("=", 1) for word in (*words, *more))
        return error_line(capsys, lambda: main(export, "export", [f"{k}={v}" for k, v in given.items()]))

    assert "to=executorch writes a folder; give a name without .pte" in said(f"out={tmp_path / 'x.pte'}")
    assert "to=executorch has none" in said("quant=int8")
    monkeypatch.setattr(executorch_folder, "PACKAGE", "no_such_package")
    assert "no_such_package is not installed: pip install 'fastlightgen[executorch]'" in said()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("executorch", exc_type=ImportError)
    root = tmp_path_factory.mktemp("executorch")
    torch.manual_seed(1)
    model = small_wan(1).requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.05)
    save_model(model, root / "student", **CARD)
    words = [f"model={root / 'student'}", "to=executorch", f"out={root / 'pte'}", "threads=1"]
    main(export, "export", words)
    return root


@torch.no_grad()
def test_executorch_predicts_what_the_network_predicts(folder):
    model, g = load_model(folder / "student").eval(), torch.Generator().manual_seed(7)
    card = json.loads((folder / "pte/fastlightgen.json").read_text())
    shapes = {"x_t": card["latent"], "t": [1], **card["inputs"]}
    given = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    given["t"] = torch.tensor([0.37])
    names = list(given)[2:]
    wanted = executorch_folder.Step(model, names, 1.0)(*given.values())
    found = executorch_folder.predict(folder / "pte/step.pte", given)
    assert wanted.abs().max() > 0.1 and (found - wanted).abs().max() <= 1e-4
    assert {p.name for p in (folder / "pte").iterdir()} == {
        "step.pte", "fastlightgen.json", "generate.py", "README.md", "manifest.json"
    }  # fmt: skip


@torch.no_grad()
def test_the_same_clip_by_the_runtime_alone(folder, tmp_path):
    """generate.py in a process that cannot import this package; pixels within one level of 255 of the sampler's."""
    noise = torch.randn(LATENT, generator=generator(5))
    np.save(tmp_path / "noise.npy", noise.numpy())
    given = (f"prompt={SHAPES_PROMPT}", f"noise={tmp_path / 'noise.npy'}", f"out={tmp_path / 'a.npy'}")
    done = run_alone(folder / "pte", ["onnxruntime"], *given)
    assert done.returncode == 0, done.stderr
    x = noise
    model, given = load_model(folder / "student").eval(), json.loads((folder / "pte/fastlightgen.json").read_text())
    arrays = read_prompt(SHAPES_PROMPT, given["inputs"], given["world"])
    step = executorch_folder.Step(model, list(arrays), 1.0)
    times = [*CARD["ladder"], 0.0]
    for t, after in zip(times, times[1:], strict=False):
        x = x + (after - t) * step(x, torch.tensor([t]), *(torch.from_numpy(value) for value in arrays.values()))
    wanted = decode(x.numpy(), given["world"]).astype(int)
    found = np.load(tmp_path / "a.npy").astype(int)
    assert found.shape == wanted.shape and wanted.std() > 5 and np.abs(found - wanted).max() <= 1
