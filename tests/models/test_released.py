"""Settings of a model folder by its network and its own files, each with its source: presets, scheduler, card."""

import json
from pathlib import Path

import pytest
from folders import CONFIG

from fastlightgen.config import load
from fastlightgen.models.families import FAMILIES
from fastlightgen.models.folder.networks import config_of
from fastlightgen.models.folder.original import original_config
from fastlightgen.models.folder.released import sampling
from fastlightgen.stages.check import shift_of_teacher

UNKNOWN = CONFIG | {"_class_name": "WanTransformer3DModel"}


def pipeline(folder: Path, config: dict, **scheduler: float) -> Path:
    """A pipeline folder without weights: the network's config.json and the scheduler's."""
    for name, content in (
        ("transformer/config", config),
        ("scheduler/scheduler_config", scheduler),
        ("model_index", {"_class_name": "WanPipeline"}),
    ):
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def shifts(model: Path) -> dict[str, float]:
    """The time shift of training by stage, for `model=`."""
    return {n: load([f"stage={n}", "run=r", f"model={model}"]).shift for n in "0123"}


# The preset's network, the scheduler's shift -> the preset, and the shifts of Stage 0 and of Stages 1 to 3.
FOLDERS = [
    ("wan2.1-i2v-14b", {"flow_shift": 3.0}, "wan2.1-i2v-14b", 3.0, 5.0),  # its students have a shift of their own
    ("wan2.1-i2v-14b", {"flow_shift": 5.0}, "wan2.1-i2v-14b-720p", 5.0, 5.0),  # the same network
    ("wan2.1-i2v-14b", {"flow_shift": 8.0}, "wan2.1-i2v-14b", 8.0, 8.0),  # the scheduler's own
    ("wan2.1-t2v-14b", {}, "wan2.1-t2v-14b", 5.0, 5.0),
    ("wan2.1-t2v-14b", {"flow_shift": 3.0}, "wan2.1-t2v-14b", 5.0, 5.0),  # the converter's, for every Wan
    ("wan2.1-t2v-14b", {"flow_shift": 8.0}, "wan2.1-t2v-14b", 8.0, 8.0),
    ("wan2.2-ti2v-5b", {"flow_shift": 3.0}, "wan2.2-ti2v-5b", 5.0, 5.0),
    ("hunyuanvideo-i2v", {"shift": 7.0}, "hunyuanvideo-i2v", 7.0, 7.0),
    ("hunyuanvideo-i2v", {"shift": 17.0}, "hunyuanvideo-i2v", 17.0, 17.0),
    ("hunyuanvideo-t2v", {"shift": 7.0}, "hunyuanvideo-t2v", 7.0, 7.0),
]


@pytest.mark.parametrize(("name", "scheduler", "found", "zero", "later"), FOLDERS)
def test_a_pipeline_is_recognised_by_its_network_and_its_shift(name, scheduler, found, zero, later, tmp_path):
    model = pipeline(tmp_path / "pipe", config_of(name), **scheduler)
    known, preset = sampling(model), sampling(found)
    assert known.preset == found
    assert known.values == preset.values | ({"shift": next(iter(scheduler.values()))} if scheduler else {})
    assert known.sources["size"] == known.sources["steps"] == f"configs/model/{found}.yaml"
    own = str(model / "scheduler" / "scheduler_config.json")
    assert known.sources["shift"] == (own if scheduler else f"configs/model/{found}.yaml")
    assert shifts(model) == {"0": zero, "1": later, "2": later, "3": later}


def test_the_sizes_and_steps_of_image_to_video_differ_from_text_to_video(tmp_path):
    """generate.py of Wan2.1: 40 steps for image to video, 50 for text to video; 720p has its own size."""
    seven = sampling(pipeline(tmp_path / "a", config_of("wan2.1-i2v-14b"), flow_shift=5.0)).values
    text = sampling(pipeline(tmp_path / "b", config_of("wan2.1-t2v-1.3b"), flow_shift=3.0)).values
    assert (seven["steps"], seven["size"]) == (40, "720x1280x81")
    assert (text["steps"], text["size"], text["shift"]) == (50, "480x832x81", 3.0)


def test_clips_are_encoded_at_the_models_size():
    """Landscape and portrait, at the family's frame rate."""
    clips = FAMILIES["wan"].clips.at("720x1280x41")
    assert (clips.fps, clips.frames, clips.buckets) == (16, 41, ((720, 1280), (1280, 720)))
    assert clips.size == "720x1280x41"


def test_an_original_folder_has_the_settings_of_its_preset(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(original_config(config_of("hunyuanvideo-t2v"))))
    assert sampling(tmp_path).preset == "hunyuanvideo-t2v"
    assert load(["stage=3", "run=r", f"model={tmp_path}"]).beta1 == 2.0  # configs/stage3.yaml has 3.5


