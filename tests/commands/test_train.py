"""The train command, from its arguments to the files it writes."""

import json
import os

import diffusers
import pytest
import torch
import yaml
from forks import ran
from helpers import BLOCKS, result, run_train, small_wan, write_inputs, write_shapes
from safetensors.torch import load_file

import fastlightgen
from fastlightgen.engine.log import read_metrics
from fastlightgen.models.folder.weights import load_model, save_model
from fastlightgen.world.source import ShapesSource


def test_stage_3_needs_stage_2(tmp_path):
    """A mistake in a real process: exit code 2 and one line, no traceback."""
    folder = save_model(small_wan(), tmp_path / "m")
    words = ["stage=3", f"run={tmp_path}/r", f"model={folder}"]
    done = ran(["-m", "fastlightgen.train", *words], os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    wanted = f"error: {tmp_path}/r/stage2/model: does not exist, and stage=3 needs it; first run: python -m "
    assert done.stderr.startswith(wanted) and done.stderr.count("\n") == 1


def test_a_stage_from_a_cache_is_a_stage_from_its_clips(tmp_path, monkeypatch):
    """The same clips in the same order, read from a latent cache, give the same weights, bit for bit."""
    words = [w for w in write_inputs(tmp_path)[0] if not w.startswith("iters")] + ["iters=4"]
    write_shapes(tmp_path / "cache", 12)
    run_train("stage=0", f"run={tmp_path}/a", *words, f"data={tmp_path}/cache")

    order = torch.randperm(11, generator=fastlightgen.data.source.generator(0, 0)).tolist()  # the twelfth is held out

    def same_order(self, step, size, rows=None):
        from fastlightgen.world.source import shapes_batch

        return shapes_batch(self.train.batch([order[p] for p in range(step * size, (step + 1) * size)]))

    monkeypatch.setattr(ShapesSource, "batch", same_order)
    run_train("stage=0", f"run={tmp_path}/b", *words)
    a, b = result(tmp_path / "a", 0), result(tmp_path / "b", 0)
    assert a["metrics"] == b["metrics"]
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())


