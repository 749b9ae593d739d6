import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plphp_cli import units

FORMATTERS = [
    units.format_bytes,
    units.format_seconds,
    units.format_rate,
    units.format_ratio,
    units.format_percent,
    units.format_number,
]


@pytest.mark.parametrize("formatter", [*FORMATTERS, units.format_count])
def test_unknown_is_not_available(formatter):
    assert formatter(None) == "N/A"


@pytest.mark.parametrize("formatter", FORMATTERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_available(formatter, value):
    assert formatter(value) == "N/A"


@pytest.mark.parametrize("formatter", [*FORMATTERS, units.format_count])
def test_zero_is_a_figure(formatter):
    assert formatter(0).startswith("0")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (int(12.34 * 1024**2), "12.3 MiB"),
        (3 * 1024**3, "3.00 GiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_bytes(count, text):
    assert units.format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0004247, "0.42 ms"),
        (0.0372, "37.2 ms"),
        (0.4121, "412 ms"),
        (0.99951, "1.00 s"),
        (1.239, "1.24 s"),
        (83.04, "83.0 s"),
        (412.3, "412 s"),
    ],
)
def test_seconds(seconds, text):
    assert units.format_seconds(seconds) == text


def test_rates_ratios_and_shares():
    assert units.format_rate(12.345) == "12.3 tokens/s"
    assert units.format_rate(2.5, "images/s") == "2.50 images/s"
    assert units.format_ratio(1.2345) == "1.23x"
    assert units.format_percent(0.4567) == "45.7 %"
    assert units.format_percent(1, digits=0) == "100 %"
    assert units.format_number(0.25) == "0.25"
    assert units.format_count(7290) == "7,290"


@given(st.integers(min_value=0, max_value=2**60))
def test_bytes_keep_their_size_and_never_print_a_full_unit(count):
    number, unit = units.format_bytes(count).split()
    scale = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)
    assert math.isclose(float(number) * scale, count, rel_tol=0.051)
    assert float(number) < 1024 or unit == "PiB"


@given(st.floats(min_value=1e-4, max_value=1e6))
def test_seconds_keep_their_size(seconds):
    number, unit = units.format_seconds(seconds).split()
    assert math.isclose(float(number) * (0.001 if unit == "ms" else 1), seconds, rel_tol=0.06)


def test_a_tiny_negative_number_is_not_minus_zero():
    assert [units.format_number(value, 2) for value in (-0.001, 0.0, -0.01)] == ["0.00", "0.00", "-0.01"]
