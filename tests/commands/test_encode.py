"""The encode command end to end: cache contents, skipped clips, resuming after SIGKILL, ranks, workers, training."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import numbered, run_train, typed, write_video
from PIL import Image
from safetensors import safe_open

from fastlightgen import encode as command
from fastlightgen.config import load, main
from fastlightgen.data.cache import NEGATIVE, NULL, Cache
from fastlightgen.data.lists import read_list
from fastlightgen.data.source import CacheSource
from fastlightgen.data.video import read_clip, source_hash
from fastlightgen.generate import generate
from fastlightgen.pipelines.encoders import Encoders
from fastlightgen.world.source import open_source

BUCKETS = [(32, 48), (48, 32)]
SIZES = ["buckets=[32x48,48x32]", "frames=5", "fps=8", "dtype=float32", "save_dtype=float32"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A list of clips in two shapes and four formats, and four unusable clips."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", numbered(10), 8)
    write_video(folder / "b.mkv", numbered(10, 48, 32), 8)
    write_video(folder / "c.gif", numbered(10), 10)
    write_video(folder / "short.mp4", numbered(4), 8)
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:700])
    (folder / "d").mkdir()
    for k, picture in enumerate(np.random.default_rng(0).integers(0, 256, (6, 40, 60, 3), np.uint8)):
        Image.fromarray(picture).save(folder / "d" / f"{k}.png")
    rows = [
        ("a.mp4", "a red ball", "", "", 90), ("broken.mp4", "broken", "", "", 90), ("b.mkv", "a tall cat", "", "", 90),
        ("c.gif", "a blue square", 0.2, "", 90), ("short.mp4", "short", "", "", 90), ("d", "noise", "", "", 90),
        ("absent.mp4", "gone", "", "", 90), ("a.mp4", "a red ball later", 0.5, 1.2, 90), ("a.mp4", "bad", "", "", 10),
    ]  # fmt: skip
    lines = ["file,caption,start,end,dover", *(",".join(map(str, row)) for row in rows)]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


USED, SKIPPED = [0, 2, 3, 5, 7], {1: "cannot be decoded", 4: "too short", 6: "not found", 8: "dover=10 is below"}


@pytest.fixture(scope="module")
def shared_encoders(pipeline):
    return Encoders(pipeline("wan_i2v"))


@pytest.fixture(scope="module")
def run(videos, pipeline, shared_encoders):
    """Runs the command in this process, with encoders that are loaded once for all tests."""

    def run(out: Path, *words: str) -> None:
        given = [f"videos={videos / 'list.csv'}", f"pipeline={pipeline('wan_i2v')}", f"out={out}", "shard=2", *SIZES]
        given = dict(w.split("=", 1) for w in [*given, "workers=0", "progress=false", "threads=1", *words])
        main(command.encode, "encode", [f"{k}={v}" for k, v in given.items()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "load_encoders", lambda cfg, rank: shared_encoders)
        yield run


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a cache except the locks."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[:5] != ".lock"
    }


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "cache"
    run(folder)
    return folder


@pytest.fixture
def finished(made, tmp_path):
    """A copy of a finished cache that a test may change."""
    return shutil.copytree(made, tmp_path / "finished")


def clip_of(cache: Cache, caption: str) -> int:
    return next(i for i in range(len(cache)) if cache.sample(i)["caption"] == caption)


def test_a_cache_holds_what_the_encoders_make(finished, videos, shared_encoders, capsys):
    cache, rows = Cache(finished), read_list(videos / "list.csv", 80)
    assert len(cache) == len(USED)
    for row in (rows[i] for i in USED):
        i = clip_of(cache, row.caption)
        wanted = shared_encoders.clip(read_clip(row, 8, 5, BUCKETS), row.caption)
        got = cache.read([i])
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key][0], wanted[key]) for key in wanted)
        origin = cache.sample(i)
        assert origin["source"] == source_hash(row.file) and origin["file"] == row.name
        assert (origin["start"], origin["end"]) == (row.start, row.end)
        assert origin["resolution"] == ([48, 32] if row.name == "b.mkv" else [32, 48])
    null = shared_encoders.null("", BUCKETS[0])
    assert all(torch.equal(cache.null[key], null[key]) for key in null)
    skipped = json.loads((finished / "skipped.json").read_text())
    assert [s["row"] for s in skipped] == list(SKIPPED)
    assert all(said in s["reason"] for s, said in zip(skipped, SKIPPED.values(), strict=True))
    description = cache.description
    assert (
        description["fps"] == 8
        and description["frames"] == 5
        and description["vae"] == shared_encoders.description()["vae"]
    )
    with safe_open(finished / "shard-00001-48x32.safetensors", "pt") as shard:  # a shard describes itself
        assert json.loads(shard.metadata()["fastlightgen"])["description"] == description
    assert [len(group) for group in cache.groups()] == [4, 1]


@torch.no_grad()
def test_a_cache_holds_the_official_negative_prompt(run, finished, shared_encoders, tmp_path, capsys):
    """Its embedding is the stock pipeline's; a complete cache without it gets it, and nothing else changes."""
    fields, text = Cache(finished).prompt(NEGATIVE)
    # sample_neg_prompt of wan/configs/shared_config.py, Wan2.1: 137 characters
    assert len(text) == 137 and hashlib.sha256(text.encode()).hexdigest().startswith("ce96e0324e4b54ce")
    _, stock = shared_encoders.pipe.encode_prompt("x", negative_prompt=text, max_sequence_length=512)
    assert torch.equal(fields["text"], stock[0]) and Cache(finished).prompt(NULL)[1] == ""

    wanted = files(finished)
    batch, null = (open_source(str(finished), 0, which).batch(0, 1) for which in ("official", "empty"))
    assert torch.equal(batch.null.text, stock) and torch.equal(batch.cond.text, null.cond.text)
    assert torch.equal(null.null.text[0], Cache(finished).null["text"]) and not torch.equal(null.null.text, stock)
    (finished / NEGATIVE).unlink()
    with pytest.raises(ValueError, match="holds no negative.safetensors; run the same encode command again"):
        open_source(str(finished), 0, "official")
    run(finished)
    assert files(finished) == wanted


