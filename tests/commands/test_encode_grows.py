"""A cache grows: clips that are added to the list are encoded, the others stay as they are; failures leave no trace."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import numbered, write_video

from fastlightgen import encode as command
from fastlightgen.config import main
from fastlightgen.data import writer
from fastlightgen.data.cache import Cache
from fastlightgen.data.lists import Row
from fastlightgen.data.video import read_clip
from fastlightgen.pipelines.encoders import Encoders

WORDS = ["buckets=[32x48,48x32]", "frames=5", "fps=8", "dtype=float32", "save_dtype=float32", "shard=2"]
FIRST = ["a.mp4,a red ball", "b.mp4,a tall cat", "c.mp4,a blue square"]


@pytest.fixture(scope="module")
def encoders(pipeline):
    return Encoders(pipeline("wan_t2v"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    noise = np.random.default_rng(0).integers(0, 256, (4, 10, 32, 48, 3), np.uint8)
    for name, film in zip("acde", noise, strict=True):
        write_video(folder / f"{name}.mp4", film, 8)
    write_video(folder / "b.mp4", numbered(10, 48, 32), 8)
    write_video(folder / "short.mp4", numbered(3), 8)
    return folder


@pytest.fixture
def run(videos, pipeline, encoders, monkeypatch, capsys):
    """Encode lines of a list into a folder; return what was printed."""
    monkeypatch.setattr(command, "load_encoders", lambda cfg, rank: encoders)

    def run(out: Path, lines: list[str], *words: str) -> str:
        table = out.with_name(f"{out.name}.csv")
        table.write_text("\n".join(["file,caption,start,end,dover", *(f"{videos}/{line}" for line in lines)]) + "\n")
        given = [f"videos={table}", f"pipeline={pipeline('wan_t2v')}", f"out={out}", *WORDS, "workers=0", "threads=1"]
        given = dict(w.split("=", 1) for w in [*given, "progress=false", *words])
        capsys.readouterr()
        main(command.encode, "encode", [f"{k}={v}" for k, v in given.items()])
        return capsys.readouterr().out

    return run


def content(folder: Path) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """(caption, file) of every clip of a cache -> its tensors."""
    cache = Cache(folder)
    names = [(cache.sample(i)["caption"], Path(cache.sample(i)["file"]).name) for i in range(len(cache))]
    return {name: {k: v[0] for k, v in cache.read([i]).items()} for i, name in enumerate(names)}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k][f], two[k][f]) for k in one for f in one[k])


def shards(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob("shard-*")}


@contextmanager
def killed_after_one_part(monkeypatch):
    """Context in which a run ends after its first part."""
    write_part = writer.Writer.write_part

    def one_part(self, *args):
        write_part(self, *args)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(writer.Writer, "write_part", one_part)
        yield


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a cache except the locks."""
    paths = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".lock"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def test_added_clips_are_encoded_and_the_others_stay(run, tmp_path, videos, encoders, monkeypatch):
    out = tmp_path / "cache"
    run(out, FIRST)
    before, digest = shards(out), Cache(out).digest
    encoded, real = [], Encoders.clip

    def clip(self, frames, caption):
        encoded.append(caption)
        return real(self, frames, caption)

    monkeypatch.setattr(Encoders, "clip", clip)
    longer = ["d.mp4,a green cross", *FIRST, "e.mp4,a yellow ball", "a.mp4,a red ball,0.5,1.2"]
    said = run(out, longer)
    assert f"out={out}: holds 3 of 6 listed clips already\n" in said and "3 new of 6 listed clips, 5 frames" in said
    assert f"{out}: 6 clips\n" in said
    assert encoded == ["a green cross", "a yellow ball", "a red ball"]
    assert before.items() <= shards(out).items() and Cache(out).digest != digest
    run(tmp_path / "whole", longer)
    assert same(content(out), content(tmp_path / "whole"))
    row = Row("e.mp4", videos / "e.mp4", "a yellow ball")
    wanted = encoders.clip(read_clip(row, 8, 5, [(32, 48), (48, 32)]), row.caption)["latents"]
    assert torch.equal(content(out)["a yellow ball", "e.mp4"]["latents"], wanted)

    encoded.clear()
    state = files(out)
    run(out, longer)  # the same list again changes nothing
    assert encoded == [] and state == files(out)


