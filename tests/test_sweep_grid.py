import json
from itertools import product

import pytest

from plphp_cli.cli.commands import repeat_options
from plphp_cli.cli.sweep_options import SweepCommand
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import UsageError
from plphp_cli.serialize import to_json
from plphp_cli.sweep.grid import expand
from plphp_cli.sweep.records import BASELINE, METHODS, RANDOM, Setting
from plphp_cli.sweep.request import setting_id

BASE = PLPHPConfig(r=0.5, skip_layers=[2], calibrated=True, calibrated_on="some model")


def test_values_are_combined_in_order_and_the_rest_is_the_base():
    grid = expand(BASE, {"alpha": [0.3, 0.5], "r": [0.2, 0.4], "scope": ["image"], "beta": []})
    assert grid.settings[0] == Setting(BASELINE, None)
    found = [(s.method, s.config.r, s.config.alpha) for s in grid.settings[1:]]
    assert found == [("plphp", r, alpha) for r, alpha in product([0.2, 0.4], [0.3, 0.5])]
    for config in grid.configs:
        assert (config.scope, config.beta, config.skip_layers) == ("image", BASE.beta, (2,))
        assert (config.calibrated, config.calibrated_on) == (False, None)
    assert grid.values == {"r": [0.2, 0.4], "alpha": [0.3, 0.5], "scope": ["image"], "method": ["plphp"]}


def test_thresholds_that_were_not_typed_stay_calibrated():
    config = expand(BASE, {"r": [0.1]}).configs[0]
    assert (config.calibrated, config.calibrated_on) == (True, "some model")
    assert expand(BASE, {}).configs == (BASE,)


def test_combinations_that_are_no_setting_are_listed_with_their_reason():
    grid = expand(BASE, {"alpha": [0.1, 0.3, 1.5], "beta": [0.2, -0.1], "r": [float("nan"), 0.5]})
    assert [(c.alpha, c.beta) for c in grid.configs] == [(0.3, 0.2)]
    assert len(grid.skipped) == 3 * 2 * 2 - 1
    reasons = {tuple(item.knobs.values()): item.reason for item in grid.skipped}
    assert "below beta" in reasons[0.5, 0.1, 0.2]
    assert reasons[0.5, 0.3, "-0.1"] == "beta = -0.1; expected a number in [0, 1]"
    assert reasons["nan", 0.3, 0.2] == "r = nan; expected a number in [0, 1]"
    assert "1.5" in reasons[0.5, "1.5", 0.2]
    assert json.loads(to_json(grid.values)) == {"method": ["plphp"], **grid.values}


def test_a_grid_without_a_valid_point_is_an_error():
    with pytest.raises(UsageError, match=r"2 of 2 skipped, such as: alpha = .* is below beta"):
        expand(BASE, {"alpha": [0.1], "beta": [0.3, 0.4]})


def test_values_given_twice_count_once_and_are_told():
    grid = expand(BASE, {"alpha": [0.3, 0.3, 0.5]}, ["plphp", "uniform", "plphp"])
    assert len(grid.settings) == 1 + 2 * 2
    assert [warning.partition(" was")[0] for warning in grid.warnings] == ["alpha 0.3", "method plphp"]


def test_every_config_has_every_method_and_chance_has_seeds():
    grid = expand(BASE, {"alpha": [0.3, 0.5]}, METHODS, seeds=6)
    for config in grid.configs:
        mine = [s for s in grid.settings if s.config == config]
        assert [s.method for s in mine if s.method != RANDOM] == [m for m in METHODS if m != RANDOM]
        assert [s.seed for s in mine if s.method == RANDOM] == list(range(6))
    ids = [setting_id(setting) for setting in grid.settings]
    assert len(set(ids)) == len(ids) == 1 + 2 * (4 + 6)


@pytest.mark.parametrize(
    ("values", "methods", "seeds", "message"),
    [
        ({"scope": ["images"]}, ["plphp"], 5, "scope = 'images'"),
        ({"head_reduce": ["sum"]}, ["plphp"], 5, "head_reduce = 'sum'"),
        ({}, ["magic"], 5, "method 'magic'"),
        ({}, ["random"], 4, "seeds = 4; expected 5 or more"),
    ],
)
def test_what_is_no_name_at_all_is_refused(values, methods, seeds, message):
    with pytest.raises(UsageError, match=message):
        expand(BASE, values, methods, seeds)


def test_where_thresholds_come_from_does_not_make_another_setting():
    by_hand = BASE.replace(calibrated=False, calibrated_on=None)
    assert setting_id(Setting("plphp", BASE)) == setting_id(Setting("plphp", by_hand))
    assert setting_id(Setting("plphp", BASE)) != setting_id(Setting("plphp", BASE.replace(r=0.51)))
    assert setting_id(Setting("plphp", BASE)) != setting_id(Setting("uniform", BASE))


def test_several_values_after_one_name_mean_the_name_before_each():
    typed = "--alpha 0.3 0.5 --r 0.2 --r .4 --beta -0.1 -1e-3 --image a.png b.png --resume --delta-r=0.1 0.2"
    words = repeat_options(typed.split(), SweepCommand.multi_value)
    assert " ".join(words) == (
        "--alpha 0.3 --alpha 0.5 --r 0.2 --r .4 --beta -0.1 --beta -1e-3 --image a.png --image b.png "
        "--resume --delta-r=0.1 --delta-r 0.2"
    )
