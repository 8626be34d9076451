"""Block importance, training curves, alarms, time shares, methods and configuration."""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from fastlightgen.config import declared
from fastlightgen.config.fields import show
from fastlightgen.config.files import flatten
from fastlightgen.config.stages import DEFAULT, METHODS
from fastlightgen.metrics.importance import is_log
from fastlightgen.metrics.scores import is_number
from fastlightgen.page.html import details, note

SEARCHES = {
    "single_skip": "each block is skipped alone, and those that do the least damage are dropped",
    "iterative": "the least harmful block is dropped, then the others are scored again without it",
    "exhaustive": "every set of that many blocks is scored, and the least harmful one is dropped",
    "calibrated": "the best few sets got a short Stage II each; the one with the smallest error then is dropped",
}
SCORES = {
    "elbo": "Eq. 4, how far the predicted clip is from the real one",
    "output_mse": "Eq. 3, how much the network's output changes",
    "l2": "the sum of the block's squared weights",
    "taylor": "how much the loss would change without the block, to first order",
    "attention_mass": "how much its attention looks at other frames",
    "frechet": "the distance of clips that are made without the block to real clips",
}


def importance(r: dict) -> str:
    rows = [
        [escape(u["name"]), f"{u['score']:.4g}", f"{u['stderr']:.2g}", "kept" if u["index"] in r["kept"] else "dropped"]
        for u in bars(r)["units"]
    ]
    return (
        f"<p>The error when one block is skipped, ± standard error over {r['num_samples']} samples. A bar starts "
        "at the error of the network with all blocks: its length is the damage. "
        f"{meaning('Search', r['search'], SEARCHES)} {meaning('Score', r['score_kind'], SCORES)} "
        f"Dropped: {escape(show(r['pruned']))}.</p>"
        '<div id="blocks"></div>' + details("The numbers", ["Block", "Error", "Standard error", "Choice"], rows)
    )


def meaning(title: str, name: str, known: Mapping[str, str]) -> str:
    """A choice of Stage I and what it means: "Search: single_skip (each block is skipped alone ...)."."""
    return f"{title}: {escape(name)} ({known[name]})." if name in known else f"{title}: {escape(name)}."


def bars(r: dict) -> dict:
    """The data of the importance chart. The standard error of a single sample is nan, which is drawn as 0."""
    units = [
        {k: u[k] for k in ("name", "index", "score")} | {"stderr": u["stderr"] if is_number(u["stderr"]) else 0.0}
        for u in r.get("units", [])
    ]
    return r and {"units": units, "kept": r["kept"], "baseline_score": r["baseline_score"], "log": is_log(r)}


def curves(logs: dict[int, list[dict]]) -> dict[int, dict[str, list]]:
    """The data of the curves, {stage: {key: [[step, value], ..]}}: at most 2000 points per key, five digits."""
    out = {}
    for stage, lines in logs.items():
        keys = dict.fromkeys(key for line in lines for key in line if key != "step")
        points = {k: [[ln["step"], float(f"{ln[k]:.5g}")] for ln in lines if is_number(ln.get(k))] for k in keys}
        out[stage] = {k: p[:: math.ceil(len(p) / 2000)] for k, p in points.items() if p}
    return out


def watched(found: dict) -> str:
    """Alarms, and a bar per stage that shows how the time of a step divides."""
    out = ""
    for stage, lines in found["alarms"].items():
        alarms = [f"step {a['step']}: {escape(a['alarm'])} ({a['value']:.3g}, usual {a['usual']:.3g})" for a in lines]
        out += f'<p class="alarm"><b>Alarms of stage {stage} ({len(alarms)})</b> {"; ".join(alarms[:8])}</p>'
    for stage, lines in found["logs"].items():
        names = [key for key in lines[-1] if key.startswith("share_")]
        shares = {key.removeprefix("share_"): sum(ln.get(key, 0.0) for ln in lines) / len(lines) for key in names}
        if shares:
            shares["rest"] = max(0.0, 1 - sum(shares.values()))  # rounding can bring the sum above 1
            parts = "".join(
                f'<i style="width:{v:.1%};opacity:{0.75**k:.2f}"></i>' for k, v in enumerate(shares.values())
            )
            text = ", ".join(f"{escape(name)} {v:.0%}" for name, v in shares.items())
            out += note(f"Time of stage {stage}: {text}") + f'<div class="times" aria-hidden="true">{parts}</div>'
    return out


def followed(found: dict) -> str:
    """The method of each stage, described by its declaration."""
    out = ""
    for stage in found["logs"]:
        name = (found["config"].get(f"stage{stage}") or {}).get("method", DEFAULT)
        if name in METHODS[str(stage)]:  # a run may have used a method that is not installed here
            out += note(f"Stage {stage}: {escape(declared(str(stage), name).about)}")
    return out


def settings(config: dict) -> str:
    """The configuration: a collapsed table per stage, then versions and commit."""
    parts: list[str] = []
    plain: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and name != "versions":
            rows = [[escape(k), f"<code>{escape(show(v))}</code>"] for k, v in flatten(value).items()]
            parts.append(details(escape(name), ["Key", "Value"], rows))
        else:
            plain |= flatten({name: value})
    line = " · ".join(f"{escape(k.removeprefix('versions.'))} <code>{escape(show(v))}</code>" for k, v in plain.items())
    return f"<p>{line}</p>{''.join(parts)}" if config else ""
