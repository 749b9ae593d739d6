"""How commands read words and show their help: options of several values, flags without a type."""

import re
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

MULTI_VALUE = ("--image", "--quantiles")
_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e-?\d+)?")


class PlainCommand(TyperCommand):
    """A command whose `--help` is shown like every other flag: without the type of a value."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option, with an empty metavar."""
        return _untyped(super().get_help_option(ctx))


class PlainGroup(TyperGroup):
    """The same for the program itself."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option, with an empty metavar."""
        return _untyped(super().get_help_option(ctx))


def _untyped(option: Any) -> Any:
    if option is not None:
        option.metavar = ""
    return option


class MultiValueCommand(PlainCommand):
    """A command whose `--image a b` means `--image a --image b`: options take one value by themselves."""

    multi_value: Sequence[str] = MULTI_VALUE

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each further value, then parse as usual."""
        return super().parse_args(ctx, repeat_options(args, self.multi_value))


def repeat_options(args: Sequence[str], names: Sequence[str] = MULTI_VALUE) -> list[str]:
    """`args` with the name of a multi-value option before each of its values.

    A value that starts with `-` ends the list, unless it is a number; a file of such a name is given as
    `--image=-name`.
    """
    repeated: list[str] = []
    current: str | None = None
    fresh = False
    for position, word in enumerate(args):
        if word == "--":
            return [*repeated, *args[position:]]
        if word.startswith("-") and word != "-" and not _NEGATIVE.fullmatch(word):
            name = word.partition("=")[0]
            current = name if name in names else None
            fresh = current is not None and "=" not in word
        elif current is not None and not fresh:
            repeated.append(current)
        else:
            fresh = False
        repeated.append(word)
    return repeated
