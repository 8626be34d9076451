"""Two real ranks under DeepSpeed against one process without it: losses, gathers, checkpoints. gloo on the CPU."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import case_stages
import pytest
import torch
import worker
from helpers import BLOCKS, KEPT, small_wan, write_ranking
from launch import chosen, each, on_ranks
from safetensors.torch import load_file

from fastlightgen.config import method_for
from fastlightgen.engine.scores import Scores
from fastlightgen.models.families import network
from fastlightgen.models.folder.weights import save_model
from fastlightgen.planner.step import step_cost

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

DTYPES = ("float32", "bfloat16")
THREE = ["ratio=2", "lr_fake=1e-3"]
CASES = {
    "stage 0, zero 2, ema": {"stage": 0, "zero": 2, "words": ["ema=0.9"]},
    "stage 1": {"stage": 1},
    "stage 2, zero 1": {"stage": 2, "zero": 1},
    "stage 2, zero 2, accumulated": {"stage": 2, "zero": 2, "micro_batch": 1},
    "stage 2, zero 3": {"stage": 2},
    "stage 2, zero 3, accumulated": {"stage": 2, "micro_batch": 1},
    "stage 2, zero 3, all offloaded": {"stage": 2, "offload": "all"},
    "stage 2, zero 3, checkpointing, average": {"stage": 2, "words": ["checkpointing=true", "target=ema", "alpha=0.7"]},
    "stage 2, zero 3, as printed": {"stage": 2, "words": ["target=self", "kappa_unpruned=0"]},
    "stage 2, zero 3, random masks": {"stage": 2, "words": ["drop=independent"]},
    "stage 2, zero 3, token replace": {"stage": 2, "family": "hunyuan token replace"},
    "stage 3, zero 1": {"stage": 3, "zero": 1, "words": THREE},
    "stage 3, zero 2, offloaded": {"stage": 3, "zero": 2, "offload": "optimizer", "words": THREE},
    "stage 3, zero 3": {"stage": 3, "words": THREE},
    "stage 3, zero 3, lora": {"stage": 3, "words": [*THREE, "fake_mode=lora", "lora_rank=2", "ema=0.9"]},
    "stage 3, zero 3, shared rollouts": {"stage": 3, "words": [*THREE, "rollouts=shared"]},
    "stage 3, zero 2, shared rollouts, accumulated": {"stage": 3, "zero": 2, "micro_batch": 1}
    | {"words": [*THREE, "rollouts=shared", "critic_start=2"]},
    "stage 3, zero 3, one rung": {"stage": 3, "words": ["steps=1", "count=generator", "ratio=2"]},
}
SHARED = {  # both ranks work on every clip, each on half of the tokens
    "stage 0, zero 2": {"stage": 0, "zero": 2},
    "stage 1": {"stage": 1},
    "stage 2, zero 3, hunyuan, uneven": {"stage": 2, "family": "hunyuan", "size": 6},
    "stage 2, zero 3, token replace": {"stage": 2, "family": "hunyuan token replace"},
    "stage 2, zero 3, accumulated, checkpointing": {"stage": 2, "micro_batch": 2, "words": ["checkpointing=true"]},
    "stage 2, zero 2": {"stage": 2, "zero": 2, "words": ["target=ema", "alpha=0.7"]},
    "stage 3, zero 2": {"stage": 3, "zero": 2, "words": THREE},
    "stage 3, zero 3, uneven": {"stage": 3, "size": 6, "words": THREE},
    "stage 3, zero 3, shared rollouts": {"stage": 3, "words": [*THREE, "rollouts=shared"]},
    "stage 3, zero 3, lora": {"stage": 3, "words": [*THREE, "fake_mode=lora", "lora_rank=2"]},
}
CASES |= {f"{name}, shared tokens": case | {"sequence_parallel": 2} for name, case in SHARED.items()}
AVERAGED = ["target=ema", "alpha=0.7"]
LORA = [*THREE, "fake_mode=lora", "lora_rank=2", "ema=0.9"]
CYCLE = ["ratio=3", "rollouts=shared"]  # saved inside a cycle
SAVED = {
    "stage 2, saved, zero 3": {"stage": 2, "words": AVERAGED},
    "stage 2, saved, zero 1": {"stage": 2, "zero": 1, "words": AVERAGED},
    "stage 2, saved, bfloat16": {"stage": 2, "zero": 2, "dtype": "bfloat16", "micro_batch": 1},
    "stage 3, saved, lora": {"stage": 3, "words": LORA},
    "stage 3, saved, lora, shared tokens": {"stage": 3, "words": LORA, "sequence_parallel": 2},
    "stage 3, saved, shared rollouts": {"stage": 3, "zero": 2, "words": CYCLE},
    "stage 3, saved, shared rollouts, zero 3": {"stage": 3, "words": CYCLE},
    "stage 3, saved, bfloat16, offloaded": {"stage": 3, "dtype": "bfloat16", "offload": "optimizer", "words": THREE},
}
# Built from files of random float32 weights, with learning rates that move a weight by less than a step of bfloat16.
SLOW = {"dtype": "bfloat16", "steps": 8, "words": ["lr=2e-5"]}
SLOW3 = SLOW | {"stage": 3, "words": [*THREE, "lr=2e-5", "lr_fake=2e-5", "ema=0.9"]}
FILES = {
    "stage 3, zero 1": SLOW3 | {"zero": 1},
    "stage 3, zero 2": SLOW3 | {"zero": 2},
    "stage 3, zero 3": SLOW3 | {"zero": 3},
    "stage 3, zero 3, offloaded": SLOW3 | {"zero": 3, "offload": "all"},
    "stage 0, zero 3": SLOW | {"stage": 0, "zero": 3, "words": ["lr=2e-5", "ema=0.9"]},
    "stage 2, zero 2, offloaded": SLOW | {"stage": 2, "zero": 2, "offload": "optimizer"},
}
FILES = {f"from files, {name}": case | {"start": "file"} for name, case in FILES.items()}
ROUNDED = {f"rounded, zero {z}": SLOW3 | {"zero": z, "start": "rounded"} for z in (1, 2, 3)}
RESUMED = "stage 3, saved, from files"
SCORES = "stage 1, interrupted"
# Slow tests, with the cases that prove the same in less time.
SELDOM = {
    "stage 2, zero 3, accumulated": "stage 2, zero 2, accumulated; ..., accumulated, checkpointing, shared tokens",
    "stage 2, zero 3, token replace, shared tokens": "the same alone; ..., hunyuan, uneven, shared tokens",
    "stage 3, zero 3, shared rollouts": "stage 3, zero 2, shared rollouts, accumulated",
    "stage 3, zero 3, shared rollouts, shared tokens": "the same; stage 3, zero 3, uneven, shared tokens",
    "stage 3, zero 3, lora, shared tokens": "stage 3, zero 3, lora; stage 3, zero 3, uneven, shared tokens",
    "stage 3, saved, lora, shared tokens": "stage 3, saved, lora",
    "stage 3, saved, shared rollouts, zero 3": "stage 3, saved, shared rollouts",
    "stage 3, saved, bfloat16, offloaded": "stage 2, saved, bfloat16; stage 3, saved, from files",
    "from files, stage 3, zero 3, offloaded": "from files, stage 3, zero 3; from files, stage 2, zero 2, offloaded",
    "rounded, zero 3": "rounded, zero 2; from files, stage 3, zero 3",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def results(folder, request) -> dict:
    """Run the cases on two ranks, in one process group."""
    saved = {name: case | {"save": str(folder / name)} for name, case in SAVED.items()}
    save_model(small_wan(), folder / "network")
    read = {f"read, {t}": {"stage": 0, "load": str(folder / "network"), "words": [f"dtype={t}"]} for t in DTYPES}
    read["drawn"] = {"stage": 0, "load": "tiny", "words": ["offload=all"]}
    late = {"late": {"stage": 2, "late": 0.3}, SCORES: {"stage": 1, "save": str(folder / "scores")}}
    return on_ranks(2, chosen(request, CASES | saved | read | late | from_files(folder), SELDOM), folder)


def from_files(folder: Path) -> dict:
    """Write a network of random float32 weights and a ranking; return the cases that start from them."""
    net, gen = small_wan(), torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=gen)
    files = save_model(net, folder / "random", pruned_path=KEPT)
    ranking = write_ranking(folder / "importance.json")
    paths = {0: [f"init={files}"], 2: [f"model={files}", f"importance={ranking}"], 3: [f"stage2_model={files}"]}
    logged = SLOW3 | {"zero": 2, "run": str(folder / "run")}
    logged["words"] = [*SLOW3["words"], "iters=3", "log_every=2", f"run={folder / 'run'}"]
    resumed = SLOW3 | {"zero": 2, "steps": 4, "save": str(folder / RESUMED)}
    cases = FILES | ROUNDED | {"logged": logged, RESUMED: resumed}
    return {
        name: case | {"files": str(files), "words": [*paths[case["stage"]], *case["words"]]}
        for name, case in cases.items()
    }


@pytest.mark.parametrize("name", each([name for name, case in CASES.items() if case["stage"] != 1], SELDOM))
def test_losses_are_those_of_one_process(results, name):
    """Sums in float32 differ in their order. The engine promises 1e-5 for losses, gradient norms, learning rates."""
    one = worker.run(CASES[name])["records"]
    two = results[name]["records"]
    assert len(one) == len(two) and len(one) >= 4
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["stage 1", "stage 1, shared tokens"])
def test_stage_1_scores_are_those_of_one_process(results, name):
    one, two = torch.tensor(worker.run(CASES[name])["table"]), torch.tensor(results[name]["table"])
    assert torch.allclose(two, one, rtol=1e-5, atol=0)


def test_stage_1_goes_on_after_a_signal(results, folder):
    """Two ranks, a signal on one of them after 3 of the 8 walks that each makes: both stop, no score is lost."""
    done = results[SCORES]
    # 4 batches (of 2, 2, 1 and 1 clips) on 2 ranks: a walk of both gives 4 scores in the first turn, 2 in the second.
    assert done["message"] == "SIGTERM: saved 12 of 24 scores (skip); run the same command to continue"
    assert done["walks"] == 8 - 3 and done["again"] == done["whole"]  # bit-equal
    # One process goes on from the two ranks' file: their scores stay, to the bit; the rest is that of one process.
    kept = load_file(folder / "scores/interrupted.safetensors")["sweep-0000"]
    (folder / "one").mkdir()
    (folder / "one/scores.safetensors").write_bytes((folder / "scores/interrupted.safetensors").read_bytes())
    place = SimpleNamespace(scores=folder / "one/scores.safetensors")
    with Scores(place, "shapes", [], False, False).sweep(*kept.shape, "skip") as sweep:
        table = worker.scored(small_wan(), sweep)
    known = ~kept.isnan()
    assert known.sum() == 12 and torch.equal(table[known], torch.tensor(done["whole"])[known])
    assert torch.allclose(table, torch.tensor(done["whole"]), rtol=1e-5, atol=0)


def test_blocks_are_gathered_once_per_walk(results):
    """Per step N forward and K backward gathers for Stage II as printed, N for a frozen network."""
    per_step = [[2 if i in KEPT else 1 for i in range(BLOCKS)]]
    assert results["stage 2, zero 3, as printed"]["gathers"] == [[4 * n for n in row] for row in per_step]
    student, target = results["stage 2, zero 3"]["gathers"]  # both paths carry gradient
    assert student == [2 * 4] * BLOCKS and target == [4] * BLOCKS


def test_recomputing_a_block_needs_no_further_gather(results):
    student, target = results["stage 2, zero 3, checkpointing, average"]["gathers"]
    assert student == [2 * 4] * BLOCKS and target == [4] * BLOCKS


def test_the_gathers_do_not_depend_on_the_mask(results):
    """The full path runs every block, so that the order of the gathers is constant, forward and here backward."""
    student, target = results["stage 2, zero 3, random masks"]["gathers"]
    assert student == [2 * 4] * BLOCKS and target == [4] * BLOCKS


@pytest.mark.parametrize(
    "name",
    [
        "stage 2, zero 3",
        "stage 2, zero 3, as printed",
        "stage 2, zero 3, checkpointing, average",
        "stage 3, zero 3, one rung",
    ],
)
def test_the_planner_counts_the_gathers_of_real_steps(results, name):
    """The planner counts from the method's declared walks; the worker counts 4 iterations over all networks."""
    cfg = case_stages.configured(CASES[name])
    cost = network(small_wan().config, (2, 4, 4), 16)
    step = step_cost(cost, method_for(cfg).walks(cost, KEPT, cfg), cfg)
    counted = sum(sum(row) for row in results[name]["gathers"])
    assert counted == 4 * (step.total("gathers") + step.total("grad_gathers"))


