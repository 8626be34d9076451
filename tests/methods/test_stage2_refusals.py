"""What the rivals of Stage II refuse: a Stage III that cannot start from them, and models that do not fit."""

from functools import partial

import pytest
from helpers import KEPT, run_train, small_hunyuan, small_wan
from method_cases import built

from fastlightgen.config import load, main
from fastlightgen.models.folder.weights import save_model
from fastlightgen.plan import plan
from fastlightgen.stages.earlier import stages_of

ALONE = "leaves the pruned network alone, and Eq. 9 needs a strong teacher; use stage3.strong=original"
SILENCED = "which stage 3 would train again; use stage2.f3=block"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage2.method=icmd"], f"stage2.method=icmd: {ALONE}"),
        (["stage2.method=lightning"], f"stage2.method=lightning: {ALONE}"),
        (["stage2.method=f3", "stage2.f3=block"], f"stage2.method=f3: {ALONE}"),
        (
            ["stage2.method=f3"],
            f"stage2.method=f3: leaves silenced heads (f3=attention), {SILENCED} stage3.strong=",
        ),
        (["stage2.method=f3", "stage2.f3=head", "stage3.method=lcm"], f"leaves silenced heads (f3=head), {SILENCED}"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_stage_all_names_what_stage_3_can_start_from(words, said, tmp_path, capsys):
    """Before anything runs; the same words with those that the line names are taken."""
    for command in (partial(run_train, f"run={tmp_path / 'run'}"), lambda *w: main(plan, "plan", [*w, "gpus=1"])):
        with pytest.raises(SystemExit) as stop:
            command("stage=all", *words)
        line = capsys.readouterr().err
        assert stop.value.code == 2 and said in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()
    given = dict(word.split("=") for word in [*words, *line.partition("; use ")[2].split()])
    stages_of(load(["stage=all", *(f"{k}={v}" for k, v in given.items())]))


def test_a_student_with_all_blocks_reads_no_stage_2():
    for method in ("icmd", "f3"):
        stages_of(load(["stage=all", f"stage2.method={method}", "stage3.method=dmd2", "stage3.student=full"]))


def test_models_that_do_not_fit_are_refused(ranked_wan, ranked_hunyuan, tmp_path):
    wan, hunyuan = ranked_wan, ranked_hunyuan
    deep = save_model(small_wan(blocks=5), tmp_path / "deep")
    wide = save_model(small_hunyuan(num_attention_heads=4), tmp_path / "wide")
    alone = save_model(small_wan().prune(KEPT), tmp_path / "alone", stage=2, kept_blocks=KEPT)
    one = save_model(small_wan().prune(KEPT), tmp_path / "one", stage=2, kept_blocks=[0])
    far = save_model(small_wan(), tmp_path / "far", stage=2, pruned_path=[0, 9])
    widths = {"heads": [2, 2], "ffn": [12, 24]}
    narrow = save_model(small_wan().prune(KEPT), tmp_path / "narrow", stage=2, kept_blocks=KEPT, widths=widths)
    regression = ["stage=3", "method=regression", wan[0]]
    model = wan[0].removeprefix("model=")
    icmd = [*wan, "method=icmd"]
    for given, message in (
        ([*icmd, f"start_model={deep}"], f"start_model={deep}: num_layers is 5, wanted 4 as in {model}; give a model"),
        (
            [*hunyuan, *icmd[2:], f"start_model={wide}"],
            f"start_model={wide}: num_attention_heads is 4, wanted 2 as in",
        ),
        ([*icmd, f"start_model={tmp_path}/no"], f"start_model={tmp_path}/no: there is no model folder; "),
        ([*icmd, f"teacher={deep}"], f"{wan[1].removeprefix('importance=')}: ranks 4 blocks, but the model has 5; run"),
        ([*icmd, "teacher_guidance=embedded"], "teacher_guidance=embedded: no guidance was distilled into this"),
        (
            ["stage=3", wan[0], f"stage2_model={alone}"],
            f"{alone}: holds the pruned network alone, Eq. 9 needs a stron",
        ),
        (
            ["stage=3", "method=regression", hunyuan[0], f"stage2_model={alone}"],
            f"stage2_model={alone}: _class_name is WanTransformer3DModel, wanted HunyuanVideoTransformer3DModel as in ",
        ),
        (
            [*regression, f"stage2_model={one}"],
            f"{one}/fastlightgen.json: kept_blocks names 1 of the network's 2 block",
        ),
        (
            [*regression, f"stage2_model={far}"],
            f"{far}/fastlightgen.json: pruned_path names block 9, wanted at most 3;",
        ),
        (
            [*regression, f"stage2_model={narrow}"],
            f"stage2_model={narrow}: ffn_dim is 24, wanted 12 as in model={model}",
        ),
    ):
        with pytest.raises(ValueError) as error:
            built("stage=2", *given)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
