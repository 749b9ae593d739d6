"""Which settings and prompts of a sweep can be compared, also when it was interrupted."""

from collections.abc import Sequence
from dataclasses import dataclass

from plphp_cli.sweep.records import BASELINE, PromptRecord, Row, Setting

# A setting is compared if it has rows on at least this share of the prompts of the best covered one.
_ENOUGH = 0.5


@dataclass(frozen=True)
class Coverage:
    """The rows that are compared: every one of `settings` has a row on every one of `prompts`.

    Attributes:
        settings: in order of first appearance, the baseline not among them.
        prompts: their ids, in the order of the prompts.
        rows: by setting and prompt id.
        left_out: settings that were measured on too few prompts.
        measured: prompts that any setting was measured on.
        unused: rows that are not compared.
    """

    settings: tuple[Setting, ...]
    prompts: tuple[str, ...]
    rows: dict[Setting, dict[str, Row]]
    left_out: tuple[Setting, ...]
    measured: int
    unused: int

    def warnings(self) -> tuple[str, ...]:
        """What a reader must know of rows that are not compared."""
        if not self.unused:
            return ()
        found = (
            f"Not every setting was measured on every prompt yet: {len(self.settings)} settings are compared "
            f"on the {len(self.prompts)} of {self.measured} prompts that all of them have; "
            f"{self.unused} rows are not used."
        )
        if not self.left_out:
            return (found,)
        count = len(self.left_out)
        which = "1 setting was" if count == 1 else f"{count} settings were"
        return (found, f"{which} measured on too few prompts to be compared and left out.")


def coverage(rows: Sequence[Row], prompts: Sequence[PromptRecord]) -> Coverage:
    """Choose what is compared by what was measured alone, never by how it turned out.

    A setting with rows on fewer than half as many prompts as the best covered one is left out (a grid that
    was extended and interrupted would else throw away most of what is known). Compared are then the prompts
    that all others have. Should there be none, the least covered settings are left out, the last ones first,
    until there is one.

    Args:
        rows: in any order of prompts; of a setting measured twice on a prompt the last row counts.
        prompts: rows of other prompts are ignored; a prompt listed twice counts once.
    """
    order = list(dict.fromkeys(prompt.prompt_id for prompt in prompts))
    known = set(order)
    found: dict[Setting, dict[str, Row]] = {}
    for row in rows:
        if row.prompt_id in known and row.method != BASELINE:
            found.setdefault(row.setting, {})[row.prompt_id] = row
    most = max((len(of) for of in found.values()), default=0)
    kept = [setting for setting, of in found.items() if len(of) >= _ENOUGH * most]
    common = _common(found, kept)
    while kept and not common:
        least = min(len(found[setting]) for setting in kept)
        last = max(place for place, setting in enumerate(kept) if len(found[setting]) == least)
        del kept[last]
        common = _common(found, kept)
    return Coverage(
        settings=tuple(kept),
        prompts=tuple(prompt for prompt in order if prompt in common),
        rows={setting: {prompt: found[setting][prompt] for prompt in common} for setting in kept},
        left_out=tuple(setting for setting in found if setting not in set(kept)),
        measured=len(set().union(*found.values())) if found else 0,
        unused=sum(map(len, found.values())) - len(kept) * len(common),
    )


def _common(found: dict[Setting, dict[str, Row]], kept: Sequence[Setting]) -> set[str]:
    """The prompts that all of some settings have rows on."""
    return set.intersection(*(set(found[setting]) for setting in kept)) if kept else set()
