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
WIDTH = 4.4  # of a letter, about
OTHER_SIDE = 1.9 * LINE  # a label goes to the left of its dot rather than move down by more
SMALLEST = 1e-3  # on a logarithmic axis
Box = tuple[float, float, float, float]  # left, right, top, bottom
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
    dots = {n: (across((math.log10(price) - low) / wide), height(value)) for n, (price, value, *_) in points.items()}
    taken = [(x - 4, x + 4, y - 4, y + 4) for x, y in dots.values()]
    for name, (_, _, least, greatest) in sorted(points.items(), key=lambda item: -item[1][1]):
        x, y = dots[name]
        body.append(f'<path class="axis" fill="none" d="M{x:.1f} {height(least):.1f}V{height(greatest):.1f}"/>')
        body.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        left, at = spot(x, y + 4, WIDTH * len(name), taken)
        body.append(text(x - 8 if left else x + 8, at, name, "small", "end" if left else "start"))
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


def spot(x: float, y: float, wide: float, taken: list[Box]) -> tuple[bool, float]:
    """The side (left?) and the height of the next label: beside its dot, or below what stands there."""
    found = []
    for left in (False, True):
        start = x - 8 - wide if left else x + 8
        at = y
        while hit := [box for box in taken if overlap(box, (start, start + wide, at - LINE + 3, at + 2))]:
            at = max(bottom for *_, bottom in hit) + LINE - 2
        outside = start < 0 or start + wide > FRAME.width
        found.append((at - y + OTHER_SIDE * left + FRAME.width * outside, left, at, start))
    _, left, at, start = min(found)
    taken.append((start, start + wide, at - LINE + 3, at + 2))
    return left, at


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
