"""Draws the block importances that Stage I measured."""

import math
from pathlib import Path

from fastlightgen.atomic import claimed, put

LABELS = {
    "elbo": "x0 error (Eq. 4)",
    "output_mse": "change of v (Eq. 3)",
    "l2": "sum of squared weights",
    "taylor": "|sum of w dL/dw|",
    "frechet": "distance of clips to real ones",
    "attention_mass": "attention between frames",
}


def is_log(record: dict) -> bool:
    """Whether to draw scores on a logarithmic axis: on a linear one, a dominant block would flatten the others."""
    values = [record["baseline_score"], *(u["score"] for u in record["units"])]
    return min(values) > 0 and max(values) > 4 * min(values)


def plot_importance(record: dict, path: Path) -> None:
    """Draw block importances like the paper's Fig. 4; bars start at the error of the network with all blocks."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8, 3.6), dpi=125, layout="constrained")
    ax, base, n = figure.subplots(), record["baseline_score"], len(record["units"])
    ax.use_sticky_edges = False
    for key, label, colour, hatch in (("kept", "kept", "#2f6fed", ""), ("pruned", "dropped", "#e8833a", "///")):
        units = [u for u in record["units"] if u["index"] in record[key]]
        index, heights = [u["index"] for u in units], [u["score"] - base for u in units]
        ax.bar(
            index, heights, bottom=base, yerr=[u["stderr"] for u in units], label=f"{label} ({len(units)})",
            color=colour, edgecolor="white", hatch=hatch, capsize=4, ecolor="0.35", width=0.72,
        )  # fmt: skip
    ax.axhline(base, color="0.2", linestyle="--", linewidth=1.2, label="all blocks")
    kinds = [u["kind"] for u in record["units"]]
    if len(names := list(dict.fromkeys(kinds))) > 1:  # HunyuanVideo: double blocks, then single blocks
        ax.axvline(kinds.index(names[1]) - 0.5, color="0.5", linestyle=":", linewidth=1)
    if is_log(record):
        ax.set_yscale("log")
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    ylabel = LABELS[record["score_kind"]]
    title = f"Block importance (search: {record['search']}, score: {record['score_kind']})"
    xlabel = "skipped block" if len(names) == 1 else f"skipped block: {', then '.join(names)}"
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xticks=range(0, n, math.ceil(n / 24)), axisbelow=True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    ax.legend(frameon=False)
    with claimed(temporary := path.with_name(f".tmp-{path.name}")):
        figure.savefig(temporary, format="png")
        put(temporary, path)
