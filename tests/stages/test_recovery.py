"""search=calibrated: candidates by hand, the choice against all sets, and a run whose recoveries are run by hand."""

import json
import os
import signal
from itertools import combinations
from pathlib import Path

import pytest
import torch
from helpers import batches, config, error_line, run_train, small_wan
from torch import Tensor

from fastlightgen import plan
from fastlightgen.config import ConfigError, main
from fastlightgen.engine.folder import read_run
from fastlightgen.models.families import network
from fastlightgen.models.folder.weights import load_model, save_model
from fastlightgen.planner.step import step_cost
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages.rank import rank, walks
from fastlightgen.stages.recovery import chosen
from fastlightgen.stages.search import candidates, swaps
from fastlightgen.world.source import ShapesSource

MEAN = [5.0, 1.0, 2.0, 3.0, 9.0, 4.0]  # single skips of 6 blocks: 1, 2, 3 are the least harmful
SWEEP = ["clips=2", "timesteps=1", "batch=2", "ratio=0.5"]


def sums(keeps, title) -> Tensor:
    """Blocks 1 and 2 together are bad, 1 and 5 are good: the single skips do not show it."""
    errors = []
    for keep in keeps:
        gone = [i for i in range(6) if i not in keep]
        errors.append(sum(MEAN[i] for i in gone) + 10 * ({1, 2} <= set(gone)) - 3 * ({1, 5} <= set(gone)))
    return torch.tensor(errors)[:, None]


def test_the_candidates_by_hand():
    free, counts = [[0, 1, 2, 3, 5]], [3]  # block 4 is protected
    assert sorted(map(sorted, swaps(free, [1, 2, 3], MEAN))) == [[0, 1, 2], [0, 1, 3], [1, 2, 5], [1, 3, 5]]
    # Iterative: 1 (error 1), then 5 (1 + 4 - 3) before 3 (4), then 3.
    found = candidates(4, 6, free, counts, MEAN, sums, True)
    assert [c["pruned"] for c in found[:2]] == [[1, 2, 3], [1, 3, 5]]
    assert [c["score"] for c in found[:2]] == [1 + 2 + 3 + 10, 1 + 3 + 4 - 3]
    # Swaps of 1, 2, 3 as above; of 1, 3, 5: 0 or 2 for 3 or 5. Left are 0 1 2, 0 1 3, 1 2 5, 0 1 5.
    assert [(c["pruned"], c["score"]) for c in found[2:]] == [([0, 1, 5], 7.0), ([0, 1, 3], 9.0)]
    assert len(candidates(2, 6, free, counts, MEAN, sums, True)) == 2
    alone = candidates(3, 6, free, counts, MEAN, None, True)  # scores of single blocks: their sum
    assert [(c["pruned"], c["score"]) for c in alone] == [([1, 2, 3], 6), ([1, 2, 5], 7), ([1, 3, 5], 8)]


def test_swaps_stay_in_their_list():
    """Double blocks 0 and 1, single blocks 2 to 5; one of each list is dropped."""
    found = sorted(map(sorted, swaps([[0, 1], [2, 3, 4, 5]], [1, 2], MEAN)))
    assert found == [[0, 2], [1, 3], [1, 5]]


