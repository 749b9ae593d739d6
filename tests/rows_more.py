"""Rows of types that share their parts with the families above: larger, older and newer relatives."""

import torch
from rows_idefics import in_tiles as in_one_stack
from rows_llava import PINPOINTS, any_resolution, in_tiles, of_any_size
from rows_qwen import IDS, in_patches, mrope
from rows_qwen import TOWER as PATCHES
from toys import (
    HYBRID,
    IMAGE,
    TEXT,
    TOWER,
    VIDEO,
    VISION_END,
    VISION_START,
    Family,
    pixels,
    prompt_ids,
    randomised,
)
from transformers import (
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3Config,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": 295,
    "video_end_token_id": 294,
}

SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 128,
    "patch_size": 8,
    "window_size": 2,
    "global_attn_indexes": [1],
    "mlp_dim": 32,
}


def vipllava(seed: int = 0) -> Family:
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, -2],
    )
    model = randomised(VipLlavaForConditionalGeneration(config), seed)
    images = pixels(3, seed)
    prompts = (
        {"input_ids": prompt_ids([16, 16], seed), "pixel_values": images[:2]},
        {"input_ids": prompt_ids([16], seed + 1), "pixel_values": images[2:]},
    )
    return Family("vipllava", model, prompts)


def llava_next_video(seed: int = 0) -> Family:
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    model = randomised(LlavaNextVideoForConditionalGeneration(config), seed)
    return any_resolution("llava_next_video", model, seed)


def cohere2_vision(seed: int = 0) -> Family:
    config = Cohere2VisionConfig(
        vision_config=SiglipVisionConfig(**{**TOWER, "patch_size": 4}, vision_use_head=False),
        text_config=Cohere2Config(**{**TEXT, **HYBRID}),
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )
    return in_tiles("cohere2_vision", Cohere2VisionForConditionalGeneration(config), seed)


def got_ocr2(seed: int = 0) -> Family:
    config = GotOcr2Config(
        vision_config=SAM,
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return in_tiles("got_ocr2", GotOcr2ForConditionalGeneration(config), seed, size=(128, 128))


def lighton_ocr(seed: int = 0) -> Family:
    config = LightOnOcrConfig(
        vision_config=PixtralVisionConfig(**{**TOWER, "image_size": 64, "patch_size": 4}),
        text_config=Qwen3Config(**TEXT, head_dim=16),
        image_token_id=IMAGE,
    )
    return of_any_size("lighton_ocr", LightOnOcrForConditionalGeneration(config), seed, 8)


def idefics2(seed: int = 0) -> Family:
    config = Idefics2Config(
        vision_config=TOWER,
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 16,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
    )
    return in_one_stack("idefics2", Idefics2ForConditionalGeneration(config), seed)


def lfm2_vl(seed: int = 0) -> Family:
    """A hybrid decoder: short convolutions between the attention layers."""
    config = Lfm2VlConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_patches": 64,
            "patch_size": 4,
            "vision_use_head": False,
        },
        text_config=Lfm2Config(
            **{**TEXT, "num_hidden_layers": 4},
            layer_types=["conv", "full_attention", "conv", "full_attention"],
        ),
        image_token_id=IMAGE,
        projector_hidden_size=64,
    )
    prompts = []
    for shapes in ([[4, 8], [6, 4]], [[8, 8]]):
        counts = [height * width // 4 for height, width in shapes]
        longest = max(height * width for height, width in shapes)
        mask = torch.stack([(torch.arange(longest) < h * w).int() for h, w in shapes])
        prompts.append(
            {
                "input_ids": prompt_ids(counts, seed + len(prompts), ([VISION_START], [VISION_END])),
                "pixel_values": torch.randn(
                    len(shapes), longest, 48, generator=torch.Generator().manual_seed(seed)
                ),
                "pixel_attention_mask": mask,
                "spatial_shapes": torch.tensor(shapes),
            }
        )
    model = randomised(Lfm2VlForConditionalGeneration(config), seed)
    return Family("lfm2_vl", model, tuple(prompts), tells_images=False)


def qwen3_vl_moe(seed: int = 0) -> Family:
    config = Qwen3VLMoeConfig(
        vision_config={**PATCHES, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        text_config={
            **TEXT,
            **mrope(),
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
        **IDS,
    )
    return in_patches("qwen3_vl_moe", Qwen3VLMoeForConditionalGeneration(config), seed)


def gated_deltas() -> dict:
    """A hybrid decoder: gated delta networks (linear attention) between the attention layers."""
    return {
        **TEXT,
        **mrope(),
        "num_hidden_layers": 4,
        "head_dim": 64,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }


def qwen3_5(seed: int = 0) -> Family:
    config = Qwen3_5Config(
        vision_config={**PATCHES, "num_position_embeddings": 64}, text_config=gated_deltas(), **IDS
    )
    return in_patches("qwen3_5", Qwen3_5ForConditionalGeneration(config), seed)


def qwen3_5_moe(seed: int = 0) -> Family:
    text = {key: value for key, value in gated_deltas().items() if key != "intermediate_size"}
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    config = Qwen3_5MoeConfig(
        vision_config={**PATCHES, "num_position_embeddings": 64}, text_config={**text, **experts}, **IDS
    )
    return in_patches("qwen3_5_moe", Qwen3_5MoeForConditionalGeneration(config), seed)


def glm46v(seed: int = 0) -> Family:
    config = Glm46VConfig(
        vision_config={**PATCHES, "model_type": "glm4v_vision", "image_size": 32},
        text_config={**TEXT, **mrope(), "model_type": "glm4v_text"},
        **GLM_IDS,
    )
    return in_patches("glm46v", Glm46VForConditionalGeneration(config), seed)


def glm_ocr(seed: int = 0) -> Family:
    config = GlmOcrConfig(
        vision_config={**PATCHES, "image_size": 32},
        text_config={**TEXT, **mrope(), "head_dim": 16},
        **GLM_IDS,
    )
    return in_patches("glm_ocr", GlmOcrForConditionalGeneration(config), seed)


def glm4v_moe(seed: int = 0) -> Family:
    config = Glm4vMoeConfig(
        vision_config={**PATCHES, "image_size": 32},
        text_config={
            **TEXT,
            **mrope(),
            "head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
        **GLM_IDS,
    )
    return in_patches("glm4v_moe", Glm4vMoeForConditionalGeneration(config), seed)


ROWS = (
    vipllava,
    llava_next_video,
    cohere2_vision,
    got_ocr2,
    lighton_ocr,
    idefics2,
    lfm2_vl,
    qwen3_vl_moe,
    qwen3_5,
    qwen3_5_moe,
    glm46v,
    glm_ocr,
    glm4v_moe,
)