def test_an_unknown_network_takes_its_scheduler_then_its_family(tmp_path):
    own = pipeline(tmp_path / "own", UNKNOWN, flow_shift=4.0)
    none = pipeline(tmp_path / "none", UNKNOWN)
    assert sampling(own).preset == sampling(none).preset == ""
    assert sampling(none).sources["shift"] == "the default of Wan"
    assert (shifts(own)["3"], shifts(none)["3"]) == (4.0, 5.0)
    short = config_of("hunyuanvideo-t2v") | {"num_single_layers": 30}
    assert shifts(pipeline(tmp_path / "short", short))["3"] == 7.0


def test_a_trained_folder_samples_with_the_shift_of_its_card(tmp_path):
    """An exported student's scheduler holds a stretched shift; its card holds the one that it was trained with. A
    further training has the family's."""
    model = pipeline(tmp_path / "pipe", UNKNOWN, shift=1.7)
    (model / "fastlightgen.json").write_text(json.dumps({"shift": 6.0}))
    known = sampling(model)
    assert known.values["shift"] == 6.0 and known.sources["shift"] == str(model / "fastlightgen.json")
    assert shifts(model)["3"] == 5.0


def test_a_folder_of_the_tiny_network_trains_as_the_preset_does(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("tiny")))
    for stage in "123":
        folder, preset = (load([f"stage={stage}", "run=r", f"model={m}"]) for m in (tmp_path, "tiny"))
        assert vars(folder) | {"model": ""} == vars(preset) | {"model": ""}


def test_where_a_value_comes_from(tmp_path):
    """The file that sets it, the command line, or nothing: then it is the default."""
    wan = pipeline(tmp_path / "wan", config_of("wan2.1-i2v-14b"), flow_shift=3.0)
    own = pipeline(tmp_path / "own", UNKNOWN, flow_shift=4.0)
    sources = {}
    for name, model in (("wan", wan), ("own", own), ("tiny", "tiny")):
        cfg = load(["stage=3", "run=r", f"model={model}", "lr_fake=1e-3"])
        sources[name] = [cfg.origins.get(key, "default") for key in ("shift", "steps", "lora_rank", "lr_fake")]
    scheduler = str(own / "scheduler" / "scheduler_config.json")
    rest = ["configs/stage3.yaml", "default", "the command line"]
    assert sources["wan"] == ["configs/model/wan2.1-i2v-14b.yaml", *rest]
    assert sources["own"] == [scheduler, *rest]
    assert sources["tiny"] == ["configs/model/tiny.yaml", *rest]
    every = load(["stage=all", "run=r", f"model={own}", "stage2.shift=2"])
    assert [every.origins[f"stage{n}.shift"] for n in "123"] == [scheduler, "the command line", scheduler]


def test_a_teacher_that_is_sampled_with_another_shift_than_its_student_is_trained_with(tmp_path):
    """Wan2.1 I2V at 480p: its scheduler says 3, students take 5. Where both are equal nothing is said."""
    wan = pipeline(tmp_path / "wan", config_of("wan2.1-i2v-14b"), flow_shift=3.0)
    scheduler = f"{wan}/scheduler/scheduler_config.json"
    said = f"  the teacher itself is sampled with shift=3.0 ({scheduler}); training takes "
    for words, others in (
        (["stage=1"], "shift=5.0"),
        (["stage=3", "shift=4"], "shift=4.0"),
        (["stage=all", "stage1.shift=3"], "stage2.shift=5.0, stage3.shift=5.0"),
    ):
        lines = shift_of_teacher(load([*words, f"model={wan}"]))
        assert lines == [f"{said}{others}, which suits a student with few steps (docs/method.md, Time shift)"]
    for words in (["stage=3", f"model={wan}", "shift=3"], ["stage=0", f"model={wan}"], ["stage=1"]):
        assert shift_of_teacher(load(words)) == []
    assert shift_of_teacher(load(["stage=1", f"model={tmp_path}"])) == []  # no network


def test_a_folder_without_a_network_is_left_to_the_stage(tmp_path):
    assert load(["stage=3", "run=r", f"model={tmp_path}"]).shift == 5.0


def test_the_network_that_a_stage_starts_from_decides(tmp_path):
    """`init` and `teacher` stand in the place of `model`, whose default is the built-in world's."""
    wan = pipeline(tmp_path, config_of("wan2.1-i2v-14b"), flow_shift=3.0)
    tiny, adapted = (load(["stage=0", "run=r", *words]) for words in ([], [f"init={wan}"]))
    assert (tiny.lr, tiny.iters) == (2e-3, 6500)
    assert (adapted.lr, adapted.iters, adapted.shift, adapted.checkpointing) == (1e-3, 2000, 3.0, True)
    assert adapted.origins["shift"] == "configs/model/wan2.1-i2v-14b.yaml"
    assert load(["stage=2", "run=r", f"teacher={wan}"]).shift == 5.0
