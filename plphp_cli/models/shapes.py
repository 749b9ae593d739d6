"""Sizes of well-known decoders, for dummy weights without a download. Importing it does not import torch."""

from typing import Any

# As the models' own config.json has them: the text decoder alone.
_QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
_QWEN2_HALF_B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 152000,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "tie_word_embeddings": False,
    },
    "llava-onevision-0.5b": _QWEN2_HALF_B,
    "llava-onevision-0.5b-mha": {**_QWEN2_HALF_B, "num_key_value_heads": 14},
    "llava-onevision-7b": {**_QWEN2_7B, "vocab_size": 152128},
    "qwen2.5-vl-3b": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-vl-7b": {**_QWEN2_7B, "vocab_size": 152064},
    "internvl3-8b": {**_QWEN2_7B, "vocab_size": 151674},
}
