"""Thousands of command lines, valid and absurd: each resolves, or is refused in one line and at once.

FLG_LINES=N takes N times as many (`make soak` does).
"""

import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import Field, replace
from functools import cache

import pytest
import tally

from fastlightgen import sweep
from fastlightgen.config import ConfigError, load, to_yaml
from fastlightgen.config import layers as config_layers
from fastlightgen.config.cli import pick_root
from fastlightgen.config.errors import plain
from fastlightgen.config.fields import check_value, default_of, show
from fastlightgen.config.layers import leaves
from fastlightgen.config.limits import MOST_THREADS
from fastlightgen.config.stages import METHODS, STAGES
from fastlightgen.plan import plan

TIMES = int(os.environ.get("FLG_LINES", "1"))
SECONDS = 10  # of computing, which nothing comes near that does not count to its argument
NUMBERS = (
    "0 -0 -1 1 2 3 0.5 1e-9 1e-300 1e9 1000000000 1000000001 2147483648 9223372036854775808 1e18 1e308 -1e308 1e400 "
    "-1e400 nan -nan inf -inf .inf 0x10 0o17 1_000 1e 1e5.0 --1 +1 1:30 ½ ² ٣ 1,5 1.0.0"
).split()
SIZES = "16x16 16x16x5 480x832x81 0x0x0 -16x16x5 1000000000x1000000000x1 999999999x16x5 16x16x999999997 1e9x1e9x1 axb"
LISTS = "[] [1] [0.1,0.2] [0.2,0.1] [1,2,3] [nan,1] [1e400,1] [[1],2] [,] {a:1} [null,1] [true,false]".split()
TEXTS = [
    "", " ", "a", "true", "false", "True", "yes", "null", "~", "???", "${x}", "${oc.env:HOME}", "\\", "'", '"', "{",
    "*a", "&a [*a]", "!!python/object/apply:os.system [true]", "!!map [1]", "2024-99-99", "a\nb", "a\tb", "\0",
    "\x1b[31m", "\x85", "\u2028", "\ud800", "é" * 300, "9" * 400, "9" * 5_000, "-" + "9" * 5_000, "1e" + "9" * 300,
    "[" * 3_000, "a" * 100_000, "../..", "/dev/null", "/", ".", "a b=c", "x=y", "[0.1 0.2]",
]  # fmt: skip
STRANGE = ["", ".", "..", "a" * 5_000, "é", "\0", "-x", "[0]"]
VALUES = [*NUMBERS, *SIZES.split(), *LISTS, *TEXTS]
STARTS: dict[str, list[list[str]]] = {
    "train": [[f"stage={n}", "run=r"] for n in STAGES if n != "decoder"]
    + [["stage=decoder", "vae=tests", "videos=v", "run=r"]]
    + [[f"stage={n}", "run=r", f"method={m}"] for n in "23" for m in METHODS[n]],
    "plan": [[f"stage={n}"] for n in ("0", "1", "2", "3", "all")],
    "generate": [["model=tiny", "out=a.png", "prompt=x"]],
    "encode": [["videos=v", "pipeline=.", "out=o"]],
    "export": [["model=.", "pipeline=.", "out=o"]],
    "evaluate": [["model=tiny", "out=e.json"]],
    "report": [["run=r"]],
    "speed": [["model=.", "pipeline=."], ["model=tiny"]],
    "vbench": [["prompts=p.json", "out=o"], ["prompts=p.json", "out=o", "model=.", "images=i"]],
}
LINES = {"train": 900, "plan": 250, "generate": 300, "encode": 250, "export": 120, "evaluate": 250}
LINES |= {"report": 80, "speed": 200, "vbench": 250}


@pytest.fixture(autouse=True)
def shipped_once(monkeypatch):
    """Parse each shipped file once; the parser has tests of its own."""
    honest, root = config_layers.read_yaml, str(config_layers.config_root())
    shipped = cache(honest)

    def read(path):
        return shipped(path) if str(path).startswith(root) else honest(path)

    monkeypatch.setattr(config_layers, "read_yaml", read)


def misspelt(key: str, draw: random.Random) -> str:
    at = draw.randrange(len(key))
    changes = [key[:at] + key[at + 1 :], key[: at + 1] + key[at:], key.upper(), f"stage{at % 5}.{key}"]
    return draw.choice([*changes, draw.choice(STRANGE)])


def lines(command: str, count: int) -> Iterator[list[str]]:
    """Random words: of keys that the command has, some with values that fit, the others with absurd ones."""
    draw = random.Random(command)
    for n in range(count):
        words = list(draw.choice(STARTS[command]))
        known = leaves(pick_root(command, dict(word.split("=", 1) for word in words)))
        for key in draw.sample(sorted(known), draw.choice((1, 1, 2, 3))):
            default, choices = default_of(known[key]), known[key].metadata["choices"]
            value = show(default) if draw.random() < 0.3 and default != "???" else draw.choice(VALUES)
            value = draw.choice([*choices, value]) if choices else value
            words.append(f"{misspelt(key, draw) if draw.random() < 0.1 else key}={value}")
        if n % 10 == 0:
            words.append(draw.choice([*VALUES, "-x", "--x=1", words[-1], "config=absent.yaml", "config=/"]))
        draw.shuffle(words)
        yield words


