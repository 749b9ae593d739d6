"""A cache layer that holds fewer tokens than it has seen; new ones are written in place.

Vocabulary: `seen` tokens give the next position; `held` tokens are stored; `capacity` is what the storage
has room for. Bytes are those of keys and values together.
"""

import copy
import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from plphp_cli.errors import UnsupportedError

_NEW_NAME, _OLD_NAME = "cache", "past_key_values"


def capacity_for(held: int, room: int | None) -> int:
    """Tokens that a buffer is made for: those held, and `room` new ones or, if unknown, 5 % (at least 1)."""
    return held + (max(1, held // 20) if room is None else room)


class PrunableLayer(DynamicLayer):
    """Keys and values of one full-attention layer of one sequence, [1, K, held, head_dim].

    During prefill it refers to the keys and values as the layer computed them; `hold` then moves what is
    kept into one buffer, with room for new tokens, and lets the rest go. `keys` and `values` are views of
    that buffer.

    Attributes:
        seen: tokens that passed through the layer; the next token's position.
        held: tokens that are stored.
        fused: whether one new token may attend by another kernel than stock's, which moves logits by 1e-7
            in float32, and by roundings in bfloat16.
            The decode engine says so for both arms alike; `model.generate` inside `prune` stays bit-equal.
    """

    keys: Any
    values: Any
    is_initialized: bool
    is_croppable = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen = 0
        self.held = 0
        self.fused = False
        self._prompt_held = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values with their room, [1, K, capacity, head_dim]; once the prompt is held."""
        assert self._buffers is not None
        return self._buffers

    @property
    def prompt_is_held(self) -> bool:
        """Whether `hold` was called: the layer has its buffer."""
        return self._buffers is not None

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, keys and values of all heads together."""
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in self._stored())

    @property
    def held_bytes(self) -> int:
        """Bytes of the held tokens."""
        return self.held * self.token_bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the storages behind keys and values, as the allocator gave them."""
        return sum(t.untyped_storage().nbytes() for t in self._stored())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens [1, K, q, head_dim]; returns all keys and values held, as views.

        Raises:
            UnsupportedError: the states of more than one sequence.
        """
        if key_states.shape[0] != 1:
            raise UnsupportedError("a batch of several sequences", hint="run prompts one at a time")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        if self._buffers is None:
            if self.seen:
                raise UnsupportedError("a second forward before the first one's prompt was held")
            self.keys, self.values = key_states.detach(), value_states.detach()
            self.seen = self.held = count
            return key_states, value_states
        held = self.held + count
        if held > self._buffers[0].shape[2]:
            self.make_room(count)
        keys, values = self._buffers
        if key_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        keys.narrow(2, self.held, count).copy_(key_states)
        values.narrow(2, self.held, count).copy_(value_states)
        self.seen += count
        self.held = held
        self.keys, self.values = keys.narrow(2, 0, held), values.narrow(2, 0, held)
        return self.keys, self.values

    def hold(self, kept: Tensor | None, room: int | None) -> None:
        """Move the prompt into the buffer, once, and let go of what is not kept.

        Args:
            kept: LongTensor [K, n] of the positions that each head keeps, ascending; None keeps all.
            room: how many new tokens to make room for; None when unknown (the buffer then grows by chunks).
        """
        self._buffers = _gathered(self.keys, kept, room), _gathered(self.values, kept, room)
        self._show(self.held if kept is None else kept.shape[1])
        self._prompt_held = self.held

    def make_room(self, count: int) -> None:
        """Grow the buffer, by a chunk, unless it has room for `count` new tokens."""
        needed = self.held + count
        if needed > self._stored()[0].shape[2]:
            room = capacity_for(needed, None) - self.held
            self._buffers = _gathered(self.keys, None, room), _gathered(self.values, None, room)
            self._show(self.held)

    def note_written(self, count: int) -> None:
        """Tell of `count` tokens that a kernel wrote into the buffer behind those held (negative: forget)."""
        self.seen += count
        self._show(self.held + count)

    def fork(self, kept: Tensor | None = None, room: int | None = None) -> Self:
        """A copy with its own buffer that holds all tokens, or those of `kept` [K, n]; see `hold`."""
        twin = type(self)()
        twin.lazy_initialization(self.keys, self.values)
        twin.keys, twin.values = self.keys, self.values
        twin.seen, twin.held, twin.fused = self.seen, self.held, self.fused
        twin.hold(kept, room)
        return twin

    def get_seq_length(self) -> int:
        """Tokens seen, which is what positions and masks of the model count by."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (their number negative, as transformers counts them).

        Raises:
            UnsupportedError: more tokens than came after the prompt.
        """
        count = abs(tokens_to_remove)
        if count > self.held - self._prompt_held:
            raise UnsupportedError("taking back a part of a prompt that was cut", hint="prefill again")
        self.seen -= count
        self._show(self.held - count)

    def reset(self) -> None:
        """Forget all tokens and free the buffer."""
        self.seen = self.held = self._prompt_held = 0
        self._buffers = None
        # Let go of, as newer transformers does; 5.17 would zero the storages and keep them.
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beams share a prompt but not a cut."""
        raise UnsupportedError("beam search", hint="use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: one layer holds one sequence."""
        raise UnsupportedError("several sequences from one prompt", hint="generate one sequence at a time")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: one layer holds one sequence."""
        raise UnsupportedError("several sequences from one prompt", hint="generate one sequence at a time")

    def _stored(self) -> tuple[Tensor, ...]:
        if self._buffers is not None:
            return self._buffers
        return () if self.keys is None else (self.keys, self.values)

    def _show(self, held: int) -> None:
        self.held = held
        keys, values = self._stored()
        self.keys, self.values = keys.narrow(2, 0, held), values.narrow(2, 0, held)


def cache_name(model: Any) -> str:
    """What the model's forward calls its cache: `past_key_values` until transformers 5.23, then `cache`."""
    return _cache_name(type(model))  # type: ignore[arg-type]


@lru_cache
def _cache_name(kind: Any) -> str:
    """By the model's class: reading a signature at every token takes its time."""
    return _NEW_NAME if _NEW_NAME in inspect.signature(kind.forward).parameters else _OLD_NAME


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, by either name; None if there is none."""
    return next((arguments[name] for name in (_NEW_NAME, _OLD_NAME) if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Cache:
    """The cache that a forward or a generate call returned."""
    return getattr(output, _NEW_NAME) if hasattr(output, _NEW_NAME) else getattr(output, _OLD_NAME)


def layer_bytes(layer: Any) -> tuple[int, int]:
    """Bytes of keys and values that a cache layer of any kind holds, and of the storages behind them."""
    tensors = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(t.numel() * t.element_size() for t in tensors), sum(storages.values())


def fork_cache(cache: Cache, room: int | None = None) -> Cache:
    """A copy of a prefilled cache, so that one prefill can be decoded many times.

    Prunable layers get their own buffer with room for `room` new tokens; other layers are copied as they are.
    """
    twin = copy.copy(cache)
    twin.layers = [
        layer.fork(room=room) if isinstance(layer, PrunableLayer) else copy.deepcopy(layer)
        for layer in cache.layers
    ]
    return twin


def _gathered(states: Tensor, kept: Tensor | None, room: int | None) -> Tensor:
    """A buffer [1, K, capacity, d] whose start holds the tokens `kept` [K, n] of `states` [1, K, N, d]."""
    _, heads, held, width = states.shape
    if kept is not None:
        held = kept.shape[1]
    buffer = states.new_empty(1, heads, capacity_for(held, room), width)
    if kept is None:
        buffer[:, :, :held] = states
    else:
        index = kept.to(states.device)[None, :, :, None].expand(1, heads, held, width)
        torch.gather(states, 2, index, out=buffer[:, :, :held])
    return buffer
