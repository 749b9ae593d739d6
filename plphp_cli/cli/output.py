"""Where things are written: the answer to stdout, all else to stderr, and the live view on a terminal."""

import contextlib
import io
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from plphp_cli.errors import PLPHPError
from plphp_cli.files import write_beside, write_text
from plphp_cli.reports.columns import paragraph
from plphp_cli.reports.live import LiveView, restore
from plphp_cli.reports.snapshot import LiveSnapshot
from plphp_cli.reports.text import for_encoding, one_line, visible
from plphp_cli.serialize import to_json


def say(message: str, style: str = "") -> None:
    """One line on stderr; control characters in it are shown, never obeyed."""
    print_lines([Text(one_line(message), style)])


def say_wrapped(message: str, style: str = "") -> None:
    """`say`, in lines of at most the terminal's width, or 80 characters: further ones are indented."""
    console = stderr_console()
    lines = paragraph(one_line(message), console.width, "  ")
    print_lines([Text(line, style) for line in lines], console)


def print_error(message: str, hint: str | None = None) -> None:
    """`error: message` and a line with the hint on stderr."""
    # Plain writes: an error must come out whole, whatever the terminal's width.
    lines = [f"error: {one_line(message)}"] + ([f"hint: {one_line(hint)}"] if hint else [])
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()


def print_lines(lines: Sequence[Text], console: Console | None = None) -> None:
    """Lines on stderr, styled where it is a terminal."""
    console = console or stderr_console()
    for line in lines:
        console.print(for_encoding(line, console.encoding), soft_wrap=True)


def stderr_console() -> Console:
    """A console on stderr that interprets neither markup nor emoji codes, nor highlights numbers."""
    # The stream itself: a console told `stderr=True` would follow whatever replaces it for a while.
    return Console(file=sys.stderr, markup=False, emoji=False, highlight=False)


def live_is_possible(wanted: bool, json_target: str | None) -> bool:
    """Whether the live view may be drawn: both streams are a terminal that can do it, and stdout is free."""
    terminals = all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))
    return wanted and terminals and json_target != "-" and os.environ.get("TERM", "dumb") != "dumb"


class Answer:
    """The answer as it is generated, on stdout: each piece at once, controls as visible escapes."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled and sys.stdout is not None
        self._open = False

    def write(self, text: str) -> None:
        """Write and flush a piece. Raises `BrokenPipeError` when nobody reads any more."""
        if self._enabled and text:
            self._open = True
            sys.stdout.write(visible(text))
            sys.stdout.flush()

    def end(self) -> None:
        """End the line, if one was begun."""
        if self._open:
            self._open = False
            sys.stdout.write("\n")
            sys.stdout.flush()


def write_files(files: Mapping[str, tuple[str, Callable[[], str]]], force: bool) -> PLPHPError | None:
    """Write what the work came to; a file that cannot be written costs neither the others nor the report.

    Args:
        files: by kind, where it goes and what makes its text.
        force: overwrite.

    Returns:
        The last failure, for the caller to raise at the end; those before it have been printed.
    """
    failure: PLPHPError | None = None
    for kind, (path, make) in files.items():
        if failure is not None:
            print_error(failure.message, failure.hint)
        try:
            say(f"{kind}: {write_beside(path, make(), force)}")
        except PLPHPError as error:
            failure = error
        except Exception as error:  # noqa: BLE001  (a plot that fails must not cost the measurement)
            failure = PLPHPError(f"cannot write the {kind} file {path}: {type(error).__name__}: {error}")
            failure.__cause__ = error
    return failure


def write_stdout(text: str) -> None:
    """A whole text on stdout, ended by a line break."""
    if sys.stdout is not None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def stdout_width() -> int:
    """Characters in a line of stdout: the terminal's, or 80 where it goes into a file or a pipe."""
    if sys.stdout is None or not sys.stdout.isatty():
        return 80
    return max(shutil.get_terminal_size((80, 24)).columns, 60)


def write_report(record: Any, report: str, json: str | None, force: bool) -> None:
    """The report on stdout, or the record with `--json -`; with `--json FILE` the record also in a file."""
    if json == "-":
        write_stdout(to_json(record))
        return
    write_stdout(report)
    if json is not None:
        write_text(json, to_json(record) + "\n", force)


@contextlib.contextmanager
def suspendable(console: Console) -> Iterator[None]:
    """Ctrl-Z gives the terminal back to the shell while the program is stopped, and takes it again after."""
    stop = getattr(signal, "SIGTSTP", None)
    if stop is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(stop)

    def suspend(number: int, frame: object) -> None:
        restore(console)
        signal.signal(stop, signal.SIG_DFL)
        os.kill(os.getpid(), stop)
        # From here on the program runs again.
        signal.signal(stop, suspend)
        console.set_alt_screen(True)
        console.show_cursor(False)

    signal.signal(stop, suspend)
    try:
        yield
    finally:
        signal.signal(stop, before)


@contextlib.contextmanager
def live_view(source: Callable[[], LiveSnapshot]) -> Iterator[None]:
    """The live view while the context is open; what is written to stderr meanwhile comes out after it."""
    console, held = stderr_console(), io.StringIO()
    stderr = sys.stderr
    try:
        with suspendable(console), contextlib.redirect_stderr(held), LiveView(console, source):
            yield
    finally:
        restore(console)
        if text := held.getvalue():
            stderr.write(visible(text))
            stderr.flush()


def time_left(seconds: float) -> str:
    """Seconds, as roughly as they are known."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(1, round(seconds))} s"
