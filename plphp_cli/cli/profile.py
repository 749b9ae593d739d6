"""`plphp profile`: what pruning buys on this model, these prompts and this machine, measured."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from plphp_cli.cli import dummy_options as dummy
from plphp_cli.cli import options as opt
from plphp_cli.cli.failures import explained
from plphp_cli.cli.interrupts import WHILE_LOADING, Interrupts
from plphp_cli.cli.load_options import check_model, with_load_options
from plphp_cli.cli.output import (
    print_error,
    print_lines,
    say,
    stderr_console,
    time_left,
    write_files,
    write_stdout,
)
from plphp_cli.cli.questions import read_questions
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import PLPHPError, UsageError
from plphp_cli.files import check_writable
from plphp_cli.models.options import DEFAULTS, LoadOptions
from plphp_cli.profiling.pace import Progress
from plphp_cli.profiling.records import PRUNED, STOCK, UNPRUNED, ProfileRecord
from plphp_cli.profiling.state import DummyPlan, ProfileRequest
from plphp_cli.reports.profile_text import given_rates
from plphp_cli.reports.terminal import config_line
from plphp_cli.reports.text import one_line
from plphp_cli.serialize import to_json

if TYPE_CHECKING:
    from plphp_cli.profiling.session import ProfileSession

_MEASURING, _OUTPUT = "Measuring", "Output"

CompareBaselineOption = Annotated[
    bool,
    typer.Option(
        "--compare-baseline",
        metavar="",
        help="Measure the unpruned arm too, and compare.",
        rich_help_panel=_MEASURING,
    ),
]
CompareStockOption = Annotated[
    bool,
    typer.Option(
        "--compare-stock",
        metavar="",
        help="Measure plain model.generate too; means --compare-baseline.",
        rich_help_panel=_MEASURING,
    ),
]
RepeatsOption = Annotated[
    int, typer.Option(metavar="N", help="Samples of each arm, in pairs.", rich_help_panel=_MEASURING)
]
WarmupOption = Annotated[
    int, typer.Option(metavar="N", help="Discarded runs before them.", rich_help_panel=_MEASURING)
]
CsvOption = Annotated[
    str | None,
    typer.Option("--csv", metavar="FILE", help="One measurement a row.", rich_help_panel=_OUTPUT),
]
HtmlOption = Annotated[
    str | None,
    typer.Option("--html", metavar="FILE", help="One page, needs no network.", rich_help_panel=_OUTPUT),
]


@with_load_options
@opt.with_knobs
@dummy.with_dummy_options
def profile(
    context: typer.Context,
    image: opt.ImageOption = None,
    prompt: opt.PromptOption = None,
    data: opt.DataOption = None,
    system: opt.SystemOption = None,
    max_pixels: opt.MaxPixelsOption = None,
    model: opt.ModelOption = "builtin",
    options: LoadOptions = DEFAULTS,
    config: opt.ConfigOption = None,
    knobs: dict[str, Any] = opt.NO_KNOBS,
    max_new_tokens: opt.MaxNewTokensOption = 128,
    compare_baseline: CompareBaselineOption = False,
    compare_stock: CompareStockOption = False,
    repeats: RepeatsOption = 9,
    warmup: WarmupOption = 1,
    batch_size: dummy.BatchSizeOption = 1,
    compile: dummy.CompileOption = False,
    plan: DummyPlan | None = None,
    json: opt.JsonOption = None,
    csv: CsvOption = None,
    html: HtmlOption = None,
    force: opt.ForceOption = False,
    debug: opt.DebugOption = False,
) -> int:
    """Measure memory, speed and quality of pruning against none, beside what would be possible at all.

    Arms take turns, with an A/A control; a difference is called only if identical arms do not show it.
    """
    files = _targets(json, csv, html, force)
    opt.check_generation(max_new_tokens, None, None, 0)
    _check_counts(repeats, warmup)
    if batch_size < 1:
        raise UsageError(f"batch-size = {batch_size}; expected 1 or more")
    if plan is None:
        dummy.check_no_shape(model)
        chosen, origin = opt.choose_config(model, config, knobs)
        say(f"config: {origin}: {config_line(chosen)}")
        questions = read_questions(image, prompt, data, system, max_pixels)
        check_model(model, options)
    else:
        dummy.check_no_knobs(config, knobs)
        asked = {"--image": image, "--prompt": prompt, "--data": data, "--system": system}
        questions = dummy.dummy_questions(plan, {**asked, "--max-pixels": max_pixels})
        dummy.check_dummy_model(model, options, plan)
        chosen = PLPHPConfig()
        say(f"{dummy.NOTE}; {given_rates(plan.layer_rates, plan.rates_from)}")
    request = ProfileRequest(
        questions=questions,
        config=chosen,
        arms=_arms(compare_baseline, compare_stock),
        model=model,
        options=options,
        max_pixels=max_pixels,
        repeats=repeats,
        warmup=warmup,
        max_new_tokens=max_new_tokens,
        command=tuple(context.obj or sys.argv),
        batch_size=batch_size,
        compile=compile,
        dummy=plan,
    )
    return execute(request, files, force)


def execute(request: ProfileRequest, files: dict[str, str], force: bool) -> int:
    """Measure, write and print what came of it, and return the exit code.

    Args:
        request: what to measure.
        files: `json`, `csv`, `html` and where each goes; `json` may be `-`.
        force: overwrite files.

    Raises:
        PLPHPError: it failed before anything was measured, or what was measured shows a fault of the tool.
    """
    interrupted, failure = False, None
    session: ProfileSession | None = None
    with Interrupts() as interrupts:
        with _progress_bar() as show:
            show(Progress(f"loading {one_line(request.model)}", 0, 0, None))
            try:
                session = _session(request, show, interrupts.check)
                session.load()
                session.run()
                interrupts.check()
            except KeyboardInterrupt:
                interrupted = True
            except Exception as error:
                # An interrupted import or kernel may surface as an error of its own.
                interrupted = interrupts.received is not None
                failure = None if interrupted else explained(error)
                if failure is not None and not (session is not None and session.started):
                    raise failure from error
        interrupts.hold()
        if session is None or (interrupted and not session.loaded):
            say(WHILE_LOADING)
            return interrupts.exit_code
        record = session.record(interrupted or failure is not None)
        unwritten = _write(record, files, force)
        _print(record, files.get("json") == "-", session.started)
    failure = failure or (None if interrupted else unwritten)
    if failure is not None:
        raise failure
    if record.faults:
        raise PLPHPError(record.faults[0])
    return interrupts.exit_code if interrupts.received is not None else 0


def _session(
    request: ProfileRequest, show: Callable[[Progress], None], check: Callable[[], None]
) -> "ProfileSession":
    # Its import takes seconds, and a Ctrl-C may fall into them.
    from plphp_cli.profiling.session import ProfileSession

    return ProfileSession(request, show, check)


def _write(record: ProfileRecord, files: dict[str, str], force: bool) -> PLPHPError | None:
    """The files first: an impatient Ctrl-C costs the report on the terminal only."""
    from plphp_cli.reports.profile_csv import profile_csv
    from plphp_cli.reports.profile_html import profile_html

    makers: dict[str, Callable[[], str]] = {
        "json": lambda: to_json(record) + "\n",
        "csv": lambda: profile_csv(record),
        "html": lambda: profile_html(record),
    }
    wanted = {kind: (files[kind], make) for kind, make in makers.items() if files.get(kind, "-") != "-"}
    failure = write_files(wanted, force)
    if failure is not None and record.interrupted:
        print_error(failure.message, failure.hint)
    return failure


def _print(record: ProfileRecord, json_on_stdout: bool, started: bool) -> None:
    """The report is the answer and goes to stdout, unless the JSON does."""
    from plphp_cli.reports.profile_terminal import profile_report

    console = stderr_console()
    if json_on_stdout:
        write_stdout(to_json(record))
    elif sys.stdout is not None:
        console = Console(file=sys.stdout, markup=False, emoji=False, highlight=False)
    if started or any(prompt.quality.texts.pruned is not None for prompt in record.prompts):
        colour = console.color_system is not None and not console.no_color
        print_lines(profile_report(record, console.width, colour), console)
    if record.interrupted:
        say("interrupted" if started else "interrupted before anything was timed")


def _targets(json: str | None, csv: str | None, html: str | None, force: bool) -> dict[str, str]:
    """Where each file goes, checked before the work. Raises `UsageError`."""
    opt.check_json_target(json, force)
    given = {"json": json, "csv": csv, "html": html}
    files = {kind: path for kind, path in given.items() if path is not None}
    for kind, path in files.items():
        if not path:
            raise UsageError(f"--{kind} is empty", hint="name a file")
        if kind != "json":
            check_writable(Path(path), force)
    places = [Path(path).resolve() for path in files.values() if path != "-"]
    if len(set(places)) < len(places):
        raise UsageError("two of --json, --csv and --html name the same file", hint="give each its own")
    return files


def _check_counts(repeats: int, warmup: int) -> None:
    if repeats < 1:
        raise UsageError(f"repeats = {repeats}; expected 1 or more")
    if warmup < 0:
        raise UsageError(f"warmup = {warmup}; expected 0 or more")


def _arms(compare_baseline: bool, compare_stock: bool) -> tuple[str, ...]:
    if compare_stock:
        return (PRUNED, UNPRUNED, STOCK)
    return (PRUNED, UNPRUNED) if compare_baseline else (PRUNED,)


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar with arm, repeat and remaining time on a terminal; else a line per stage of the work."""
    console = stderr_console()
    if not console.is_terminal:
        yield _said_once()
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        BarColumn(16),
        TaskProgressColumn(),
        TextColumn("{task.fields[left]:>7}"),
        TextColumn("{task.description}", markup=False),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None, left="")

        def show(progress: Progress) -> None:
            left = "" if progress.remaining_s is None else f"{time_left(progress.remaining_s)} left"
            bar.update(
                task,
                description=progress.stage,
                completed=progress.done,
                total=progress.total or None,
                left=left,
            )

        yield show


def _said_once() -> Callable[[Progress], None]:
    """Says each stage as it begins: what is left of the repeats' numbers is the stage."""
    said: list[str] = []

    def show(progress: Progress) -> None:
        stage = progress.stage.rpartition(": ")[2].partition(",")[0]
        prompt = progress.stage.partition(": ")[0] if ": " in progress.stage else ""
        line = f"{prompt}: {stage}" if prompt else stage
        if said[-1:] != [line]:
            said[:] = [line]
            left = "" if progress.remaining_s is None else f" (about {time_left(progress.remaining_s)} left)"
            say(line + left)

    return show
