"""What weight files hold, read from their headers: whether they are whole, and the memory that they need.

Importing it does not import torch or transformers.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plphp_cli.errors import DeviceMemoryError, ModelError
from plphp_cli.models.sources import INCOMPLETE, ONLY_SAFETENSORS, Source, again, weight_files
from plphp_cli.units import format_bytes

if TYPE_CHECKING:
    import torch

# A longer header is no header: safetensors' own limit.
_MAX_HEADER = 100_000_000
_FLOATS = ("F64", "F32", "F16", "BF16")
# How a model's weights lie on this machine.
WHOLE, ABSENT, PARTIAL, DAMAGED, FOREIGN = "whole", "none here", "in part", "damaged", "no safetensors"
_SMALLER = "use --dtype bfloat16, --quantize 4bit, or a smaller model"


@dataclass(frozen=True)
class WeightsState:
    """How a model's weights lie on this machine, in a word, and what is wrong with them and what to do."""

    state: str
    problem: str | None = None
    hint: str | None = None

    @property
    def note(self) -> str | None:
        """The problem and what to do about it, in one sentence; None for weights that are whole."""
        return f"{self.problem} ({self.hint})" if self.hint else self.problem


def weights_state(source: Source, ask: bool = False) -> WeightsState:
    """How a model's weights lie on this machine: names, sizes and headers are read, the weights are not.

    Args:
        source: the model.
        ask: the hub what its repository holds, should weights be missing.
    """
    try:
        files = weight_files(source, ask)
    except ModelError as error:
        state, problem = _lacking(source), error.message
        if error.hint == ONLY_SAFETENSORS:
            state = FOREIGN
        if source.revision is None or error.hint != INCOMPLETE:
            return WeightsState(state, problem, error.hint)
        problem = f"the weights of {source.name} are not here yet" if state == ABSENT else problem
        return WeightsState(state, problem, f"`plphp run --model {source.name}` fetches what is missing")
    try:
        needed_bytes(files, source)
    except ModelError as error:
        return WeightsState(DAMAGED, error.message, error.hint)
    except OSError as error:
        return WeightsState(DAMAGED, f"the weights of {source.name} cannot be read: {error.strerror}")
    return WeightsState(WHOLE)


def _lacking(source: Source) -> str:
    """How weights of which not every file is there lie here."""
    folder = source.folder
    if any(path.is_file() for path in folder.glob("*.safetensors")):
        return PARTIAL
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return FOREIGN
    # Beside the snapshots: what a download left that broke off.
    begun = source.revision is not None and any((folder.parent.parent / "blobs").glob("*.incomplete"))
    return PARTIAL if begun else ABSENT


def needed_bytes(files: Iterable[Path], source: Source, dtype: "torch.dtype | None" = None) -> int:
    """Bytes that the weights take once they are loaded.

    Args:
        files: in safetensors.
        source: the model, for messages.
        dtype: that floating point weights are loaded in; None for that of the files.

    Raises:
        ModelError: a file is not whole, or is no safetensors file.
    """
    total = 0
    for file in files:
        for kind, shape, stored in _tensors(file, source):
            cast = dtype is not None and kind in _FLOATS
            total += math.prod(shape) * dtype.itemsize if cast and dtype is not None else stored
    return total


def stored_numbers(files: Iterable[Path], source: Source) -> int:
    """How many numbers weight files hold. Raises as `needed_bytes`."""
    return sum(math.prod(shape) for file in files for _, shape, _ in _tensors(file, source))


def check_host_memory(needed: int, what: str, hint: str = _SMALLER) -> None:
    """Refuse what the machine cannot hold (`what` in the plural): it would end the process without a word.

    Raises:
        DeviceMemoryError: it takes more than the machine's memory and its swap space.
    """
    import psutil

    there = psutil.virtual_memory().total + psutil.swap_memory().total
    if needed > there:
        raise DeviceMemoryError(
            f"{what} take {format_bytes(needed)}; this machine has {format_bytes(there)}",
            hint=hint,
        )


def _tensors(file: Path, source: Source) -> Iterator[tuple[str, list[int], int]]:
    """Kind, shape and stored bytes of each tensor. Raises `ModelError` if the file is not whole."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if start == b"version ":
            raise ModelError(
                f"{file.name} of {source.name} is a Git LFS pointer, not the weights",
                hint="run `git lfs pull` in the folder"
                if source.revision is None
                else again(source, file.name),
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_MAX_HEADER, size):
            raise _corrupted(file, source, f"{size} bytes without a header")
        header = opened.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        found = [
            (str(entry["dtype"]), list(map(int, entry["shape"])), entry["data_offsets"])
            for entry in entries.values()
        ]
        end = max((int(offsets[1]) for _, _, offsets in found), default=0)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise _corrupted(file, source, "its header cannot be read") from error
    if 8 + length + end != size:
        raise _corrupted(file, source, f"it has {size} bytes, {8 + length + end} are expected")
    for kind, shape, offsets in found:
        yield kind, shape, int(offsets[1]) - int(offsets[0])


def _corrupted(file: Path, source: Source, why: str) -> ModelError:
    return ModelError(
        f"the weights of {source.name} are corrupted: {file.name}: {why}", hint=again(source, file.name)
    )
