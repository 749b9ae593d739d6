"""Options of `plphp profile` for batches, compiled steps and dummy weights."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from plphp_cli.cli.load_options import find_model
from plphp_cli.cli.option_groups import given_first, takes
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import ModelError, PLPHPError, UsageError
from plphp_cli.models.options import LoadOptions
from plphp_cli.models.shapes import SHAPES
from plphp_cli.profiling.records import from_json
from plphp_cli.profiling.state import DummyPlan, Question
from plphp_cli.reports.profile_text import plural
from plphp_cli.reports.text import one_line
from plphp_cli.serialize import RecordError

_DUMMY, _MEASURING = "Dummy weights", "Measuring"

BatchSizeOption = Annotated[
    int,
    typer.Option(
        metavar="N", help="Decode N copies of each prompt in one batch.", rich_help_panel=_MEASURING
    ),
]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile",
        metavar="",
        help="Compile decoding steps (torch.compile, CUDA graphs on a GPU).",
        rich_help_panel="Generation",
    ),
]
DummyWeightsOption = Annotated[
    bool,
    typer.Option(
        "--dummy-weights",
        metavar="",
        help="Random weights at the true size of --model: speed and memory before a download.",
        rich_help_panel=_DUMMY,
    ),
]
VisionTokensOption = Annotated[
    int | None, typer.Option(metavar="N", help="Of the synthetic prompt.", rich_help_panel=_DUMMY)
]
ImagesOption = Annotated[
    int | None,
    typer.Option("--images", metavar="N", help="Images that they are of.", rich_help_panel=_DUMMY),
]
TextTokensOption = Annotated[
    int | None, typer.Option(metavar="N", help="Of the synthetic prompt.", rich_help_panel=_DUMMY)
]
LayerRatesOption = Annotated[
    str | None,
    typer.Option(
        metavar="R,R,...", help="Retention rates, repeated over the layers.", rich_help_panel=_DUMMY
    ),
]
RatesFromOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Layer rates of a profile's JSON.", rich_help_panel=_DUMMY),
]

_DEFAULT_RATES = (0.7, 0.4, 0.1)
_VISION_TOKENS, _TEXT_TOKENS = 7290, 64
NOTE = "dummy weights: speed and memory only"


def dummy_plan(
    dummy_weights: bool,
    vision_tokens: int | None,
    images: int | None,
    text_tokens: int | None,
    layer_rates: str | None,
    rates_from: str | None,
) -> DummyPlan | None:
    """What stands in for weights and prompts; None without `--dummy-weights`. Raises `UsageError`."""
    given = {
        "--vision-tokens": vision_tokens,
        "--images": images,
        "--text-tokens": text_tokens,
        "--layer-rates": layer_rates,
        "--rates-from": rates_from,
    }
    if not dummy_weights:
        if (stray := given_first(given)) is not None:
            raise UsageError(f"{stray} was given without --dummy-weights", hint="add it, or leave it out")
        return None
    for name, value in list(given.items())[:3]:
        if isinstance(value, int) and value < 1:
            raise UsageError(f"{name} = {value}; expected 1 or more")
    if layer_rates is not None and rates_from is not None:
        raise UsageError("--layer-rates and --rates-from exclude each other", hint="use one of them")
    rates: tuple[float, ...] = _DEFAULT_RATES
    if layer_rates is not None:
        rates = parse_rates(layer_rates)
    elif rates_from is not None:
        rates = recorded_rates(Path(rates_from))
    tokens, count = vision_tokens or _VISION_TOKENS, images or 1
    if tokens < count:
        raise UsageError(f"{tokens} vision tokens in {count} images", hint="expected at least one an image")
    return DummyPlan(tokens, count, rates, text_tokens or _TEXT_TOKENS, rates_from=rates_from)


# These options of a command in place of its parameter `plan`.
with_dummy_options = takes(
    "plan",
    {
        "dummy_weights": (DummyWeightsOption, False),
        "vision_tokens": (VisionTokensOption, None),
        "images": (ImagesOption, None),
        "text_tokens": (TextTokensOption, None),
        "layer_rates": (LayerRatesOption, None),
        "rates_from": (RatesFromOption, None),
    },
    dummy_plan,
)


def parse_rates(text: str) -> tuple[float, ...]:
    """Rates such as `0.7,0.4,0.1`. Raises `UsageError`."""
    rates = []
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not 0 <= rate <= 1:
            raise UsageError(
                f"layer rate {part.strip()!r}; expected numbers in [0, 1]", hint="e.g. 0.7,0.4,0.1"
            )
        rates.append(rate)
    return tuple(rates)


def recorded_rates(path: Path) -> tuple[float, ...]:
    """The layer rates that a profile recorded; layers without one were kept whole. Raises `UsageError`."""
    expected = "--rates-from takes a file that plphp profile --json wrote; or give --layer-rates"
    shown = one_line(str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError as error:
        raise UsageError(f"{shown} is a folder, not a profile", hint=expected) from error
    except OSError as error:
        raise UsageError(f"cannot read {shown}: {error.strerror}", hint=expected) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown} is not text, so no profile", hint=expected) from error
    if (what := _what_else(text)) is not None:
        raise UsageError(f"{shown} is {what}, not a profile", hint=expected)
    try:
        record = from_json(text)
    except RecordError as error:
        raise UsageError(
            f"{shown} is a profile that cannot be read: {error.message}", hint=error.hint or expected
        ) from error
    rates = [1.0 if layer.rate is None else layer.rate for layer in record.layers]
    if not rates:
        raise UsageError(
            f"the profile {shown} has no layers, so no rates: it was broken off before any were measured",
            hint="name a whole one, or give --layer-rates",
        )
    if wrong := [rate for rate in rates if not 0 <= rate <= 1]:
        raise UsageError(f"the profile {shown} has the rate {wrong[0]:g}; expected numbers in [0, 1]")
    return tuple(rates)


def _what_else(text: str) -> str | None:
    """What a text is that is no profile's JSON, in words; None if it says that it is a profile."""
    if not text.strip():
        return "empty"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(found, dict):
        return f"a JSON {type(found).__name__}"
    command = found.get("command")
    if command == "profile":
        return None
    if command == "run" and "answers" in found:
        command = "run --data"
    if isinstance(command, str):
        return f"a record of plphp {one_line(command):.40}"
    if found and found.keys() <= PLPHPConfig().to_dict().keys():
        return "a config of pruning"
    return "another JSON object"


