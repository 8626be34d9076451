"""How a speedup is said: the counted ratio first, the measured one beside it, and a warning when they disagree."""

from typing import Any

Speed = dict[str, Any]  # evaluate/speed.json, made by world.timing.speedup
APART = 0.2  # relative difference of the two ratios from which the clock is not believed


def counted(speed: Speed) -> str:
    return f"{speed['theory']:.1f}x by counting blocks ({speed['theory_formula']})"


def clocked(speed: Speed) -> str:
    """The measured ratio with the range of its turns; older files hold no range."""
    low, high = speed.get("measured_range", [None, None])
    spread = "" if low is None else f"from {low:.1f}x to {high:.1f}x in turns, "
    return f"{speed['measured']:.1f}x measured ({spread}batch {speed['batch']})"


def warning(speed: Speed) -> str:
    """A sentence for a measured ratio that is more than 20% from the counted one; "" if they agree."""
    if abs(speed["measured"] / speed["theory"] - 1) <= APART:
        return ""
    return (
        f"The measured {speed['measured']:.1f}x is more than {APART:.0%} away from the counted {speed['theory']:.1f}x: "
        "the machine was busy, or much of the time is not spent in the blocks. Rely on the counted ratio, or evaluate "
        "again on an idle machine."
    )
