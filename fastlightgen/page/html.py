"""Pieces of HTML that several sections use. All arguments must be HTML; plain text goes through `escape` first."""

import re
from typing import Any

from fastlightgen.metrics.scores import is_number


def table(name: str, head: list[str], rows: list[list[str]]) -> str:
    """Return an HTML table. The page highlights a cell that contains <b>.

    On narrow screens each row becomes a card, in which every cell repeats the head of its column. The roles keep it a
    table for screen readers there.
    """
    labels = [plain(h) for h in head[1:]]
    top = "".join(f'<th scope="col" role="columnheader">{h}</th>' for h in head)
    lines = []
    for first, *rest in rows:
        cells = "".join(
            f'<td role="cell" data-label="{label}"><div>{c}</div></td>' for label, c in zip(labels, rest, strict=True)
        )
        lines.append(f'<tr role="row"><th scope="row" role="rowheader">{first}</th>{cells}</tr>')
    return (
        f'<div class="scroll" data-name="{plain(name)}"><table role="table" aria-label="{plain(name)}">'
        f'<thead role="rowgroup"><tr role="row">{top}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(lines)}</tbody></table></div>'
    )


def plain(html: str) -> str:
    """HTML without its tags, for an attribute."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split()).replace('"', "&quot;")


def details(title: str, head: list[str], rows: list[list[str]]) -> str:
    return f"<details><summary>{title}</summary>{table(title, head, rows)}</details>"


def fact(number: str, name: str, detail: str) -> str:
    return f'<div class="fact"><b>{number}</b><span>{name}</span><small>{detail}</small></div>'


def note(html: str) -> str:
    return f'<p class="note">{html}</p>'


def below(html: str) -> str:
    """A small line below a number: its interval, or what the difference means."""
    return f'<small class="range">{html}</small>'


def share(value: Any) -> str:
    return f"{value:.1%}" if is_number(value) else "–"
