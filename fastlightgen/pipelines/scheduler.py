"""The stock scheduler that takes a student's few steps: FlowMatchEulerDiscreteScheduler, settings only, no code.

A ladder is sigma_i = s u / (1 + (s - 1) u) with u = 1 - i / N (fastlightgen.flow.ladder), for N steps and shift s.
"""

import math

from fastlightgen.flow import ladder
from fastlightgen.models.family import Family

CLASS = "FlowMatchEulerDiscreteScheduler"
LONGEST = 16  # steps for which stretched_shift has a solution whatever the shift
TOLERANCE = 2e-3  # of an exported scheduler's sigmas against the ladder


def scheduler_config(family: Family, times: list[float], shift: float, kind: str) -> dict:
    """scheduler_config.json for a student: its ladder when called with len(times) steps, re-noising or Euler."""
    steps = len(times)
    if max(abs(a - b) for a, b in zip(times, ladder(steps, shift), strict=True)) > TOLERANCE:
        raise ValueError(
            f"fastlightgen.json: ladder {times} is not the one of {steps} steps and shift {shift:g}; a stock scheduler "
            "knows no other, so train the student on that"
        )
    config = {"_class_name": CLASS, "num_train_timesteps": 1000, "stochastic_sampling": kind == "stochastic"}
    if family.sets_sigmas or steps == 1:  # the scheduler shifts what it is handed; one step is always 1
        return config | {"shift": shift}
    if steps > LONGEST:
        raise ValueError(f"fastlightgen.json: ladder of {steps} steps; the stock scheduler follows at most {LONGEST}")
    return config | {"shift": stretched_shift(steps, shift), "shift_terminal": times[-1]}


def stretched_shift(steps: int, shift: float) -> float:
    """The scheduler's `shift` a that turns its own spacing into the ladder, with shift_terminal as the last rung.

    set_timesteps(N) takes u_i = 1 - k i with k = (1 - sigma_min) / (N - 1), where sigma_min is 0.001 shifted by a;
    shifts u by a and stretches: 1 - sigma_i is in proportion to i / (1 - (a - 1) / a k i). The ladder's is to
    i / (1 - c i) with c = (s - 1) / (s N). Equal when (a - 1) k = a c, quadratic in a because k depends on it.
    """
    low, high = 0.001, 0.999
    c = (steps - 1) * (shift - 1) / (shift * steps)
    b = high * (1 - c)  # low c a^2 - b a + high = 0; the smaller root, written so that c = 0 is no division by zero
    return 2 * high / (b + math.sqrt(b * b - 4 * low * c * high))
