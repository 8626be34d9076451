"""The scores of an evaluation, as a report shows them: title, format, goal and meaning of each; which model is best."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from fastlightgen.config import UserError

SCORES = {  # key: (title, format, goal, meaning)
    "adherence": ("Adherence", "{:.1%}", "high", "share of the caption's statements that the clip fulfils"),
    "tracking_error": ("Tracking error", "{:.2f} px", "low", "distance of the path to the nearest one that fits"),
    "motion": ("Motion", "{:.2f}", "one", "path length over the caption's; below 1: too slow, 0: frozen"),
    "first_frame_psnr": ("First frame", "{:.1f} dB", "high", "PSNR to the first frame, if one is given"),
    "frechet": ("Fréchet distance", "{:.2f}", "low", "distance to real clips, as a set, in measured features"),
    "to_teacher": ("Distance to teacher", "{:.2f}", "low", "the same to the teacher's clips instead of real ones"),
    "kid": (
        "Kernel distance",
        "{:.3f}",
        "low",
        "the same to real clips, unbiased at any number of clips; about 0 for real clips",
    ),
    "precision": ("Precision", "{:.1%}", "high", "share of the clips that look like some real clip"),
    "recall": ("Recall", "{:.1%}", "high", "share of the real clips that look like some clip; repeated clips lower it"),
    "coverage": ("Coverage", "{:.1%}", "high", "share of the real clips with a clip among their neighbours"),
    "diversity": ("Diversity", "{:.2f}", "one", "spread of clips of one caption over that of the data; 0: all equal"),
    "texture": ("Texture", "{:.2f}", "one", "energy of the finest detail over that of real clips; blur lowers it"),
    "persistence": ("Persistence", "{:.3f}", "real", "correlation of the finest detail of neighbouring frames"),
    "temporal_flickering": ("Temporal flickering", "{:.4f}", "real", "VBench score: 1 for a still, lower: more change"),
    "motion_smoothness": ("Motion smoothness", "{:.4f}", "real", "how well neighbours predict a frame; 1 for a still"),
    "saturation": ("Saturation", "{:.3f}", "real", "mean strength of colours; too long a Stage III raises it"),
    "sharpness": ("Sharpness", "{:.0f}", "real", "variance of the Laplacian; blur lowers it, noise raises it"),
}
BETTER, WORSE, SAME = "better", "worse", "no difference"  # verdicts on the difference of two models
GOALS = {"high": "higher is better", "low": "lower is better", "one": "best near 1", "real": "best near the real clips"}


def check_versions(files: Mapping[Path, dict], remedy: str) -> None:
    """Raise if files were made on different versions of the built-in world. Files of version 1 name none."""
    made = {file: record.get("world", 1) for file, record in files.items()}
    newest = max(made.values(), default=1)
    for file, version in made.items():
        if version != newest:
            raise UserError(
                f"{file}: was made on version {version} of the built-in world, others on version {newest}; "
                f"delete it, or {remedy}"
            )


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def score(record: dict, key: str) -> str:
    """A score as text, or a dash if it is missing."""
    value = record["scores"].get(key)
    return SCORES[key][1].format(value) if is_number(value) else "–"


def like_teacher(record: dict, key: str) -> bool:
    return record.get("against_teacher", {}).get(key, {}).get("verdict") == SAME


def best(key: str, evals: dict) -> list[str]:
    """Names of the models with the best score, including those with the same text. The real clips do not compete.

    If the teacher is among the best, so is every model that does not differ from it, and the reverse. Models that were
    measured on too few clips for intervals are not ranked.
    """
    values = {n: e["scores"][key] for n, e in evals.items() if is_number(e["scores"].get(key))}
    goal, real = SCORES[key][2], values.pop("real", None)
    unranked = any("intervals" in evals[n] and key not in evals[n]["intervals"] for n in values)
    if len(values) < 2 or (goal == "real" and real is None) or unranked:
        return []
    # The best score has the smallest cost.
    cost = {"high": lambda v: -v, "low": float, "one": lambda v: abs(v - 1), "real": lambda v: abs(v - real)}[goal]
    least = min(map(cost, values.values()))
    texts = {score(evals[n], key) for n, v in values.items() if math.isclose(cost(v), least)}
    winners = {n for n in values if score(evals[n], key) in texts}
    alike = {n for n in values if like_teacher(evals[n], key)}
    if "teacher" in winners or winners & alike:
        winners |= alike | {"teacher"}
    return [n for n in values if n in winners]
