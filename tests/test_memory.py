import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plphp_cli import memory
from plphp_cli.memory import DeviceReader, MemorySampler, MemorySnapshot, larger

MIB = 1024 * 1024
NUMBERS = st.none() | st.integers(0, 2**50)
SNAPSHOTS = st.builds(MemorySnapshot, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS)


class FakeNvml:
    """Two devices, which NVML counts in the other order than CUDA does."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, prefix="GPU-", processes=()):
        self.uuids = [f"{prefix}second", f"{prefix}first"]
        self.processes = processes
        self.open = 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.uuids:
            raise self.NVMLError
        return self.uuids.index(uuid)

    def nvmlDeviceGetName(self, handle):
        return f"card {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=(handle + 1) * 1000, used=(handle + 1) * 10)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return self.processes

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        raise self.NVMLError


@pytest.fixture
def two_cards(monkeypatch):
    def install(**options):
        nvml = FakeNvml(**options)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        properties = [SimpleNamespace(uuid="first"), SimpleNamespace(uuid="second")]
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
        return nvml

    return install


def test_on_a_cpu_the_device_is_unknown_and_the_process_is_not():
    snapshot = DeviceReader("cpu").read()
    assert snapshot.rss_bytes > 10 * MIB
    assert snapshot == MemorySnapshot(rss_bytes=snapshot.rss_bytes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7", "mps", "xpu", "meta", "nonsense", ""])
def test_a_device_that_is_not_there_is_unknown_and_not_zero(device):
    with MemorySampler(device) as sampler:
        snapshot = sampler.latest
    assert snapshot == MemorySnapshot(rss_bytes=snapshot.rss_bytes)
    assert sampler.record().device_name is None


@pytest.mark.parametrize("prefix", ["GPU-", "MIG-"])
def test_a_cuda_ordinal_is_matched_by_uuid(two_cards, prefix):
    nvml = two_cards(prefix=prefix)
    for device, card in [("cuda:0", 1), ("cuda:1", 0), ("cuda", 0)]:
        reader = DeviceReader(device)
        assert reader.name == f"card {card}"
        assert reader.read().device_total_bytes == (card + 1) * 1000
        assert reader.nvml_figure("nvmlDeviceGetEnforcedPowerLimit") is None
        reader.close()
        assert reader.read().device_total_bytes is None
    assert nvml.open == 0


def test_a_card_that_nvml_does_not_know_is_not_guessed(two_cards):
    two_cards(prefix="OTHER-")
    assert DeviceReader("cuda:0").read().device_total_bytes is None


@pytest.mark.parametrize("host", [True, False])
def test_this_process_share_is_known_only_where_process_ids_mean_the_same(two_cards, monkeypatch, host):
    mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=77)
    two_cards(processes=[SimpleNamespace(pid=1, usedGpuMemory=5), mine])
    monkeypatch.setattr(memory, "_sees_host_pids", lambda: host)
    assert DeviceReader("cuda:0").read().device_process_bytes == (77 if host else None)


def test_an_unlisted_share_is_unknown(two_cards, monkeypatch):
    monkeypatch.setattr(memory, "_sees_host_pids", lambda: True)
    two_cards(processes=[SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)])
    assert DeviceReader("cuda:0").read().device_process_bytes is None
    two_cards(processes=[])
    assert DeviceReader("cuda:0").read().device_process_bytes is None


def test_the_peak_sees_what_is_gone_again():
    reader, seen = DeviceReader("cpu"), threading.Semaphore(0)

    def read():
        snapshot = reader.read()
        seen.release()
        return snapshot

    with MemorySampler(interval_s=0.01, read=read) as sampler:
        before = sampler.latest.rss_bytes
        block = bytearray(b"x") * (96 * MIB)
        while seen.acquire(blocking=False):
            pass
        # The sample under way may be older than the block; the second one is not.
        assert all(seen.acquire(timeout=30) for _ in range(2))
        del block
    assert sampler.peak.rss_bytes - before >= 80 * MIB
    assert sampler.record().rss_peak_bytes == sampler.peak.rss_bytes


def test_it_samples_in_the_background_until_it_is_left():
    thrice = threading.Event()
    calls = []

    def read():
        calls.append(len(calls))
        if len(calls) >= 3:
            thrice.set()
        return MemorySnapshot(rss_bytes=len(calls))

    with MemorySampler(interval_s=0.001, read=read) as sampler:
        assert thrice.wait(30)
    assert not [thread for thread in threading.enumerate() if thread.name == "plphp-memory"]
    assert sampler.latest.rss_bytes == len(calls) == sampler.peak.rss_bytes


def test_the_default_is_at_least_four_samples_a_second():
    assert MemorySampler()._interval_s <= 0.25


def test_a_reader_that_fails_leaves_everything_unknown():
    def fail():
        raise RuntimeError("the driver is gone")

    with MemorySampler(interval_s=0.001, read=fail) as sampler:
        pass
    assert sampler.latest == sampler.peak == MemorySnapshot()


def test_an_exception_passes_and_the_thread_ends():
    with pytest.raises(KeyError), MemorySampler():
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name == "plphp-memory"]


@given(SNAPSHOTS, SNAPSHOTS)
def test_larger_forgets_nothing(first, second):
    most = larger(first, second)
    for name in vars(most):
        values = [getattr(first, name), getattr(second, name)]
        known = [value for value in values if value is not None]
        assert getattr(most, name) == (max(known) if known else None)
    assert larger(most, first) == most
