import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_records import MAX_KL, grid, named, prompt, realistic_rows, row, rows_of

from plphp_cli.config import PLPHPConfig
from plphp_cli.profiling.records import FASTER, RatioProfile
from plphp_cli.serialize import to_json
from plphp_cli.sweep.bootstrap import mean_interval
from plphp_cli.sweep.labels import format_nats, label, varied
from plphp_cli.sweep.points import pareto, points
from plphp_cli.sweep.recommendation import recommend
from plphp_cli.sweep.records import BASELINE, RANDOM, UNIFORM, Setting

A, B, C = (PLPHPConfig(r=r) for r in (0.2, 0.4, 0.6))
TEN = [prompt(number) for number in range(10)]


# Fronts

COSTS = st.lists(st.tuples(*[st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]) | st.floats(0, 1)] * 2), max_size=40)


def beats(one, other):
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@settings(deadline=None)
@given(COSTS)
def test_what_is_on_the_front_is_beaten_by_nothing_and_all_else_by_something_on_it(costs):
    on_front = pareto(costs)
    front = [cost for cost, on in zip(costs, on_front, strict=True) if on]
    for cost, on in zip(costs, on_front, strict=True):
        assert on != any(beats(other, cost) for other in costs)
        assert on != any(beats(other, cost) for other in front)


@settings(deadline=None)
@given(COSTS, st.randoms())
def test_a_front_does_not_depend_on_the_order(costs, shuffle):
    before = dict(zip(costs, pareto(costs), strict=True))
    mixed = costs[:]
    shuffle.shuffle(mixed)
    assert dict(zip(mixed, pareto(mixed), strict=True)) == before


def test_identical_cuts_are_on_the_front_together_and_ties_in_one_figure_are_not():
    one, same, worse = ((0.5, 0.1), (0.5, 0.1), (0.5, 0.2))
    assert pareto([one, same, worse, (0.6, 0.1), (0.4, 0.3)]) == [True, True, False, False, True]


def test_the_last_bit_of_a_sum_puts_nothing_on_a_front():
    rows = [row(0, A, ratio=0.1, kl=0.3), row(1, A, ratio=0.2, kl=0.3), row(2, A, ratio=0.3, kl=0.3)]
    rows += [row(0, B, ratio=0.2, kl=0.2), row(1, B, ratio=0.2, kl=0.2), row(2, B, ratio=0.2, kl=0.2)]
    found = points(rows, TEN[:3], MAX_KL)
    assert [point.on_front for point in found] == [False, False, True]


def test_fronts_are_of_plphp_alone_for_kl_and_for_accuracy():
    asked = [prompt(number, True) for number in range(10)]
    rows = rows_of(A, 0.3, 0.2, correct=False) + rows_of(B, 0.5, 0.1, correct=True)
    rows += rows_of(C, 0.6, 0.1, correct=True) + rows_of(A, 0.3, 0.0, method=UNIFORM, correct=True)
    whole, a, b, c, uniform = points(rows, asked, MAX_KL)
    assert [point.on_front for point in (whole, a, b, c, uniform)] == [False, True, True, False, False]
    assert [point.on_accuracy_front for point in (whole, a, b, c, uniform)] == [
        False,
        True,
        True,
        False,
        False,
    ]


# Points


def test_the_baseline_is_first_and_the_settings_follow_as_they_came():
    rows = rows_of(C, 0.6, 0.0) + rows_of(A, 0.2, 0.3) + rows_of(B, 0.4, 0.1)
    found = points(rows, TEN, MAX_KL)
    assert [point.setting.config for point in found] == [None, C, A, B]
    whole = found[0]
    assert whole.setting == Setting(BASELINE, None)
    assert (whole.kv_ratio.mean, whole.kv_bytes_held, whole.kl_mean.mean) == (1, 1000, 0)
    assert whole.accuracy is None


def test_each_prompt_weighs_the_same():
    kls = [0.0, 0.3, 0.6]
    found = named(points(rows_of(A, 0.5, kls, agreement=0.5), TEN, MAX_KL), A)
    assert found.prompts == 3
    assert found.kl_mean.mean == pytest.approx(0.3)
    assert found.kl_max == pytest.approx(1.8)
    assert found.top1_agreement.mean == 0.5
    assert found.kv_bytes_held == 500


