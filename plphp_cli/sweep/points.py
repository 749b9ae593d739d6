"""Rows to points: one setting over all prompts, what is on the front, what satisfies the constraint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from plphp_cli.profiling.records import RatioProfile
from plphp_cli.profiling.statistics import compare, median
from plphp_cli.sweep.bootstrap import deviation, mean_interval
from plphp_cli.sweep.coverage import Coverage, coverage
from plphp_cli.sweep.records import (
    BASELINE,
    PLPHP,
    RANDOM,
    Constraint,
    Interval,
    Point,
    PromptRecord,
    Row,
    Setting,
)
from plphp_cli.units import finite

# A share of prompts is a quotient of small integers: no limit and no front may hang on its last bit.
_DUST = 1e-9
_DIGITS = 12

# Imagined prompts, for `mean_interval`.
_RIGHT_OR_WRONG = (0.0, 1.0)
_BETTER_OR_WORSE = (-1.0, 1.0)

# Of one figure: a value by prompt id.
Column = dict[str, float]


def points(
    rows: Sequence[Row],
    prompts: Sequence[PromptRecord],
    constraint: Constraint,
    *,
    speeds: Mapping[Setting, RatioProfile] | None = None,
    intervals: bool = True,
) -> tuple[Point, ...]:
    """One point a setting: the baseline first, then settings in order of first appearance.

    Settings are compared on the same prompts (`coverage` says which), every prompt weighing the same. KL and
    agreement are of the prompts whose answer has a second token; a setting that lacks a figure which others
    have on one of these prompts has none, rather than a mean over easier prompts. Seeds of chance are
    averaged prompt by prompt into one point.

    Args:
        rows: those of `BASELINE` give its speed and, where a prompt's record does not, whether it was right.
        prompts: of the sweep, with the unpruned answers.
        constraint: decides `Point.feasible`.
        speeds: decode ratios to the baseline as `profile` compares them. Without them they come from the
            rows' rates, paired by prompt, and no verdict is called.
        intervals: False leaves the intervals out, for a view that is drawn while the sweep runs.
    """
    held = coverage(rows, prompts)
    if not held.prompts:
        return ()
    table = _Table.of(held, rows, prompts, intervals)
    merged: dict[Setting, list[Setting]] = {}
    for setting in held.settings:
        key = replace(setting, seed=None) if setting.method == RANDOM else setting
        merged.setdefault(key, []).append(setting)
    found = [_baseline(table), *(_point(table, key, seeds) for key, seeds in merged.items())]
    found = [_with_speed(point, table, merged, speeds or {}) for point in found]
    found = [replace(point, feasible=satisfies(point, constraint)) for point in found]
    return tuple(_with_fronts(found))


def constrained(point: Point, constraint: Constraint) -> Interval | None:
    """The figure of a point that the constraint limits; None when it was not measured."""
    figures = {
        "kl": point.kl_mean,
        "agreement": point.top1_agreement,
        "accuracy_drop": point.accuracy_drop,
    }
    return figures[constraint.name]


def excess(value: float, constraint: Constraint) -> float:
    """How far a figure is beyond the limit; not above 0 within it."""
    beyond = value - constraint.limit
    return -beyond if constraint.name == "agreement" else beyond


def satisfies(point: Point, constraint: Constraint) -> bool | None:
    """Whether a point's mean keeps to the limit; None when it was not measured."""
    found = constrained(point, constraint)
    return None if found is None else excess(found.mean, constraint) <= _DUST


