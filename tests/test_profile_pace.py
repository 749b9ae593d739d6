from collections import Counter

import pytest

from plphp_cli.profiling import pace as pace_module
from plphp_cli.profiling.pace import Pace


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: now[0])
    return now


def test_what_is_left_is_told_by_the_pace_of_each_kind(clock):
    shown = []
    pace = Pace(Counter(short=3, long=2, never=1), shown.append)
    pace.expect("long", 50.0)
    for kind, seconds in (("short", 1.0), ("short", 3.0), ("long", 40.0), ("short", 2.0)):
        with pace.piece(kind, kind):
            clock[0] += seconds
    pace.drop("never")
    with pace.piece("long", "last"):
        pass
    assert [progress.remaining_s for progress in shown] == [None, 103.0, 104.0, 42 + 21.0, 40.0]
    assert [(progress.done, progress.total) for progress in shown] == [(0, 6), (1, 6), (2, 6), (3, 6), (4, 5)]
