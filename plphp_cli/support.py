"""What cannot be pruned rightly yet: refused by name, before anything runs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from plphp_cli import families
from plphp_cli.cache import given_cache
from plphp_cli.errors import RefusedModelError, UnsupportedError
from plphp_cli.families import Assumption
from plphp_cli.vision import image_token_id, no_image_token

FULL, SLIDING, LINEAR = "full", "sliding", "linear"
# Settings of a generation config that the commands leave out, and what each is when nothing is asked for.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prefill_chunk_size": None,
    "cache_implementation": None,
    "use_cache": True,
    "output_attentions": None,
    "guidance_scale": None,
    "token_healing": None,
    "stop_strings": None,
    "max_time": None,
}
_KINDS = {DynamicLayer: FULL, DynamicSlidingWindowLayer: SLIDING, LinearAttentionLayer: LINEAR}


def check_model(config: Any) -> families.Family | None:
    """The family of a model, from its config alone; None where none is proven, but all assumptions hold.

    Args:
        config: the whole model's config.

    Raises:
        RefusedModelError: the assumption that fails: how its layers attend and cache, which token stands for
            its images, or what its type is known to lack.
    """
    families.refuse_type(config)
    layer_kinds(config)
    if image_token_id(config) is None:
        raise no_image_token(config)
    if not prepares_positions(config):
        raise families.refusal(config, Assumption.POSITIONS, hint="a newer transformers may do so")
    return families.find(config.model_type)


def layer_kinds(config: Any) -> tuple[str, ...]:
    """Kind of attention of each decoder layer; `full` layers are pruned, `sliding` and `linear` are not.

    Args:
        config: the whole model's config.

    Raises:
        RefusedModelError: an encoder-decoder; latent, shared, cross- or chunked attention; no full layer at
        all; layers that transformers' cache cannot lay out.
    """
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise families.refusal(config, Assumption.ENCODER_DECODER)
    if _in_any_layer(text, "kv_lora_rank"):
        raise families.refusal(config, Assumption.LATENT)
    # Where a layer only stores what others elsewhere may read, each still has a cache of its own.
    if getattr(text, "num_kv_shared_layers", 0) or "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        raise families.refusal(config, Assumption.SHARED)
    if getattr(text, "cross_attention_layers", None) or hasattr(config, "cross_layer_interval"):
        raise families.refusal(config, Assumption.CROSS_ATTENTION)
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        raise families.refusal(config, Assumption.LAYOUT, "chunked attention")
    try:
        layers = DynamicCache(config=text).layers
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = f"transformers' cache cannot lay them out: {type(error).__name__}: {error}"
        raise families.refusal(config, Assumption.LAYOUT, why) from error
    for layer in layers:
        if type(layer) not in _KINDS:
            raise families.refusal(config, Assumption.LAYOUT, f"cached as {type(layer).__name__}")
    kinds = tuple(_KINDS[type(layer)] for layer in layers)
    if FULL not in kinds:
        raise _no_full_layer(config, text, kinds)
    return kinds


def _no_full_layer(config: Any, text: Any, kinds: tuple[str, ...]) -> RefusedModelError:
    """The refusal of a decoder none of whose layers sees the whole prompt."""
    window = getattr(text, "sliding_window", None)
    if set(kinds) != {SLIDING} or window is None:
        return families.refusal(config, Assumption.NO_FULL, f"all are {' or '.join(sorted(set(kinds)))}")
    hint = None
    if not getattr(text, "layer_types", None):
        hint = (
            'a copy whose config.json says `"sliding_window": null` in its text_config computes the same '
            f"as long as prompt and answer stay within {window} tokens"
        )
    why = f"its config sets sliding_window = {window}, which holds for all layers"
    return families.refusal(config, Assumption.NO_FULL, why, hint)


def prepares_positions(config: Any) -> bool:
    """Whether `generate` works out multimodal positions, where the model has any; its class tells.

    The decode engine keeps them with each prompt; a forward that works them out keeps them with the model.
    """
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    name = "_prepare_position_ids_for_generation"
    return not hasattr(kind, "get_rope_index") or getattr(kind, name, None) is not getattr(
        GenerationMixin, name, None
    )


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
    features = [feature for refused, feature, _ in _refusals(config, {}) if refused]
    ends = {
        "stop_strings": "a text that ends the answer (stop_strings)",
        "max_time": "a time limit (max_time)",
    }
    return [*features, *(told for name, told in ends.items() if getattr(config, name, None) is not None)]


def without_left_out(config: GenerationConfig) -> dict[str, Any]:
    """Arguments for `generate` that leave out of a model's own generation config what `left_out` names."""
    return {
        name: value for name, value in _NEUTRAL.items() if getattr(config, name, None) not in (None, value)
    }


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