def test_the_choice_among_all_sets_is_the_best_of_them():
    """With room for all 6 sets of 2 of 4 blocks: the choice is the exhaustive one, whatever the scores say."""
    record = {"units": [{"score": s} for s in MEAN[:4]], "pruned_score": 0.0, "pruned": []}
    found = candidates(9, 4, [[0, 1, 2, 3]], [2], MEAN[:4], lambda keeps, title: torch.rand(len(keeps), 1), True)
    sets = list(combinations(range(4), 2))
    assert sorted(tuple(c["pruned"]) for c in found) == sets
    for best in sets:
        errors = [0.5 if tuple(c["pruned"]) == best else 1.0 + i for i, c in enumerate(found)]
        one = chosen(record | {"candidates": found}, errors)
        kept = [i for i in range(4) if i not in best]
        assert (one["pruned"], one["kept"], one["prefix"], one["pruning_ratio"]) == ([*best], kept, best[0], 0.5)
        order = sorted(kept, key=lambda i: -MEAN[i]) + sorted(best, key=lambda i: -MEAN[i])
        assert one["ranking"] == order and [c["recovered"] for c in one["candidates"]] == errors
    nan = chosen(record | {"candidates": found[:2]}, [float("inf"), 2.0])
    assert nan["pruned"] == found[1]["pruned"] and nan["candidates"][0]["recovered"] is None
    with pytest.raises(ValueError, match="^search=calibrated: no candidate has a finite error after its recovery"):
        chosen(record | {"candidates": found[:1]}, [float("inf")])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return (
        f"model={save_model(small_wan(seed=3), tmp_path_factory.mktemp('m') / 'm', steps=2, guidance=2.0, shift=3.0)}"
    )


OWN = ["iters=3", "lr=1e-3", "batch=2", "betas=[0.5,0.9]", "shift=3"]
RECOVERY = ",".join(OWN)


def command(teacher: str, run: Path) -> list[str]:
    words = ["stage=1", teacher, *SWEEP, "search=calibrated", "candidates=2", f"recovery={RECOVERY}", "shift=3"]
    return [*words, f"run={run}", "progress=false", "threads=1"]


def held_out_error(model: Path, keep: list[int]) -> float:
    """Eq. 4 in float64 of a shorter network on the 32 held-out clips, at stratified times."""
    net, batch = load_model(model).double().prune(keep), ShapesSource(0).held_out(0, 32)
    u = torch.linspace(0.02, 0.98, 32)
    t = (3 * u / (1 + 2 * u)).double()
    noise, x0 = normal_like(batch.x0, generator(0, 4)).double(), batch.x0.double()
    at = t.view(-1, 1, 1, 1, 1)
    x_t = (1 - at) * x0 + at * noise
    with torch.no_grad():
        v = net(x_t, t, batch.cond.map(lambda x: x.double() if x.is_floating_point() else x))
    return (x_t - at * v - x0).square().mean().item()


def test_a_run_recovers_as_stage_2_does(teacher, tmp_path, monkeypatch, capsys):
    """Each recovery by the command of Stage II, its error by hand; a run that is cut goes on to the same ranking."""
    run_train(*command(teacher, tmp_path / "run"))
    said = capsys.readouterr().out
    assert "search=calibrated: then trains 2 candidates for 3 steps each: less than 10 s" in said
    assert sorted(p.name for p in (tmp_path / "run/stage1").iterdir()) == ["importance.json", "importance.png"]
    record = json.loads((tmp_path / "run/stage1/importance.json").read_text())
    errors = []
    for number, candidate in enumerate(record["candidates"]):
        kept = [i for i in range(4) if i not in candidate["pruned"]]
        ranking = tmp_path / f"{number}.json"
        ranking.write_text(json.dumps(record | {"kept": kept, "pruned": candidate["pruned"]}))
        words = ["stage=2", teacher, f"run={tmp_path}/{number}", f"importance={ranking}", *OWN]
        run_train(*words, "guided=1", "warmup=10", "sample_every=0", "progress=false", "threads=1")
        errors.append(held_out_error(tmp_path / f"{number}/stage2/model", kept))
        assert candidate["recovered"] == pytest.approx(errors[-1], rel=1e-5)  # float32 against float64
    best = min(range(2), key=errors.__getitem__)
    assert len(set(errors)) == 2 and record["pruned"] == record["candidates"][best]["pruned"]
    assert record["pruned_score"] == record["candidates"][best]["score"] and record["search"] == "calibrated"

    steps, real = [], torch.optim.AdamW.step

    def count(at: int):
        steps.clear()

        def step(self, *args):
            steps.append(1)
            if len(steps) == at:
                os.kill(os.getpid(), signal.SIGINT)
            return real(self, *args)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)

    count(5)  # the second step of the second candidate
    cut = command(teacher, tmp_path / "cut")
    with pytest.raises(SystemExit):
        run_train(*cut)
    assert capsys.readouterr().err.startswith("SIGINT: saved step 2 of 3; run the same command to continue")
    assert read_run(tmp_path / "cut/stage1/candidate-1")["stage2"]["guided"] == 1.0
    assert not (tmp_path / "cut/stage1/candidate-0").exists()
    line = error_line(capsys, run_train, *cut, "recovery=iters=9")
    assert "was made with another configuration (recovery:" in line
    count(0)
    run_train(*cut)
    assert len(steps) == 1
    assert json.loads((tmp_path / "cut/stage1/importance.json").read_text()) == record
    assert sorted(p.name for p in (tmp_path / "cut/stage1").iterdir()) == ["importance.json", "importance.png"]