def dummy_questions(plan: DummyPlan, given: Mapping[str, Any]) -> tuple[Question, ...]:
    """The one synthetic prompt. Raises `UsageError` where a real one was `given`, by option."""
    if (name := given_first(given)) is not None:
        raise UsageError(
            f"--dummy-weights does not go with {name}: its prompt is synthetic",
            hint="say its size with --vision-tokens, --images and --text-tokens",
        )
    tokens, images = plural(plan.vision_tokens, "synthetic vision token"), plural(plan.images, "image")
    return (Question((), f"{tokens} in {images}"),)


def check_no_knobs(config: str | None, knobs: Mapping[str, Any]) -> None:
    """Refuse knobs of pruning, which decide by scores. Raises `UsageError`."""
    given = {"--config": config, **{f"--{name.replace('_', '-')}": value for name, value in knobs.items()}}
    if (name := given_first(given)) is not None:
        raise UsageError(
            f"--dummy-weights does not go with {name}: random weights give no scores",
            hint="give the layers' rates with --layer-rates or --rates-from",
        )


def check_no_shape(name: str) -> None:
    """Refuse a built-in shape where a model's weights are needed. Raises `ModelError`."""
    if name in SHAPES and not Path(name).is_dir():
        raise ModelError(
            f"{name} is a built-in shape, which has no weights of its own",
            hint="add --dummy-weights for speed and memory at its size, or name a folder or a hub id",
        )


def check_dummy_model(name: str, options: LoadOptions, plan: DummyPlan) -> None:
    """Fail early for what is no shape and no model, of which no weights are fetched.

    Raises:
        UsageError: an option says how weights, code or a processor are loaded, and there are none; or
            recorded rates are of another number of layers.
        PLPHPError: what `models.load` raises for such names.
    """
    ours = LoadOptions(dtype=options.dtype, device=options.device, attn=options.attn, offline=options.offline)
    if stray := [word for word in options.words() if word.startswith("--") and word not in ours.words()]:
        raise UsageError(f"--dummy-weights does not go with {stray[0]}", hint="leave out one of them")
    if name in SHAPES:
        plan.check_layers(SHAPES[name]["num_hidden_layers"], name)
        return
    try:
        find_model(name)
    except PLPHPError as error:
        shapes = ", ".join(SHAPES)
        raise type(error)(error.message, hint=f"{error.hint}; or a built-in shape: {shapes}") from error
