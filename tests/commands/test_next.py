"""The last line of a command is the next command to type, as the shell reads it."""

from helpers import run_train, small_wan, typed, write_inputs

from fastlightgen.config import after_plan, after_stage, load, main
from fastlightgen.evaluate import evaluate
from fastlightgen.generate import generate
from fastlightgen.models.folder.weights import save_model
from fastlightgen.train import settled

TWO_HOSTS = "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=%s:29500 -m fastlightgen.train"


def following(*words: str) -> tuple[str, dict[str, str]]:
    """(command, keys) that follow a stage of a run in the folder `r`."""
    name, rest = typed(after_stage(load([*words, "run=r"])))
    return name, dict(word.split("=", 1) for word in rest)


def test_the_next_command_after_each_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(small_wan(), tmp_path / "m")
    (tmp_path / "a cache").mkdir()
    assert following("stage=0", "lr=1") == ("train", {"stage": "1", "run": "r", "model": "r/stage0/model"})
    kept = {"run": "r", "model": "m", "data": "a cache", "seed": "3"}
    words = [f"{key}={value}" for key, value in kept.items() if key != "run"]
    assert following("stage=1", "ratio=0.4", "overwrite=true", *words) == ("train", {"stage": "2"} | kept)
    name, export = following("stage=3", *words)
    assert (name, export) == ("export", {"model": "r/stage3/model", "pipeline": "PIPELINE", "out": "r/student"})
    f3 = ["stage=2", "method=f3", "f3=head", *words]
    name, export = following(*f3)
    assert (name, export) == ("export", {"model": "r/stage2/model", "pipeline": "PIPELINE", "out": "r/f3"})
    (tmp_path / "m/model_index.json").write_text('{"_class_name": "WanPipeline"}')
    assert following(*f3)[1]["pipeline"] == "m"
    (tmp_path / "m/model_index.json").unlink()
    name, evaluate = following("stage=3", "threads=2", "lr=1")
    assert name == "evaluate" and evaluate == {
        "model": "r/stage3/model", "teacher": "tiny", "out": "r/evaluate/student.json", "threads": "2",
    }  # fmt: skip
    name, generate = following("stage=all")
    assert name == "generate" and generate["model"] == "r/stage3/model" and generate["prompt"].startswith("a red ball ")


def test_a_type_that_nobody_chose_is_not_repeated():
    """dtype=auto means the same in the next command."""
    assert after_stage(settled(load(["stage=1", "run=r", "device=cpu"]))).endswith(" stage=2 run=r device=cpu")
    chosen = after_stage(settled(load(["stage=1", "run=r", "dtype=float32"])))
    assert chosen.endswith(" stage=2 run=r dtype=float32")


def test_a_config_file_stays_in_the_next_command_if_the_next_stage_has_its_keys(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("dtype: bfloat16\nshift: 4")
    assert following("stage=1", f"config={file}", "seed=2") == (
        "train", {"stage": "2", "config": str(file), "run": "r", "seed": "2"},
    )  # fmt: skip
    file.write_text("dtype: bfloat16\nclips: 8")  # `clips` is a key of Stage I alone
    assert following("stage=1", f"config={file}") == ("train", {"stage": "2", "run": "r", "dtype": "bfloat16"})


def test_the_next_command_after_a_plan():
    words = "stage=2 model=wan2.1-t2v-1.3b gpus=16 offload=optimizer lr=2e-5".split()
    line = after_plan(load(words, "plan"))
    assert line.startswith(f"{TWO_HOSTS % 'HOST'} stage=2 run=runs/wan2.1-t2v-1.3b model=MODEL ")
    given = dict(word.split("=", 1) for word in line.split() if "=" in word and not word.startswith("-"))
    wanted = {"data": "CACHE", "engine": "deepspeed", "offload": "optimizer", "lr": "2e-05"}
    assert given == wanted | {"stage": "2", "run": "runs/wan2.1-t2v-1.3b", "model": "MODEL"}
    assert after_plan(load("model=tiny gpus=1 engine=local checkpointing=false".split(), "plan")) == (
        "python -m fastlightgen.train stage=3 run=runs/tiny model=tiny"
    )


def test_the_next_command_after_the_plan_of_a_recipe(tmp_path):
    """It names the recipe and the keys that differ from it; a file with a key of `plan` alone is written out."""
    recipe = "config=configs/recipes/wan2.1-14b-480p-8x80gb.yaml"
    for words, others in ([], []), (["lr=2e-5"], ["lr=2e-05"]):
        line = after_plan(load([recipe, "stage=2", *words], "plan"))
        start = "torchrun --nproc-per-node=8 -m fastlightgen.train"
        assert line == " ".join([start, recipe, "stage=2 run=runs/wan2.1-i2v-14b model=MODEL", *others, "data=CACHE"])
    (tmp_path / "c.yaml").write_text("gpus: 8\noffload: all\nmodel: wan2.1-i2v-14b")
    line = after_plan(load([f"config={tmp_path}/c.yaml"], "plan"))
    assert "config=" not in line and "offload=all" in line


def test_torchrun_starts_the_next_stage_too(monkeypatch):
    for key, value in (
        ("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_WORLD_SIZE", "8"), ("WORLD_SIZE", "16"), ("MASTER_ADDR", "node7"),
    ):  # fmt: skip
        monkeypatch.setenv(key, value)
    line = after_stage(load(["stage=1", "run=r", "engine=deepspeed"]))
    assert line == f"{TWO_HOSTS % 'node7'} stage=2 run=r engine=deepspeed"


def test_it_is_the_last_line(tmp_path, capsys, monkeypatch):
    """From Stage I of a random teacher to a clip: each command prints the one that the functions above name."""

    def last() -> tuple[str, list[str]]:
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith("next: ")
        return typed(line.removeprefix("next: "))

    words = [write_inputs(tmp_path)[2][0], "threads=1", f"run={tmp_path / 'a run'}"]
    run_train("stage=1", "clips=2", "batch=2", "timesteps=1", "progress=false", *words)
    name, rest = last()
    cfg = load(rest, name)
    assert (cfg.stage, cfg.progress, *(f"{key}={vars(cfg)[key]}" for key in ("model", "threads", "run"))) == (
        "2", False, *words,
    )  # fmt: skip

    student = save_model(small_wan().prune([0, 1]), tmp_path / "a run/stage3/model", steps=1, guidance=1.0, shift=3.0)
    main(evaluate, "evaluate", [f"model={student}", f"out={tmp_path / 'a run/evaluate/student.json'}", "clips=8"])
    assert last() == ("report", [f"run={tmp_path / 'a run'}"])
    main(generate, "generate", [f"model={student}", "prompt=a red ball", f"out={tmp_path / 'a.png'}"])
    assert last() == ("evaluate", [f"model={student}", f"out={tmp_path / 'scores.json'}"])
