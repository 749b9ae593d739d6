"""How far a sweep has come: what the live table shows."""

from dataclasses import dataclass

from plphp_cli.sweep.records import Constraint, Point


@dataclass(frozen=True)
class SweepProgress:
    """One moment of a sweep.

    Attributes:
        done_rows: finished (setting, prompt) pairs, those resumed included, of `expected_rows`.
        remaining_s: None until anything was done.
        stage: what is being done, in a few words.
        points_so_far: over the prompts that all settings have by now; intervals may be left out.
        constraint: what the best so far must satisfy.
        title: model, settings and prompts, in a line.
    """

    done_rows: int
    expected_rows: int
    remaining_s: float | None
    stage: str
    points_so_far: tuple[Point, ...] = ()
    constraint: Constraint | None = None
    title: str = ""
