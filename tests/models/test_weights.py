"""Model folders: bit-equal round trips, exchange with stock diffusers, strict reading, atomic writing, public names."""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from folders import CONFIG, same
from safetensors.torch import load_file

import fastlightgen
from fastlightgen.files import tensors
from fastlightgen.models.folder import weights
from fastlightgen.models.folder.weights import WEIGHTS, build, load_model, read_card, save_model


def test_round_trip_is_bit_equal(folder: Path):
    model = build(CONFIG, seed=1)
    assert same(load_model(folder), model)
    half = save_model(model, folder.with_name("half"), dtype=torch.bfloat16)
    assert same(load_model(half, dtype=torch.bfloat16), build(CONFIG, seed=1).bfloat16())
    assert load_file(half / WEIGHTS)["proj_out.bias"].dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32  # saving changed nothing


def test_card(folder: Path):
    card = read_card(folder)
    assert {"family", "stage", "num_blocks", "kept_blocks", "ladder", "shift", "guidance", "source"} <= card.keys()
    assert (card["family"], card["stage"], card["num_blocks"], card["shift"]) == ("wan", 2, 4, 3.0)
    (folder / "fastlightgen.json").unlink()
    assert read_card(folder) == {}
    assert load_model(folder).num_blocks == 4  # a folder that another program wrote


def test_pruned_folder(folder: Path):
    model = load_model(folder)
    x_t, t, cond, _ = model.example_inputs()
    with torch.no_grad():
        want = model(x_t, t, cond, keep=[0, 3])
        save_model(model.prune([0, 3]), folder)
        assert torch.equal(load_model(folder)(x_t, t, cond), want)
    assert json.loads((folder / "config.json").read_text())["num_layers"] == 2


