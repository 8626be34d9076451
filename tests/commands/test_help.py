"""--help: what each page lists, its defaults against those of a real run, and its width."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastlightgen.config import load, root
from fastlightgen.config.commands import COMMANDS
from fastlightgen.config.fields import show
from fastlightgen.config.layers import leaves
from fastlightgen.config.run import Run
from fastlightgen.config.stages import STAGES

ROOT = Path(__file__).parents[2]
ENTRY = re.compile(r"  ([\w.]+)=(\S*)(  .*)?")
TEACHER = "wan2.1-i2v-14b"


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(ROOT)  # `tests` is a folder


@pytest.fixture
def page(capsys):
    def get(*words: str, command: str = "train") -> str:
        with pytest.raises(SystemExit) as stop:
            load([*words, "--help"] if words[:1] != ("--help",) else words, command)
        assert stop.value.code == 0
        return capsys.readouterr().out

    return get


def sections(page: str) -> dict[str, dict[str, str]]:
    """Title -> key -> default of every entry below it."""
    parts = [part.splitlines() for part in page.split("\n\n") if re.match(r"(Expert k|K)eys", part)]
    return {part[0]: dict(m.groups()[:2] for line in part if (m := ENTRY.fullmatch(line))) for part in parts}


def listed(page: str) -> dict[str, str]:
    """Key -> default of every entry of a page; no key stands twice."""
    parts = sections(page).values()
    found = {key: default for part in parts for key, default in part.items()}
    assert len(found) == sum(map(len, parts))
    return found


def everyday(cls: type) -> set[str]:
    return {key for key, f in leaves(cls).items() if f.metadata["everyday"] and key != "stage"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_shows_its_everyday_keys_and_all_keys_on_demand(page, stage):
    short, full = page(f"stage={stage}"), page(f"stage={stage}", "--help", "all")
    known = set(leaves(root(stage))) - {"stage"}
    assert set(listed(short)) == everyday(root(stage)) and set(listed(full)) == known
    assert f"{len(known - everyday(root(stage)))} more keys: python -m fastlightgen.train stage={stage} --help all" in (
        short.replace("\n", " ")
    )
    titles = list(sections(full))
    expert = [title for title in titles if title.startswith("Expert")]
    assert expert and titles[-len(expert) :] == expert  # everyday keys first
    for key, f in leaves(root(stage)).items():
        assert key == "stage" or "".join(f.metadata["help"].split()) in "".join(full.split())


def test_a_page_shows_no_other_stage(page):
    assert "  guided=" not in page("stage=3", "--help", "all") and "  guided=" in page("stage=2")
    assert "  beta1=" not in page("stage=2", "--help", "all") and "  beta1=" in page("stage=3")


@pytest.mark.parametrize(
    "words, source",
    [
        ([], "configs/model/tiny.yaml over configs/stage{}.yaml."),
        ([f"model={TEACHER}"], f"configs/model/{TEACHER}.yaml over configs/stage{{}}.yaml."),
        (["model=tests"], "configs/stage{}.yaml; no preset fits model=tests."),
        (["preset=paper"], "configs/model/tiny.yaml over configs/preset/paper.yaml over configs/stage{}.yaml."),
        (["config={}"], f"configs/model/{TEACHER}.yaml over configs/stage{{}}.yaml."),
    ],
    ids=["tiny", "preset", "folder", "paper", "file"],
)
@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_defaults_are_those_of_a_run(page, tmp_path, stage, words, source):
    """Every default of the page is the value that a run with these words has."""
    file = tmp_path / "c.yaml"
    file.write_text(f"model: {TEACHER}\nlr: 3.0e-5\nseed: 7\n")
    words = [f"stage={stage}", *(word.format(file) for word in words)]
    text = page(*words, "--help", "all")
    cfg, shown = load([*words, "run=r"]), listed(text)
    assert shown.pop("run") and len(shown) > 50
    assert shown == {key: show(getattr(cfg, key)) or '""' for key in shown}
    assert " ".join(f"Defaults: {source.format(stage)}".split()) in " ".join(text.split())


def test_the_front_page_is_short(page):
    text = page("--help")
    assert len(text.splitlines()) <= 50
    assert all(f"  stage={name}" in text for name in STAGES)
    assert set(listed(text)) == everyday(Run)
    assert listed(text)["run"] == "runs/tiny" and "required" not in text


def test_all_keys_of_all_stages(page):
    parts = sections(page("--help", "all"))
    shared = parts.pop("Keys of every stage:") | parts.pop("Expert keys of every stage:")
    assert set(shared) == set(leaves(Run)) - {"stage"}
    for stage in (*"0123", "decoder"):
        own = parts.pop(f"Keys of stage={stage}:") | parts.pop(f"Expert keys of stage={stage}:")
        assert set(own) == set(leaves(root(stage))) - set(leaves(Run))
    rest = parts.pop("Keys of the evaluation:") | parts.pop("Expert keys of the evaluation:")
    assert not parts and set(rest) == {key for key in leaves(root("all")) if key.startswith("evaluate.")}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_other_commands(page, command):
    cls = COMMANDS[command]
    short, full = page("--help", command=command), page("--help", "all", command=command)
    assert set(listed(short)) == everyday(cls) and set(listed(full)) == set(leaves(cls))
    required = [key for key, value in listed(full).items() if value == "..."]
    assert bool(required) == (command != "report") and all(key in short for key in required)  # run=, or runs=


def test_plan(page):
    """The machine's keys and the stage's; of those of training only the ones that change a plan."""
    short = sections(page("--help", command="plan"))
    assert {"gpu", "gpus"} <= set(short["Keys of the machine:"]) and "seed" not in str(short)
    assert short["Keys of the stage, as of train:"]["model"] == TEACHER
    assert {"batch", "engine", "fake_mode"} <= set(short["Keys of the stage, as of train:"])
    assert "fake_mode" not in str(sections(page("stage=2", command="plan")))


@pytest.mark.parametrize("columns", [30, 60, 80, 132, 300])
def test_no_line_is_wider_than_the_terminal(page, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    pages = [page("--help", "all", command=name) for name in ("train", "plan", *COMMANDS)]
    pages += [page("stage=all", "--help", "all"), page("stage=3", f"model={'tests/../' * 20}tests"), page("--help")]
    widest = max(len(line) for text in pages for line in text.splitlines())
    assert widest <= min(columns, 100)  # longer lines are hard to read
    assert columns < 60 or widest > 0.9 * min(columns, 100)


def test_a_pipe_has_80_columns():
    command = [sys.executable, "-c", "from fastlightgen.config import main; main(print)", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=True)
    assert 75 < max(map(len, done.stdout.splitlines())) <= 80 and not done.stderr


@pytest.mark.parametrize(
    "words, says",
    [
        (["stage=4"], "stage=4: there is no such stage"),
        (["stage=3", "model=tiney"], "did you mean tiny?"),
        (["stage=3", "config=no.yaml"], "config=no.yaml: there is no such file; the recipes are hunyuan"),
        (["--stage=3"], "keys have no dashes; write stage=3"),
    ],
)
def test_words_beside_help_are_checked(words, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        load([*words, "--help"])