def test_said_before_and_after(run, tmp_path, capsys):
    run(tmp_path / "out")
    out = capsys.readouterr().out
    # 7 clips of 4 bytes x (36 x 2 x 4 x 6 latents and condition + 5 x 8 image tokens + 512 x 32 text) = 72608 bytes
    assert "7 of 9 listed clips, 5 frames at 8 per second; at most 508 kB, " in out
    assert f"{tmp_path / 'out'}: 5 clips, 4 skipped: {tmp_path / 'out' / 'skipped.json'}" in out
    name, words = typed(out.splitlines()[-1].removeprefix("next: "))
    cfg = load(words, name)
    assert (cfg.stage, cfg.data, Path(cfg.model, "model_index.json").is_file()) == ("1", str(tmp_path / "out"), True)


def test_the_same_command_again_changes_nothing(run, finished):
    def written() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in (*finished.rglob("*.safetensors"), finished / "index.json")}

    before = written()
    run(finished)
    assert before == written()


@pytest.mark.parametrize(
    "word, said",
    [
        ("fps=4", "description.fps: 8.0 -> 4.0"),
        ("frames=9", "description.frames: 5 -> 9"),
        ("shard=3", "shard: 2 -> 3"),
        ("buckets=[32x48]", "buckets: "),
        ("null_prompt=bad quality", "description.null_prompt: "),
    ],
)
def test_another_configuration_is_refused(run, finished, capsys, word, said):
    before = files(finished)
    with pytest.raises(SystemExit):
        run(finished, word)
    error = capsys.readouterr().err
    assert f"out={finished} was started with another configuration" in error and said in error
    assert error.count("\n") == 1 and files(finished) == before


