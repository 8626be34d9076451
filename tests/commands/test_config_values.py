"""Sources of configuration values, and how values are shown, compared and passed on."""

import pytest
import yaml

from fastlightgen import config
from fastlightgen.config import ConfigError, load
from fastlightgen.config.files import config_root
from fastlightgen.config.stages import METHODS, STAGES

S0, S1, S2, S3, ALL = (f"stage={n} run=r".split() for n in (0, 1, 2, 3, "all"))
EVALUATE = ["model=tiny", "out=e.json"]


def test_precedence(tmp_path):
    """Defaults < configs/stageN.yaml < preset=NAME < the model preset's section < config=FILE < the command line."""
    preset = config.preset("tiny")["stage2"]
    assert (preset["iters"], preset["shift"]) != (config.root("2").iters, config.root("2").shift)
    cfg = load(S2)
    assert {k: getattr(cfg, k) for k in preset} == preset
    assert cfg.guard_every == config.root("2").guard_every  # in no file
    file = tmp_path / "c.yaml"
    file.write_text("iters: 77\nshift: 2\n")
    cfg = load([*S2, f"config={file}", "shift=9"])
    assert (cfg.iters, cfg.shift, cfg.batch) == (77, 9.0, preset["batch"])
    # another network, such as a folder: the stage's settings
    for model in ("wan2.1-t2v-14b", "tests"):
        cfg = load([*S2, f"model={model}"])
        assert (cfg.alpha, cfg.lr, cfg.iters, cfg.batch, cfg.shift) == (1.0, 1e-5, 4000, 16, 5.0)
    # the file may name the preset, whose settings it still overrides
    file.write_text("model: wan2.1-i2v-14b\nstage: 3\nlr: 1\nrun: r\n")
    cfg = load([f"config={file}"])
    assert (cfg.stage, cfg.beta1, cfg.beta2, cfg.shift, cfg.lr) == ("3", 3.5, 0.25, 5.0, 1.0)
    file.write_text("model: tests\nstage: 3\npreset: paper\nema: 0.5\nrun: r\n")
    cfg = load([f"config={file}", "iters=7"])
    assert (cfg.lr, cfg.ema, cfg.iters) == (5e-7, 0.5, 7)
    assert load([f"config={file}", "preset=default"]).lr == 2e-6


# App. A: 16 GPUs with one clip each; Stage II 4000 iterations at 1e-5, Stage III 1000 at 5e-7; (alpha, beta1, beta2) is
# (1, 3.5, 0.25) for Wan, (1, 2.0, 0.25) for HunyuanVideo. Sec. 3.3: p is 0.5. Sec. 3.4: a1, a2, b1, b2 are 1, 0.1, 1,
# 0.1. Sec. 4: 30% are pruned, four steps.
PAPER = {
    "1": {"ratio": 0.3},
    "2": {"batch": 16, "iters": 4000, "lr": 1e-5, "alpha": 1.0, "p": 0.5},
    "3": {
        "batch": 16,
        "iters": 1000,
        "lr": 5e-7,
        "lr_fake": 5e-7,
        "critic_start": 0,
        "ema": 0.0,
        "count": "outer",
        "ratio": 5,
    }
    | {"steps": 4, "beta2": 0.25, "a1": 1.0, "a2": 0.1, "b1": 1.0, "b2": 0.1},
}


@pytest.mark.parametrize("model", ["tests", "wan2.1-i2v-14b", "hunyuanvideo-i2v"])
def test_preset_paper_has_the_papers_numbers(model):
    beta1 = 2.0 if model.startswith("hunyuan") else 3.5
    for stage, wanted in PAPER.items():
        cfg = load([f"stage={stage}", "run=r", f"model={model}", "preset=paper"])
        assert {key: getattr(cfg, key) for key in wanted} == wanted
        planned = load([f"stage={stage}", "preset=paper"], "plan")
        assert {key: getattr(planned, key) for key in wanted} == wanted
    assert cfg.beta1 == beta1
    whole = load(["stage=all", "run=r", f"model={model}", "preset=paper"])
    assert (whole.stage2.iters, whole.stage3.iters, whole.stage3.lr, whole.stage3.beta1) == (4000, 1000, 5e-7, beta1)
    assert config.for_stage(whole, 3) == cfg


