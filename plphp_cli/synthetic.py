"""A prefilled prompt without a prefill: random keys and values, of the lengths that a cut would leave.

For the memory and speed of decoding alone, where a prefill would take long or teaches nothing.
"""

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache

from plphp_cli.cache import PrunableLayer
from plphp_cli.models import LoadedModel
from plphp_cli.prefilling import Prefilled
from plphp_cli.prompt import Prompt
from plphp_cli.pruning import retained
from plphp_cli.sequence import SequenceState, layer_state
from plphp_cli.vision import VisionTokens


def synthetic_prefilled(
    loaded: LoadedModel, prompt: Prompt, rates: Sequence[float] | None, room: int, seed: int = 0
) -> Prefilled:
    """`prompt` as if it had been prefilled and cut at `rates` (None: uncut), its keys and values random.

    Args:
        loaded: a model whose layers are all of full attention.
        prompt: from `dummy_prompt`.
        rates: retention rate of each layer, repeated over the layers.
        room: new tokens to make room for.
        seed: of keys and values.
    """
    text = loaded.model.config.get_text_config(decoder=True)
    heads, layers = text.num_key_value_heads, text.num_hidden_layers
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    ids = prompt.inputs["input_ids"]
    vision = VisionTokens((ids[0] == loaded.model.config.image_token_id).nonzero().squeeze(-1), None)
    generator = torch.Generator(loaded.device).manual_seed(seed)
    cache, states = DynamicCache(), []
    cache.layers = []
    for index in range(layers):
        kept = (
            prompt.vision_tokens
            if rates is None
            else retained(rates[index % len(rates)], prompt.vision_tokens)
        )
        held = prompt.prompt_tokens - prompt.vision_tokens + kept
        shape = (1, heads, held, width)
        keys, values = (
            torch.empty(shape, device=loaded.device, dtype=loaded.dtype).normal_(generator=generator)
            for _ in range(2)
        )
        layer = PrunableLayer()
        layer.update(keys, values)
        layer.hold(None, room)
        layer.seen, layer.fused = prompt.prompt_tokens, True
        cache.layers.append(layer)
        states.append(layer_state(index, layer, vision, None))
    cache.layer_class_to_replicate = None
    logits = torch.zeros(text.vocab_size, device=loaded.device)
    positions = torch.tensor([[prompt.prompt_tokens - 1]], device=loaded.device)
    state = SequenceState(tuple(states), prompt.prompt_tokens, vision, {})
    return Prefilled(ids, cache, logits, positions, state)
