"""The evaluate command: scores that ship with a teacher, values of each clip, intervals and paired differences."""

import json
import shutil

import pytest
from helpers import small_wan
from safetensors import safe_open
from safetensors.torch import load_file

from fastlightgen.atomic import write_json
from fastlightgen.config import main
from fastlightgen.evaluate import evaluate
from fastlightgen.models.folder.weights import save_model
from fastlightgen.world.score import scores_of
from fastlightgen.world.shapes import WORLD


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A random network against another one, on 64 clips and 32 captions with two noises each."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, seed in (("a", 0), ("b", 1)):
        save_model(small_wan(2, seed), root / name, steps=1, guidance=1.0, shift=3.0)
    words = [f"model={root / 'a'}", "clips=64", "noises=2", "threads=1", "progress=false", "show=1", "seed=3"]
    main(evaluate, "evaluate", [*words, f"teacher={root / 'b'}", f"out={root / 'scores.json'}"])
    return root, json.loads((root / "scores.json").read_text()), load_file(root / "scores.values.safetensors")


def test_the_values_of_the_clips_give_the_scores(measured):
    _, record, values = measured
    own = {k: v for k, v in record["scores"].items() if k != "to_teacher"}
    assert scores_of(values, 3) == pytest.approx(own, nan_ok=True)
    assert values["features"].shape[0] == 64 and values["spread"].shape == (32, 3)
    assert record["scores"]["adherence"] == pytest.approx(float(values["adherence"].mean()))


def test_files_name_the_version_of_the_world(measured):
    root, record, _ = measured
    assert record["world"] == record["teacher"]["world"] == WORLD
    with safe_open(root / "scores.values.safetensors", framework="pt") as file:
        assert file.metadata() == {"world": str(WORLD)}


@pytest.fixture
def shipping(measured, tmp_path):
    """The first network with the values of its 64 clips beside it, and the words of an evaluation that can use them."""
    root, record, _ = measured
    folder = tmp_path / "model"
    shutil.copytree(root / "a", folder)
    shutil.copy(root / "scores.values.safetensors", folder / "values.safetensors")
    kept = {k: record[k] for k in ("plan", "seed", "clips", "attributes")}
    write_json(
        folder / "scores.json", {"world": WORLD, "records": [kept | {"noises": 2, "values": "values.safetensors"}]}
    )
    words = [f"model={folder}", "threads=1", "progress=false", f"out={tmp_path / 'again.json'}"]

    def scores(*more: str) -> dict:
        main(evaluate, "evaluate", [*words, *more])
        return json.loads((tmp_path / "again.json").read_text())

    return scores


NOTE = "scores that ship with this model, measured when it was trained"


def test_shipped_values_give_the_scores_of_as_many_clips_as_are_asked(measured, shipping):
    _, record, values = measured
    found = shipping("clips=64", "noises=2", "show=1", "seed=3")
    own = {k: v for k, v in record["scores"].items() if k != "to_teacher"}
    assert found["note"] == NOTE and found["scores"] == pytest.approx(own, nan_ok=True)
    fewer = {k: v[:32] for k, v in values.items() if k != "spread"} | {"spread": values["spread"][:16]}
    assert shipping("clips=32", "noises=2", "show=1", "seed=3")["scores"] == pytest.approx(
        scores_of(fewer, 3), nan_ok=True
    )
    assert "diversity" not in shipping("clips=32", "show=1", "seed=3")["scores"]


@pytest.mark.parametrize("word", ["clips=65", "seed=4", "steps=2", "show=0"])
def test_clips_that_did_not_ship_are_measured(shipping, word):
    words = {"clips": "clips=64", "seed": "seed=3", "show": "show=1"} | {word.split("=")[0]: word}
    assert "note" not in shipping(*words.values())


def test_intervals_hold_their_scores(measured):
    _, record, _ = measured
    for name in ("adherence", "frechet", "kid", "recall", "texture", "persistence"):
        low, high = record["intervals"][name]
        assert low <= record["scores"][name] <= high, name
    # 32 captions are too few, and a path that no clip has is no score
    assert "diversity" in record["scores"] and "diversity" not in record["intervals"]
    assert set(record["intervals"]) <= set(record["scores"]) and "note" not in record


def test_paired_difference_to_the_teacher(measured):
    root, record, _ = measured
    for name, away in record["against_teacher"].items():
        assert away["low"] <= away["difference"] <= away["high"], name
    other = record["teacher"]["scores"]
    wanted = record["scores"]["frechet"] - other["frechet"]
    assert record["against_teacher"]["frechet"]["difference"] == pytest.approx(wanted)
    wanted = abs(record["scores"]["texture"] - 1) - abs(other["texture"] - 1)
    assert record["against_teacher"]["texture"]["difference"] == pytest.approx(wanted)
    words = [f"model={root / 'a'}", f"teacher={root / 'a'}", "clips=64", "threads=1", "progress=false", "show=1"]
    main(evaluate, "evaluate", [*words, "seed=3", f"out={root / 'same.json'}"])
    same = json.loads((root / "same.json").read_text())["against_teacher"]
    assert {(away["difference"], away["verdict"]) for away in same.values()} == {(0.0, "no difference")}


def test_too_few_clips_are_not_ranked(measured, tmp_path, capsys):
    """The scores of both stand in the terminal all the same."""
    root, _, _ = measured
    words = [f"model={root / 'a'}", f"teacher={root / 'b'}", "clips=8", "threads=1", "progress=false", "seed=3"]
    main(evaluate, "evaluate", [*words, f"out={tmp_path / 'scores.json'}"])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["intervals"] == found["against_teacher"] == {}
    lines = capsys.readouterr().out.splitlines()
    for start, record in (f"{tmp_path}/scores.json", found), (f"teacher={root / 'b'}", found["teacher"]):
        line = next(line for line in lines if line.startswith(f"{start}: "))
        assert f" adherence {record['scores']['adherence']:.4g}, " in line
    assert found["note"] == "8 clips are too few to rank models; wanted at least 64"


def test_more_noises_than_clips(capsys):
    with pytest.raises(SystemExit):
        main(evaluate, "evaluate", ["model=tiny", "out=unused.json", "clips=4", "noises=8"])
    assert "noises=8: wanted at most clips=4; raise clips=" in capsys.readouterr().err
