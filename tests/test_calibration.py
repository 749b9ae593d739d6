import pytest
from hypothesis import given
from hypothesis import strategies as st

from plphp_cli.calibration import outstanding, quantile, rank_correlation

values = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(values, st.floats(0, 1))
def test_a_quantile_splits_the_values_at_its_share(numbers, share):
    cut = quantile(numbers, share)
    # The cut lies between the two values next to the share's place, so at most one value of dust either way.
    assert sum(v < cut for v in numbers) <= share * (len(numbers) - 1) + 1
    assert sum(v > cut for v in numbers) <= (1 - share) * (len(numbers) - 1) + 1


@given(st.lists(st.integers(0, 50), min_size=3, max_size=20, unique=True), st.randoms())
def test_rank_correlation_sees_order_alone(numbers, rng):
    assert rank_correlation(numbers, [n**3 for n in numbers]) == pytest.approx(1)
    assert rank_correlation(numbers, [-n for n in numbers]) == pytest.approx(-1)
    shuffled = rng.sample(numbers, len(numbers))
    count = len(numbers)
    ranks_a, ranks_b = ([sorted(row).index(v) for v in row] for row in (numbers, shuffled))
    squares = sum((a - b) ** 2 for a, b in zip(ranks_a, ranks_b, strict=True))
    expected = 1 - 6 * squares / (count * (count**2 - 1))
    assert rank_correlation(numbers, shuffled) == pytest.approx(expected)


def test_rank_correlation_is_unknown_without_spread_or_with_few_layers():
    assert rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]) is None
    assert rank_correlation([1, 2, None], [1, 2, 3]) is None


@given(st.lists(st.floats(0.02, 0.04), min_size=5, max_size=30), st.integers(0, 29))
def test_only_a_layer_far_outside_the_others_is_exempt(needs, place):
    place %= len(needs)
    spread = max(needs) - min(needs)
    needs[place] = 1.0 + 10 * spread
    assert outstanding(needs) == (place,)


@given(st.lists(st.floats(0, 0.0099), min_size=4, max_size=30))
def test_needs_too_small_to_matter_exempt_no_layer(needs):
    assert outstanding(needs) == ()


def test_two_layers_far_outside_do_not_hide_each_other():
    assert outstanding([0.011, 0.002, 0.002, 0.006, 0.007, 0.005, 0.035, 0.053]) == (6, 7)
