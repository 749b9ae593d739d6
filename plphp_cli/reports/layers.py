"""The layer table: gamma_l as a bar, group, rate, tokens kept, bytes; as large as it may be."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.text import Text

from plphp_cli.reports.text import fit
from plphp_cli.results import LayerRecord
from plphp_cli.units import format_bytes, format_count, format_number

GROUP_STYLES = {
    "attentive": "green",
    "balanced": "yellow",
    "indifferent": "magenta",
    "skipped": "cyan",
}
UNKNOWN = "-"
_EIGHTHS = " ▏▎▍▌▋▊▉"
_SCALES = (0.05, 0.1, 0.25, 0.5, 1.0)
_MIN_BAR, _MAX_BAR = 6, 40


@dataclass(frozen=True)
class LayerRow:
    """One row: a layer, or consecutive layers with the means of their figures."""

    layers: str
    gamma: float | None
    group: str
    group_style: str
    rate: float | None
    kept: float | None
    head_bytes: float | None
    layer_bytes: float | None


def condense(layers: Sequence[LayerRecord], max_rows: int | None = None) -> list[LayerRow]:
    """One row per layer, or per equal stretch of consecutive layers where `max_rows` are too few."""
    if not layers or (max_rows is not None and max_rows < 1):
        return []
    per_row = 1 if max_rows is None else math.ceil(len(layers) / max_rows)
    return [_row(layers[start : start + per_row]) for start in range(0, len(layers), per_row)]


def layer_lines(
    layers: Sequence[LayerRecord],
    vision_tokens: int | None,
    width: int,
    height: int | None = None,
    *,
    scored: bool = True,
) -> list[Text]:
    """The table as lines of at most `width` cells: a heading, the rows, the sums.

    Args:
        layers: the pruned arm's layers.
        vision_tokens: n_v, of which each row says how many are kept.
        width: cells; columns that do not fit are left out whole.
        height: lines at most; too many layers are condensed. None: no limit.
        scored: whether gamma decided; of given rates neither it nor groups are shown.
    """
    if not layers or (height is not None and height < 3):
        return []
    rows = condense(layers, None if height is None else height - 2)
    scale = _scale([row.gamma for row in rows])
    columns = _columns(rows, vision_tokens, scale, width, scored)
    heading = Text(style="bold underline")
    for column in columns:
        heading.append_text(column.aligned(Text(column.title)))
    lines = [heading]
    for row in rows:
        line = Text()
        for column in columns:
            line.append_text(column.aligned(column.cell(row)))
        lines.append(line)
    lines.append(_sums(layers, len(rows), vision_tokens, width))
    for line in lines[1:]:
        line.rstrip()
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def bar(fraction: float, width: int) -> str:
    """A bar of `width` cells, filled to the eighth of a cell."""
    eighths = round(min(max(fraction, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


@dataclass(frozen=True)
class _Column:
    title: str
    width: int
    cell: Callable[[LayerRow], Text]
    left: bool = False

    def aligned(self, content: Text) -> Text:
        gap = max(self.width - content.cell_len, 0)
        padded = Text(" ") if self.left else Text(" " * (gap + 1))
        padded.append_text(content)
        return fit(padded, self.width + 1)


def _columns(
    rows: Sequence[LayerRow], vision_tokens: int | None, scale: float, width: int, scored: bool
) -> list[_Column]:
    def right(title: str, show: Callable[[LayerRow], str]) -> _Column:
        widest = max(len(title), *(len(show(row)) for row in rows))
        return _Column(title, widest, lambda row: Text(show(row)))

    total = UNKNOWN if vision_tokens is None else format_count(vision_tokens)
    group_width = max(len("group"), *(len(row.group) for row in rows))
    by_name = {
        "layer": right("layer", lambda row: row.layers),
        "gamma": right("gamma", lambda row: _number(row.gamma, 3)),
        "group": _Column("group", group_width, lambda row: Text(row.group, row.group_style), left=True),
        "rate": right("rate", lambda row: _number(row.rate, 2)),
        "kept": right("kept", lambda row: f"{_count(row.kept)}/{total}"),
        "KV/layer": right("KV/layer", lambda row: format_bytes(row.layer_bytes)),
        "KV/head": right("KV/head", lambda row: format_bytes(row.head_bytes)),
    }
    if not scored:
        del by_name["gamma"], by_name["group"]
    # What goes first when the terminal is narrow: what other columns imply.
    for name in ("KV/head", "rate", "group", "KV/layer"):
        if name in by_name and sum(column.width + 1 for column in by_name.values()) > width:
            del by_name[name]
    order = ("layer", "gamma", "group", "rate", "kept", "KV/head", "KV/layer")
    columns = [by_name[name] for name in order if name in by_name]
    room = min(width - sum(column.width + 1 for column in columns) - 1, _MAX_BAR)
    title = f"0 to {scale:g}"
    if scored and room >= max(_MIN_BAR, len(title)):
        cell = _Column(
            title,
            room,
            lambda row: Text("" if row.gamma is None else bar(row.gamma / scale, room), row.group_style),
            left=True,
        )
        columns.insert(2, cell)
    return columns


def _row(layers: Sequence[LayerRecord]) -> LayerRow:
    groups = Counter(layer.group or UNKNOWN for layer in layers)
    names = list(groups)
    group = names[0] if len(names) == 1 else " ".join(f"{groups[name]}{name[:3]}" for name in names)
    first, last = layers[0].index, layers[-1].index
    return LayerRow(
        layers=str(first) if first == last else f"{first}-{last}",
        gamma=_mean([layer.gamma for layer in layers]),
        group=group,
        group_style=GROUP_STYLES.get(names[0], "") if len(names) == 1 else "",
        rate=_mean([layer.rate for layer in layers]),
        kept=_mean([layer.vision_tokens_kept for layer in layers]),
        head_bytes=_mean([layer.kv_bytes_held_per_head for layer in layers]),
        layer_bytes=_mean([layer.kv_bytes_held for layer in layers]),
    )


def _sums(layers: Sequence[LayerRecord], rows: int, vision_tokens: int | None, width: int) -> Text:
    """The last line: what all layers hold, of what they would hold uncut."""
    held = [layer.kv_bytes_held for layer in layers if layer.kv_bytes_held is not None]
    full = [layer.kv_bytes_full for layer in layers if layer.kv_bytes_full is not None]
    if len(held) < len(layers) or len(full) < len(layers) or not sum(full):
        share = "unknown"
    else:
        share = f"{format_bytes(sum(held))} of {format_bytes(sum(full))} ({sum(held) / sum(full):.0%})"
    text = f" {len(layers)} layers hold {share}"
    if rows < len(layers):
        longer = f"{text}; rows of several layers show means"
        text = longer if len(longer) <= width else text
    return Text(text, style="dim")


def _scale(gammas: Sequence[float | None]) -> float:
    most = max((gamma for gamma in gammas if gamma is not None), default=1.0)
    return next((scale for scale in _SCALES if most <= scale), 1.0)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else format_number(value, digits)


def _count(value: float | None) -> str:
    return UNKNOWN if value is None else format_count(round(value))
