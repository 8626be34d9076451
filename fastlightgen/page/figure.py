"""Pictures as SVG, without a plotting library: their frame, and a grid over steps and size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Frame:
    """The size of a picture and the margins around its axes, in its own units."""

    width: int
    height: int
    left: int
    top: int
    right: int
    bottom: int

    def across(self, part: float) -> float:
        """The place of 0 (left end of the axis) to 1 (right end)."""
        return self.left + part * (self.width - self.left - self.right)

    def up(self, part: float) -> float:
        """The place of 0 (lower end of the axis) to 1 (upper end)."""
        return self.height - self.bottom - part * (self.height - self.top - self.bottom)


GRID = Frame(640, 420, left=80, top=50, right=30, bottom=60)
across, up = GRID.across, GRID.up
# The rules name the class of the picture, so that they change nothing else on a page that holds it.
RULES = {
    "text": "font:13px sans-serif;fill:#222",
    ".title": "font-size:15px;font-weight:600",
    ".small": "font-size:11px",
    ".line": "fill:none;stroke:#555;stroke-dasharray:5 4",
    ".axis": "stroke:#888",
    ".dot": "fill:#2463a8",
    ".pair": "fill:none;stroke:#b3261e;stroke-width:2;stroke-opacity:.6",
}
DARK = {"text": "fill:#ddd", ".dot": "fill:#7ab3ee", ".cell": "fill:#111"}  # cells of a grid stay light


def rules(found: Mapping[str, str]) -> str:
    return "".join(f".flg {name}{{{rule}}}" for name, rule in found.items())


STYLE = f"{rules(RULES)}@media(prefers-color-scheme:dark){{{rules(DARK)}}}"
# Iso-speed lines: times faster than 50 guided steps with all blocks. The paper names 33.3 and 50; 4 steps with 30% of
# the blocks are 83.3 times as fast.
SPEEDS = (33.3, 50.0, 83.3, 167.0)


def page(title: str, body: list[str], frame: Frame) -> str:
    box = f"0 0 {frame.width} {frame.height}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="flg" viewBox="{box}" role="img">'
    name = f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return "\n".join([head, name, text(frame.width / 2, 22, title, "title name"), *body, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


At = tuple[int, float]  # steps, share of the blocks


def grid(title: str, score: str, cells: Mapping[At, float], pairs: Sequence[tuple[At, At]] = ()) -> str:
    """Cells by steps and share of the blocks, darker where the score is larger; lines of equal speed; pairs joined."""
    steps = sorted({at[0] for at in cells})
    shares = sorted({at[1] for at in cells})
    least, most = math.log(min(cells.values())), math.log(max(cells.values()))
    wide, high = 1 / len(steps), 1 / len(shares)
    body = []
    for (step, share), value in cells.items():
        x, y = steps.index(step) * wide, shares.index(share) * high
        shade = (math.log(value) - least) / max(most - least, 1e-9)
        box = f'x="{across(x):.1f}" y="{up(y + high):.1f}" width="{across(wide) - across(0):.1f}" '
        box += f'height="{up(0) - up(high):.1f}"'
        body.append(f'<rect {box} fill="rgb({235 - 140 * shade:.0f},{242 - 110 * shade:.0f},250)"/>')
        middle = (across(x + wide / 2), up(y + high / 2) + 5)
        body.append(text(*middle, f"{value:.3g}", "cell"))
    for speed in SPEEDS:
        body += iso(speed, steps, shares)
    for pair in pairs:
        ends = [(across((steps.index(s) + 0.5) * wide), up((shares.index(p) + 0.5) * high) + 14) for s, p in pair]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in ends)
        body.append(f'<path class="pair" d="M{line}"/>')
    body += [text(across((i + 0.5) * wide), up(0) + 18, str(step)) for i, step in enumerate(steps)]
    body += [text(across(0) - 8, up((i + 0.5) * high) + 5, f"{s:.0%}", "", "end") for i, s in enumerate(shares)]
    body.append(text(across(0.5), GRID.height - 22, f"steps; up: share of the blocks. {score}.", "small"))
    lines = "Dashed: equal speed." + (" Joined: pairs that the paper finds equal." if pairs else "")
    body.append(text(across(0.5), GRID.height - 8, lines, "small"))
    return page(title, body, GRID)


def iso(speed: float, steps: list[int], shares: list[float]) -> list[str]:
    """The line on which steps x share = 100 / speed: 50 guided steps cost 100 evaluations of all blocks."""
    ends = [(step, 100 / speed / step) for step in [x / 8 for x in range(8 * steps[0], 8 * steps[-1] + 1)]]
    inside = [(s, share) for s, share in ends if shares[0] <= share <= shares[-1]]
    if len(inside) < 2:
        return []
    places = [(place(s, steps), place(share, shares)) for s, share in inside]
    line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in places)
    x, y = places[0]
    return [
        f'<polyline class="line" points="{line}"/>',
        text(across(x) + 4, up(y) - 16, f"{speed:g}x", "small cell", "start"),
    ]


def place(value: float, known: list) -> float:
    """Where a value lies on an axis of cells with the given middles, from 0 to 1; straight between the middles."""
    for i, (low, high) in enumerate(zip(known, known[1:], strict=False)):
        if low <= value <= high:
            return (i + 0.5 + (value - low) / (high - low)) / len(known)
    return 0.5 / len(known)
