"""The clock of an answer: it waits for the device, and leaves out what is no time of decoding."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

Clock = Callable[[], float]


class Stopwatch:
    """Seconds since it was made, without those that pass between an event's delivery and the next request."""

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self._clock = clock
        self._device = device
        self._start = self._now()

    def elapsed(self) -> float:
        """Seconds, after the device has done all it was given."""
        return self._now() - self._start

    def skip(self, seconds: float) -> None:
        """Leave out so many seconds that have passed: of compiling, say."""
        self._start += seconds

    def elapsed_on_host(self) -> float:
        """Seconds, whatever the device is still doing."""
        return self._clock() - self._start

    def pausing(self, events: Iterator[Any]) -> Iterator[Any]:
        """The events, with the time that their consumer takes left out."""
        for event in events:
            before = self._clock()
            yield event
            self._start += self._clock() - before

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return self._clock()
