"""Recipes: each loads for train and plan, fits its machine in every stage, and has the numbers that the docs show."""

import importlib.util
from dataclasses import fields
from pathlib import Path

import pytest

from fastlightgen.config import GPUS, ConfigError, load, preset, recipes
from fastlightgen.config.run import Run
from fastlightgen.parallel.ranks import accumulation
from fastlightgen.plan import one
from fastlightgen.planner.advice import recipe_plan

ROOT = Path(__file__).parents[2]
CASES = [(recipe, model) for recipe in recipes() for model in recipe.models]


def of(name: str):
    return next(recipe for recipe in recipes() if recipe.name == name)


@pytest.mark.parametrize("stage", "0123")
@pytest.mark.parametrize(("recipe", "model"), CASES, ids=lambda x: getattr(x, "name", x))
def test_a_recipe_fits_its_machine(recipe, model, stage):
    """Nothing is left to change, and the engine can divide the batch."""
    cfg = load([f"stage={stage}", recipe.word, f"model={model}"], "plan")
    lines, record = one(cfg)
    assert record["plan"]["fits"] and record["changes"] == [] and record["plan"]["peak"] < GPUS[cfg.gpu].memory
    assert (cfg.gpu, cfg.gpus, cfg.dtype) == (recipe.gpu, recipe.gpus, "bfloat16")
    assert record["size"] == (recipe.size or preset(model)["inference"]["size"])
    if stage != "1":
        accumulation(cfg.batch, cfg.micro_batch, cfg.gpus, cfg.sequence_parallel)
        assert cfg.checkpointing and cfg.micro == 1
    if stage in "123" and recipe.gpus == 1:
        assert record["plan"]["seconds"] * record["plan"]["iters"] < 7 * 86400


@pytest.mark.parametrize("recipe", recipes(), ids=lambda r: r.name)
def test_train_takes_what_plan_takes(recipe):
    """The same keys of the stages and of every run; `machine` concerns the plan alone. The model is never tiny."""
    every = load(["stage=all", "run=r", recipe.word])
    assert every.model == recipe.models[0]
    for stage in "123":
        planned = load([f"stage={stage}", recipe.word], "plan")
        cfg = load([f"stage={stage}", "run=r", recipe.word])
        names = {f.name for f in fields(cfg)} - {"run", "dtype"}
        assert {n: getattr(cfg, n) for n in names} == {n: getattr(planned, n) for n in names}
        section = vars(getattr(every, f"stage{stage}"))
        assert section == {n: getattr(cfg, n) for n in section}
        common = {f.name for f in fields(Run)} - {"stage"}
        assert {n: getattr(every, n) for n in common} == {n: getattr(cfg, n) for n in common}


def test_the_command_line_wins_over_a_recipe(tmp_path):
    words = [of("wan2.1-1.3b-1x24gb").word, "stage=2", "run=r"]
    cfg = load(words)
    assert (cfg.offload, cfg.batch, cfg.iters, cfg.micro_batch) == ("optimizer", 4, 1000, 1)
    cfg = load([*words, "batch=8", "offload=none", f"model={tmp_path}"])
    assert (cfg.offload, cfg.batch, cfg.iters, cfg.model) == ("none", 8, 1000, str(tmp_path))


def test_the_name_of_a_recipe_is_enough(tmp_path, monkeypatch):
    """A file of that name wins; a name or a path that is nearly a recipe's is told which one."""
    monkeypatch.chdir(tmp_path)
    name = "wan2.1-14b-480p-8x80gb"
    for file in (name, f"{name}.yaml", f"configs/recipes/{name}.yaml"):
        assert load(["stage=3", f"config={file}"], "plan").offload == "optimizer"
    for file in ("wan2.1-14b-480-8x80gb", "configs/recipes/wan2.1-14b-480p-8x80.yaml"):
        wanted = f"^config={file}: there is no such file; did you mean config=configs/recipes/{name}.yaml[?]$"
        with pytest.raises(ConfigError, match=wanted):
            load(["stage=3", f"config={file}"], "plan")
    with pytest.raises(ConfigError, match=f"^config=zzz: there is no such file; the recipes are .*, {name}, "):
        load(["stage=3", "config=zzz"], "plan")
    (tmp_path / name).write_text("offload: all")
    assert load(["stage=3", f"config={name}"], "plan").offload == "all"
    with pytest.raises(ConfigError, match="^mine/a.yaml: not found"):
        load(["stage=3", "config=mine/a.yaml"], "plan")


def test_a_recipe_for_8_gpus_works_on_16():
    for recipe in (r for r in recipes() if r.gpus == 8):
        for stage in "123":
            cfg = load([f"stage={stage}", recipe.word, "gpus=16"], "plan")
            assert one(cfg)[1]["plan"]["fits"]


def test_720p_of_hunyuanvideo_takes_nine_times_as_long():
    recipe = of("hunyuanvideo-540p-16x80gb")
    large = ["model=hunyuanvideo-t2v", "gpus=16", "sequence_parallel=2", "micro_batch=1"]
    for stage in "23":
        plan = one(load([f"stage={stage}", *large], "plan"))[1]["plan"]
        days = plan["seconds"] * plan["iters"] / 86400
        assert plan["fits"] and days / recipe_plan(recipe, "hunyuanvideo-t2v", stage)[1].days == pytest.approx(
            9, abs=0.5
        )


def test_the_docs_show_the_planners_numbers():
    """`python docs/recipes.py` writes them."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "recipes.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.parts()[1] == tables.tables()
    page = (ROOT / "docs" / "real-models.md").read_text()
    assert "planned, not measured" in page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("machine: {gpuz: 4090}", "gpuz=4090: unknown key; did you mean gpu?"),
        ("stage2: {beta1: 3}", "beta1=3: beta1 is a key of stage=3, not of stage=2"),
        ("stage3: {betta1: 3}", "betta1=3: unknown key; did you mean beta1?"),
        ("stage1: 7", "a section holds 7; wanted lines of the form key: value"),
        ("offloud: all", "offloud=all: unknown key; did you mean offload?"),
    ],
)
def test_a_wrong_key_is_named_with_its_file(content, message, tmp_path):
    """In every section, whichever stage runs."""
    (tmp_path / "mine.yaml").write_text(content)
    for command in ("train", "plan"):
        with pytest.raises(ConfigError) as stop:
            load(["stage=1", *["run=r"] * (command == "train"), f"config={tmp_path / 'mine.yaml'}"], command)
        assert message in str(stop.value) and "mine.yaml" in str(stop.value)


def test_a_recipe_is_found_without_a_checkout(tmp_path, monkeypatch):
    """An installed package has configs/ inside; the path of the docs still names it."""
    monkeypatch.chdir(tmp_path)
    assert load(["stage=2", of("wan2.1-1.3b-1x24gb").word], "plan").gpu == "4090"
    with pytest.raises(ConfigError, match="configs/recipes/none.yaml: there is no such file"):
        load(["stage=2", "config=configs/recipes/none.yaml"], "plan")
