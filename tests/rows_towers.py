"""Rows of further types whose images, or tiles, are pictures of one size, or codes; see `rows_grids`."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from rows_grids import HEADS, MIXED, PLACEHOLDERS, SHORT, changed
from rows_idefics import in_tiles as in_one_stack
from rows_llava import PINPOINTS, in_tiles, whole
from rows_more import SAM
from toys import (
    IMAGE,
    TEXT,
    TOWER,
    VIDEO,
    VISION_END,
    VISION_START,
    Family,
    Inputs,
    made,
    pixels,
    prompt_ids,
    randomised,
)
from transformers import CLIPVisionConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}


def one_size(name: str, model: Any, seed: int) -> Family:
    """Images of one size, 16 tokens each."""
    images = pixels(3, seed)
    prompts = (
        {"input_ids": prompt_ids([16, 16], seed), "pixel_values": images[:2]},
        {"input_ids": prompt_ids([16], seed + 1), "pixel_values": images[2:]},
    )
    return Family(name, randomised(model, seed), prompts)


def as_encoded(name: str, model: Any, seed: int, shown: Iterable[Inputs]) -> Family:
    """As many tokens as the model's own encoder makes of each image."""
    prompts = []
    for inputs in shown:
        with torch.no_grad():
            features = model.base_model.get_image_features(**inputs, return_dict=True).pooler_output
        counts = [image.shape[:-1].numel() for image in features]
        prompts.append({"input_ids": prompt_ids(counts, seed + len(prompts)), **inputs})
    return Family(name, randomised(model, seed), tuple(prompts))


def pp_chart2table(seed: int = 0) -> Family:
    text = {**SHORT, "model_type": "qwen2"}
    ids = {"image_token_index": IMAGE, "image_seq_length": 16}
    model = made("pp_chart2table", vision_config=SAM, text_config=text, **ids)
    return in_tiles("pp_chart2table", model, seed, size=(128, 128))


