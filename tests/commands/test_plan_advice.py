"""What the plan command says about a run that does not fit or is long, and the names of GPUs that it knows."""

import pytest

from fastlightgen.config import GPUS, Plan, load, main, preset
from fastlightgen.config.gpus import known_gpu
from fastlightgen.plan import plan
from fastlightgen.planner.budget import budget, load_network


def planned(cfg: Plan):
    return budget(load_network(preset(cfg.model)["network"], preset(cfg.model)["inference"]["size"], 0), cfg)


def run(*words: str) -> None:
    main(plan, "plan", list(words))


def test_a_run_that_cannot_fit_names_machines_on_which_it_does(capsys):
    """The command exits with 1; each machine that it names, with its keys, is a plan that fits."""
    words = ["gpu=4090", "gpus=1"]
    with pytest.raises(SystemExit) as stop:
        run(*words)
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("  no key makes it fit into 24 GB; it fits with")
    assert stop.value.code == 1 and lines[at + 1].startswith("  gpus=8 ") and lines[at + 2].startswith("  gpu=h100 ")
    for line in lines[at + 1 : at + 3]:
        changes, _, peak = line.strip().partition(": ")
        given = dict(w.split("=") for w in [*words, *changes.split()])
        cfg = load([f"{k}={v}" for k, v in given.items()], "plan")
        b = planned(cfg)
        assert b.peak < GPUS[cfg.gpu].memory and f"{b.peak / 1e9:.1f}" == peak.split()[0]
    assert lines[-1].endswith("recipe is 8 x h100: config=configs/recipes/wan2.1-14b-480p-8x80gb.yaml")


def test_adapters_are_the_last_advice(capsys):
    """Stage III of Wan 14B on a card of 24 GB: with every other key it does not fit, with adapters it does."""
    words = ["stage=3", "model=wan2.1-t2v-14b", "gpu=4090", "gpus=1", "micro_batch=1"]
    with pytest.raises(SystemExit):
        run(*words)
    lines = capsys.readouterr().out.splitlines()
    changes = lines[lines.index("to make it fit, cheapest first, each on top of those before:") + 1 : -1]
    keys = [line.split()[0] for line in changes]
    assert keys == ["offload=optimizer", "fake_mode=lora", "offload=all", "student_mode=lora"]
    peaks = [planned(load([*words, *keys[1:n]], "plan")).peak for n in (3, 4)]
    assert peaks[0] > GPUS["4090"].memory > peaks[1]


def test_one_card_is_told_of_host_memory_not_of_a_larger_card(capsys):
    """Wan 1.3B in one process does not fit 24 GB; DeepSpeed with AdamW in host memory does. No default is suggested."""
    with pytest.raises(SystemExit) as stop:
        run("stage=2", "model=wan2.1-t2v-1.3b", "gpus=1", "gpu=rtx4090", "engine=local", "micro_batch=1")
    out = capsys.readouterr().out
    assert stop.value.code == 1 and "  engine=deepspeed offload=optimizer  " in out and "18.1 GB" in out
    assert "zero=3" not in out and "no key makes it fit" not in out and "in 1 hosts" not in out
    assert "recipe: config=configs/recipes/wan2.1-1.3b-1x24gb.yaml is made for 1 x 4090" in out


def test_a_recipe_for_clips_of_another_size_says_so(capsys):
    with pytest.raises(SystemExit):
        run("gpus=8", "size=720x1280x81")
    out = capsys.readouterr().out
    assert out.endswith("configs/recipes/wan2.1-14b-480p-8x80gb.yaml is made for 8 x h100 with clips of 480x832x81\n")


def test_a_run_of_weeks_names_shorter_ones(capsys):
    """Stage II of Wan 14B on 8 GPUs: the recipe for 16 takes half the time, and a week holds 7/13 of the iterations."""
    run("stage=2", "gpus=8", "offload=optimizer", "micro_batch=1")
    out = capsys.readouterr().out
    b = planned(load(["stage=2", "gpus=8", "offload=optimizer", "micro_batch=1"], "plan"))
    assert f"{b.days:.0f} days are long. Shorter:" in out and 13 < b.days < 13.2
    assert f"config=configs/recipes/wan2.1-14b-480p-16x80gb.yaml: {b.days / 2:.1f} days on 16 x h100" in out
    assert f"iters={int(4000 * 7 / b.days)}: a week, for 53% of the run" in out and "8x80gb" not in out
    run("stage=2", "gpus=16")
    assert "long" not in capsys.readouterr().out


def test_groups_of_candidates_are_explained(capsys):
    """40 blocks take 40 x 41 / 2 evaluations in one walk; a group of 5 candidates walks its common blocks again."""
    run("stage=1")
    out = capsys.readouterr().out
    assert "992.0 per clip (820 if memory=4 held all candidates: each group walks its first blocks again)" in out
    run("stage=1", "memory=1000", "gpu=h200")
    assert " 820.0 per clip\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("h100", "h100"),
        ("H100-80GB", "h100"),
        ("h200", "h200"),
        ("a100", "a100-80"),
        ("a100-40", "a100-40"),
        ("A100-80GB", "a100-80"),
        ("rtx4090", "4090"),
        ("RTX 5090", "5090"),
        ("l40s", "l40s"),
        ("b200", "b200"),
        ("mi300x", "mi300x"),
        ("a100-60", None),
        ("h1000", None),
        ("v100", None),
    ],
)
def test_names_of_gpus(name, kind):
    assert known_gpu(name) == kind
