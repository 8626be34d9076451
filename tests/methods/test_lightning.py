"""method=lightning against its formulas in float64, its walks against a real step, and as a command."""

import copy
import json

import pytest
import torch
from helpers import (
    BLOCKS,
    KEPT,
    NETWORK,
    assert_same,
    batches,
    result,
    run_train,
    small_hunyuan,
    small_wan,
    write_ranking,
)
from method_cases import (
    OWN,
    TEACHER,
    built,
    compare_with_plan,
    fixed,
    hidden_states,
    planned,
    with_gradient,
    without_gradient,
)

from fastlightgen.config import ConfigError, load, main
from fastlightgen.engine.log import read_metrics
from fastlightgen.methods.lightning import aligned_pairs, alignment_loss, layer_alignment, output_alignment
from fastlightgen.models.config import NetworkConfig
from fastlightgen.models.families import build
from fastlightgen.models.folder.weights import load_model, read_card, save_model
from fastlightgen.plan import plan
from fastlightgen.rng import generator, normal_like

DOUBLE = batches(2, torch.float64)


@pytest.fixture
def words(tmp_path) -> list[str]:
    save_model(small_wan(seed=TEACHER), tmp_path / "teacher", guidance=OWN, steps=2, shift=3.0)
    return of(tmp_path)


def of(folder) -> list[str]:
    ranking = write_ranking(folder / "importance.json")
    own = ["stage=2", "method=lightning", f"model={folder / 'teacher'}", f"importance={ranking}"]
    return [*own, f"run={folder / 'run'}", "prune_heads=1", "clips=2", "iters=4", "align_every=2", "warmup=0"]


def test_the_alignment_by_hand():
    gen = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    v, v_teacher, x0, noise = draw(4, 2, 3, 2, 4, 4)
    h, h_teacher = draw(2, 2, 5, 8), draw(2, 2, 5, 8)
    fm = sum(((v[b] - (noise[b] - x0[b])) ** 2).sum() for b in range(2)) / v.numel()
    output = sum(((v[b] - v_teacher[b]) ** 2).sum() for b in range(2)) / v.numel()
    layers = sum(((h[i] - h_teacher[i]) ** 2).sum() / 80 for i in range(2))
    assert output_alignment(v, v_teacher).item() == pytest.approx(output.item(), rel=1e-12)
    assert layer_alignment(list(h), list(h_teacher)).item() == pytest.approx(layers.item(), rel=1e-12)
    loss = alignment_loss(v, v_teacher, list(h), list(h_teacher), x0, noise, 0.7, 1.3)
    assert loss.item() == pytest.approx((fm + 0.7 * output + 1.3 * layers).item(), rel=1e-12)
    assert alignment_loss(v, v_teacher, [], [], x0, noise, 1.0, 1.0).item() == pytest.approx((fm + output).item())


def test_which_layers_are_aligned():
    """Every fifth of 30 blocks; a student without some of them follows what its next block read in the teacher."""
    assert aligned_pairs(range(30), 30, 5) == {4: 4, 9: 9, 14: 14, 19: 19, 24: 24, 29: 29}
    assert aligned_pairs([0, 1, 5, 6, 9], 12, 1) == {0: 0, 1: 4, 2: 5, 3: 8, 4: 11}
    assert aligned_pairs([0, 1, 5, 6, 9], 12, 2) == {1: 4, 3: 8}
    assert aligned_pairs(range(4), 4, 5) == {}


@pytest.mark.parametrize("more", [[], ["student=pruned", "align_every=1"]], ids=" ".join)
def test_the_loss(words, more):
    """Steps 0 and 1 align, steps 2 and 3 are flow matching alone."""
    stage = built(*words, *more, "text_dropout=0", "align_output=0.7", "align_layers=1.3")
    teacher, student = small_wan(seed=TEACHER).double(), copy.deepcopy(stage.net)
    pairs = {0: 2, 1: 3} if more else {1: 1, 3: 3}
    for step in range(4):
        batch, gen = DOUBLE(step), generator(0, 26, step)
        u = torch.rand(2, generator=gen)
        t = (3 * u / (1 + 2 * u)).double()
        torch.rand(2, generator=gen)  # which prompts are dropped: none
        noise = normal_like(batch.x0, gen)
        at = t.view(-1, 1, 1, 1, 1)
        x_t = (1 - at) * batch.x0 + at * noise
        v, h = hidden_states(student, x_t, t, batch.cond)
        by_hand = (v - (noise - batch.x0)).square().mean()
        if step < 2:
            with torch.no_grad():
                v_teacher, h_teacher = hidden_states(teacher, x_t, t, batch.cond)
            by_hand = by_hand + 0.7 * (v - v_teacher).square().mean()
            by_hand = by_hand + 1.3 * sum((h[i] - h_teacher[j]).square().mean() for i, j in pairs.items())
        stage.teacher.block_calls = 0
        loss, record = stage.loss(step)
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
        assert stage.teacher.block_calls == (BLOCKS if step < 2 else 0)
        assert set(record) == ({"align_output", "align_layers"} if step < 2 else set())
        hand = torch.autograd.grad(by_hand, list(student.parameters()))
        loss.backward()
        assert with_gradient(stage.net) and without_gradient(stage.teacher)
        for p, g in zip(stage.net.parameters(), hand, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-9 + 1e-6 * g.abs().max().item())
        stage.net.zero_grad()