@pytest.mark.parametrize("score", ["elbo", "taylor"])
def test_the_planner_counts_the_sweep(score):
    """The sets near the best are those of one base set here; an iterative set of its own has up to 4 more."""
    model, cfg = small_wan(5, seed=3).requires_grad_(False), config(1, *SWEEP, f"score={score}", "search=calibrated")
    cost = network(model.config, (2, 4, 4), 16)
    tables = []

    class Open:
        def __init__(self, sets, samples, title, width=0):
            from helpers import empty_sweep

            tables.append(empty_sweep(sets, samples))

        def __enter__(self):
            return tables[-1]

        def __exit__(self, *_):
            return None

    record = rank(cfg, model, batches(2), [1.0] * 5, Open)
    planned = step_cost(cost, walks(cost, [], cfg), cfg)
    if score == "taylor":
        assert tables == [] and planned.total("calls") == 5 and len(record["candidates"]) == 4
        return
    sets = [len(sweep.table) for sweep in tables]
    assert sets[:-1] == [6, 5, 4, 3] and sets[-1] in (5, 6, 7, 8, 9)
    assert [len(p.routes) for p in walks(cost, [], cfg).walks] == [6, 5, 4, 3, 5]


def test_the_plan_states_the_recoveries(tmp_path, capsys):
    """They are Stage II with as many steps as all recoveries have, after the sweep; their days count in the total."""
    machine = ["model=wan2.1-t2v-1.3b", "gpus=8", "size=480x832x17"]
    own = ["search=calibrated", "candidates=3", "recovery=iters=50,checkpointing=true"]
    alone = ["iters=150", "warmup=10", "guided=1", "checkpointing=true", "dropped=0.3"]
    found = {}
    for name, words in (
        ("one", ["stage=1", *own]),
        ("two", ["stage=2", *alone]),
        ("all", ["stage=all", *(f"stage1.{w}" for w in own), "stage2.checkpointing=true", "stage3.checkpointing=true"]),
    ):
        main(plan.plan, "plan", [*words, *machine, f"out={tmp_path / name}.json"])
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    said = capsys.readouterr().out
    assert "then search=calibrated trains 3 sets of blocks, here as one run of Stage II:" in said
    assert found["one"]["recovery"]["plan"] == found["two"]["plan"]
    assert found["two"]["plan"]["iters"] == 150
    parts = [*found["all"]["stages"], found["all"]["stages"][0]["recovery"]]
    days = sum(part["plan"]["gpu_days"] for part in parts)
    assert f"{days:.1f} GPU-days; the largest peak" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recovery=iters=9"], "recovery=iters=9: belongs to search=calibrated, not search=single_skip"),
        (
            ["search=calibrated", "recovery=iters"],
            "recovery=iters: iters: wanted keys like iters=200,lr",
        ),
        (["search=calibrated", "recovery=seed=3"], "recovery=seed=3: seed: is set by the search; give keys of stage=2"),
        (["search=calibrated", "recovery=lr=x"], "recovery=lr=x: lr=x: "),
        (["search=calibrated", "recovery=rate=1"], "recovery=rate=1: rate=1: unknown key"),
        (["search=calibrated", "candidates=1"], "candidates=1: "),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(ConfigError) as error:
        config(1, *words)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
