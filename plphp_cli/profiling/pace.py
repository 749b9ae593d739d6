"""How far a profile has come, and how long the rest will take, by the pace of what was done already."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows; `remaining_s` is None until anything was done."""

    stage: str
    done: int
    total: int
    remaining_s: float | None


class Pace:
    """Counts pieces of work of several kinds, each with a pace of its own.

    Args:
        planned: pieces by kind.
        show: takes the progress as each piece begins.
    """

    def __init__(self, planned: Counter[str], show: Callable[[Progress], None]) -> None:
        self._left = Counter(planned)
        self._total = planned.total()
        self._times: dict[str, list[float]] = defaultdict(list)
        self._expected: dict[str, float] = {}
        self._show = show

    @contextmanager
    def piece(self, kind: str, stage: str) -> Iterator[None]:
        """Around one piece of work of a kind."""
        self._show(Progress(stage, self._total - self._left.total(), self._total, self._remaining()))
        start = time.monotonic()
        yield
        self._times[kind].append(time.monotonic() - start)
        self._left[kind] -= 1

    def expect(self, kind: str, seconds: float) -> None:
        """How long a piece of a kind may take, until one was done."""
        self._expected[kind] = seconds

    def drop(self, kind: str, count: int = 1) -> None:
        """Pieces that will not be done: an arm that failed."""
        self._left[kind] -= count
        self._total -= count

    def _remaining(self) -> float | None:
        done = {kind: fmean(times) for kind, times in self._times.items()}
        if not done:
            return None
        usual = fmean(done.values())
        known = self._expected | done
        return sum(count * known.get(kind, usual) for kind, count in self._left.items())
