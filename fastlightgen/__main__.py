"""fastlightgen COMMAND ..., python -m fastlightgen COMMAND ...: the same as python -m fastlightgen.COMMAND ..."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from fastlightgen import __version__
from fastlightgen.config import UserError, called, guarded
from fastlightgen.config import main as start
from fastlightgen.config.commands import COMMANDS

ABOUT = {  # in the order in which they are used
    "train": "distil a model: run one stage, or all of them",
    "plan": "count memory, operations, traffic and time of a run before it is started",
    **{
        name: COMMANDS[name].__doc__
        for name in ("encode", "export", "generate", "evaluate", "speed", "vbench", "report")
    },
    "sweep": "distil once per combination of settings, and compare the students",
    "ops": "show which compiled parts are installed and what computes the operators",
}


def usage() -> str:
    lines = [f"  {name:<10} {about}" for name, about in ABOUT.items()]
    return "\n".join(
        [
            f"usage: {called('COMMAND')} key=value ...     (also: python -m fastlightgen.COMMAND key=value ...)",
            "",
            *lines,
            "",
            f"{called('COMMAND')} --help lists the keys. To begin, without any download: {called('train')} stage=3",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names; without one, list the commands."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    check = (lambda cfg: command(name).check_start(cfg)) if name == "train" else None
    if name == "sweep":
        guarded(lambda: command("sweep").sweep(words))
    elif name in ABOUT and name != "ops":
        start(lambda cfg: getattr(command(name), name)(cfg), name, words, check)
    else:
        guarded(lambda: own(name, words))


def command(name: str) -> Any:
    """The module of a command, which is imported when it is needed: most load torch."""
    return importlib.import_module(f"fastlightgen.{name}")


def own(name: str, words: Sequence[str]) -> None:
    """The words that take no keys: --help, --version, ops. Refuse any other word."""
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == "--version" or (name == "ops" and "--version" in words):
        print(f"fastlightgen {__version__}")
    elif name == "ops":
        importlib.import_module("fastlightgen.ops.__main__").main()
    else:
        near = difflib.get_close_matches(name, ABOUT, n=1)
        hint = f"did you mean {near[0]}?" if near else f"wanted one of {', '.join(ABOUT)}"
        hint = f"did you mean train {name}?" if "=" in name else hint
        raise UserError(f"{name}: there is no such command; {hint}")


if __name__ == "__main__":
    main()
