from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_records import MAX_KL, grid, named, prompt, row, rows_of

from plphp_cli.config import PLPHPConfig
from plphp_cli.sweep.ablations import ablations
from plphp_cli.sweep.coverage import coverage
from plphp_cli.sweep.labels import label
from plphp_cli.sweep.points import points, satisfies
from plphp_cli.sweep.recommendation import recommend
from plphp_cli.sweep.records import LAYER_ONLY, RANDOM, UNIFORM, Constraint, Setting

A, B, C = (PLPHPConfig(r=r) for r in (0.2, 0.4, 0.6))
TEN = [prompt(number) for number in range(10)]

# Coverage


def test_only_prompts_that_every_setting_has_are_compared():
    rows = rows_of(A, 0.2, [0.1] * 5) + rows_of(B, 0.4, [0.2] * 7)
    held = coverage(rows, TEN)
    assert held.prompts == ("p0", "p1", "p2", "p3", "p4")
    assert held.unused == 2
    assert "5 of 7 prompts" in held.warnings()[0]
    assert {point.prompts for point in points(rows, TEN, MAX_KL)} == {5}
    assert coverage(rows_of(A, 0.2, 0.1) + rows_of(B, 0.4, 0.1), TEN).warnings() == ()


def test_a_barely_begun_extension_of_the_grid_does_not_throw_the_rest_away():
    rows = rows_of(A, 0.2, [0.1] * 10) + rows_of(B, 0.4, [0.2] * 2)
    held = coverage(rows, TEN)
    assert held.settings == (Setting("plphp", A),)
    assert held.left_out == (Setting("plphp", B),)
    assert len(held.prompts) == 10
    assert "left out" in held.warnings()[1]


def test_settings_without_a_common_prompt_leave_at_least_one():
    rows = [row(0, A), row(1, A), row(2, B), row(3, B)]
    held = coverage(rows, TEN)
    assert held.settings == (Setting("plphp", A),)
    assert held.prompts == ("p0", "p1")


def test_of_a_pair_measured_twice_the_last_counts_and_other_prompts_do_not():
    rows = [row(0, A, kl=0.9), row(0, A, kl=0.1), row(99, A, kl=5.0)]
    assert named(points(rows, [prompt(0), prompt(0)], MAX_KL), A).kl_mean.mean == pytest.approx(0.1)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=30))
def test_what_is_compared_is_whole(pairs):
    configs = grid((0.1, 0.2, 0.3, 0.4, 0.5))
    rows = [row(number, configs[which]) for which, number in pairs]
    held = coverage(rows, TEN)
    assert bool(held.prompts) == bool(held.settings) == bool(pairs)
    assert all(set(held.rows[setting]) == set(held.prompts) for setting in held.settings)
    assert held.unused + len(held.settings) * len(held.prompts) == len(set(pairs))


# Recommendation


def test_the_least_cache_within_the_limit_is_recommended():
    rows = rows_of(A, 0.2, 0.2) + rows_of(B, 0.4, 0.04) + rows_of(C, 0.6, 0.01)
    found = recommend(points(rows, TEN, MAX_KL), MAX_KL, "c.json", "plphp run")
    assert found.point == 2
    assert not found.indication_only
    assert "40.0 %" in found.reason
    assert "2 of 3 settings" in found.reason
    assert (found.config_file, found.next_command) == ("c.json", "plphp run")


def test_ties_go_to_the_lower_kl_and_then_to_the_earlier_setting():
    rows = rows_of(A, 0.4, 0.02) + rows_of(B, 0.4, 0.01) + rows_of(C, 0.4, 0.01)
    assert recommend(points(rows, TEN, MAX_KL), MAX_KL).point == 2
    rows = rows_of(C, 0.4, 0.01) + rows_of(B, 0.4, 0.01)
    assert recommend(points(rows, TEN, MAX_KL), MAX_KL).point == 1


def test_all_infeasible_says_so_with_the_nearest_miss():
    rows = rows_of(A, 0.2, 0.9) + rows_of(B, 0.4, 0.07) + rows_of(C, 0.6, 0.08)
    found = recommend(points(rows, TEN, MAX_KL), MAX_KL, "c.json", "plphp run")
    assert found.point is None
    assert found.config_file is None
    assert found.next_command is None
    assert "None of 3 settings keeps mean KL at most 0.05 nats" in found.reason
    assert "nearest miss is r 0.4 with 0.0700 nats" in found.reason


def test_one_setting():
    found = recommend(points(rows_of(A, 0.2, 0.01), TEN, MAX_KL), MAX_KL)
    assert (found.point, found.indication_only) == (1, False)
    assert found.reason.startswith("The only setting")
    missed = recommend(points(rows_of(A, 0.2, 0.5), TEN, MAX_KL), MAX_KL)
    assert missed.point is None
    assert "The only setting does not keep" in missed.reason
    assert label(Setting("plphp", A)) in missed.reason


@pytest.mark.parametrize(("count", "indication"), [(1, True), (9, True), (10, False)])
def test_under_10_prompts_it_is_an_indication_only(count, indication):
    found = recommend(points(rows_of(A, 0.2, 0.01, prompts=count), TEN, MAX_KL), MAX_KL)
    assert found.indication_only is indication
    assert ("no interval" in found.reason) is (count == 1)


