"""manifest.json of an export: no changed, lost or shortened file is loaded, or called complete."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import error_line
from students import make_student
from test_tensors import by_hand

from fastlightgen.config import main
from fastlightgen.export import export
from fastlightgen.files import tensors
from fastlightgen.generate import generate
from fastlightgen.models.folder.manifest import names_in, verify_files
from fastlightgen.models.folder.weights import load_model
from fastlightgen.pipelines.encoders import Encoders

VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("size", [0, 5, 4096, 8192, 16384, 20001])
def test_the_checksum_of_a_file_is_that_of_its_bytes(tmp_path, monkeypatch, size):
    monkeypatch.setattr(tensors, "CHUNK", 8192)
    data = bytes(i * 7 % 251 for i in range(size))
    (tmp_path / "f").write_bytes(data)
    assert tensors.file_checksum(tmp_path / "f") == (size, by_hand(data) if data else 0)


@pytest.fixture(scope="module")
def made(pipeline, tmp_path_factory) -> tuple[Path, Path, Path]:
    """A pipeline, a student, and its export with copied parts."""
    root, source = tmp_path_factory.mktemp("made"), pipeline("wan_t2v")
    model = make_student(source, root / "model")
    run(f"model={model}", f"pipeline={source}", f"out={root / 'out'}")
    return source, model, root / "out"


def run(*words: str) -> None:
    main(export, "export", [*words, "threads=1", "progress=false"])


def changed(folder: Path, name: str, how: str) -> Path:
    file = folder / name
    data = file.read_bytes()
    if how == "lost":
        file.unlink()
    elif how == "shortened":
        file.write_bytes(data[:-1])
    else:
        file.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    return file


def test_every_file_is_recorded_by_hand(made):
    _, _, out = made
    found = json.loads((out / "manifest.json").read_text())["files"]
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert found.keys() == files.keys() - {"manifest.json", "README.md"} and len(found) > 8
    for name in ("model_index.json", "vae/config.json", "scheduler/scheduler_config.json", "fastlightgen.json"):
        assert found[name] == {"size": len(files[name]), "sum": by_hand(files[name])}


@pytest.mark.parametrize(
    "name, how, said",
    [
        (VAE, "flipped", "is damaged (its checksum is wrong)"),
        (VAE, "shortened", "bytes, manifest.json says"),
        ("tokenizer/tokenizer_config.json", "lost", "not found"),
        ("scheduler/scheduler_config.json", "flipped", "is damaged"),
    ],
)
def test_a_changed_part_is_not_loaded(made, tmp_path, capsys, name, how, said):
    folder = tmp_path / "out"
    shutil.copytree(made[2], folder)
    file = changed(folder, name, how)
    end = ["size=32x32x5", "threads=1", "progress=false"]
    words = [f"model={folder}", "prompt=x", f"out={tmp_path / 'a.png'}", *end]
    line = error_line(capsys, lambda *w: main(generate, "generate", list(w)), *words)
    assert line.startswith(f"error: {file}: ") and said in line and "delete manifest.json" in line
    assert not (tmp_path / "a.png").exists()


def test_a_changed_network_is_not_loaded(made, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(made[2], folder)
    load_model(folder)
    (folder / "README.md").write_text("my words")  # people edit it
    load_model(folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"eps": 1e-5}))  # no shape tells it
    with pytest.raises(ValueError, match="transformer/config.json: has .* bytes"):
        load_model(folder)
    (folder / "manifest.json").unlink()
    assert load_model(folder).config["eps"] == 1e-5


def test_an_export_of_a_damaged_pipeline_is_refused(made, tmp_path, capsys):
    """By the header of a file of weights; by the manifest, if the pipeline is itself an export."""
    source, model, out = made
    for origin, name, how, said in (
        (source, VAE, "shortened", "damaged or truncated"),
        (out, VAE, "flipped", "is damaged (its checksum is wrong)"),
        (out, "tokenizer/tokenizer_config.json", "lost", "not found"),
    ):
        pipeline = tmp_path / "pipeline"
        shutil.copytree(origin, pipeline)
        file = changed(pipeline, name, how)
        line = error_line(capsys, run, f"model={model}", f"pipeline={pipeline}", f"out={tmp_path / 'new'}")
        assert str(file) in line and said in line and not (tmp_path / "new").exists()
        shutil.rmtree(pipeline)


def test_a_copy_that_differs_is_never_complete(made, tmp_path, capsys, monkeypatch):
    source, model, _ = made
    honest = shutil.copyfile

    def failing(origin, target, **keys):
        honest(origin, target, **keys)
        if str(target).endswith(VAE):
            changed(Path(target).parents[1], VAE, "flipped")

    monkeypatch.setattr(shutil, "copyfile", failing)
    line = error_line(capsys, run, f"model={model}", f"pipeline={source}", f"out={tmp_path / 'out'}")
    assert f"{VAE}: is damaged" in line and list(tmp_path.iterdir()) == []


def test_linked_parts_are_recorded_too(made, tmp_path):
    source, model, _ = made
    pipeline = tmp_path / "pipeline"
    shutil.copytree(source, pipeline)
    (pipeline / "vae" / "again").symlink_to(pipeline / "vae")  # a loop is walked once
    run(f"model={model}", f"pipeline={pipeline}", f"out={tmp_path / 'out'}", "link=true")
    assert VAE in list(names_in(tmp_path / "out"))
    Encoders(tmp_path / "out")
    changed(pipeline, VAE, "flipped")
    with pytest.raises(ValueError, match="is damaged"):
        Encoders(tmp_path / "out")


def test_a_manifest_names_files_of_its_folder_only(tmp_path):
    record = {"size": 1, "sum": 0}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"../x": record}}))
    with pytest.raises(ValueError, match="names a file outside the folder, '../x'"):
        verify_files(tmp_path)
