"""Files written whole or not at all."""

import os
import stat
import tempfile
from pathlib import Path

from plphp_cli.errors import PLPHPError, UsageError


def check_writable(path: str | os.PathLike[str], force: bool = False) -> None:
    """Fail before minutes of work where `write_text` would fail after them, with the same `UsageError`."""
    try:
        target = Path(path).resolve()
        if target.is_dir():
            raise UsageError(f"cannot write {path}: it is a directory", hint="name a file in it")
        if target.exists() and not _is_special(target) and not force:
            raise UsageError(
                f"{path} exists already", hint="choose another name, or overwrite it with --force"
            )
        if not target.parent.is_dir():
            raise UsageError(
                f"cannot write {path}: there is no folder {target.parent}", hint="create the folder first"
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"cannot write {path!r}: {getattr(error, 'strerror', None) or error}") from error
    if not _is_special(target) and not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"cannot write {path}: no permission to write in {target.parent}", hint="name another folder"
        )


def write_text(path: str | os.PathLike[str], text: str, force: bool = False) -> None:
    """Write a file whole or not at all: into a temporary file beside it, then renamed.

    A link is followed; a device or pipe (`/dev/null`) is written to, never replaced.

    Raises:
        UsageError: the file exists and `force` is not set, it is a directory, or its folder is missing or
            read-only.
        PLPHPError: writing failed (a full disk); a file that existed is then as it was.
    """
    check_writable(path, force)
    target = Path(path).resolve()
    draft: Path | None = None
    try:
        if _is_special(target):
            target.write_text(text, encoding="utf-8")
            return
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name[:60]}.", delete=False
        ) as file:
            draft = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private by default; a report is as readable as any file the user writes.
        os.umask(umask := os.umask(0))
        draft.chmod(0o666 & ~umask)
        draft.replace(target)
    except OSError as error:
        raise PLPHPError(
            f"cannot write {path}: {error.strerror or error}", hint="free some space, or name another folder"
        ) from error
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)


def write_beside(path: str | os.PathLike[str], text: str, force: bool = False) -> Path:
    """`write_text`, or a free name beside it (`report.1.json`) if the name was taken during the work.

    Returns where it was written. Raises what `write_text` raises for any other reason.
    """
    target = Path(path)
    for number in range(1, 1000):
        try:
            write_text(target, text, force)
        except UsageError:
            if force or not Path(target).is_file():
                raise
            target = Path(path).with_name(f"{Path(path).stem}.{number}{Path(path).suffix}")
        else:
            return target
    raise UsageError(f"{path} exists already, and a thousand others beside it", hint="name another folder")


def _is_special(target: Path) -> bool:
    """Whether the path is a device, pipe or socket: something a rename must not replace."""
    return target.exists() and not stat.S_ISREG(target.stat().st_mode) and not target.is_dir()
