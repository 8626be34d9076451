"""VBench-I2V: its prompts and file names, the command that starts it, its results, and the averages that are reported.

Names, numbers and file formats are those of github.com/Vchitect/VBench at 45e79ec: vbench2_beta_i2v/README.md,
scripts/constant.py, scripts/cal_i2v_final_score.py, evaluate_i2v.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import VBENCH_PROMPTS, VBENCH_RESULTS

RESULTS = "_eval_results.json"  # the end of the names of VBench's result files
SAMPLES = 5  # videos per prompt that VBench looks for, PROMPT-0.mp4 to PROMPT-4.mp4

# What the FastLightGen paper averages: Tables 1 and 2; Tables 4 to 9 add temporal flickering. A plain mean.
SIX = (
    "i2v_subject",
    "subject_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
SEVEN = (*SIX, "temporal_flickering")

# VBench's own total. Dimension: (the values that count as 0 and as 1, weight), from scripts/constant.py.
QUALITY = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "motion_smoothness": (0.7060, 0.9975, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
}
IMAGE = {
    "camera_motion": (0.0, 1.0, 0.1),
    "i2v_subject": (0.1462, 1.0, 1.0),
    "i2v_background": (0.2615, 1.0, 1.0),
}
SETS = {"papers": SEVEN, "total": (*SEVEN, "i2v_background", "background_consistency", "camera_motion")}


@dataclass(frozen=True)
class Prompt:
    """A prompt of the list, with its place in it and the name of its picture."""

    number: int
    text: str
    image: str

    def file(self, sample: int) -> str:
        return f"{self.text}-{sample}.mp4"


def read_prompts(path: str | Path, dimensions: Sequence[str]) -> list[Prompt]:
    """The prompts of vbench2_i2v_full_info.json that serve any of the dimensions."""
    rows = read_json(path, VBENCH_PROMPTS, "give VBench's vbench2_beta_i2v/vbench2_i2v_full_info.json")
    found = [
        Prompt(number, row["prompt_en"], row["image_name"])
        for number, row in enumerate(rows)
        if set(dimensions) & set(row["dimension"])
    ]
    for prompt in found:  # names of files in folders that the user gives: nothing may lead elsewhere
        for name in (prompt.file(0), prompt.image):
            if Path(name).name != name or name.startswith("."):
                raise ValueError(f"{path}: entry {prompt.number}: {name!r} is no name of a file; copy the list again")
    texts = [prompt.text for prompt in found]
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise ValueError(f"{path}: holds the prompt {twice!r} twice, so that one video would replace another")
    if not found:
        raise ValueError(f"{path}: has no prompts for {', '.join(dimensions)}")
    return found


def read_results(folder: str | Path) -> dict[str, float]:
    """The score of each dimension in VBench's result files; the newest file counts where several hold one."""
    found: dict[str, float] = {}
    for path in sorted(Path(folder).glob(f"*{RESULTS}"), key=lambda p: (p.stat().st_mtime, p.name)):
        record = read_json(path, VBENCH_RESULTS, "delete it, and run VBench again")
        found |= {dimension: float(result[0]) for dimension, result in record.items()}
    return found


def command(python: str, videos: Path, results: Path, prompts: Path, ratio: str, dimension: str) -> list[str]:
    """The words that start VBench for one dimension, in the folder of its checkout, where it looks for its pictures."""
    words = [python, "evaluate_i2v.py", "--videos_path", str(videos.absolute()), "--output_path"]
    words += [str(results.absolute()), "--full_json_dir", str(prompts.absolute())]
    return [*words, "--dimension", dimension, "--ratio", ratio]


def average(scores: Mapping[str, float], dimensions: Sequence[str]) -> float | None:
    """The plain mean, as in the papers; None if a dimension is missing."""
    if any(dimension not in scores for dimension in dimensions):
        return None
    return sum(scores[dimension] for dimension in dimensions) / len(dimensions)


def weighted(scores: Mapping[str, float], table: Mapping[str, tuple[float, float, float]]) -> float | None:
    """VBench's weighted mean of the scores on its own scale, where `low` counts as 0 and `high` as 1."""
    if any(dimension not in scores for dimension in table):
        return None
    scaled = sum(weight * (scores[d] - low) / (high - low) for d, (low, high, weight) in table.items())
    return scaled / sum(weight for _, _, weight in table.values())


def summary(scores: Mapping[str, float]) -> dict[str, float | None]:
    """The averages of the papers, and VBench's quality score, I2V score and total.

    None where a dimension is missing: VBench's own script would count it as 0.
    """
    quality, image = weighted(scores, QUALITY), weighted(scores, IMAGE)
    return {
        "average_6": average(scores, SIX),
        "average_7": average(scores, SEVEN),
        "quality": quality,
        "i2v": image,
        "total": None if quality is None or image is None else (quality + image) / 2,
    }