@pytest.mark.parametrize(
    "more", [[], ["student=pruned", "prune_heads=0"], ["prune_ffn=0.25", "checkpointing=true"]], ids=" ".join
)
def test_the_planner_counts_a_real_step(words, more):
    stage = built(*words, *more, "align=1", "text_dropout=0", dtype=torch.float32)
    cost = compare_with_plan(stage)
    assert cost.total("calls") == BLOCKS + (len(KEPT) if "student=pruned" in more else BLOCKS)


def test_the_planner_counts_both_parts(words):
    """Half of the steps walk the teacher; without alignment it is not held."""
    stage = built(*words, "align=0.5", dtype=torch.float32)
    assert stage.teacher is not None
    cost = compare_with_plan_of(stage, {0: 2 * BLOCKS, 3: BLOCKS})
    assert cost.total("calls") == 1.5 * BLOCKS
    assert built(*words, "align=0", dtype=torch.float32).frozen == []


def compare_with_plan_of(stage, calls):
    """Assert the block evaluations of single steps; return the plan."""
    fixed(stage)
    for step, wanted in calls.items():
        stage.net.block_calls = stage.teacher.block_calls = 0
        stage.loss(step)
        assert stage.net.block_calls + stage.teacher.block_calls == wanted
    return planned(stage)


@pytest.mark.parametrize("student", ["full", "pruned"])
def test_hunyuan_is_planned_and_trains(tmp_path, student):
    save_model(small_hunyuan(seed=TEACHER, num_attention_heads=3), tmp_path / "teacher", guidance=OWN, shift=3.0)
    words = [*of(tmp_path), f"student={student}", "align=1", "align_every=1", "text_dropout=0"]
    keep = [0, 2, 3]  # of 2 double and 3 single blocks
    write_ranking(tmp_path / "importance.json", [1, 4], 5)
    stage = built(*words, dtype=torch.float32)
    assert (stage.net.cfg.heads, stage.net.cfg.mlp_ratio, stage.net.cfg.dim) == (2, 1.5, 24)
    assert stage.pairs == ({0: 1, 1: 2, 2: 4} if student == "pruned" else {i: i for i in range(5)})
    compare_with_plan(stage, keep)


def test_a_killed_run_continues_with_the_same_bits(words, tmp_path, monkeypatch):
    """It does not measure the saliency again: the network that it prunes is already there."""
    words = [*words, "save_every=2", "keep=1", "log_every=1", "progress=false", "threads=1", "batch=2", "shift=3"]
    run_train(*words, f"run={tmp_path / 'whole'}")
    step, calls = torch.optim.AdamW.step, []

    def crash(*args, **keys):
        calls.append(1)
        if len(calls) > 3:
            raise ZeroDivisionError
        return step(*args, **keys)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(torch.optim.AdamW, "step", crash)
        run_train(*words, f"run={tmp_path / 'killed'}")
    with monkeypatch.context() as patch:
        patch.setattr("fastlightgen.stages.narrow.measured", None)
        run_train(*words, f"run={tmp_path / 'killed'}")
    assert_same(result(tmp_path / "killed", 2), result(tmp_path / "whole", 2))
    lines = read_metrics(tmp_path / "whole/stage2/metrics.jsonl")
    assert [("align_output" in line) for line in lines] == [True, True, False, False]


