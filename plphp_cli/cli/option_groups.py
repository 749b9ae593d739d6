"""Options that belong together as one parameter of a command, written once for all that take them."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

Command = Callable[..., int]


def given_first(options: Mapping[str, Any]) -> str | None:
    """The name of the first of `options` that was typed; None if none was: their values are None or []."""
    return next((name for name, value in options.items() if value is not None and value != []), None)


def takes(parameter: str, options: Mapping[str, tuple[Any, Any]], make: Callable[..., Any]) -> Any:
    """A decorator for commands: `options` in place of their `parameter`, which is then what `make` returns.

    Args:
        parameter: of the command, whose place in help the options take.
        options: by name, the annotation that typer reads and the default.
        make: takes the options by name, before the command begins; what it raises ends the command.
    """

    def decorator(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def run(*args: Any, **given: Any) -> int:
            made = make(**{name: given.pop(name) for name in options})
            return command(*args, **{parameter: made}, **given)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        own = [
            inspect.Parameter(name, kind, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ]
        parameters = []
        for each in signature.parameters.values():
            parameters += own if each.name == parameter else [each]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorator
