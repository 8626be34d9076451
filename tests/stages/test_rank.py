"""Stage I against brute force: each candidate set is evaluated by its own forward of a network with fewer blocks."""

import copy
import json
from contextlib import contextmanager
from itertools import combinations

import pytest
import torch
from helpers import batches, config, counted_flops, empty_sweep, run_train, small_hunyuan, small_wan
from safetensors.torch import load_file

from fastlightgen.models.folder.weights import save_model
from fastlightgen.stages import rank as stage1
from fastlightgen.stages.build import Builder
from fastlightgen.stages.rank import rank
from fastlightgen.stages.scores import evaluation_set
from fastlightgen.stages.search import drop_until
from fastlightgen.stages.sweep import score_sets
from fastlightgen.world.source import ShapesSource

CONTRACT = {
    "model", "units", "baseline_score", "ranking", "kept", "pruned", "pruning_ratio", "prefix", "search",
    "score_kind", "num_samples", "seed", "data_hash",
}  # fmt: skip


class Sweeps:
    """Stands in for the scores on disk: keeps the table of each sweep."""

    def __init__(self):
        self.tables = []

    @contextmanager
    def __call__(self, sets: int, samples: int, title: str, width: int = 0):
        sweep = empty_sweep(sets, samples, width)
        self.tables.append(sweep.table)
        yield sweep


def built(cfg):
    """Build the model and the costs of its blocks as the train command does."""
    return stage1.build(cfg, Builder(cfg, ShapesSource(0), torch.device("cpu")))


def words(**keys) -> list[str]:
    return [f"{k}={v}" for k, v in ({"clips": 3, "timesteps": 2, "batch": 2} | keys).items()]


def run(cfg, model, costs=None, sweeps=None) -> dict:
    return rank(cfg, model, batches(cfg.batch), costs or [1.0] * model.num_blocks, sweeps or Sweeps())


def shorter(model, keep):
    """Return a network that has only the blocks `keep`: no masks, no shared walk."""
    return copy.deepcopy(model).double().prune(keep)


@torch.no_grad()
def brute_force(cfg, model, keep, kind: str = "elbo") -> torch.Tensor:
    """Return the errors [samples] of one block set in float64, on the same draws: Eq. 4, or Eq. 3."""
    net, whole, out = shorter(model, keep), copy.deepcopy(model).double(), []
    for x_t, t, x0, cond in evaluation_set(cfg, batches(cfg.batch)):
        x_t, t, x0, cond = (
            x_t.double(),
            t.double(),
            x0.double(),
            cond.map(lambda v: v.double() if v.is_floating_point() else v),
        )
        for b in range(len(t)):
            one = cond.map(lambda v, b=b: v[b : b + 1])
            v = net(x_t[b : b + 1], t[b : b + 1], one)[0]
            if kind == "elbo":
                out.append(((x_t[b] - t[b] * v - x0[b]) ** 2).mean())
            else:
                out.append(((v - whole(x_t[b : b + 1], t[b : b + 1], one)[0]) ** 2).mean())
    return torch.stack(out)


def without(n: int, *blocks: int) -> list[int]:
    return [i for i in range(n) if i not in blocks]


@pytest.mark.parametrize("kind", ["elbo", "output_mse"])
def test_scores_equal_separate_forwards(kind):
    model, cfg = small_wan(), config(1, *words(score=kind, ratio=0.5))
    record = run(cfg, model)
    assert record["num_samples"] == 6 and record["score_kind"] == kind and record["search"] == "single_skip"
    wanted = [brute_force(cfg, model, without(4, i), kind) for i in range(4)]
    for unit, w in zip(record["units"], wanted, strict=True):
        # The walk runs in float32, the brute force in float64.
        assert unit["score"] == pytest.approx(w.mean().item(), rel=1e-5, abs=1e-6)
        assert unit["stderr"] == pytest.approx(w.std().item() / 6**0.5, rel=1e-4, abs=1e-6)
    means = [w.mean().item() for w in wanted]
    order = sorted(range(4), key=lambda i: means[i])
    assert record["pruned"] == sorted(order[:2]) and record["kept"] == sorted(order[2:])
    assert record["ranking"] == order[::-1]
    assert record["pruning_ratio"] == 0.5 and record["prefix"] == min(order[:2])
    together = brute_force(cfg, model, record["kept"], kind).mean().item()
    assert record["pruned_score"] == pytest.approx(together, rel=1e-5)
    base = brute_force(cfg, model, range(4), kind).mean().item()
    assert record["baseline_score"] == pytest.approx(base, rel=1e-5, abs=1e-12)


