"""`plphp sweep`: cache size, quality and speed over a grid of settings, and the one to take."""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from plphp_cli.cli import options as opt
from plphp_cli.cli import sweep_options as own
from plphp_cli.cli.failures import explained
from plphp_cli.cli.interrupts import Interrupts
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
from plphp_cli.models.options import DEFAULTS, LoadOptions
from plphp_cli.profiling.state import Question
from plphp_cli.reports.terminal import config_line
from plphp_cli.reports.text import one_line
from plphp_cli.serialize import to_json
from plphp_cli.sweep.grid import KNOBS, Grid, expand
from plphp_cli.sweep.progress import SweepProgress
from plphp_cli.sweep.records import PLPHP, Constraint, SweepRecord
from plphp_cli.sweep.request import FRONT, SweepRequest, prompt_id
from plphp_cli.sweep.store import RESULTS, check_folder

if TYPE_CHECKING:
    from plphp_cli.sweep.session import SweepSession

RECOMMENDED, REPORT, PAGE, SUMMARY = "recommended.json", "report.json", "report.html", "summary.csv"


@with_load_options
def sweep(
    context: typer.Context,
    image: opt.ImageOption = None,
    prompt: opt.PromptOption = None,
    data: opt.DataOption = None,
    system: opt.SystemOption = None,
    max_pixels: opt.MaxPixelsOption = None,
    model: opt.ModelOption = "builtin",
    options: LoadOptions = DEFAULTS,
    config: opt.ConfigOption = None,
    r: own.RValues = None,
    delta_r: own.DeltaRValues = None,
    alpha: own.AlphaValues = None,
    beta: own.BetaValues = None,
    scope: own.ScopeValues = None,
    head_reduce: own.HeadReduceValues = None,
    skip_layers: opt.SkipLayersOption = None,
    method: own.MethodValues = None,
    seeds: own.SeedsOption = None,
    max_kl: own.MaxKLOption = None,
    min_agreement: own.MinAgreementOption = None,
    max_accuracy_drop: own.MaxAccuracyDropOption = None,
    max_new_tokens: opt.MaxNewTokensOption = 128,
    measure_speed: own.MeasureSpeedOption = FRONT,
    repeats: own.RepeatsOption = None,
    workers: own.WorkersOption = 1,
    ray_address: own.RayAddressOption = None,
    out: own.OutOption = "plphp-sweep",
    resume: own.ResumeOption = False,
    json: opt.JsonOption = None,
    force: opt.ForceOption = False,
    no_live: opt.NoLiveOption = False,
    debug: opt.DebugOption = False,
) -> int:
    """Try a grid of settings on your prompts, one prefill a prompt, and recommend one.

    A knob takes several values: --alpha 0.3 0.5. One that is not given is as in --config or the model's
    default.
    """
    opt.check_json_target(json, force)
    opt.check_generation(max_new_tokens, None, None, 0)
    constraint = own.constraint_of(max_kl, min_agreement, max_accuracy_drop)
    own.check_measuring(measure_speed, repeats, workers, ray_address)
    base, origin = opt.choose_config(model, config, opt.overrides(skip_layers=skip_layers))
    values = zip(KNOBS, (r, delta_r, alpha, beta, scope, head_reduce), strict=True)
    drawn = own.draws(seeds, method or ())
    grid = expand(base, {name: given or () for name, given in values}, method or (PLPHP,), drawn)
    check_folder(folder := _folder(out), resume)
    check_model(model, options)
    questions, grid = _each_once(read_questions(image, prompt, data, system, max_pixels), grid)
    _check_questions(questions, constraint)
    say(f"base config: {origin}: {config_line(base)}")
    request = SweepRequest(
        questions=questions,
        grid=grid,
        constraint=constraint,
        model=model,
        out=folder,
        options=options,
        max_pixels=max_pixels,
        max_new_tokens=max_new_tokens,
        measure_speed=measure_speed,
        repeats=repeats,
        workers=workers,
        ray_address=ray_address,
        resume=resume,
        inputs=_prompt_words(questions, data, system),
        command=tuple(context.obj or sys.argv),
    )
    return execute(request, json, force, live=not no_live)


def execute(request: SweepRequest, json: str | None, force: bool, live: bool) -> int:
    """Measure, write and print what came of it, and return the exit code.

    Args:
        request: what to measure.
        json: where the record goes as well, `-` for stdout.
        force: overwrite that file.
        live: whether a live table may be drawn.

    Raises:
        PLPHPError: it failed; what was measured by then has been kept, written and printed.
    """
    _say_size(request)
    interrupted, failure = False, None
    record: SweepRecord | None = None
    with Interrupts() as interrupts:
        with _progress(live) as show, contextlib.ExitStack() as folder:
            session: SweepSession | None = None
            show(SweepProgress(0, 0, None, f"loading {one_line(request.model)}"))
            try:
                session = folder.enter_context(_session(request, show, interrupts.check))
                session.prepare()
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
            if session is not None and (session.started or not interrupted):
                record = _with_next(session.record(interrupted or failure is not None), request)
        if record is None:
            say("interrupted before anything was measured: no report was written")
            return interrupts.exit_code
        unwritten = _write(record, request.out, json, force)
        _print(record, json == "-")
    failure = failure or (None if interrupted else unwritten)
    if failure is not None:
        raise failure
    return interrupts.exit_code if interrupts.received is not None else 0


def _session(
    request: SweepRequest, show: Callable[[SweepProgress], None], check: Callable[[], None]
) -> "SweepSession":
    # Its import takes seconds, and a Ctrl-C may fall into them.
    from plphp_cli.sweep.session import SweepSession

    return SweepSession(request, show, check)


