"""search=calibrated: recover a few sets of blocks by a short Stage II each, and keep the one that comes out best.

It goes beyond the papers, whose scores judge networks that nothing has trained yet. Each candidate is a run folder of
its own inside RUN/stage1, with Stage II's own code, checkpoints and checks. It is deleted when its error is known.
"""

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlightgen.atomic import write_json
from fastlightgen.config import (
    ConfigError,
    Plan,
    another_stage,
    keys_for,
    load,
    result_of,
    unset_type,
    with_type,
    words,
)
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import say
from fastlightgen.stages.search import dropping
from fastlightgen.stages.sweep import Sweeps

SHORT = {"iters": "100", "warmup": "10", "guided": "1"}  # Stage II's keys in a recovery; those of `recovery` win
# Keys of a recovery that the search sets, or that are those of Stage I.
SET = ("stage", "method", "run", "model", "data", "seed", "importance", "teacher", "config", "overwrite", "dry_run")
SEPARATOR = re.compile(r",(?![^\[]*\])")  # a comma outside a list
QUIET: Mapping[str, Any] = {  # Stage I has looked at the data; nobody watches a recovery
    "data_check": "off", "sample_every": 0, "keep_every": 0, "tensorboard": False, "wandb": "", "trackio": "",
}  # fmt: skip


def recovery_keys(text: str) -> dict[str, str]:
    """The keys of Stage II in a recovery: SHORT with the words of `recovery`; raise if Stage II refuses them."""
    given = [word.partition("=") for word in SEPARATOR.split(text) if word]
    for key, equals, _ in given:
        if not equals or key in SET:
            what = "is set by the search" if equals else "wanted keys like iters=200,lr=1e-5"
            raise ConfigError(f"recovery={text}: {key}: {what}; give keys of stage=2")
    keys = SHORT | {key: value for key, _, value in given}
    try:
        load(words({"stage": "2", "run": "unused", **keys}))
    except ConfigError as err:
        raise ConfigError(f"recovery={text}: {err}") from None
    return keys


def recovery(cfg: Any, run: str | Path) -> Any:
    """The configuration of a recovery in its own run folder, for the Stage I of `cfg`."""
    made = load(words(keys_for(cfg, "2", **QUIET, **recovery_keys(cfg.recovery), run=run)))
    made = with_type(made, cfg.dtype) if unset_type(cfg) else made
    made.overwrite = cfg.overwrite  # the line that ends an interrupted run names it
    return made


def recovery_plan(cfg: Plan) -> Plan:
    """The plan of all recoveries together, for the plan of their Stage I."""
    own: dict[str, Any] = dict(vars(cfg))
    keys = recovery_keys(own["recovery"])
    typed = vars(load(words({"stage": "2", "run": "unused", **keys})))
    changes = {key: typed[key] for key in keys}
    changes["iters"] *= own["candidates"]
    return another_stage(cfg, "2", dropped=own["ratio"], **changes)


def calibrate(
    cfg: Any, found: dict[str, Any], folder: Path, sweeps: Sweeps, recover: Callable[[Any, Sequence[int]], float]
) -> dict[str, Any]:
    """Return the ranking `found` with the candidate that recovers best; `folder`: that of Stage I.

    `recover(cfg, keep)` runs a short Stage II and returns the held-out x0 error of its pruned path. All ranks call it.
    """
    sets = [candidate["pruned"] for candidate in found["candidates"]]
    mean = [unit["score"] for unit in found["units"]]
    with sweeps(len(sets), 1, "stage 1: recover each candidate") as sweep:
        sweep.note()  # from now on the file holds the run to its keys
        for number, pruned in enumerate(sets):
            run, title = folder / f"candidate-{number}", f"candidate {number + 1} of {len(sets)}"
            if sweep.table[number].isnan():
                say(f"{title}: drops blocks {pruned}")
                drop = dropping(mean, sorted(pruned, key=mean.__getitem__))
                if ranks.rank() == 0:
                    result_of(run, 1).parent.mkdir(parents=True, exist_ok=True)
                    write_json(result_of(run, 1), found | drop)
                ranks.barrier()
                error = recover(recovery(cfg, run), drop["kept"])
                say(f"{title}: held-out x0 error {error:.4g}")
                sweep.table[number] = error if math.isfinite(error) else math.inf
                sweep.note()
            if ranks.rank() == 0:
                shutil.rmtree(run, ignore_errors=True)
        return chosen(found, sweep.table.flatten().tolist())


def chosen(found: dict[str, Any], errors: Sequence[float]) -> dict[str, Any]:
    """The ranking with the candidate of the smallest error after recovery; of equal ones the first."""
    best = min(range(len(errors)), key=errors.__getitem__)
    if not math.isfinite(errors[best]):
        raise ValueError("search=calibrated: no candidate has a finite error after its recovery; give recovery=lr=1e-6")
    mean = [unit["score"] for unit in found["units"]]
    recovered = [error if math.isfinite(error) else None for error in errors]
    listed = [c | {"recovered": error} for c, error in zip(found["candidates"], recovered, strict=True)]
    one = listed[best]
    drop = dropping(mean, sorted(one["pruned"], key=mean.__getitem__))
    return found | drop | {"pruned_score": one["score"], "candidates": listed}