def test_one_prompt_gives_means_without_intervals():
    found = named(points(rows_of(A, 0.5, [0.1]), TEN, MAX_KL), A)
    assert (found.prompts, found.kl_mean.low, found.kl_mean.high) == (1, None, None)
    assert found.kv_ratio.low is None


def test_answers_of_one_token_are_left_out_of_kl_only():
    found = named(points(rows_of(A, 0.5, [None, 0.2, 0.4]), TEN, MAX_KL), A)
    assert found.prompts == 3
    assert found.kl_mean.mean == pytest.approx(0.3)
    assert found.kv_ratio.mean == 0.5
    none = named(points(rows_of(A, 0.5, [None, None]), TEN, MAX_KL), A)
    assert none.kl_mean is None
    assert none.kl_max is None
    assert none.feasible is None
    assert not none.on_front


def test_a_setting_without_a_figure_that_others_have_gets_no_mean_over_easier_prompts():
    rows = rows_of(A, 0.5, [0.1, 0.1]) + rows_of(B, 0.4, [0.0, None]) + rows_of(C, 0.4, [0.0, float("nan")])
    found = points(rows, TEN, MAX_KL)
    assert named(found, A).kl_mean.mean == pytest.approx(0.1)
    for config in (B, C):
        point = named(found, config)
        assert (point.kl_mean, point.kl_max, point.feasible, point.on_front) == (None, None, None, False)


def test_the_drop_in_accuracy_is_paired_and_of_the_prompts_with_an_answer():
    asked = [prompt(0, True), prompt(1, True), prompt(2, False), prompt(3)]
    rows = [row(number, A, correct=correct) for number, correct in enumerate((True, False, True, None))]
    whole, found = points(rows, asked, MAX_KL)
    assert whole.accuracy.mean == pytest.approx(2 / 3)
    assert found.accuracy.mean == pytest.approx(2 / 3)
    assert found.accuracy_drop.mean == 0
    assert whole.accuracy_drop.low == whole.accuracy_drop.high == 0


def test_equal_answers_on_a_few_prompts_are_not_called_certain():
    asked = [prompt(number, True) for number in range(20)]
    found = named(points(rows_of(A, 0.5, 0.0, prompts=20, correct=True), asked, MAX_KL), A)
    assert found.accuracy.mean == 1
    assert found.accuracy.low < 0.95
    assert found.accuracy_drop.mean == 0
    assert found.accuracy_drop.low < -0.05
    assert found.accuracy_drop.high > 0.05


def test_seeds_of_chance_are_one_point_with_their_spread():
    rows = []
    for seed, kl in enumerate((0.1, 0.2, 0.3, 0.4, 0.5)):
        rows += rows_of(A, 0.5, kl, method=RANDOM, seed=seed, prompts=3)
    _, found = points(rows, TEN, MAX_KL)
    assert found.setting == Setting(RANDOM, A, None)
    assert found.seeds == 5
    assert found.kl_mean.mean == pytest.approx(0.3)
    assert found.seed_sd == pytest.approx(np.std([0.1, 0.2, 0.3, 0.4, 0.5], ddof=1))
    assert found.kl_max == pytest.approx(1.5)
    # Every prompt has the same mean over seeds: the interval is over prompts.
    assert found.kl_mean.low == pytest.approx(found.kl_mean.high)


def test_points_do_not_depend_on_the_order_of_prompts_within_a_setting():
    configs, asked = grid((0.2, 0.5), (0.1, 0.2)), [prompt(number) for number in range(6)]
    rows = realistic_rows(configs, asked)
    mixed = sorted(rows, key=lambda one: (configs.index(one.config), -one.prompt_index))
    assert points(mixed, asked, MAX_KL) == points(rows, asked, MAX_KL)


def test_points_hold_numbers_only_and_are_the_same_every_time():
    asked = [prompt(number, number % 3 > 0) for number in range(12)]
    rows = realistic_rows(grid((0.2, 0.5), (0.1,)), asked, ("plphp", RANDOM))
    found = points(rows, asked, MAX_KL)
    assert found == points(rows, asked, MAX_KL)
    assert all("NaN" not in to_json(point) for point in found)
    quick = points(rows, asked, MAX_KL, intervals=False)
    assert [point.kl_mean.mean for point in quick] == [point.kl_mean.mean for point in found]
    assert all(point.kl_mean.low is None for point in quick)


