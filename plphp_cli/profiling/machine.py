"""What this machine can do at most: read bandwidth, matrix rate, cache and memory sizes. Unknown is None."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plphp_cli.memory import known

GIB = 1 << 30
# Passes over the buffer, of which the fastest counts: anything else is the machine doing other work.
PASSES = 3
# Share of the CPU that others may use before a machine counts as busy.
BUSY = 0.25
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": GIB}


def how_busy() -> tuple[float | None, str | None]:
    """The share of the CPU that others use while this process does nothing, and a warning if it is large."""
    import psutil

    share = known(lambda: psutil.cpu_percent(interval=0.5) / 100)
    if share is None or share <= BUSY:
        return share, None
    return share, f"the machine was busy: others used {share:.0%} of the CPU at the start; times may not hold"


@dataclass(frozen=True)
class Machine:
    """The device's measured limits.

    Attributes:
        bandwidth_bytes_per_s: reading a buffer far larger than any cache.
        operations_per_s: of a matrix product in the model's dtype (a multiply and an add are two).
        cache_bytes: last-level cache.
        memory_bytes: of the device; of the machine on a CPU.
    """

    bandwidth_bytes_per_s: float | None = None
    operations_per_s: float | None = None
    cache_bytes: int | None = None
    memory_bytes: int | None = None


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure the device; takes about two seconds on a CPU. What fails (no memory left) is None."""
    cache = last_level_cache(device)
    return Machine(
        bandwidth_bytes_per_s=known(lambda: read_bandwidth(device, buffer_bytes(device, cache))),
        operations_per_s=known(lambda: matrix_rate(device, dtype)),
        cache_bytes=cache,
        memory_bytes=memory_bytes(device),
    )


def buffer_bytes(device: torch.device, cache_bytes: int | None) -> int:
    """Size of the buffer to read: 1 GiB (4 on a GPU), or 4 x the last-level cache where only that fits.

    Raises:
        MemoryError: neither fits into half of the free memory.
    """
    free = known(lambda: _free_bytes(device))
    # A GPU reads 1 GiB in a quarter of a millisecond, of which a launch would be a twentieth.
    most = 4 * GIB if device.type == "cuda" else GIB
    for size in (most, GIB, 4 * cache_bytes if cache_bytes else GIB):
        if size <= most and (free is None or size <= free // 2):
            return size
    raise MemoryError("no room for a buffer to read")


def read_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second, the best of several passes of two kernels that read everything once.

    The buffer holds random values: pages that were never written are one and the same zero page.
    """
    columns = 4096
    rows = max(size // (4 * columns), 1)
    block = torch.randn(min(rows, 256), columns, device=device)
    buffer = torch.empty(rows, columns, device=device)
    for start in range(0, rows, block.shape[0]):
        part = buffer[start : start + block.shape[0]]
        part.copy_(block[: part.shape[0]])
    vector = torch.randn(columns, device=device)
    fastest = min(_best(lambda: buffer.sum(), device), _best(lambda: torch.mv(buffer, vector), device))
    return buffer.nbytes / fastest


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, the best of several."""
    size = 1024 if device.type == "cpu" else 8192
    one, two = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: one @ two, device)


def last_level_cache(device: torch.device) -> int | None:
    """Bytes of the last-level cache, or None."""
    if device.type == "cuda":
        return known(lambda: int(torch.cuda.get_device_properties(device).L2_cache_size))
    sizes = [known(partial(_cache_size, path)) for path in sorted(_CACHES.glob("index*/size"))]
    return max((size for size in sizes if size is not None), default=None)


def memory_bytes(device: torch.device) -> int | None:
    """All memory of the device; on a CPU of the machine, or of the container if it has less."""
    if device.type == "cuda":
        return known(lambda: int(torch.cuda.get_device_properties(device).total_memory))
    if device.type != "cpu":
        return None
    sizes = [known(_machine_memory), known(_container_memory)]
    return min((size for size in sizes if size is not None), default=None)


def _best(work: Callable[[], Tensor], device: torch.device) -> float:
    work()
    times = []
    for _ in range(PASSES):
        _synchronize(device)
        start = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def _cache_size(path: Path) -> int:
    text = path.read_text(encoding="ascii").strip()
    return int(text[:-1]) * _SUFFIXES[text[-1]] if text[-1] in _SUFFIXES else int(text)


def _machine_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _container_memory() -> int:
    text: Any = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    return int(text)
