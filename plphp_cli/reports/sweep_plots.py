"""The scatter of a sweep as inline SVG: marks that can be hovered, legible with and without a script."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from plphp_cli.reports.sweep_text import baseline, chosen, knobs_of
from plphp_cli.sweep.labels import NUMERIC
from plphp_cli.sweep.records import (
    BASELINE,
    HEAD_ONLY,
    LAYER_ONLY,
    METHODS,
    PLPHP,
    RANDOM,
    UNIFORM,
    Interval,
    Point,
    SweepRecord,
)
from plphp_cli.units import format_percent

# Narrow on purpose: two stand beside each other on a desk and one on a phone, letters legible.
_WIDTH, _HEIGHT = 480, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 24, 14, 46
# Beyond this quotient of largest and smallest a logarithmic axis shows more.
_LOG_FROM = 25
# How far below a logarithmic axis 0 lies.
_ZERO = 18
_HELD = "KV cache held"
_SHAPES = {
    PLPHP: "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0Z",
    LAYER_ONLY: "M0,-5L5,0L0,5L-5,0Z",
    HEAD_ONLY: "M-4,-4H4V4H-4Z",
    UNIFORM: "M0,-5L5,4H-5Z",
    RANDOM: "M-4,-4L4,4M4,-4L-4,4",
    BASELINE: "M-5,-5H5V5H-5Z",
}
_STAR = "M0,-11L2.6,-3.6L10.5,-3.4L4.2,1.4L6.5,8.9L0,4.4L-6.5,8.9L-4.2,1.4L-10.5,-3.4L-2.6,-3.6Z"


@dataclass(frozen=True)
class Axis:
    """Values to places along one side, with marks; a logarithmic one has a place apart for 0."""

    start: float
    end: float
    low: float
    high: float
    ticks: tuple[float, ...]
    zero: float | None = None

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high = self.low, self.high
        if self.zero is not None:
            if value <= 0:
                return self.zero
            value = math.log(max(value, low) / low)
            low, high = 0.0, math.log(high / low)
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def kl_scatter(record: SweepRecord, describe: Callable[[Point], str]) -> str | None:
    """Mean KL against the cache held; None where no KL is known.

    Args:
        record: its points in their order: a mark's `data-i` is the place of its point.
        describe: the text that a mark shows by itself, where no script runs.
    """
    known = [point.kl_mean.mean for point in record.points if point.kl_mean is not None]
    if not known:
        return None
    limit = record.constraint.limit if record.constraint.name == "kl" else None
    axis = _quality_axis([*known, *([limit] if limit else [])])
    zero = f'<text class="tick" x="{_LEFT - 8}" y="{_HEIGHT - _BOTTOM + 4}" text-anchor="end">0</text>'
    extra = [] if axis.zero is None else [zero]
    fronts = [point for point in record.points if point.on_front]
    return _scatter(record, describe, _Figure("kl_mean", "mean KL, nats a token", axis, limit, fronts, extra))


def accuracy_scatter(record: SweepRecord, describe: Callable[[Point], str]) -> str | None:
    """Accuracy against the cache held; None without expected answers."""
    known, best = [p.accuracy.mean for p in record.points if p.accuracy is not None], chosen(record)
    if not known:
        return None
    if best is not None and best.accuracy is not None:
        known += [end for end in (best.accuracy.low, best.accuracy.high) if end is not None]
    low, high = max(0.0, min(known) - 0.05), min(1.0, max(known) + 0.05)
    axis = Axis(_HEIGHT - _BOTTOM, _TOP, low, high, _nice(low, high))
    whole = baseline(record)
    limit = None
    if record.constraint.name == "accuracy_drop" and whole is not None and whole.accuracy is not None:
        limit = max(low, whole.accuracy.mean - record.constraint.limit)
    fronts = [point for point in record.points if point.on_accuracy_front]
    return _scatter(record, describe, _Figure("accuracy", "accuracy", axis, limit, fronts, []))


@dataclass(frozen=True)
class _Figure:
    name: str
    title: str
    axis: Axis
    limit: float | None
    front: Sequence[Point]
    extra: Sequence[str]


def _quality_axis(values: Sequence[float]) -> Axis:
    positive = [value for value in values if value > 0]
    high = max(positive, default=1.0) * 1.08
    start, end = _HEIGHT - _BOTTOM, _TOP
    if positive and high / min(positive) > _LOG_FROM:
        low = max(min(positive) / 1.15, high * 1e-6)
        return Axis(start - _ZERO, end, low, high, _decades(low, high), start)
    return Axis(start, end, 0.0, high, _nice(0.0, high))


def _scatter(record: SweepRecord, describe: Callable[[Point], str], figure: _Figure) -> str:
    ratios = [point.kv_ratio.mean for point in record.points]
    low = max(0.0, min(ratios) - 0.04)
    high = max(1.0, max(ratios)) + 0.02
    across = Axis(_LEFT, _WIDTH - _RIGHT, low, high, _nice(low, min(high, 1.0)))
    parts = [
        _opened(f"{figure.title} against the share of the KV cache held"),
        *_frame(across, figure),
        *_staircase(across, figure),
    ]
    best = chosen(record)
    order = [BASELINE, *reversed(METHODS)]
    places = sorted(range(len(record.points)), key=lambda at: order.index(record.points[at].setting.method))
    # What matters most is drawn last, above the others.
    places.sort(key=lambda at: (record.points[at] is best, record.points[at] in figure.front))
    for place in places:
        point = record.points[place]
        found: Interval | None = getattr(point, figure.name)
        if found is None:
            continue
        where = across(point.kv_ratio.mean), figure.axis(found.mean)
        if point is best:
            parts += _whiskers(across, figure.axis, point.kv_ratio, found, where)
        parts.append(_mark(point, place, where, point in figure.front, point is best, describe(point)))
    return "\n".join([*parts, "</svg>"])


def _opened(name: str) -> str:
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return f'<svg class="scatter" {size} role="img" aria-label="{escape(name)}">'


def _mark(point: Point, place: int, where: tuple[float, float], on_front: bool, best: bool, text: str) -> str:
    classes = "best" if best else f"{point.setting.method} front" if on_front else point.setting.method
    shape = _STAR if best else _SHAPES[point.setting.method]
    return (
        f'<g class="mark {classes}" data-i="{place}" transform="translate({where[0]:.1f},{where[1]:.1f})">'
        f'<title>{escape(text)}</title><path d="{shape}"/></g>'
    )


def _frame(across: Axis, figure: _Figure, name: str = _HELD) -> list[str]:
    """Axes with their marks and titles, and the side beyond the limit."""
    floor, share = _HEIGHT - _BOTTOM, name == _HELD
    parts: list[str] = []
    over: list[str] = []
    if figure.limit is not None:
        at = figure.axis(figure.limit)
        top, bottom = (_TOP, at) if figure.name == "kl_mean" else (at, floor)
        size = f'width="{_WIDTH - _RIGHT - _LEFT}" height="{max(bottom - top, 0):.1f}"'
        parts.append(f'<rect class="beyond" x="{_LEFT}" y="{top:.1f}" {size}/>')
        over.append(f'<path class="limit" d="M{_LEFT},{at:.1f}H{_WIDTH - _RIGHT}"/>')
        over.append(
            f'<text class="limit" x="{_WIDTH - _RIGHT - 4}" y="{at - 5:.1f}" text-anchor="end">limit</text>'
        )
    for tick in figure.axis.ticks:
        y = figure.axis(tick)
        shown = f"{tick:g}" if figure.name == "kl_mean" else format_percent(tick, 0)
        parts.append(f'<path class="grid" d="M{_LEFT},{y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>')
    for tick in across.ticks:
        x, shown = across(tick), format_percent(tick, 0) if share else f"{tick:g}"
        parts.append(f'<path class="grid" d="M{x:.1f},{_TOP}V{floor}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 17}" text-anchor="middle">{shown}</text>')
    middle = (_TOP + floor) / 2
    return [
        *parts,
        *over,
        *figure.extra,
        f'<path class="axis" d="M{_LEFT},{_TOP}V{floor}H{_WIDTH - _RIGHT}"/>',
        f'<text class="name" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
        f"{escape(name)}</text>",
        f'<text class="name" transform="translate(13,{middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(figure.title)}</text>",
    ]


def _staircase(across: Axis, figure: _Figure) -> list[str]:
    """The front as steps: between two settings nothing is known but that the cheaper one's holds."""
    pairs = {
        (point.kv_ratio.mean, found.mean)
        for point in figure.front
        if (found := getattr(point, figure.name)) is not None
    }
    path = ""
    for ratio, value in sorted(pairs):
        x, y = across(ratio), figure.axis(value)
        path += f"H{x:.1f}V{y:.1f}" if path else f"M{x:.1f},{y:.1f}"
    return [f'<path class="frontline" d="{path}"/>'] if len(pairs) > 1 else []