def _with_next(record: SweepRecord, request: SweepRequest) -> SweepRecord:
    """The record with the recommended config's file and the command that goes on from it."""
    found = record.recommendation
    if found is None or found.point is None:
        return record
    file = str(request.out / RECOMMENDED)
    command = shlex.join(
        ["plphp", "profile", "--config", file, *request.inputs, *_model_words(request), "--compare-baseline"]
    )
    return dataclasses.replace(
        record, recommendation=dataclasses.replace(found, config_file=file, next_command=command)
    )


def _write(record: SweepRecord, folder: Path, json: str | None, force: bool) -> PLPHPError | None:
    """The files first: an impatient Ctrl-C costs the report on the terminal only."""
    from plphp_cli.reports.sweep_csv import sweep_csv
    from plphp_cli.reports.sweep_html import sweep_html

    say(f"results: {folder / RESULTS}")
    chosen = _recommended(record)
    # What is in the folder is the sweep's own, and every invocation makes it anew.
    own: dict[str, tuple[str, Callable[[], str]]] = {
        "report": (str(folder / REPORT), lambda: to_json(record) + "\n"),
        "csv": (str(folder / SUMMARY), lambda: sweep_csv(record)),
        "html": (str(folder / PAGE), lambda: sweep_html(record)),
    }
    if chosen is not None:
        own["config"] = str(folder / RECOMMENDED), lambda: dumps(chosen.to_dict(), indent=2) + "\n"
    else:
        # That of an earlier invocation does not keep to what is asked now.
        (folder / RECOMMENDED).unlink(missing_ok=True)
    failure = write_files(own, force=True)
    if json is not None and json != "-":
        asked = write_files({"json": (json, lambda: to_json(record) + "\n")}, force)
        failure = failure or asked
    if failure is not None and record.interrupted:
        print_error(failure.message, failure.hint)
    return failure


def _recommended(record: SweepRecord) -> PLPHPConfig | None:
    found = record.recommendation
    return None if found is None or found.point is None else record.points[found.point].setting.config


def _print(record: SweepRecord, json_on_stdout: bool) -> None:
    """The report is the answer and goes to stdout, unless the JSON does."""
    from plphp_cli.reports.sweep_terminal import sweep_report

    console = stderr_console()
    if json_on_stdout:
        write_stdout(to_json(record))
    elif sys.stdout is not None:
        console = Console(file=sys.stdout, markup=False, emoji=False, highlight=False)
    if record.points:
        colour = console.color_system is not None and not console.no_color
        print_lines(sweep_report(record, console.width, colour), console)
    if record.interrupted:
        say("interrupted: continue with the same command and --resume")


def _folder(out: str) -> Path:
    if not out:
        raise UsageError("--out is empty", hint="name a folder")
    return Path(out)


def _each_once(questions: tuple[Question, ...], grid: Grid) -> tuple[tuple[Question, ...], Grid]:
    """The prompts without repetitions, which are told: a prompt that counts twice says nothing new."""
    once = {prompt_id(question): question for question in reversed(questions)}
    kept = tuple(reversed(once.values()))
    if len(kept) < len(questions):
        count = len(questions) - len(kept)
        text = f"{count} prompt{'s'[: count > 1]} given more than once: each counts once"
        grid = dataclasses.replace(grid, warnings=(*grid.warnings, text))
    return kept, grid


def _check_questions(questions: tuple[Question, ...], constraint: Constraint) -> None:
    if not any(question.images for question in questions):
        raise UsageError(
            "no prompt has an image, so there is nothing to prune", hint="name files with --image"
        )
    if constraint.name == "accuracy_drop" and all(question.answer is None for question in questions):
        raise UsageError(
            "--max-accuracy-drop was given, but no prompt has an expected answer",
            hint="give `answer` in the lines of --data, or use --max-kl",
        )


def _prompt_words(questions: tuple[Question, ...], data: str | None, system: str | None) -> tuple[str, ...]:
    """The words that give another command the same prompts."""
    said = () if system is None else ("--system", system)
    if data is not None:
        return "--data", data, *said
    return "--image", *(image.path for image in questions[0].images), "--prompt", questions[0].prompt, *said


def _model_words(request: SweepRequest) -> list[str]:
    """The words that give another command the same model, run in the same way."""
    typed = {
        "--model": (request.model, "builtin"),
        "--max-pixels": (request.max_pixels, None),
        "--max-new-tokens": (request.max_new_tokens, 128),
    }
    words = [word for name, (value, usual) in typed.items() if value != usual for word in (name, str(value))]
    return [*words, *request.options.words()]


def _say_size(request: SweepRequest) -> None:
    """What is about to be done, and what is not: a combination that is skipped is never silent."""
    grid, prompts = request.grid, len(request.questions)
    settings = len(grid.settings)
    say(f"{settings} settings (the unpruned baseline among them) on {prompts} prompt{'s'[: prompts != 1]}")
    if grid.skipped:
        say(f"{len(grid.skipped)} combinations skipped, such as: {grid.skipped[0].reason}")
    for warning in grid.warnings:
        say(f"note: {warning}")


@contextlib.contextmanager
def _progress(live: bool) -> Iterator[Callable[[SweepProgress], None]]:
    """A live table on a terminal, else a line per prompt."""
    console = stderr_console()
    if not (live and console.is_terminal):
        said: list[str] = []

        def tell(progress: SweepProgress) -> None:
            if said[-1:] != [progress.stage]:
                said[:] = [progress.stage]
                left = progress.remaining_s
                say(progress.stage + ("" if left is None else f" (about {time_left(left)} left)"))

        yield tell
        return
    from plphp_cli.reports.sweep_live import sweep_live

    latest = [SweepProgress(0, 0, None, "starting")]
    with sweep_live(console, lambda: latest[0]):
        yield lambda progress: latest.__setitem__(0, progress)
