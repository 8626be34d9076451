"""Quality against cost: a dot per model, with the interval of its score."""

import math
from collections.abc import Iterable, Mapping

from fastlightgen.metrics.scores import is_number
from fastlightgen.page.figure import Frame, page, text
from fastlightgen.page.summary import cost

SCORE = "frechet"
# As wide as a phone shows without making the letters smaller.
FRAME = Frame(360, 300, left=46, top=36, right=24, bottom=48)
across, up = FRAME.across, FRAME.up
LINE = 14  # the height of a label
SMALLEST = 1e-3  # on a logarithmic axis
Point = tuple[int, float, float, float]  # cost, score, and the ends of its interval (the score twice if unknown)


def frontier(evals: Mapping[str, dict]) -> str:
    """The picture of all models that are sampled and have a distance, by their titles; empty without any."""
    points = {e["title"]: point(e) for e in evals.values() if "sampler" in e and is_number(e["scores"].get(SCORE))}
    return against_cost("Distance against cost", "Frechet distance to real clips, less is better", points)


def point(record: dict) -> Point:
    value = record["scores"][SCORE]
    low, high = record.get("intervals", {}).get(SCORE, (value, value))
    return cost(record), value, low if is_number(low) else value, high if is_number(high) else value


def against_cost(title: str, score: str, points: Mapping[str, Point]) -> str:
    """A dot per model: its cost across, its score up, a line for the interval; both axes are logarithmic."""
    if not points:
        return ""
    costs = [math.log10(cost) for cost, *_ in points.values()]
    low, wide = math.floor(min(costs)), max(1, math.ceil(max(costs)) - math.floor(min(costs)))
    marks = ticks(max(SMALLEST, value) for _, *found in points.values() for value in found)

    def height(value: float) -> float:
        return up(math.log(max(value, marks[0]) / marks[0]) / math.log(marks[-1] / marks[0]))

    body = [f'<path class="axis" fill="none" d="M{across(0):g} {up(1):g}V{up(0):g}H{across(1):g}"/>']
    body += [text(across(i / wide), up(0) + 16, f"{10 ** (low + i):g}", "small") for i in range(wide + 1)]
    body += [text(across(0) - 5, height(mark) + 4, f"{mark:g}", "small", "end") for mark in marks]
    placed: list[tuple[float, float]] = []
    for name, (price, value, least, greatest) in sorted(points.items(), key=lambda item: -item[1][1]):
        x, y = across((math.log10(price) - low) / wide), height(value)
        ends = [height(end) for end in (least, greatest)]
        body.append(f'<path class="axis" fill="none" d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>')
        body.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        left = x > (across(0) + FRAME.width) / 2
        body.append(text(x - 8 if left else x + 8, free(x, y + 4, placed), name, "small", "end" if left else "start"))
    body.append(text(across(0.5), FRAME.height - 16, "block evaluations per clip", "small name"))
    body.append(text(across(0.5), FRAME.height - 3, f"up: {score}", "small name"))
    return page(title, body, FRAME)


def ticks(values: Iterable[float]) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last one below the values to the first one above them."""
    least, most = min(values := list(values)), max(values)
    known = [part * 10.0**power for power in range(-4, 10) for part in (1, 2, 5)]
    first = max((i for i, tick in enumerate(known) if tick <= least), default=0)
    last = min((i for i, tick in enumerate(known) if tick >= most and i > first), default=len(known) - 1)
    return known[first : last + 1]


def free(x: float, y: float, placed: list[tuple[float, float]]) -> float:
    """The height of the next label: below every label that stands near it and was placed before, from top to bottom."""
    y = max([y, *(other + LINE for near, other in placed if abs(near - x) < 200)])
    placed.append((x, y))
    return y