def test_a_clip_is_known_by_the_hash_of_its_file(run, tmp_path, videos):
    """A renamed file is known; one with new content or another caption is a new clip. What the list drops stays."""
    out = tmp_path / "cache"
    run(out, FIRST)
    shutil.copy(videos / "a.mp4", videos / "renamed.mp4")
    said = run(out, ["renamed.mp4,a red ball", "b.mp4,a tall dog"])
    assert f"out={out}: holds 1 of 2 listed clips already; 2 of its clips are not in this list and stay in it" in said
    assert "1 new of 2 listed clips" in said and f"{out}: 4 clips\n" in said
    shutil.copy(videos / "d.mp4", videos / "renamed.mp4")  # new content under a known name
    said = run(out, ["renamed.mp4,a red ball", "b.mp4,a tall dog", "c.mp4,a blue square"])
    assert "holds 2 of 3 listed clips already" in said and f"{out}: 5 clips\n" in said


def test_a_lower_bound_of_the_quality_adds_clips(run, tmp_path):
    out, lines = tmp_path / "cache", [*FIRST, "d.mp4,one,,,70", "e.mp4,two,,,50"]
    assert f"{out}: 3 clips, 2 skipped" in run(out, lines)
    said = run(out, lines, "min_dover=60")
    assert "1 new of 5 listed clips" in said and f"{out}: 4 clips, 1 skipped" in said
    assert [s["row"] for s in json.loads((out / "skipped.json").read_text())] == [4]


def test_two_rows_of_one_clip_count_twice(run, tmp_path):
    out = tmp_path / "cache"
    run(out, [FIRST[0], FIRST[0]])
    said = run(out, [FIRST[0]] * 3)
    assert "holds 2 of 3 listed clips already" in said and f"{out}: 3 clips\n" in said


def test_growing_is_interrupted_and_shared_by_ranks(run, tmp_path, monkeypatch):
    """Killed after the first new part: the old index stays valid, and any number of ranks finishes the work."""
    out, longer = tmp_path / "cache", [*FIRST, "d.mp4,one", "e.mp4,two", "a.mp4,three", "b.mp4,four", "c.mp4,five"]
    run(out, FIRST)
    old = (out / "index.json").read_bytes()
    with killed_after_one_part(monkeypatch):
        run(out, longer)
    assert (out / "index.json").read_bytes() == old and len(Cache(out)) == 3
    assert "rank 1 of 2 is done" in run(out, longer, "rank=1", "ranks=2")
    run(out, longer, "rank=0", "ranks=2")
    run(tmp_path / "undisturbed", FIRST)
    run(tmp_path / "undisturbed", longer)
    assert files(out) == files(tmp_path / "undisturbed")


def test_a_list_that_grows_again_before_the_first_growth_is_done(run, tmp_path, monkeypatch):
    out, longer = tmp_path / "cache", [*FIRST, "d.mp4,one", "e.mp4,two", "a.mp4,three"]
    run(out, FIRST)
    with killed_after_one_part(monkeypatch):
        run(out, longer)
    said = run(out, [*longer, "b.mp4,four"])
    assert "holds 5 of 7 listed clips already" in said and f"{out}: 7 clips\n" in said
    run(tmp_path / "whole", [*longer, "b.mp4,four"])
    assert same(content(out), content(tmp_path / "whole"))


def test_a_lost_shard_is_made_again(run, tmp_path):
    out, longer = tmp_path / "cache", [*FIRST, "d.mp4,one"]
    run(out, FIRST)
    run(out, longer)
    wanted = content(out)
    (out / "shard-00000-32x48.safetensors").unlink()
    said = run(out, longer)
    assert "holds 2 of 4 listed clips already" in said and same(content(out), wanted)


def test_a_changed_configuration_is_refused_with_its_key(run, tmp_path, capsys):
    out = tmp_path / "cache"
    run(out, FIRST)
    before = shards(out)
    with pytest.raises(SystemExit):
        run(out, [*FIRST, "d.mp4,one"], "fps=4")
    error = capsys.readouterr().err
    assert "was started with another configuration (description.fps: 8.0 -> 4.0); choose another out=" in error
    assert shards(out) == before and len(Cache(out)) == 3


def test_too_short_clips_name_a_length_and_the_corrected_command_works(run, tmp_path, capsys):
    """81 frames are too many for all three: the error names the length that all of them have, which is then taken."""
    out = tmp_path / "cache"
    lines = ["a.mp4,one", "b.mp4,two", "c.mp4,three"]
    with pytest.raises(SystemExit) as stop:
        run(out, lines, "frames=81")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "not one of 3 clips could be encoded; first " in error
    # 10 pictures at 8 per second: 10 frames, of which 4 k + 1 are 9
    assert "too short: 1.25 s from 0 s on, wanted 10.12 s (81 frames); frames=9 takes it" in error
    assert error.strip().endswith("; 3 of them too short: frames=9 takes them")
    assert sorted(p.name for p in out.iterdir() if p.name[0] != ".") == ["parts", "skipped.json"]
    assert f"{out}: 3 clips\n" in run(out, lines, "frames=9", "null_prompt=bad")
    assert Cache(out).description["null_prompt"] == "bad" and Cache(out).prompt("null.safetensors")[1] == "bad"


