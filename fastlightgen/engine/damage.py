"""Verifies the newest checkpoint before a run continues from it. All ranks call this together and share the files."""

import shutil
from pathlib import Path

from safetensors import SafetensorError

from fastlightgen.engine import checkpoint
from fastlightgen.engine.hang import HERE
from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import STATE
from fastlightgen.files.tensors import open_tensors, sums_of, verify
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import say


def check(folder: Path, damaged: str) -> None:
    """Verify the newest checkpoint. A damaged one is refused, or put aside so that the one before it counts."""
    while True:
        found: list[int] = ranks.from_first(checkpoint.steps(folder)[-2:])
        if not found:
            return
        step, here = found[-1], checkpoint.path(folder, found[-1])
        why = wrong(here, step, ranks.rank(), ranks.size())
        flags = ranks.gathered(int(bool(why)))
        if not any(flags):
            return
        why = ranks.from_rank(flags.index(1), why)
        earlier = f"step-{found[0]:06d}" if len(found) > 1 else "the beginning"
        if damaged == "refuse":
            raise ValueError(f"{here}: damaged or incomplete ({why}); delete it to continue from {earlier}")
        aside = here.with_name(f"damaged-{here.name}")
        if ranks.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            here.rename(aside)
        ranks.barrier()
        say(f"warning: {here}: damaged or incomplete ({why}); it is now {aside.name}; continues from {earlier}")


def wrong(here: Path, step: int, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a checkpoint, "" if nothing is; reads every `parts`-th file from `part` on."""
    try:
        state = read_json(here / "state.json", STATE, "")
        if "check" in state and state["check"] != checkpoint.seal(state):
            return "state.json is not what was written"
        if state["step"] != step:
            return f"state.json is of step {state['step']}"
        for name in state["files"][part::parts]:
            verify_file(here / f"{name}.safetensors")
    except (ValueError, OSError) as err:
        return str(err).replace(f"{here}/", "").removesuffix("; ").strip()
    return ""


def verify_file(file: Path) -> None:
    """Raise ValueError if a file of tensors is damaged. One without checksums, of an older version, is only opened."""
    try:
        with open_tensors(file) as f:
            names = set(f.keys())
            for name, wanted in sums_of(f.metadata(), file).items():
                HERE.at("verifying the checkpoint")
                verify(name, f.get_tensor(name) if name in names else None, wanted, file)
    except (OSError, SafetensorError) as err:
        raise ValueError(f"{file}: {err}") from None