def test_an_interval_beyond_the_limit_is_told_with_the_setting_that_keeps_within():
    rows = rows_of(A, 0.2, [0.0, 0.08] * 5) + rows_of(B, 0.4, 0.01)
    found = recommend(points(rows, TEN, MAX_KL), MAX_KL)
    assert found.point == 1
    assert "feasible by the mean, but the interval reaches beyond" in found.reason
    assert "r 0.4, holding 40.0 %" in found.reason
    sure = recommend(points(rows_of(A, 0.2, 0.04) + rows_of(B, 0.4, 0.01), TEN, MAX_KL), MAX_KL)
    assert "beyond" not in sure.reason


def test_agreement_is_a_lower_limit_and_accuracy_drop_an_upper_one():
    asked = [prompt(number, True) for number in range(10)]
    rows = rows_of(A, 0.2, 0.3, agreement=0.9, correct=True) + rows_of(
        B, 0.4, 0.1, agreement=1.0, correct=True
    )
    rows[0] = replace(rows[0], answer_correct=False)
    for constraint, expected in (
        (Constraint("agreement", 0.95), 2),
        (Constraint("agreement", 0.9), 1),
        (Constraint("accuracy_drop", 0.05), 2),
        (Constraint("accuracy_drop", 0.1), 1),
    ):
        assert recommend(points(rows, asked, constraint), constraint).point == expected


def test_what_was_not_measured_cannot_be_judged():
    constraint = Constraint("accuracy_drop", 0.02)
    found = points(rows_of(A, 0.2, 0.1), TEN, constraint)
    assert satisfies(found[1], constraint) is None
    assert "no prompt has an expected answer" in recommend(found, constraint).reason


def test_a_limit_is_met_to_the_last_bit():
    rows = rows_of(A, 0.2, [0.1, 0.2, 0.3] * 3)
    assert points(rows, TEN, Constraint("kl", 0.2))[1].feasible


def test_a_setting_that_cuts_nothing_is_called_that():
    rows = rows_of(A, 0.4, 0.2) + rows_of(C, 1.0, 0.0)
    assert "cuts nothing" in recommend(points(rows, TEN, MAX_KL), MAX_KL).reason


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 10), st.integers(0, 10)), min_size=1, max_size=8))
def test_no_feasible_setting_holds_less_than_the_recommended_one(figures):
    configs = grid(tuple(number / 10 for number in range(len(figures))))
    rows = [
        one
        for config, (held, kl) in zip(configs, figures, strict=True)
        for one in rows_of(config, held / 10, kl / 100, prompts=2)
    ]
    found = points(rows, TEN, MAX_KL, intervals=False)
    best = recommend(found, MAX_KL).point
    feasible = [point for point in found[1:] if point.feasible]
    assert (best is None) == (not feasible)
    if best is not None:
        assert found[best].kv_ratio.mean == min(point.kv_ratio.mean for point in feasible)
        assert found[best].feasible


# Ablations


def test_a_method_is_paired_with_plphp_by_config_and_prompt():
    rows = rows_of(A, 0.2, [0.1, 0.3]) + rows_of(B, 0.4, [0.0, 0.1])
    rows += rows_of(A, 0.2, [0.2, 0.5], method=LAYER_ONLY) + rows_of(B, 0.4, [0.0, 0.0], method=LAYER_ONLY)
    rows += rows_of(C, 0.6, [9.0, 9.0], method=LAYER_ONLY)
    (found,) = ablations(rows, TEN)
    assert (found.method, found.settings, found.prompts) == (LAYER_ONLY, 2, 2)
    assert found.kl_excess.mean == pytest.approx((0.1 / 2 + 0.1 / 2) / 2)
    assert (found.plphp_better, found.plphp_worse) == (1, 1)
    assert found.kv_ratio_gap == 0
    assert found.accuracy_loss is None


def test_answers_that_a_method_loses_are_counted_against_it():
    asked = [prompt(number, True) for number in range(4)]
    rows = [row(number, A, correct=True) for number in range(4)]
    rows += [row(number, A, method=UNIFORM, correct=number > 0) for number in range(4)]
    (found,) = ablations(rows, asked)
    assert found.accuracy_loss.mean == 0.25


def test_chance_is_averaged_over_its_seeds():
    rows = rows_of(A, 0.5, 0.1)
    for seed, kl in enumerate((0.2, 0.3, 0.4, 0.5, 0.6)):
        rows += rows_of(A, 0.51, kl, method=RANDOM, seed=seed)
    (found,) = ablations(rows, TEN)
    assert found.seeds == 5
    assert found.kl_excess.mean == pytest.approx(0.3)
    assert found.seed_sd == pytest.approx(np.std([0.1, 0.2, 0.3, 0.4, 0.5], ddof=1))
    assert found.kv_ratio_gap == pytest.approx(0.01)


def test_without_another_method_there_is_nothing_to_compare():
    assert ablations(rows_of(A, 0.5, 0.1), TEN) == ()
    assert ablations([], TEN) == ()
