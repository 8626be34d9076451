"""TensorBoard, W&B and Trackio get every line once, also after a crash; a missing package is an error."""

import importlib.util
import json
import sys

import pytest
from helpers import run_train, write_inputs
from PIL import Image

from fastlightgen.engine.log import read_metrics
from fastlightgen.stages.teacher import Teacher

FAKE = """
import json
from pathlib import Path
class Error(Exception): pass
class Video:
    def __init__(self, data, caption=None, fps=None, format=None):
        with open(data, "rb") as f: self.shown = [f.read(3).decode(), Path(data).name, format]
def init(**keys):
    if keys["project"] == "refused": raise Error("not logged in")
    return Run(keys)
class Run:
    def __init__(self, keys):
        self.file = Path(keys["dir"], "calls.jsonl")
        shown = {k: keys[k] for k in ("project", "id", "name", "resume")}
        self.note("init", shown | {"iters": keys["config"]["iters"]})
    def note(self, *what):
        with open(self.file, "a") as f: f.write(json.dumps(what) + "\\n")
    def log(self, record, step):
        self.note("log", step, {k: getattr(v, "shown", v) for k, v in record.items()})
    def finish(self): self.note("finish")
"""
# Trackio has no `id` and no `dir`; it finds a run again by its name.
TRACKIO = FAKE.replace('keys["dir"]', 'os.environ["TRACKIO_DIR"]').replace('"id", ', "") + "import os\n"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return ["stage=0", *write_inputs(tmp_path_factory.mktemp("inputs"))[0], "sample_every=4"]


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """`modules(name, text)` makes a module that can be imported during the test."""
    folder, made = tmp_path / "modules", []

    def make(name: str, text: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, name, raising=False)
        made.append(name)

    yield make
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def wandb(modules):
    modules("wandb", FAKE)


def crash(monkeypatch, step: int, *words: str) -> None:
    """Run until an error after `step`, which comes later than the last checkpoint."""

    def check(self, done):
        if done == step:
            raise ValueError("stopped by the test")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Teacher, "check", check)
        run_train(*words)


def numbers(run) -> dict[str, list]:
    """Return {name: [(step, value), ..]} of both log files, to compare in TensorBoard's float32."""
    out: dict[str, list] = {}
    for name in ("metrics", "samples"):
        for line in read_metrics(run / f"stage0/{name}.jsonl"):
            for key in set(line) - {"step"}:
                out.setdefault(key, []).append((line["step"], pytest.approx(line[key], rel=2**-23)))
    return out


def untimed(record: dict) -> dict:
    """A record without its times: a step that is computed again takes another time."""
    return {k: v for k, v in record.items() if not k.startswith(("sec_", "share_"))}