def test_one_short_clip_is_named_beside_the_others(run, tmp_path):
    said = run(tmp_path / "cache", [*FIRST, "short.mp4,three frames only"])
    assert f"3 clips, 1 skipped: {tmp_path}/cache/skipped.json\n" in said  # 3 frames: no video is as short as one frame
    said = run(tmp_path / "nine", [*FIRST, "a.mp4,one,0,0.7"], "frames=9")
    assert "1 skipped: " in said and "; 1 of them too short: frames=5 takes them\n" in said
    record = json.loads((tmp_path / "nine/skipped.json").read_text())[0]
    assert record["frames"] == 5 and record["row"] == 3


def test_an_interrupted_failure_keeps_no_configuration(run, tmp_path, monkeypatch):
    """Stopped while all clips so far were unusable: another configuration takes the folder."""
    out = tmp_path / "cache"
    with killed_after_one_part(monkeypatch):
        run(out, FIRST, "frames=81")
    assert (out / "encode.json").is_file() and (out / "parts/00000.json").is_file()
    assert f"{out}: 3 clips\n" in run(out, FIRST)


def test_a_mended_video_is_read_after_a_failure(run, tmp_path, videos, capsys):
    (videos / "mended.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit):
        run(tmp_path / "cache", ["mended.mp4,a ball"])
    shutil.copy(videos / "a.mp4", videos / "mended.mp4")
    assert "1 clips\n" in run(tmp_path / "cache", ["mended.mp4,a ball"])


def test_the_bar_counts_encoded_clips(run, tmp_path, videos, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "none", FIRST, "frames=81", "progress=true")
    shown = capsys.readouterr().err
    assert "encoding: 0clip [" in shown and "3 skipped" in shown and "3clip" not in shown and "3/3" not in shown


def test_another_process_that_changes_the_plan_is_noticed(run, tmp_path, monkeypatch):
    """A process that encodes one list finds that another list was begun meanwhile: it stops and writes no index."""
    out, real = tmp_path / "cache", Encoders.clip

    def clip(self, frames, caption):
        record = json.loads((out / "encode.json").read_text())
        (out / "encode.json").write_text(json.dumps(record | {"list": "other"}))
        return real(self, frames, caption)

    monkeypatch.setattr(Encoders, "clip", clip)
    with pytest.raises(SystemExit):
        run(out, FIRST)
    assert not (out / "index.json").exists() and not list(out.glob("shard-*"))


@pytest.fixture
def folder(videos, tmp_path) -> Path:
    """A folder with three videos."""
    made = tmp_path / "clips"
    made.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        os.symlink(videos / name, made / name)
    return made


def test_a_folder_with_a_list_in_it(run, folder, tmp_path):
    (folder / "captions.csv").write_text("file,caption,start\na.mp4,a red ball,0.25\nb.mp4,a tall cat,\n")
    (folder / "sizes.csv").write_text("name,bytes\na.mp4,100\n")  # another table
    said = run(tmp_path / "cache", [], f"videos={folder}")
    assert f"videos={folder}: takes the list in it, captions.csv\n" in said and "2 of 2 listed clips" in said
    assert content(tmp_path / "cache").keys() == {("a red ball", "a.mp4"), ("a tall cat", "b.mp4")}
    assert {s["start"] for s in map(Cache(tmp_path / "cache").sample, range(2))} == {0.0, 0.25}


def test_a_folder_with_several_lists_or_a_wrong_one(run, folder, tmp_path, capsys):
    (folder / "wrong.csv").write_text("name,text\na.mp4,a red ball\n")
    with pytest.raises(SystemExit):
        run(tmp_path / "cache", [], f"videos={folder}")
    error = capsys.readouterr().err
    assert f"videos={folder}/wrong.csv: has no column 'file'; wanted file, caption [, start, end, dover]" in error
    (folder / "a.txt").write_text("a red ball")  # captions beside the videos: the table is something else
    assert "1 of 3 listed clips" in run(tmp_path / "cache", [], f"videos={folder}")
    for name in ("one.csv", "two.jsonl"):
        line = "file,caption\na.mp4,x\n" if name == "one.csv" else '{"file": "a.mp4", "caption": "x"}\n'
        (folder / name).write_text(line)
    with pytest.raises(SystemExit):
        run(tmp_path / "other", [], f"videos={folder}")
    error = capsys.readouterr().err
    assert "holds several lists (one.csv, two.jsonl); give one of them as videos=" in error
