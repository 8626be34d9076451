"""Every command of README.md and docs/: it parses, bash and zsh read it alike, and the story of real videos runs.

A fenced block without a language holds commands. Placeholders such as TEACHER are names of stand-ins in the folder
where the tests run (`place`), so the lines stay as they are printed.

Executed: the stories of real videos, in this process. Their stages run on the CPU, without torchrun and without the
recipe, which needs 8 GPUs. All else is parsed only: `make`, `pip`, `hf download`, and the commands of the built-in
world, which test_front.py, test_train.py and others run.
"""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pipelines
import pytest
from helpers import numbered, typed, write_video
from PIL import Image
from students import make_student, stock

from fastlightgen import sweep
from fastlightgen.__main__ import ABOUT
from fastlightgen.__main__ import main as front
from fastlightgen.config import load
from fastlightgen.config.files import repositories
from fastlightgen.data.lists import Row
from fastlightgen.data.video import read_clip

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPE = ROOT / "configs/recipes/wan2.1-14b-480p-8x80gb.yaml"
PIPELINES = ("TEACHER", "PIPELINE", "Wan2.1-I2V-14B-480P-Diffusers")
MODELS = ("MODEL", "STUDENT", "VERSION_1", "student", "DIR/stage3/model", "runs/wan/stage3/model")
CACHES = ("CACHE", "cache")
INLINE = ("python -m fastlightgen.", "fastlightgen ", "train stage=", "... stage=")
SMALL = {  # words that replace or follow those of the page; "" takes a word away
    "plan": "",
    "encode": "buckets=[32x48,48x32] frames=5 fps=8 workers=0 progress=false threads=1",
    "train": "config= device=cpu batch=1 threads=1 progress=false",
    "train 1": "clips=1 timesteps=1",
    "train 2": "iters=2 sample_every=2",
    "train 3": "iters=2 sample_every=2 ratio=1 critic_start=0",
    "report": "",
    "export": "threads=1 progress=false",
    "generate": "size=32x48x5 device=cpu threads=1 progress=false",
}


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a page in a language."""
    found = re.findall(r"^```(.*)\n([\s\S]*?)^```$", page.read_text(), flags=re.MULTILINE)
    return [text for kind, text in found if kind == language]


def lines(block: str) -> list[str]:
    """The commands of a block; a backslash at the end of a line continues it."""
    return block.replace("\\\n", " ").splitlines()


def inline(page: Path) -> list[str]:
    """Commands in the text and in tables. `... stage=1` continues the command above it; stage=N is any stage."""
    text = re.sub(r"^```[\s\S]*?^```$", "", page.read_text(), flags=re.MULTILINE)
    found = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    found = [code for code in found if code.startswith(INLINE) and "=" in code and "stage=N" not in code]
    return [re.sub(r"^(\.\.\.|train) ", "python -m fastlightgen.train ", code) for code in found]


FENCED = [(page.name, line) for page in PAGES for block in blocks(page) for line in lines(block)]
PROGRAMS = [(page.name, program) for page in PAGES for program in blocks(page, "python")]
COMMANDS = FENCED + [(page.name, line) for page in PAGES for line in inline(page)]


def of_package(line: str) -> tuple[str, list[str]]:
    """(command, its words) of a line that starts a command of this package; ("", []) for other programs."""
    program, *words = shlex.split(line)
    if program == "fastlightgen":
        return words[0], words[1:]
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        start = get_args_parser().parse_args(words)
        assert start.module and int(start.nproc_per_node) > 1
        module, words = start.training_script, start.training_script_args
    elif program == "python":
        assert words[0] == "-m"
        module, words = words[1], words[2:]
    else:
        return "", []
    package, _, name = module.partition(".")
    assert package == "fastlightgen" and name in ABOUT
    return name, words


@pytest.fixture
def place(pipeline, tmp_path, monkeypatch) -> Path:
    """An empty folder in which the commands of the pages find all that they name."""
    monkeypatch.chdir(tmp_path)
    for name in PIPELINES:
        Path(name).symlink_to(pipeline("wan_i2v"))
    Path("RECIPE").symlink_to(RECIPE)
    return tmp_path


@pytest.fixture
def results(place, pipeline) -> Path:
    """The place, with the folders that commands leave behind: models and caches."""
    for name in MODELS:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(pipeline("wan_i2v") / "transformer")
    for name in CACHES:
        Path(name).mkdir()
    make_student(pipeline("wan_t2v"), Path("runs/demo/stage3/model"))
    return place


def test_the_commands_are_found():
    """One known command of each page and kind, so that the tests below do not pass for want of commands."""
    assert ("README.md", "make demo") in COMMANDS
    assert ("README.md", "python -m fastlightgen.train stage=1 model=TEACHER run=DIR") in COMMANDS
    assert ("README.md", "fastlightgen train stage=3") in COMMANDS
    assert ("watching.md", "python -m fastlightgen.report run=RUN") in COMMANDS
    assert ("clusters.md", "pip install -e '.[cluster]'") in COMMANDS
    assert sum(page == "real-models.md" for page, _ in FENCED) >= 11
    assert "README.md" in dict(PROGRAMS)
    assert any(line.startswith("torchrun ") and "stage=3 run=DIR" in line for _, line in FENCED)


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_parses(page, line, results, capsys):
    """By the parser that runs it; of other programs, the names that this repository knows."""
    name, words = of_package(line)
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            load(words, name)
        assert stop.value.code == 0 and "stage" in capsys.readouterr().out
    elif name == "sweep":
        assert all(sweep.groups_of(*sweep.settings(words)).values())
    elif name:
        cfg = load(words, name)
        given = dict(word.split("=", 1) for word in words)
        known = {f.name for f in fields(cfg)} | {"config"}
        assert {key.partition(".")[0] for key in given} <= known
    else:
        other(shlex.split(line))


def other(words: list[str]) -> None:
    """Check a command of another program."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif words[0] == "pip":
        assert words[1:3] == ["install", "-e"] and (extras := re.fullmatch(r"\.\[([a-z,]+)\]", words[3]))
        table = (ROOT / "pyproject.toml").read_text()
        assert all(f"\n{name} = [" in table for name in extras[1].split(","))
    elif words[0] == "PYTHONPATH=tests":  # test_the_pipeline_without_a_download runs it
        assert words[1:3] == ["python", "-c"]
    else:
        assert words[:2] == ["hf", "download"] and words[3] == "--local-dir"
        assert words[2].split("/")[1] == words[4] and words[4] in PIPELINES


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_shells_read_it_alike(page, line, tmp_path):
    """Nothing outside quotes that bash or zsh would expand, each in its own way, nor `!` where they search history."""
    bare = re.sub(r"'[^']*'", "", line)
    assert "!" not in bare and not set("$`\\") & set(bare)
    bare = re.sub(r'"[^"]*"', "", bare)
    assert not set("[]*?{}~#^()<>|&;'\"") & set(bare)
    assert not any(word.startswith("=") for word in bare.split())
    for shell in filter(shutil.which, ("bash", "zsh")):  # in an empty folder, where no pattern matches
        call = [shell, "-c", f"printf '%s\\n' {line}"]
        done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout.splitlines() == shlex.split(line)


