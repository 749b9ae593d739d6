"""`plphp run --data`: a file of prompts, answered in batches; one JSON line a prompt on stdout."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from plphp_cli.answering import Answering, AnswerRecord, AnswersRecord
from plphp_cli.cli.failures import explained
from plphp_cli.cli.interrupts import WHILE_LOADING, Interrupts
from plphp_cli.cli.loading import load_model, model_notes, settings_of
from plphp_cli.cli.output import print_error, say, write_files, write_stdout
from plphp_cli.cli.session import RunRequest
from plphp_cli.errors import UsageError
from plphp_cli.profiling.state import Question
from plphp_cli.reports.profile_text import compiled_steps, plural
from plphp_cli.reports.terminal import config_line
from plphp_cli.results import CompileRecord
from plphp_cli.serialize import to_json
from plphp_cli.units import format_bytes, format_percent, format_rate, format_seconds

# Of an answer's record, what a line on stdout has; the rest is in the JSON file.
_ON_STDOUT = ("line", "images", "prompt", "text", "expected", "stop_reason", "new_tokens", "kv_bytes_held")


def check_batch(batch_size: int, data: str | None, chat: bool) -> None:
    """Refuse a batch of nothing. Raises `UsageError`."""
    if batch_size < 1:
        raise UsageError(f"batch-size = {batch_size}; expected 1 or more")
    if data is None and batch_size > 1:
        raise UsageError("--batch-size is for a file of prompts", hint="give --data FILE")
    if data is not None and chat:
        raise UsageError("--data and --chat exclude each other", hint="use one or the other")


def answer_file(
    request: RunRequest, questions: Sequence[Question], batch_size: int, json_target: str | None, force: bool
) -> int:
    """Answer every prompt with PLPHP, print each as its batch ends, and return the exit code.

    Raises:
        PLPHPError: it failed; what was answered by then has been printed and written.
    """
    say(f"config: {request.config_origin}: {config_line(request.config)}")
    failure: Exception | None = None
    interrupted = False
    with Interrupts() as interrupts:
        work = None
        try:
            work, record_of = _begin(request, batch_size, json_target != "-", interrupts)
            work.run(questions)
            interrupts.check()
        except KeyboardInterrupt:
            interrupted = True
        except Exception as error:
            interrupted = interrupts.received is not None
            failure = None if interrupted else explained(error)
            if failure is not None and (work is None or not work.answers):
                raise
        interrupts.hold()
        unwritten = None
        if work is not None:
            record = record_of(interrupted or failure is not None)
            if json_target is not None and json_target != "-":
                unwritten = write_files({"record": (json_target, lambda: to_json(record) + "\n")}, force)
            if json_target == "-":
                write_stdout(to_json(record))
            for note in work.remarks():
                say(f"note: {note}")
            _summary(record)
        if interrupted:
            say(WHILE_LOADING if work is None else "interrupted")
    if unwritten is not None and (failure is not None or interrupted):
        print_error(unwritten.message, unwritten.hint)
    elif unwritten is not None:
        raise unwritten
    if failure is not None:
        raise failure
    return interrupts.exit_code if interrupts.received is not None else 0


def _begin(
    request: RunRequest, batch_size: int, lines: bool, interrupts: Interrupts
) -> tuple[Answering, Any]:
    """The work, with the model loaded, and what makes its record (told whether it was broken off)."""
    loaded = load_model(request.model, request.options, say, interrupts.check)
    from plphp_cli.compiled import caveats
    from plphp_cli.decoding import step_compiler
    from plphp_cli.environment import environment

    settings = settings_of(request.generation)
    compiler = step_compiler(loaded) if request.compile else None
    for note in (*model_notes(loaded), *(caveats(loaded) if request.compile else ())):
        say(f"note: {note}")

    def answered(record: AnswerRecord) -> None:
        if lines:
            shown = {name: value for name, value in dataclasses.asdict(record).items() if name in _ON_STDOUT}
            write_stdout(json.dumps(shown))

    work = Answering(loaded, request.config, settings, batch_size, compiler, answered, interrupts.check)

    def record(interrupted: bool) -> AnswersRecord:
        return AnswersRecord(
            model=loaded.name,
            config=request.config,
            generation=request.generation,
            batch_size=batch_size,
            answers=tuple(work.answers),
            prefill_s=work.prefill_s,
            decode_s=work.decode_s,
            decode_tokens_per_s=work.decode_tokens_per_s,
            compiled=None if compiler is None else CompileRecord.from_stats(compiler.stats),
            environment=environment(
                loaded=loaded, config=request.config, seed=request.generation.seed, command=request.command
            ),
            interrupted=interrupted,
        )

    return work, record


def _summary(record: AnswersRecord) -> None:
    held = sum(answer.kv_bytes_held for answer in record.answers)
    full = sum(answer.kv_bytes_full for answer in record.answers)
    say(
        f"{plural(len(record.answers), 'answer')} in batches of {record.batch_size}, without a warm-up: "
        f"prefill in all {format_seconds(record.prefill_s)}, "
        f"decoding together {format_rate(record.decode_tokens_per_s)}"
    )
    share = held / full if full else None
    say(
        f"KV cache held {format_bytes(held)} of {format_bytes(full)} ({format_percent(share)}) over all "
        "prompts; nothing is padded"
    )
    if record.compiled is not None:
        say(compiled_steps(record.compiled))
    right = [a.text.strip() == a.expected.strip() for a in record.answers if a.expected is not None]
    if right:
        say(f"{sum(right)} of {len(right)} answers are the expected ones")
