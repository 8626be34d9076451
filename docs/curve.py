"""Draw the curves of Stage III over its iterations from bench/results: python docs/curve.py docs/curve.png."""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[1] / "bench" / "results"
RUNS = {"beta1 = 2.5, 250 iterations (kept)": "curve", "beta1 = 3.0, 500 iterations": "d"}


def main(out: Path) -> None:
    world, tuning = (json.loads((RESULTS / name).read_text()) for name in ("world.json", "stage3-tuning.json"))
    points = {"curve": world["curve"]["0"], "d": tuning["d"]["points"]}
    teacher = world["teacher-50"]["0"]["scores"]
    figure = Figure(figsize=(8, 3), dpi=125, layout="constrained")
    for ax, key, title in zip(
        figure.subplots(1, 2), ("adherence", "frechet"), ("Prompt adherence", "Fréchet distance")
    ):
        for (label, name), colour in zip(RUNS.items(), ("#2f6fed", "#e8833a")):
            x = [p["iteration"] for p in points[name]]
            ax.plot(x, [p[key] for p in points[name]], "o-", color=colour, label=label)
        ax.axhline(teacher[key], color="0.2", linestyle="--", linewidth=1.2, label="teacher, 50 guided steps")
        ax.set(title=title, xlabel="iterations of Stage III")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.9")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
