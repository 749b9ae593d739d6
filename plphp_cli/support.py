"""What cannot be pruned rightly yet: refused by name, before anything runs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from plphp_cli import families
from plphp_cli.cache import given_cache
from plphp_cli.errors import UnsupportedError
from plphp_cli.vision import IMAGE_TOKEN_NAMES, image_token_id

FULL, SLIDING, LINEAR = "full", "sliding", "linear"
_KINDS = {DynamicLayer: FULL, DynamicSlidingWindowLayer: SLIDING, LinearAttentionLayer: LINEAR}


def check_model(config: Any, proven: bool = True) -> families.Family | None:
    """The family of a model, from its config alone; refused unless the invariants are proven on it.

    Args:
        config: the whole model's config.
        proven: refuse what is not among the families proven; without it None is returned for those.

    Raises:
        UnsupportedError: the assumption that fails, in one sentence: how its layers attend and cache, which
            token stands for its images, or that its type is not among the families proven.
    """
    families.refuse_type(config)
    layer_kinds(config)
    model = type(config).__name__
    if image_token_id(config) is None:
        raise UnsupportedError(
            f"{model} names no image token, so vision tokens cannot be told from text",
            hint=f"expected one of {', '.join(IMAGE_TOKEN_NAMES)} in the model's config",
        )
    family = families.find(config.model_type)
    if family is None and proven:
        raise UnsupportedError(
            f"model type {config.model_type} is not among those that pruning is proven to be right on",
            hint="`plphp models` lists them; in Python, `prune(model, ...)` tries it unproven",
        )
    return family


def layer_kinds(config: Any) -> tuple[str, ...]:
    """Kind of attention of each decoder layer; `full` layers are pruned, `sliding` and `linear` are not.

    Args:
        config: the whole model's config.

    Raises:
        UnsupportedError: an encoder-decoder; latent, shared, cross- or chunked attention; no full layer at
        all; layers that transformers' cache cannot lay out.
    """
    text = config.get_text_config(decoder=True)
    model = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{model}: an encoder-decoder, whose vision tokens are not in the decoder's cache"
        )
    if _in_any_layer(text, "kv_lora_rank"):
        raise UnsupportedError(
            f"{model}: latent attention (MLA), whose cache has no keys and values per head"
        )
    if getattr(text, "num_kv_shared_layers", 0) or getattr(text, "kv_sharing_modes", None):
        raise UnsupportedError(f"{model}: layers that share keys and values")
    if getattr(text, "cross_attention_layers", None):
        raise UnsupportedError(
            f"{model}: cross-attention, whose vision tokens are not in the decoder's cache"
        )
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        raise UnsupportedError(f"{model}: chunked attention")
    try:
        layers = DynamicCache(config=text).layers
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{model}: transformers' cache cannot lay out its layers ({type(error).__name__}: {error})"
        ) from error
    for layer in layers:
        if type(layer) not in _KINDS:
            raise UnsupportedError(f"{model}: layers cached as {type(layer).__name__}")
    kinds = tuple(_KINDS[type(layer)] for layer in layers)
    if FULL not in kinds:
        raise UnsupportedError(f"{model}: no full-attention layer, so there is no vision cache to prune")
    return kinds


def _in_any_layer(text: Any, name: str) -> bool:
    """Whether any decoder layer has the setting; a config may state it per layer, and then not as a whole."""
    layers = getattr(text, "per_layer_config", None) or [text]
    return any(getattr(layer, name, None) is not None for layer in layers)


def refuse_generate(config: GenerationConfig, arguments: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` for what `generate` was asked and pruning does not support.

    Args:
        config: the generation config as `generate` merges it.
        arguments: the other keyword arguments of the call.
    """
    for refused, feature, hint in _refusals(config, arguments):
        if refused:
            raise UnsupportedError(f"{feature} is not supported while pruning", hint=hint)


def left_out(config: GenerationConfig) -> list[str]:
    """What a model's own generation config asks for and the engine of the commands leaves out, by name."""
    return [feature for refused, feature, _ in _refusals(config, {}) if refused]


