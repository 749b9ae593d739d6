"""The live view: snapshots in, one screenful out, drawn several times a second by its own thread."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from plphp_cli.memory import MemorySnapshot
from plphp_cli.reports.layers import layer_lines
from plphp_cli.reports.snapshot import DECODING, PREFILL, WAITING, ArmSnapshot, LiveSnapshot
from plphp_cli.reports.text import fit, for_encoding, visible, wrapped
from plphp_cli.units import NOT_AVAILABLE, format_bytes, format_count, format_number, format_seconds

REFRESH_PER_SECOND = 8

_LABEL, _VALUE = 15, 11
_FIGURES_WIDTH = _LABEL + 2 * _VALUE
_SEPARATOR = " │ "
_MIN_TEXT_WIDTH = 24
# Title, config, and the rule over the text.
_FIXED_LINES = 3


def screen(snapshot: LiveSnapshot, width: int, height: int) -> list[Text]:
    """At most `height` lines of at most `width` cells: text and figures side by side, the layer table below.

    What does not fit is left out whole: layers are condensed, of the text the end is shown.
    """
    figures = figure_lines(snapshot)
    beside = width >= _FIGURES_WIDTH + len(_SEPARATOR) + _MIN_TEXT_WIDTH
    upper = len(figures) if beside else len(figures) + 4
    room = height - _FIXED_LINES - upper
    layers = snapshot.pruned.layers
    # The table gets what it needs but not the text's last lines; a tall terminal's rest goes to the text.
    table = layer_lines(layers, snapshot.vision_tokens, width, max(room, 0))
    spare = height - _FIXED_LINES - len(table) - (0 if beside else len(figures))
    lines = [
        fit(Text(visible(snapshot.title), style="bold"), width),
        fit(Text(visible(snapshot.config), style="dim"), width),
    ]
    text_height = max(spare, 1) if layers else max(height - _FIXED_LINES - (0 if beside else len(figures)), 1)
    if beside:
        lines += _side_by_side(snapshot, figures, width, max(text_height, len(figures)))
    else:
        lines += [_rule(snapshot.stage, width), *_texts(snapshot, width, text_height), *figures]
    if table:
        lines += table
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return lines[:height]


def figure_lines(snapshot: LiveSnapshot) -> list[Text]:
    """The figures beside the text: both arms' times, tokens and cache, then memory now."""
    arms = (snapshot.pruned, snapshot.unpruned)
    lines = [_figure("", [arm.name if arm else "" for arm in arms], "bold")]

    def figure(label: str, show: Callable[[ArmSnapshot], str]) -> None:
        values = ["" if arm is None or arm.phase == WAITING else show(arm) for arm in arms]
        lines.append(_figure(label, values))

    figure("prefill", lambda arm: "running" if arm.phase == PREFILL else format_seconds(arm.prefill_s))
    figure("TTFT", lambda arm: _known(arm.ttft_s, format_seconds))
    figure("new tokens", lambda arm: format_count(len(arm.elapsed_s)))
    figure("tokens/s", lambda arm: _known(arm.tokens_per_s, lambda rate: format_number(rate, 1)))
    figure("KV cache now", lambda arm: _known(arm.kv_bytes, format_bytes))
    figure("  if uncut", lambda arm: _known(arm.kv_bytes_uncut, format_bytes))
    return lines + _memory_lines(snapshot.memory)


