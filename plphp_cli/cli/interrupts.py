"""Ctrl-C that loses nothing: the first one stops the work, and what there is gets printed and written."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# People press Ctrl-C more than once; so many in all, and the wrapping up is given up too.
_PATIENCE = 3

# Until the model is there nothing is known that a file could tell; torch may be imported by half.
WHILE_LOADING = "interrupted while loading: nothing was written"


class Interrupts:
    """Turns the first SIGINT (SIGTERM, SIGHUP) into `KeyboardInterrupt` and holds back the next ones.

    Libraries swallow a `KeyboardInterrupt` now and then: `check` raises it again. Nothing is changed
    outside the main thread, and for signals that the process was started to ignore.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._count = 0
        self._holding = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that the signal ended: 130 for Ctrl-C."""
        return 128 + (self.received or signal.SIGINT)

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if one was asked for and got lost."""
        if self.received is not None:
            raise KeyboardInterrupt

    def forget(self) -> None:
        """The signal is dealt with: the next one is a first one again."""
        self.received, self._count = None, 0

    def hold(self) -> None:
        """From now on what was measured is being written: a signal waits for the end, unless repeated."""
        self._holding = True
        self._count = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        first, self.received = self.received is None, self.received or number
        if (first and not self._holding) or self._count >= _PATIENCE:
            raise KeyboardInterrupt
