"""What a sweep says in plain sentences: the same on the terminal and in the HTML page."""

from collections.abc import Sequence
from statistics import fmean

from plphp_cli.profiling.records import FASTER, NO_DIFFERENCE
from plphp_cli.sweep.labels import KNOBS, format_nats, label, value, varied
from plphp_cli.sweep.points import constrained, rank
from plphp_cli.sweep.recommendation import limit_text, straddles
from plphp_cli.sweep.records import (
    BASELINE,
    FEW_PROMPTS,
    HEAD_ONLY,
    LAYER_ONLY,
    PLPHP,
    RANDOM,
    UNIFORM,
    Ablation,
    Constraint,
    Interval,
    Point,
    SweepRecord,
)
from plphp_cli.units import (
    NOT_AVAILABLE,
    format_count,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
)

# What PLPHP has and a method lacks.
_LEVELS = {
    LAYER_ONLY: "A ranking of each head's own (against one shared by all heads)",
    HEAD_ONLY: "A rate of each layer's own (against one for all layers)",
    UNIFORM: "The pair of both (against one rate and one ranking)",
}
# A verdict on chance takes more than the spread of two draws of it.
_SEED_SPREADS = 2
# Nats a token under which no difference is worth a word, however certain.
_NEGLIGIBLE = 0.001


def ours(record: SweepRecord) -> list[Point]:
    """The points of PLPHP's own settings, in the order of the grid."""
    return [point for point in record.points if point.setting.method == PLPHP]


def baseline(record: SweepRecord) -> Point | None:
    """The unpruned model's point; None before anything was measured."""
    return next((point for point in record.points if point.setting.method == BASELINE), None)


def chosen(record: SweepRecord) -> Point | None:
    """The recommended point, or None."""
    place = record.recommendation.point if record.recommendation is not None else None
    return None if place is None else record.points[place]


def knobs_of(record: SweepRecord) -> tuple[str, ...]:
    """The knobs that were varied."""
    return varied(point.setting for point in record.points)


def scope_line(record: SweepRecord) -> str:
    """What was swept: how many settings of which knobs, over how many prompts, and what stayed fixed."""
    points = ours(record)
    knobs = knobs_of(record)
    compared = points[0].prompts if points else 0
    config = next((point.setting.config for point in points if point.setting.config is not None), None)
    fixed = [knob for knob in KNOBS if knob not in knobs]
    line = f"{_count(len(points), 'setting')} over {_count(compared, 'prompt')}"
    if knobs:
        line += f", varying {', '.join(knobs)}"
    if config is not None and fixed:
        shown = [f"{knob} {value(config, knob)}" for knob in fixed if getattr(config, knob) != ()]
        line += f"; fixed: {', '.join(shown)}" if shown else ""
    return f"{line}."


def standing(record: SweepRecord) -> str:
    """How much the sweep may be relied upon, by its number of prompts."""
    count = max((point.prompts for point in record.points), default=0)
    if count == 1:
        return "One prompt is an anecdote: indication only. Give prompts with --data for a verdict."
    if count < FEW_PROMPTS:
        return f"{count} prompts are few (under {FEW_PROMPTS}): indication only."
    return f"Means over {format_count(count)} prompts, each weighing the same; in brackets 95 % intervals."


def merit(record: SweepRecord) -> str:
    """What else the recommended setting gives; empty where none is recommended."""
    point, whole, limited = chosen(record), baseline(record), record.constraint.name
    if point is None:
        return ""
    parts = []
    if point.kl_mean is not None and limited != "kl":
        parts.append(f"mean KL {format_nats(point.kl_mean.mean)} nats")
    if point.top1_agreement is not None and limited != "agreement":
        parts.append(f"top-1 agreement {format_percent(point.top1_agreement.mean)}")
    if point.accuracy is not None and whole is not None and whole.accuracy is not None:
        share, of = format_percent(point.accuracy.mean), format_percent(whole.accuracy.mean)
        parts.append(f"accuracy {share} against {of} unpruned")
    figures = f"It has {', '.join(parts)}. " if parts else ""
    return f"{figures}{speed(point)}".strip()


def speed(point: Point) -> str:
    """What can be said of a point's decoding speed."""
    ratio = point.decode_ratio
    if ratio is None:
        return "Its speed was not compared." if point.decode_tokens_per_s is None else ""
    shown = format_ratio(ratio.mean)
    if ratio.low is not None and ratio.high is not None:
        shown += f" [{format_number(ratio.low)}, {format_number(ratio.high)}]"
    if point.decode_verdict is None:
        return f"Decoding at {shown} the unpruned speed, without a verdict."
    if point.decode_verdict == NO_DIFFERENCE:
        return f"Decoding shows no measurable difference ({shown})."
    return f"Decoding is {'faster' if point.decode_verdict == FASTER else 'SLOWER'}: {shown}."


