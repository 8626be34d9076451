"""bench/pool.py: what waits for what, and what is left out after a failure."""

import sys
from pathlib import Path

import pytest
from pool import Work, run


def note(name: str, needs: tuple[str, ...], folder: str, fails: bool = False) -> None:
    """Leave a file; what it needs must be there."""
    assert all(Path(folder, other).exists() for other in needs)
    print(name)
    if fails:
        sys.exit(3)
    Path(folder, name).touch()


@pytest.mark.parametrize("at_once", [1, 3])
def test_work_waits_for_what_it_needs(tmp_path, at_once, capfd):
    """c fails, so d never begins; b and e are done. What each prints is in its log."""
    after = {"a": (), "b": ("a",), "c": ("a",), "d": ("c",), "e": ()}
    made = tmp_path / "made"
    made.mkdir()
    todo = {name: Work(note, (name, needs, str(made), name == "c"), needs) for name, needs in after.items()}
    assert run(todo, at_once, tmp_path / "logs") == ["c", "d"]
    assert sorted(file.name for file in made.iterdir()) == ["a", "b", "e"]
    assert (tmp_path / "logs" / "c.txt").read_text().startswith("c\n") and not (tmp_path / "logs" / "d.txt").exists()
    said = capfd.readouterr().out
    assert "failed: c, " in said and "done: b, " in said