def test_the_draws_are_common_stratified_and_repeatable():
    cfg = config(1, *words(clips=3, timesteps=4, seed=5))
    a, b = (list(evaluation_set(cfg, batches(cfg.batch))) for _ in range(2))
    assert all(torch.equal(x, y) for s, r in zip(a, b, strict=True) for x, y in zip(s[:3], r[:3], strict=True))
    times = torch.stack([torch.cat([a[k][1], a[4 + k][1]]) for k in range(4)])  # [stratum, clip]
    assert times.shape == (4, 3)
    u = times / (3 - 2 * times)  # undo the shift 3 t / (1 + 2 t)
    share = (u - 0.02) / 0.96 * 4
    stratum = torch.arange(4)[:, None]
    assert ((share >= stratum - 1e-5) & (share <= stratum + 1 + 1e-5)).all()
    other = list(evaluation_set(config(1, *words(clips=3, timesteps=4, seed=6)), batches(cfg.batch)))
    assert not torch.equal(a[0][1], other[0][1])


def test_iterative_is_the_hand_written_greedy():
    model, cfg = small_wan(5, seed=3), config(1, *words(search="iterative", ratio=0.6))
    gone: list[int] = []
    for _ in range(3):
        left = without(5, *gone)
        gone.append(min(left, key=lambda i: brute_force(cfg, model, without(5, *gone, i)).mean().item()))
    record = run(cfg, model)
    assert record["pruned"] == sorted(gone)
    assert record["ranking"][-3:] == gone[::-1]


def test_exhaustive_is_the_best_of_all_sets():
    model, cfg = small_wan(5, seed=3), config(1, *words(search="exhaustive", ratio=0.4))
    errors = {s: brute_force(cfg, model, without(5, *s)).mean().item() for s in combinations(range(5), 2)}
    best = min(errors, key=errors.get)
    record = run(cfg, model)
    assert record["pruned"] == list(best)
    assert record["pruned_score"] == pytest.approx(errors[best], rel=1e-5)


def test_block_calls_of_the_sweep():
    """N single skips and the full pass share their prefixes: N (N + 1) / 2 block calls instead of N^2."""
    model, cfg = small_wan(5), config(1, *words(clips=2, timesteps=1))
    model.block_calls = 0
    samples = list(evaluation_set(cfg, batches(cfg.batch)))
    score_sets(model, samples, [without(5, i) for i in range(5)] + [None], "elbo", 4.0, empty_sweep(6, 2))
    assert model.block_calls == 5 * 6 // 2
    whole = score_sets(model, samples, [without(5, i) for i in range(5)], "output_mse", 4.0, empty_sweep(5, 2))
    few = score_sets(model, samples, [without(5, i) for i in range(5)], "output_mse", 1e-9, empty_sweep(5, 2))
    assert torch.equal(whole, few)  # little memory: one candidate at a time gives the same numbers


def test_protected_blocks_stay_and_every_score_is_measured():
    model, sweeps = small_wan(5, seed=3), Sweeps()
    for search in ("single_skip", "iterative", "exhaustive"):
        cfg = config(1, *words(search=search, ratio=0.8, protect_first=1, protect_last=1))
        record = run(cfg, model, sweeps=sweeps)
        assert {0, 4} <= set(record["kept"]) and len(record["pruned"]) == 2  # one of blocks 1, 2, 3 must stay
    assert all(table.shape[1] == 6 and not table.isnan().any() for table in sweeps.tables)
    with pytest.raises(ValueError, match="protect_first, protect_last: leave 1 of 5 blocks"):
        run(config(1, *words(protect_first=2, protect_last=2)), model)


def test_the_ratio_may_count_blocks_parameters_or_flops(tmp_path):
    # Costs .4 .1 .3 .2, ratio 1/4, order 1, 3, 2, 0: the closest prefix is {1, 3}, which costs .3.
    assert drop_until([4.0, 1.0, 3.0, 2.0], [1, 3, 2, 0], 0.25, 10.0) == 2
    assert drop_until([4.0, 1.0, 3.0, 2.0], [0, 1, 3, 2], 0.1, 10.0) == 1  # at least one
    assert drop_until([1.0] * 4, [0, 1, 2, 3], 0.99, 4.0) == 3  # one stays
    folder = save_model(small_wan(), tmp_path / "m")
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    per_block = [sum(v.numel() for k, v in weights.items() if k.startswith(f"blocks.{i}.")) for i in range(4)]
    clip = ShapesSource(0).batch(0, 1)
    flops = counted_flops(small_wan(), clip.x0, torch.tensor([0.5]), clip.cond)
    for unit, wanted in (("params", per_block), ("flops", flops), ("blocks", [1.0] * 4)):
        words_ = f"model={folder}", f"ratio_unit={unit}"
        model, costs = built(config(1, *words_))
        assert costs == wanted and model.units()[2] == {"name": "blocks.2", "kind": "block", "index": 2}
    record = run(config(1, *words(ratio=0.25, ratio_unit="params")), small_wan(), costs=[1.0, 1.0, 1.0, 97.0])
    by_score = sorted(range(4), key=lambda i: record["units"][i]["score"])
    cost, dropped = 0.0, []
    for i in by_score[:-1]:  # by hand: drop in order, until the relative cost gets no closer to 1/4
        new = cost + (97 if i == 3 else 1) / 100
        if abs(new - 0.25) >= abs(cost - 0.25) and dropped:
            break
        cost, dropped = new, [*dropped, i]
    assert record["pruned"] == sorted(dropped)


def test_one_sample_has_no_spread():
    record = run(config(1, *words(clips=1, timesteps=1)), small_wan())
    assert [u["stderr"] for u in record["units"]] == [0.0] * 4 and record["baseline_stderr"] == 0.0


def test_the_command_writes_every_key_of_the_contract(tmp_path):
    folder = save_model(small_wan(), tmp_path / "m")
    keys = words(clips=2, timesteps=2)
    run_train("stage=1", f"run={tmp_path}/r", f"model={folder}", "shift=3", "seed=4", "progress=false", *keys)
    record = json.loads((tmp_path / "r/stage1/importance.json").read_text())
    assert record.keys() >= CONTRACT
    assert record["seed"] == 4 and record["model"] == str(folder) and record["num_samples"] == 4
    assert record["pruned"] and sorted(record["kept"] + record["pruned"]) == sorted(record["ranking"]) == [0, 1, 2, 3]
    assert all(u.keys() >= {"name", "kind", "index", "score", "stderr"} for u in record["units"])
    assert (tmp_path / "r/stage1/importance.png").read_bytes()[:4] == b"\x89PNG"


def by_kind(units: list[dict], kind: str) -> list[int]:
    return [u["index"] for u in sorted(units, key=lambda u: u["score"]) if u["kind"] == kind]


@pytest.mark.parametrize(("units", "dropped"), [("double", (1, 0)), ("single", (0, 2)), ("per_list", (1, 2))])
@pytest.mark.parametrize("search", ["single_skip", "iterative", "exhaustive"])
def test_a_ratio_of_each_list_of_blocks(units, dropped, search):
    model = small_hunyuan(2, 4)
    record = run(config(1, *words(clips=1, timesteps=1, ratio=0.5, units=units, search=search)), model)
    assert [u["name"] for u in record["units"][1:3]] == ["double.1", "single.0"]
    assert [sum(record["units"][i]["kind"] == k for i in record["pruned"]) for k in ("double", "single")] == [*dropped]
    if search == "single_skip":
        wanted = [i for k, n in zip(("double", "single"), dropped) for i in by_kind(record["units"], k)[:n]]
        assert record["pruned"] == sorted(wanted)
    assert sorted(record["ranking"]) == list(range(6)) and record["pruning_ratio"] == sum(dropped) / 6


def test_exhaustive_looks_at_every_pair_of_lists():
    """One of two double blocks and two of three single ones: 2 x 3 sets, each against its own shorter network."""
    model, cfg = small_hunyuan(2, 3), config(1, *words(search="exhaustive", units="per_list", ratio=0.6))
    sets = [(d, *s) for d in (0, 1) for s in combinations((2, 3, 4), 2)]
    errors = {s: brute_force(cfg, model, without(5, *s)).mean().item() for s in sets}
    record = run(cfg, model)
    assert record["pruned"] == list(min(errors, key=errors.get))
    assert record["pruned_score"] == pytest.approx(min(errors.values()), rel=1e-5)


def test_a_ratio_of_parameters_of_unlike_blocks(tmp_path):
    folder = save_model(small_hunyuan(2, 4), tmp_path / "m")
    sizes = {"double": 0, "single": 0}
    for key, v in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        kind = {"transformer_blocks": "double", "single_transformer_blocks": "single"}.get(key.split(".")[0])
        sizes |= {kind: sizes[kind] + v.numel()} if kind else {}
    words_ = words(clips=1, timesteps=1, ratio=0.5, ratio_unit="params", units="double")
    cfg = config(1, f"model={folder}", *words_)
    model, costs = built(cfg)
    assert costs == [sizes["double"] / 2] * 2 + [sizes["single"] / 4] * 4 and costs[0] > 2 * costs[2]
    assert len(run(cfg, model, costs)["pruned"]) == 1  # `ratio` counts the double blocks only


def test_units_of_a_network_with_one_list():
    with pytest.raises(
        ValueError, match=r"^units=double: this model has one list of blocks \(blocks.0, ...\); use uni"
    ):
        run(config(1, *words(units="double")), small_wan())
    with pytest.raises(ValueError, match="^units=triple: this model has the lists double, single; use one of them"):
        run(config(1, *words(units="triple")), small_hunyuan())
