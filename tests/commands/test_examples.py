"""examples/: the notebook's cells run in order, and the Dockerfile names files and extras that exist."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastlightgen.__main__ import main as front

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RUN = 'subprocess.run([sys.executable, "-m", "fastlightgen", *words], check=True)'
KERNEL = "from IPython.display import Image, display\n"


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """In its short form, its commands in this process, without a kernel."""
    cells = json.loads((EXAMPLES / "first_hour.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "commit the notebook without outputs"
    program = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    changed = {"SHORT = False": "SHORT = True", RUN: "front(words)", KERNEL: ""}
    for text in changed:
        assert program.count(text) == 1
        program = program.replace(text, changed[text])
    shown: list[bytes] = []
    monkeypatch.chdir(tmp_path)
    names: dict = {"front": front, "Image": lambda data, width: data, "display": shown.append}
    exec(compile(program, "first_hour.ipynb", "exec"), names)
    assert [picture[:4] for picture in shown] == [b"GIF8", b"GIF8", b"GIF8", b"\x89PNG", b"GIF8"]
    assert "12 blocks, 25 block calls for three predictions" in capsys.readouterr().out
    assert len(names["student"].blocks) == 8 and set(names["scores"]) >= {"adherence", "frechet"}


def test_dockerfile_names_what_exists():
    text = (EXAMPLES / "Dockerfile").read_text()
    extras = re.search(r"'\.\[(.+)\]'", text)[1].split(",")
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras)
    for key in ("FLG_BUILD_CUDA", "FLG_CUDA_ARCHS"):
        assert key in text and f"{key} " in (ROOT / "CMakeLists.txt").read_text()
    torch = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert f"torch {torch.rpartition('.')[0]}" in text, "the image was chosen for another torch"


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_dockerfile_passes_its_linter():
    done = subprocess.run(["hadolint", str(EXAMPLES / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
