import json
import subprocess
import sys

import pytest

from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import ConfigError, UsageError


def test_defaults_are_those_of_the_method():
    config = PLPHPConfig()
    assert (config.r, config.delta_r, config.alpha, config.beta) == (0.4, 0.3, 0.25, 0.1)
    assert (config.scope, config.head_reduce, config.skip_layers) == ("prompt", "mean", ())
    assert not config.calibrated


@pytest.mark.parametrize("knob", ["r", "delta_r", "alpha", "beta"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf"), True, "0.5", None, [0.5]])
def test_a_fraction_out_of_range_is_refused_by_name_and_value(knob, value):
    with pytest.raises(ConfigError) as error:
        PLPHPConfig(**{knob: value})
    assert knob in error.value.message
    assert str(value).rstrip("0") in error.value.message or repr(value) in error.value.message
    assert error.value.exit_code == 2


def test_swapped_thresholds_are_refused_and_equal_ones_are_not():
    with pytest.raises(ConfigError, match=r"alpha = 0\.1 is below beta = 0\.25"):
        PLPHPConfig(alpha=0.1, beta=0.25)
    assert PLPHPConfig(alpha=0.2, beta=0.2).alpha == 0.2


@pytest.mark.parametrize(
    "knobs",
    [
        {"scope": "images"},
        {"scope": None},
        {"head_reduce": "sum"},
        {"skip_layers": [-1]},
        {"skip_layers": "0,1"},
        {"skip_layers": 3},
        {"skip_layers": [1.0]},
        {"skip_layers": [True]},
        {"calibrated": "yes"},
        {"calibrated_on": 3},
    ],
)
def test_an_invalid_option_is_refused_by_name(knobs):
    with pytest.raises(ConfigError, match=next(iter(knobs))):
        PLPHPConfig(**knobs)


def test_a_file_gives_back_the_config_that_was_written(tmp_path):
    config = PLPHPConfig(
        r=0.5, skip_layers=(3, 0, 3), scope="image", calibrated=True, calibrated_on="8 prompts"
    )
    config.to_file(tmp_path / "config.json")
    assert PLPHPConfig.from_file(tmp_path / "config.json") == config
    assert config.skip_layers == (0, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    path = tmp_path / "config.json"
    PLPHPConfig().to_file(path)
    with pytest.raises(UsageError, match="exists already"):
        PLPHPConfig(r=0.9).to_file(path)
    assert PLPHPConfig.from_file(path).r == 0.4
    PLPHPConfig(r=0.9).to_file(path, force=True)
    assert PLPHPConfig.from_file(path).r == 0.9


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "not JSON"),
        ("[]", "list"),
        ('{"alfa": 0.3}', "alfa"),
        ('{"alpha": 3}', "alpha = 3"),
        (b"\xff\xfe", "not JSON"),
        (None, "cannot read"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_fault(tmp_path, content, named):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=named) as error:
        PLPHPConfig.from_file(path)
    assert "config.json" in error.value.message


def test_an_unwritable_place_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(UsageError, match="cannot write"):
        PLPHPConfig().to_file(tmp_path / "missing" / "config.json")


def test_knobs_not_named_in_a_file_keep_their_defaults(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"r": 0.6}))
    assert PLPHPConfig.from_file(tmp_path / "config.json") == PLPHPConfig(r=0.6)


def test_replace_validates_anew():
    assert PLPHPConfig().replace(r=0.7) == PLPHPConfig(r=0.7)
    with pytest.raises(ConfigError):
        PLPHPConfig().replace(alpha=0.05)


def test_importing_the_package_and_its_config_imports_no_torch():
    code = (
        "import plphp_cli, sys; plphp_cli.PLPHPConfig(); print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