def test_nothing_measured_is_no_point():
    assert points([], TEN, MAX_KL) == ()
    assert points([row(0, method=BASELINE)], TEN, MAX_KL) == ()
    assert recommend((), MAX_KL).point is None


# Speed


def test_speed_is_paired_with_the_baseline_by_prompt():
    rows = [row(number, method=BASELINE, rate=100 + number) for number in range(5)]
    rows += [row(number, A, rate=2 * (100 + number) if number else None) for number in range(5)]
    whole, found = points(rows, TEN, MAX_KL)
    assert whole.decode_tokens_per_s == 102
    assert whole.decode_ratio is None
    assert found.decode_tokens_per_s == 205
    assert found.decode_ratio.mean == pytest.approx(2)
    assert found.decode_verdict is None
    unmeasured = named(points(rows_of(A, 0.5, 0.1), TEN, MAX_KL), A)
    assert unmeasured.decode_tokens_per_s is None
    assert unmeasured.decode_ratio is None


def test_the_verdict_on_speed_is_that_of_the_profile():
    ratio = RatioProfile(1.2, 1.1, 1.3, "unpruned.decode_s", "pruned.decode_s", verdict=FASTER)
    rows = rows_of(A, 0.5, 0.1, rate=50.0)
    found = named(points(rows, TEN, MAX_KL, speeds={Setting("plphp", A): ratio}), A)
    assert (found.decode_ratio.mean, found.decode_ratio.low, found.decode_verdict) == (1.2, 1.1, FASTER)


# Intervals


def test_an_interval_holds_its_mean_and_about_95_percent_of_true_means():
    draw, inside, trials = np.random.default_rng(3), 0, 400
    for _ in range(trials):
        found = mean_interval(draw.normal(1.0, 0.5, 30).tolist())
        assert found.low <= found.mean <= found.high
        inside += found.low <= 1.0 <= found.high
    assert 0.90 <= inside / trials <= 0.98


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(2, 30))
def test_equal_values_have_no_width(value, count):
    found = mean_interval([value] * count)
    assert found.low <= found.mean <= found.high
    assert found.high - found.low <= 1e-12


def test_a_narrow_true_share_is_within_its_interval():
    """Of right answers in 95 of 100, 20 prompts often show none wrong; the interval must know."""
    draw, inside, trials = np.random.default_rng(5), 0, 400
    for _ in range(trials):
        found = mean_interval((draw.random(20) < 0.95).astype(float).tolist(), imagined=(0.0, 1.0))
        inside += found.low <= 0.95 <= found.high
    assert inside / trials >= 0.93


# Words


def test_only_the_knobs_that_vary_name_a_setting():
    one, other = Setting("plphp", A), Setting("plphp", PLPHPConfig(r=0.4, scope="image"))
    assert varied([one, other, Setting(BASELINE, None)]) == ("r", "scope")
    assert label(one, ("r", "scope")) == "r 0.2, scope prompt"
    assert label(Setting(UNIFORM, A), ("r",)) == "uniform at r 0.2"
    assert label(Setting(BASELINE, None)) == BASELINE


def test_small_divergences_do_not_read_as_none():
    assert [format_nats(value) for value in (0.0, 3e-7, 0.01234, None)] == [
        "0.0000",
        "<0.0001",
        "0.0123",
        "N/A",
    ]


def test_shuffled_rows_give_the_same_points_up_to_their_order():
    asked = [prompt(number) for number in range(5)]
    rows = realistic_rows(grid((0.2, 0.4, 0.6)), asked, ("plphp", RANDOM))
    mixed = rows[:]
    random.Random(1).shuffle(mixed)
    first, second = ({p.setting: p for p in points(of, asked, MAX_KL)} for of in (rows, mixed))
    for setting, point in first.items():
        assert second[setting].kl_mean.mean == pytest.approx(point.kl_mean.mean, abs=1e-12)
        assert second[setting].on_front == point.on_front
