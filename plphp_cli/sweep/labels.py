"""Settings in words: the knobs that a sweep varied, in the paper's symbols."""

from collections.abc import Iterable, Sequence

from plphp_cli.config import PLPHPConfig
from plphp_cli.sweep.records import BASELINE, PLPHP, Setting
from plphp_cli.units import format_number

NUMERIC = ("r", "delta_r", "alpha", "beta")
KNOBS = (*NUMERIC, "scope", "head_reduce", "skip_layers")


def varied(settings: Iterable[Setting]) -> tuple[str, ...]:
    """The knobs that have more than one value among the settings, in the order of `KNOBS`."""
    configs = [setting.config for setting in settings if setting.config is not None]
    return tuple(knob for knob in KNOBS if len({getattr(config, knob) for config in configs}) > 1)


def value(config: PLPHPConfig, knob: str) -> str:
    """A knob's value as it would be typed; no skipped layers are `none`."""
    found = getattr(config, knob)
    if knob == "skip_layers":
        return ",".join(map(str, found)) or "none"
    # Six digits tell any two values apart that anybody sweeps, and hide floating-point dust.
    return f"{found:.6g}" if isinstance(found, float) else str(found)


def format_nats(value: float | None) -> str:
    """A KL in nats with four decimals; what these would round to nothing is `<0.0001`."""
    return "<0.0001" if value is not None and 0 < value < 0.00005 else format_number(value, 4)


def label(setting: Setting, knobs: Sequence[str] = ()) -> str:
    """A setting in one line: its method unless PLPHP's own, and the knobs named (by default the numbers)."""
    if setting.method == BASELINE or setting.config is None:
        return setting.method
    config = setting.config
    words = ", ".join(f"{knob} {value(config, knob)}" for knob in knobs or NUMERIC)
    return words if setting.method == PLPHP else f"{setting.method} at {words}"
