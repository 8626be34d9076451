"""Stage III: the schedule of its updates, its rungs and ladders, what it starts from."""

import copy
import re
from pathlib import Path

import pytest
import torch
from by_hand import CPU, DOUBLE, built, exit_rung, make, roll
from helpers import KEPT, batches, config, small_wan

from fastlightgen import flow
from fastlightgen.config import ConfigError, load
from fastlightgen.engine.local import LocalEngine
from fastlightgen.models.folder.weights import save_model
from fastlightgen.rng import generator


def test_schedule_of_updates(folders):
    def roles(stage, steps):
        return [[u.role for u in stage.updates(k)] for k in range(steps)]

    outer = make(folders, "ratio=5")
    assert roles(outer, 11) == [["student", "fake"] if k % 5 == 0 else ["fake"] for k in range(11)]
    counted = make(folders, "ratio=3", "count=generator")
    assert roles(counted, 2) == [["student", "fake", "fake", "fake"]] * 2
    seen = []
    counted.rollouts.batches = lambda step: seen.append(step) or DOUBLE(0)
    for k in range(2):
        for update in counted.updates(k)[1:]:
            update.loss()
    assert seen == list(range(6))  # every critic update has its own clips


@pytest.mark.parametrize("count", ["outer", "generator"])
def test_critic_only_start(folders, count):
    """critic_start updates of the critic come before the student's first; the iterations that they take count."""
    stage = make(folders, "ratio=3", "critic_start=6", f"count={count}")
    made = [[u.role for u in stage.updates(k)] for k in range(12)]
    each = 1 if count == "outer" else 3
    assert made[: 6 // each] == [["fake"] * each] * (6 // each)
    rest = [role for roles in made[6 // each :] for role in roles]
    assert rest == (["student", "fake", "fake", "fake"] * 12)[: len(rest)]
    numbers = [u.loss.args[0] for k in range(12) for u in stage.updates(k) if u.role == "student"]
    assert numbers == list(range(len(numbers))) and len(numbers) >= 2  # the student's updates count from 0


def test_a_start_that_never_ends_is_refused(folders):
    for words, message in (
        (["critic_start=7"], "critic_start=7: wanted a multiple of ratio=5; give critic_start=5"),
        (
            ["critic_start=20", "iters=20"],
            "critic_start=20: iters=20 leaves no update of the student, which follows 20 of the critic; give "
            "critic_start=0, or iters=21 or more",
        ),
        (
            ["critic_start=20", "iters=4", "count=generator"],
            "critic_start=20: iters=4 leaves no update of the student, which follows 20 of the critic; give "
            "critic_start=0, or iters=5 or more",
        ),
    ):
        with pytest.raises(ConfigError, match=f"^{message}$"):
            config(3, *folders, *words)
    config(3, *folders, "critic_start=20", "iters=21")
    config(3, *folders, "critic_start=20", "iters=5", "count=generator")
    for model, said in (
        ("tiny", "iters=21 or more (critic_start comes from configs/model/tiny.yaml)"),
        ("wan2.1-t2v-1.3b", "iters=101 or more (critic_start comes from configs/stage3.yaml)"),
    ):
        with pytest.raises(ConfigError, match=f"{re.escape(said)}$"):
            load(["stage=3", f"model={model}", "iters=20"])


@pytest.mark.parametrize("words", [[], ["critic_start=4"], ["count=generator", "critic_start=4"]], ids=" ".join)
def test_shared_clips_are_those_of_the_current_student(folders, words):
    """While student and critic train, every update sees what the student makes now; a cycle has one batch."""
    stage = make(folders, "rollouts=shared", "ratio=2", "lr=0.01", "lr_fake=0.01", *words)
    rollouts, prompts, seen = stage.rollouts, [], []
    rollouts.batches = lambda step: prompts.append(step) or DOUBLE(step)
    made = rollouts.for_student, rollouts.for_critic

    def spy(which, purpose):
        def clips(number, gen):
            got, j = made[which](number, gen), exit_rung(stage.cfg, purpose, number, gen)
            wanted = roll(stage, DOUBLE(prompts[-1]), generator(0, 13, prompts[-1]), j)
            assert torch.equal(got.x_hat, wanted) and got.x_hat.requires_grad == (purpose == 5)
            seen.append((purpose, prompts[-1]))
            return got

        return clips

    rollouts.for_student, rollouts.for_critic = spy(0, 5), spy(1, 6)
    engine = LocalEngine(CPU, "float32")
    engine.prepare(stage)
    for step in range(4 if "count=generator" in words else 8):
        for update in stage.updates(step):
            engine.apply(update, step)
    start = [(5, 0)] if not words else []  # the first student has a walk of its own if no critic came before it
    first = 0 if words else 1
    cycles = [(role, k) for k in range(first, 4 + first) for role in (6, 6, 5)]
    if words:  # 4 updates of the critic first: two walks, the student takes the second one
        cycles.remove((5, 0))
    assert seen == (start + cycles)[: len(seen)] and len(seen) >= 9
    assert prompts == sorted(set(prompts))  # each walk reads its batch once


@pytest.mark.parametrize(
    "words, lr",
    [([], 4e-7), (["fake_mode=lora"], 5e-5), (["lr_fake=3e-6"], 3e-6), (["fake_mode=lora", "lr_fake=3e-6"], 3e-6)],
    ids=str,
)
def test_the_critic_has_the_learning_rate_of_its_mode(folders, words, lr, capsys):
    stage = make(folders, *words, "lr=1e-6")
    assert (stage.roles["student"].lr, stage.roles["fake"].lr) == (1e-6, lr)
    assert f"learning rates: student 1e-06, critic {lr:g}\n" in capsys.readouterr().out
    engine = LocalEngine(CPU, "float32")
    engine.prepare(stage)
    assert engine.apply(stage.updates(1)[0], 1)["fake_lr"] == lr


@pytest.mark.parametrize("mode", ["copy", "lora"])
def test_training_moves_only_the_trained(folders, mode):
    stage = make(
        folders, f"fake_mode={mode}", "strong=original", "ratio=1", "lr=0.01", "lr_fake=0.01", "weight_decay=0.5"
    )
    nets = stage.nets
    trained = {id(p) for n in (nets.student, nets.fake_trained) for p in n.parameters()}
    frozen = [p for n in (nets.teacher, nets.fake_net, nets.original) for p in n.parameters() if id(p) not in trained]
    before, student = [p.clone() for p in frozen], copy.deepcopy(nets.student.state_dict())
    engine = LocalEngine(CPU, "float32")
    engine.prepare(stage)
    for step in range(2):
        for update in stage.updates(step):
            engine.apply(update, step)
    assert all(
        torch.equal(p, b) and p.grad is None and not p.requires_grad for p, b in zip(frozen, before, strict=True)
    )
    assert all(not torch.equal(v, student[k]) for k, v in nets.student.state_dict().items())


def test_what_the_networks_start_from(folders):
    """Student and critic start bit-equal to the Stage II network's pruned path; fresh adapters change nothing."""
    x_t, t, cond, _ = small_wan().example_inputs(2)
    for words in (("fake_mode=copy",), ("fake_mode=lora",), ("fake_arch=full",), ("fake_mode=lora", "fake_arch=full")):
        stage = make(folders, *words, moved=0.0)
        nets, x = stage.nets, x_t.double()
        wanted = nets.teacher(x, t, cond, KEPT)
        assert torch.equal(nets.student(x, t, cond), wanted) and nets.student.num_blocks == len(KEPT)
        assert torch.equal(nets.fake(x, t, cond), nets.teacher(x, t, cond) if "fake_arch=full" in words else wanted)
        assert (nets.fake_net is nets.teacher) == ("fake_mode=lora" in words)


def rungs(folders, monkeypatch, count: int, *words: str, moved: float = 0.05) -> list[int]:
    """Return the rungs at which `count` updates of the student leave the ladder, from the times of its network."""
    stage = make(folders, *words, moved=moved)
    batch, seen = batches(stage.cfg.batch)(0), []
    stage.rollouts.batches = lambda step: batch
    monkeypatch.setattr(flow, "rollout", lambda predict, x, times, *rest: seen.append(times[-1]) or x)
    for g in range(count):
        stage.rollouts.for_student(g, generator(stage.cfg.seed, 5, 5 * g))
    monkeypatch.undo()
    return [stage.times.index(t) for t in seen]


def test_cycled_rungs_get_equally_many_updates(folders, monkeypatch):
    """Every cycle of 4 updates has each rung once, in changing orders."""
    found = rungs(folders, monkeypatch, 48)
    cycles = [tuple(found[i : i + 4]) for i in range(0, 48, 4)]
    assert all(sorted(cycle) == [0, 1, 2, 3] for cycle in cycles) and len(set(cycles)) > 4
    assert {rung for g, rung in enumerate(found) if g % 2 == 0} == {0, 1, 2, 3}  # the log may show every second update
    assert sorted(rungs(folders, monkeypatch, 3, "steps=3")) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["cycled", "random"])
def test_exit_rung_depends_on_seed_and_update_alone(folders, monkeypatch, kind):
    a = rungs(folders, monkeypatch, 40, f"rungs={kind}")
    assert a == rungs(folders, monkeypatch, 40, f"rungs={kind}", "batch=5", "fake_mode=lora", moved=0.5)
    assert a == rungs(folders, monkeypatch, 40, f"rungs={kind}", "rollout=data")
    assert a != rungs(folders, monkeypatch, 40, f"rungs={kind}", "seed=1")


def test_random_rungs_are_uniform(folders, monkeypatch):
    found = rungs(folders, monkeypatch, 200, "rungs=random")
    counts = [found.count(j) for j in range(4)]
    assert all(abs(c - 50) < 3 * (200 * 3 / 16) ** 0.5 for c in counts), counts  # three standard deviations


@pytest.mark.parametrize("steps", range(1, 9))
def test_ladders(folders, tmp_path, steps):
    stage = make(folders, f"steps={steps}", "shift=5")
    wanted = [5 * u / (1 + 4 * u) for u in (1 - i / steps for i in range(steps))]
    assert stage.times == pytest.approx(wanted) and stage.times[0] == 1
    assert stage.student_loss(0)[0].item() > 0


def test_build_says_what_is_missing(folders, tmp_path):
    with pytest.raises(ValueError, match="there is no Stage II model; run stage=2"):
        built(config(3, folders[1], f"run={tmp_path}"))
    with pytest.raises(ValueError, match="names no pruned_path; wanted a model that stage=2 made"):
        built(config(3, folders[1], folders[1].replace("model=", "stage2_model=")))


def test_the_student_starts_from_another_model_of_the_same_network(folders, tmp_path):
    stage2 = Path(folders[0].split("=")[1])

    def saved(name: str, net, keep) -> Path:
        return save_model(net, tmp_path / name, pruned_path=keep)

    other = saved("other", small_wan(seed=3), KEPT)
    stage, (x_t, t, cond, _) = built(config(3, *folders, f"start_model={other}")), small_wan().example_inputs(2)
    with torch.no_grad():
        for net, seed in ((stage.nets.student, 3), (stage.nets.fake_net, 1)):
            assert torch.equal(net(x_t, t, cond), small_wan(seed=seed)(x_t, t, cond, KEPT))
        assert torch.equal(stage.nets.teacher(x_t, t, cond), small_wan(seed=1)(x_t, t, cond))
    values = dict(stage.roles["student"].file_values())  # masters of a bfloat16 run
    wanted = small_wan(seed=3).prune(KEPT).state_dict()
    assert values.keys() == wanted.keys() and all(torch.equal(values[k], wanted[k]) for k in wanted)

    for start, message in (
        (tmp_path / "none", "start_model=.*none: there is no model folder; give one that stage=2 made"),
        (
            saved("deep", small_wan(blocks=5), KEPT),
            f"start_model=.*deep: num_layers is 5, wanted 4 as in {stage2}; give a model of the same network",
        ),
        (
            saved("path", small_wan(), [0, 1]),
            r"start_model=.*path: its pruned path keeps blocks \[0, 1\], wanted \[0, 3\] as in .*stage2; "
            "give a model that was made with the same importance=",
        ),
        (saved("teacher", small_wan(), None), "teacher/fastlightgen.json: names no pruned_path"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            built(config(3, *folders, f"start_model={start}"))
        assert "\n" not in str(error.value)
