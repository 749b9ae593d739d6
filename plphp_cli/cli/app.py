"""The commands of `plphp`, and the one place where an error becomes a line on stderr and an exit code."""

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from plphp_cli import __version__, parallel
from plphp_cli.cli import calibrate, doctor, models, profile, run, sweep
from plphp_cli.cli.commands import MultiValueCommand, PlainCommand, PlainGroup
from plphp_cli.cli.failures import explained
from plphp_cli.cli.output import print_error
from plphp_cli.cli.sweep_options import SweepCommand
from plphp_cli.errors import PLPHPError

EXIT_INTERRUPTED = 130
# What a shell reports of a program that wrote into a closed pipe: 128 + SIGPIPE.
EXIT_BROKEN_PIPE = 141

app = typer.Typer(
    cls=PlainGroup,
    help="Run vision-language models with PLPHP: per-layer per-head vision token pruning of the KV cache.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Commands, one line each; a command's module imports torch in its functions only.
app.command("run", cls=MultiValueCommand)(run.run)
app.command("profile", cls=MultiValueCommand)(profile.profile)
app.command("sweep", cls=SweepCommand)(sweep.sweep)
app.command("calibrate", cls=MultiValueCommand)(calibrate.calibrate)
app.command("models", cls=PlainCommand)(models.models)
app.command("doctor", cls=PlainCommand)(doctor.doctor)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Show the version and exit.")
    ] = False,
) -> None:
    if version:
        print(f"plphp {__version__}")
        raise typer.Exit
    parallel.refuse_command(context.invoked_subcommand)
    if context.invoked_subcommand is None:
        # typer prints its own help to stdout, which is for answers.
        with contextlib.redirect_stdout(sys.stderr):
            print(context.get_help())
        raise typer.Exit(2)


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    _tolerate_any_encoding()
    debug = "--debug" in argv
    parallel.silence(debug)
    code: Any
    try:
        command: Any = typer.main.get_command(app)
        # Not `command.main`: that would print errors and meet closed pipes in its own way.
        with command.make_context("plphp", list(argv), obj=["plphp", *argv]) as context:
            code = command.invoke(context)
        parallel.leave()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.Exit as leave:
        code = leave.exit_code
    except KeyboardInterrupt:
        print_error("interrupted")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
    # The one catch site: every failure ends as one line, never as a traceback unless asked for.
    except Exception as error:  # noqa: BLE001
        code = _report(error, debug)
    _drop_unwritable_output()
    return int(code)


def _report(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    if isinstance(error, TyperException):
        context = getattr(error, "ctx", None)
        name = context.command_path if context is not None else "plphp"
        print_error(_first_lines(error.format_message()), f"see `{name} --help`")
        return error.exit_code
    error = explained(error)
    if isinstance(error, PLPHPError):
        print_error(error.message, error.hint)
        return error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
        print_error(f"cannot write the output: {error.strerror}", "free some space, or write elsewhere")
        return 1
    what = _first_lines(str(error)) or "no message"
    print_error(f"unexpected {type(error).__name__}: {what}", "repeat with --debug to see where")
    return 1


def _first_lines(message: str) -> str:
    return " ".join(line.strip() for line in message.splitlines() if line.strip())[:500]


def _tolerate_any_encoding() -> None:
    """Whatever the terminal's encoding, a character it lacks is shown as an escape instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_unwritable_output() -> None:
    """Let Python's own flush at exit succeed: what could not be written was reported already."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError):
                continue
