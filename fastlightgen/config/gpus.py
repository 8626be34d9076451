"""The kinds of GPU that the planner knows, from the makers' data sheets.

Each number was compared with public copies of the sheet that its line names. All rates are without sparsity; some
sheets give the double rate with it. The modules are SXM and OAM, not PCIe. GeForce cards add in float32, at half their
rate for float16.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Bytes of memory and dense operations per second."""

    memory: float
    bfloat16: float
    float32: float
    float8: bool = True  # has products of float8_e4m3fn


GPUS = {
    "h100": Gpu(80e9, 989e12, 67e12),  # nvidia.com/en-us/data-center/h100
    "h200": Gpu(141e9, 989e12, 67e12),  # nvidia.com/en-us/data-center/h200
    "b200": Gpu(180e9, 2250e12, 75e12),  # NVIDIA Blackwell datasheet, HGX B200 / 8
    "a100-40": Gpu(40e9, 312e12, 19.5e12, float8=False),  # nvidia.com/en-us/data-center/a100
    "a100-80": Gpu(80e9, 312e12, 19.5e12, float8=False),
    "l40s": Gpu(48e9, 362e12, 91.6e12),  # NVIDIA L40S datasheet: 362.05
    "4090": Gpu(24e9, 165e12, 82.6e12),  # NVIDIA Ada GPU architecture, appendix A: 165.2
    "5090": Gpu(32e9, 209e12, 104.8e12),  # NVIDIA RTX Blackwell GPU architecture, appendix A: 209.5
    "mi300x": Gpu(192e9, 1307e12, 163.4e12, float8=False),  # AMD Instinct MI300X data sheet: 1307.4
}
MAKERS = "nvidia|geforce|rtx|amd|instinct"


def chip(kind: str) -> str:
    """The name of a kind without its memory: a100 of a100-80."""
    return kind.partition("-")[0]


def known_gpu(text: str) -> str | None:
    """The kind that a user names, as h100, H100-80GB or rtx4090; None if it is unknown. The larger a100 is the a100."""
    chips = "|".join(map(chip, GPUS))
    found = re.fullmatch(rf"(?:{MAKERS})*({chips})(\d+)?(?:gb?)?", re.sub("[^a-z0-9]", "", text.lower()))
    if not found:
        return None
    kinds = [k for k, gpu in GPUS.items() if chip(k) == found[1] and found[2] in (None, f"{gpu.memory / 1e9:.0f}")]
    return kinds[-1] if kinds else None
