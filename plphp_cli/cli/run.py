"""`plphp run`: answer a prompt about images with PLPHP, then without, and compare."""

import contextlib
import sys
from dataclasses import replace
from typing import Any

import typer

from plphp_cli import parallel
from plphp_cli.chat.records import RECUTS
from plphp_cli.cli import options as opt
from plphp_cli.cli.answers import answer_file, check_batch
from plphp_cli.cli.chat import converse
from plphp_cli.cli.dummy_options import CompileOption
from plphp_cli.cli.failures import explained
from plphp_cli.cli.interrupts import WHILE_LOADING, Interrupts
from plphp_cli.cli.load_options import check_model, with_load_options
from plphp_cli.cli.output import (
    Answer,
    live_is_possible,
    live_view,
    print_error,
    print_lines,
    say,
    stderr_console,
    write_files,
    write_stdout,
)
from plphp_cli.cli.questions import read_questions
from plphp_cli.cli.session import PRUNED, UNPRUNED, RunRequest, RunSession
from plphp_cli.errors import PLPHPError, UsageError
from plphp_cli.images import load_image
from plphp_cli.models.options import DEFAULTS, LoadOptions
from plphp_cli.reports.terminal import config_line, run_report
from plphp_cli.results import to_json


@with_load_options
@opt.with_knobs
def run(
    context: typer.Context,
    image: opt.ImageOption = None,
    prompt: opt.PromptOption = None,
    system: opt.SystemOption = None,
    raw_prompt: opt.RawPromptOption = False,
    chat: opt.ChatOption = False,
    data: opt.DataOption = None,
    batch_size: opt.PromptsOption = 1,
    max_pixels: opt.MaxPixelsOption = None,
    model: opt.ModelOption = "builtin",
    options: LoadOptions = DEFAULTS,
    config: opt.ConfigOption = None,
    knobs: dict[str, Any] = opt.NO_KNOBS,
    recut: opt.RecutOption = None,
    max_new_tokens: opt.MaxNewTokensOption = 128,
    temperature: opt.TemperatureOption = None,
    top_p: opt.TopPOption = None,
    stop: opt.StopOption = None,
    seed: opt.SeedOption = 0,
    compile: CompileOption = False,
    no_baseline: opt.NoBaselineOption = False,
    json: opt.JsonOption = None,
    force: opt.ForceOption = False,
    no_live: opt.NoLiveOption = False,
    debug: opt.DebugOption = False,
) -> int:
    """Answer a prompt about images with PLPHP, then without, and compare text, speed and memory.

    On a terminal a live view shows both; otherwise stdout is the answer alone.
    """
    opt.check_json_target(json, force)
    generation = opt.check_generation(max_new_tokens, temperature, top_p, seed, stop)
    chosen, origin = opt.choose_config(model, config, knobs)
    check_batch(batch_size, data, chat)
    request = RunRequest(
        images=(),
        prompt="",
        system=system,
        raw_prompt=raw_prompt,
        model=model,
        config=chosen,
        config_origin=origin,
        generation=generation,
        baseline=not no_baseline,
        options=options,
        command=tuple(context.obj or sys.argv),
        compile=compile,
    )
    if data is not None:
        if raw_prompt or recut is not None:
            raise UsageError("--data takes neither --raw-prompt nor --recut", hint="leave them out")
        if parallel.world_size() > 1:
            raise UsageError("--data under torchrun is not supported", hint="use one process")
        questions = read_questions(image, prompt, data, system, max_pixels)
        check_model(model, options)
        return answer_file(replace(request, baseline=False), questions, batch_size, json, force)
    recut = _check_chat(chat, recut, image, prompt, raw_prompt, compile)
    text = _read_texts(chat, prompt, system, raw_prompt)
    shown = tuple(load_image(path, max_pixels) for path in image or ())
    check_model(model, options)
    request = replace(request, images=shown, prompt=text)
    if chat:
        return converse(request, recut, max_pixels, json_target=json, force=force)
    json = json if parallel.rank() == 0 else None
    return execute(request, json_target=json, force=force, live=not no_live)


