"""The one setting to take: the least cache that keeps to the constraint, and how sure that is."""

from collections.abc import Sequence

from plphp_cli.sweep.labels import format_nats, label, varied
from plphp_cli.sweep.points import constrained, excess, rank, satisfies
from plphp_cli.sweep.records import (
    FEW_PROMPTS,
    PLPHP,
    Constraint,
    Interval,
    Point,
    Recommendation,
)
from plphp_cli.units import format_number, format_percent

_FIGURES = {"kl": "mean KL", "agreement": "top-1 agreement", "accuracy_drop": "accuracy drop"}
_UNITS = {"kl": " nats", "agreement": "", "accuracy_drop": " points"}
_UNKNOWN = {
    "kl": "every answer of the unpruned model has a single token, which no cut can change",
    "agreement": "every answer of the unpruned model has a single token, which no cut can change",
    "accuracy_drop": "no prompt has an expected answer",
}


def recommend(
    points: Sequence[Point],
    constraint: Constraint,
    config_file: str | None = None,
    next_command: str | None = None,
) -> Recommendation:
    """The feasible setting of PLPHP that holds least; of equal ones that of lower KL, then the earlier one.

    Feasible is by the mean. The least of many means is flattered by chance, so the reason says when the
    interval reaches beyond the limit, and which setting keeps within it as a whole.

    Args:
        points: of `points`, in the order of the grid.
        constraint: the one they were judged by.
        config_file: where the config will be written, `next_command` what to type next; both are left out
            when nothing is recommended.
    """
    ours = [place for place, point in enumerate(points) if point.setting.method == PLPHP]
    prompts = max((points[place].prompts for place in ours), default=0)
    few = prompts < FEW_PROMPTS
    if not ours:
        return Recommendation(None, "No setting was measured yet.", few)
    known = [place for place in ours if constrained(points[place], constraint) is not None]
    if not known:
        reason = f"No setting can be judged by {_FIGURES[constraint.name]}: {_UNKNOWN[constraint.name]}."
        return Recommendation(None, reason, few)
    feasible = sorted(
        (p for p in known if satisfies(points[p], constraint)), key=lambda place: rank(points[place], place)
    )
    if not feasible:
        return Recommendation(None, _nearest(points, known, constraint), few)
    reason = _reason(points, feasible, len(known), constraint)
    return Recommendation(feasible[0], reason, few, config_file, next_command)


def limit_text(constraint: Constraint) -> str:
    """The constraint in words: `mean KL at most 0.05 nats`."""
    side = "at least" if constraint.name == "agreement" else "at most"
    return f"{_FIGURES[constraint.name]} {side} {_limit(constraint)}"


def figure_text(interval: Interval, constraint: Constraint) -> str:
    """The constrained figure with its interval: `0.031 nats [0.020, 0.047]`."""
    mean = _show(constraint, interval.mean) + _UNITS[constraint.name]
    if interval.low is None or interval.high is None:
        return mean
    return f"{mean} [{_show(constraint, interval.low)}, {_show(constraint, interval.high)}]"


def straddles(interval: Interval, constraint: Constraint) -> bool:
    """Whether a feasible figure's interval reaches beyond the limit."""
    ends = [end for end in (interval.low, interval.high) if end is not None]
    return any(excess(end, constraint) > 1e-9 for end in ends)


def _reason(points: Sequence[Point], feasible: Sequence[int], known: int, constraint: Constraint) -> str:
    chosen = points[feasible[0]]
    figure = constrained(chosen, constraint)
    assert figure is not None
    knobs = varied(point.setting for point in points)
    share = format_percent(chosen.kv_ratio.mean)
    if known == 1:
        first = f"The only setting, it holds {share} of the KV cache and keeps {limit_text(constraint)}"
    else:
        among = f"{len(feasible)} of {known} settings that keep {limit_text(constraint)}"
        first = f"It holds the least KV cache, {share}, of the {among}"
    first = f"{first}: {figure_text(figure, constraint)}"
    if chosen.kv_ratio.mean >= 1:
        first += "; it cuts nothing, so no setting of this grid saves memory within the limit"
    if figure.low is None:
        return f"{first}; one prompt gives no interval."
    if not straddles(figure, constraint):
        return f"{first}."
    first += "; feasible by the mean, but the interval reaches beyond the limit"
    for place in feasible[1:]:
        other = constrained(points[place], constraint)
        if other is not None and not straddles(other, constraint):
            held = format_percent(points[place].kv_ratio.mean)
            safe = label(points[place].setting, knobs)
            return f"{first} (the least whose whole interval keeps it: {safe}, holding {held})."
    return f"{first}, as it does for every setting that keeps it."


def _nearest(points: Sequence[Point], known: Sequence[int], constraint: Constraint) -> str:
    def miss(place: int) -> tuple[float, float, float, int]:
        figure = constrained(points[place], constraint)
        assert figure is not None
        return round(excess(figure.mean, constraint), 12), *rank(points[place], place)

    nearest = points[min(known, key=miss)]
    figure = constrained(nearest, constraint)
    assert figure is not None
    name = label(nearest.setting, varied(point.setting for point in points))
    count = "The only setting does not keep" if len(known) == 1 else f"None of {len(known)} settings keeps"
    return (
        f"{count} {limit_text(constraint)}; the nearest miss is {name} with "
        f"{figure_text(figure, constraint)}, holding {format_percent(nearest.kv_ratio.mean)} of the KV cache."
    )


def _show(constraint: Constraint, value: float) -> str:
    if constraint.name == "kl":
        return format_nats(value)
    return format_percent(value) if constraint.name == "agreement" else format_number(value * 100, 1)


def _limit(constraint: Constraint) -> str:
    limit = constraint.limit if constraint.name == "kl" else constraint.limit * 100
    return f"{limit:g}{' %' if constraint.name == 'agreement' else _UNITS[constraint.name]}"
