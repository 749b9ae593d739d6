"""From the values typed to the settings of a sweep: every combination, each method, and what was skipped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from plphp_cli.config import HEAD_REDUCES, SCOPES, PLPHPConfig
from plphp_cli.errors import ConfigError, UsageError
from plphp_cli.sweep.records import BASELINE, METHODS, PLPHP, RANDOM, Setting, Skipped

KNOBS = ("r", "delta_r", "alpha", "beta", "scope", "head_reduce")
_NAMES: dict[str, tuple[str, ...]] = {"scope": SCOPES, "head_reduce": HEAD_REDUCES}

# Fewer draws than this do not show how much chance varies.
MIN_SEEDS = 5


@dataclass(frozen=True)
class Grid:
    """What is to be swept.

    Attributes:
        settings: the baseline first, then per config its methods, seeds of chance apart.
        skipped: combinations of knobs that are no setting.
        values: of each knob that was given, and of `method`, as they count.
        warnings: what was given twice.
    """

    settings: tuple[Setting, ...]
    skipped: tuple[Skipped, ...]
    values: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def configs(self) -> tuple[PLPHPConfig, ...]:
        """The settings of PLPHP, each once, in order."""
        return tuple(dict.fromkeys(s.config for s in self.settings if s.config is not None))


def expand(
    base: PLPHPConfig,
    values: Mapping[str, Sequence[Any]],
    methods: Sequence[str] = (PLPHP,),
    seeds: int = MIN_SEEDS,
) -> Grid:
    """All combinations of the values; the last knob changes fastest.

    Args:
        base: gives every knob that has no values.
        values: of the knobs `KNOBS`, as typed; a knob without any is left as `base` has it.
        methods: of `METHODS`; each is a setting of its own for every combination.
        seeds: of `random`, at least 5.

    Raises:
        UsageError: a method or the name of a scope or reduction is unknown, there are too few seeds, or no
            combination is valid.
    """
    warnings: list[str] = []
    given = {name: _once(name, values.get(name, ()), warnings) for name in KNOBS}
    given = {name: kept for name, kept in given.items() if kept}
    for name, known in _NAMES.items():
        for value in given.get(name, ()):
            if value not in known:
                raise UsageError(f"{name} = {value!r}; expected {' or '.join(known)}")
    methods = _methods(methods, warnings)
    if seeds < MIN_SEEDS:
        raise UsageError(
            f"seeds = {seeds}; expected {MIN_SEEDS} or more", hint="fewer do not show how chance varies"
        )
    configs, skipped = _configs(base, given)
    if not configs:
        reasons = sorted({item.reason for item in skipped})
        raise UsageError(
            f"no combination is valid: {len(skipped)} of {len(skipped)} skipped, such as: {reasons[0]}",
            hint="knobs are numbers in [0, 1], and alpha is at least beta",
        )
    settings = [Setting(BASELINE, None)]
    for config in configs:
        for method in methods:
            draws = range(seeds) if method == RANDOM else (None,)
            settings += [Setting(method, config, seed) for seed in draws]
    shown: dict[str, Any] = {name: [_typed(value) for value in kept] for name, kept in given.items()}
    shown["method"] = list(methods)
    if RANDOM in methods:
        shown["seeds"] = seeds
    return Grid(tuple(settings), tuple(skipped), shown, tuple(warnings))


def _configs(
    base: PLPHPConfig, given: Mapping[str, Sequence[Any]]
) -> tuple[list[PLPHPConfig], list[Skipped]]:
    # Thresholds given by hand are not calibrated ones.
    by_hand = {"calibrated": False, "calibrated_on": None} if {"alpha", "beta"} & given.keys() else {}
    configs: list[PLPHPConfig] = []
    skipped: list[Skipped] = []
    for combination in product(*given.values()):
        knobs = dict(zip(given, combination, strict=True))
        try:
            configs.append(base.replace(**knobs, **by_hand))
        except ConfigError as error:
            shown = {name: _typed(value) for name, value in knobs.items()}
            skipped.append(Skipped(shown, error.message))
    return configs, skipped


def _typed(value: Any) -> Any:
    """A value of a knob for the record, which holds no NaN: what is no share is shown as text."""
    return value if not isinstance(value, float) or 0 <= value <= 1 else str(value)


def _methods(methods: Sequence[str], warnings: list[str]) -> tuple[str, ...]:
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise UsageError(f"method {unknown[0]!r}; expected {', '.join(METHODS)}")
    return _once("method", methods, warnings) or (PLPHP,)


def _once(name: str, values: Sequence[Any], warnings: list[str]) -> tuple[Any, ...]:
    """Values without repetitions, which are told."""
    kept = tuple(dict.fromkeys(values))
    if len(kept) < len(values):
        twice = next(value for place, value in enumerate(values) if value in values[:place])
        warnings.append(f"{name} {twice} was given more than once and counts once")
    return kept
