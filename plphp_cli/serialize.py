"""Records to strict JSON and back.

The codec follows the type hints: nested dataclasses, `tuple[X, ...]`, `dict[str, X]`, `X | None`, numbers,
texts and `Any` (a JSON value). Nothing is coerced: what does not fit is an error that names where.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import PLPHPError, UsageError

SCHEMA_VERSION = 1

R = TypeVar("R")


class RecordError(UsageError):
    """A text or an object is not the record that was asked for."""


def to_dict(record: Any) -> Any:
    """A record as JSON values (dicts, lists, numbers, texts, None), `schema_version` first.

    Raises:
        PLPHPError: a number is NaN or infinite, or a value is none that JSON has; the message names where.
    """
    return _encode(record, type(record).__name__)


def to_json(record: Any, indent: int | None = 2) -> str:
    """A record as strict JSON text in ASCII. Raises `PLPHPError` as `to_dict` does."""
    return json.dumps(to_dict(record), indent=indent, allow_nan=False)


def parse(cls: type[R], text: str) -> R:
    """The record of class `cls` that `to_json` wrote.

    Raises:
        RecordError: the text is not strict JSON, is of another schema version, or a key is missing, unknown
            or of the wrong type.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant, parse_float=_parse_float)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not a record: {error}", hint="expected the JSON that plphp writes") from error
    return from_dict(cls, data)


def from_dict(cls: type[R], data: Any) -> R:
    """The record of class `cls` that `data` describes. Raises `RecordError` as `parse` does."""
    if isinstance(data, dict) and "schema_version" in data and data["schema_version"] != SCHEMA_VERSION:
        raise RecordError(
            f"schema_version = {data['schema_version']!r}; this version of plphp reads {SCHEMA_VERSION}",
            hint="read it with the version of plphp-cli that wrote it",
        )
    return typing.cast(R, _decode(cls, data, cls.__name__))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
    return value


def _encode(value: Any, where: str) -> Any:
    if isinstance(value, PLPHPConfig):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value)]
        # The version first, so that a reader meets it before anything it might not know.
        names.sort(key=lambda name: name != "schema_version")
        return {name: _encode(getattr(value, name), f"{where}.{name}") for name in names}
    if isinstance(value, Mapping):
        return {str(key): _encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise PLPHPError(f"{where} is {value}, which is not a figure", hint="unknown figures are null")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise PLPHPError(f"{where} is of type {type(value).__name__}, which JSON cannot hold")


def _decode(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if data is None else _decode(arguments[0], data, where)
    if isinstance(data, dict):
        if kind is PLPHPConfig:
            return PLPHPConfig.from_dict(data)
        if dataclasses.is_dataclass(kind):
            return _decode_dataclass(kind, data, where)
        if origin is dict:
            return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if origin is tuple and isinstance(data, list):
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    # bool is an int to Python, not to a reader of the record.
    if type(data) is kind or (kind is float and type(data) is int):
        return data
    name = getattr(origin or kind, "__name__", str(kind))
    raise RecordError(f"{where} = {data!r:.60}; expected {name}")


def _decode_dataclass(cls: Any, data: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - set(fields)):
        raise RecordError(f"{where} holds the unknown key {unknown[0]!r}")
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise RecordError(f"{where} lacks the key {name!r}")
    return cls(**{name: _decode(hints[name], data[name], f"{where}.{name}") for name in data})
