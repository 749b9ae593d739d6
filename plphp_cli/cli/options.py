"""Options that commands share, and the checks of what was typed. Nothing here loads torch."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from plphp_cli import parallel
from plphp_cli.cli.option_groups import takes
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import ConfigError, UsageError
from plphp_cli.files import check_writable
from plphp_cli.reports.text import one_line
from plphp_cli.results import GenerationRecord

MAX_PROMPT_BYTES = 1 << 22

_INPUT, _PRUNING, _GENERATION, _MODEL, _OUTPUT = "Input", "Pruning", "Generation", "Model", "Output"

ImageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--image", metavar="FILE...", help="Image files: several values, or repeated.", rich_help_panel=_INPUT
    ),
]
PromptOption = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="What to ask; - reads stdin.", rich_help_panel=_INPUT),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="JSON Lines of prompts: images, prompt, answer.",
        rich_help_panel=_INPUT,
    ),
]
SystemOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System message.", rich_help_panel=_INPUT)
]
RawPromptOption = Annotated[
    bool,
    typer.Option(
        "--raw-prompt",
        metavar="",
        help="Send the text as typed, without the chat template.",
        rich_help_panel=_INPUT,
    ),
]
PromptsOption = Annotated[
    int,
    typer.Option(
        "--batch-size", metavar="N", help="Of --data, decode N prompts together.", rich_help_panel=_INPUT
    ),
]
MaxPixelsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Reduce larger images to N pixels: fewer vision tokens, pruning's natural rival.",
        rich_help_panel=_INPUT,
    ),
]
ModelOption = Annotated[
    str, typer.Option(metavar="NAME", help="builtin, a folder, or a hub id.", rich_help_panel=_MODEL)
]
DtypeOption = Annotated[
    str, typer.Option(metavar="NAME", help="auto, float32, bfloat16, float16.", rich_help_panel=_MODEL)
]
DeviceOption = Annotated[
    str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N, mps.", rich_help_panel=_MODEL)
]
AttnOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Attention back-end: sdpa, flash_attention_2, flex_attention, eager.",
        rich_help_panel=_MODEL,
    ),
]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", help="Config that calibrate wrote.", rich_help_panel=_PRUNING),
]
ROption = Annotated[
    float | None, typer.Option("--r", metavar="X", help="Base retention rate.", rich_help_panel=_PRUNING)
]
DeltaROption = Annotated[
    float | None,
    typer.Option(
        "--delta-r",
        metavar="X",
        help="What attentive layers gain on r and indifferent ones lose.",
        rich_help_panel=_PRUNING,
    ),
]
AlphaOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="gamma from which a layer is attentive.", rich_help_panel=_PRUNING),
]
BetaOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="gamma below which a layer is indifferent.", rich_help_panel=_PRUNING),
]
ScopeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Rank vision tokens per prompt or per image.", rich_help_panel=_PRUNING
    ),
]
HeadReduceOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How query heads that share a KV head score a token: mean or max.",
        rich_help_panel=_PRUNING,
    ),
]
SkipLayersOption = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Layers never cut, e.g. 0,5-7; or none.", rich_help_panel=_PRUNING),
]
MaxNewTokensOption = Annotated[
    int, typer.Option(metavar="N", help="Longest answer.", rich_help_panel=_GENERATION)
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        metavar="X", help="Sample at this temperature; default greedy.", rich_help_panel=_GENERATION
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="X",
        help="Sample from the likeliest tokens of this probability.",
        rich_help_panel=_GENERATION,
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End at this text; repeatable.", rich_help_panel=_GENERATION),
]
ChatOption = Annotated[
    bool,
    typer.Option(
        "--chat", metavar="", help="Go on asking about the same images, from stdin.", rich_help_panel=_INPUT
    ),
]
RecutOption = Annotated[
    str | None,
    typer.Option(
        "--recut",
        metavar="WHEN",
        help="With --chat, cut the cache for each-turn (default), or for the first-turn only.",
        rich_help_panel=_PRUNING,
    ),
]
SeedOption = Annotated[int, typer.Option(metavar="N", help="Of sampling.", rich_help_panel=_GENERATION)]
NoBaselineOption = Annotated[
    bool,
    # An empty metavar: typer would print the type of a flag as if it took a value.
    typer.Option("--no-baseline", metavar="", help="Leave out the unpruned run.", rich_help_panel=_OUTPUT),
]
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE", help="Write the record; - writes it to stdout.", rich_help_panel=_OUTPUT
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", metavar="", help="Overwrite existing files.", rich_help_panel=_OUTPUT)
]
NoLiveOption = Annotated[
    bool, typer.Option("--no-live", metavar="", help="No live view.", rich_help_panel=_OUTPUT)
]
DebugOption = Annotated[
    bool, typer.Option("--debug", metavar="", help="Show tracebacks.", rich_help_panel=_OUTPUT)
]


# What a command has for its knobs where none was named.
NO_KNOBS: dict[str, Any] = {}


def overrides(
    *,
    r: float | None = None,
    delta_r: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    scope: str | None = None,
    head_reduce: str | None = None,
    skip_layers: str | None = None,
) -> dict[str, Any]:
    """The knobs that were named on the command line."""
    given: dict[str, Any] = {
        "r": r,
        "delta_r": delta_r,
        "alpha": alpha,
        "beta": beta,
        "scope": scope,
        "head_reduce": head_reduce,
        "skip_layers": None if skip_layers is None else parse_layers(skip_layers),
    }
    return {name: value for name, value in given.items() if value is not None}


# The knobs of pruning, as options of a command in place of its parameter `knobs`: those that were named.
with_knobs = takes(
    "knobs",
    {
        "r": (ROption, None),
        "delta_r": (DeltaROption, None),
        "alpha": (AlphaOption, None),
        "beta": (BetaOption, None),
        "scope": (ScopeOption, None),
        "head_reduce": (HeadReduceOption, None),
        "skip_layers": (SkipLayersOption, None),
    },
    overrides,
)


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer indices from `0,5-7`, or none from `none`. Raises `ConfigError`."""
    if text.strip().lower() in ("", "none"):
        return ()
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) > 9999:
            raise ConfigError(
                f"skip layers {one_line(text)!r}; expected layer indices", hint="e.g. 0,5-7, or none"
            )
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)