def test_the_result_goes_on_and_is_distilled(words, tmp_path, capsys):
    """Both parts as runs of their own, then Stage III with the original teacher; its plan follows a real step."""
    usual = ["progress=false", "threads=1", "batch=2", "shift=3", "log_every=1", "student=pruned", "lr=1e-3"]
    run_train(*words, *usual, "align=1", f"run={tmp_path / 'a'}")
    assert " strong=original" in capsys.readouterr().out.rpartition("next: ")[2]
    first = tmp_path / "a/stage2/model"
    card = read_card(first)
    assert (card["kept_blocks"], card["guidance"]) == (KEPT, OWN) and "pruned_path" not in card
    more = [w for w in words if not w.startswith("importance")] + [w for w in usual if w != "student=pruned"]
    run_train(*more, "align=0", "betas=[0.9,0.95]", f"start_model={first}", f"run={tmp_path / 'b'}")
    second = tmp_path / "b/stage2/model"
    assert read_card(second)["kept_blocks"] == KEPT and load_model(second).cfg.heads == 1
    distil = ["stage=3", "method=dmd2", "gan=0", f"model={tmp_path / 'teacher'}", f"stage2_model={second}", "ratio=2"]
    distil += ["critic_start=0", "iters=4", "warmup=0", "batch=2", "shift=3", "progress=false", "threads=1"]
    run_train(*distil, f"run={tmp_path / 'c'}")
    card, student = read_card(tmp_path / "c/stage3/model"), load_model(tmp_path / "c/stage3/model")
    assert (card["kept_blocks"], len(card["ladder"])) == (KEPT, 4)
    assert (student.num_blocks, student.cfg.heads, student.cfg.ffn_dim) == (2, 1, 12)
    stage = built(*distil, "steps=1", "count=generator", f"run={tmp_path / 'd'}", dtype=torch.float32)
    assert stage.nets.fake_net.cfg.heads == stage.teacher.cfg.heads == 2
    compare_with_plan(stage, KEPT, 1e-3)
    ours = [w for w in distil if w not in ("method=dmd2", "gan=0")] + ["steps=1", "count=generator"]
    with pytest.raises(ValueError, match="b/stage2/model: holds the pruned network alone, .* use strong=original$"):
        built(*ours)
    stage = built(*ours, "strong=original", dtype=torch.float32)
    assert (stage.nets.original.cfg.heads, stage.teacher.cfg.heads, stage.student.cfg.heads) == (2, 1, 1)
    assert stage.card["kept_blocks"] == KEPT
    compare_with_plan(stage, [0, 1])


def test_it_is_planned_for_a_real_model(tmp_path):
    peaks = {}
    for name, more in {"paper": [], "deep too": ["student=pruned"], "ffn alone": ["prune_heads=0"]}.items():
        out = tmp_path / f"{name}.json"
        main(plan, "plan", ["stage=2", "model=wan2.1-t2v-1.3b", "method=lightning", "gpus=8", f"out={out}", *more])
        record = json.loads(out.read_text())["plan"]
        peaks[name] = record["calls"], record["flops"]
    assert peaks["paper"][0] == 30 + 15 and peaks["deep too"][0] == 21 + 15
    assert peaks["deep too"][1] < peaks["paper"][1] < peaks["ffn alone"][1]


def test_bad_input(words, tmp_path, capsys):
    """One line each, before anything is trained."""
    wide = save_model(small_wan_of_width(4), tmp_path / "wide", kept_blocks=list(range(BLOCKS)))
    deep = save_model(small_wan(5), tmp_path / "deep")
    for more, message in {
        ("prune_heads=2",): "prune_heads=2: the network has 2 heads; wanted at most 1, or prune_heads=0",
        ("prune_ffn=0.99",): "prune_ffn=0.99: leaves none of 24 neurons",
        (f"start_model={wide}",): "hidden states are 32 wide .*, the teacher's 16",
        (f"start_model={deep}",): "its 5 blocks are not some of the teacher's 4",
        ("start_model=nowhere",): "start_model=nowhere: there is no model folder",
    }.items():
        with pytest.raises(ValueError, match=message) as found:
            built(*words, *more)
        assert "\n" not in str(found.value)
    for more, message in {
        ("prune_ffn=0", "prune_heads=0"): "nothing is pruned",
        ("start_model=x", "student=pruned"): "leave student=pruned out",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load([w for w in words if w.split("=")[0] not in ("prune_heads",)] + list(more))
    with pytest.raises(SystemExit):
        main(plan, "plan", ["stage=2", "method=lightning", "model=wan2.1-t2v-1.3b", "sequence_parallel=4", "gpus=4"])
    wanted = "prune_heads=2: leaves 10 heads, which sequence_parallel=4 does not divide; drop another number"
    assert wanted in capsys.readouterr().err


def test_a_family_without_prunable_rows():
    for asked in (lambda: NetworkConfig().ffn_width, lambda: NetworkConfig().narrowed(1, 1)):
        with pytest.raises(ValueError, match="NetworkConfig: width pruning does not know this family; use another"):
            asked()


def small_wan_of_width(heads: int):
    return build(NETWORK | {"num_layers": BLOCKS, "num_attention_heads": heads}, 0)
