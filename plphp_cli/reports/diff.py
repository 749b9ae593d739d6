"""Two texts with their differences marked, word by word."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from rich.text import Text

from plphp_cli.reports.text import visible

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
DIFFERENT_STYLE = "bold yellow underline"


@dataclass(frozen=True)
class Piece:
    """A stretch of one text; `same` when the other text has it at the same place in the order of words."""

    text: str
    same: bool


def word_diff(first: str, second: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Both texts in pieces, equal stretches matched by words; joined, the pieces of a text are that text."""
    words = _WORDS.findall(first), _WORDS.findall(second)
    sides: tuple[list[Piece], list[Piece]] = ([], [])
    for tag, *bounds in SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, all_words, low, high in zip(sides, words, bounds[::2], bounds[1::2], strict=True):
            if high > low:
                side.append(Piece("".join(all_words[low:high]), tag == "equal"))
    return tuple(sides[0]), tuple(sides[1])


def marked(pieces: Sequence[Piece], colour: bool) -> Text:
    """The pieces as terminal text, differences styled; without colour in `[[...]]`."""
    text = Text()
    for piece in pieces:
        shown = visible(piece.text)
        if piece.same or not shown:
            text.append(shown)
        elif colour:
            text.append(shown, DIFFERENT_STYLE)
        else:
            text.append(f"[[{shown}]]")
    return text


def first_difference(first: str, second: str) -> int | None:
    """Number (from 1) of the first word in which the texts differ; None when they are equal."""
    if first == second:
        return None
    words, others = first.split(), second.split()
    for number, (word, other) in enumerate(zip(words, others, strict=False), start=1):
        if word != other:
            return number
    return min(len(words), len(others)) + 1