def test_tensorboard_shows_every_step_once(words, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    crash(monkeypatch, 5, *words, f"run={tmp_path}", "tensorboard=true")  # step 5 is logged, step 3 is saved
    run_train(*words, f"run={tmp_path}", "tensorboard=true")
    events = accumulator.EventAccumulator(str(tmp_path / "stage0/tensorboard"))
    events.Reload()
    shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    wanted = numbers(tmp_path)
    assert [s for s, _ in wanted["loss"]] == [1, 3, 5, 7] and [s for s, _ in wanted["clips_motion"]] == [4, 7]
    assert shown == wanted
    files = {n: (tmp_path / f"stage0/samples/step-{n:06d}.gif").read_bytes() for n in (4, 7)}
    assert {e.step: e.encoded_image_string for e in events.Images("clips")} == files
    with Image.open(tmp_path / "stage0/samples/step-000004.gif") as picture:
        assert {(e.width, e.height) for e in events.Images("clips")} == {picture.size}


def test_wandb_gets_the_log(words, tmp_path, monkeypatch, wandb):
    command = [*words, f"run={tmp_path}", "wandb=films"]
    crash(monkeypatch, 5, *command)
    run_train(*command)
    calls = [json.loads(line) for line in (tmp_path / "stage0/calls.jsonl").read_text().splitlines()]
    starts = [c[1] for c in calls if c[0] == "init"]
    name = (tmp_path / "stage0/wandb-id").read_text()
    wanted = {"project": "films", "id": name, "name": f"{tmp_path.name} stage0", "resume": "allow", "iters": 7}
    assert starts == [wanted, wanted] and len(name) == 12  # the same W&B run, continued
    second = calls[[i for i, c in enumerate(calls) if c[0] == "init"][1] + 1 :]
    assert [c[:2] for c in second] == [["log", n] for n in (4, 4, 5, 7, 7, 7)] + [["finish"]]
    last = read_metrics(tmp_path / "stage0/metrics.jsonl")[-1]
    assert second[3][2] == {k: v for k, v in last.items() if k != "step"}
    assert [c[2] for c in second if c[0] == "log" and "clips" in c[2]] == [
        {"clips": ["GIF", f"step-{n:06d}.gif", "gif"]} for n in (4, 7)
    ]


def test_trackio_gets_every_step_once(words, tmp_path, monkeypatch, modules):
    """It keeps repeated steps, so that a resumed stage leaves out those that it already has."""
    modules("trackio", TRACKIO)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    command = [*words, f"run={tmp_path}/run", "trackio=films"]
    crash(monkeypatch, 5, *command)
    run_train(*command)
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    starts = [c[1] for c in calls if c[0] == "init"]
    name = f"run stage0 {(tmp_path / 'run/stage0/trackio-id').read_text()}"
    assert starts == [{"project": "films", "name": name, "resume": "allow", "iters": 7}] * 2
    logged = [c[1:] for c in calls if c[0] == "log"]
    assert [step for step, _ in logged] == [1, 3, 4, 4, 5, 7, 7, 7]  # the crash came after 5, the checkpoint before 4
    want = [line for name in ("metrics", "samples") for line in read_metrics(tmp_path / f"run/stage0/{name}.jsonl")]
    got = [{"step": step, **values} for step, values in logged if "clips" not in values]
    assert sorted(map(untimed, got), key=str) == sorted(map(untimed, want), key=str)
    assert [v["clips"][:2] for _, v in logged if "clips" in v] == [["GIF", f"step-{n:06d}.gif"] for n in (4, 7)]


@pytest.mark.parametrize("word", ["tensorboard=true", "wandb=films", "trackio=films"])
def test_a_missing_package_is_reported_at_the_start(words, tmp_path, monkeypatch, capsys, word):
    key = word.split("=")[0]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == key else find(name, *a))
    with pytest.raises(SystemExit) as stop:
        run_train(*words, f"run={tmp_path}/run", word)
    line = capsys.readouterr().err
    wanted = f"error: {word}: {key} is not installed; pip install 'fastlightgen[watch]', or leave {key}= out\n"
    assert stop.value.code == 2 and line == wanted and not (tmp_path / "run").exists()


def test_a_folder_named_wandb_is_not_the_package(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "modules/wandb").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *(p for p in sys.path if "site-packages" not in p)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(SystemExit):
        run_train(*words, f"run={tmp_path}/run", "wandb=films")
    assert "wandb=films: wandb is not installed" in capsys.readouterr().err


def test_wandb_that_refuses_is_one_line(words, tmp_path, wandb, capsys):
    with pytest.raises(SystemExit) as stop:
        run_train(*words, f"run={tmp_path}", "wandb=refused")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert "wandb=refused: cannot start (not logged in); run `wandb login`" in err


def test_trackio_that_refuses_is_one_line(words, tmp_path, monkeypatch, modules, capsys):
    modules("trackio", TRACKIO)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        run_train(*words, f"run={tmp_path}/run", "trackio=refused")
    assert stop.value.code == 2
    assert "trackio=refused: cannot start (not logged in); try another name" in capsys.readouterr().err
