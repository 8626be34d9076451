"""student_mode=lora: adapters alone train, on weights shared with the teacher; the result holds them merged."""

import json

import pytest
import torch
from helpers import BLOCKS, KEPT, assert_same, error_line, result, run_train
from method_cases import built, compare_with_plan, crash_after, moved, with_gradient, without_gradient
from safetensors.torch import load_file
from torch import nn

from fastlightgen.config import load, main
from fastlightgen.engine.local import LocalEngine
from fastlightgen.export import export
from fastlightgen.models.folder.weights import load_model, read_card
from fastlightgen.models.lora import LoraLinear
from fastlightgen.plan import plan

RANK = 3
CRITIC = ["ratio=2", "critic_start=0", "lr_fake=1e-3", "rollouts=fresh"]
LORA = ["student_mode=lora", f"student_rank={RANK}"]
METHODS = {
    "regression": [],
    "lcm": [],
    "dmd2": CRITIC,
    "magicdistillation": [*CRITIC, "lora_rank=2"],
    "fastlightgen": CRITIC,
    "fastlightgen, both": [*CRITIC, "fake_mode=lora", "lora_rank=2"],
}


def words_of(name: str, models: list[str]) -> list[str]:
    method = name.split(",")[0]
    own = [] if method == "fastlightgen" else ["student=full"]
    models = [w for w in models if method == "fastlightgen" or not w.startswith("stage2_model")]
    return [f"method={method}", *models, *METHODS[name], *own, *LORA]


def train(name: str, models: list[str], run, *more: str) -> None:
    common = ["stage=3", "batch=2", "shift=3", "progress=false", "threads=1", "iters=5", "lr=1e-3", "save_every=2"]
    run_train(*common, *words_of(name, models), f"run={run}", *more)


