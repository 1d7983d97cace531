"""Tables in markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def line(cells: Iterable[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(text.replace('|', '/') for text in cells)} |"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [line(head), "|---" * len(head) + "|", *map(line, rows)]
