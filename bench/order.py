"""The parts of a run on a GPU, and the order of its benches: a run that is cut short has the most important rows.

First the ceilings of the GPU; then our own kernels beside copy and eager torch at Wan 14B 480p; then the products,
attention and the blocks; then the rivals; then the other shapes; then steps of training.
"""

PARTS = {  # part -> its files bench/bench_*.py
    "kernels": (
        "ceilings",
        "gate_residual_norm_modulate",
        "norm_modulate",
        "qk_norm_rope",
        "dmd_gradient",
        "overhead",
        "linear",
        "attention",
        "capture",
    ),
    "blocks": ("block",),
    "steps": ("steps",),
}
OPERATORS = ("gate_residual_norm_modulate", "qk_norm_rope", "norm_modulate", "dmd_gradient")  # for once.py
BROKEN_GPU = 17  # exit code of a bench process whose GPU does not answer: only a new process can go on
ROWS = PARTS["kernels"][1:5]  # the kernels that work on rows
OWN = ("copy", "cuda", "eager", "eager cuDNN")  # ours, and what it is compared with first


def part_of(file: str) -> str | None:
    """The part of bench_<file>.py; None: a run on a GPU does not take it."""
    return next((part for part, files in PARTS.items() if file in files), None)


def phase(file: str, params: dict[str, object]) -> int:
    """The turn of a bench in the run, from 0, by its file and its parameters."""
    name, shape = params.get("name", "copy"), str(params.get("shape", params.get("network", "wan-14b")))
    own, whole = name in OWN, "backward" in str(params.get("way"))
    main = "720p" not in shape and shape.startswith(("wan-14b", "wan-480p", "small"))
    if file == "steps":
        return 11
    if not main:
        return 9 if own else 10
    if file == "ceilings":
        return 0
    if file in ROWS:
        return 1 if own else 6
    if file == "block":
        return (7 if whole else 5) if own else 8
    if file == "capture":
        return 8
    if file == "linear" and not own:
        return 6
    return {"overhead": 2, "linear": 3, "attention": 4}.get(file, 12)