def test_stage_0_from_random_weights_depends_on_the_seed(tmp_path):
    """`model=tiny` without init starts from the preset's network with weights drawn from the seed."""
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_train(
            "stage=0",
            f"run={tmp_path}/{run}",
            f"seed={seed}",
            "iters=1",
            "batch=1",
            "progress=false",
            "lr=0",
            "sample_every=0",
        )
    a, b, c = (load_file(tmp_path / r / "stage0/model/diffusion_pytorch_model.safetensors") for r in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """stage=all on a random teacher, with minimal settings: the run folder and the printed lines."""
    root = tmp_path_factory.mktemp("all")
    teacher = save_model(small_wan(), root / "teacher", steps=2, guidance=2.0, shift=3.0)
    words = ["stage=all", f"run={root / 'run'}", f"model={teacher}", "progress=false", "threads=1", "log_every=1"]
    words += ["stage1.clips=2", "stage1.batch=2", "stage1.timesteps=2", "stage1.ratio=0.5"]
    words += [
        "stage2.iters=2",
        "stage2.batch=2",
        "stage3.iters=3",
        "stage3.batch=2",
        "stage3.critic_start=0",
        "stage3.steps=2",
    ]
    words += ["evaluate.clips=64", "evaluate.batch=64", "evaluate.show=2"]
    run_train(*words)
    return root / "run", words


def test_all_stages_leave_the_run_folder_of_the_contract(everything):
    run, _ = everything
    files = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    wanted = {"config.yaml", "report.html", "stage1/importance.json", "stage1/importance.png"}
    for n, last in ((2, "000002"), (3, "000003")):
        wanted |= {f"stage{n}/metrics.jsonl", f"stage{n}/checkpoints/step-{last}/state.json"}
        wanted |= {
            f"stage{n}/model/{f}" for f in ("config.json", "fastlightgen.json", "diffusion_pytorch_model.safetensors")
        }
    assert wanted <= files
    assert not [f for f in files if f.endswith(".tmp") or ".tmp/" in f]
    record = yaml.safe_load((run / "config.yaml").read_text())
    assert record["stage2"]["iters"] == 2 and record["stage3"]["steps"] == 2 and record["seed"] == 0
    assert record["versions"]["torch"] == str(torch.__version__) and "git_commit" in record
    assert record["versions"]["diffusers"] == diffusers.__version__
    assert all(record["hardware"][f"stage{n}"].startswith("1 process, ") for n in (1, 2, 3))
    for n, steps in ((2, [1, 2]), (3, [1, 2, 3])):
        rows = read_metrics(run / f"stage{n}/metrics.jsonl")
        assert [r["step"] for r in rows] == steps and all(r["sec_per_step"] > 0 for r in rows)


def test_the_cards_say_what_was_made(everything):
    run, words = everything
    ranking = json.loads((run / "stage1/importance.json").read_text())
    two, three = (json.loads((run / f"stage{n}/model/fastlightgen.json").read_text()) for n in (2, 3))
    assert {k: two[k] for k in ("family", "stage", "num_blocks", "pruned_path")} == {
        "family": "wan", "stage": 2, "num_blocks": BLOCKS, "pruned_path": ranking["kept"],
    }  # fmt: skip
    assert three["stage"] == 3 and three["num_blocks"] == 2 and three["kept_blocks"] == ranking["kept"]
    assert three["ladder"] == pytest.approx([1.0, 5 * 0.5 / 3]) and three["guidance"] == 1.0 and three["shift"] == 5.0
    assert three["source"] == two["source"] == words[2].removeprefix("model=")


def test_the_table_and_the_headline_come_from_the_same_times(everything):
    folder = everything[0] / "evaluate"
    names = ("teacher", "teacher-few", "pruned", "stage2-few", "student")
    records = {n: json.loads((folder / f"{n}.json").read_text()) for n in names}
    speed = json.loads((folder / "speed.json").read_text())
    assert {r["batch"] for r in records.values()} == {speed["batch"]} == {4}
    times = [records[n]["seconds_per_clip"] for n in ("teacher", "student")]
    assert times == [speed["teacher_seconds"], speed["student_seconds"]]
    assert speed["measured"] == times[0] / times[1] and speed["theory"] == 4 * 4 / (2 * 2)
    student = records["student"]
    wanted = student["scores"]["frechet"] - records["teacher-few"]["scores"]["frechet"]
    assert student["against"]["teacher-few"]["frechet"]["difference"] == pytest.approx(wanted)


@pytest.mark.parametrize("how", ["from_config", "from_pretrained"])
def test_stock_diffusers_loads_the_student(everything, how):
    theirs = pytest.importorskip("diffusers").WanTransformer3DModel
    folder = everything[0] / "stage3/model"
    if how == "from_config":
        net = theirs.from_config(theirs.load_config(folder))
        net.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    else:
        pytest.importorskip("accelerate", reason="diffusers needs accelerate for from_pretrained of this class")
        net = theirs.from_pretrained(folder)
    ours = load_model(folder)
    assert len(net.blocks) == 2
    x_t, t, cond, _ = ours.example_inputs(2)
    with torch.no_grad():
        v = net.eval()(torch.cat([x_t, cond.image], 1), 1000 * t, cond.text, return_dict=False)[0]
        assert torch.allclose(ours(x_t, t, cond), v, atol=1e-5)


def test_running_all_again_changes_no_stage(everything, capsys):
    run, words = everything
    before = {p: p.read_bytes() for n in (1, 2, 3) for p in (run / f"stage{n}").rglob("*") if p.is_file()}
    run_train(*words)
    assert capsys.readouterr().out.count("nothing to do") == 3
    assert {p: p.read_bytes() for p in before} == before