def choose_config(model: str, config_file: str | None, knobs: dict[str, Any]) -> tuple[PLPHPConfig, str]:
    """The config of a run, and in a few words where it comes from.

    `--config` goes before the model's own default; knobs given one by one go before both. Thresholds given by
    hand are not calibrated ones.

    Raises:
        ConfigError: the file or a knob is invalid.
    """
    from plphp_cli.models import BUILTIN
    from plphp_cli.models.loaded import CONFIG_NAME
    from plphp_cli.models.sources import BUILTIN_FOLDER

    builtin = BUILTIN_FOLDER / CONFIG_NAME
    if config_file is not None:
        config, origin = PLPHPConfig.from_file(config_file), f"from {one_line(config_file)}"
        origin += ", calibrated" if config.calibrated else ""
    elif model == BUILTIN and builtin.is_file():
        config = PLPHPConfig.from_file(builtin)
        origin = f"{'calibrated' if config.calibrated else 'default'} for the built-in model"
    else:
        config, origin = PLPHPConfig(), "defaults, not calibrated"
    if {"alpha", "beta"} & knobs.keys():
        knobs = {**knobs, "calibrated": False, "calibrated_on": None}
    if knobs:
        origin += ", changed by options"
    return config.replace(**knobs), origin


def check_generation(
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    stop: Sequence[str] | None = None,
) -> GenerationRecord:
    """The settings of generation, checked before anything is loaded. Raises `UsageError`."""
    if max_new_tokens < 1:
        raise UsageError(f"max-new-tokens = {max_new_tokens}; expected 1 or more")
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"temperature = {temperature:g}; expected a number of 0 (greedy) or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"top-p = {top_p:g}; expected a number above 0, at most 1")
    if top_p is not None and temperature == 0:
        raise UsageError(
            "--top-p does not go with --temperature 0, which samples nothing", hint="leave out one of them"
        )
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed = {seed}; expected a whole number from 0 to 2^63 - 1")
    for text in stop or ():
        if not text:
            raise UsageError("--stop is empty", hint="give the text at which the answer is to end")
        check_unicode("stop text", text)
    return GenerationRecord(max_new_tokens, temperature, top_p, seed, stop=tuple(stop or ()))


def read_prompt(prompt: str | None) -> str:
    """The prompt as text; `-` reads it from stdin.

    Raises:
        UsageError: it is missing or blank, not UTF-8, or longer than any model could read.
    """
    if prompt is None:
        raise UsageError("no prompt was given", hint="say what to ask with --prompt, or --prompt - for stdin")
    where = "prompt"
    if prompt == "-":
        parallel.refuse_stdin()
        where = "prompt from stdin"
        prompt = _read_stdin()
    return check_text(where, prompt)


def check_text(where: str, text: str) -> str:
    """`text` if a model can be asked it. Raises `UsageError` when it is blank or was not UTF-8."""
    check_unicode(where, text)
    if not text.strip():
        raise UsageError(f"the {where} is blank", hint="say what you want to know")
    return text


def check_unicode(where: str, text: str) -> None:
    """Refuse a text that was not UTF-8 where it was typed. Raises `UsageError`."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"the {where} is not UTF-8 text", hint="check its encoding") from error


def _read_stdin() -> str:
    if sys.stdin is None:
        raise UsageError("there is no stdin to read the prompt from", hint="give the text with --prompt")
    if sys.stdin.isatty():
        print("reading the prompt from the terminal; Ctrl-D ends it", file=sys.stderr)
    content = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(content) > MAX_PROMPT_BYTES:
        raise UsageError("the prompt from stdin is longer than 4 MiB", hint="shorten it")
    try:
        return content.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the prompt from stdin is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}",
            hint="convert it, e.g. with iconv -t utf-8",
        ) from error


def check_json_target(path: str | None, force: bool) -> None:
    """Fail before the work where writing the record would fail after it. Raises `UsageError`."""
    if path == "":
        raise UsageError("--json is empty", hint="name a file, or - for stdout")
    if path is not None and path != "-":
        check_writable(Path(path), force)
