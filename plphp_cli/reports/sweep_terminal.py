"""What `plphp sweep` prints: what to take, the front, what each level adds, what it took."""

from collections.abc import Sequence

from rich.text import Text

from plphp_cli.reports.layers import bar
from plphp_cli.reports.sweep_columns import table
from plphp_cli.reports.sweep_text import (
    baseline,
    chosen,
    conclusions,
    cost_lines,
    evenly,
    front,
    knobs_of,
    merit,
    method_kl,
    ours,
    remarks,
    scope_line,
    skipped_lines,
    standing,
    title,
    with_interval,
)
from plphp_cli.reports.text import fit, visible, wrapped
from plphp_cli.sweep.labels import NUMERIC, format_nats, value
from plphp_cli.sweep.records import PLPHP, Ablation, SweepRecord
from plphp_cli.units import format_number, format_percent

# More rows than this are on the page and in the files.
MOST_ROWS = 20
_MIN_BAR, _MAX_BAR = 6, 32


def sweep_report(record: SweepRecord, width: int, colour: bool) -> list[Text]:
    """The whole report in lines of at most `width` cells.

    Args:
        record: of one `plphp sweep`, complete or interrupted.
        width: terminal cells.
        colour: whether styles will be seen; nothing is told by colour alone.
    """
    del colour
    lines = [*_recommendation(record, width)]
    lines += wrapped(Text(scope_line(record), style="dim"), width)
    lines += wrapped(Text(standing(record), style="dim"), width)
    lines += _front(record, width)
    lines += _plot(record, width)
    lines += _ablations(record, width)
    ends = [*cost_lines(record), *skipped_lines(record)]
    if ends:
        lines += [*_rule("what it took", width), *_wrapped(ends, width)]
    notes = remarks(record)
    if notes:
        lines += [Text(), *_wrapped([f"note: {note}" for note in notes], width)]
    return lines


def _recommendation(record: SweepRecord, width: int) -> list[Text]:
    found = record.recommendation
    if found is None:
        return wrapped(Text("Nothing was measured yet.", style="bold"), width)
    lines = wrapped(Text(f"{title(record)}.", style="bold"), width)
    lines += wrapped(Text(visible(found.reason)), width)
    if text := merit(record):
        lines += wrapped(Text(text), width)
    if found.config_file is not None:
        lines += wrapped(Text(f"config: {visible(found.config_file)}"), width)
    if found.next_command is not None:
        # On one line, however long: a command with line breaks in it cannot be pasted.
        lines += [Text("next:"), Text(visible(found.next_command))]
    return lines


def _front(record: SweepRecord, width: int) -> list[Text]:
    points, whole, best = ours(record), baseline(record), chosen(record)
    if not points:
        return []
    rows = front(record)
    answers = any(point.accuracy is not None for point in points)
    name = "the fronts of KL and accuracy" if answers else "the front"
    meaning = "on a front: no other setting holds less at no more KL"
    meaning += ", or at no less accuracy" if answers else ""
    if not rows:
        rows, name, meaning = [(point, 1) for point in points], "all settings", "no front without KL"
    if best is not None and all(point is not best for point, _ in rows):
        rows = [*rows, (best, 1)]
    shown = evenly(rows, MOST_ROWS, best)
    first = [(whole, 1)] if whole is not None else []
    lines = _rule(name, width)
    drawn = table([*first, *shown], knobs_of(record) or NUMERIC, record.constraint, best, width)
    lines += drawn
    if len(shown) < len(rows):
        lines += wrapped(Text(f"{len(rows) - len(shown)} more rows are in the files.", style="dim"), width)
    return [*lines, *wrapped(Text(_legend(record, drawn, meaning), style="dim"), width)]


def _legend(record: SweepRecord, drawn: Sequence[Text], meaning: str) -> str:
    """What the signs in the table mean, of those that are in it."""
    parts = [meaning]
    if chosen(record) is not None:
        parts.append(">: recommended")
    if " equal" in drawn[0].plain:
        parts.append("xN: N settings that cut alike")
    if any(line.plain.endswith("by mean") for line in drawn):
        parts.append("by mean: the interval reaches beyond the limit")
    return "; ".join(parts)


