"""Means over prompts and their 95 % intervals: a percentile bootstrap over prompts, seeded."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from plphp_cli.sweep.records import Interval

RESAMPLES = 4000
CONFIDENCE = 0.95
# Of resamples x prompts: bounds the memory; with so many prompts fewer resamples give the same interval.
_MOST_DRAWS = 4_000_000
_LEAST_RESAMPLES = 500


def mean_interval(
    values: Sequence[float], intervals: bool = True, imagined: Sequence[float] = ()
) -> Interval:
    """The mean of one value a prompt, each weighing the same; no interval of a single one.

    All means over the same number of prompts are resampled alike, so what is compared is paired.

    Args:
        values: at least one.
        intervals: False leaves the interval out.
        imagined: values of prompts that are drawn beside the real ones for the interval (the mean is of the
            real ones). Of right and wrong answers a few prompts may show no difference at all, and resampling
            them would call that certain; an imagined prompt each way keeps the interval open as Agresti and
            Coull (a share) and Bonett and Price (a paired difference) do.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2 or not intervals:
        return Interval(mean, None, None)
    drawn = np.asarray([*values, *imagined], dtype=float)
    means = _weights(len(drawn)) @ drawn
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(bound) for bound in np.quantile(means, [tail, 1 - tail]))
    # Rounding of the products must not put the mean of equal values outside their interval.
    return Interval(mean, min(low, mean), max(high, mean))


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample; None of fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


@lru_cache(maxsize=4)
def _weights(prompts: int) -> Any:
    """[resamples, prompts]: how often each prompt was drawn, as a share."""
    resamples = max(_LEAST_RESAMPLES, min(RESAMPLES, _MOST_DRAWS // prompts))
    counts = np.random.default_rng(0).multinomial(prompts, [1 / prompts] * prompts, size=resamples)
    return counts / prompts