def test_the_first_command_of_the_readme(place):
    """What README says that `train stage=3` uses."""
    text = (ROOT / "README.md").read_text()
    says = re.search(r"It first says what it uses: `([^`]+)`", text)
    cfg = load(["stage=3"])
    assert says and all(str(getattr(cfg, key)) == value for key, value in (w.split("=") for w in says[1].split()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files(page):
    """Links inside the repository lead to a file and to a heading of it; recipes that the text names exist."""
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.is_file(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target
    for file in re.findall(r"`(configs/recipes/[\w.-]+\.yaml)`", text):
        assert file == "configs/recipes/NAME.yaml" or (ROOT / file).is_file(), file


def test_the_table_of_repositories():
    text = (ROOT / "docs/real-models.md").read_text()
    assert dict(re.findall(r"^\| `([\w.-]+)` \| `([\w.-]+/[\w.-]+)` \|$", text, flags=re.MULTILINE)) == repositories()


@pytest.mark.parametrize(("page", "program"), PROGRAMS, ids=[page for page, _ in PROGRAMS])
def test_a_program_runs(page, program, results):
    exec(compile(program, page, "exec"), {})


def write_clips(page: Path) -> None:
    """The videos of both lists of the page, the captions of the first, and the second as clips.csv."""
    for file, caption in re.findall(r"^(clips/\S+) *(.*)$", blocks(page, "text")[0], flags=re.MULTILINE):
        Path(file).parent.mkdir(exist_ok=True)
        if caption:
            Path(file).write_text(caption)
        else:
            write_video(Path(file), numbered(10), 8)
    Path("clips.csv").write_text(blocks(page, "csv")[0])
    for row in blocks(page, "csv")[0].splitlines()[1:]:
        write_video(Path(row.split(",")[0]), numbered(10), 8)
    Image.new("RGB", (48, 32), "red").save("first.png")


def smaller(name: str, words: list[str]) -> list[str]:
    """The words of a command for a tiny pipeline."""
    given = dict(word.split("=", 1) for word in words)
    small = " ".join((SMALL[name], SMALL.get(f"{name} {given.get('stage')}", "")))
    given |= dict(word.split("=", 1) for word in small.split())
    return [f"{key}={value}" for key, value in given.items() if value]


def test_the_pipeline_without_a_download(tmp_path):
    [line] = [
        line for page, line in FENCED if page == "real-models.md" and line.startswith("PYTHONPATH=tests python -c")
    ]
    code = shlex.split(line)[-1].replace("TEACHER", str(tmp_path / "TEACHER"))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", check=True)
    assert (tmp_path / "TEACHER/model_index.json").exists()
    kinds = (
        (ROOT / "docs/real-models.md").read_text().partition("the size of the cache. ")[2].partition(" in place of")[0]
    )
    assert all(hasattr(pipelines, kind) for kind in re.findall("`(.+?)`", kinds)) and kinds.count("`") == 6


@pytest.mark.parametrize("page", ["docs/real-models.md", "README.md"])
def test_the_story_of_real_videos(page, place, capsys):
    """From two videos to a student and its clip, in the page's order; each command names the page's next one."""
    write_clips(ROOT / "docs/real-models.md")
    text = (ROOT / page).read_text().partition("\n# Details\n")[0].partition("## The built-in world")[0]
    Path("page.md").write_text(text)
    story = [of_package(line) for block in blocks(Path("page.md")) for line in lines(block)]
    story = story[[name for name, _ in story].index("plan") :]
    story = [(name, words) for name, words in story if name]
    assert [name for name, _ in story if name != "report"] == [
        "plan", "encode", "train", "train", "train", "export", "generate",
    ]  # fmt: skip
    expected = ""
    for name, words in story:
        front([name, *smaller(name, words)])
        stage = " ".join(word for word in words if name == "train" and word.startswith("stage="))
        out = capsys.readouterr().out
        if name in ("plan", "report"):
            continue
        assert not expected or f"{name} {stage}" == expected
        if name != "generate":
            following, rest = typed(out.splitlines()[-1].removeprefix("next: "))
            expected = f"{following} {''.join(word for word in rest if word.startswith('stage='))}"
    student, clip = (dict(w.split("=", 1) for w in story[-1][1])[key] for key in ("model", "out"))
    assert len(stock(student).transformer.blocks) == 3  # of 4
    assert read_clip(Row(clip, Path(clip)), 16, 5, [(32, 48)]).shape == (5, 32, 48, 3)
    run = Path(dict(w.split("=", 1) for w in story[2][1])["run"])
    assert list(run.glob("stage3/samples/*"))
