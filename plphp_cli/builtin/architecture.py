"""Shape of the built-in model: a stock LLaVA (SigLIP tower, projector, Qwen2 decoder) at small size."""

from __future__ import annotations

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from plphp_cli.builtin.scenes import SIZE

PATCH = 8
VISION_TOKENS = (SIZE // PATCH) ** 2
WIDTH = 192


def vision_config() -> SiglipVisionConfig:
    """The tower: 144 patches of 8 x 8 pixels, four layers."""
    return SiglipVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        vision_use_head=False,
        hidden_act="gelu_pytorch_tanh",
    )


def model_config(vocabulary: int, *, image_token_id: int, bos: int, eos: int, pad: int) -> LlavaConfig:
    """The whole model for a vocabulary of that many tokens."""
    text = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_id=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=VISION_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def build(config: LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    """A freshly initialised model in float32."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    # Tied embeddings at the usual 0.02 start the logits too flat for a vocabulary this small.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.05)
    return model
