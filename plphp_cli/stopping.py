"""Texts that end an answer: where they are met, and where the answer's text then ends."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import StopStringCriteria

from plphp_cli.errors import UsageError


def check_stop(stop: Sequence[str]) -> None:
    """Raise `UsageError` for a stop text that no answer can hold: empty, or not Unicode."""
    for text in stop:
        if not text:
            raise UsageError("a stop text is empty", hint="give the text at which the answer is to end")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError("a stop text is not UTF-8", hint="check its encoding") from error


class StopTexts:
    """The stop texts of one answer, found by transformers' own criterion, so that ids end as `generate`'s do.

    Args:
        tokenizer: the model's; None if there is none.
        stop: the texts; none for an answer that nothing but its end of sequence or its length ends.

    Raises:
        UsageError: there are stop texts, but no tokenizer to find them by.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        if stop and tokenizer is None:
            raise UsageError("stop texts need a tokenizer", hint="load the model with its processor")
        self._stop = tuple(stop)
        self._criterion = StopStringCriteria(tokenizer, list(stop)) if stop else None

    def met(self, ids: Tensor) -> bool:
        """Whether the last token of `ids` [1, n] completes a stop text."""
        return self._criterion is not None and bool(self._criterion(ids, None)[0])

    def trimmed(self, text: str, piece: str) -> str:
        """The last piece of `text` without what its token holds beyond the stop text, which itself stays."""
        return until_stop(text, piece, self._stop)


def until_stop(text: str, piece: str, stop: Sequence[str]) -> str:
    """The last `piece` of `text`, up to the end of the stop text that ends first in it; else all of it."""
    start = len(text) - len(piece)
    places = [(text.find(word, max(0, start - len(word) + 1)), word) for word in stop]
    ends = [at + len(word) for at, word in places if at >= 0]
    return piece[: min(ends, default=len(text)) - start]
