"""The sweep: which stages its students share, what it refuses, and its table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import small_wan, write_shapes
from safetensors.torch import save_file

from fastlightgen import sweep
from fastlightgen.config import ConfigError, main
from fastlightgen.evaluate import evaluate
from fastlightgen.metrics.intervals import Resampled
from fastlightgen.metrics.seeds import over_seeds
from fastlightgen.models.folder.weights import save_model
from fastlightgen.sweep import values_of
from fastlightgen.sweeps import estimate, table, work
from fastlightgen.sweeps.points import Part, points_of, unique, words_of
from fastlightgen.sweeps.processes import begin

SHORT = {"model": ["tiny"], "data": ["shapes"], "stage2.iters": ["3"], "stage3.iters": ["25"]}


def stages(points) -> list[int]:
    """The number of trainings of each stage."""
    return [sum(part.stage == n for part in unique(points)) for n in ("1", "2", "3")]


@pytest.mark.parametrize(
    "swept, seeds, trainings",
    [
        ({"steps": ["1", "2", "4"]}, [0], [1, 1, 3]),  # the sampling steps concern Stage III alone
        ({"ratio": ["0.3", "0.5"]}, [0], [2, 2, 2]),
        ({"stage2.lr": ["1e-3", "2e-3"]}, [0], [1, 2, 2]),
        ({"steps": ["2", "4"], "ratio": ["0.3", "0.5"]}, [0, 1], [4, 4, 8]),
        ({"stage3.ratio": ["2", "5"]}, [0], [1, 1, 2]),
        ({"method": ["fastlightgen", "dmd2", "lcm"]}, [0], [1, 1, 3]),
        ({"method": ["fastlightgen", "icmd"], "strong": ["original"]}, [0], [1, 2, 2]),
        ({"threads": ["1", "2"]}, [0], [1, 1, 1]),  # changes no number
    ],
)
def test_what_is_the_same_is_trained_once(tmp_path, swept, seeds, trainings):
    points = points_of(tmp_path, SHORT | swept, seeds, 64)
    assert stages(points) == trainings
    assert len(points) == len(seeds) * torch.tensor([len(v) for v in swept.values()]).prod().item()
    for point in points:
        *_, last = point.parts
        assert last.stage == "3" and all(part.folder.is_relative_to(tmp_path) for part in point.parts)


def test_a_stage_gets_the_results_before_it_and_the_keys_that_it_takes(tmp_path):
    [point] = points_of(tmp_path, SHORT | {"ratio": ["0.5"], "steps": ["2"], "betas": ["[0.5, 0.9]"]}, [7], 64)
    first, second, third = point.parts
    assert {"ratio=0.5", "seed=7", "model=tiny"} <= set(first.words) and "betas=[0.5, 0.9]" not in first.words
    assert f"importance={first.folder}/stage1/importance.json" in second.words and "iters=3" in second.words
    assert f"stage2_model={second.folder}/stage2/model" in third.words and "steps=2" in third.words
    assert not [word for word in third.words if word.startswith("ratio=")]  # a share is no number of updates


def test_lists():
    assert values_of("2,4") == ["2", "4"] and values_of("[0.5, 0.9],[0.9, 0.99]") == ["[0.5, 0.9]", "[0.9, 0.99]"]
    assert words_of("3", {"method": "dmd2", "stage3.lr": "1e-3"}) == ["method=dmd2", "lr=1e-3"]
    assert words_of("2", {"method": "dmd2", "stage3.lr": "1e-3"}) == []


@pytest.mark.parametrize(
    "words, said",
    [
        (["stepz=2,4"], "stepz=2: unknown key; did you mean steps?"),
        (["steps=2,x"], "steps=x: wanted whole number, for example steps="),
        (["steps=[2,4]"], "wanted whole number, for example steps=4; .* leave the brackets out: steps=2,4"),
        (["steps"], "wanted key=value"),
        (["seeds=a"], "seeds=a: wanted a list as 0,1,2, or a number of seeds from 1 to 1000"),
        (["seeds=0"], "seeds=0: wanted a list as 0,1,2, or a number of seeds from 1 to 1000"),
        (["at_once=-1"], "at_once=-1: wanted a whole number"),
        (["stage4.lr=1"], "stage4.lr=1: wanted stage1.lr or stage2.lr or stage3.lr"),
        (["stage2.itres=1"], "itres=1: unknown key; did you mean iters?"),
        (["stage=3"], "stage=3: a sweep runs stages 1 to 3; leave it out"),
        (["method=dmd"], "method=dmd: wanted one of fastlightgen, f3, .*, dmd2"),
        (["stage3.iters=6"], "critic_start=20: iters=6 leaves no update"),
        (["table=5", "itres=6"], "itres=6: unknown key; did you mean iters?"),
        (["table=5", "config=mine"], "config=mine: a table of the paper has its own settings"),
        (["config=mine", "steps=2,4"], "config=mine: there is no such file"),
        (["stage2.config=mine"], "stage2.config=mine: a recipe is for all stages; give config=mine"),
    ],
)
def test_mistakes(tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        sweep.sweep([f"run={tmp_path}", "dry_run=true", *words])


def test_a_sweep_of_nothing_is_no_training():
    with pytest.raises(ConfigError, match="wanted what to compare, for example steps=2,4"):
        sweep.sweep([])


@pytest.mark.parametrize("order", [1, -1])
def test_the_key_of_a_stage_wins_over_the_key_of_all(tmp_path, order):
    swept = {"stage2.iters": ["3"], "iters": ["6"], "critic_start": ["0"]}
    [point] = points_of(tmp_path, dict(list(swept.items())[::order]), [0], 64)
    _, second, third = point.parts
    assert (second.cfg.iters, third.cfg.iters, third.cfg.critic_start) == (3, 6, 0)


def test_dry_run_writes_nothing_and_counts(tmp_path, capsys):
    sweep.sweep([f"run={tmp_path / 's'}", "dry_run=true", "steps=2,4", "seeds=2", "stage2.iters=3", "stage3.iters=25"])
    said = capsys.readouterr().out
    assert "4 models; 8 of 8 trainings are left: 2 of stage 1, 2 of stage 2, 4 of stage 3; 4 evaluations" in said
    assert "of training and" in said and "of evaluation, 1 at a time" in said and not (tmp_path / "s").exists()
    assert [line.strip() for line in said.splitlines()].count("steps=2") == 1 and "\n  steps=4\n" in said
    assert said.endswith("next: the same command without dry_run=true\n")


def test_the_time_of_many_short_trainings_is_that_of_their_processes(tmp_path, monkeypatch):
    """On a machine of endless speed: 1 + 1 + 30 trainings and 30 evaluations, 5 s each."""
    monkeypatch.setattr(estimate, "speed_of", lambda *_: (float("inf"), "no limit"))
    points = points_of(tmp_path, SHORT | {"stage3.lr": [f"1e-{i}" for i in range(3, 33)]}, [0], 64)
    first, *shown, times = estimate.plan(points, True, 1)
    assert first.startswith("30 models; 32 of 32 trainings are left") and first.endswith("; 30 evaluations")
    assert len(shown) == 21 and shown[-1] == "  and 10 more"
    assert times.startswith("  about 3 min of training and about 2 min of evaluation, 1 at a time")
    assert estimate.plan(points[:1], True, 1)[0].startswith("1 model; 3 of 3 trainings are left")


def test_what_another_process_has_is_left_to_it(tmp_path):
    mine = work.taken(tmp_path / "x" / ".a.lock")
    assert mine and work.taken(tmp_path / "x" / ".a.lock") is None
    mine.close()
    assert work.taken(tmp_path / "x" / ".a.lock")


@pytest.mark.parametrize("names, count, wanted", [
    (None, 2, ["0", "1"]),
    ("", 0, []),
    ("3", 1, ["3"]),  # by a scheduler
    ("GPU-9f1c,GPU-77aa", 2, ["GPU-9f1c", "GPU-77aa"]),
    ("1,-1,2", 1, ["1"]),  # CUDA stops at a number that is none
])  # fmt: skip
def test_gpus_are_those_that_a_scheduler_gives(names, count, wanted):
    assert work.visible_gpus(names, count) == wanted


ENDED = """
import signal, sys, time
from pathlib import Path
from fastlightgen.config import guarded
from fastlightgen.sweeps import work
from fastlightgen.sweeps.points import points_of
from fastlightgen.sweeps.processes import begin