def outcome(call, words: list[str]) -> tuple[object, str]:
    """What a call returns, and the line with which it refuses. Any other error fails, and so does a long wait."""
    shown = str([word[:60] for word in words])
    began, said, out = time.process_time(), "", None
    try:
        out = call()
    except ValueError as err:
        said = str(err)
        assert said and "\n" not in said and len(plain(said)) < 2_000, (shown, said[:200])
    except Exception as err:
        raise AssertionError(f"{type(err).__name__}: {err} of {shown}") from err
    assert time.process_time() - began < SECONDS, shown
    tally.count("command lines", bool(said))
    return out, said


@pytest.mark.parametrize("command", LINES)
def test_every_line_resolves_or_is_refused(command, tmp_path):
    refused = resolved = 0
    for number, words in enumerate(lines(command, LINES[command] * TIMES)):
        cfg, said = outcome(lambda words=words: load(words, command), words)
        refused, resolved = refused + bool(said), resolved + (not said)
        if cfg is not None and number % 5 == 0:  # what dry_run prints gives the same configuration, without dry_run
            cfg = replace(cfg, dry_run=False) if hasattr(cfg, "dry_run") else cfg
            file = tmp_path / "c.yaml"
            file.write_text(to_yaml(cfg), errors="surrogatepass")
            again, why = outcome(lambda file=file: load([f"config={file}"], command), words)
            assert again == cfg or "cannot be read" in why or "UTF-8" in why, (words, why)
    assert refused > resolved / 4 and resolved > refused / 20


def numeric_fields() -> Iterator[tuple[str, Field]]:
    """Every key of every command that takes a number."""
    for command, starts in STARTS.items():
        for start in starts:
            known = leaves(pick_root(command, dict(word.split("=", 1) for word in start)))
            yield from ((key, f) for key, f in known.items() if f.type in (int, float))


def test_every_number_has_limits():
    tried = list(numeric_fields())
    assert len(tried) > 100
    for key, f in tried:
        for value in (math.inf, math.nan, 1e10, 10**10, -1e10, -(10**10)):
            with pytest.raises(ConfigError, match=rf"^{key}=.*: wanted "):
                check_value(f, value, key)


def test_counts_that_cost_time_or_memory_have_limits_of_their_own():
    counts = ("threads", "turns", "steps", "rank", "ranks", "workers", "count", "samples")
    limits = {(key, f.metadata["range"]["hi"]) for key, f in numeric_fields() if key in counts}
    assert {key for key, _ in limits} == set(counts) and (("threads", MOST_THREADS) in limits)
    assert not [key for key, limit in limits if limit is None]
    assert len([key for key, _ in limits if key == "threads"]) == 1  # the same in every command


@pytest.mark.parametrize("command", ["speed", "vbench"])
@pytest.mark.parametrize("size", ["axb", "0x0x0", "480x832", "1000000000x16x1"])
def test_a_wrong_size_is_refused_before_a_model_is_read(command, size):
    _, said = outcome(lambda: load([*STARTS[command][0], f"size={size}"], command), [size])
    assert said.startswith(f"size={size}: wanted ")


LARGE = [
    ["gpus=1000000", "batch=100000"],
    ["gpus=1000000", "gpus_per_node=1", "sequence_parallel=1000"],
    ["size=16384x16384x16381", "batch=100000"],
    ["size=480x832x81", "text_tokens=1000000", "iters=1000000000"],
    ["stage=1", "clips=10000", "timesteps=10", "memory=1e-9"],
    ["stage=1", "clips=100000", "timesteps=1000"],
    ["stage=2", "method=f3", "clips=100000", "timesteps=1000", "queries=1000000"],
    ["stage=3", "steps=8", "ratio=1000000000", "iters=1000000000"],
    ["stage=3", "lora_rank=10000", "fake_mode=lora", "shift=0.01"],
    ["stage=all", "model=tiny", "gpu=cpu", "engine=local", "gpus=1", "stage2.batch=100000"],
    ["prefix=10000"],
    ["size=1000000000x1000000000x1"],
    ["size=" + "9" * 4_000 + "x1x1"],
]


@pytest.mark.parametrize("words", LARGE, ids=lambda words: " ".join(words)[:60])
def test_the_planner_answers_at_once(words, capsys):
    def call():
        try:
            plan(load(words, "plan"))
        except SystemExit as stop:  # 1: does not fit
            assert stop.code == 1

    _, said = outcome(call, words)
    assert said or "peak" in capsys.readouterr().out


SWEPT = [
    ["seeds=1000000000"], ["seeds=99999999999999999999"], ["seeds=²"], ["seeds=-1"], ["seeds=1,,2"], ["seeds=1.5"],
    ["at_once=1e9"], ["clips=1000000000"], ["dry_run=maybe"], ["steps=1", "steps=2"], ["steps="], ["=1"], ["steps"],
    [f"{key}=" + ",".join(map(str, range(1, 11))) for key in ("steps", "seed", "threads", "keep", "batch")],
    ["steps=" + ",".join(["1"] * 1001)], ["steps=1e400"], ["model=\0"], ["steps=nan"], ["x" * 100_000 + "=1"],
    ["[=]"], ["steps=[" + "1," * 1_000], ["stage9.lr=1"], ["-x=1"], ["seeds=" + ",".join(map(str, range(1001)))],
]  # fmt: skip


@pytest.mark.parametrize("words", SWEPT, ids=lambda words: " ".join(words)[:40])
def test_a_sweep_is_refused_before_it_counts(words, tmp_path):
    own = [f"run={tmp_path}"] + ["dry_run=true"] * ("dry_run" not in words[0])
    _, said = outcome(lambda: sweep.sweep([*own, *words]), words)
    assert said and list(tmp_path.iterdir()) == []
