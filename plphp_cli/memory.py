"""Memory as the machine tells it: NVML for the device, torch's allocator, resident size of the process.

These figures are shown and labelled, never asserted. What cannot be known is None: never 0, never an error.
"""

import dataclasses
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from plphp_cli.results import MemoryRecord

T = TypeVar("T")

# Linux gives the first PID namespace this fixed number; any other one is a container's.
_HOST_PID_NAMESPACE = "pid:[4026531836]"


@dataclass(frozen=True)
class MemorySnapshot:
    """Bytes in use at one moment, each None when unknown.

    Attributes:
        device_total_bytes: the device's memory (NVML).
        device_used_bytes: of it in use, by all processes (NVML).
        device_process_bytes: of it in use by this process (NVML; unknown in most containers).
        allocator_bytes: live in torch's allocator on the device.
        allocator_peak_bytes: its peak since the sampler started.
        rss_bytes: resident memory of this process.
    """

    device_total_bytes: int | None = None
    device_used_bytes: int | None = None
    device_process_bytes: int | None = None
    allocator_bytes: int | None = None
    allocator_peak_bytes: int | None = None
    rss_bytes: int | None = None


def known(read: Callable[[], T]) -> T | None:
    """What `read` returns, or None when it fails: drivers refuse single figures in ways of their own."""
    try:
        return read()
    except Exception:  # noqa: BLE001 - a figure that cannot be read is unknown, whatever the reason
        return None


class DeviceReader:
    """Reads one device. `device` is a torch device or its name; CPUs have no device memory of their own.

    Attributes:
        name: the device's name as NVML gives it, or None.
        handle: its NVML handle, or None: a CUDA ordinal is matched by UUID, since NVML counts otherwise.
        nvml: the NVML module when it could be initialised, or None.
    """

    def __init__(self, device: Any = "cpu") -> None:
        kind, _, ordinal = str(device).partition(":")
        self.kind = kind
        self.nvml: Any = None
        self.handle: Any = None
        self._torch: Any = sys.modules.get("torch")
        # Without a device torch's allocator says 0, which is not what it holds but that there is none.
        if kind != "cpu" and not known(lambda: getattr(self._torch, kind).is_available()):
            self._torch = None
        self._index = int(ordinal) if ordinal.isdigit() else None
        if kind == "cuda" and self._torch is not None:
            if self._index is None:
                self._index = known(self._torch.cuda.current_device)
            self.nvml = known(_initialised_nvml)
            if self.nvml is not None and self._index is not None:
                self.handle = known(self._handle_by_uuid)
        self.name = _text(self.nvml_figure("nvmlDeviceGetName"))
        self._process: Any = known(_this_process)

    def nvml_figure(self, function: str, *arguments: Any) -> Any:
        """What an NVML function says of this device, or None."""
        if self.handle is None:
            return None
        return known(lambda: getattr(self.nvml, function)(self.handle, *arguments))

    def read(self) -> MemorySnapshot:
        """A snapshot of now."""
        memory = self.nvml_figure("nvmlDeviceGetMemoryInfo")
        allocator, peak = self._allocator()
        return MemorySnapshot(
            device_total_bytes=None if memory is None else known(lambda: int(memory.total)),
            device_used_bytes=None if memory is None else known(lambda: int(memory.used)),
            device_process_bytes=self._process_bytes(),
            allocator_bytes=allocator,
            allocator_peak_bytes=peak,
            rss_bytes=None if self._process is None else known(lambda: int(self._process.memory_info().rss)),
        )

    def reset_peak(self) -> None:
        """Let the allocator's peak start from now."""
        if self.kind == "cuda" and self._torch is not None:
            known(lambda: self._torch.cuda.reset_peak_memory_stats(self._index))

    def close(self) -> None:
        """Give NVML back. The reader then knows nothing of the device."""
        if self.nvml is not None:
            known(self.nvml.nvmlShutdown)
        self.nvml = self.handle = None

    def _handle_by_uuid(self) -> Any:
        uuid = str(self._torch.cuda.get_device_properties(self._index).uuid)
        for prefix in ("GPU-", "MIG-"):
            name = uuid if uuid.startswith(prefix) else prefix + uuid
            try:
                return self.nvml.nvmlDeviceGetHandleByUUID(name)
            except self.nvml.NVMLError:
                continue
        return None

    def _process_bytes(self) -> int | None:
        if self.handle is None or not _sees_host_pids():
            return None
        for process in self.nvml_figure("nvmlDeviceGetComputeRunningProcesses") or ():
            if process.pid == os.getpid():
                return None if process.usedGpuMemory is None else int(process.usedGpuMemory)
        return None

    def _allocator(self) -> tuple[int | None, int | None]:
        if self._torch is None:
            return None, None
        if self.kind == "cuda":
            return (
                known(lambda: int(self._torch.cuda.memory_allocated(self._index))),
                known(lambda: int(self._torch.cuda.max_memory_allocated(self._index))),
            )
        if self.kind == "mps":
            return known(lambda: int(self._torch.mps.current_allocated_memory())), None
        return None, None


