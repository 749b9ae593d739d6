"""`prune`: PLPHP at work inside a transformers model, by a registered attention function and a cache layer.

Nothing here knows a model family. A function registered with transformers' `AttentionInterface` sees each
layer's queries and keys after RoPE and after the cache update; it runs the back-end that the model had,
and in prefill cuts the layer's cache before the next layer runs. It finds its state through the attention
module, in a weak map: the registered names are inert for every module that is not being pruned.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache

from plphp_cli import backends, families, parallel
from plphp_cli.cache import PrunableLayer, cache_name, given_cache
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import ConfigError, NestedPruneError, UnsupportedError
from plphp_cli.joined import HANDLE, JoinedLayer, attend_held, attend_joined, is_joined
from plphp_cli.pruning import PLPHPPolicy, Policy, as_policy, last_token_attention
from plphp_cli.sequence import LayerState, SequenceState, decide, layer_state, left_alone, on_host
from plphp_cli.support import FULL, layer_kinds, refuse_cache, refuse_forward, refuse_generate, refuse_step
from plphp_cli.vision import (
    VisionTokens,
    as_inputs,
    encode_images,
    find_vision_tokens,
    image_encoder,
    takes_features,
)


@dataclass(eq=False)
class _Forward:
    """One forward call of the model under way; `vision` is set in prefill alone."""

    thread: int
    cache: Cache
    ids: Tensor | None = None
    vision: VisionTokens | None = None
    states: dict[int, LayerState] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)


class Pruner:
    """The state of one `prune` context. It holds no cache: caches belong to the calls that fill them.

    Attributes:
        policy: what decides the cuts; None is the unpruned arm (in-place cache, nothing scored, nothing cut).
        room: new tokens to make room for at the next prefill; None when unknown. `generate` sets it.
        image_tokens: vision tokens of each image of the next prompt; None when unknown. `prefill` sets it.
        sequences: the prompts of the latest generate call or prefill.
        around_cut: opened around each layer's scores and gather, for whoever wants to time them.
    """

    def __init__(self, model: Any, policy: Policy | None, keep_attention: bool = False) -> None:
        self.policy = policy
        self.room: int | None = None
        self.image_tokens: Sequence[int] | None = None
        self.sequences: tuple[SequenceState, ...] = ()
        self.around_cut: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        self._model = model
        self._keep_attention = keep_attention
        families.refuse_type(model.config)
        self._kinds = layer_kinds(model.config)
        _check_layers(policy, len(self._kinds))
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._lock = threading.Lock()
        self._generating = threading.Lock()
        self._forward: _Forward | None = None

    @property
    def layers(self) -> tuple[LayerState, ...]:
        """The layers of the latest prompt; empty before the first."""
        return self.sequences[0].layers if self.sequences else ()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, which tells how many new tokens to make room for.

        Raises:
            UnsupportedError: the call asks for what pruning does not support, named in the message.
            NestedPruneError: another generate call on the model is under way.
        """
        names = list(inspect.signature(type(self._model).generate).parameters)[1:]
        merged = {**dict(zip(names, args, strict=False)), **kwargs}
        options = {name: value for name, value in merged.items() if name not in names}
        config, inputs = self._model._prepare_generation_config(merged.get("generation_config"), **options)
        refuse_generate(config, {**merged, **inputs})
        if not self._generating.acquire(blocking=False):
            raise NestedPruneError("a generate call on this model is under way", hint="let it end first")
        try:
            self.room = self._room(config, merged)
            return type(self._model).generate(self._model, *args, **kwargs)
        finally:
            self.room = None
            self.release()
            self._generating.release()

    def release(self) -> None:
        """Let go of this thread's forward call; an interrupt (Ctrl-C) skips the hook that would."""
        if self._forward is not None and self._forward.thread == threading.get_ident():
            self._forward = None

    def _room(self, config: GenerationConfig, arguments: dict[str, Any]) -> int | None:
        """New tokens that a generate call can add at most; None when that cannot be told."""
        if config.max_new_tokens is not None:
            return config.max_new_tokens
        given = (arguments.get("generation_config"), self._model.generation_config)
        stated = [arguments.get("max_length"), *(getattr(each, "max_length", None) for each in given)]
        ids = arguments.get("input_ids", arguments.get("inputs"))
        if all(length is None for length in stated):
            return config.max_length  # transformers counts its own default from the end of the prompt
        return None if ids is None else max(0, config.max_length - ids.shape[1])

    def before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the model: a call with an empty cache is a prefill."""
        inputs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        cache = given_cache(inputs)
        prefill = cache is None or cache.get_seq_length() == 0
        forward = _Forward(threading.get_ident(), DynamicCache() if cache is None else cache)
        with self._lock:
            if self._forward is not None and self._forward.thread != forward.thread:
                raise NestedPruneError(
                    "this model is running in another thread", hint="use one thread at a time"
                )
            self._forward = forward
        refuse_cache(forward.cache)
        if prefill:
            refuse_forward(inputs)
            self.sequences = ()
            inputs = encode_images(model, inputs)
            forward.ids = inputs["input_ids"]
            forward.vision = find_vision_tokens(model.config, inputs, self.image_tokens)
            layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
            forward.cache.layers = [
                PrunableLayer() if kind == FULL else layer
                for kind, layer in zip(self._kinds, layers, strict=True)
            ]
            forward.cache.layer_class_to_replicate = None
            inputs.pop("past_key_values", None)
            inputs |= {cache_name(model): forward.cache, "use_cache": True}
        elif is_joined(forward.cache):
            pass  # its rows were prefilled here, and its steps are checked as it is made
        elif not any(isinstance(layer, PrunableLayer) for layer in forward.cache.layers):
            raise UnsupportedError(
                "a non-empty past_key_values is not supported", hint="pass the whole prompt"
            )
        else:
            refuse_step(inputs)
        return (), inputs

    def encode(self, encoder: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own `encoder`; what it makes of the images tells which tokens of a prefill they are."""
        features = encoder(*args, **kwargs)
        forward = self._forward
        if forward is not None and forward.vision is not None and forward.thread == threading.get_ident():
            seen = {"input_ids": forward.ids, **as_inputs(features)}
            forward.vision = find_vision_tokens(self._model.config, seen, self.image_tokens)
        return features

    def after_forward(self, model: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of the model, also after an exception (then `output` is None)."""
        forward = self._forward
        if forward is None or forward.thread != threading.get_ident():
            return
        self.release()
        if output is not None and forward.vision is not None:
            self.sequences = (self._record(forward),)

    def attend(
        self,
        stock: Callable[..., Any],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **options: Any,
    ) -> Any:
        """Attention of one layer: `stock` does it; in prefill the layer's cache is cut right after."""
        forward = self._forward
        if forward is None:
            raise UnsupportedError("only a part of the model was called", hint="call the model itself")
        layer = forward.cache.layers[module.layer_idx]
        if isinstance(layer, JoinedLayer):
            return layer.step(stock, module, query, key, value, options), None
        if not isinstance(layer, PrunableLayer):
            return stock(module, query, key, value, mask, **options)
        if forward.vision is None:
            mask = _decode_mask(layer, query, mask)
            if query.shape[-2] == 1 and (layer.fused or layer.held < layer.seen):
                return attend_held(stock, module, query, key, value, options), None
            return stock(module, query, key, value, mask, **options)
        output = stock(module, query, key, value, mask, **options)
        with self.around_cut():
            self._cut(forward, module.layer_idx, query, key, options)
        return output

    @torch.no_grad()
    def _cut(
        self, forward: _Forward, index: int, query: Tensor, key: Tensor, options: dict[str, Any]
    ) -> None:
        """Score the layer from its last query, and hold what the policy keeps."""
        assert forward.vision is not None
        layer: PrunableLayer = forward.cache.layers[index]
        cut = kept = None
        if self.policy is not None or self._keep_attention:
            if options.get("position_bias") is not None:
                raise UnsupportedError("attention with a position bias is not supported")
            attention = last_token_attention(
                query[0, :, -1],
                key[0],
                options.get("scaling") or key.shape[-1] ** -0.5,
                options.get("softcap"),
                options.get("s_aux"),
            )
            if self._keep_attention:
                forward.attention[index] = attention
            if self.policy is not None:
                cut, kept = decide(self.policy, index, attention, forward.vision, key.shape[1])
        layer.hold(kept, self.room)
        forward.states[index] = layer_state(index, layer, forward.vision, cut)

    def _record(self, forward: _Forward) -> SequenceState:
        assert forward.vision is not None
        for index, (kind, layer) in enumerate(zip(self._kinds, forward.cache.layers, strict=True)):
            if kind != FULL:
                forward.states[index] = left_alone(index, layer, kind)
            elif index not in forward.states:
                raise UnsupportedError(f"layer {index} did not go through transformers' attention interface")
        # Now, and not layer by layer: a copy to the host waits for the device.
        layers = tuple(on_host(state) for _, state in sorted(forward.states.items()))
        seen = forward.cache.get_seq_length()
        return SequenceState(layers, seen, forward.vision, forward.attention)


@contextlib.contextmanager
def prune(
    model: Any, policy: PLPHPConfig | Policy | None = None, *, keep_attention: bool = False
) -> Iterator[Pruner]:
    """Prune the vision cache of `model` wherever it generates inside this context.

    `model.generate` works unchanged, greedy or sampling, with streamers and from another thread. The model
    is as it was on leaving, also after an exception.

    Args:
        model: any transformers image-text-to-text model.
        policy: a config, a policy, or None for the same path with scoring and cutting switched off.
        keep_attention: keep the score rows of the latest prompt, so that it can be cut anew (`cut_anew`).

    Raises:
        UnsupportedError: the model, its attention back-end or, later, a generation feature is refused.
        ConfigError: `skip_layers` names a layer that the model does not have.
        NestedPruneError: the model, or a part of it, is being pruned already.
    """
    decoder = model.get_decoder()
    shared = parallel.shared_policy(model, as_policy(policy), keep_attention)
    pruner = Pruner(model, shared, keep_attention)
    modules = [module for module in decoder.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    with contextlib.ExitStack() as stack:
        backend = decoder.config._attn_implementation
        stack.enter_context(_claimed(modules, pruner, backend))
        ours = backends.registered(backend)
        stack.callback(pruner.release)
        stack.callback(decoder.set_attn_implementation, backend)
        decoder.set_attn_implementation(ours)
        for hook in (
            model.register_forward_pre_hook(pruner.before_forward, with_kwargs=True),
            model.register_forward_hook(pruner.after_forward, with_kwargs=True, always_call=True),
        ):
            stack.callback(hook.remove)
        stack.enter_context(_replaced(model, "generate", pruner.generate))
        encoder = None if takes_features(model) else image_encoder(model)
        if encoder is not None:  # images are encoded inside the forward: listen there
            listening = wraps(encoder)(partial(pruner.encode, encoder))
            stack.enter_context(_replaced(model.base_model, encoder.__name__, listening))
        yield pruner


def _decode_mask(layer: PrunableLayer, query: Tensor, mask: Any) -> Any:
    """The mask of new tokens: the model's own while nothing was cut, else one as wide as what is held."""
    count = query.shape[-2]
    if layer.held == layer.seen:
        return mask
    if count == 1:
        return None  # every held token is visible
    # The model makes one mask for all layers, as wide as the tokens seen; this layer holds fewer.
    visible = torch.ones(count, layer.held, dtype=torch.bool, device=query.device).tril(layer.held - count)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return visible[None, None]
    return torch.zeros(visible.shape, dtype=query.dtype, device=query.device).masked_fill_(
        ~visible, torch.finfo(query.dtype).min
    )[None, None]


def _check_layers(policy: Policy | None, count: int) -> None:
    skipped = policy.config.skip_layers if isinstance(policy, PLPHPPolicy) else ()
    if skipped and skipped[-1] >= count:
        raise ConfigError(f"skip_layers holds {skipped[-1]}, but the model has layers 0 to {count - 1}")


# Attention module -> the pruner at work on it and the back-end's own function, too slow to be looked up
# at every token; weak, so that a model can be freed.
_PRUNERS: WeakKeyDictionary[nn.Module, tuple[Pruner, Callable[..., Any]]] = WeakKeyDictionary()
_CLAIM = threading.Lock()


@contextlib.contextmanager
def _claimed(modules: list[nn.Module], pruner: Pruner, backend: str) -> Iterator[None]:
    with _CLAIM:
        if any(module in _PRUNERS for module in modules):
            raise NestedPruneError(
                "this model is being pruned already", hint="leave the other prune context first"
            )
        _PRUNERS.update((module, (pruner, backends.stock(backend, module))) for module in modules)
    try:
        yield
    finally:
        with _CLAIM:
            for module in modules:
                _PRUNERS.pop(module, None)


@contextlib.contextmanager
def _replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute on one object, and leave the object's own attributes as they were."""
    missing = object()
    before = vars(target).get(name, missing)
    setattr(target, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(target, name)
        else:
            setattr(target, name, before)


def _attention(backend: str, module: nn.Module, *tensors: Any, **options: Any) -> Any:
    """What is registered: the back-end as the module's own file has it, under its pruner if there is one."""
    if HANDLE in options:
        query, key, value = tensors[:3]
        return attend_joined(query, key, value, options), None  # inside a compiled layer
    pruner, stock = _PRUNERS.get(module) or (None, backends.stock(backend, module))
    if pruner is not None and backend == "sdpa" and options.get("softcap") is not None:
        # Older transformers would attend without the cap, and scores with it would be of another attention.
        raise UnsupportedError(
            "the model caps its attention logits, which sdpa does not compute",
            hint="load it with eager attention",
        )
    if pruner is None:
        return stock(module, *tensors, **options)
    return pruner.attend(stock, module, *tensors, **options)


backends.register(_attention)
