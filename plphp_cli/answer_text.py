"""The text of an answer as its tokens come, and what ends it: an end of sequence, a stop text, its length."""

from collections.abc import Collection, Sequence
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


class AnswerText:
    """Text of a growing list of ids, given out as far as it is sure.

    The last tokens are decoded again behind those before them, because a tokenizer may spell a token by its
    neighbours (leading spaces) and a character may take several tokens (then it ends in U+FFFD and waits).

    Args:
        processor: the model's, or its tokenizer; None gives no text.
        stop: texts that end the answer, found by transformers' own criterion, so that ids end as
            `generate`'s do; the text ends with the one that was met.
        eos: ids that end it.

    Raises:
        UsageError: there are stop texts, but no tokenizer to find them by.
    """

    def __init__(self, processor: Any, stop: Sequence[str] = (), eos: Collection[int] = ()) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._tokenizer = getattr(processor, "tokenizer", processor)
        if stop and self._tokenizer is None:
            raise UsageError("stop texts need a tokenizer", hint="load the model with its processor")
        self._stop, self._eos = tuple(stop), eos
        self._criterion = StopStringCriteria(self._tokenizer, list(stop)) if stop else None
        self._start = self._read = 0

    def take(self, token_id: int, ids: Tensor, last: bool) -> tuple[str, str | None]:
        """Add the last token of `ids` [1, n], prompt included; returns the new text and what ends the answer.

        That is `eos`, `stop`, `length` if it is the `last` token that may come, or None.
        """
        reason = "length" if last else None
        if token_id in self._eos:
            reason = "eos"
        elif self._criterion is not None and bool(self._criterion(ids, None)[0]):
            reason = "stop"
        piece = self.add(token_id, flush=reason is not None)
        if reason == "stop":
            shorter = until_stop(self.text, piece, self._stop)
            self.text = self.text[: len(self.text) - len(piece)] + shorter
            piece = shorter
        return piece, reason

    def add(self, token_id: int, flush: bool = False) -> str:
        """Add one id; returns the new text, with whatever is incomplete if `flush`."""
        self.ids.append(token_id)
        if self._tokenizer is None:
            return ""
        before = self._decode(self.ids[self._start : self._read])
        now = self._decode(self.ids[self._start :])
        if not flush and (now.endswith("\ufffd") or len(now) <= len(before)):
            return ""
        self._start, self._read = self._read, len(self.ids)
        self.text += now[len(before) :]
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def until_stop(text: str, piece: str, stop: Sequence[str]) -> str:
    """The last `piece` of `text`, up to the end of the stop text that ends first in it; else all of it."""
    start = len(text) - len(piece)
    places = [(text.find(word, max(0, start - len(word) + 1)), word) for word in stop]
    ends = [at + len(word) for at, word in places if at >= 0]
    return piece[: min(ends, default=len(text)) - start]