def test_stage_1_gathers_each_block_once_per_sample(results):
    """4 samples (3 clips in batches of 2, at 2 times) on 2 ranks: 2 walks, for any number of candidates."""
    assert results["stage 1"]["gathers"] == [[2] * BLOCKS]


def test_the_clock_counts_the_wait_in_deepspeeds_gathers(results):
    """Rank 1 arrives 0.3 s after rank 0 has begun to wait in the gather after block 1."""
    assert results["late"]["share_collectives"] * results["late"]["sec_per_step"] > 0.25


@pytest.mark.parametrize("name", each([*SAVED, RESUMED], SELDOM))
def test_a_continued_run_is_the_uninterrupted_one(results, folder, name):
    done = results[name]
    assert done["again"] == done["records"][-len(done["again"]) :]  # bit-equal
    place = folder / name
    whole, continued = (load_file(place / n / "diffusion_pytorch_model.safetensors") for n in ("whole", "continued"))
    assert whole.keys() == continued.keys() and all(torch.equal(whole[k], continued[k]) for k in whole)
    assert len(list((place / "step-000002").glob("rank-*-of-00002.safetensors"))) == 2


@pytest.mark.parametrize("name", ["drawn", *(f"read, {t}" for t in DTYPES)])
def test_a_rank_keeps_its_partition_of_the_weights_that_it_reads(results, name):
    """Each of two ranks keeps half of every weight, padded to DeepSpeed's alignment of a few numbers."""
    found = results[name]
    assert found["same"] and found["total"] > 0
    assert all(2 * s <= found["total"] + 64 * found["parameters"] for s in found["kept"])


