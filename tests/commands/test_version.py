"""Files that were made on another version of the built-in world are refused in one line that says what to do."""

import json
from pathlib import Path

import pytest
import yaml
from helpers import KEPT, run_train, small_hunyuan, small_wan, write_inputs, write_ranking
from runs import RANKING

from fastlightgen.config import UserError, main
from fastlightgen.data.version import check_model
from fastlightgen.evaluate import evaluate
from fastlightgen.generate import generate
from fastlightgen.models.folder.weights import build, read_card, read_json, save_model
from fastlightgen.report import write_report
from fastlightgen.world.shapes import WORLD
from fastlightgen.world.source import ShapesSource

CARD = {"steps": 2, "guidance": 2.0, "shift": 3.0}
OLD = f"was trained on version 1 of the built-in world, this is version {WORLD}; train it again"


def refused(capsys, command, name: str, *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(command, name, list(words)) if command else run_train(*words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture
def old(tmp_path) -> Path:
    """A teacher and a Stage II model of version 1, whose cards name no version."""
    save_model(small_wan(), tmp_path / "old", stage=0, source="shapes", **CARD)
    save_model(small_wan(), tmp_path / "old2", stage=2, source=str(tmp_path / "old"), pruned_path=KEPT, **CARD)
    return tmp_path


def test_training_refuses_old_models(old, capsys):
    ranking, new = write_ranking(old / "importance.json"), save_model(small_wan(), old / "new", **CARD)
    for stage, key, model in (
        (1, "model", "old"),
        (2, "model", "old"),
        (2, "teacher", "old"),
        (3, "stage2_model", "old2"),
    ):
        words = [f"stage={stage}", f"run={old / 'r'}", f"model={new}", f"{key}={old / model}", "progress=false"]
        if stage == 2:
            words.append(f"importance={ranking}")
        err = refused(capsys, None, "train", *words)
        assert f"{old / model}: {OLD} (stage={2 if model == 'old2' else 0}) or use the release that made it" in err
    # the strong teacher of Eq. 9 is another network
    save_model(small_wan(), old / "new2", stage=2, world=WORLD, pruned_path=KEPT, **CARD)
    words = ["stage=3", f"run={old / 'r'}", f"model={old / 'old'}", f"stage2_model={old / 'new2'}", "strong=original"]
    assert f"{old / 'old'}: {OLD}" in refused(capsys, None, "train", *words, "progress=false")


def test_sampling_refuses_old_models(old, capsys):
    words = [f"model={old / 'old'}", f"out={old / 'a.png'}", "prompt=a red ball moves up fast then stops"]
    assert OLD in refused(capsys, generate, "generate", *words)
    words = [f"out={old / 'a.json'}", "clips=2", "threads=1", "progress=false"]
    assert OLD in refused(capsys, evaluate, "evaluate", f"model={old / 'old'}", *words)
    new = save_model(small_wan(), old / "new", stage=0, world=WORLD, **CARD)
    assert OLD in refused(capsys, evaluate, "evaluate", f"model={new}", f"teacher={old / 'old'}", *words)


def test_a_later_version_is_refused_too(old):
    save_model(small_wan(), old / "later", stage=3, world=WORLD + 1)
    with pytest.raises(
        ValueError, match=f"version {WORLD + 1} of the built-in world, this is version {WORLD}; .*stage=3"
    ):
        check_model(old / "later", ShapesSource.description)


def test_hunyuan_models_of_the_world_are_refused(tmp_path):
    folder = save_model(small_hunyuan(), tmp_path / "h", stage=0)
    with pytest.raises(ValueError, match="train it again"):
        check_model(folder, ShapesSource.description)
    check_model(save_model(small_hunyuan(), tmp_path / "new", stage=0, world=WORLD), ShapesSource.description)


def test_models_that_never_saw_this_world_pass(old):
    real = build(small_wan(1).config | {"in_channels": 16, "out_channels": 16, "text_dim": 20}, 0)
    check_model(save_model(real, old / "real", stage=3), ShapesSource.description)  # a student of a real checkpoint
    random = save_model(small_wan(), old / "random")
    check_model(random, ShapesSource.description)
    (random / "fastlightgen.json").unlink()
    check_model(random, ShapesSource.description)  # another program's folder
    check_model("tiny", ShapesSource.description)  # random weights of a preset
    check_model(old / "old", {"family": "wan", "vae": "x"})  # a cache has no version


def test_stages_write_the_version(tmp_path):
    """Stage 0 may start from an old model: it adapts it. Stages 1 to 3 follow."""
    words, few = write_inputs(tmp_path), ["iters=1", "save_every=1"]
    save_model(small_wan(), tmp_path / "teacher", stage=0, source="shapes", **CARD)  # of version 1
    run = tmp_path / "run"
    run_train("stage=0", *words[0], *few, f"run={run}")
    teacher = f"model={run / 'stage0/model'}"
    run_train("stage=1", f"run={run}", teacher, "clips=2", "batch=2", "timesteps=1", "threads=1", "progress=false")
    run_train("stage=2", *words[2], *few, f"run={run}", teacher, f"importance={run / 'stage1/importance.json'}")
    run_train("stage=3", *words[3], *few, f"run={run}", teacher, f"stage2_model={run / 'stage2/model'}")
    assert [read_card(run / f"stage{n}" / "model")["world"] for n in (0, 2, 3)] == [WORLD] * 3
    assert read_json(run / "stage1/importance.json")["world"] == WORLD
    found = yaml.safe_load((run / "config.yaml").read_text())
    assert [found[f"stage{n}"]["world"] for n in range(4)] == [WORLD] * 4


def test_run_folders_of_the_old_world_are_not_continued(tmp_path, capsys):
    words, run = ["stage=0", *write_inputs(tmp_path)[0], "iters=1", f"run={tmp_path / 'run'}"], tmp_path / "run"
    run_train(*words)
    found = yaml.safe_load((run / "config.yaml").read_text())
    del found["stage0"]["world"]
    (run / "config.yaml").write_text(yaml.safe_dump(found))
    err = refused(capsys, None, "train", *words)
    assert f"(world: None -> {WORLD}); use another run=, or overwrite=true to delete it and start anew" in err


def test_old_rankings_are_refused(tmp_path, capsys):
    words, ranking = write_inputs(tmp_path)[2], tmp_path / "importance.json"
    record = read_json(ranking)
    ranking.write_text(json.dumps(record | {"data_hash": "shapes"}))
    command = ["stage=2", *words, "iters=1", "warmup=0", "save_every=1"]
    err = refused(capsys, None, "train", *command, f"run={tmp_path / 'a'}")
    wanted = f"{ranking}: was made on version 1 of the built-in world, this is version {WORLD}; run stage=1 again"
    assert f"{wanted} with overwrite=true" in err
    # that of a cache passes
    ranking.write_text(json.dumps(record | {"data_hash": "0123456789abcdef"}))
    run_train(*command, f"run={tmp_path / 'b'}")


def test_old_scores_of_a_model_are_refused(tmp_path, capsys):
    folder = save_model(small_wan(), tmp_path / "m", stage=0, world=WORLD, **CARD)
    (folder / "scores.json").write_text(json.dumps({"records": []}))
    words = [f"model={folder}", f"out={tmp_path / 'a.json'}", "clips=2", "show=1", "threads=1", "progress=false"]
    err = refused(capsys, evaluate, "evaluate", *words)
    assert f"{folder / 'scores.json'}: was measured on version 1 of the built-in world" in err
    assert "delete the file, or measure again with show=0" in err


def test_a_report_does_not_mix_versions(tmp_path):
    def write(name: str, **more) -> None:
        scores = {"name": name, "title": name, "clips": 64, "seed": 0, "attributes": {}, "scores": {"adherence": 0.5}}
        (tmp_path / "evaluate" / f"{name}.json").write_text(json.dumps(scores | {"shown": []} | more))

    (tmp_path / "evaluate").mkdir()
    write("real"), write("teacher")
    write_report(tmp_path)  # an old run has a report still
    write("stage2-few", world=2)
    with pytest.raises(
        UserError, match="real.json: was made on version 1 of .*, others on version 2; delete it, or make"
    ):
        write_report(tmp_path)
    write("real", world=2), write("teacher", world=2)
    write_report(tmp_path)
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "importance.json").write_text(json.dumps(RANKING | {"data_hash": "shapes"}))
    with pytest.raises(UserError, match="importance.json: was made on version 1"):
        write_report(tmp_path)
