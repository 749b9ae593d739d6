"""Pieces of an HTML page: text is escaped, tables keep every figure within reach on a phone."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from plphp_cli.reports.diff import Piece
from plphp_cli.reports.text import visible


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, HTML to follow it, and its CSS class."""

    text: str
    html: str = ""
    css: str = ""


Row = Sequence[str | Cell]


def text(value: str) -> str:
    """What a model or a user wrote, as a page shows it."""
    return escape(visible(value))


def marked(pieces: Sequence[Piece]) -> str:
    """A text with its differences marked."""
    return "".join(text(piece.text) if piece.same else f"<mark>{text(piece.text)}</mark>" for piece in pieces)


def table(heads: Sequence[str], rows: Sequence[Row], stack: bool = False) -> list[str]:
    """A table whose first column names its rows.

    Args:
        heads: names of the columns.
        rows: as many cells each.
        stack: on a phone each row becomes a block of named figures: for tables of many columns. Others
            scroll there, with a shade where they go on.
    """
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in heads)
    body = (f"<tr>{''.join(_cell(cell, name) for cell, name in _named(row, heads))}</tr>" for row in rows)
    kind = ' class="stack"' if stack else ""
    return [
        f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>',
        *body,
        "</tbody></table></div>",
    ]


def _named(row: Row, heads: Sequence[str]) -> list[tuple[Cell, str | None]]:
    """Cells with the names of their columns; the first cell names its row itself."""
    cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
    return [(cells[0], None), *zip(cells[1:], heads[1:], strict=True)]


def _cell(cell: Cell, name: str | None) -> str:
    css = f' class="{cell.css}"' if cell.css else ""
    inner = f"{text(cell.text)}{cell.html}"
    if name is None:
        return f'<th scope="row"{css}>{inner}</th>'
    return f'<td{css} data-head="{text(name)}">{inner}</td>'
