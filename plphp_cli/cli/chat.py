"""`plphp run --chat`: questions from the terminal or a pipe, line by line, about images that may join."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from plphp_cli.cli.chat_session import ChatSession
from plphp_cli.cli.failures import explained
from plphp_cli.cli.interrupts import WHILE_LOADING, Interrupts
from plphp_cli.cli.options import MAX_PROMPT_BYTES
from plphp_cli.cli.output import Answer, print_error, say, say_wrapped, write_files, write_stdout
from plphp_cli.cli.session import RunRequest
from plphp_cli.errors import PLPHPError, UsageError
from plphp_cli.reports.chat import closing_line, quality_lines, turn_line
from plphp_cli.reports.terminal import config_line
from plphp_cli.results import to_json

HELP = "/image FILE joins the next question; /quit, an empty line or Ctrl-D ends"
_COMMANDS = "there are /image FILE and /quit"


def converse(
    request: RunRequest, recut: str, max_pixels: int | None, *, json_target: str | None, force: bool
) -> int:
    """Hold a conversation, write and print what came of it, and return the exit code.

    At a terminal a failed question can be asked otherwise, and Ctrl-C during an answer ends that answer; from
    a pipe both end the conversation, as does Ctrl-C at the prompt. The line of a pipe that failed is told by
    its number; what was answered before it is printed and recorded, and what comes after it is not asked.

    Args:
        request: checked; its prompt, if there is one, is the first question.
        recut: `each-turn` or `first-turn`.
        max_pixels: of images that join later.
        json_target: a file for the record, `-` for stdout, or None.
        force: overwrite that file.

    Raises:
        PLPHPError: it failed; what was known by then has been written and printed.
        BrokenPipeError: nobody reads the output any more; what was known by then is in the JSON file.
    """
    answer = Answer(enabled=json_target != "-")
    say_wrapped(f"config: {request.config_origin}: {config_line(request.config)}")
    interrupted, failure = False, None
    with Interrupts() as interrupts:
        session = ChatSession(request, recut, max_pixels, say_wrapped, answer.write, interrupts.check)
        try:
            session.load()
            loop = _Loop(session, answer, interrupts, judge=request.baseline, streams=json_target != "-")
            loop.run(request.prompt)
            interrupts.check()
        except KeyboardInterrupt:
            interrupted = True
        except Exception as error:
            # An interrupted import or kernel may surface as an error of its own.
            interrupted = interrupts.received is not None
            failure = None if interrupted else explained(error)
            if failure is not None and not session.turns:
                raise
        interrupts.hold()
        if interrupted and not session.loaded:
            say(WHILE_LOADING)
            return interrupts.exit_code
        unwritten = _finish(session, answer, json_target, force, interrupted, failure)
    if unwritten is not None:
        if failure is None and not interrupted:
            raise unwritten
        print_error(unwritten.message, unwritten.hint)
    if failure is not None:
        raise failure
    return interrupts.exit_code if interrupts.received is not None else 0


def _finish(
    session: ChatSession,
    answer: Answer,
    json_target: str | None,
    force: bool,
    interrupted: bool,
    failure: Exception | None,
) -> PLPHPError | None:
    """Write the record and say how the conversation ended; returns why it could not be written, if so."""
    unread = isinstance(failure, BrokenPipeError)
    notes = [] if failure is None or unread else [f"the last question failed: {failure}"]
    record = session.record(interrupted or unread, notes)
    wanted = {} if json_target in (None, "-") else {"record": (json_target, lambda: to_json(record) + "\n")}
    unwritten = write_files(wanted, force)
    if not unread:
        answer.end()
        if json_target == "-":
            write_stdout(to_json(record))
    if closing := closing_line(record):
        say_wrapped(closing)
    if interrupted:
        say("interrupted")
    return unwritten


class _Loop:
    """Lines in, turns out."""

    def __init__(
        self, session: ChatSession, answer: Answer, interrupts: Interrupts, *, judge: bool, streams: bool
    ) -> None:
        self._session, self._answer, self._interrupts = session, answer, interrupts
        self._judge, self._streams = judge, streams
        self._interactive = sys.stdin is not None and sys.stdin.isatty()
        self._line_number = 0

    def run(self, first: str) -> None:
        """Ask `first`, unless it is empty, then what is typed. Raises `KeyboardInterrupt` at the prompt."""
        if first:
            self._attempt(first)
        elif self._interactive:
            say(HELP)
        asked = bool(first)
        for line in self._lines():
            asked = True
            self._attempt(line)
        if not asked and not self._interactive:
            raise UsageError("no question came from stdin", hint="write one question a line, or use --prompt")

    def _attempt(self, line: str) -> None:
        """One line; what goes wrong with it is told at a terminal, and raised where nobody could react."""
        try:
            self._obey(line)
        except Exception as error:
            self._interrupts.check()
            failure = explained(error)
            if not isinstance(failure, PLPHPError):
                raise
            if not self._interactive:
                raise self._placed(failure) from error
            self._answer.end()
            print_error(failure.message, failure.hint)

    def _placed(self, failure: PLPHPError) -> PLPHPError:
        """A failure with the line of stdin that it is about; as it is if that did not come from there."""
        if not self._line_number:
            return failure
        return type(failure)(f"line {self._line_number} of stdin: {failure.message}", hint=failure.hint)

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/image":
            if not rest.strip():
                raise UsageError("/image names no file: write /image FILE")
            self._session.join(str(Path(rest.strip()).expanduser()))
            say("the image joins with the next question")
        elif command.startswith("/"):
            raise UsageError(f"unknown command {command!r}: {_COMMANDS}")
        else:
            self._turn(line)

    def _turn(self, question: str) -> None:
        if not self._interactive:
            say_wrapped(f"> {question}")
        if not self._broken_off(lambda: self._session.ask(question)) and self._judge:
            self._answer.end()
            self._broken_off(self._session.judge)
        self._answer.end()
        turn = self._session.turns[-1]
        if not self._streams:
            say_wrapped(turn.answer)
        elif not turn.answer:
            write_stdout("")  # each question has its line, whatever the answer
        for line in (turn_line(turn), *(quality_lines(turn) if self._judge else ())):
            say_wrapped(line, "dim")

    def _broken_off(self, work: Callable[[], None]) -> bool:
        """Do it; True if Ctrl-C at a terminal ended it. Other signals, and a pipe's, end everything."""
        try:
            work()
            self._interrupts.check()
        except (KeyboardInterrupt, Exception) as error:
            received = self._interrupts.received
            if received is None:
                raise
            if not self._interactive or received != signal.SIGINT:
                raise KeyboardInterrupt from error
            self._interrupts.forget()
            self._answer.end()
            say("interrupted: Ctrl-C once more ends the conversation")
            return True
        return False

    def _lines(self) -> Iterator[str]:
        """What is typed, line by line, until /quit, the end of stdin or, at a terminal, an empty line.

        Raises:
            UsageError: a line is not UTF-8, or longer than any model could read.
        """
        while sys.stdin is not None:
            try:
                raw = self._line()
            except UsageError as error:
                if not self._interactive:
                    raise
                print_error(error.message, error.hint)
                continue
            line = raw.strip()
            if line == "/quit" or not (line if self._interactive else raw):
                return
            if line:
                yield line

    def _line(self) -> str:
        if self._interactive:
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            raw = sys.stdin.buffer.readline(MAX_PROMPT_BYTES + 1)
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            raise
        if self._interactive and not raw.endswith(b"\n"):
            sys.stderr.write("\n")
        self._line_number += 1
        if len(raw) > MAX_PROMPT_BYTES:
            raise UsageError(
                f"line {self._line_number} of stdin is longer than 4 MiB", hint="shorten the question"
            )
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            what = f"byte {error.start} is 0x{raw[error.start]:02x}"
            raise UsageError(
                f"line {self._line_number} of stdin is not UTF-8: {what}",
                hint="convert it, e.g. with iconv -t utf-8",
            ) from error
