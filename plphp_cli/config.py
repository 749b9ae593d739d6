"""The knobs of PLPHP, in the paper's symbols: validated once, frozen, kept in a JSON file."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from plphp_cli.errors import ConfigError
from plphp_cli.files import write_text

SCOPES = ("prompt", "image")
HEAD_REDUCES = ("mean", "max")


@dataclass(frozen=True)
class PLPHPConfig:
    """Setting of PLPHP (arXiv 2502.14504). Fractions are plain numbers in [0, 1].

    Layer level: a layer whose vision attention score gamma is at least `alpha` keeps `r + delta_r` of its
    vision tokens, one below `beta` keeps `r - delta_r`, the others keep `r` (clamped to [0, 1]). The default
    values are this project's; the paper's public text names none.

    Attributes:
        r: base retention rate.
        delta_r: what an attentive layer gains on `r` and an indifferent one loses.
        alpha: upper threshold of gamma (`gamma >= alpha` is attentive).
        beta: lower threshold of gamma (`gamma < beta` is indifferent).
        scope: `prompt` ranks all vision tokens together; with `image` each image keeps its own share.
        head_reduce: how the query heads that share one KV head score a token: by their `mean` or `max`.
        skip_layers: indices of decoder layers that are never cut.
        calibrated: True when alpha and beta come from `plphp calibrate`.
        calibrated_on: what it was calibrated on, in words (model, number of prompts).

    Raises:
        ConfigError: a value is of the wrong type, not finite or out of range, or alpha is below beta.
    """

    r: float = 0.4
    delta_r: float = 0.3
    alpha: float = 0.25
    beta: float = 0.1
    scope: str = "prompt"
    head_reduce: str = "mean"
    skip_layers: tuple[int, ...] = ()
    calibrated: bool = False
    calibrated_on: str | None = None

    def __post_init__(self) -> None:
        for knob in ("r", "delta_r", "alpha", "beta"):
            object.__setattr__(self, knob, fraction(knob, getattr(self, knob)))
        if self.alpha < self.beta:
            raise ConfigError(
                f"alpha = {self.alpha:g} is below beta = {self.beta:g}; alpha is the upper threshold",
                hint="swap the two values, or make them equal to have no balanced layers",
            )
        _one_of("scope", self.scope, SCOPES)
        _one_of("head_reduce", self.head_reduce, HEAD_REDUCES)
        object.__setattr__(self, "skip_layers", _layer_indices(self.skip_layers))
        if not isinstance(self.calibrated, bool):
            raise ConfigError(f"calibrated = {self.calibrated!r}; expected true or false")
        if self.calibrated_on is not None and not isinstance(self.calibrated_on, str):
            raise ConfigError(f"calibrated_on = {self.calibrated_on!r}; expected a text or null")

    def replace(self, **changes: Any) -> Self:
        """A copy with some knobs changed, validated anew. Raises `ConfigError` as the constructor does."""
        return type(self).from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """The knobs as JSON values; `from_dict` gives back an equal config."""
        return {**dataclasses.asdict(self), "skip_layers": list(self.skip_layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that `values` describe; knobs not named keep their defaults.

        Raises:
            ConfigError: a knob is unknown or its value invalid.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ConfigError(f"unknown knob {unknown[0]!r}", hint=f"knobs are {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a config from a JSON file, as `to_file` and `plphp calibrate` write it.

        Raises:
            ConfigError: the file cannot be read, is not a JSON object, or holds an unknown or invalid knob.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(
                f"config {path} is not JSON: {error}",
                hint='expected an object such as {"r": 0.4, "alpha": 0.25}',
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(
                f"config {path} holds a {type(values).__name__}; expected a JSON object of knobs"
            )
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"config {path}: {error.message}", hint=error.hint) from error

    def to_file(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write the config as JSON, whole or not at all. Raises what `files.write_text` raises."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n", force)


def fraction(knob: str, value: Any) -> float:
    """`value` as a number in [0, 1]. Raises `ConfigError` that calls it `knob`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{knob} = {value!r}; expected a number in [0, 1]")
    if not math.isfinite(value) or not 0 <= value <= 1:
        raise ConfigError(f"{knob} = {value:g}; expected a number in [0, 1]")
    return float(value)


def _one_of(knob: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{knob} = {value!r}; expected {' or '.join(choices)}")


def _layer_indices(value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset | range):
        raise ConfigError(f"skip_layers = {value!r}; expected a list of layer indices")
    for index in value:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ConfigError(f"skip_layers holds {index!r}; expected layer indices 0, 1, 2, ...")
    return tuple(sorted(set(value)))