def plain_layers(net: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a network by their names without adapters."""
    found = ((key.replace(".base", ""), m) for key, m in net.named_modules())
    return {key: m for key, m in found if isinstance(m, nn.Linear)}


def wrapped(net: nn.Module) -> dict[str, LoraLinear]:
    return {key: m for key, m in net.named_modules() if isinstance(m, LoraLinear)}


@pytest.mark.parametrize("name", METHODS)
def test_adapters_alone_train_on_the_teachers_weights(name, wan):
    stage = built(*words_of(name, wan), dtype=torch.float32)
    student, teacher = stage.student, plain_layers(stage.teacher)
    role = stage.roles["student"]
    kept = KEPT if name.startswith("fastlightgen") else list(range(BLOCKS))
    assert student.num_blocks == len(kept) and role.network is student
    for key, layer in plain_layers(student).items():  # no second copy of the weights
        parts = key.split(".")
        if parts[0] == "blocks":
            parts[1] = str(kept[int(parts[1])])
        assert layer.weight is teacher[".".join(parts)].weight, key
    before = {key: value.clone() for key, value in student.state_dict().items()}
    engine = LocalEngine(torch.device("cpu"), "float32")
    engine.prepare(stage)
    for step in range(4):
        for update in stage.updates(step):
            engine.apply(update, step)
    after = student.state_dict()
    moved_on = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved_on == {f"{key}.{end}" for key in wrapped(student) for end in ("down", "up")}


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_adapters_alone(name, wan):
    stage = built(*words_of(name, wan))
    moved(stage.roles["student"].net)  # up starts at zero, and then down has no gradient
    (update,) = (u for u in stage.updates(0) if u.role == "student")
    update.loss()[0].backward()
    assert with_gradient(stage.roles["student"].net)
    base = [m.base for m in wrapped(stage.student).values()]
    assert without_gradient(*base, stage.teacher, stage.student.patch_embedding)


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_the_saved_network_is_the_student(family, request, tmp_path):
    """W + B A by hand, and the prediction. Only the order of sums differs in float64."""
    stage = built(*words_of("dmd2", request.getfixturevalue(family)))
    moved(stage.roles["student"].net)
    stage.save(tmp_path / "model")
    saved = load_file(tmp_path / "model/diffusion_pytorch_model.safetensors")
    teacher, student = stage.teacher.state_dict(), stage.student
    assert saved.keys() == teacher.keys()
    adapted = wrapped(student)
    assert len(adapted) == len(plain_layers(student.blocks))
    for key, value in saved.items():
        layer = adapted.get(key.removesuffix(".weight"))
        want = teacher[key] if layer is None else teacher[key] + layer.up @ layer.down
        assert torch.equal(value, want), key
    x_t, t, cond, _ = student.example_inputs(batch=2)
    x_t, cond = x_t.double(), cond.map(lambda v: v.double() if v.is_floating_point() else v)
    want = student(x_t, t, cond)
    torch.testing.assert_close(
        load_model(tmp_path / "model", dtype=torch.float64)(x_t, t, cond), want, atol=1e-12, rtol=0
    )
    assert (stage.teacher(x_t, t, cond) - want).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["lcm", "magicdistillation", "fastlightgen, both"])
def test_a_killed_run_continues_with_the_same_bits(name, wan, tmp_path, monkeypatch, capsys):
    words = ["ema=0.9", "keep=1"]
    train(name, wan, tmp_path / "whole", *words)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^2$"):
        crash_after(patch, 3 if name == "lcm" else 5)  # in iteration 4; step 2 is saved
        train(name, wan, tmp_path / "killed", *words)
    train(name, wan, tmp_path / "killed", *words)
    whole = result(tmp_path / "whole", 3)
    assert_same(result(tmp_path / "killed", 3), whole)
    trained = whole["state"]["student.safetensors"]
    assert (
        all(key.endswith(("_down", "_up")) for key in trained)
        and trained.keys() == whole["state"]["student-ema.safetensors"].keys()
    )


def test_the_best_weights_become_the_result(wan, tmp_path):
    train("regression", wan, tmp_path, "choose=best", "choose_every=1", "choose_clips=8", "ema=0")
    best = load_file(tmp_path / "stage3/best.safetensors")
    assert all(key.endswith(("_down", "_up")) for key in best)
    saved, name = load_file(tmp_path / "stage3/model/diffusion_pytorch_model.safetensors"), "attn1.to_q"
    key = f"1_{name.replace('.', '_')}"
    change = best[f"{key}_up"] @ best[f"{key}_down"]
    teacher = load_model(wan[0].removeprefix("model=")).state_dict()[f"blocks.1.{name}.weight"]
    assert torch.equal(saved[f"blocks.1.{name}.weight"], teacher + change) and change.any()


def test_its_lora_is_exact_at_the_trained_rank(wan, tmp_path, capsys):
    train("regression", wan, tmp_path)
    folder, out = tmp_path / "stage3/model", tmp_path / "lora.safetensors"
    assert read_card(folder)["lora_rank"] == RANK
    words = [f"model={folder}", f"teacher={wan[0].removeprefix('model=')}", "to=lora", f"out={out}", "dtype=float32"]
    main(export, "export", words)
    said = capsys.readouterr().out
    assert f"what each rank leaves out of their change: rank {RANK}: 0.0%" in said
    assert "norms, biases and tables are 0.0% of the change" in said
    teacher, student, lora = load_model(wan[0].removeprefix("model=")), load_model(folder), load_file(out)
    state = teacher.state_dict()
    downs = [key for key in lora if key.endswith(".lora_A.weight")]
    assert downs and all(len(lora[key]) == RANK for key in downs)
    for key in downs:
        name = key.removesuffix(".lora_A.weight")
        state[f"{name.removeprefix('transformer.')}.weight"] += lora[f"{name}.lora_B.weight"] @ lora[key]
    for key, value in student.state_dict().items():
        torch.testing.assert_close(state[key], value, atol=1e-6, rtol=0, msg=key)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "fastlightgen, both"])  # some never run there
def test_it_is_planned_as_it_runs(name, wan):
    """Parameters are exact. For operations with adapters see test_stage_cost.py."""
    ladder = ["steps=1", "count=generator"] if METHODS[name] else ["steps=1"]
    cost = compare_with_plan(built(*words_of(name, wan), *ladder, dtype=torch.float32), tolerance=0.03)
    assert cost.trained["student"] == sum(
        RANK * (layer.in_features + layer.out_features)
        for key, layer in plain_layers(built(*words_of(name, wan)).student).items()
        if key.startswith("blocks")
    )


def test_weights_of_its_own_are_planned(wan):
    """A student that starts from other weights than the teacher's has a copy of them."""
    words = [
        *words_of("dmd2", wan),
        f"start_model={wan[1].removeprefix('stage2_model=')}",
        "steps=1",
        "count=generator",
    ]
    cost = compare_with_plan(built(*words, dtype=torch.float32), tolerance=0.03)
    assert cost.frozen["student's weights"] == cost.frozen["teacher"]


def test_it_takes_less_memory(tmp_path):
    peaks = {}
    for mode in ("copy", "lora"):
        out = tmp_path / f"{mode}.json"
        words = ["stage=3", "method=regression", "student=full", "model=wan2.1-t2v-1.3b", f"student_mode={mode}"]
        main(plan, "plan", [*words, "gpus=1", "engine=local", "micro_batch=1", f"out={out}"])
        peaks[mode] = json.loads(out.read_text())["plan"]["peak"]
    assert peaks["lora"] < 0.6 * peaks["copy"]


def test_learning_rates(wan, capsys):
    words = ["stage=3", "run=unused", "method=dmd2", "student=full", "lr=1e-5"]
    assert load(words).own_lr == 1e-5
    assert load([*words, *LORA]).own_lr == pytest.approx(1e-4)
    assert load([*words, *LORA, "student_lr=3e-4"]).own_lr == 3e-4
    stage = built(*words_of("dmd2", wan), "lr=1e-5", "student_lr=3e-4")
    assert (stage.roles["student"].lr, stage.roles["fake"].lr) == (3e-4, 1e-3)


def test_an_averaged_target_is_refused(tmp_path, capsys):
    words = ["stage=3", f"run={tmp_path}", "method=lcm", "student=full", "target=ema", *LORA]
    said = error_line(capsys, lambda: run_train(*words))
    assert said == "error: target=ema: averages whole networks, not adapters; use stopgrad with student_mode=lora\n"
