"""What a stranger's folder may name, and what links may lead to: no code, no other file."""

import json
import os
import sys

import pytest
import torch

from fastlightgen import atomic
from fastlightgen.data.writer import Writer
from fastlightgen.files import tensors
from fastlightgen.models.folder.index import read_index
from fastlightgen.pipelines.copies import copy_parts


@pytest.mark.parametrize(
    "part",
    [
        ["evilmod", "X"],
        ["diffusers.utils", "X"],
        ["os", "system"],
        ["diffusers", "os.system"],
        ["transformers", "__import__"],
        ["diffusers", "_Private"],
        ["diffusers", "A B"],
        [None, "X"],
        ["../evilmod", "X"],
    ],
    ids=str,
)
def test_a_pipeline_names_classes_of_two_libraries_only(tmp_path, monkeypatch, part):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "tokenizer"):
        folder.mkdir(exist_ok=True)
        (folder / "evilmod.py").write_text("raise SystemExit('this ran')")
    index = {"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert read_index(tmp_path) == index
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"tokenizer": part}))
    with pytest.raises(ValueError, match="model_index.json: tokenizer.*wanted a class of diffusers or transformers"):
        read_index(tmp_path)
    assert "evilmod" not in sys.modules


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "attn_implementation_internal"])
def test_a_part_names_no_kernel_to_download(tmp_path, key):
    (tmp_path / "text_encoder").mkdir()
    index = {"_class_name": "WanPipeline", "text_encoder": ["transformers", "UMT5EncoderModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for value, refused in (("sdpa", False), ("evil/kernel", True)):
        (tmp_path / "text_encoder" / "config.json").write_text(json.dumps({key: value}))
        if refused:
            with pytest.raises(ValueError, match=f"{key} is 'evil/kernel', the name of code to download"):
                read_index(tmp_path)
        else:
            read_index(tmp_path)


def test_links_in_the_place_of_own_files_are_not_followed(tmp_path):
    private = tmp_path / "private"
    private.write_text("mine")
    (tmp_path / ".lock").symlink_to(private)
    with pytest.raises(ValueError, match=r"\.lock: is a link, so it is not used as a lock; delete it"):
        with atomic.locked(tmp_path / ".lock"):
            pass
    (tmp_path / ".a.json.tmp").symlink_to(private)
    atomic.write_json(tmp_path / "a.json", [1])
    for name in ("b.tmp", "b.new.tmp"):
        (tmp_path / name).symlink_to(private)
    tensors.save_tensors(tmp_path / "b.safetensors", {"w": torch.zeros(2)})
    assert private.read_text() == "mine" and json.loads((tmp_path / "a.json").read_text()) == [1]
    assert not (tmp_path / "b.safetensors").is_symlink() and not list(tmp_path.glob("*.tmp"))


def test_an_export_copies_no_file_that_a_link_brings_from_outside(tmp_path):
    (tmp_path / "private").write_text("mine")
    (tmp_path / "from" / "tokenizer").mkdir(parents=True)
    (tmp_path / "from" / "tokenizer" / "notes.txt").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match="notes.txt: is a link out of the pipeline, so it is not copied"):
        copy_parts(tmp_path / "from", tmp_path / "to", ["tokenizer"], False, False)
    assert not (tmp_path / "to" / "tokenizer" / "notes.txt").exists()


def test_a_cache_deletes_no_file_of_others(tmp_path):
    (tmp_path / "thesis").mkdir()
    for name in ("thesis/chapter.tmp", "notes.tmp"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(thesis\)"):
        with Writer(tmp_path, {"description": {}, "min_dover": 0.0}, [], 2).opened():
            pass
    assert (tmp_path / "thesis/chapter.tmp").read_text() == (tmp_path / "notes.tmp").read_text() == "mine"


def test_everything_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    """In this order: the content, the name, the folder that holds the name."""
    events, fsync, replace = [], os.fsync, os.replace

    def seen(handle):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(f"name {new.name}"), replace(old, new)))
    atomic.write_text(tmp_path / "a.txt", "x")
    assert events == [".a.txt.tmp", "name a.txt", tmp_path.name]
    events.clear()
    (tmp_path / "t" / "part").mkdir(parents=True)
    (tmp_path / "t" / "part" / "f").write_text("x")
    atomic.put(tmp_path / "t", tmp_path / "model")
    assert events == ["part", "f", "t", "name model", tmp_path.name]


def test_a_temporary_file_of_a_killed_process_is_taken_over(tmp_path):
    (tmp_path / ".a.txt.tmp").write_text("half of a long text that was never finished")
    atomic.write_text(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").read_text() == "x" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_write_that_fails_leaves_nothing_and_names_the_file(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(OSError, match=r"File too large: '.*/\.a\.txt\.tmp'"):
        with atomic.claimed(tmp_path / ".a.txt.tmp"):
            raise OSError(27, "File too large")
    assert (tmp_path / "a.txt").read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