def test_the_student_moves_as_far_as_in_published_recipes():
    """lr x student updates: 4e-4 in Self-Forcing-Plus, 1.6e-3 in FastVideo; the paper's numbers give 1e-4."""

    def path(*words):
        cfg = load([*S3, "model=tests", *words])
        return cfg.lr * cfg.iters * cfg.updates[0]

    assert path("preset=paper") == pytest.approx(1e-4)
    assert path() == pytest.approx(1.16e-3)  # between the two
    cfg = load([*S3, "model=tests"])
    assert cfg.save_every / cfg.ratio == 50  # student updates between two checkpoints
    assert (cfg.critic_lr, load([*S3, "model=tests", "fake_mode=lora"]).critic_lr) == (4e-7, 5e-5)


@pytest.mark.parametrize("model", ["tiny", "tiny-hunyuan"])
def test_the_built_in_world_keeps_its_own_settings(model):
    """A tiny preset states every number in which the presets differ, so that none of them changes it."""
    for stage in "0123":
        words = [f"stage={stage}", "run=r", f"model={model}"]
        assert config.numbers(load(words)) == config.numbers(load([*words, "preset=paper"]))
    cfg = load([*S3, f"model={model}"])
    wanted = {"tiny": (70, 16, 4e-4, 8e-4, 1.5, 20), "tiny-hunyuan": (125, 16, 1e-4, 4e-4, 3.0, 0)}
    assert (cfg.iters, cfg.batch, cfg.lr, cfg.lr_fake, cfg.shift, cfg.critic_start) == wanted[model]
    assert cfg.ema == 0.0


# The shifts of the teachers' own sampling: Wan2.1, generate.py (5, image to video at 480p 3); Wan2.2, wan/configs (T2V
# A14B 12, I2V A14B and TI2V 5); HunyuanVideo, hyvideo/config.py (7); HunyuanVideo-1.5, README.md (5 at 480p). Training
# takes the same, but for 480p image to video, as Self-Forcing-Plus, and for T2V A14B: 5.
SHIFTS = {
    "wan2.1-t2v-1.3b": (5.0, 5.0),
    "wan2.1-t2v-14b": (5.0, 5.0),
    "wan2.1-i2v-14b": (3.0, 5.0),
    "wan2.1-i2v-14b-720p": (5.0, 5.0),
    "wan2.2-t2v-a14b": (12.0, 5.0),
    "wan2.2-i2v-a14b": (5.0, 5.0),
    "wan2.2-ti2v-5b": (5.0, 5.0),
    "hunyuanvideo-t2v": (7.0, 7.0),
    "hunyuanvideo-i2v": (7.0, 7.0),
    "hunyuanvideo-i2v-token-replace": (7.0, 7.0),
    "hunyuanvideo1.5-t2v": (5.0, 5.0),
    "hunyuanvideo1.5-i2v": (5.0, 5.0),
    "tiny": (3.0, 3.0),
    "tiny-hunyuan": (3.0, 3.0),
    "tiny-ti2v": (3.0, 3.0),
    "tiny-hunyuan15": (3.0, 3.0),
    "tiny-a14b": (3.0, 3.0),
}


def test_stage_layer_lies_between_defaults_and_preset(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "stage0.yaml").write_text("lr: 5\nclip: 6\n")
    (tmp_path / "model" / "small.yaml").write_text("network: {}\nstage0: {lr: 7}\n")
    monkeypatch.setattr("fastlightgen.config.files.config_root", lambda: tmp_path)
    monkeypatch.setattr("fastlightgen.config.layers.config_root", lambda: tmp_path)
    monkeypatch.setattr("fastlightgen.config.cli.check_place", lambda *_: None)
    cfg = load([*S0, "model=small"])
    assert (cfg.lr, cfg.clip, cfg.weight_decay) == (7.0, 6.0, config.root("0").weight_decay)
    (tmp_path / "stage0.yaml").write_text("lrr: 5\n")
    with pytest.raises(ConfigError, match=r"did you mean lr\? \(in configs/stage0.yaml\)"):
        load(S0)