def pareto(costs: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of the pairs no other one beats: at most as large in both and smaller in one.

    Equal pairs do not beat each other: identical cuts are on the front together.
    """
    least_second: dict[float, float] = {}
    for first, second in costs:
        least_second[first] = min(second, least_second.get(first, second))
    on_front: dict[float, float] = {}
    best = float("inf")
    for first, second in sorted(least_second.items()):
        if second < best:
            best = on_front[first] = second
    return [on_front.get(first) == second for first, second in costs]


@dataclass(frozen=True)
class _Table:
    """The compared rows with the prompts that each figure is taken on."""

    held: Coverage
    prompts: dict[str, PromptRecord]
    baseline: dict[str, Row]
    judged: tuple[str, ...]
    right: Column
    intervals: bool

    @classmethod
    def of(
        cls, held: Coverage, rows: Sequence[Row], prompts: Sequence[PromptRecord], intervals: bool
    ) -> "_Table":
        known = {prompt.prompt_id: prompt for prompt in prompts}
        baseline = {row.prompt_id: row for row in rows if row.method == BASELINE and row.prompt_id in known}
        every = [held.rows[setting] for setting in held.settings]
        judged = tuple(p for p in held.prompts if any(finite(of[p].kl_mean) is not None for of in every))
        right: Column = {}
        for prompt in held.prompts:
            correct = known[prompt].unpruned_correct
            if correct is None and prompt in baseline:
                correct = baseline[prompt].answer_correct
            if correct is not None:
                right[prompt] = float(correct)
        return cls(held, known, baseline, judged, right, intervals)

    def column(self, seeds: Sequence[Setting], figure: str, prompts: Sequence[str]) -> Column | None:
        """A figure by prompt, mean over seeds; None where a prompt lacks it, or without a prompt."""
        found: Column = {}
        for prompt in prompts:
            values = [finite(getattr(self.held.rows[seed][prompt], figure)) for seed in seeds]
            known = [float(value) for value in values if value is not None]
            if len(known) < len(values):
                return None
            found[prompt] = sum(known) / len(known)
        return found or None

    def interval(self, column: Column | None, imagined: Sequence[float] = ()) -> Interval | None:
        """The mean over a column's prompts."""
        return None if column is None else mean_interval(list(column.values()), self.intervals, imagined)


def _point(table: _Table, setting: Setting, seeds: Sequence[Setting]) -> Point:
    held, judged, scored = table.held.prompts, table.judged, tuple(table.right)
    ratio = table.interval(table.column(seeds, "kv_ratio", held))
    held_bytes = table.column(seeds, "kv_bytes_held", held)
    if ratio is None or held_bytes is None:
        raise ValueError(f"a row of {setting} holds no kv_ratio")
    kl, right = table.column(seeds, "kl_mean", judged), table.column(seeds, "answer_correct", scored)
    worst = [finite(table.held.rows[seed][prompt].kl_max) for seed in seeds for prompt in judged]
    known_worst = [value for value in worst if value is not None]
    drop = None if right is None else {prompt: table.right[prompt] - right[prompt] for prompt in right}
    many = setting.method == RANDOM
    return Point(
        setting=setting,
        prompts=len(held),
        kv_ratio=ratio,
        kv_bytes_held=sum(held_bytes.values()) / len(held),
        kl_mean=table.interval(kl),
        kl_max=max(known_worst) if len(known_worst) == len(worst) and worst else None,
        top1_agreement=table.interval(table.column(seeds, "top1_agreement", judged)),
        accuracy=table.interval(right, _RIGHT_OR_WRONG),
        accuracy_drop=table.interval(drop, _BETTER_OR_WORSE),
        seeds=len(seeds) if many else None,
        seed_sd=_seed_spread(table, seeds, "kl_mean", judged) if many else None,
        accuracy_sd=_seed_spread(table, seeds, "answer_correct", scored) if many else None,
    )


def _seed_spread(
    table: _Table, seeds: Sequence[Setting], figure: str, prompts: Sequence[str]
) -> float | None:
    """Standard deviation over seeds of each seed's mean over prompts."""
    columns = [table.column([seed], figure, prompts) for seed in seeds]
    means = [sum(column.values()) / len(column) for column in columns if column is not None]
    return deviation(means) if len(means) == len(seeds) else None


def _baseline(table: _Table) -> Point:
    """The unpruned model: all bytes held, no divergence from itself."""
    held = table.held
    some = held.rows[held.settings[0]]
    full = [some[prompt].kv_bytes_full for prompt in held.prompts]
    alike = dict.fromkeys(table.judged, 0.0)
    return Point(
        setting=Setting(BASELINE, None),
        prompts=len(held.prompts),
        kv_ratio=mean_interval([1.0] * len(held.prompts), table.intervals),
        kv_bytes_held=sum(full) / len(full),
        kl_mean=table.interval(alike or None),
        kl_max=0.0 if alike else None,
        top1_agreement=table.interval(dict.fromkeys(alike, 1.0) or None),
        accuracy=table.interval(table.right or None, _RIGHT_OR_WRONG),
        accuracy_drop=table.interval(dict.fromkeys(table.right, 0.0) or None),
    )


def _with_speed(
    point: Point,
    table: _Table,
    merged: Mapping[Setting, Sequence[Setting]],
    speeds: Mapping[Setting, RatioProfile],
) -> Point:
    """A point with its decoding rate, and its ratio to the baseline's on the same prompts."""
    baseline = {prompt: row for prompt in table.held.prompts if (row := table.baseline.get(prompt))}
    sources = [table.held.rows[seed] for seed in merged.get(point.setting, ())]
    if point.setting.method == BASELINE:
        sources = [baseline]
    rated = [
        (rate, baseline[prompt].decode_tokens_per_s if prompt in baseline else None)
        for rows in sources
        for prompt, row in rows.items()
        if (rate := finite(row.decode_tokens_per_s))
    ]
    point = replace(point, decode_tokens_per_s=median([rate for rate, _ in rated]))
    if point.setting in speeds:
        ratio = speeds[point.setting]
        interval = Interval(ratio.median, ratio.low, ratio.high)
        return replace(point, decode_ratio=interval, decode_verdict=ratio.verdict)
    paired = [(rate, other) for rate, other in rated if other]
    if point.setting.method == BASELINE or not paired:
        return point
    found = compare([rate for rate, _ in paired], [other for _, other in paired])
    if found is None:
        return point
    several = len(paired) > 1
    low, high = (found.low, found.high) if several else (None, None)
    return replace(point, decode_ratio=Interval(found.median, low, high))


def rank(point: Point, place: int) -> tuple[float, float, int]:
    """By what points are ordered: least cache, then lower KL, then the earlier place."""
    kl = float("inf") if point.kl_mean is None else _even(point.kl_mean.mean)
    return _even(point.kv_ratio.mean), kl, place


def _even(mean: float) -> float:
    """A mean without the last bits, in which equal sums of different terms differ."""
    return round(mean, _DIGITS)


def _with_fronts(found: Sequence[Point]) -> list[Point]:
    """Points with their places on the fronts: of PLPHP's settings only, each with what was measured."""

    def on_front(quality: dict[int, float]) -> set[int]:
        costs = [(_even(found[place].kv_ratio.mean), _even(cost)) for place, cost in quality.items()]
        return {place for place, on in zip(quality, pareto(costs), strict=True) if on}

    ours = [place for place, point in enumerate(found) if point.setting.method == PLPHP]
    kl = on_front({place: kl.mean for place in ours if (kl := found[place].kl_mean) is not None})
    right = on_front({place: -share.mean for place in ours if (share := found[place].accuracy) is not None})
    return [
        replace(point, on_front=place in kl, on_accuracy_front=place in right)
        for place, point in enumerate(found)
    ]
