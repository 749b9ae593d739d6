"""The live table of a sweep: progress, time left, and the best so far, drawn by its own thread."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from plphp_cli.reports.layers import bar
from plphp_cli.reports.sweep_columns import table
from plphp_cli.reports.sweep_text import duration
from plphp_cli.reports.text import fit, for_encoding, visible
from plphp_cli.sweep.labels import NUMERIC, varied
from plphp_cli.sweep.points import rank
from plphp_cli.sweep.progress import SweepProgress
from plphp_cli.sweep.recommendation import limit_text, recommend
from plphp_cli.sweep.records import BASELINE, PLPHP, Point
from plphp_cli.units import format_count, format_percent

REFRESH_PER_SECOND = 4
# Title, bar, stage, and the heading of the table with its line.
_FIXED_LINES = 5
_MOST_ROWS = 12
_BAR = 24


def progress_lines(progress: SweepProgress, width: int, height: int) -> list[Text]:
    """At most `height` lines of at most `width` cells: how far, how long still, the front so far."""
    share = progress.done_rows / progress.expected_rows if progress.expected_rows else 0.0
    done = f"{format_count(progress.done_rows)} of {format_count(progress.expected_rows)}"
    left = "" if progress.remaining_s is None else f", {duration(max(progress.remaining_s, 0.1))} left"
    drawn = Text(bar(share, max(min(_BAR, width - 40), 8)), "green")
    drawn.append(f" {format_percent(share, 0):>5}  {done} results{left}", "")
    lines = [Text(visible(progress.title), "bold")] if progress.title else []
    lines += [drawn, Text(visible(progress.stage), "dim"), *_best_so_far(progress, width, height)]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return lines[:height]


def _best_so_far(progress: SweepProgress, width: int, height: int) -> list[Text]:
    """The front so far around the setting that would be recommended now."""
    found, constraint = progress.points_so_far, progress.constraint
    whole = next((point for point in found if point.setting.method == BASELINE), None)
    places = [place for place, point in enumerate(found) if point.setting.method == PLPHP and point.on_front]
    rows = [found[place] for place in sorted(places, key=lambda place: rank(found[place], place))]
    room = min(height - _FIXED_LINES - 1, _MOST_ROWS)
    if constraint is None or not rows or room < 1:
        return []
    now = recommend(found, constraint).point
    best = None if now is None else found[now]
    prompts = "1 prompt" if rows[0].prompts == 1 else f"{rows[0].prompts} prompts"
    what = f"best so far, over {prompts}, with {limit_text(constraint)}:"
    if best is None:
        what = f"no setting keeps {limit_text(constraint)} so far, over {prompts}:"
    shown: list[tuple[Point, int]] = [] if whole is None else [(whole, 1)]
    shown += [(point, 1) for point in _around(rows, best, room)]
    knobs = varied(point.setting for point in found) or NUMERIC
    return [fit(Text(what), width), *table(shown, knobs, constraint, best, width)]


def _around(rows: list[Point], best: Point | None, room: int) -> list[Point]:
    """As many rows as there is room for, the best one in their middle, or the last ones without it."""
    place = next((place for place, point in enumerate(rows) if point is best), len(rows) - 1)
    start = max(0, min(place - room // 2, len(rows) - room))
    shown = rows[start : start + room]
    # The recommended setting may lie off the front, under a limit on something else.
    return shown if best is None or best in shown else [*shown[:-1], best]


@contextlib.contextmanager
def sweep_live(console: Console, source: Callable[[], SweepProgress]) -> Iterator[None]:
    """The live table below what was printed, while the context is open; it is wiped on leaving.

    Drawing happens in rich's thread; whoever works only replaces what `source` returns.
    """
    live = Live(
        console=console,
        get_renderable=lambda: _Lines(source),
        refresh_per_second=REFRESH_PER_SECOND,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with live:
        yield


class _Lines:
    """Draws a moment of the sweep as large as the terminal is then."""

    def __init__(self, source: Callable[[], SweepProgress]) -> None:
        self._source = source

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = console.size
        lines = progress_lines(self._source(), width, height - 1)
        yield Text("\n").join(for_encoding(line, console.encoding) for line in lines)
