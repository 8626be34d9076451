"""The text of --help: everyday keys first, with the defaults of the model that is given, wrapped to the terminal."""

import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fastlightgen.config.fields import default_of, limits, show, type_of
from fastlightgen.config.layers import TYPES, default_run, leaves, plain, settings_from
from fastlightgen.config.plan import PLANNED, Machine
from fastlightgen.config.run import Run
from fastlightgen.config.stages import CHOOSES, METHODS, STAGES, declared

ALL = "all"  # the word after --help that asks for every key
WIDEST, MARGIN = 100, 28  # columns: of a line, and of the keys beside their meanings
# Keys of a stage that change its plan most: the everyday ones of `plan`, with those of the machine.
PLAN = "model preset method dtype engine zero offload sequence_parallel micro_batch batch checkpointing iters fake_mode"
UNBROKEN = "\xa0"  # a space at which no line ends
ALSO = (
    "Values are text where no type is given. config=FILE.yaml reads keys from a file; the command line wins. "
    "dry_run=true prints the resolved configuration and exits."
)
Page = tuple[type, DictConfig]  # a root class, and the values of the keys that the user does not give
Rows = list[tuple[str, str]]  # (what a user types, what it means)


def front_page(stages: Mapping[str, Page]) -> str:
    """`train --help`: the stages, and the keys that all of them share; all keys of `stages`, if any are given."""
    more = {"stage=3 --help": "the keys of a stage", "stage=3 model=DIR --help": "with the defaults for that model"}
    more |= {} if stages else {f"--help {ALL}": "all keys of all stages"}
    lines = [*usage("train", "stage=STAGE"), "", "Stages:"]
    lines += table([(f"stage={name}", about) for name, about in STAGES.items()])
    shared = OmegaConf.structured(Run(stage="all", run=default_run(default_of(leaves(Run)["model"]))))
    lines += listing("train", leaves(Run), shared, bool(stages))
    for name, (cls, node) in stages.items():
        others = ("stage1.", "stage2.", "stage3.")  # of stage=all: they stand under their own stages
        own = {key: f for key, f in leaves(cls).items() if key not in leaves(Run) and not key.startswith(others)}
        lines += listing("train", own, node, True, f"stage={name}") + methods(name)
    lines += ["", *wrapped(f"More pages, after {called('train')}:"), *table(list(more.items()))]
    return "\n".join([*lines, "", *wrapped(ALSO)])


def help_text(command: str, page: Page, given: Mapping[str, Any], everything: bool) -> str:
    """The page of a command, or of one stage of `train` and `plan`; `everything` shows the expert keys too."""
    cls, node = page
    known, about = leaves(cls), str(cls.__doc__)
    stage = str(default_of(known["stage"])) if "stage" in known and command in ("train", "plan") else ""
    lines = [*usage(command, f"stage={stage}" if stage else ""), "", *wrapped(f"{about[0].upper()}{about[1:]}.")]
    lines += wrapped(f"Defaults: {settings_from(cls, given)}.") if stage and "model" in known else []
    if command == "plan":
        lines += wrapped(f"stage={', '.join(PLANNED)} plans one stage, stage=all stages 1 to 3.")
    ordered = leaves(Machine) | known if command == "plan" else known  # the machine's keys first
    lines += listing(command, ordered, node, everything) + methods(stage)
    if hidden := sum(not is_everyday(command, key, f) for key, f in known.items() if key != "stage"):
        words = " ".join([called(command), *[f"stage={stage}"] * bool(stage), "--help", ALL])
        lines += [] if everything else ["", *wrapped(f"{hidden} more key{'s' * (hidden > 1)}: {words}")]
    return "\n".join([*lines, "", *wrapped(ALSO)])


def usage(command: str, stage: str) -> list[str]:
    return wrapped(f"usage: {called(command)} {stage} KEY=VALUE ...".replace("  ", " "), "", "  ")


def called(command: str) -> str:
    """The words that start a command, in the form in which this process was started."""
    program = Path(sys.argv[0])
    if program.stem == "fastlightgen":  # the installed command, fastlightgen.exe on Windows
        return f"fastlightgen {command}"
    if program.name == "__main__.py" and program.parent.name == "fastlightgen":
        return f"python -m fastlightgen {command}"
    return f"python -m fastlightgen.{command}"


def is_everyday(command: str, key: str, f: Field) -> bool:
    """Does --help show this key, without the word all?"""
    if command == "plan" and key not in leaves(Machine):
        return key.rpartition(".")[2] in PLAN.split()
    return bool(f.metadata["everyday"])


def group(command: str, key: str, stage: str) -> str:
    """The title above a key."""
    section = key.rpartition(".")[0]
    if section:
        return "Keys of the evaluation" if section == "evaluate" else f"Keys of {section.replace('stage', 'stage ')}"
    if command == "plan":
        return "Keys of the machine" if key in leaves(Machine) else "Keys of the stage, as of train"
    if command == "train":
        return "Keys of every stage" if key in leaves(Run) else f"Keys of {stage}"
    return "Keys"


def listing(
    command: str, known: Mapping[str, Field], node: DictConfig, everything: bool, stage: str = "this stage"
) -> list[str]:
    """The keys with their defaults and meanings under their titles: the everyday ones, then the others."""
    titled: dict[str, Rows] = {}
    for wanted in (True, False)[: 1 + everything]:
        for key, f in known.items():
            if key != "stage" and is_everyday(command, key, f) == wanted:
                title = group(command, key, stage)
                title = title if wanted else f"Expert {title[0].lower()}{title[1:]}"
                titled.setdefault(title, []).append(row(key, f, plain(OmegaConf.select(node, key))))
    return [line for title, rows in titled.items() for line in ["", *wrapped(f"{title}:"), *table(rows)]]


def row(key: str, f: Field, value: Any) -> tuple[str, str]:
    """A key with its default, and its meaning with its type and range."""
    meaning, limit = f.metadata["help"], limits(f)
    if f.metadata["choices"]:
        kind = "" if all(c in meaning for c in f.metadata["choices"]) else limit
    else:
        kind = " ".join([TYPES[type_of(f)].replace("text", ""), limit]).strip().replace(" ", UNBROKEN)
    default = "..." if value is None else show(value) or '""'
    required = "required; " if value is None else ""
    return f"{key}={default}", required + meaning + (f" ({kind})" if kind else "")


def methods(stage: str) -> list[str]:
    """The methods of a stage, if it has a choice."""
    if stage not in CHOOSES or len(METHODS[stage]) < 2:
        return []
    rows = [(f"method={name}", declared(stage, name).about) for name in METHODS[stage]]
    title = f"Methods of stage={stage}; method=NAME before --help lists the keys of that method"
    return ["", *wrapped(f"{title}:"), *table(rows)]


def table(rows: Rows) -> list[str]:
    """Two columns; a left side that is too wide has a line of its own."""
    margin = min(MARGIN, 4 + max(len(left) for left, _ in rows)) if width() >= 2 * MARGIN else 6
    lines: list[str] = []
    for left, right in rows:
        first = f"  {left}".ljust(margin)
        if len(first) > margin or not first.endswith("  "):
            lines += wrapped(left, "  ", " " * 4)
            first = " " * margin
        lines += wrapped(right, first, " " * margin)
    return lines


def wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    """The lines of a text; `first` stands before the first line, `rest` before the others."""
    lines = textwrap.wrap(text, width(), initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return [line.replace(UNBROKEN, " ") for line in lines]


def width() -> int:
    """Columns of a line: those of the terminal, 80 without one."""
    return min(WIDEST, shutil.get_terminal_size().columns)
