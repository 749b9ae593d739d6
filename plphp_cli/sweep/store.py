"""The folder of a sweep: rows are appended as they come, and an invocation goes on where another stopped.

`results.jsonl` holds one row a line; of two rows of one setting and prompt the later counts. `run.json` names
what the rows depend on and the prompts: it is written before the first row, whole or not at all.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from plphp_cli.errors import PLPHPError, UsageError
from plphp_cli.files import write_text
from plphp_cli.profiling.state import Question
from plphp_cli.serialize import SCHEMA_VERSION, RecordError, parse, to_json
from plphp_cli.sweep.identity import Identity
from plphp_cli.sweep.records import Row, Setting
from plphp_cli.sweep.request import prompt_id, setting_id

RESULTS, RUN = "results.jsonl", "run.json"
# A row is with the operating system at once; this often at most it is forced onto the disk as well.
SYNC_S = 0.25

Key = tuple[str, str]


@dataclass(frozen=True)
class PromptIdentity:
    """One prompt as `run.json` names it."""

    prompt_id: str
    line: int | None
    prompt: str
    system: str | None
    answer: str | None
    images: tuple[str, ...]
    image_sha256: tuple[str, ...]


@dataclass(frozen=True)
class RunRecord:
    """What the rows of a folder depend on."""

    identity: dict[str, str]
    prompts: tuple[PromptIdentity, ...]
    schema_version: int = SCHEMA_VERSION


def check_folder(folder: Path, resume: bool) -> None:
    """Fail before a model is loaded where `Store` would fail after. Raises `UsageError`."""
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--out {folder} is a file", hint="name a folder")
        inside = sorted(item.name for item in folder.iterdir()) if folder.exists() else []
        if inside and not resume and _has_rows_or_others(folder, inside):
            raise UsageError(
                f"--out {folder} is not empty",
                hint="continue the sweep in it with --resume, or name another folder",
            )
        if inside and RUN not in inside and _has_rows_or_others(folder, inside):
            raise UsageError(f"--out {folder} holds no sweep to resume", hint="name another folder")
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}", hint="name another folder") from error
    # What is missing is made when there is something to put into it.
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--out {folder}: no permission to write in {there}", hint="name another folder")


class Store:
    """The rows of a sweep, in memory and on disk; a context, in which the folder is this process's own.

    Args:
        folder: made if it is missing.
        identity: what rows depend on, from `identity.identity`.
        questions: the prompts, each once.
        resume: take up what is in the folder.

    Raises:
        UsageError: the folder is not empty and `resume` is not set, holds no sweep, is in use, or its rows
            come from another model, tool version or other content, which is named.
        RecordError: a line before the last is not a row.
    """

    def __init__(self, folder: Path, identity: Identity, questions: Sequence[Question], resume: bool) -> None:
        check_folder(folder, resume)
        self._folder = folder
        self._rows: dict[Key, Row] = {}
        self._superseded = 0
        self._synced = 0.0
        self._file = self._open()
        try:
            now = RunRecord(identity, tuple(_identify(question) for question in questions))
            before = self._before()
            self._length = self._read()
            if before is not None:
                self._compare(before, now)
            write_text(folder / RUN, to_json(now) + "\n", force=True)
            self._file.truncate(self._length)
            self._file.seek(self._length)
        except BaseException:
            self._file.close()
            raise
        self.resumed = len(self._rows)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, setting: Setting, prompt: str) -> Row | None:
        """The row of a setting and prompt; None if it was not measured."""
        return self._rows.get((setting_id(setting), prompt))

    def count(self, settings: Iterable[Setting], prompts: Sequence[str]) -> int:
        """How many of the settings' rows on these prompts are there."""
        return sum((name, prompt) in self._rows for name in map(setting_id, settings) for prompt in prompts)

    def append(self, row: Row) -> None:
        """Keep a row, on disk before it is counted.

        Raises:
            PLPHPError: it could not be written (a full disk); what had been written before still stands.
        """
        line = (to_json(row, indent=None) + "\n").encode()
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            # What was written of the line is dropped by the next resume, if it cannot be taken back now.
            with contextlib.suppress(OSError):
                self._file.truncate(self._length)
            raise PLPHPError(
                f"cannot write {self._folder / RESULTS}: {error.strerror or error}",
                hint="free some space, then continue with --resume: nothing measured so far is lost",
            ) from error
        self._length += len(line)
        self._keep(row)

    def close(self) -> None:
        """Bring the rows to the disk, and let the folder go; rows that later ones replaced are dropped."""
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
            if self._superseded:
                lines = [to_json(row, indent=None) + "\n" for row in self._rows.values()]
                write_text(self._folder / RESULTS, "".join(lines), force=True)
        finally:
            self._file.close()

    def _open(self) -> IO[bytes]:
        path = self._folder / RESULTS
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a row that was written is the operating system's, whatever becomes of this process.
            file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}", hint="name another folder") from error
        if not _lock(file):
            file.close()
            raise UsageError(
                f"another sweep is writing to {self._folder}", hint="wait for it, or name another folder"
            )
        return file

    def _before(self) -> RunRecord | None:
        path = self._folder / RUN
        if not path.exists():
            return None
        try:
            return parse(RunRecord, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {path}: {error}", hint="name another folder") from error
        except RecordError as error:
            raise UsageError(f"{path}: {error.message}", hint=error.hint or "name another folder") from error

    def _read(self) -> int:
        """Read the rows; returns the length of the file up to the end of the last whole one."""
        content = self._file.read()
        *lines, _torn = content.split(b"\n")
        length = 0
        for number, line in enumerate(lines, 1):
            try:
                self._keep(parse(Row, line.decode("utf-8")))
            except (RecordError, UnicodeDecodeError) as error:
                if number == len(lines):
                    break
                raise UsageError(
                    f"{self._folder / RESULTS} line {number} is not a row: {error}",
                    hint="it was changed by something else: remove the line, or name another folder",
                ) from error
            length += len(line) + 1
        return length

    def _keep(self, row: Row) -> None:
        key = (setting_id(row.setting), row.prompt_id)
        self._superseded += key in self._rows
        self._rows[key] = row

    def _compare(self, before: RunRecord, now: RunRecord) -> None:
        if not self._rows:
            return
        for what in dict.fromkeys([*before.identity, *now.identity]):
            old, new = before.identity.get(what), now.identity.get(what)
            if old != new:
                raise self._refusal(f"{what} was {old} and is {new}")
        known = {prompt.prompt_id for prompt in now.prompts}
        for place, prompt in enumerate(before.prompts):
            if prompt.prompt_id not in known:
                raise self._refusal(_changed(prompt, now.prompts, place))

    def _refusal(self, difference: str) -> UsageError:
        return UsageError(
            f"the sweep in {self._folder} cannot be continued: {difference}",
            hint="name another folder with --out",
        )


def _has_rows_or_others(folder: Path, inside: Iterable[str]) -> bool:
    """Whether a folder holds more than a sweep that was stopped before it had its first row."""
    others = [name for name in inside if name not in (RESULTS, RUN) and not name.startswith(f".{RUN}.")]
    return bool(others) or (RESULTS in inside and (folder / RESULTS).stat().st_size > 0)


def _identify(question: Question) -> PromptIdentity:
    return PromptIdentity(
        prompt_id=prompt_id(question),
        line=question.line,
        prompt=question.prompt,
        system=question.system,
        answer=question.answer,
        images=tuple(image.path for image in question.images),
        image_sha256=tuple(image.sha256 for image in question.images),
    )


def _changed(old: PromptIdentity, prompts: Sequence[PromptIdentity], place: int) -> str:
    """What became of a prompt that was measured and is not among the prompts now."""
    name = f"prompt {place + 1}" if old.line is None else f"the prompt of line {old.line}"
    new = prompts[place] if place < len(prompts) else None
    if new is None:
        return f"{name} ({old.prompt!r:.60}) is not among the prompts now"
    for path, before, after in zip(old.images, old.image_sha256, new.image_sha256, strict=False):
        if before != after and old.prompt == new.prompt:
            return f"image {path} of {name} has other content (sha256 {before[:12]}, now {after[:12]})"
    for what in ("prompt", "system", "answer"):
        before, after = getattr(old, what), getattr(new, what)
        if before != after:
            return f"{name} has another {_WORDS[what]} ({before!r:.60}, now {after!r:.60})"
    return f"{name} has {len(old.images)} images, now {len(new.images)}"


_WORDS = {"prompt": "text", "system": "system message", "answer": "expected answer"}


def _lock(file: IO[bytes]) -> bool:
    """Take the file for this process until it is closed; False if another has it."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Some network file systems have no locks.
        return True
    return True