def _whiskers(
    across: Axis, axis: Axis, ratio: Interval, quality: Interval, where: tuple[float, float]
) -> list[str]:
    """The intervals of a point in both directions."""
    x, y = where
    parts = []
    if quality.low is not None and quality.high is not None:
        low, high = (axis(min(end, axis.high)) for end in (quality.low, quality.high))
        parts.append(f"M{x:.1f},{min(low, axis.start):.1f}V{high:.1f}")
    if ratio.low is not None and ratio.high is not None:
        parts.append(f"M{across(ratio.low):.1f},{y:.1f}H{across(ratio.high):.1f}")
    return [f'<path class="whisker" d="{"".join(parts)}"/>'] if parts else []


def knob_plot(record: SweepRecord, describe: Callable[[Point], str]) -> str | None:
    """Mean KL with its intervals against the one knob that was varied; None for any other grid."""
    knobs = knobs_of(record)
    points = [(place, point) for place, point in enumerate(record.points) if point.setting.method == PLPHP]
    found = [(place, point, point.kl_mean) for place, point in points if point.kl_mean is not None]
    if len(knobs) != 1 or knobs[0] not in NUMERIC or not found:
        return None
    (knob,) = knobs
    values = [getattr(point.setting.config, knob) for _, point, _ in found]
    margin = 0.06 * (max(values) - min(values))
    low, high = min(values) - margin, max(values) + margin
    across = Axis(_LEFT, _WIDTH - _RIGHT, low, high, _nice(low, high))
    limit = record.constraint.limit if record.constraint.name == "kl" else None
    tops = [kl.high if kl.high is not None else kl.mean for _, _, kl in found] + ([limit] if limit else [])
    top = (max(tops) or 1.0) * 1.12
    axis = Axis(_HEIGHT - _BOTTOM, _TOP, 0.0, top, _nice(0.0, top))
    figure = _Figure("kl_mean", "mean KL, nats a token", axis, limit, (), ())
    parts = [
        _opened(f"mean KL by {knob}"),
        *_frame(across, figure, f"{knob} (beside each mark: KV cache held)"),
    ]
    for at, (place, point, kl) in zip(values, found, strict=True):
        x, y = across(at), axis(kl.mean)
        if kl.low is not None and kl.high is not None:
            parts.append(f'<path class="range" d="M{x:.1f},{axis(kl.low):.1f}V{axis(kl.high):.1f}"/>')
        parts.append(_mark(point, place, (x, y), point.on_front, point is chosen(record), describe(point)))
        held = format_percent(point.kv_ratio.mean, 0)
        side = (-9, "end") if x > 0.8 * _WIDTH else (9, "start")
        where = f'x="{x + side[0]:.1f}" y="{y - 8:.1f}" text-anchor="{side[1]}"'
        parts.append(f'<text class="held" {where}>{held}</text>')
    return "\n".join([*parts, "</svg>"])


def legend_marks() -> dict[str, str]:
    """A small drawing of every kind of mark, for the legend."""

    def drawn(classes: str, shape: str) -> str:
        return (
            f'<svg class="key" viewBox="-12 -12 24 24" aria-hidden="true"><g class="{classes}">'
            f'<path d="{shape}"/></g></svg>'
        )

    marks = {method: drawn(f"mark {method}", shape) for method, shape in _SHAPES.items()}
    return marks | {"best": drawn("mark best", _STAR), "front": drawn(f"mark {PLPHP} front", _SHAPES[PLPHP])}


def _nice(low: float, high: float, most: int = 6) -> tuple[float, ...]:
    """Round values between two ends."""
    span = max(high - low, 1e-12)
    unit = 10 ** math.floor(math.log10(span / most))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return tuple(round((first + number) * step, 12) for number in range(count))


def _decades(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten between two ends, with 2 and 5 times them where they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    found = (factor * 10.0**power for power in powers for factor in factors)
    return tuple(float(f"{value:.3g}") for value in found if low <= value <= high)
