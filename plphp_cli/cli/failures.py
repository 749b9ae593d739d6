"""Failures of other libraries, told as this project's errors."""

import re

from plphp_cli import parallel
from plphp_cli.errors import DeviceMemoryError, PLPHPError
from plphp_cli.units import format_bytes

# What torch says that it asked for in vain: on CUDA in its own units, on a CPU in bytes.
_ASKED = re.compile(r"tried to allocate ([\d.]+ [KMGTP]iB|\d+ bytes)", re.IGNORECASE)
_FREE = re.compile(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")


def explained(error: Exception) -> Exception:
    """The error that tells a user what to try, where the failure is of a kind that is known; else itself."""
    if parallel.is_lost_rank(error):
        return PLPHPError(
            "another rank of this run has ended", hint="repeat with --debug: every rank then says why it ends"
        )
    if isinstance(error, PLPHPError) or not is_out_of_memory(error):
        return error
    return DeviceMemoryError(
        f"out of memory{_sizes(str(error))}",
        hint="try --max-pixels, fewer images, --dtype bfloat16, fewer --max-new-tokens or a smaller model",
    )


def _sizes(text: str) -> str:
    """What was needed and what there is, in words, as far as an error says it."""
    asked, free = _ASKED.search(text), _FREE.search(text)
    if asked is None:
        return ""
    size = asked[1]
    if size.endswith(" bytes"):
        size = format_bytes(int(size.removesuffix(" bytes")))
    return f": {size} more were needed" + (f"; {free[2]} of {free[1]} are free" if free else "")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left; torch says so in ways that differ by device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text or "not enough memory" in text
    )
