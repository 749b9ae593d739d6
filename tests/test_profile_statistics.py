import numpy as np
import pytest

from plphp_cli.profiling.records import FASTER, NO_DIFFERENCE, PRUNED, SLOWER, STOCK, UNPRUNED
from plphp_cli.profiling.schedule import CONTROL, alternated, slots
from plphp_cli.profiling.statistics import MIN_PAIRS, compare, median, percentile, percentiles, spread

PAIRS = 9


def trials(noise, ratio, count=1000, pairs=PAIRS, seed=7):
    """Verdicts of simulated profiles: unpruned takes `ratio` times pruned's time, all noisy alike."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        pruned, unpruned, control = np.exp(draw.normal(0, noise, (3, pairs)))
        unpruned, control = unpruned * ratio, control * ratio
        found = compare(unpruned.tolist(), pruned.tolist(), (unpruned.tolist(), control.tolist()))
        yield found.verdict


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.05, 0.2])
@pytest.mark.parametrize("pairs", [MIN_PAIRS, PAIRS, 12, 20])
def test_identical_arms_are_called_different_in_at_most_2_percent_of_1000_trials(noise, pairs):
    called = sum(verdict != NO_DIFFERENCE for verdict in trials(noise, 1.0, pairs=pairs))
    assert called <= 20


def test_a_5_percent_difference_under_2_percent_noise_is_found():
    verdicts = list(trials(0.02, 1.05, count=300))
    assert verdicts.count(FASTER) >= 0.9 * len(verdicts)
    assert SLOWER not in verdicts
    # Noise of 2 % on the paired ratio itself: each arm's own is smaller by a square root of two.
    verdicts = list(trials(0.02 / 2**0.5, 1.05, count=300))
    assert verdicts.count(FASTER) >= 0.99 * len(verdicts)


def test_a_difference_the_other_way_is_slower():
    assert set(trials(0.02, 0.5, count=50)) == {SLOWER}


def test_within_2_percent_nothing_is_called_however_certain():
    assert set(trials(0.0001, 1.019, count=50)) == {NO_DIFFERENCE}
    assert set(trials(0.0001, 1.021, count=50)) == {FASTER}


def test_nothing_inside_the_control_interval_is_called():
    one, two = [1.0] * PAIRS, [1.1] * PAIRS
    noisy = [1.0, 1.3] * PAIRS
    assert compare(two, one, (one, one)).verdict == FASTER
    assert compare(two, one, (noisy[:PAIRS], noisy[1 : PAIRS + 1])).verdict == NO_DIFFERENCE


def test_ratios_are_paired_and_seeded():
    over, under = [2.0, 8.0, 6.0], [1.0, 2.0, 2.0]
    found = compare(over, under)
    assert found.ratios == pytest.approx((2.0, 4.0, 3.0))
    assert found.median == pytest.approx(3.0)
    assert found.low <= found.median <= found.high
    assert found.verdict is None
    assert compare(over, under) == found


def test_too_little_gives_no_verdict():
    assert compare([], []) is None
    same = [1.0] * (MIN_PAIRS - 1)
    assert compare([2.0] * len(same), same, (same, same)).verdict is None


def test_nothing_has_no_median():
    assert (median([]), percentile([], 0.5), percentiles([]), spread([])) == (None, None, None, None)
    assert percentiles([1.0, 2.0, 3.0]).p50 == 2.0
    assert spread([1.0, 2.0, 3.0]).maximum == 3.0


def test_two_arms_go_abba_and_three_abccba():
    assert "".join(arm for _, arm in alternated("AB", 2)) == "ABBA"
    assert "".join(arm for _, arm in alternated("ABC", 2)) == "ABCCBA"
    turns = list(alternated("AB", 9))
    assert all(sorted(arm for number, arm in turns if number == repeat) == ["A", "B"] for repeat in range(9))


def test_the_control_stands_in_the_schedule_where_two_arms_are_compared():
    assert slots((PRUNED, UNPRUNED)) == (PRUNED, UNPRUNED, CONTROL)
    assert slots((PRUNED, UNPRUNED, STOCK)) == (PRUNED, UNPRUNED, STOCK, CONTROL)
    assert slots((PRUNED,)) == (PRUNED,)