FOLDER = Path(sys.argv[1])

def noted(folder):
    "Say that it runs, and count the signals until a second has passed since the first."
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(time.monotonic()))
    (folder / "runs").touch()
    while not seen or time.monotonic() - seen[0] < 1:
        time.sleep(0.01)
    (folder / "seen").write_text(str(len(seen)))

def start(name, item, lock, slot):
    process = begin(noted, (FOLDER,), FOLDER / "log.txt", lock)
    return work.Running(name, process, lock, Path("log"), slot, work.cost_file(item))

if __name__ == "__main__":
    work.start = start
    guarded(lambda: work.work(points_of(FOLDER, {"model": ["tiny"], "data": ["shapes"]}, [0], 64), True, 1))
"""


def test_a_signal_to_all_ends_the_work_with_one(tmp_path):
    """SIGTERM to a sweep and all of its group, as a shell or a scheduler sends it: the training gets one signal."""
    script = tmp_path / "ended.py"
    script.write_text(ENDED)
    process = subprocess.Popen([sys.executable, script, tmp_path], start_new_session=True)
    while not (tmp_path / "runs").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 130 and (tmp_path / "seen").read_text() == "1"


def shell(command: str) -> None:
    sys.exit(subprocess.call(["sh", "-c", command]))


@pytest.mark.parametrize("code", [3, 0])
def test_failures_stop_what_needs_them_alone(tmp_path, monkeypatch, code):
    """Stage II of one ratio fails, or ends without a result: the students of the other are trained."""
    points = points_of(tmp_path, SHORT | {"ratio": ["0.3", "0.5"]}, [0], 64)
    bad = next(part for part in points[1].parts if part.stage == "2")

    def start(name, item, lock, slot):
        if not isinstance(item, Part):
            command = f"mkdir -p {item.scores.parent}; echo > {item.scores}"
        elif item is bad:
            command = f"exit {code}"
        else:
            made = item.result
            command = f"mkdir -p {made.parent}; mkdir {made}"
        process = begin(shell, (command,), tmp_path / "log.txt")
        return work.Running(name, process, lock, Path("log"), slot, work.cost_file(item))

    monkeypatch.setattr(work, "start", start)
    monkeypatch.setattr(work, "POLL", 0.01)
    assert work.work(points, True, 2) == [str(bad.folder)]
    assert points[0].scores.exists() and not points[1].scores.exists()
    assert all(0 < work.cost_of(work.cost_file(item)) < 60 for item in [*points[0].parts, points[0]])


def resample(value: float, spread: float, seed: int) -> Resampled:
    noise = torch.randn(200, generator=torch.Generator().manual_seed(seed)).double()
    return Resampled(value, value + spread * noise, 64, 0)


def test_a_difference_needs_two_deviations_of_seeds_and_of_clips():
    """By hand: variance of the differences -3 and -5 is 2, of their mean 1; the clips are resampled alike."""
    pairs = [({"frechet": resample(v, 1.0, 0)}, {"frechet": resample(w, 1.0, 0)}) for v, w in ((10, 13), (10, 15))]
    found = over_seeds(pairs, {"frechet": "low"}, {})["frechet"]
    assert found["difference"] == -4 and found["two_deviations"] == pytest.approx(2.0)
    assert found["verdict"] == "better"
    apart = [({"frechet": resample(10, 3.0, 1)}, {"frechet": resample(12, 3.0, 2)})]
    found = over_seeds(apart, {"frechet": "low"}, {})["frechet"]
    assert found["verdict"] == "no difference" and found["two_deviations"] == pytest.approx(2 * 18**0.5, rel=0.2)


def test_a_sweep_over_a_cache_has_a_table_too(tmp_path):
    """Two networks on 64 held-out clips: the scores of latents, and a network against itself differs in nothing."""
    write_shapes(tmp_path / "cache", 640)
    with pytest.raises(ConfigError, match="a table compares models on the same clips"):
        points_of(tmp_path, SHORT | {"data": ["shapes", str(tmp_path / "cache")]}, [0], 64)
    points = points_of(tmp_path, SHORT | {"data": [str(tmp_path / "cache")], "steps": ["1", "2", "4"]}, [0], 64)
    for point, seed in zip(points, (0, 0, 1), strict=True):
        net = save_model(small_wan(2, seed), tmp_path / f"net{seed}", steps=1, guidance=1.0, shift=3.0)
        words = [f"model={net}", f"out={point.scores}", *point.plan, *point.where, "threads=1", "progress=false"]
        main(evaluate, "evaluate", words)
    text = table.table(points, tmp_path)
    head, _, first, same, other, *_ = text.splitlines()
    assert head.startswith("|  | cost | seeds | frechet | kid |") and "adherence" not in head
    assert first.startswith("| steps=1 | 2 | 1 |") and same.endswith("| frechet no difference |")
    assert other.endswith(("| frechet better |", "| frechet worse |")) and (tmp_path / "table.svg").is_file()
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["steps=2"]["scores"] == record["steps=1"]["scores"]
    assert record["steps=2"]["against_the_first"]["detail"]["difference"] == 0


def test_the_table(tmp_path, monkeypatch):
    def means(values, seed):  # in place of the scores that need a reference of real clips
        return {
            name: Resampled(v.mean().item(), v.mean() + torch.zeros(200).double(), 64, 0) for name, v in values.items()
        }

    monkeypatch.setattr(table, "resampled", means)
    monkeypatch.setattr(table, "reference", lambda seed: SimpleNamespace(look={"persistence": 0.7}))
    points = points_of(tmp_path, SHORT | {"steps": ["2", "4"]}, [0, 1], 64)
    names = ("adherence", "texture", "persistence")
    for point in points:
        value = 0.5 if "steps=2" in point.name else 0.9
        point.scores.parent.mkdir(exist_ok=True)
        noise = torch.rand(64, generator=torch.Generator().manual_seed(point.parts[0].cfg.seed)) * 0.01
        values = {name: value + noise for name in names}
        save_file(values, point.scores.with_suffix(".values.safetensors"))
        sampler = {"kind": "ode", "steps": 2, "guidance": 1.0, "evaluations": 2}
        scores = {name: v.mean().item() for name, v in values.items()}
        record = {"title": "x", "clips": 64, "scores": scores, "shown": [], "attributes": {}, "sampler": sampler}
        record |= {"num_params": 1, "num_blocks": 8, "kept_blocks": None, "seed": 0}
        point.scores.write_text(json.dumps(record))
    text = table.table(points, tmp_path)
    assert "over training seeds and sets of clips" in text and "no 95% interval" in text
    assert "adherence, recall: higher is better; frechet, kid: lower is better; texture: best near 1" in text
    one = table.table([point for point in points if point.parts[0].cfg.seed == 0], tmp_path)
    assert "over sets of clips; another training seed can differ by more" in one and "no 95%" not in one
    text = table.table(points, tmp_path)
    rows = text.splitlines()
    assert rows[2].startswith("| steps=2 | 16 | 2 | 0.505") and rows[3].startswith("| steps=4 | 16 | 2 | 0.905")
    assert "adherence better" in rows[3] and (tmp_path / "table.md").read_text() == text + "\n"
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["steps=4"]["against_the_first"]["adherence"]["verdict"] == "better"
