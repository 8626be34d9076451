"""Settings with which diffusers' FlowMatchEulerDiscreteScheduler follows a student's ladder, and its guider's scale.

A ladder is sigma_i = s u / (1 + (s - 1) u) with u = 1 - i / N (fastlightgen.flow.ladder), for N steps and shift s.
"""

import math
from pathlib import Path

from fastlightgen.atomic import write_json
from fastlightgen.flow import ladder
from fastlightgen.models.family import Family
from fastlightgen.models.folder.released import GUIDER_CONFIG

CLASS, GUIDER = "FlowMatchEulerDiscreteScheduler", "ClassifierFreeGuidance"
LONGEST = 16  # the most steps for which stretched_shift has a solution at every shift
TOLERANCE = 2e-3  # largest allowed difference between an exported scheduler's sigmas and the ladder


def scheduler_config(family: Family, times: list[float], shift: float, kind: str) -> dict:
    """scheduler_config.json for a student: called with len(times) steps, the scheduler follows `times`.

    `kind`: "stochastic" adds fresh noise after each step, "ode" takes Euler steps.
    """
    steps = len(times)
    if max(abs(a - b) for a, b in zip(times, ladder(steps, shift), strict=True)) > TOLERANCE:
        raise ValueError(
            f"fastlightgen.json: ladder {times} is not the one of {steps} steps and shift {shift:g}; a stock scheduler "
            "can follow no other, so train the student on that"
        )
    config = {"_class_name": CLASS, "num_train_timesteps": 1000, "stochastic_sampling": kind == "stochastic"}
    if family.sets_sigmas or steps == 1:  # the scheduler only shifts the pipeline's sigmas; one step is always at 1
        return config | {"shift": shift}
    if steps > LONGEST:
        raise ValueError(f"fastlightgen.json: ladder of {steps} steps; the stock scheduler follows at most {LONGEST}")
    return config | {"shift": stretched_shift(steps, shift), "shift_terminal": times[-1]}


def write_guider(pipeline: Path, family: Family, card: dict) -> list[str]:
    """Write the part that scales guidance, with a student's scale; return its entry in model_index.json."""
    settings = {"_class_name": GUIDER, family.cfg_argument: card.get("guidance", 1.0)}
    write_json(pipeline / family.guider / GUIDER_CONFIG, settings)
    return ["diffusers", GUIDER]


def stock_boundary(times: list[float], boundary: float) -> float:
    """`boundary_ratio` with which stock pipelines give each time of a student's ladder to the same expert as we do.

    It is the boundary itself, unless a time lies so near that the scheduler's rounding may carry it to the other side:
    then it is midway between the two times around it.
    """
    if min(abs(t - boundary) for t in times) > TOLERANCE:
        return boundary
    below = max((t for t in times if t < boundary), default=0.0)
    return (min(t for t in times if t >= boundary) + below) / 2


def stretched_shift(steps: int, shift: float) -> float:
    """The scheduler's `shift`, called a, with which its spacing equals the ladder; shift_terminal fixes the last time.

    set_timesteps(N) takes u_i = 1 - k i with k = (1 - sigma_min) / (N - 1), where sigma_min is 0.001 shifted by a. It
    shifts u by a and stretches the result: 1 - sigma_i is proportional to i / (1 - (a - 1) / a k i). On the ladder it
    is proportional to i / (1 - c i) with c = (s - 1) / (s N). The two are equal if (a - 1) k = a c, which is quadratic
    in a because k depends on a.
    """
    low, high = 0.001, 0.999  # 1 / num_train_timesteps and 1 - low
    c = (steps - 1) * (shift - 1) / (shift * steps)
    b = high * (1 - c)  # low c a^2 - b a + high = 0; take the smaller root, in a form that allows c = 0
    return 2 * high / (b + math.sqrt(b * b - 4 * low * c * high))
