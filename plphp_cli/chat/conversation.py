"""A conversation on one cache: each turn goes on from the cut cache, or starts over, and says which.

A turn comes as the prompt of the whole conversation. It continues if that prompt begins with the tokens that
the cache has seen: then only the rest is fed, as one chunk that attends to what every layer holds, so its
logits are those of a full cache whose dropped positions stay masked. Tokens of the last answer that the
prompt spells otherwise are taken back first; the prompt that was cut cannot be. Everything else starts over.
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plphp_cli import families
from plphp_cli.attention import prune
from plphp_cli.cache import PrunableLayer, layer_bytes
from plphp_cli.chat.records import CONTINUED, EACH_TURN, STARTED_OVER
from plphp_cli.config import PLPHPConfig
from plphp_cli.decoding import Done, Token, decode
from plphp_cli.errors import UnsupportedError
from plphp_cli.prefilling import Prefilled, advance, prefill
from plphp_cli.prompt import Prompt
from plphp_cli.pruning import Policy
from plphp_cli.sampling import Settings
from plphp_cli.sequence import LayerState

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel

# One entry per token; all other inputs belong to the images.
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, eq=False)
class Begun:
    """A turn's prompt is in the cache.

    Attributes:
        how: `continued` or `started over`.
        why: the reason for starting over; None for a turn that continued.
        prompt_tokens: of the whole conversation so far.
        fed_tokens: those that went through the model for this turn.
        prefill_s: seconds that this took.
        layers: the latest cut.
        kv_bytes_held: keys and values held, of all layers.
        kv_bytes_full: what they would be had nothing been cut.
    """

    how: str
    why: str | None
    prompt_tokens: int
    fed_tokens: int
    prefill_s: float
    layers: tuple[LayerState, ...]
    kv_bytes_held: int
    kv_bytes_full: int


class Conversation:
    """Turns on one model, one at a time.

    Args:
        loaded: the model.
        policy: a config, a policy, or None to cut nothing.
        recut: `each-turn` prefills and cuts anew for every question; `first-turn` lets a cut cache go on.

    Attributes:
        start: a copy of the latest turn that continued, before its answer; None unless it was asked for.
    """

    def __init__(
        self, loaded: "LoadedModel", policy: PLPHPConfig | Policy | None, recut: str = EACH_TURN
    ) -> None:
        self.policy, self.recut = policy, recut
        self.start: Prefilled | None = None
        self._loaded = loaded
        self._family = families.find(loaded.model.config.model_type)
        self._taken: _Taken | None = None
        self._why = "the first question"

    def ask(
        self, prompt: Prompt, settings: Settings, keep_start: bool = False
    ) -> Generator[Begun | Token | Done, None, None]:
        """Answer the conversation's last question: `Begun`, one `Token` per new token, `Done`.

        Closing it, or an exception out of it, ends the answer and leaves the conversation usable.

        Args:
            prompt: the whole conversation, on the model's device.
            settings: how to generate.
            keep_start: keep a copy of a cache that goes on, so that the turn can be judged (`start`).

        Raises:
            UnsupportedError, ImageError: as `generate.prefill`.
        """
        self.start = None
        why = self._obstacle(prompt)
        with prune(self._loaded.model, self.policy) as pruner:
            began = time.perf_counter()
            if why is None:
                assert self._taken is not None
                fed = self._taken.feed(self._loaded, prompt.inputs["input_ids"])
            else:
                # The old cache goes before the new one comes.
                self._taken, self._why = None, "the last question was not taken in"
                self._taken = _Taken.of(
                    prefill(self._loaded, prompt, pruner, settings.max_new_tokens), prompt
                )
                fed = prompt.prompt_tokens
            held = self._taken.held
            float(held.logits[0])  # waits for the device
            prefill_s = time.perf_counter() - began
            if keep_start and why is None:
                self.start = held.fork(settings.max_new_tokens)
            how = STARTED_OVER if why else CONTINUED
            sizes = _cache_bytes(held)
            self._taken.torn = False
            yield Begun(how, why, prompt.prompt_tokens, fed, prefill_s, held.state.layers, *sizes)
            yield from self._taken.answer(self._loaded, settings)

    def _obstacle(self, prompt: Prompt) -> str | None:
        """Why the cache cannot go on with this prompt; None: it can, and holds what they have in common."""
        taken, inputs = self._taken, prompt.inputs
        if taken is None:
            return self._why
        if self.recut == EACH_TURN:
            return "each question gets its own cut"
        if self._family is not None and self._family.whole:
            return "every token of this model's prompts sees every other"
        if not _same_images(taken.inputs, inputs):
            joined = len(prompt.images) > taken.images
            return "an image joined" if joined else "the images are others than before"
        ids, mask = inputs["input_ids"][0].tolist(), inputs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            return "the prompt is padded"
        # At least one token is fed: its logits begin the answer.
        common = _common(taken.ids, ids[:-1])
        if common < taken.origin and not taken.answered:
            return "the last question was broken off before its answer"
        if common < taken.origin:
            return "the chat template spells the earlier turns otherwise than before"
        if not taken.rewind(common):
            return "the cache cannot give back tokens of the last answer"
        return None


@dataclass(eq=False)
class _Taken:
    """A cache and what is known of it.

    Attributes:
        held: the latest turn.
        inputs: those of the prompt that was prefilled and cut.
        images: how many images it was told to have.
        ids: the tokens that the cache has seen for sure; an interrupted step may have left it with more.
        origin: how many of them are the prompt that was cut, which cannot be taken back.
        positions: of the last token of that prompt.
        gaps: per layer the tokens that were dropped.
        torn: whether a step was begun and did not end.
        answered: whether any token was handed out since the prompt was prefilled.
    """

    held: Prefilled
    inputs: dict[str, Any]
    images: int
    ids: list[int]
    origin: int
    positions: Tensor | None
    gaps: list[int]
    torn: bool = False
    answered: bool = False

    @classmethod
    def of(cls, held: Prefilled, prompt: Prompt) -> "_Taken":
        """What is known right after a prefill."""
        ids = prompt.inputs["input_ids"][0].tolist()
        gaps = [_gap(layer) for layer in held.cache.layers]
        return cls(held, dict(prompt.inputs), len(prompt.images), ids, len(ids), held.positions, gaps)

    def feed(self, loaded: "LoadedModel", ids: Tensor) -> int:
        """Feed what the cache has not seen of a whole prompt [1, N]; returns how many tokens that was."""
        held, rest = self.held, ids[:, len(self.ids) :]
        if self.positions is not None:
            # Text goes on from the position before it, whatever positions the images took.
            held.positions = self.positions + (len(self.ids) - self.origin)
        self.torn = True
        logits = advance(loaded, held, rest)[-1]
        self.ids += rest[0].tolist()
        self.held = Prefilled(ids, held.cache, logits, held.positions, held.state)
        return rest.shape[1]

    def answer(self, loaded: "LoadedModel", settings: Settings) -> Iterator[Token | Done]:
        """The answer's events; `ids` grows by each token once the cache has surely seen it."""
        last: list[int] = []
        events = decode(loaded, self.held, settings)
        while True:
            self.torn = True
            event = next(events, None)
            if isinstance(event, Token):
                self.ids += last
                last, self.answered = [event.token_id], True
            self.torn = False
            if event is None:
                return
            yield event

    def rewind(self, length: int) -> bool:
        """Take back what the cache has seen beyond `length` tokens; False, and unusable, if it cannot."""
        for layer, gap in zip(self.held.cache.layers, self.gaps, strict=True):
            if isinstance(layer, PrunableLayer):
                whole = _gap(layer) == gap and layer.keys.shape[2] == layer.held
                surplus = layer.seen - length
            else:
                # Only of the pruner's own layers is it known how an interrupted step leaves them.
                whole, surplus = not self.torn, len(self.ids) - length
            if not whole or surplus < 0 or (surplus and not _taken_back(layer, surplus)):
                return False
        self.ids = self.ids[:length]
        return True


def _gap(layer: Any) -> int:
    return layer.seen - layer.held if isinstance(layer, PrunableLayer) else 0


def _common(old: list[int], new: list[int]) -> int:
    """How many first tokens are the same."""
    pairs = zip(old, new, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(old), len(new)))


def _taken_back(layer: Any, count: int) -> bool:
    try:
        before = layer.get_seq_length()
        layer.crop(-count)
        return layer.get_seq_length() == before - count
    except (RuntimeError, ValueError, NotImplementedError, TypeError, AttributeError, UnsupportedError):
        return False


def _same_images(before: dict[str, Any], now: dict[str, Any]) -> bool:
    names = {name for inputs in (before, now) for name in inputs if name not in _PER_TOKEN}
    return all(name in before and name in now and _equal(before[name], now[name]) for name in names)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and one == other


def _cache_bytes(held: Prefilled) -> tuple[int, int]:
    """Bytes of keys and values held, and what they would be had nothing been cut."""
    sizes = [(layer, layer_bytes(layer)[0]) for layer in held.cache.layers]
    full = [
        layer.seen * layer.token_bytes if isinstance(layer, PrunableLayer) else size for layer, size in sizes
    ]
    return sum(size for _, size in sizes), sum(full)