class LiveView:
    """Draws the newest snapshot on the terminal's second screen while its context is open.

    Drawing happens in rich's thread; whoever works only replaces the snapshot that `source` returns. On
    leaving, however it is left, the terminal shows its first screen and its cursor again.
    """

    def __init__(self, console: Console, source: Callable[[], LiveSnapshot]) -> None:
        self._console = console
        self._source = source
        # Warnings of libraries would tear the screen: the caller keeps them until it is closed.
        self._live = Live(
            console=console,
            screen=True,
            get_renderable=lambda: _Screen(self._source),
            refresh_per_second=REFRESH_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._live.stop()
        finally:
            restore(self._console)


def restore(console: Console) -> None:
    """Leave the second screen and show the cursor, even if that was interrupted once already."""
    if console.is_alt_screen:
        console.set_alt_screen(False)
    console.show_cursor(True)


class _Screen:
    """Draws a snapshot as large as the terminal is at this moment."""

    def __init__(self, source: Callable[[], LiveSnapshot]) -> None:
        self._source = source

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = console.size
        lines = screen(self._source(), width, height)
        # The last line ends without a line break, or the terminal would scroll.
        yield Text("\n").join(for_encoding(line, console.encoding) for line in lines)


def _side_by_side(snapshot: LiveSnapshot, figures: list[Text], width: int, height: int) -> list[Text]:
    left_width = width - _FIGURES_WIDTH - len(_SEPARATOR)
    left = _texts(snapshot, left_width, height)
    lines = [_rule(snapshot.stage, width)]
    for number in range(height):
        line = fit(left[number] if number < len(left) else Text(), left_width)
        line.append(_SEPARATOR, "dim")
        if number < len(figures):
            line.append_text(figures[number])
        lines.append(line)
    return lines


def _texts(snapshot: LiveSnapshot, width: int, height: int) -> list[Text]:
    """The text of the arm at work, in `height` lines; with room for it, the finished arm's above."""
    pruned, unpruned = snapshot.pruned, snapshot.unpruned
    if unpruned is None or unpruned.phase == WAITING:
        return _titled(pruned, width, height)
    if height < 8:
        return _titled(unpruned, width, height)
    first = height // 2
    upper = _titled(pruned, width, first)
    upper += [Text()] * (first - len(upper))
    return upper + _titled(unpruned, width, height - first)


def _titled(arm: ArmSnapshot, width: int, height: int) -> list[Text]:
    title = Text(f"{arm.name}: {arm.phase}", style="bold")
    # Twice what can be seen: wrapping a long answer eight times a second is not for free.
    text = visible(arm.text[-2 * width * height :])
    lines = wrapped(Text(text + ("█" if arm.phase == DECODING else "")), width)
    room = max(height - 1, 0)
    if len(lines) > room:
        lines = lines[len(lines) - room :]
        title.append(" (the end of it)", "dim")
    return [title, *lines]


def _rule(title: str, width: int) -> Text:
    line = Text(f"── {title} ", style="bold")
    line.append("─" * max(width - line.cell_len, 0), "dim")
    line.truncate(width)
    return line


def _figure(label: str, values: list[str], style: str = "") -> Text:
    line = Text(label.ljust(_LABEL), style="" if style else "dim")
    for value in values:
        line.append(value.rjust(_VALUE), style)
    return line


def _memory_lines(memory: MemorySnapshot) -> list[Text]:
    device = (memory.device_used_bytes, memory.device_total_bytes, memory.device_process_bytes)
    allocator = (memory.allocator_bytes, memory.allocator_peak_bytes)
    # Without a GPU one row says so; the lines saved go to the layers.
    if not any(value is not None for value in (*device, *allocator)):
        rows = [_single("GPU, torch", None)]
    else:
        rows = [
            _pair("GPU used/total", *device[:2]),
            _single("  this process", device[2]),
            _pair("torch now/peak", *allocator),
        ]
    return [*rows, _single("process RSS", memory.rss_bytes)]


def _single(label: str, value: int | None) -> Text:
    return _figure(label, [format_bytes(value).rjust(2 * _VALUE)])


def _pair(label: str, first: int | None, second: int | None) -> Text:
    shown = NOT_AVAILABLE
    if first is not None or second is not None:
        shown = f"{format_bytes(first)}/{format_bytes(second)}".replace(" ", "")
    return _figure(label, [shown.rjust(2 * _VALUE)])


def _known(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)