def test_settings_of_a_method_stand_above_those_of_its_stage(tmp_path, monkeypatch):
    """In a model's file; those of the stage reach a method where it knows the key, its own must be right."""
    for folder in ("model", "method"):
        (tmp_path / folder).mkdir()
    (tmp_path / "method" / "lcm.yaml").write_text("lr: 5\n")
    small = tmp_path / "model" / "small.yaml"
    small.write_text("network: {}\nstage3: {lr: 7, beta1: 2, iters: 109}\nmethods: {lcm: {lr: 8}}\n")
    for module in ("files", "layers"):
        monkeypatch.setattr(f"fastlightgen.config.{module}.config_root", lambda: tmp_path)
    monkeypatch.setattr("fastlightgen.config.cli.check_place", lambda *_: None)
    words = [*S3, "model=small"]
    for more, lr in (([], 7), (["method=lcm"], 8), (["method=dmd2"], 7), (["method=lcm", "lr=3"], 3)):
        assert load([*words, *more]).lr == lr
    assert load([*words, "method=lcm"]).iters == 109
    small.write_text("network: {}\nmethods: {lcm: {beta1: 8}}\n")
    with pytest.raises(ConfigError, match=r"beta1.*in configs/model/small.yaml, methods.lcm"):
        load([*words, "method=lcm"])


@pytest.mark.parametrize("name", config.presets())
def test_methods_of_a_preset_exist(name):
    for method, settings in config.preset(name).get("methods", {}).items():
        stage = next(stage for stage, names in METHODS.items() if method in names)
        cfg = load([f"stage={stage}", "run=r", f"model={name}", f"method={method}"])
        assert {key: getattr(cfg, key) for key in settings} == settings


@pytest.mark.parametrize("name", ["0", "1", "2", "3"])
def test_stage_files_agree_with_the_defaults(name):
    """configs/stageN.yaml repeats the recommended recipe for readers and must equal the dataclass, the only source."""
    cls, recipe = config.root(name), yaml.safe_load((config_root() / f"stage{name}.yaml").read_text())
    assert {key: getattr(cls, key) for key in recipe} == recipe


@pytest.mark.parametrize("name", config.presets())
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "decoder"])
def test_every_preset_loads(name, stage):
    cfg = load([f"stage={stage}", "run=r", f"model={name}"])
    sections = [cfg.stage1, cfg.stage2, cfg.stage3] if stage == "all" else [cfg]
    teacher, trained = SHIFTS[name]
    assert config.preset(name)["inference"]["shift"] == teacher
    wanted = [teacher if stage == "0" else trained] * len(sections)
    if name == "tiny" and stage in ("3", "all"):  # a smaller shift keeps more of the fine detail in four steps
        wanted[-1] = 1.5
    assert [section.shift for section in sections] == wanted


@pytest.mark.parametrize(("word", "why"), [("zero=2", "shards nothing"), ("timeout=60", "waits for no other process")])
def test_keys_of_many_processes_need_an_engine_that_has_them(word, why):
    key, value = word.split("=")
    for stage in ("2", "all"):
        with pytest.raises(ConfigError, match=f"^{word}.*: engine=local .*{why}; .* engine=deepspeed$"):
            load([f"stage={stage}", "run=r", word])
    assert getattr(load(["stage=2", "run=r", word, "engine=deepspeed"]), key) == float(value)
    load(["stage=2", "run=r", "zero=3", "timeout=1800"])  # the defaults


def test_presets():
    wan = config.preset("wan2.1-t2v-1.3b")["network"]
    assert wan["num_attention_heads"] * wan["attention_head_dim"] == 1536 and isinstance(wan["eps"], float)
    assert config.preset("shapes", "data") == {"frames": 8, "size": 20, "first_frame_prob": 0.5}
    with pytest.raises(ConfigError, match="model=huge: no such preset; there are hunyuanvideo-i2v, .*tiny, "):
        config.preset("huge")


def test_wan_presets_have_the_published_sizes():
    """Parameters by the block's formula, 4 d^2 + 2 d^2 ..., against the counts of the released checkpoints."""
    counts = {"wan2.1-t2v-1.3b": 46_440_704, "wan2.1-t2v-14b": 351_394_304, "wan2.1-i2v-14b": 403_838_464}
    for name, published in counts.items():
        n = config.preset(name)["network"]
        d, f = n["num_attention_heads"] * n["attention_head_dim"], n["ffn_dim"]
        attention = 4 * (d * d + d) + 2 * d  # q, k, v, o and two RMS norms
        image = 2 * (n["added_kv_proj_dim"] * d + d) + d if n["added_kv_proj_dim"] else 0
        assert 2 * attention + image + (2 * d * f + d + f) + 2 * d + 6 * d == published, name


