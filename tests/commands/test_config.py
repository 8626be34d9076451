"""The command line: refused words with their messages, and for each an accepted neighbour with its value."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastlightgen import config
from fastlightgen.config import ConfigError, UserError, load

S0, S1, S2, S3, ALL = (f"stage={n} run=r".split() for n in (0, 1, 2, 3, "all"))
EVALUATE = ["model=tiny", "out=e.json"]
ENCODE = ["videos=tests", "pipeline=tests", "out=o"]

# command, words, what the one line must say, the accepted neighbour, (key, value) that it must give
CASES = [
    ("train", [*S3, "betta1=2"], ["betta1=2", "did you mean beta1?"], [*S3, "beta1=2"], ("beta1", 2.0)),
    ("train", [*S3, "qqqqqq=2"], ["qqqqqq=2: unknown key", "--help"], [*S3, "seed=2"], ("seed", 2)),
    ("train", [*S2, "beta1=2"], ["beta1 is a key of stage=3, not of stage=2"], [*S2, "alpha=.5"], ("alpha", 0.5)),
    (
        "train",
        [*S1, "iters=9"],
        ["key of stage=0, stage=2, stage=3,", "not of stage=1"],
        [*S1, "clips=9"],
        ("clips", 9),
    ),
    (
        "train",
        [*S2, "stage1.clips=4"],
        ["key of stage=all, not of stage=2; give clips=... to stage=1, or type stage=all"],
        ["stage=1", "run=r", "clips=4"],
        ("clips", 4),
    ),
    ("train", [*S2, "stage2.lr=1"], ["stage=all, not of stage=2"], [*S2, "lr=1"], ("lr", 1.0)),
    ("train", [*ALL, "lr=1"], ["stage2.lr=..., stage3.lr=..."], [*ALL, "stage2.lr=1"], ("stage2.lr", 1.0)),
    (
        "train",
        [*ALL, "stage2=1"],
        ["stage2 is a section"],
        [*ALL, "stage2.estimator=full", "stage2.p=1"],
        ("stage2.p", 1.0),
    ),
    (
        "train",
        [*ALL, "stage3.bata2=1"],
        ["did you mean stage3.beta2?"],
        [*ALL, "stage3.beta2=1"],
        ("stage3.beta2", 1.0),
    ),
    ("train", [*S2, "lr=fast"], ["lr=fast: wanted number"], [*S2, "lr=1e-5"], ("lr", 1e-5)),
    ("train", [*S2, "lr="], ["lr=: wanted number"], [*S2, "lr=0"], ("lr", 0.0)),
    ("train", [*S2, "iters=2.5"], ["iters=2.5: wanted whole number"], [*S2, "iters=2"], ("iters", 2)),
    ("train", [*S2, "iters=???"], ["iters=???: wanted whole number"], [*S2, "iters=4"], ("iters", 4)),
    (
        "train",
        [*S2, "overwrite=2"],
        ["=2: wanted true or false"],
        [*S2, "overwrite=True"],
        ("overwrite", True),
    ),
    ("train", [*S2, "betas=.9"], ["betas=.9: wanted [number,number]"], [*S2, "betas=[.8,.9]"], ("betas", [0.8, 0.9])),
    ("train", [*S2, "betas=[.9"], ["betas=[.9: wanted [number,number]"], [*S2, "betas=[0,1e-1]"], ("betas", [0, 0.1])),
    ("train", [*S2, "betas=${oc.env:HOME}"], ["wanted [number,number]"], [*S2, "betas=[0,.1]"], ("betas", [0, 0.1])),
    ("train", [*S2, "betas=['${oc.env:HOME}',1]"], ["wanted [number,"], [*S2, "betas=[0,.1]"], ("betas", [0, 0.1])),
    (
        "train",
        [*S2, "betas=&a [*a]"],
        ["betas=&a [*a]: wanted [number,number]"],
        [*S2, "betas=[0,.1]"],
        ("betas", [0, 0.1]),
    ),
    ("train", [*S2, "betas=[1,2,3]"], ["wanted two numbers"], [*S2, "betas=[0.1,0.2]"], ("betas", [0.1, 0.2])),
    (
        "train",
        [*S2, "betas=[.9,1]"],
        ["=[0.9,1.0]: wanted >= 0 and < 1"],
        [*S2, "betas=[0,.5]"],
        ("betas", [0, 0.5]),
    ),
    ("train", [*S2, "betas=[.9,.8]"], ["betas=[0.9,0.8]", "below"], [*S2, "betas=[.8,.9]"], ("betas", [0.8, 0.9])),
    ("train", [*S1, "t_range=[.9,.1]"], ["t_range=[0.9,0.1]"], [*S1, "t_range=[.1,.9]"], ("t_range", [0.1, 0.9])),
    ("train", [*S3, "t_clamp=[.5,.5]"], ["t_clamp=[0.5,0.5]"], [*S3, "t_clamp=[0,1]"], ("t_clamp", [0.0, 1.0])),
    ("train", [*ALL, "stage3.t_clamp=[1,0]"], ["stage3.t_clamp=[1.0,0.0]"], [*ALL, "stage3.t_clamp=[0,1]"], None),
    ("train", [*S2, "alpha=1.1"], ["alpha=1.1: wanted >= 0 and <= 1"], [*S2, "alpha=1"], ("alpha", 1.0)),
    ("train", [*S1, "ratio=0"], ["ratio=0.0: wanted > 0 and < 1"], [*S1, "ratio=.01"], ("ratio", 0.01)),
    ("train", [*S2, "lr=nan"], ["lr=nan: wanted a finite number"], [*S2, "lr=1"], ("lr", 1.0)),
    ("train", [*S2, "seed=2147483648"], ["wanted >= 0 and <= 2147483647"], [*S2, "seed=2147483647"], None),
    ("train", [*S2, "LR=1"], ["LR=1: unknown key; did you mean lr?"], [*S2, "lr=1"], ("lr", 1.0)),
    ("train", [*S2, "model="], ["model= is empty"], [*S2, "model=tiny"], ("model", "tiny")),
    ("train", [*S3, "beta1=inf"], ["beta1=inf: wanted a finite number"], [*S3, "beta1=-1"], ("beta1", -1.0)),
    (
        "train",
        [*S2, "guard=1"],
        ["guard=1.0: wanted > 1"],
        [*S2, "target=self", "guided=1", "guard=1.1"],
        ("guard", 1.1),
    ),
    ("train", [*S3, "steps=9"], ["steps=9: wanted >= 1 and <= 8"], [*S3, "steps=8"], ("steps", 8)),
    (
        "train",
        [*S2, "drop=both"],
        ["wanted one of joint, independent"],
        [*S2, "drop=joint"],
        ("drop", "joint"),
    ),
    ("train", [*S0, "engine=zero"], ["engine=zero: wanted one of local"], [*S0, "engine=local"], ("engine", "local")),
    (
        "train",
        [*S2, "drop=independent", "estimator=sampled"],
        ["estimator=sampled", "use estimator=full"],
        [*S2, "drop=independent", "estimator=full"],
        ("estimator", "full"),
    ),
    ("train", [*S2, "estimator=sampled", "p=1"], ["p=1.0", "divides"], [*S2, "estimator=sampled", "p=.9"], ("p", 0.9)),
    ("train", [*S2, "lr=1", "lr=2"], ["lr is given twice", "lr=1", "lr=2"], [*S2, "lr=2"], ("lr", 2.0)),
    ("train", [*S2, "seed"], ["'seed': wanted key=value"], [*S2, "seed=7"], ("seed", 7)),
    ("train", [*S2, "--save-every=3"], ["write save_every=3"], [*S2, "save_every=3"], ("save_every", 3)),
    (
        "train",
        ["run=r"],
        ["stage is required; give stage=0, 1, 2, 3, all or decoder (train --help says"],
        S3,
        ("stage", "3"),
    ),
    ("train", ["stge=3", "run=r"], ["stge=3: unknown key; did you mean stage?"], S3, ("stage", "3")),
    (
        "train",
        [*S1, "lrr=1"],
        ["did you mean lr, a key of stage=0, stage=2,"],
        [*S2, "lr=1"],
        ("lr", 1.0),
    ),
    ("train", [*S2, "betta1=2"], ["did you mean beta1, a key of stage=3?"], [*S3, "beta1=2"], ("beta1", 2.0)),
    ("train", [*ALL, "lrr=1"], ["did you mean stage2.lr or stage3.lr?"], [*ALL, "stage3.lr=1"], ("stage3.lr", 1.0)),
    ("train", [*ALL, "stge3.lr=1"], ["did you mean stage3.lr?"], [*ALL, "stage3.lr=1"], ("stage3.lr", 1.0)),
    (
        "train",
        [*ALL, "stage2.sample_every=1"],
        ["sample_every is one key for all stages; give sample_every=..."],
        [*ALL, "sample_every=1"],
        ("sample_every", 1),
    ),
    ("train", [*ALL, "stage1.lr=1"], ["stage1 has no lr; give stage2.lr=... or stage3.lr=..."], ALL, None),
    ("train", [*S3, "stage3.lr=1"], ["key of stage=all, not of stage=3; give lr=..."], [*S3, "lr=1"], ("lr", 1.0)),
    ("train", ["stage=4", "run=r"], ["stage=4: there is no such stage; give stage=0, 1"], ALL, ("stage", "all")),
    ("train", ["stage=1", "run="], ["run= is empty"], ["stage=1", "run=a b"], ("run", "a b")),
    ("report", [], ["run is required", "give run=DIR, or runs=A,B"], ["run=r"], ("run", "r")),
    ("train", [*S1, "model=tiney"], ["model=tiney", "wan2.1-i2v-14b", "did you mean tiny?"], [*S1, "model=tiny"], None),
    ("train", [*S1, "data=shape"], ["data=shape", "did you mean shapes?"], [*S1, "data=tests"], ("data", "tests")),
    ("train", [*S2, "teacher=nowhere"], ["teacher=nowhere: neither a folder"], [*S2, "teacher=tests"], None),
    ("train", [*ALL, "stage2.teacher=no"], ["stage2.teacher=no: neither"], [*ALL, "stage2.teacher=tests"], None),
    ("train", [*S1, "config="], ["config= is empty"], S1, None),
    (
        "train",
        [*S1, "config=no.yaml"],
        ["config=no.yaml: there is no such file; the recipes are hunyuanv"],
        S1,
        None,
    ),
    ("evaluate", [*EVALUATE, "clip=3"], ["did you mean clips?"], [*EVALUATE, "clips=3"], ("clips", 3)),
    ("evaluate", [*EVALUATE, "stage=1"], ["stage=1: unknown key"], EVALUATE, ("sampler", "auto")),
    ("generate", ["model=tiny", "out=a.png"], ["prompt is required"], ["model=tiny", "out=a.png", "prompt=x"], None),
    ("encode", [*ENCODE, "size=480x832"], ["did you mean buckets?"], [*ENCODE, "buckets=480x832"], None),
    (
        "plan",
        ["stage=decoder"],
        ["a decoder has no plan", "start train stage=decoder"],
        ["gpus=8"],
        None,
    ),
    ("report", ["runn=r"], ["did you mean run?"], ["run=r"], ("out", "")),
]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])  # `tests` above is a folder that exists


def get(cfg, key: str):
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg


@pytest.mark.parametrize("command, words, says, accepted, gives", CASES, ids=[" ".join(c[1]) for c in CASES])
def test_refusal_and_accepted_neighbour(command, words, says, accepted, gives):
    with pytest.raises(ConfigError) as err:
        load(words, command)
    message = str(err.value)
    assert "\n" not in message and all(part in message for part in says), message
    cfg = load(accepted, command)
    if gives:
        assert get(cfg, gives[0]) == gives[1] and type(get(cfg, gives[0])) is type(gives[1])


FILES = [
    ("lrr: 1", ["lrr=1", "did you mean lr?", "c.yaml"], "lr: 1"),
    ("beta1: 1", ["key of stage=3", "c.yaml"], "alpha: 1"),
    ("lr: fast", ["lr=fast: wanted number", "c.yaml"], "lr: 1e-5"),
    ("iters: 3.0", ["iters=3.0: wanted whole number"], "iters: 3"),
    ("lr: true", ["lr=true: wanted number"], "lr: 2"),
    ("lr:", ["lr=None: wanted number"], "lr: 0"),
    ("lr: {a: 1}", ["lr.a=1: unknown key", "did you mean lr?"], "lr: 1.0"),
    ("p: 2", ["p=2.0: wanted", "c.yaml"], "p: 0.5"),
    ("lr: 1\nlr: 2", ["lr is given 2 times", "c.yaml"], "lr: 1\np: 1\nestimator: full"),
    ("[1, 2]", ["c.yaml: holds list"], ""),
    ("p: 1\nstage2.p: 1", ["stage2.p is a key of stage=all"], "p: 1\nestimator: full"),
    ("betas: ['${oc.env:HOME}', 1]", ["betas", "wanted [number,number]", "c.yaml"], "betas: [1e-1, 0.9]"),
    ("on: 1", ["c.yaml: has the key true, wanted text; put it in quotes"], ""),
    ("lr: [", ["c.yaml: is not valid YAML"], "# nothing"),
    ("stage: 3", ["stage=3: wanted one of 2", "c.yaml"], "stage: 2"),
    ("run: ''", ["run= is empty"], "run: x"),
]


@pytest.mark.parametrize("text, says, accepted", FILES, ids=[f[0] for f in FILES])
def test_a_file_is_read_as_strictly_as_the_command_line(tmp_path, text, says, accepted):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as err:
        load([*S2, f"config={file}"])
    assert "\n" not in str(err.value) and all(part in str(err.value) for part in says), err.value
    file.write_text(accepted)
    load([*S2, f"config={file}"])


def test_file_that_is_not_text(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load([*S2, f"config={tmp_path / 'c.yaml'}"])


def test_main(capsys, monkeypatch):
    def stop_with(error):
        def fn(cfg):
            raise error

        config.main(fn, "report", ["run=r"])

    def stop(error):
        with pytest.raises(SystemExit) as end:
            stop_with(error)
        return end.value.code, capsys.readouterr().err

    seen = []
    config.main(seen.append, "report", ["run=r"])
    assert seen == [config.Report(run="r")]
    assert stop(UserError("r: no\n  such run")) == (2, "error: r: no such run\n")
    assert stop(KeyboardInterrupt()) == (130, "interrupted\n")
    assert stop(ValueError("no such\n block")) == (2, "error: no such block\n")
    monkeypatch.setenv("FLG_DEBUG", "1")
    for mistake in (ValueError("where?"), TypeError("a bug")):
        with pytest.raises(type(mistake)):  # debug mode and bugs keep their traceback
            stop_with(mistake)


def test_from_a_shell():
    """In a real process: exit code 2, one line on stderr, nothing on stdout, and no import of torch for a typo."""
    code = (
        "import sys; from fastlightgen import config\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)\n"
        "config.main(print)"
    )
    done = subprocess.run([sys.executable, "-c", code, *S3, "betta1=2"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: betta1=2: unknown key; did you mean beta1?\n"
