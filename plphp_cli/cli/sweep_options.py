"""Options of `plphp sweep` alone, and the checks of what was typed. Nothing here loads torch."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated

import typer

from plphp_cli.cli.commands import MultiValueCommand
from plphp_cli.errors import UsageError
from plphp_cli.sweep.grid import MIN_SEEDS
from plphp_cli.sweep.records import METHODS, RANDOM, Constraint
from plphp_cli.sweep.request import NONE, SPEEDS

MAX_KL = 0.05

_GRID, _CONSTRAINT, _MEASURING, _OUTPUT = "Grid", "Constraint", "Measuring", "Output"


class SweepCommand(MultiValueCommand):
    """Every knob takes several values after its name, and the name may be repeated."""

    multi_value = ("--image", "--r", "--delta-r", "--alpha", "--beta", "--scope", "--head-reduce", "--method")


RValues = Annotated[
    list[float] | None,
    typer.Option("--r", metavar="X...", help="Base retention rates.", rich_help_panel=_GRID),
]
DeltaRValues = Annotated[
    list[float] | None,
    typer.Option(
        "--delta-r",
        metavar="X...",
        help="What attentive layers gain on r and indifferent ones lose.",
        rich_help_panel=_GRID,
    ),
]
AlphaValues = Annotated[
    list[float] | None,
    typer.Option(
        "--alpha", metavar="X...", help="gamma from which a layer is attentive.", rich_help_panel=_GRID
    ),
]
BetaValues = Annotated[
    list[float] | None,
    typer.Option(
        "--beta", metavar="X...", help="gamma below which a layer is indifferent.", rich_help_panel=_GRID
    ),
]
ScopeValues = Annotated[
    list[str] | None,
    typer.Option(
        "--scope", metavar="NAME...", help="Rank vision tokens per prompt, image.", rich_help_panel=_GRID
    ),
]
HeadReduceValues = Annotated[
    list[str] | None,
    typer.Option(
        "--head-reduce",
        metavar="NAME...",
        help="How query heads that share a KV head score a token: mean, max.",
        rich_help_panel=_GRID,
    ),
]
MethodValues = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="NAME...",
        help=f"{', '.join(METHODS)}: ablations at the same bytes.",
        rich_help_panel=_GRID,
    ),
]
SeedsOption = Annotated[
    int | None,
    typer.Option(metavar="N", help=f"Draws of method random, {MIN_SEEDS} by default.", rich_help_panel=_GRID),
]
MaxKLOption = Annotated[
    float | None,
    typer.Option(
        "--max-kl", metavar="X", help="Mean KL in nats, 0.05 by default.", rich_help_panel=_CONSTRAINT
    ),
]
MinAgreementOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="Share of tokens that stay the likeliest.", rich_help_panel=_CONSTRAINT),
]
MaxAccuracyDropOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="Exact answers lost, as a share of prompts.", rich_help_panel=_CONSTRAINT),
]
MeasureSpeedOption = Annotated[
    str,
    typer.Option(metavar="WHICH", help="Decode speed of: all, front, none.", rich_help_panel=_MEASURING),
]
RepeatsOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Timed decodes of each setting and prompt.", rich_help_panel=_MEASURING),
]
WorkersOption = Annotated[
    int,
    typer.Option(metavar="N", help="Spread prompts over N processes, with Ray.", rich_help_panel=_MEASURING),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Of an existing Ray cluster, or auto.", rich_help_panel=_MEASURING),
]
OutOption = Annotated[
    str, typer.Option("--out", metavar="DIR", help="Folder of the results.", rich_help_panel=_OUTPUT)
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", metavar="", help="Continue what is in the folder.", rich_help_panel=_OUTPUT),
]


def constraint_of(
    max_kl: float | None, min_agreement: float | None, max_accuracy_drop: float | None
) -> Constraint:
    """The one constraint that was stated, else the default. Raises `UsageError`."""
    given = {"max-kl": max_kl, "min-agreement": min_agreement, "max-accuracy-drop": max_accuracy_drop}
    typed = [name for name, value in given.items() if value is not None]
    if len(typed) > 1:
        raise UsageError(f"--{typed[0]} and --{typed[1]} were both given", hint="state one constraint")
    if max_kl is not None and not (math.isfinite(max_kl) and max_kl >= 0):
        raise UsageError(f"max-kl = {max_kl:g}; expected a number of nats, 0 or more")
    for name in ("min-agreement", "max-accuracy-drop"):
        if (value := given[name]) is not None and not 0 <= value <= 1:
            raise UsageError(f"{name} = {value:g}; expected a number in [0, 1]")
    if min_agreement is not None:
        return Constraint("agreement", min_agreement)
    if max_accuracy_drop is not None:
        return Constraint("accuracy_drop", max_accuracy_drop)
    return Constraint("kl", MAX_KL if max_kl is None else max_kl)


def draws(seeds: int | None, methods: Sequence[str]) -> int:
    """How many draws of chance there are to be. Raises `UsageError` where no method draws any."""
    if seeds is not None and RANDOM not in methods:
        raise UsageError("--seeds was given without --method random", hint="add it, or leave it out")
    return MIN_SEEDS if seeds is None else seeds


def check_measuring(measure_speed: str, repeats: int | None, workers: int, ray_address: str | None) -> None:
    """Refuse what cannot be measured that way. Raises `UsageError`."""
    if measure_speed not in SPEEDS:
        raise UsageError(f"measure-speed {measure_speed!r}; expected {', '.join(SPEEDS)}")
    if repeats is not None and repeats < 1:
        raise UsageError(f"repeats = {repeats}; expected 1 or more")
    if repeats is not None and measure_speed == NONE:
        raise UsageError("--repeats does not go with --measure-speed none, which times nothing")
    if workers < 1:
        raise UsageError(f"workers = {workers}; expected 1 or more")
    if (workers > 1 or ray_address is not None) and find_spec("ray") is None:
        raise UsageError(
            "spreading prompts needs Ray", hint="pip install 'plphp-cli[ray]', or use --workers 1"
        )
