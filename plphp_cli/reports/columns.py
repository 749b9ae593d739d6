"""Plain text in columns: what `plphp models` and `plphp doctor` print, and what a bug report takes."""

import textwrap
from collections.abc import Sequence

from plphp_cli.reports.text import one_line, visible

_GAP = 2


def table(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """Rows of cells in columns of so many characters; a longer cell goes on in the next line.

    Args:
        rows: the cells; the first row is the heading.
        widths: of each column, the gaps between them not included.
    """
    lines = []
    for row in rows:
        cells = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
        for number in range(max(map(len, cells))):
            parts = [cell[number] if number < len(cell) else "" for cell in cells]
            padded = [part.ljust(width) for part, width in zip(parts, widths, strict=True)]
            lines.append((" " * _GAP).join(padded).rstrip())
    return lines


def pairs(items: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Labels and values: the values in one column, wrapped within `width`."""
    label = max((len(name) for name, _ in items), default=0)
    return table(items, [label, max(width - label - _GAP, 20)])


def paragraph(text: str, width: int, indent: str = "") -> list[str]:
    """A text wrapped within `width`, its further lines indented."""
    return textwrap.wrap(
        visible(text), width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=True
    ) or [""]


def rule(title: str, width: int) -> str:
    """A heading across the width."""
    return f"-- {one_line(title)} ".ljust(width, "-")


def _wrapped(cell: str, width: int) -> list[str]:
    return paragraph(cell, width)
