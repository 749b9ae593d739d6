"""Medians, percentiles, paired bootstrap intervals, and what may be called a difference. Seeded."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plphp_cli.profiling.records import FASTER, NO_DIFFERENCE, SLOWER, Percentiles, SpreadRecord

# Nothing within 2 % is called a difference, however narrow its interval.
THRESHOLD = 0.02
CONFIDENCE = 0.95
RESAMPLES = 4000
# Under fewer pairs nothing can be called with this confidence.
MIN_PAIRS = 6


@dataclass(frozen=True)
class Comparison:
    """Paired ratios, their median with its interval, the interval of the A/A control, and the verdict."""

    ratios: tuple[float, ...]
    median: float
    low: float
    high: float
    control_low: float | None
    control_high: float | None
    verdict: str | None


def median(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return float(np.median(values)) if len(values) else None


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` of the values lie, linear between neighbours; None of nothing."""
    return float(np.quantile(values, share)) if len(values) else None


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """p50, p90 and p99; None of nothing."""
    return Percentiles(*map(float, np.quantile(values, [0.5, 0.9, 0.99]))) if len(values) else None


def spread(values: Sequence[float]) -> SpreadRecord | None:
    """Five numbers; None of nothing."""
    return SpreadRecord(*map(float, np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))) if len(values) else None


def compare(
    numerator: Sequence[float],
    denominator: Sequence[float],
    control: tuple[Sequence[float], Sequence[float]] | None = None,
    seed: int = 0,
) -> Comparison | None:
    """Compare two arms by paired samples: numerator_i / denominator_i.

    A difference is called only if the 95 % paired bootstrap interval of the median excludes 1 and a sign test
    agrees, the median differs from 1 by more than 2 %, and it lies outside the A/A interval.

    Args:
        numerator: one positive sample a repeat.
        denominator: of the same repeats.
        control: two runs of one and the same arm in the same schedule; its interval is that of the mean
            ratio, which outliers widen. None: nothing can be called.
        seed: of the resampling.

    Returns:
        The comparison; None without a pair.
    """
    pairs = min(len(numerator), len(denominator))
    if not pairs:
        return None
    logs = np.log(np.asarray(numerator[:pairs]) / np.asarray(denominator[:pairs]))
    low, high = _interval(logs, np.median, seed)
    middle = float(np.median(logs))
    control_low = control_high = verdict = None
    if control is not None and (count := min(map(len, control))) >= MIN_PAIRS <= pairs:
        same = np.log(np.asarray(control[0][:count]) / np.asarray(control[1][:count]))
        control_low, control_high = _interval(same, np.mean, seed + 1)
        certain = (low > 0 or high < 0) and _sign_test(logs) <= 1 - CONFIDENCE
        large = abs(middle) > np.log1p(THRESHOLD)
        outside = not control_low <= middle <= control_high
        verdict = (FASTER if middle > 0 else SLOWER) if certain and large and outside else NO_DIFFERENCE
        control_low, control_high = float(np.exp(control_low)), float(np.exp(control_high))
    ratios = tuple(np.exp(logs).tolist())
    middle, low, high = (float(value) for value in np.exp([middle, low, high]))
    return Comparison(ratios, middle, low, high, control_low, control_high, verdict)


def _sign_test(logs: Any) -> float:
    """Two-sided p-value of as many log ratios on one side of 0: the bootstrap alone is too narrow for few."""
    count, above = len(logs), int((logs > 0).sum())
    extreme = max(above, count - above)
    tail = sum(math.comb(count, k) for k in range(extreme, count + 1)) / 2**count
    return min(1.0, 2 * tail)


def _interval(logs: Any, statistic: Callable[..., Any], seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of paired log ratios."""
    draws = np.random.default_rng(seed).integers(0, len(logs), (RESAMPLES, len(logs)))
    values = statistic(logs[draws], axis=-1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
