"""The front door: `train stage=3` alone, the list of commands, where settings come from, words that are refused."""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import counted, run_train, small_wan, typed, write_inputs

import fastlightgen
from fastlightgen import train
from fastlightgen.__main__ import ABOUT
from fastlightgen.__main__ import main as front
from fastlightgen.config import ConfigError, load, preset, report, settings
from fastlightgen.config.layers import default_run
from fastlightgen.files.tensors import save_tensors
from fastlightgen.models.folder.weights import load_model, save_model
from fastlightgen.stages import earlier
from fastlightgen.world.source import ShapesSource

ENV = os.environ | {"PYTHONPATH": str(Path(fastlightgen.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def process(*words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], env=ENV | variables, capture_output=True, text=True)


def test_stage_3_alone_runs_the_missing_stages_first(tmp_path, monkeypatch, capsys):
    """The words `stage=3` with a smaller batch, so that the measured steps take less time."""
    monkeypatch.chdir(tmp_path)
    known = torch.full((13, 4), torch.nan)  # 12 blocks and the full network
    known[:, 0] = 1.0
    (tmp_path / "runs/tiny/stage1").mkdir(parents=True)
    save_tensors(tmp_path / "runs/tiny/stage1/scores.safetensors", {"sweep-0000": known})
    (tmp_path / "runs/tiny/stage2/checkpoints/step-000030").mkdir(parents=True)
    stages = []
    monkeypatch.setattr(train, "run_stage", lambda cfg, later, ratio: stages.append((cfg, later, ratio)))
    run_train("stage=3", "batch=2", "threads=1")
    (one, later, ratio), (two, *_), (three, *_) = stages
    assert (
        [one.stage, two.stage, three.stage] == ["1", "2", "3"] and later == [two, three] and ratio == one.ratio == 0.3
    )
    assert {(c.run, c.model, c.data, c.threads) for c in (one, two, three)} == {("runs/tiny", "tiny", "shapes", 1)}
    own = preset("tiny")["stage2"]
    assert (two.batch, two.iters) == (own["batch"], own["iters"]) and two.batch != three.batch
    out = capsys.readouterr().out
    assert "run    runs/tiny  (named after the model)" in out
    assert "stage 3 needs stage 1 and stage 2, which runs/tiny lacks: they run first" in out
    assert "GFLOP/s that a training step reached" in out
    assert " for the 75% of stage 1 that is left, " in out  # 13 of 52 scores are saved
    assert f" for the {1 - 30 / own['iters']:.0%} of stage 2 that is left, " in out and " for stage 3; " in out


def test_an_earlier_stage_is_the_one_that_its_own_command_runs(tmp_path, capsys):
    words = [write_inputs(tmp_path)[2][0], "threads=1", "progress=false", f"run={tmp_path}/r"]
    small = ["stage=2", "iters=1", "batch=2", "sample_every=0"]
    run_train(*words, *small, "earlier=run")
    assert "stage 2 needs stage 1, which" in capsys.readouterr().out
    assert (tmp_path / "r/stage2/model/config.json").is_file()
    before = (tmp_path / "r/stage1/importance.json").read_bytes()
    run_train(*words, "stage=1")  # would be refused, had the stage run with other settings
    run_train(*words, *small, "earlier=refuse")  # nothing is missing now
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert (tmp_path / "r/stage1/importance.json").read_bytes() == before


def test_other_models_get_the_commands_to_type(tmp_path, monkeypatch):
    save_model(small_wan(), tmp_path / "my teacher")
    monkeypatch.chdir(tmp_path)
    cfg = load(["stage=3", "model=my teacher", "seed=2", "lr=1", "overwrite=true"])
    with pytest.raises(ValueError, match="^runs/my teacher/stage2/model: does not exist, and stage=3 needs it") as err:
        earlier.missing(cfg)
    lines = str(err.value).partition("first run: ")[2].removesuffix(" (earlier=run does it for you)").split(" && ")
    wanted = [{"stage": n, "run": "runs/my teacher", "model": "my teacher", "seed": 2} for n in ("1", "2")]
    found = [load(typed(line)[1]) for line in lines]
    assert [{key: vars(one)[key] for key in wanted[0]} for one in found] == wanted
    assert not any(one.overwrite for one in found)
    with pytest.raises(ValueError, match="needs it"):
        earlier.missing(load(["stage=3", f"model={tmp_path}/my teacher"]))  # an absolute path
    assert earlier.missing(load(["stage=3", "model=my teacher", "stage2_model=my teacher"])) == []
    assert [one.stage for one in earlier.missing(load(["stage=3", "model=my teacher", "earlier=run"]))] == ["1", "2"]
    with pytest.raises(ValueError, match="stage=2 needs it"):
        earlier.missing(load(["stage=2", "earlier=refuse"]))


def test_the_speed_is_counted_operations_over_measured_seconds(tmp_path, monkeypatch):
    net = save_model(small_wan(), tmp_path / "m") and load_model(tmp_path / "m")
    batch = ShapesSource(0).batch(0, 2)
    operations = counted(lambda: net(batch.x0, torch.full((2,), 0.5), batch.cond).square().mean().backward())
    clock = itertools.accumulate(itertools.cycle([0.0, 4.0]))  # each step takes 4 s
    monkeypatch.setattr(earlier.time, "perf_counter", lambda: next(clock))
    cfg = load(["stage=3", f"model={tmp_path / 'm'}", "batch=2"])
    assert earlier.measured_speed(cfg, ShapesSource(0), torch.device("cpu")) == pytest.approx(operations / 4, rel=0.01)


def test_a_time_in_words():
    seconds = (0.1, 9.9, 43.0, 89.0, 91.0, 600.0, 5399.0, 9000.0)
    wanted = ("less than 10 s", "less than 10 s", "about 45 s", "about 90 s", "about 2 min", "about 10 min")
    assert tuple(map(earlier.span, seconds)) == (*wanted, "about 90 min", "about 2.5 h")


@pytest.mark.parametrize(
    "model, run",
    [
        ("tiny", "runs/tiny"),
        ("/data/Wan2.1-I2V", "runs/Wan2.1-I2V"),
        ("wan/transformer/", "runs/wan"),
        ("runs/mine/stage0/model", "runs/mine"),
    ],
)
def test_the_run_folder_is_named_after_the_model(model, run):
    assert default_run(model) == run


def test_settings_say_where_they_come_from(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("shift: 4\nseed: 1")
    lines = settings(load(["stage=2", "data=shapes", f"config={file}"]))
    assert [line.split() for line in lines[1:]] == [
        ["model", "tiny", "(default)"],
        ["data", "shapes", "(the", "command", "line)"],
        ["shift", "4.0", f"({file})"],
        ["run", "runs/tiny", "(named", "after", "the", "model)"],
    ]
    shift = ["stage3.shift", str(preset("tiny")["stage3"]["shift"]), "(configs/model/tiny.yaml)"]
    assert shift in [line.split() for line in settings(load(["stage=all"]))]


def test_the_list_of_commands(capsys):
    front([])
    out = capsys.readouterr().out
    for name in ABOUT:
        assert any(line.startswith(f"  {name} ") and len(line.split()) > 3 for line in out.splitlines()), name
        module = importlib.import_module(f"fastlightgen.{name}" if name != "ops" else "fastlightgen.ops.__main__")
        assert callable(getattr(module, name if name != "ops" else "main"))


def test_it_is_the_installed_command():
    text = (Path(fastlightgen.__file__).parents[1] / "pyproject.toml").read_text()
    (module, name) = re.findall(r'\[project.scripts\]\nfastlightgen = "(.+):(.+)"\n', text)[0]
    assert getattr(importlib.import_module(module), name) is front


@pytest.mark.parametrize(
    "program, start",
    [
        ("/usr/bin/fastlightgen", "fastlightgen {}"),
        ("Scripts/fastlightgen.exe", "fastlightgen {}"),
        ("/p/fastlightgen/__main__.py", "python -m fastlightgen {}"),
        ("/p/fastlightgen/train.py", "python -m fastlightgen.{}"),
    ],
)
def test_help_names_the_command_as_it_was_called(program, start, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", [program])
    for words in (["train", "--help"], ["train", "stage=3", "--help"], ["plan", "--help"]):
        with pytest.raises(SystemExit):
            front(words)
        out = capsys.readouterr().out
        name = start.format(words[0])
        assert out.startswith(f"usage: {name} ") and out.count(name) == 2  # the usage, and the command that shows more
        assert "-m fastlightgen" not in out.replace(name, "")
    front([])
    assert capsys.readouterr().out.startswith(f"usage: {start.format('COMMAND')} key=value ... ")


@pytest.mark.parametrize("words", [[], ["stage=4"], ["stage=x", "model=tiny"]])
def test_a_stage_that_is_missing_or_unknown_is_a_short_line(words):
    with pytest.raises(
        ConfigError, match="; give stage=0, 1, 2, 3, all or decoder .train --help says what each does.$"
    ) as err:
        load(words)
    assert len(f"error: {err.value}") <= 120


def test_it_runs_a_command_and_refuses_an_unknown_one(capsys):
    front(["train", "stage=1", "dry_run=true", "seed=7"])
    assert "\nseed: 7\n" in capsys.readouterr().out
    for words, message in (
        (["trian", "stage=1"], "trian: there is no such command; did you mean train?"),
        (["stage=3"], "stage=3: there is no such command; did you mean train stage=3?"),
        (["qqq"], "qqq: there is no such command; wanted one of train, plan, "),
    ):
        with pytest.raises(SystemExit) as stop:
            front(words)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("words", [["--version"], *([name, "--version"] for name in ABOUT)])
def test_version(words, capsys):
    try:
        front(words)
    except SystemExit as stop:
        assert stop.code == 0
    assert capsys.readouterr().out == f"fastlightgen {fastlightgen.__version__}\n"


def test_dir_lists_the_public_names():
    assert {"load_model", "save_model", "sample", "Stream", "Cond", "flow"} <= set(dir(fastlightgen))
    assert all(getattr(fastlightgen, name) is not None for name in dir(fastlightgen))
    assert fastlightgen.sample is importlib.import_module("fastlightgen.models.sample").sample


@pytest.mark.parametrize(
    "word", ["run=runs/wan data=cache model=w", "stage=1 run=r", "image=a.png prompt=x", "out=a\tlr=1"]
)
def test_words_that_the_shell_did_not_split_are_refused(word):
    with pytest.raises(ConfigError, match="the shell passed several words as one, as zsh does with .T; write"):
        load(["stage=1", word])


def test_a_prompt_may_hold_anything():
    assert load(["model=tiny", "out=a.png", "prompt=it says lr=1"], "generate").prompt == "it says lr=1"
    assert load(["stage=1", "run=a =b"]).run == "a =b"


@pytest.mark.parametrize(
    ("value", "folder"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-T2V-1.3B-Diffusers"),
        ("Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-T2V-1.3B-Diffusers"),
        ("my models/Wan2.1-T2V-1.3B-Diffusers", "'my models/Wan2.1-T2V-1.3B-Diffusers'"),
    ],
)
def test_a_model_of_the_hub_is_answered_with_its_download(value, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = f"; download it first: hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir {folder}$"
    for words, command in (
        (["stage=1", f"model={value}"], "train"),
        (["videos=v", "out=c", f"pipeline={value}"], "encode"),
    ):
        with pytest.raises(ConfigError, match=wanted):
            load(words, command)


def test_a_folder_that_does_not_exist_is_said_to_be_absent(tmp_path, monkeypatch):
    """owner/name may be a model that no preset knows, unless a folder `owner` is here."""
    monkeypatch.chdir(tmp_path)
    hint = "; if it is a model of the Hugging Face Hub, download it first: hf download me/mine --local-dir mine"
    for words, command in (
        (["stage=1", "model=me/mine"], "train"),
        (["videos=v", "out=c", "pipeline=me/mine"], "encode"),
        (["pipeline=.", "out=c", "model=me/mine"], "export"),
    ):
        for more in (hint, ""):
            (tmp_path / "me").mkdir() if not more else None
            with pytest.raises(ConfigError, match=f"=me/mine: there is no such folder{more}$"):
                load(words, command)
        (tmp_path / "me").rmdir()
    (tmp_path / "file.yaml").touch()
    with pytest.raises(ConfigError, match="model=./file.yaml: neither a folder nor a preset"):
        load(["stage=1", "model=./file.yaml"])


@pytest.mark.parametrize(
    "words", [".train --help", "", " --help", " --version", " ops", ".plan model=tiny gpus=1 engine=local"]
)
def test_a_reader_that_ends_is_no_error(words):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", *f"fastlightgen{words}".split()]
    done = subprocess.run(command, env=ENV, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_operators_that_are_not_there_are_one_line():
    done = process("-m", "fastlightgen.ops", FLG_OPS="triton", CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert done.returncode == 2 and "Triton kernels" in done.stdout
    assert (
        done.stderr.startswith("error: FLG_OPS: got 'triton', which is not available") and done.stderr.count("\n") == 1
    )


def test_torchrun_finds_the_error_in_its_file(tmp_path, monkeypatch):
    """The file as torchrun reads it: the message stands in its own report in place of a traceback."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    report(ValueError("lr=0: wanted more"))
    failure = ProcessFailure(0, 1, 2, str(tmp_path / "error.json"))
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "error: lr=0: wanted more"
    assert "traceback : error: lr=0: wanted more" in str(ChildFailedError("train", {0: failure}))
