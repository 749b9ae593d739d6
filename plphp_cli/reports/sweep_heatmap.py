"""A figure over two knobs as a coloured table; the page's script lets choose both."""

from collections.abc import Sequence
from html import escape

from plphp_cli.reports.sweep_text import chosen, knobs_of, ours
from plphp_cli.sweep.labels import format_nats, value
from plphp_cli.sweep.records import Point, SweepRecord
from plphp_cli.units import format_percent

_DIMENSIONS = 2


def heatmap(record: SweepRecord) -> list[str]:
    """Mean KL (or, where it is not known, the cache held) over the two knobs with most values.

    Knobs beside these two have the recommended setting's values, or those of the setting in the middle of the
    grid. Nothing for a grid of fewer than two dimensions. The script of the page draws the same table for
    what the reader chooses, and knows it by these ids.
    """
    points, knobs = ours(record), knobs_of(record)
    if len(knobs) < _DIMENSIONS:
        return []
    across, down = _axes(points, knobs)
    shown = chosen(record) or points[len(points) // 2]
    fixed = {knob: _value(shown, knob) for knob in knobs if knob not in (across, down)}
    cells = {
        (_value(point, down), _value(point, across)): point
        for point in points
        if all(_value(point, knob) == of for knob, of in fixed.items())
    }
    columns, rows = (_values(points, knob) for knob in (across, down))
    held = "".join(f", {knob} {of}" for knob, of in fixed.items())
    lines = []
    for of in rows:
        drawn = "".join(_cell(cells.get((of, by)), record, points) for by in columns)
        lines.append(f"<tr><th>{escape(of)}</th>{drawn}</tr>")
    return [
        "<h2>Over two knobs</h2>",
        f'<p class="controls" id="choices" data-across="{across}" data-down="{down}"></p>',
        f'<p class="soft" id="shown">Mean KL in nats and, small, the cache held: {down} by {across}'
        f"{escape(held)}. Warmer: worse. Bold: keeps the limit; outlined: recommended.</p>",
        '<div class="wide"><table id="heat"><thead>'
        f"<tr><th>{down} \\ {across}</th>{''.join(f'<th>{escape(of)}</th>' for of in columns)}</tr>"
        "</thead><tbody>",
        *lines,
        "</tbody></table></div>",
    ]


def _cell(point: Point | None, record: SweepRecord, points: Sequence[Point]) -> str:
    if point is None:
        return "<td class=none>–</td>"
    place = next(place for place, other in enumerate(record.points) if other is point)
    known = [kl.mean for other in points if (kl := other.kl_mean) is not None]
    share, text = point.kv_ratio.mean, ""
    if point.kl_mean is not None:
        low, high = min(known) ** 0.5, max(known) ** 0.5
        # Square roots, as the script takes them: small divergences are what is to be told apart.
        share = (point.kl_mean.mean**0.5 - low) / (high - low) if high > low else 0.0
        text = format_nats(point.kl_mean.mean)
    classes = [name for name, on in (("keeps", point.feasible), ("best", point is chosen(record))) if on]
    return (
        f'<td class="{" ".join(classes)}" data-i="{place}" style="--t:{share:.3f}">{text}'
        f"<small>{format_percent(point.kv_ratio.mean, 0)}</small></td>"
    )


def _axes(points: Sequence[Point], knobs: Sequence[str]) -> tuple[str, str]:
    """The two knobs with most values: more across than down."""
    across, down, *_ = sorted(knobs, key=lambda knob: -len(_values(points, knob)))
    return across, down


def _values(points: Sequence[Point], knob: str) -> list[str]:
    """A knob's values as texts, numbers in their order."""
    configs = [point.setting.config for point in points if point.setting.config is not None]
    found = {getattr(config, knob): value(config, knob) for config in configs}
    return [found[key] for key in sorted(found)]


def _value(point: Point, knob: str) -> str:
    return "" if point.setting.config is None else value(point.setting.config, knob)
