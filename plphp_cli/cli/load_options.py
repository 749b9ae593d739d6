"""The options that say how a model is loaded, written once for all commands. Nothing here loads torch."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plphp_cli.cli import options as opt
from plphp_cli.cli.option_groups import takes
from plphp_cli.cli.output import say
from plphp_cli.models.hub import go_offline, is_offline
from plphp_cli.models.options import DEFAULTS, LoadOptions

if TYPE_CHECKING:
    from plphp_cli.models.sources import Source

_PANEL = "Model"


def _text(help_text: str, metavar: str = "NAME") -> Any:
    return typer.Option(metavar=metavar, help=help_text, rich_help_panel=_PANEL)


def _flag(name: str, help_text: str) -> Any:
    # By name: there is no opposite of it. An empty metavar: a flag takes no value.
    return typer.Option(name, metavar="", help=help_text, rich_help_panel=_PANEL)


OfflineOption = Annotated[bool, _flag("--offline", "Ask the hub nothing: use what is in its local cache.")]
TrustOption = Annotated[bool, _flag("--trust-remote-code", "Run code that the model brings.")]
# One annotation for each field of `LoadOptions`, in the order in which help shows them.
_ANNOTATIONS: dict[str, Any] = {
    "dtype": opt.DtypeOption,
    "device": opt.DeviceOption,
    "device_map": Annotated[str | None, _text("auto: spread over GPUs and memory (accelerate).")],
    "attn": opt.AttnOption,
    "quantize": Annotated[str | None, _text("4bit or 8bit weights (bitsandbytes).", "BITS")],
    "processor_arg": Annotated[list[str] | None, _text("For the image processor; repeatable.", "KEY=VALUE")],
    "offline": OfflineOption,
    "trust_remote_code": TrustOption,
}


def _load_options(**values: Any) -> LoadOptions:
    options = LoadOptions(**values | {"processor_arg": tuple(values["processor_arg"] or ())})
    options.check()
    if options.offline:
        go_offline()
    return options


def with_load_options(command: Callable[..., int]) -> Callable[..., int]:
    """A command that takes every field of `LoadOptions` as an option, in place of its parameter `options`.

    What was typed is checked before the command begins, and `--offline` holds before anything could ask the
    hub. Raises `UsageError`.
    """
    defaults = {**asdict(DEFAULTS), "processor_arg": None}
    taken = {name: (annotation, defaults[name]) for name, annotation in _ANNOTATIONS.items()}
    decorated: Callable[..., int] = takes("options", taken, _load_options)(command)
    return decorated


def find_model(name: str) -> "Source":
    """Where a model is, refused if it is not there or its config cannot be read; nothing else is fetched.

    Raises what `models.load` raises for such names.
    """
    from plphp_cli.models.sources import is_hub_id, locate, read_config_json

    if is_hub_id(name) and not is_offline():
        # The hub's client tries again for half a minute before it gives up.
        say(f"asking the hub for {name}")
    source = locate(name)
    read_config_json(source)
    return source


def check_model(name: str, options: LoadOptions) -> None:
    """Refuse a model that is not there, or whose config says that it cannot be one, before torch is imported.

    The files of a hub model that are not here yet are fetched, while nothing else draws on the terminal.
    Raises what `models.load` raises for such names.
    """
    from plphp_cli.errors import ModelError
    from plphp_cli.models.sources import weight_files

    source = find_model(name)
    if source.revision is None or is_offline():
        return
    try:
        weight_files(source, ask=False)
    except ModelError:
        from plphp_cli.models import fetch

        say(f"fetching {source.name} from the hub, at {source.revision}")
        fetch(name, options)