def keeps(point: Point, constraint: Constraint) -> str:
    """Whether a point keeps to the limit: `yes`, `by mean` where its interval reaches beyond, `no`."""
    figure = constrained(point, constraint)
    if figure is None or point.feasible is None:
        return NOT_AVAILABLE
    if not point.feasible:
        return "no"
    return "by mean" if straddles(figure, constraint) else "yes"


def with_interval(interval: Interval | None, digits: int, scale: float = 1) -> str:
    """`0.0422 [0.0318, 0.0543]`; the mean alone without an interval."""
    if interval is None:
        return NOT_AVAILABLE
    return f"{format_number(interval.mean * scale, digits)} {interval_only(interval, digits, scale)}".rstrip()


def interval_only(interval: Interval | None, digits: int, scale: float = 1) -> str:
    """`[0.0318, 0.0543]`; empty without an interval."""
    if interval is None or interval.low is None or interval.high is None:
        return ""
    low, high = (format_number(end * scale, digits) for end in (interval.low, interval.high))
    return f"[{low}, {high}]"


def conclusions(record: SweepRecord) -> list[str]:
    """A sentence for every method swept beside PLPHP: what it tells, also when it tells against PLPHP."""
    return [_against_chance(one) if one.method == RANDOM else _level(one) for one in record.ablations]


def method_kl(record: SweepRecord, method: str) -> float | None:
    """Mean KL of a method over the configs that PLPHP was swept with as well."""
    configs = {point.setting.config for point in ours(record)}
    found = [
        point.kl_mean.mean
        for point in record.points
        if point.setting.method == method and point.setting.config in configs and point.kl_mean is not None
    ]
    return fmean(found) if found else None


def _level(one: Ablation) -> str:
    what = _LEVELS[one.method]
    kl = one.kl_excess
    if kl is None:
        return f"{what}: KL is not known."
    where = f"PLPHP's KL is the lower in {one.plphp_better} of {_count(one.settings, 'setting')}"
    where += f", equal in {equal}" if (equal := one.settings - one.plphp_better - one.plphp_worse) else ""
    shown = _nats(kl)
    if kl.low is None or kl.high is None:
        return f"{what}: {shown} on the only prompt, which proves nothing; {where}."
    if kl.low == kl.high == 0:
        return f"{what} changes nothing here."
    if abs(kl.mean) < _NEGLIGIBLE:
        return f"{what} makes no difference that matters: {shown}; {where}."
    few = _few(one)
    if kl.low > 0:
        return f"{what} saves {shown}; {where}{few}."
    if kl.high < 0:
        return f"{what} does HARM here: {shown} more KL than without; {where}{few}."
    return f"{what} shows no difference that {one.prompts} prompts can tell: {shown}; {where}."


def _against_chance(one: Ablation) -> str:
    kl, spread = one.kl_excess, one.seed_sd
    if kl is None:
        return "Against chance: KL is not known."
    draws = _count(one.seeds or 0, "seed")
    seeds = draws if spread is None else f"{draws}, standard deviation {format_number(spread, 4)}"
    where = f"PLPHP is better in {one.plphp_better} of {_count(one.settings, 'setting')}"
    if kl.low is None or kl.high is None:
        return f"Against chance: {_nats(kl)} on the only prompt ({seeds}), which proves nothing; {where}."
    certain = spread is not None and abs(kl.mean) > max(_SEED_SPREADS * spread, _NEGLIGIBLE)
    few = _few(one)
    if kl.low > 0 and certain:
        return f"PLPHP beats chance: tokens drawn at random cost {_nats(kl)} more ({seeds}); {where}{few}."
    if kl.high < 0 and certain:
        return (
            f"CHANCE WINS: tokens drawn at random cost {_nats(kl, -1)} LESS than PLPHP's choice ({seeds}); "
            f"{where}{few}. On this model and these prompts its scores do not tell what matters."
        )
    return f"PLPHP does not measurably beat chance here: {_nats(kl)} ({seeds}); {where}."


def _few(one: Ablation) -> str:
    return f" ({_count(one.prompts, 'prompt')}: indication only)" if one.prompts < FEW_PROMPTS else ""


def _nats(interval: Interval, sign: int = 1) -> str:
    mean = f"{format_number(sign * interval.mean, 4)} nats"
    if interval.low is None or interval.high is None:
        return mean
    low, high = sorted((sign * interval.low, sign * interval.high))
    return f"{mean} [{format_number(low, 4)}, {format_number(high, 4)}]"


def cost_lines(record: SweepRecord) -> list[str]:
    """What the sweep took, and what it did not have to do."""
    cost = record.cost
    lines = []
    if cost.rows:
        spent = "" if cost.wall_s is None else f" in {duration(cost.wall_s)}"
        part = "" if cost.prefill_s is None else f" (of it prefill {duration(cost.prefill_s)})"
        lines.append(
            f"{_count(cost.rows, 'result')}{spent}{part}: {_count(cost.prefills, 'prefill')}, "
            f"{_count(cost.chunks, 'chunk')}, {format_count(cost.shared_cuts)} taken from an identical cut, "
            f"{_count(cost.own_answers, 'answer')} decoded anew."
        )
    if cost.resumed_rows:
        lines.append(f"{_count(cost.resumed_rows, 'result')} came from an earlier run.")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{format_count(number)} {noun}{'' if number == 1 else 's'}"


def skipped_lines(record: SweepRecord, most: int = 5) -> list[str]:
    """How many combinations are no setting, and the first of them with the reason."""
    if not record.skipped:
        return []
    count = len(record.skipped)
    lines = [f"{_count(count, 'combination')} skipped, being no setting:"]
    reasons = list(dict.fromkeys(one.reason for one in record.skipped))
    for reason in reasons[:most]:
        times = sum(one.reason == reason for one in record.skipped)
        lines.append(f"  {reason}" + (f" ({times} times)" if times > 1 else ""))
    if len(reasons) > most:
        lines.append(f"  and {len(reasons) - most} reasons more")
    return lines


def remarks(record: SweepRecord) -> list[str]:
    """What a reader should know before believing the figures."""
    found = list(record.warnings)
    points = ours(record)
    if record.interrupted:
        done = f"{format_count(record.rows_done)} of {format_count(record.rows_expected)}"
        found.append(f"Interrupted with {done} results: the same command with --resume continues.")
    if points and all(point.kl_mean is None for point in points):
        found.append("KL is not known: no answer has a second token, and the first one no cut can change.")
    if chosen(record) is not None and len(points) > 1:
        found.append(
            "The recommended setting was picked on these very prompts, so its figure is flattered a little; "
            "confirm it on others."
        )
    whole = baseline(record)
    if whole is not None and whole.accuracy is not None and whole.accuracy.mean < 0.5:
        found.append(
            f"The unpruned model answers only {format_percent(whole.accuracy.mean)} as expected: there is "
            "little accuracy to lose."
        )
    gap = max((one.kv_ratio_gap for one in record.ablations), default=0.0)
    if gap > 0.005:
        found.append(f"Methods differ by up to {format_percent(gap)} in bytes held: not quite equal terms.")
    return found


def front(record: SweepRecord) -> list[tuple[Point, int]]:
    """PLPHP's points on a front and the recommended one, least cache first; equal ones once, with a count."""
    places = [
        (point, place)
        for place, point in enumerate(record.points)
        if point.setting.method == PLPHP and (point.on_front or point.on_accuracy_front)
    ]
    found: dict[object, list[Point]] = {}
    for point, _ in sorted(places, key=lambda one: rank(*one)):
        found.setdefault(_figures(point), []).append(point)
    best = chosen(record)
    return [(best if best in same else same[0], len(same)) for same in found.values()]


def _figures(point: Point) -> tuple[object, ...]:
    """What identical cuts have in common."""
    return (point.kv_ratio, point.kl_mean, point.kl_max, point.top1_agreement, point.accuracy)


def duration(seconds: float | None) -> str:
    """Seconds as one would say them: `12.3 s`, `3 min 14 s`, `2 h 05 min`."""
    if seconds is None or seconds < 99.5:
        return format_seconds(seconds)
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def title(record: SweepRecord) -> str:
    """What came of it in a line, for headings."""
    found, point = record.recommendation, chosen(record)
    if found is None or not ours(record):
        return "Nothing was measured yet"
    if point is None:
        known = any(constrained(one, record.constraint) is not None for one in ours(record))
        return f"No setting {'keeps' if known else 'can be judged by'} {limit_text(record.constraint)}"
    name = label(point.setting, knobs_of(record))
    return f"{'Indication only' if found.indication_only else 'Recommended'}: {name}"


def evenly(items: Sequence[tuple[Point, int]], most: int, keep: Point | None) -> list[tuple[Point, int]]:
    """At most `most` of the items, evenly spread with both ends and the one to keep."""
    if len(items) <= most:
        return list(items)
    places = {round(step * (len(items) - 1) / (most - 1)) for step in range(most)}
    kept = next((place for place, (point, _) in enumerate(items) if point is keep), None)
    if kept is not None and kept not in places:
        inner = places - {0, len(items) - 1}
        places = (places - {min(inner, key=lambda place: abs(place - kept))}) | {kept}
    return [items[place] for place in sorted(places)]