def test_killed_at_any_moment_and_continued(made, videos, pipeline, tmp_path):
    """A run that was killed at any file ends, when continued, with the same bytes as an uninterrupted run.

    SIGKILL strikes at one of the 15 files (settings, two prompts, 5 shards, 5 records, skipped.json, index.json),
    before or after the file gets its name.
    """
    words = [f"videos={videos / 'list.csv'}", f"pipeline={pipeline('wan_i2v')}", "shard=2", *SIZES]
    words += ["workers=0", "progress=false", "threads=1", "device=cpu"]
    paths = [str(Path(command.__file__).parents[1]), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    script = Path(__file__).with_name("kill_encode.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, "3,6,13,14", *words], env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    # Before and after naming a prompt and a shard, a file of tensors each, whose claim stays; the same of two records.
    left = {"3": 2, "6": 1, "13": 1, "14": 0}
    assert outcome == {n: [True, False, count] for n, count in left.items()}
    wanted = files(tmp_path / "undisturbed")
    assert wanted.keys() == files(made).keys()
    for n in (3, 6, 13, 14):
        assert files(tmp_path / str(n)) == wanted


def test_ranks_share_the_work(run, finished, tmp_path, capsys, monkeypatch):
    capsys.readouterr()
    run(tmp_path / "two", "rank=1", "ranks=2")
    assert "rank 1 of 2 is done; the last rank to finish writes the index" in capsys.readouterr().out
    assert not (tmp_path / "two" / "index.json").exists()
    run(tmp_path / "two", "rank=0", "ranks=2")
    assert files(tmp_path / "two") == files(finished)
    for rank in ("2", "0", "1"):  # torchrun sets RANK; a finished rank may start again
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "3")
        run(tmp_path / "three")
    assert files(tmp_path / "three") == files(finished)


def test_a_damaged_part_is_made_again(run, finished, tmp_path):
    wanted = files(finished)
    shard = finished / "shard-00002-32x48.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    (finished / "index.json").unlink()
    run(finished)
    assert files(finished) == wanted


def test_two_processes_do_not_make_the_same_part(run, finished, tmp_path, capsys):
    import fcntl

    with open(finished / ".lock-0", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            run(finished)
    assert "another process writes it as rank=0; wait for it" in capsys.readouterr().err


def test_nothing_usable_fails(run, videos, tmp_path, capsys):
    (tmp_path / "list.csv").write_text(f"file,caption\n{videos / 'broken.mp4'},x\nabsent.mp4,y\n")
    with pytest.raises(SystemExit):
        run(tmp_path / "out", f"videos={tmp_path / 'list.csv'}")
    error = capsys.readouterr().err
    assert "not one of 2 clips could be encoded; first " in error and "broken.mp4: cannot be decoded" in error
    assert not (tmp_path / "out" / "index.json").exists()
    assert len(json.loads((tmp_path / "out" / "skipped.json").read_text())) == 2
    assert not list((tmp_path / "out").rglob("*.safetensors")) and not (tmp_path / "out" / "encode.json").exists()


def read_or_die(row):
    if row == "deadly":
        os._exit(3)
    return command.Skip(f"read {row}")


def test_decoding_processes_keep_the_order_and_survive_a_crash():
    rows = ["a", "b", "deadly", "c", "d", "e"]
    wanted = [command.Skip("crashes the decoder" if row == "deadly" else f"read {row}") for row in rows]
    assert list(command.decoded(rows, 1, read_or_die)) == wanted


def test_workers_make_the_same_cache(run, finished, tmp_path):
    run(tmp_path / "out", "workers=2")
    assert files(tmp_path / "out") == files(finished)


@pytest.mark.parametrize(
    "word, said",
    [
        ("buckets=big", "buckets=big: wanted HEIGHTxWIDTH"),
        ("rank=1", "rank=1, ranks=0: give both, or neither"),
        ("dtype=float16", "dtype=float16: wanted one of bfloat16, float32"),
    ],
)
def test_bad_keys(word, said):
    with pytest.raises(ValueError, match=".*") as error:
        load(["videos=v", "pipeline=p", "out=o", word], "encode")
    assert said in str(error.value)
    with pytest.raises(ValueError, match="rank=2: with ranks=2 the ranks are 0 to 1"):
        load(["videos=v", "pipeline=p", "out=o", "rank=2", "ranks=2"], "encode")


@pytest.mark.parametrize(
    "word, said",
    [
        ("frames=6", "frames=6: wanted 4 k + 1, for example 5"),
        ("buckets=[30x48]", "buckets=[30x48]: wanted HEIGHTxWIDTH, multiples of 16, for example [480x832,832x480]"),
    ],
)
def test_sizes_that_do_not_fit_the_pipeline(run, tmp_path, capsys, word, said):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "out", word)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_numbers_too_large_for_their_type_stop():
    with pytest.raises(ValueError, match="save_dtype=float16: latents has numbers too large for it"):
        command.stored({"latents": torch.tensor([1e6])}, "float16", ("text",))
    kept = command.stored({"latents": torch.tensor([0.1]), "text": torch.tensor([0.1])}, "bfloat16", ("text",))
    assert kept["latents"].dtype == torch.bfloat16 and kept["text"].dtype == torch.float32


def test_the_stages_train_from_it(finished, pipeline, tmp_path, capsys):
    """Stages 1 to 3 from the cache with the pipeline's own network; then a cache of another VAE is refused."""
    common = [f"model={pipeline('wan_i2v') / 'transformer'}", f"data={finished}", f"run={tmp_path / 'run'}", "batch=1"]
    common += ["progress=false", "threads=1"]
    run_train(*common, "stage=1", "clips=1", "timesteps=1")
    out = capsys.readouterr().out
    held = CacheSource(Cache(finished), 0).rest  # fewer than the 4 that a large cache gives
    assert len(held) < 4 and f"the teacher's x0 error on {len(held)} held-out clip" in out
    assert "warning: " in out and "the teacher does not know these latents" in out  # the teacher's weights are random
    with pytest.raises(SystemExit):
        run_train(*common, "stage=2", "iters=3", "data_check=stop")
    assert "or go on with data_check=warn" in capsys.readouterr().err
    small = ["save_every=3", "log_every=1", "iters=3", "data_check=off"]
    run_train(*common, *small, "stage=2")
    run_train(*common, *small, "stage=3", "ratio=2", "critic_start=0")
    assert "the teacher" not in capsys.readouterr().out
    official = [*common, *small, f"run={tmp_path / 'official'}", "negative=official"]
    run_train(*official, "stage=2", f"importance={tmp_path}/run/stage1/importance.json")
    assert "null prompt: '色调艳丽，过曝，静态" in capsys.readouterr().out
    run_train(*official, "stage=3", "ratio=2", "critic_start=0")
    assert "warning" not in capsys.readouterr().out
    third = ["stage=3", "critic_start=0"]
    run_train(*common, *small, *third, f"run={tmp_path / 'mixed'}", f"stage2_model={tmp_path}/official/stage2/model")
    out = capsys.readouterr().out
    assert "null prompt: ''" in out and "warning: negative=empty: Stage II learned with negative=official" in out
    for stage in (2, 3):
        card = json.loads((tmp_path / "official" / f"stage{stage}" / "model" / "fastlightgen.json").read_text())
        assert card["negative"] == "official"
        card = json.loads((tmp_path / "run" / f"stage{stage}" / "model" / "fastlightgen.json").read_text())
        assert card["vae"] == Cache(finished).description["vae"]
        assert card["clips"] == {"size": "32x48x5", "fps": 8}
    student = [f"model={tmp_path}/run/stage3/model", f"pipeline={pipeline('wan_i2v')}", "prompt=a cat", "threads=1"]
    Image.new("RGB", (64, 64)).save(picture := tmp_path / "first.png")
    main(generate, "generate", [*student, f"image={picture}", f"out={tmp_path / 'a.gif'}"])  # in the size of its card
    with Image.open(tmp_path / "a.gif") as made:
        assert (made.size, made.n_frames) == ((48, 32), 5)
    capsys.readouterr()

    index = json.loads((finished / "index.json").read_text())
    for key, value, said in [
        ("vae", "0123456789abcdef", "made with vae 0123456789abcdef, the model has "),
        ("family", "hunyuan", "made with family hunyuan, the model has wan"),
        ("in_channels", 16, "made with in_channels (latents and condition) 16, the model has 36"),
        ("text_dim", 64, "made with text_dim 64, the model has 32"),
    ]:
        changed = index | {"description": index["description"] | {key: value}}
        (finished / "index.json").write_text(json.dumps(changed))
        with pytest.raises(SystemExit):
            run_train(*common, *small, *third, f"run={tmp_path / key}", f"stage2_model={tmp_path}/run/stage2/model")
        error = capsys.readouterr().err
        assert said in error and "encode the videos again" in error and error.count("\n") == 1


def test_batches_from_it_have_one_size(finished):
    source = open_source(str(finished), 0)
    shapes = {tuple(source.batch(step, 2).x0.shape) for step in range(12)}
    assert shapes == {(2, 16, 2, 4, 6), (2, 16, 2, 6, 4)}
    batch = source.batch(0, 2)
    assert batch.cond.text.shape == (2, 512, 32) and batch.null.text.shape == (2, 512, 32)
