"""Failures of other libraries, told as this project's errors."""

from plphp_cli import parallel
from plphp_cli.errors import DeviceMemoryError, PLPHPError


def explained(error: Exception) -> Exception:
    """The error that tells a user what to try, where the failure is of a kind that is known; else itself."""
    if parallel.is_lost_rank(error):
        return PLPHPError(
            "another rank of this run has ended", hint="repeat with --debug: every rank then says why it ends"
        )
    if isinstance(error, PLPHPError) or not is_out_of_memory(error):
        return error
    return DeviceMemoryError(
        "out of memory",
        hint="try --max-pixels, fewer images, --dtype bfloat16, fewer --max-new-tokens or a smaller model",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left; torch says so in ways that differ by device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text or "not enough memory" in text
    )
