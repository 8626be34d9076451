"""dtype=auto: bfloat16 for a released network on a GPU, float32 on a CPU and for the built-in world."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import config, run_train, small_wan
from runs import Page

from fastlightgen import train
from fastlightgen.config import compute_type, for_stage, load, unset_type
from fastlightgen.models.folder.weights import save_model
from fastlightgen.report import write_report
from fastlightgen.stages.build import Builder
from fastlightgen.stages.earlier import missing
from fastlightgen.world.source import ShapesSource


def test_the_rule():
    for given in ("float32", "bfloat16"):
        assert {compute_type(given, gpu, real) for gpu in (True, False) for real in (True, False)} == {given}
    found = {(gpu, real): compute_type("auto", gpu, real) for gpu in (True, False) for real in (True, False)}
    assert found.pop((True, True)) == "bfloat16" and set(found.values()) == {"float32"}


@pytest.mark.parametrize(
    ("words", "on_gpu", "wanted"),
    [
        (["data=."], True, "bfloat16"),
        (["data=."], False, "float32"),
        ([], True, "float32"),  # the built-in world
        (["data=.", "dtype=float32"], True, "float32"),
        (["dtype=bfloat16"], False, "bfloat16"),
    ],
)
def test_training_settles_it_once(words, on_gpu, wanted, monkeypatch):
    """Also for the stages of stage=all."""
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("cuda" if on_gpu else "cpu"))
    for stage in ("2", "all"):
        assert train.settled(load([f"stage={stage}", "run=r", *words])).dtype == wanted


def test_a_plan_takes_the_type_of_its_machine():
    for words, wanted in (([], "bfloat16"), (["gpu=cpu"], "float32"), (["model=tiny"], "float32")):
        assert load(words, "plan").dtype == wanted
    assert load(["dtype=float32"], "plan").dtype == "float32"


@pytest.fixture
def teacher(tmp_path) -> Path:
    return save_model(small_wan(), tmp_path / "teacher")


def test_a_run_records_the_type_that_was_typed_and_the_one_that_it_used(teacher, tmp_path, capsys):
    """A run begun with dtype=float32, the default of earlier versions, continues with dtype=auto, and the reverse."""

    def recorded(run: str) -> tuple:
        record = yaml.safe_load((tmp_path / run / "config.yaml").read_text())["stage1"]
        return record["dtype"], record.get("dtype_used")

    words = [f"model={teacher}", f"run={tmp_path / 'r'}", "clips=2", "timesteps=1", "batch=2", "threads=1"]
    words += ["data_check=off", "progress=false"]
    run_train("stage=1", "dtype=float32", *words)
    run_train("stage=1", *words)  # complete: nothing to do
    assert recorded("r") == ("float32", None)
    words[1] = f"run={tmp_path / 'auto'}"
    run_train("stage=1", *words)
    assert recorded("auto") == ("auto", "float32")
    run_train("stage=1", "dtype=float32", *words)
    with pytest.raises(SystemExit):
        run_train("stage=1", "dtype=bfloat16", *words)
    assert "dtype: float32 -> bfloat16" in capsys.readouterr().err
    text = Page(write_report(tmp_path / "auto")).text.replace("\n", "")
    assert "|dtype|auto|" in text and "|dtype_used|float32|" in text


def test_the_type_of_earlier_stages_and_of_stage_all_is_not_made_up(teacher):
    for words in (["stage=3"], ["stage=3", "dtype=auto"], ["stage=3", "dtype=float32"]):
        cfg = train.settled(load([*words, f"model={teacher}", "earlier=run", "run=r"]))
        chosen = words[-1] == "dtype=float32"
        assert [one.dtype for one in missing(cfg)] == ["float32"] * 2
        assert [unset_type(one) for one in (*missing(cfg), cfg)] == [set() if chosen else {"dtype"}] * 3
        every = train.settled(load(["stage=all", *words[1:]]))
        assert {bool(unset_type(for_stage(every, n))) for n in (1, 2, 3)} == {not chosen}
    assert for_stage(load(["stage=all", "stage2.lr=1"]), 2).origins["lr"] == "the command line"


def test_one_process_ranks_in_the_compute_type(teacher, tmp_path):
    """Stage I trains nothing, so its weights take 2 bytes. Its scores differ by bfloat16's rounding, 2^-8, alone."""
    source, device = ShapesSource(0), torch.device("cpu")
    types = {}
    for stage in (1, 2):
        for dtype in ("bfloat16", "float32"):
            net = Builder(config(stage, f"dtype={dtype}"), source, device).load(teacher)
            types[stage, dtype] = {p.dtype for p in net.parameters()}
    assert types[1, "bfloat16"] == {torch.bfloat16}
    assert types[1, "float32"] == types[2, "float32"] == types[2, "bfloat16"] == {torch.float32}
    scores = {}
    for dtype in ("bfloat16", "float32"):
        words = [f"model={teacher}", f"run={tmp_path / dtype}", "clips=2", "timesteps=2", "batch=2", "threads=1"]
        run_train("stage=1", f"dtype={dtype}", "data_check=off", "progress=false", *words)
        record = json.loads((tmp_path / dtype / "stage1" / "importance.json").read_text())
        scores[dtype] = torch.tensor([u["score"] for u in record["units"]])
    assert not torch.equal(*scores.values())
    assert torch.allclose(*scores.values(), rtol=2**-8)