def _plot(record: SweepRecord, width: int) -> list[Text]:
    """KL and cache held against the one knob that was varied; nothing for grids of more dimensions."""
    knobs, best = knobs_of(record), chosen(record)
    points = [point for point in ours(record) if point.kl_mean is not None]
    if len(knobs) != 1 or knobs[0] not in NUMERIC or len(points) < 2:
        return []
    knob = knobs[0]
    points.sort(key=lambda point: getattr(point.setting.config, knob))
    limit = record.constraint.limit if record.constraint.name == "kl" else None
    most = max(max(point.kl_mean.mean for point in points if point.kl_mean), limit or 0.0) or 1.0
    names = [value(point.setting.config, knob) for point in points if point.setting.config is not None]
    left = max(len(knob), *map(len, names)) + 2
    room = min(max((width - left - 22) // 2, _MIN_BAR), _MAX_BAR)
    tick = None if limit is None else min(round(limit / most * room), room - 1)
    head = f"{knob.rjust(left)}  {'KL, nats a token'.ljust(room + 9)}  KV held"
    lines = [*_rule(f"by {knob}", width), _cut(Text(head, style="bold"), width)]
    for point, name in zip(points, names, strict=True):
        assert point.kl_mean is not None
        drawn = bar(point.kl_mean.mean / most, room)
        if tick is not None and drawn[tick] == " ":
            drawn = f"{drawn[:tick]}│{drawn[tick + 1 :]}"
        line = Text(("> " if point is best else "  ") + name.rjust(left - 2) + "  ")
        line.append(drawn, "green" if point.feasible else "yellow")
        line.append(f"{format_nats(point.kl_mean.mean):>8}   ")
        line.append(bar(point.kv_ratio.mean, room), "cyan")
        line.append(f"{format_percent(point.kv_ratio.mean, 0):>6}")
        lines.append(_cut(line, width))
    if limit is not None:
        lines += wrapped(Text(f"│: the limit, {limit:g} nats", style="dim"), width)
    return lines


def _ablations(record: SweepRecord, width: int) -> list[Text]:
    if not record.ablations:
        return []
    lines = _rule("methods at the same bytes held, prompt by prompt", width)
    rows = [[PLPHP, format_number(method_kl(record, PLPHP), 4), "", "", ""]]
    rows += [_ablation(record, one) for one in record.ablations]
    heads = ["method", "KL mean", "over plphp [95 %]", "accuracy lost, pts", "plphp better"]
    widths = [max(len(row[place]) for row in [heads, *rows]) for place in range(len(heads))]
    # What the sentences below say again goes first.
    for place in (3, 4):
        if sum(widths) + 2 * len(widths) > width:
            widths[place] = 0
    for number, row in enumerate([heads, *rows]):
        cells = [cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True) if size]
        lines.append(
            _cut(Text("  ".join([row[0].ljust(widths[0]), *cells]), "" if number else "bold"), width)
        )
    return [*lines, *_wrapped(conclusions(record), width)]


def _ablation(record: SweepRecord, one: Ablation) -> list[str]:
    loss = one.accuracy_loss
    return [
        one.method,
        format_number(method_kl(record, one.method), 4),
        with_interval(one.kl_excess, 4),
        "" if loss is None else with_interval(loss, 1, 100),
        f"{one.plphp_better} of {one.settings}",
    ]


def _wrapped(sentences: Sequence[str], width: int) -> list[Text]:
    """Sentences on lines of their own; what wraps is set in, so that each beginning is seen."""
    lines: list[Text] = []
    for sentence in sentences:
        text = visible(sentence)
        depth = len(text) - len(text.lstrip(" ")) + 2
        first, *rest = wrapped(Text(text), width - depth)
        lines.append(first)
        lines += [Text(" " * depth).append_text(line) for line in rest]
    return [_cut(line, width) for line in lines]


def _cut(line: Text, width: int) -> Text:
    line.rstrip()
    line.truncate(width, overflow="ellipsis")
    return line


def _rule(name: str, width: int) -> list[Text]:
    line = fit(Text(f"── {name} ", style="bold"), min(width, len(name) + 4))
    line.append("─" * max(width - line.cell_len, 0))
    return [Text(), line]
