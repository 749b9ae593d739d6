"""What is known of a prefilled prompt, layer by layer, and how a whole cache is cut anew from that."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from plphp_cli.cache import PrunableLayer, layer_bytes
from plphp_cli.errors import UnsupportedError
from plphp_cli.pruning import Cut, Policy, marked
from plphp_cli.vision import VisionTokens


@dataclass(frozen=True, eq=False)
class LayerState:
    """What one decoder layer kept of one prompt.

    Attributes:
        index: index of the layer in the decoder.
        gamma: vision attention score in [0, 1]; None without vision tokens, or where nothing was scored.
        group: `attentive`, `balanced`, `indifferent` or `skipped`; else `sliding` or `linear`.
        rate: retention rate r_l in [0, 1]; None where nothing was cut.
        vision_tokens: vision tokens that each KV head holds; None for layers left alone.
        kept: LongTensor [K, n_l] on the CPU, positions of the vision tokens kept, ascending; None if uncut.
        held_bytes: keys and values of the prompt that are held after the cut.
        full_bytes: what they would be had nothing been cut.
        allocated_bytes: the storages behind them, with the room for new tokens.
        kv_heads: K; None for layers that cache no keys and values.
        head_dim: width of a key; None for layers that cache no keys and values.
        prunable: False for sliding-window and linear attention, which are left alone.
        clamped: True when the rate left [0, 1] and was clamped.
    """

    index: int
    gamma: float | None
    group: str | None
    rate: float | None
    vision_tokens: int | None
    kept: Tensor | None
    held_bytes: int
    full_bytes: int
    allocated_bytes: int
    kv_heads: int | None
    head_dim: int | None
    prunable: bool
    clamped: bool = False


@dataclass(frozen=True, eq=False)
class SequenceState:
    """What is known of one prefilled prompt.

    Attributes:
        layers: one state per decoder layer.
        prompt_tokens: N.
        vision: where its vision tokens are.
        attention: per full-attention layer the score rows, float32 [H, N]; filled by
            `prune(keep_attention=True)`.
    """

    layers: tuple[LayerState, ...]
    prompt_tokens: int
    vision: VisionTokens
    attention: Mapping[int, Tensor]


def decide(
    policy: Policy, index: int, attention: Tensor, vision: VisionTokens, kv_heads: int
) -> tuple[Cut, Tensor | None]:
    """The policy's cut of one layer with score rows `attention` [H, N], and what each head then holds.

    The second is LongTensor [K, n] of all prompt positions held, text included, ascending; None if nothing
    goes.
    """
    positions = vision.positions.to(attention.device)
    cut = policy.cut(index, attention, positions, vision.spans, kv_heads)
    if cut.kept.shape[1] == positions.numel():
        return cut, None
    text = vision.text(attention.shape[1]).to(attention.device)
    held = text.expand(kv_heads, -1).scatter(1, cut.kept, True)
    return cut, marked(held, attention.shape[1] - positions.numel() + cut.kept.shape[1])


def on_host(state: LayerState) -> LayerState:
    """The state with what was kept on the CPU, in memory of its own."""
    return state if state.kept is None else replace(state, kept=state.kept.to("cpu", copy=True))


def layer_state(index: int, layer: PrunableLayer, vision: VisionTokens, cut: Cut | None) -> LayerState:
    """The state of a layer whose prompt is held; `cut` is None where nothing was scored.

    What was kept is still where the cut was made: see `on_host`.
    """
    held, allocated = layer_bytes(layer)
    return LayerState(
        index=index,
        gamma=cut.gamma if cut else None,
        group=cut.group if cut else None,
        rate=cut.rate if cut else None,
        vision_tokens=cut.kept.shape[1] if cut else vision.positions.numel(),
        kept=cut.kept if cut else None,
        held_bytes=held,
        full_bytes=layer.seen * layer.token_bytes,
        allocated_bytes=allocated,
        kv_heads=layer.keys.shape[1],
        head_dim=layer.keys.shape[3],
        prunable=True,
        clamped=cut.clamped if cut else False,
    )


def left_alone(index: int, layer: Any, kind: str) -> LayerState:
    """The state of a layer of another `kind` of attention, which is not pruned."""
    held, allocated = layer_bytes(layer)
    keys = getattr(layer, "keys", None)
    heads, width = (None, None) if keys is None else (keys.shape[1], keys.shape[3])
    return LayerState(index, None, kind, None, None, None, held, held, allocated, heads, width, False)


def cut_anew(
    cache: Cache, state: SequenceState, policy: Policy | None, room: int | None = None
) -> tuple[Cache, SequenceState]:
    """Cut a whole prefilled cache by another policy: one prefill serves many settings. The cache stays whole.

    Args:
        cache: filled by a prefill under `prune(model, None, keep_attention=True)`, nothing decoded since.
        state: that prompt's state.
        policy: None copies the cache uncut.
        room: new tokens to make room for.

    Raises:
        UnsupportedError: the cache is cut already, or the score rows were not kept.
    """
    twin, states = copy.copy(cache), list(state.layers)
    twin.layers = list(cache.layers)
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, PrunableLayer):
            twin.layers[index] = copy.deepcopy(layer)
            continue
        if layer.held != state.prompt_tokens or (policy is not None and index not in state.attention):
            raise UnsupportedError("cutting anew a cache that is not whole, or whose attention was not kept")
        cut = kept = None
        if policy is not None:
            cut, kept = decide(policy, index, state.attention[index], state.vision, layer.keys.shape[1])
        twin.layers[index] = fork = layer.fork(kept, room)
        states[index] = on_host(layer_state(index, fork, state.vision, cut))
    return twin, SequenceState(tuple(states), state.prompt_tokens, state.vision, state.attention)
