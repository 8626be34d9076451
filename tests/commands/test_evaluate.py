"""The evaluate command: scores that ship with a teacher, values of each clip, intervals and paired differences."""

import json
import shutil

import pytest
from helpers import small_wan
from safetensors import safe_open
from safetensors.torch import load_file

from fastlightgen.config import main
from fastlightgen.evaluate import evaluate
from fastlightgen.models.folder.weights import save_model
from fastlightgen.world.score import scores_of
from fastlightgen.world.shapes import WORLD

NOTE = "scores that ship with this model, measured when it was trained"


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
    own = {k: v for k, v in record["scores"].items() if k != "to_teacher"}  # which needs the teacher's features too
    assert scores_of(values, 3) == pytest.approx(own, nan_ok=True)
    assert values["features"].shape[0] == 64 and values["spread"].shape == (32, 3)
    assert record["scores"]["adherence"] == pytest.approx(float(values["adherence"].mean()))


def test_files_name_the_version_of_the_world(measured):
    root, record, _ = measured
    assert record["world"] == record["teacher"]["world"] == WORLD
    with safe_open(root / "scores.values.safetensors", framework="pt") as file:
        assert file.metadata() == {"world": str(WORLD)}


@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        (["clips=64", "noises=2"], True),
        (["clips=32"], True),
        (["clips=2", "show=0"], False),
        (["clips=2", "noises=1", "steps=2"], False),
        (["clips=4", "noises=4"], False),
        (["clips=2", "seed=4"], False),
    ],
)
def test_values_that_ship_with_a_model(measured, tmp_path, asked, fits):
    """They stand for a measurement with the same plan, seed and noises, of as many clips or fewer."""
    root, record, values = measured
    shutil.copytree(root / "a", tmp_path / "a")
    shutil.copy(root / "scores.values.safetensors", tmp_path / "a" / "values.safetensors")
    shipped = {"plan": record["plan"], "seed": 3, "clips": 64, "noises": 2, "attributes": {"kind": 0.25}}
    shipped = {"world": WORLD, "records": [shipped | {"values": "values.safetensors"}]}
    (tmp_path / "a" / "scores.json").write_text(json.dumps(shipped))
    words = [f"model={tmp_path / 'a'}", f"out={tmp_path / 'found.json'}", "threads=1", "progress=false"]
    given = {"show": "1", "seed": "3"} | dict(word.split("=") for word in asked)
    main(evaluate, "evaluate", [*words, *(f"{k}={v}" for k, v in given.items())])
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["attributes"] == {"kind": 0.25}) == fits
    if fits:
        count = int(given["clips"])
        cut = {k: v[:count] for k, v in values.items() if k != "spread" or count == 64}
        assert found["scores"] == pytest.approx(scores_of(cut, 3), nan_ok=True)
        assert found["note"] == NOTE if count == 64 else "too few" in found["note"]


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


def test_too_few_clips_are_not_ranked(measured, tmp_path):
    root, _, _ = measured
    words = [f"model={root / 'a'}", f"teacher={root / 'b'}", "clips=8", "threads=1", "progress=false", "seed=3"]
    main(evaluate, "evaluate", [*words, f"out={tmp_path / 'scores.json'}"])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["intervals"] == found["against_teacher"] == {}
    assert found["note"] == "8 clips are too few to rank models; wanted at least 64"


def test_more_noises_than_clips(capsys):
    with pytest.raises(SystemExit):
        main(evaluate, "evaluate", ["model=tiny", "out=unused.json", "clips=4", "noises=8"])
    assert "noises=8: wanted at most clips=4; raise clips=" in capsys.readouterr().err