def _check_chat(
    chat: bool,
    recut: str | None,
    image: list[str] | None,
    prompt: str | None,
    raw_prompt: bool,
    compiled: bool,
) -> str:
    """Refuse what a conversation, or a single question, cannot have; returns when the cache is cut."""
    if not chat:
        if recut is not None:
            raise UsageError("--recut is for conversations", hint="give --chat, too")
        if not image:
            raise UsageError("no image was given", hint="name one or more files with --image")
        return RECUTS[0]
    if parallel.world_size() > 1:
        raise UsageError("--chat under torchrun is not supported", hint="use one process")
    if recut not in (None, *RECUTS):
        raise UsageError(f"recut {recut!r}; expected {' or '.join(RECUTS)}")
    if raw_prompt:
        raise UsageError("--chat and --raw-prompt exclude each other", hint="a raw prompt has no turns")
    if compiled:
        raise UsageError(
            "--chat and --compile exclude each other", hint="a conversation's steps run uncompiled"
        )
    if prompt == "-":
        raise UsageError(
            "--chat reads its questions from stdin, one a line", hint="leave out --prompt -, or give the text"
        )
    return recut or RECUTS[0]


def _read_texts(chat: bool, prompt: str | None, system: str | None, raw_prompt: bool) -> str:
    """The prompt (empty for a conversation that begins at the terminal), both texts checked."""
    text = "" if chat and prompt is None else opt.read_prompt(prompt)
    if system is not None:
        opt.check_text("system message", system)
        if raw_prompt:
            raise UsageError("--system and --raw-prompt exclude each other", hint="write it into the prompt")
    return text


def execute(request: "RunRequest", *, json_target: str | None, force: bool, live: bool) -> int:
    """Run a checked request, write and print what came of it, and return the exit code.

    Raises:
        PLPHPError: it failed; what was known by then has been written and printed.
        BrokenPipeError: nobody reads the output any more; what was known by then is in the JSON file.
    """
    with_view = live_is_possible(live, json_target)
    answer = Answer(enabled=not with_view and json_target != "-")
    say(f"config: {request.config_origin}: {config_line(request.config)}")
    interrupted, failure = False, None
    with Interrupts() as interrupts:
        session = RunSession(request, say, answer.write, interrupts.check)
        try:
            _work(session, answer, request.baseline, with_view)
            interrupts.check()
        except KeyboardInterrupt:
            interrupted = True
        except Exception as error:
            # An interrupted import or kernel may surface as an error of its own.
            interrupted = interrupts.received is not None
            failure = None if interrupted else explained(error)
            if failure is not None and not (session.answered or isinstance(failure, BrokenPipeError)):
                raise
        interrupts.hold()
        if interrupted and not session.loaded:
            say(WHILE_LOADING)
            return interrupts.exit_code
        if interrupted or isinstance(failure, BrokenPipeError):
            session.interrupt()
        unwritten = _finish(session, answer, json_target, force, interrupted, failure)
    if unwritten is not None:
        if failure is not None or interrupted:
            print_error(unwritten.message, unwritten.hint)
        else:
            raise unwritten
    if failure is not None:
        raise failure
    return interrupts.exit_code if interrupts.received is not None else 0


def _work(session: RunSession, answer: Answer, baseline: bool, with_view: bool) -> None:
    session.load()
    with live_view(lambda: session.snapshot) if with_view else contextlib.nullcontext():
        session.warm_up()
        for arm in (PRUNED, UNPRUNED) if baseline else (PRUNED,):
            if not with_view:
                say(f"{arm} arm")
            session.run_arm(arm)
            answer.end()


def _finish(
    session: RunSession,
    answer: Answer,
    json_target: str | None,
    force: bool,
    interrupted: bool,
    failure: Exception | None,
) -> PLPHPError | None:
    """Write the record, then print the report: an impatient Ctrl-C costs the report first.

    Returns why the record could not be written, if it could not.
    """
    unread = isinstance(failure, BrokenPipeError)
    notes = [] if failure is None or unread else [f"the unpruned arm failed: {failure}"]
    record = session.record(interrupted or unread, notes)
    wanted = {} if json_target in (None, "-") else {"record": (json_target, lambda: to_json(record) + "\n")}
    unwritten = write_files(wanted, force)
    if unread:
        return unwritten
    answer.end()
    if json_target == "-":
        write_stdout(to_json(record))
    console = stderr_console()
    for note in session.engine_notes():
        say(f"note: {note}")
    if session.started:
        colour = console.color_system is not None and not console.no_color
        print_lines(run_report(record, console.width, colour), console)
    if interrupted:
        say("interrupted" if session.started else "interrupted before anything was generated")
    return unwritten
