"""`plphp calibrate`: set alpha and beta on a model's own scale of gamma, and find the layers not to cut."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from plphp_cli.cli import options as opt
from plphp_cli.cli.load_options import check_model, with_load_options
from plphp_cli.cli.output import print_lines, say, write_stdout
from plphp_cli.config import PLPHPConfig
from plphp_cli.dataset import Example, read_examples
from plphp_cli.errors import UsageError
from plphp_cli.files import check_writable, write_text
from plphp_cli.images import load_image
from plphp_cli.models.options import DEFAULTS, LoadOptions
from plphp_cli.reports.calibration import calibration_report
from plphp_cli.serialize import to_json

OutOption = Annotated[
    str, typer.Option("--out", metavar="FILE", help="Config file to write.", rich_help_panel="Output")
]
QuantilesOption = Annotated[
    list[float] | None,
    typer.Option(
        "--quantiles",
        metavar="LOW HIGH",
        help="Quantiles of gamma for beta and alpha; terciles by default.",
        rich_help_panel="Pruning",
    ),
]


@with_load_options
def calibrate(
    out: OutOption,
    image: opt.ImageOption = None,
    prompt: opt.PromptOption = None,
    data: opt.DataOption = None,
    system: opt.SystemOption = None,
    max_pixels: opt.MaxPixelsOption = None,
    model: opt.ModelOption = "builtin",
    options: LoadOptions = DEFAULTS,
    config: opt.ConfigOption = None,
    quantiles: QuantilesOption = None,
    r: opt.ROption = None,
    delta_r: opt.DeltaROption = None,
    scope: opt.ScopeOption = None,
    head_reduce: opt.HeadReduceOption = None,
    skip_layers: opt.SkipLayersOption = None,
    max_new_tokens: opt.MaxNewTokensOption = 64,
    json: opt.JsonOption = None,
    force: opt.ForceOption = False,
    debug: opt.DebugOption = False,
) -> int:
    """Measure gamma and each layer's need on prompts, and write a config whose thresholds suit the model.

    alpha and beta become quantiles of the model's own gamma. Layers whose need stands far out are never cut,
    beside those that --skip-layers names.
    """
    from plphp_cli.calibration import TERCILES, check_quantiles

    check_writable(Path(out), force)
    opt.check_json_target(json, force)
    if quantiles is not None and len(quantiles) != 2:
        raise UsageError(f"{len(quantiles)} quantiles were given; expected two", hint="e.g. 0.33 0.67")
    low, high = check_quantiles(TERCILES if quantiles is None else (quantiles[0], quantiles[1]))
    examples = _examples(image, prompt, data, system)
    base = PLPHPConfig.from_file(config) if config is not None else PLPHPConfig()
    base = base.replace(
        **opt.overrides(
            r=r, delta_r=delta_r, scope=scope, head_reduce=head_reduce, skip_layers=skip_layers or "none"
        )
    )
    opt.check_generation(max_new_tokens, None, None, 0)
    pictures = [[load_image(path, max_pixels) for path in example.images] for example in examples]
    check_model(model, options)

    from plphp_cli.calibration import calibrate as measure
    from plphp_cli.models import load, prepare

    say(f"loading {model}")
    loaded = load(model, options)
    for note in loaded.warnings:
        say(f"note: {note}")
    prompts = [
        prepare(loaded, images, example.prompt, example.system)
        for images, example in zip(pictures, examples, strict=True)
    ]
    record = measure(
        loaded,
        prompts,
        base,
        quantiles=(low, high),
        max_new_tokens=max_new_tokens,
        progress=lambda done: say(f"prompt {done} of {len(prompts)}"),
    )
    record.config.to_file(out, force)
    print_lines(calibration_report(record))
    say(f"config written to {out}; use it with --config {out}")
    if json == "-":
        write_stdout(to_json(record))
    elif json is not None:
        write_text(json, to_json(record) + "\n", force)
    return 0


def _examples(
    image: list[str] | None, prompt: str | None, data: str | None, system: str | None
) -> list[Example]:
    """What to calibrate on: the prompts of `--data`, or the one of `--image` and `--prompt`."""
    if system is not None:
        opt.check_text("system message", system)
    if data is not None:
        if image or prompt is not None:
            raise UsageError("--data was given with --image or --prompt", hint="use one or the other")
        examples = read_examples(Path(data))
        return [replace(one, system=system) if one.system is None else one for one in examples]
    if not image:
        raise UsageError("no image was given", hint="name files with --image, or prompts with --data")
    return [Example(tuple(map(Path, image)), opt.read_prompt(prompt), system=system)]
