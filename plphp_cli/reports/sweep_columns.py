"""The columns of a sweep's table on a terminal: by width, the less telling ones go first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.text import Text

from plphp_cli.reports.sweep_text import interval_only, keeps
from plphp_cli.reports.text import fit
from plphp_cli.sweep.labels import format_nats, value
from plphp_cli.sweep.records import BASELINE, Constraint, Interval, Point
from plphp_cli.units import format_bytes, format_number, format_percent, format_rate, format_ratio

_SHORT = {"head_reduce": "reduce", "skip_layers": "skipped"}
_WIDEST_KNOB = 10
# From the first to be left out to the last, the constrained figure's own columns excepted.
_LEAVE = (
    "KL max",
    "KV bytes",
    "drop [95 %]",
    "agree [95 %]",
    "tokens/s",
    "decode",
    "front",
    "KL [95 %]",
    "agree",
    "accuracy",
    "equal",
    "KL mean",
    "keeps",
)
_OWN = {
    "kl": ("KL mean", "KL [95 %]"),
    "agreement": ("agree", "agree [95 %]"),
    "accuracy_drop": ("drop pts", "drop [95 %]"),
}


@dataclass(frozen=True)
class Column:
    """A heading, the cell of a point with the number of its equals, and room for at least so much."""

    title: str
    cell: Callable[[Point, int], str]
    least: int = 0

    def width(self, rows: Sequence[tuple[Point, int]]) -> int:
        """Cells that the column takes, the space before it included."""
        widest = max((len(self.cell(point, count)) for point, count in rows), default=0)
        return max(len(self.title), widest, self.least) + 2


def table(
    rows: Sequence[tuple[Point, int]],
    knobs: Sequence[str],
    constraint: Constraint,
    best: Point | None,
    width: int,
) -> list[Text]:
    """Heading and rows of points; the best one is marked, the baseline stands without knobs."""
    columns = fitting(rows, knobs, constraint, width - 2)
    widths = [column.width(rows) for column in columns]
    head = Text("  " + "".join(c.title.rjust(w) for c, w in zip(columns, widths, strict=True)), "bold")
    lines = [head]
    for point, count in rows:
        mark, style = ("> ", "bold green") if point is best else ("  ", "")
        if point.setting.method == BASELINE:
            style = "dim"
        elif point.feasible is False and not style:
            style = "yellow"
        cells = "".join(c.cell(point, count).rjust(w) for c, w in zip(columns, widths, strict=True))
        if point.setting.method == BASELINE:
            # It has no knobs: its name stands there, as far as there is room.
            room = len(cells) - len(cells.lstrip(" ")) - 2
            cells = BASELINE[: max(room, 0)].rjust(max(room, 0)) + cells[max(room, 0) :]
        lines.append(Text(mark + cells, style))
    for line in lines:
        line.rstrip()
        line.truncate(width, overflow="ellipsis")
    return lines


def fitting(
    rows: Sequence[tuple[Point, int]], knobs: Sequence[str], constraint: Constraint, width: int
) -> list[Column]:
    """The columns that fit and have something to show."""
    # The baseline's name stands where the others have their knobs.
    least = len(BASELINE) if len(knobs) == 1 else 0
    columns = [_knob(knob, least) for knob in knobs] + _figures(constraint)
    columns = [c for c in columns if any(c.cell(point, count) for point, count in rows)]
    if all(point.accuracy is None for point, _ in rows):
        columns = [column for column in columns if column.title != "front"]
    own = _OWN[constraint.name]
    order = [name for name in _LEAVE if name not in own] + [own[1]]
    for name in order:
        if sum(column.width(rows) for column in columns) <= width:
            break
        columns = [column for column in columns if column.title != name]
    return columns


def _knob(knob: str, least: int) -> Column:
    def cell(point: Point, count: int) -> str:
        config = point.setting.config
        if config is None:
            return ""
        return fit(Text(value(config, knob)), _WIDEST_KNOB).plain.rstrip()

    return Column(_SHORT.get(knob, knob), cell, least)


def _figures(constraint: Constraint) -> list[Column]:
    def interval(figure: str, show: Callable[[float], str]) -> Callable[[Point, int], str]:
        def cell(point: Point, count: int) -> str:
            found: Interval | None = getattr(point, figure)
            return "" if found is None else show(found.mean)

        return cell

    def points(value: float) -> str:
        return format_number(value * 100, 1)

    columns = [
        Column("equal", lambda point, count: f"x{count}" if count > 1 else ""),
        Column("front", lambda point, count: _front(point)),
        Column("KV held", interval("kv_ratio", format_percent)),
        Column("KV bytes", lambda point, count: format_bytes(point.kv_bytes_held)),
        Column("KL mean", interval("kl_mean", format_nats)),
        Column("KL [95 %]", lambda point, count: _ends(point, point.kl_mean, 4)),
        Column("KL max", lambda point, count: "" if point.kl_max is None else format_number(point.kl_max, 3)),
        Column("agree", interval("top1_agreement", format_percent)),
        Column("agree [95 %]", lambda point, count: _ends(point, point.top1_agreement, 1, 100)),
        Column("accuracy", interval("accuracy", format_percent)),
        Column("drop pts", interval("accuracy_drop", points)),
        Column("drop [95 %]", lambda point, count: _ends(point, point.accuracy_drop, 1, 100)),
        Column("tokens/s", lambda point, count: _rate(point)),
        Column("decode", interval("decode_ratio", format_ratio)),
        Column(
            "keeps",
            lambda point, count: "" if point.setting.method == BASELINE else keeps(point, constraint),
        ),
    ]
    # The drop says no more than the accuracy, unless it is what is limited.
    if constraint.name != "accuracy_drop":
        columns = [column for column in columns if column.title != "drop pts"]
    return columns


def _ends(point: Point, interval: Interval | None, digits: int, scale: float = 1) -> str:
    return "" if point.setting.method == BASELINE else interval_only(interval, digits, scale)


def _front(point: Point) -> str:
    if point.on_front and point.on_accuracy_front:
        return "both"
    return "KL" if point.on_front else "accuracy" if point.on_accuracy_front else ""


def _rate(point: Point) -> str:
    rate = point.decode_tokens_per_s
    return "" if rate is None else format_rate(rate, "").strip()
