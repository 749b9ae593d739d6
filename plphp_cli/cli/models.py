"""`plphp models`: the families, the local hub cache, or what one model would take before it is downloaded."""

from typing import Annotated, Any

import typer

from plphp_cli.card import describe, parse_size
from plphp_cli.cli import options as opt
from plphp_cli.cli.load_options import OfflineOption, TrustOption
from plphp_cli.cli.option_groups import given_first
from plphp_cli.cli.output import say, stdout_width, write_report
from plphp_cli.errors import UsageError
from plphp_cli.inventory import take_inventory
from plphp_cli.models.hub import go_offline
from plphp_cli.models.sources import cached_models
from plphp_cli.reports.card import card_report
from plphp_cli.reports.inventory import inventory_report

NameArgument = Annotated[
    str | None,
    typer.Argument(metavar="[NAME]", help="builtin, a folder, or a hub id; left out, all that there are."),
]
ImageSizeOption = Annotated[
    str | None,
    typer.Option("--image-size", metavar="WxH", help="Image to count vision tokens of; 1024x768."),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens whose cache must fit beside the weights; 8192, or what the model was made for.",
    ),
]
RefusedOption = Annotated[
    bool, typer.Option("--refused", metavar="", help="List every model type that is refused, and why.")
]


def models(
    name: NameArgument = None,
    image_size: ImageSizeOption = None,
    context: ContextOption = None,
    refused: RefusedOption = False,
    dtype: opt.DtypeOption = "auto",
    device: opt.DeviceOption = "auto",
    offline: OfflineOption = False,
    trust_remote_code: TrustOption = False,
    json: opt.JsonOption = None,
    force: opt.ForceOption = False,
    debug: opt.DebugOption = False,
) -> int:
    """List the families and the models in the local hub cache, or tell what one model would take.

    Of one model only the config and the processor are read (and fetched, from the hub), never the weights.
    """
    opt.check_json_target(json, force)
    if offline:
        go_offline()
    if name is None:
        given: dict[str, Any] = {"--image-size": image_size, "--context": context}
        given["--dtype"], given["--device"] = (None if word == "auto" else word for word in (dtype, device))
        given["--trust-remote-code"] = trust_remote_code or None
        if (stray := given_first(given)) is not None:
            raise UsageError(
                f"{stray} is about one model, and none was named", hint="e.g. plphp models builtin"
            )
        if refused or cached_models():
            say("reading the configs")
        inventory = take_inventory(with_refused_types=refused)
        write_report(inventory, inventory_report(inventory, stdout_width()), json, force)
        return 0
    if refused:
        raise UsageError("--refused is about all models, and one was named", hint="leave out one of them")
    size = parse_size("1024x768" if image_size is None else image_size)
    card = describe(
        name,
        image_size=size,
        context=context,
        dtype=dtype,
        device=device,
        offline=offline,
        trust_remote_code=trust_remote_code,
    )
    write_report(card, card_report(card, stdout_width()), json, force)
    return 0