@pytest.mark.parametrize("name", each(FILES, SELDOM))
def test_bfloat16_training_starts_from_the_float32_values_of_the_file(results, name):
    found, stage = results[name]["found"], FILES[name]["stage"]
    assert set(found) == {0: {"teacher"}, 2: {"student"}, 3: {"student", "fake"}}[stage]
    for start in found.values():
        assert start["masters"] and start["weights"] and start["on_grid"] < 1e-3
        assert start.get("average", True)
    assert sum("average" in start for start in found.values()) == (stage != 2)


@pytest.mark.parametrize("name", each([*FILES, *ROUNDED], SELDOM))
def test_the_realised_share_shows_movement_that_rounding_loses(results, name):
    """From the file's values nothing is lost, up to chance; from rounded values most of it."""
    done, rounded = results[name], name in ROUNDED
    assert done["before"] == {}  # nothing has moved yet
    assert set(done["after"]) == {f"{role}_realised" for role in done["found"]}
    assert all(0 < share < 0.5 if rounded else 0.95 < share < 1.05 for share in done["after"].values())
    assert not rounded or all(start["on_grid"] == 1 for start in done["found"].values())


def test_the_realised_share_is_logged(results):
    """At steps 1 and 3; iters=3 ends the run. The student moves at steps 1 and 3, the critic at every step."""
    lines = results["logged"]["lines"]
    assert [line["step"] for line in lines] == [1, 3]
    assert all(0 < line[f"{role}_realised"] < 1.3 for line in lines for role in ("student", "fake"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_twenty_steps(tmp_path, ranks):
    """Equal to 1e-5 at learning rates that do not amplify rounding: Stage II's own, Stage III's times 1000."""
    words = {2: ["lr=1e-5"], 3: [*THREE, "lr=5e-4"]}
    cases = {
        f"stage {stage}, zero {zero}, {offload}": {"stage": stage, "zero": zero, "offload": offload, "steps": 20}
        | {"words": words[stage]}
        for stage in (2, 3)
        for zero, offload in ((1, "none"), (2, "none"), (3, "none"), (3, "all"))
    }
    for name, two in on_ranks(ranks, cases, tmp_path).items():
        for a, b in zip(worker.run(cases[name])["records"], two["records"], strict=True):
            assert b == pytest.approx(a, rel=1e-5, abs=1e-7), name


@pytest.mark.slow
def test_two_groups_of_two_ranks(tmp_path):
    """Each group works on half of the clips, and each of its ranks on half of their tokens."""
    cases = {name: CASES[f"{name}, shared tokens"] for name in SHARED}
    for name, four in on_ranks(4, cases, tmp_path).items():
        one = worker.run(cases[name])
        if "table" in one:
            assert torch.allclose(torch.tensor(four["table"]), torch.tensor(one["table"]), rtol=1e-5, atol=0)
            assert four["gathers"] == [[2] * BLOCKS]  # 4 samples, 2 of them in each group
        else:
            for a, b in zip(one["records"], four["records"], strict=True):
                assert b == pytest.approx(a, rel=1e-5, abs=1e-7), name


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_random_masks_for_two_hundred_steps(tmp_path, ranks):
    case = {"stage": 2, "steps": 200, "words": ["drop=independent", "lr=1e-5"]}
    done = on_ranks(ranks, {"masks": case}, tmp_path)["masks"]
    looks = 200 // 50  # held-out errors (guard_every=50) of 4 clips: one walk of each rank, with 4 / ranks clips
    assert len(done["records"]) == 200 and done["gathers"] == [[400 + looks] * BLOCKS, [200] * BLOCKS]