@pytest.mark.parametrize("keep", [None, [0, 2, 3]], ids=["whole", "pruned"])
@torch.no_grad()
def test_stock_from_pretrained_loads_it(folder: Path, keep):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("accelerate", reason="diffusers needs accelerate for from_pretrained of this class")
    model = load_model(folder)
    if keep:
        save_model(model.prune(keep), folder)
    load = diffusers.WanTransformer3DModel.from_pretrained
    other, log = load(folder, local_files_only=True, output_loading_info=True)
    assert not any(log.values())  # no key missing, unexpected or misshapen
    x_t, t, cond, _ = model.example_inputs(batch=2)
    want = other(x_t, 1000 * t, cond.text).sample
    torch.testing.assert_close(model(x_t, t, cond), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shards", ["10GB", "20KB"])
def test_loads_what_diffusers_saves(tmp_path: Path, shards: str):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    other = diffusers.WanTransformer3DModel(**CONFIG)
    other.save_pretrained(tmp_path, max_shard_size=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shards == "10GB"
    assert same(load_model(tmp_path), other)


def test_presets_draw_their_weights_from_the_seed():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = load_model("tiny", seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)  # torch's random state is unchanged
    torch.manual_seed(6)
    assert same(first, load_model("tiny", seed=3)) and not same(first, load_model("tiny", seed=4))
    assert first.num_blocks == 12
    assert load_model("tiny", dtype=torch.bfloat16).proj_out.weight.dtype == torch.bfloat16


def test_types(folder: Path):
    """Loading into another type rounds as torch does; the default type is float32."""
    model = build(CONFIG, seed=1)
    assert same(load_model(folder, dtype=torch.bfloat16), build(CONFIG, seed=1).bfloat16())
    save_model(model, folder, torch.bfloat16)
    assert same(load_model(folder), model.bfloat16().float())
    assert all(p.requires_grad and p.is_leaf for p in load_model(folder).parameters())


def test_a_loaded_model_does_not_depend_on_its_file(folder: Path):
    model = load_model(folder)
    with open(folder / WEIGHTS, "r+b") as f:  # in place: a mapped tensor would turn to zeros
        f.write(bytes((folder / WEIGHTS).stat().st_size))
    assert same(model, build(CONFIG, seed=1))


def test_loading_draws_no_random_numbers(folder: Path):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' /proc to reset the peak")
def test_a_load_holds_one_copy(tmp_path: Path, monkeypatch):
    """Growth of resident memory at its peak, mapped files included: the network and one window."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

    config = CONFIG | {"num_attention_heads": 16, "attention_head_dim": 32, "ffn_dim": 2048, "num_layers": 16}
    folder = save_model(build(config), tmp_path / "m", torch.bfloat16)
    load_model(folder)  # a first load, for imports and caches
    size = (folder / WEIGHTS).stat().st_size
    monkeypatch.setattr(weights, "WINDOW", size // 16)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model = load_model(folder, dtype=torch.bfloat16)
    peak = status("VmHWM") - before
    assert sum(p.numel() * p.element_size() for p in model.parameters()) > 0.99 * size > 1.3e8
    # In sizes of the network: 1 for the network, 1/16 for the window, the rest for the allocator. A second copy: 2.
    assert peak < 1.35 * size, f"{peak / size:.2f} times the size of the weights"


@torch.no_grad()
def test_shards(folder: Path):
    model, limit = build(CONFIG, seed=1), 20_000
    save_model(model, folder, max_shard_bytes=limit)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"diffusion_pytorch_model-00001-of-{len(shards):05}.safetensors"
    sizes = [[v.numel() * 4 for v in load_file(shard).values()] for shard in shards]
    assert all(sum(s) <= limit or len(s) == 1 for s in sizes)  # a tensor above the limit has its own shard
    record = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    assert record["metadata"]["total_size"] == sum(map(sum, sizes))
    assert all(key in load_file(folder / name) for key, name in record["weight_map"].items())
    assert same(load_model(folder), model)
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("accelerate", reason="diffusers needs accelerate for from_pretrained of this class")
    load = diffusers.WanTransformer3DModel.from_pretrained
    other, log = load(folder, local_files_only=True, output_loading_info=True)
    assert not any(log.values()) and same(other, model)
    save_model(model, folder)  # one file again, without the old index
    assert [p.name for p in folder.glob("*.safetensors*")] == [WEIGHTS]


def test_the_folder_of_a_run_names_its_latest_result(tmp_path: Path):
    for stage in (2, 3):
        (tmp_path / f"stage{stage}/model").mkdir(parents=True)
        (tmp_path / f"stage{stage}/model/config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"is the folder of a run; give model={tmp_path}/stage3/model"):
        load_model(tmp_path)


def test_neither_folder_nor_preset(tmp_path: Path):
    with pytest.raises(ValueError, match=r"neither a folder with config.json nor a preset \(.*tiny"):
        load_model(tmp_path)


@pytest.mark.parametrize("when", ["during", "before"])
def test_an_interrupted_save_leaves_the_old_folder_whole(folder: Path, monkeypatch, when: str):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def dies(state, path, metadata):
        if when == "during":
            Path(path).write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(tensors, "save_file", dies)
    with pytest.raises(OSError, match="No space left"):
        save_model(build(CONFIG, seed=2), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.undo()
    save_model(build(CONFIG, seed=2), folder)  # the next save succeeds and leaves no temporary folder
    assert same(load_model(folder), build(CONFIG, seed=2)) and list(folder.parent.iterdir()) == [folder]


def test_saving_replaces_model_folders_only(tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    save_model(build(CONFIG, seed=2), tmp_path / "thesis")  # an empty folder may be replaced
    for name in ("work", "work/file"):
        path = tmp_path / name
        path.write_text("text") if path.parent.name == "work" else path.mkdir()
    for path in (tmp_path / "work", tmp_path / "work/file"):
        with pytest.raises(ValueError, match="is not a model folder, so it is not replaced"):
            save_model(build(CONFIG, seed=2), path)
    assert (tmp_path / "work/file").read_text() == "text"


def test_public_names():
    names = ["load_model", "save_model", "Stream", "Cond"]
    names += [f"flow.{n}" for n in ("add_noise", "velocity", "x0_from_velocity", "shift_time", "ladder")]
    names += ["guidance.well_guided", "ops.dmd_gradient", "ops.norm_modulate"]
    for name in names:
        module, _, leaf = f"fastlightgen.{name}".rpartition(".")
        assert callable(getattr(importlib.import_module(module), leaf)), name
    model = fastlightgen.load_model("tiny")
    x_t, t, cond, null = model.example_inputs(batch=1, seed=0, size=(1, 2, 2))
    stream = fastlightgen.Stream(fastlightgen.Cond(text=cond.text, image=cond.image), keep=[0], grad=False)
    assert torch.equal(model.walk(x_t, t, [stream])[0], model(x_t, t, cond, keep=[0]))
    assert model.block_calls == 2
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = fastlightgen.nothing
