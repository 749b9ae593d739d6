"""In which order the arms take their turns: ABBA for two, ABCCBA for three, the A/A control among them."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from plphp_cli.profiling.records import PRUNED, UNPRUNED

A = TypeVar("A")

# The unpruned arm once more: what it differs by from itself is what cannot be called a difference.
CONTROL = "control"


def slots(arms: Sequence[str]) -> tuple[str, ...]:
    """The arms and, where two are compared, the control; pruned and unpruned stand side by side."""
    return (*arms, CONTROL) if PRUNED in arms and UNPRUNED in arms else tuple(arms)


def alternated(arms: Sequence[A], repeats: int) -> Iterator[tuple[int, A]]:
    """(repeat, arm) in order: every repeat has each arm once, every other repeat in reverse.

    A drift of the machine that is steady over two repeats then weighs on all arms alike.
    """
    for repeat in range(repeats):
        for arm in arms if repeat % 2 == 0 else reversed(arms):
            yield repeat, arm