class MemorySampler:
    """Samples memory in a thread of its own while its context is open.

    Args:
        device: torch device (or its name) that the model is on.
        interval_s: seconds between samples; the default is 10 a second.
        read: takes one snapshot; replaced only by what is not a machine.
    """

    def __init__(
        self,
        device: Any = "cpu",
        interval_s: float = 0.1,
        read: Callable[[], MemorySnapshot] | None = None,
    ) -> None:
        self._device = device
        self._interval_s = interval_s
        self._given_read = read
        self._reader: DeviceReader | None = None
        self._device_name: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._latest = MemorySnapshot()
        self._peak = MemorySnapshot()

    def __enter__(self) -> Self:
        self._reader = DeviceReader(self._device)
        self._reader.reset_peak()
        self._device_name = self._reader.name
        self._stop.clear()
        self._latest = self._peak = MemorySnapshot()
        self._sample()
        self._thread = threading.Thread(target=self._run, name="plphp-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._sample()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    @property
    def latest(self) -> MemorySnapshot:
        """The newest snapshot."""
        return self._latest

    @property
    def peak(self) -> MemorySnapshot:
        """The largest value seen of each figure since the context was entered."""
        return self._peak

    def record(self) -> MemoryRecord:
        """Now and peak as a record."""
        latest, peak = self._latest, self._peak
        return MemoryRecord(
            device_name=self._device_name,
            device_total_bytes=latest.device_total_bytes,
            device_used_bytes=latest.device_used_bytes,
            device_used_peak_bytes=peak.device_used_bytes,
            device_process_bytes=latest.device_process_bytes,
            allocator_bytes=latest.allocator_bytes,
            allocator_peak_bytes=peak.allocator_peak_bytes,
            rss_bytes=latest.rss_bytes,
            rss_peak_bytes=peak.rss_bytes,
        )

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        read = self._given_read or (self._reader.read if self._reader is not None else MemorySnapshot)
        snapshot = known(read)
        if snapshot is not None:
            self._latest, self._peak = snapshot, larger(self._peak, snapshot)


def larger(first: MemorySnapshot, second: MemorySnapshot) -> MemorySnapshot:
    """The larger of each figure; a figure known once stays known."""
    most: dict[str, int | None] = {}
    for name in (item.name for item in dataclasses.fields(MemorySnapshot)):
        values = [value for value in (getattr(first, name), getattr(second, name)) if value is not None]
        most[name] = max(values, default=None)
    return MemorySnapshot(**most)


def _initialised_nvml() -> Any:
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def _this_process() -> Any:
    import psutil

    return psutil.Process()


def _sees_host_pids() -> bool:
    """Whether NVML lists this process by the id it knows itself: NVML lists the host's ids."""
    if not sys.platform.startswith("linux"):
        return True
    return known(lambda: str(Path("/proc/self/ns/pid").readlink())) == _HOST_PID_NAMESPACE


def _text(value: Any) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