def shieldgemma2(seed: int = 0) -> Family:
    model = made(
        "shieldgemma2",
        vision_config=SIGLIP,
        text_config={**MIXED, "model_type": "gemma3_text"},
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    return whole("shieldgemma2", model, seed, 1, tells_images=False)


def deepseek_vl(seed: int = 0) -> Family:
    text = {**SHORT, "model_type": "llama"}
    return one_size(
        "deepseek_vl", made("deepseek_vl", vision_config=SIGLIP, text_config=text, image_token_id=IMAGE), seed
    )


def deepseek_vl_hybrid(seed: int = 0) -> Family:
    """Each image goes through a second tower, too, at a higher resolution."""
    model = made(
        "deepseek_vl_hybrid",
        vision_config=SIGLIP,
        high_res_vision_config={**SAM, "model_type": "sam_vision_model"},
        text_config={**SHORT, "model_type": "llama"},
        image_token_id=IMAGE,
    )

    def sharp(prompt: Inputs) -> Inputs:
        return {**prompt, "high_res_pixel_values": pixels(len(prompt["pixel_values"]), 7, size=(128, 128))}

    return changed(one_size("deepseek_vl_hybrid", model, seed), sharp)


def deepseek_ocr2(seed: int = 0) -> Family:
    """Tiles beside one view of the whole, in one piece per image."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = made(
        "deepseek_ocr2",
        vision_config={
            "sam_config": {**SAM, "downsample_channels": [16, 32]},
            "encoder_config": {**tower, "num_attention_heads": 4, "num_key_value_heads": 4},
        },
        text_config={
            **SHORT,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse"],
        },
        image_token_id=IMAGE,
    )
    tiles = {"pixel_values_local": pixels(1, seed + 1, size=(96, 96)), "num_local_patches": [1, 0]}
    shown = [
        {"pixel_values": pixels(2, seed, size=(128, 128)), **tiles},
        {"pixel_values": pixels(1, seed + 2, size=(128, 128))},
    ]
    return as_encoded("deepseek_ocr2", model, seed, shown)


def janus(seed: int = 0) -> Family:
    tower = {key: value for key, value in TOWER.items() if key != "intermediate_size"}
    model = made(
        "janus",
        vision_config={**tower, "mlp_ratio": 2, "projection_dim": 64, "num_image_tokens": 16},
        vq_config={
            "num_embeddings": 16,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "projection_dim": 64,
            "image_token_embed_dim": 64,
        },
        text_config={**SHORT, "model_type": "llama"},
        image_token_id=IMAGE,
    )
    return one_size("janus", model, seed)


def qianfan_ocr(seed: int = 0) -> Family:
    model = made(
        "qianfan_ocr",
        vision_config={**TOWER, "image_size": [32, 32], "patch_size": [4, 4]},
        text_config={**SHORT, "model_type": "qwen3", "head_dim": 16},
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    return in_tiles("qianfan_ocr", model, seed)


def ovis2(seed: int = 0) -> Family:
    """Vision tokens are mixtures of the entries of a visual vocabulary."""
    model = made(
        "ovis2",
        vision_config={**TOWER, "vocab_size": 32},
        text_config={**SHORT, "model_type": "qwen2"},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[291, 292, 293, 294, 295],
        vocab_size=300,
        hidden_size=64,
    )
    return in_tiles("ovis2", model, seed)


def aria(seed: int = 0) -> Family:
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    model = made(
        "aria",
        vision_config=Idefics3VisionConfig(**{**TOWER, "patch_size": 4}),
        text_config={**SHORT, "model_type": "aria_text", **experts},
        image_token_index=IMAGE,
        projector_patch_to_query_dict={64: 16},
    )
    return in_tiles("aria", model, seed)


def granite_docling(seed: int = 0) -> Family:
    tower = {**TOWER, "patch_size": 4, "scale_factor": 2, "deepstack_visual_indexes": [0, 1]}
    model = made(
        "granite_docling",
        vision_config={**tower, "out_hidden_size": 64, "use_fine_route": False},
        text_config={**SHORT, "attention_multiplier": 0.25},
        image_token_id=IMAGE,
    )

    def whole_tiles(prompt: Inputs) -> Inputs:
        return {**prompt, "pixel_attention_mask": prompt["pixel_attention_mask"].any(-1).any(-1)}

    return changed(in_one_stack("granite_docling", model, seed), whole_tiles)


def granite4_vision(seed: int = 0) -> Family:
    """DeepStack at chosen layers, from zeros where the tokens stand: the features of no depth are theirs."""
    model = made(
        "granite4_vision",
        vision_config={**SIGLIP, "hidden_size": 64, "patch_size": 4},
        text_config={**TEXT, "num_hidden_layers": 4, "attention_multiplier": 0.25},
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="2/4",
        deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[0, 1, 2, 3],
        vision_feature_select_strategy="full",
    )
    model, prompts = randomised(model, seed), []
    tiles = pixels(9, seed).view(3, 3, 3, 32, 32)
    for sizes, images in (([[30, 60], [60, 28]], tiles[:2]), ([[64, 31]], tiles[2:])):
        inputs: Inputs = {"pixel_values": images, "image_sizes": torch.tensor(sizes)}
        with torch.no_grad():
            features = model.model.get_image_features(**inputs, return_dict=True).deepstack_features[0][1]
        counts = [image.shape[0] for image in features]
        prompts.append({"input_ids": prompt_ids(counts, seed + len(prompts)), **inputs})
    return Family("granite4_vision", model, tuple(prompts), tells_images=False)


def step3p7(seed: int = 0) -> Family:
    model = made(
        "step3p7",
        vision_config={**TOWER, "patch_size": 2, "max_position_embeddings": 256},
        text_config={
            **MIXED,
            "num_local_experts": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "share_expert_dim": 32,
        },
        image_token_id=IMAGE,
    )
    tiles = {"pixel_values_local": pixels(3, seed + 1), "num_local_patches": [2, 1]}
    shown = [
        {"pixel_values": pixels(2, seed), **tiles},
        {"pixel_values": pixels(1, seed + 2), "num_local_patches": [0]},
    ]
    return as_encoded("step3p7", model, seed, shown)


def perception_lm(seed: int = 0) -> Family:
    """With another tower than timm's, which is not at hand."""
    model = made(
        "perception_lm",
        vision_config=CLIPVisionConfig(**TOWER, model_args={"embed_dim": 32}),
        text_config={**SHORT, "model_type": "llama"},
        **PLACEHOLDERS,
    )
    family = in_tiles("perception_lm", model, seed)
    return changed(family, lambda prompt: {**prompt, "pixel_values": prompt["pixel_values"][None]})


def fast_vlm(seed: int = 0) -> Family:
    """With another convolutional tower than timm's, which is not at hand."""
    tower = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    model = made(
        "fast_vlm",
        vision_config={**tower, "model_type": "resnet", "hidden_size": 32},
        text_config={**SHORT, "model_type": "qwen2"},
        image_token_index=IMAGE,
    )
    return one_size("fast_vlm", model, seed)


def molmo2(seed: int = 0) -> Family:
    """Patches of all crops, pooled as the processor says; the mask is open among vision tokens."""
    model = made(
        "molmo2",
        vision_config={**TOWER, **HEADS, "image_size": [32, 32], "num_position_embeddings": 16},
        adapter_config={
            **HEADS,
            "vision_feature_layer": [-1, -2],
            "hidden_size": 32,
            "intermediate_size": 64,
            "text_hidden_size": 64,
        },
        text_config={**SHORT, "head_dim": 16, "additional_vocab_size": 8},
        image_patch_id=IMAGE,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
    )
    generator, prompts = torch.Generator().manual_seed(seed), []
    four = torch.arange(16).view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
    for count in (2, 1):
        ids = prompt_ids([8] * count, seed + len(prompts))
        prompts.append(
            {
                "input_ids": ids,
                "mm_token_type_ids": (ids == IMAGE).int(),
                "pixel_values": torch.randn(2 * count, 16, 192, generator=generator),
                "image_token_pooling": torch.cat([four + 16 * crop for crop in range(2 * count)]),
                "image_grids": torch.tensor([[2, 2, 2, 2]] * count),
                "image_num_crops": torch.tensor([2] * count),
            }
        )
    return Family("molmo2", randomised(model, seed), tuple(prompts))


VQ = {"latent_channels": 32, "base_channels": 32, "num_res_blocks": 1}


def chameleon(seed: int = 0) -> Family:
    """Images as codes of the vocabulary; the config names their token by its text."""
    codes = {f"IMGIMG{''.join('ABCDEFGHIJ'[int(c)] for c in str(i))}Z": 200 + i for i in range(32)}
    vision = {**VQ, "embed_dim": 8, "num_embeddings": 32, "resolution": 32, "channel_multiplier": [1] * 4}
    model = made("chameleon", **SHORT, vq_config=vision, vocabulary_map={"<image>": IMAGE, **codes})
    return one_size("chameleon", model, seed)


def emu3(seed: int = 0) -> Family:
    codes = {f"<|visual token {i:06d}|>": 200 + i for i in range(32)}
    vision = {**VQ, "codebook_size": 32, "channel_multiplier": [1, 1], "attn_resolutions": []}
    model = made(
        "emu3",
        text_config=SHORT,
        vq_config={**vision, "hidden_size": 32, "temporal_downsample_factor": 1},
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": 199, **codes},
    )
    family = as_encoded("emu3", model, seed, _sized([[16, 16], [8, 12]], [[12, 16]], seed))
    return replace(family, tells_images=False)


def _sized(first: list[list[int]], second: list[list[int]], seed: int) -> list[Inputs]:
    """Images padded to one size, and the sizes that they have."""
    prompts = []
    for sizes in (first, second):
        largest = tuple(max(edges) for edges in zip(*sizes, strict=True))
        images = pixels(len(sizes), seed + len(prompts), size=largest)
        prompts.append({"pixel_values": images, "image_sizes": torch.tensor(sizes)})
    return prompts


def apertus1p5(seed: int = 0) -> Family:
    vision = {
        **VQ,
        "codebook_size": 32,
        "embed_dim": 8,
        "channel_multiplier": [1] * 3,
        "attn_resolutions": [8],
    }
    model = made(
        "apertus1p5",
        vision_config={**vision, "resolution": 32},
        audio_config={"model_type": "wavtokenizer_encoder", "codebook_size": 16},
        text_config=SHORT,
        image_token_id=IMAGE,
        audio_token_id=VIDEO,
        image_token_offset=200,
        audio_token_offset=232,
    )
    return as_encoded("apertus1p5", model, seed, _sized([[32, 32], [16, 24]], [[24, 32]], seed))


ROWS = (
    pp_chart2table,
    shieldgemma2,
    deepseek_vl,
    deepseek_vl_hybrid,
    deepseek_ocr2,
    janus,
    qianfan_ocr,
    ovis2,
    aria,
    granite_docling,
    granite4_vision,
    step3p7,
    perception_lm,
    fast_vlm,
    molmo2,
    chameleon,
    emu3,
    apertus1p5,
)
