import pytest
from families import FAMILIES, load
from transformers import (
    DeepseekV3Config,
    Gemma3nConfig,
    GenerationConfig,
    Llama4Config,
    MllamaConfig,
    Qwen3NextConfig,
    T5Gemma2Config,
)

from plphp_cli.errors import UnsupportedError
from plphp_cli.support import FULL, LINEAR, SLIDING, layer_kinds, left_out


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_of_each_family_are_full_or_left_alone(name):
    kinds = layer_kinds(load(name).model.config)
    hybrid = name in ("gemma3", "aya_vision", "paligemma2")
    assert kinds == ((SLIDING, FULL) * 2 if hybrid else (FULL,) * len(kinds))


def test_linear_attention_is_left_alone():
    kinds = layer_kinds(Qwen3NextConfig(num_hidden_layers=4))
    assert kinds == (LINEAR, LINEAR, LINEAR, FULL)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (lambda: Gemma3nConfig(), "share keys and values"),
        (lambda: Llama4Config(), "chunked attention"),
        (lambda: DeepseekV3Config(), "MLA"),
        (lambda: MllamaConfig(), "cross-attention"),
        (lambda: T5Gemma2Config(), "encoder-decoder"),
        (
            lambda: Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention"] * 2),
            "no full-attention",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_decoder_that_cannot_be_pruned_is_refused_by_name(config, named):
    with pytest.raises(UnsupportedError, match=named):
        layer_kinds(config())


def test_what_a_checkpoint_asks_for_and_is_left_out_has_a_name():
    config = GenerationConfig(num_beams=5, num_return_sequences=2, prompt_lookup_num_tokens=3)
    assert left_out(config) == [
        "beam search (num_beams > 1)",
        "num_return_sequences > 1",
        "assisted decoding",
    ]
    assert left_out(GenerationConfig(stop_strings=["x"], max_time=3.0)) == [
        "a text that ends the answer (stop_strings)",
        "a time limit (max_time)",
    ]
    assert left_out(GenerationConfig(do_sample=True, temperature=0.7)) == []