PROMPTS = ("yes", "${x}", "a: 'b' # é", r"\${", r"\\${y}", "1e5", "a red ball, {fast}", "2024-01-01", "a\x85b\u2028")


@pytest.mark.parametrize(
    "command, words",
    [
        ("train", [*S0, "lr=1e-7", "init=tests"]),
        ("train", [*S1, "t_range=[0.1,0.5]", "model=wan2.1-t2v-14b"]),
        ("train", ["stage=2", "run=12e5"]),
        ("train", [*S3, "beta1=-0.5"]),
        ("train", [*ALL, "stage3.lr=3e-7", "seed=5", "evaluate.clips=4"]),
        ("evaluate", EVALUATE),
        ("report", ["run=null"]),
        *(("generate", ["model=tiny", "out=a.mp4", f"prompt={p}"]) for p in PROMPTS),
    ],
    ids=lambda v: v if isinstance(v, str) else v[-1],
)
def test_dry_run_reproduces_the_configuration(command, words, tmp_path, capsys):
    def never(cfg):
        raise AssertionError("a dry run runs nothing")

    config.main(never, command, [*words, "dry_run=true"])
    out = capsys.readouterr().out
    assert isinstance(yaml.safe_load(out), dict)
    (tmp_path / "c.yaml").write_text(out)
    cfg = load(words, command)
    assert load([f"config={tmp_path / 'c.yaml'}"], command) == cfg
    for word in words:  # text stays as typed
        if word.startswith(("prompt=", "run=")):
            assert getattr(cfg, word.split("=")[0]) == word.split("=", 1)[1]


def test_fingerprint():
    first = config.fingerprint(load(S2))
    quiet = "device=cpu threads=1 log_every=1 save_every=9 keep=1 overwrite=true progress=false guard=3 dry_run=true"
    assert config.fingerprint(load(["stage=2", "run=other", *quiet.split()])) == first
    changes = ("lr=1", "seed=1", "batch=2", "betas=[0.1,0.999]", "dtype=bfloat16", "target=ema", "model=tests")
    assert len({first, *(config.fingerprint(load([*S2, c])) for c in changes)}) == len(changes) + 1
    assert config.fingerprint(load(S3)) != first
    whole = load(ALL)
    assert config.fingerprint(load([*ALL, "evaluate.clips=1"])) == config.fingerprint(whole)
    assert config.fingerprint(load([*ALL, "stage2.lr=1"])) != config.fingerprint(whole)


def test_for_stage_gives_the_stage_its_own_configuration():
    whole = load([*ALL, "stage2.lr=1", "seed=4", "log_every=3", "evaluate.steps=2", "evaluate.seed=7"])
    assert config.for_stage(whole, 2) == load([*S2, "lr=1", "seed=4", "log_every=3"])
    assert config.for_stage(whole, 1) == load([*S1, "seed=4", "log_every=3"])
    assert config.for_stage(whole, 3) == load([*S3, "seed=4", "log_every=3"])
    measured = config.for_evaluate(whole, model="tiny", teacher="", out="e.json")
    assert measured == load([*EVALUATE, "seed=7", "steps=2", "force=true"], "evaluate")  # not the seed of training


def test_diff():
    old, new = {"a": 1, "b": {"c": [0.1, 2], "d": True}, "e": 1}, {"a": 1, "b": {"c": [0.1, 3], "d": True}, "f": "x"}
    assert config.diff(old, new) == ["b.c: [0.1,2] -> [0.1,3]", "e: 1 -> (none)", "f: (none) -> x"]
    assert config.diff(old, old) == []
    changed = config.diff(config.numbers(load(S2)), config.numbers(load(["stage=2", "run=z", "lr=1e-5"])))
    wanted = config.preset("tiny")["stage2"]["lr"]
    assert changed == [f"lr: {wanted} -> 1e-05"]


def test_a_configuration_made_in_python_is_checked_too():
    assert config.root("3")(run="r").beta1 == 3.5
    with pytest.raises(ConfigError, match="steps=0: wanted >= 1 and <= 8"):
        config.root("3")(run="r", steps=0)
    with pytest.raises(ConfigError, match="t_clamp"):
        config.root("3")(run="r", t_clamp=[0.9, 0.1])