def _refusals(config: GenerationConfig, arguments: Mapping[str, Any]) -> list[tuple[bool, str, str]]:
    """Per feature that is not supported: whether it was asked for, its name, what to do instead."""
    past = given_cache(arguments)
    return [
        (config.num_beams not in (None, 1), "beam search (num_beams > 1)", "use num_beams=1"),
        (
            config.num_return_sequences not in (None, 1),
            "num_return_sequences > 1",
            "call generate once per sequence, with different seeds",
        ),
        (
            arguments.get("assistant_model") is not None
            or config.prompt_lookup_num_tokens is not None
            or getattr(config, "assistant_early_exit", None) is not None
            or bool(getattr(config, "use_mtp", None)),
            "assisted decoding",
            "leave out assistant_model, prompt_lookup_num_tokens, assistant_early_exit and use_mtp",
        ),
        (
            bool(getattr(config, "penalty_alpha", None)) and not config.do_sample,
            "contrastive search (penalty_alpha)",
            "leave out penalty_alpha",
        ),
        (getattr(config, "dola_layers", None) is not None, "DoLa (dola_layers)", "leave out dola_layers"),
        (
            any(getattr(config, name, None) is not None for name in ("constraints", "force_words_ids")),
            "constrained beam search",
            "leave out constraints and force_words_ids",
        ),
        (config.prefill_chunk_size is not None, "prefill_chunk_size", "prefill in one piece"),
        (
            config.cache_implementation not in (None, "dynamic"),
            f"cache_implementation={config.cache_implementation!r}",
            "leave it out: the pruned cache is a dynamic one",
        ),
        (
            past is not None and past.get_seq_length() > 0,
            "a non-empty past_key_values",
            "pass the whole prompt",
        ),
        (arguments.get("inputs_embeds") is not None, "inputs_embeds", "pass input_ids"),
        (config.use_cache is False, "use_cache=False", "pruning is of the cache: leave it on"),
        (bool(config.output_attentions), "output_attentions=True", "leave it out"),
        (
            config.guidance_scale not in (None, 1),
            "classifier-free guidance (guidance_scale)",
            "use guidance_scale=1",
        ),
        (bool(config.token_healing), "token_healing", "heal the prompt before generating"),
        (arguments.get("custom_generate") is not None, "custom_generate", "use the model's own generate"),
    ]


def refuse_forward(inputs: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` for what a forward call was asked and pruning does not support.

    Args:
        inputs: all arguments of the call, by name.
    """
    if inputs.get("use_cache") is False:
        raise UnsupportedError("use_cache=False is not supported while pruning", hint="leave the cache on")
    if inputs.get("output_attentions"):
        raise UnsupportedError("output_attentions=True is not supported while pruning", hint="leave it out")
    ids: Tensor | None = inputs.get("input_ids")
    if ids is None:
        raise UnsupportedError("inputs_embeds without input_ids is not supported", hint="pass input_ids")
    if ids.shape[0] != 1:
        raise UnsupportedError(
            f"a batch of {ids.shape[0]} sequences is not supported", hint="run one at a time"
        )
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2 or not bool(mask.all())):
        raise UnsupportedError(
            "padding, or a mask of one's own, is not supported", hint="pass an unpadded prompt"
        )


def refuse_step(inputs: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` for what a forward call on a cut cache was asked and cannot be done rightly.

    Args:
        inputs: all arguments of the call, by name.
    """
    if inputs.get("output_attentions"):
        raise UnsupportedError("output_attentions=True is not supported while pruning", hint="leave it out")
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is not None and ids.shape[0] != 1:
        raise UnsupportedError(
            f"a batch of {ids.shape[0]} sequences is not supported", hint="run one at a time"
        )
    # A cut layer has no column for every token seen, so a mask over those cannot be obeyed.
    if isinstance(mask, Tensor) and not (mask.dim() == 2 and bool(mask.all())):
        raise UnsupportedError("a mask of one's own is not supported on a cut cache", hint="leave it out")


def refuse_cache(cache: Cache) -> None:
    """Raise `UnsupportedError` unless `cache` is a plain dynamic cache."""
    if type(cache) is not DynamicCache:
        raise UnsupportedError(
            f"a {type(cache).__name__} is not supported while pruning", hint="use DynamicCache"
        )
    if getattr(cache, "offloading", False):
        raise UnsupportedError(
            "an offloaded cache is not supported while pruning", hint="leave offloading off"
        )
