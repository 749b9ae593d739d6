"""Rows of families whose tokens have positions in time, height and width (mRoPE): Qwen-VL and GLM-V."""

import torch
from toys import IMAGE, TEXT, VIDEO, VISION_END, VISION_START, Family, prompt_ids, randomised
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
}


def mrope() -> dict:
    """Anew each time: configs write into what they are given."""
    return {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}


def in_patches(name: str, model, seed: int) -> Family:
    """Images of any size, as a list of patches and a grid per image; each token stands for four patches."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for grids in ([[1, 4, 8], [1, 6, 4]], [[1, 8, 8]]):
        counts = [t * h * w // 4 for t, h, w in grids]
        ids = prompt_ids(counts, seed + len(prompts), ([VISION_START], [VISION_END]))
        prompts.append(
            {
                "input_ids": ids,
                "mm_token_type_ids": (ids == IMAGE).int(),
                "pixel_values": torch.randn(4 * sum(counts), 3 * 2 * 4**2, generator=generator),
                "image_grid_thw": torch.tensor(grids),
            }
        )
    return Family(name, randomised(model, seed), tuple(prompts))


def qwen2_vl(seed: int = 0) -> Family:
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
        text_config={**TEXT, **mrope()},
        **IDS,
    )
    return in_patches("qwen2_vl", Qwen2VLForConditionalGeneration(config), seed)


def qwen2_5_vl(seed: int = 0) -> Family:
    config = Qwen2_5_VLConfig(
        vision_config={**TOWER, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config={**TEXT, **mrope()},
        **IDS,
    )
    return in_patches("qwen2_5_vl", Qwen2_5_VLForConditionalGeneration(config), seed)


def qwen3_vl(seed: int = 0) -> Family:
    """DeepStack: features of two depths of the tower are added to the vision tokens of the first layers."""
    config = Qwen3VLConfig(
        vision_config={**TOWER, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        text_config={**TEXT, **mrope(), "head_dim": 16},
        **IDS,
    )
    return in_patches("qwen3_vl", Qwen3VLForConditionalGeneration(config), seed)


def glm4v(seed: int = 0) -> Family:
    config = Glm4vConfig(
        vision_config={**TOWER, "image_size": 32},
        text_config={**TEXT, **mrope()},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=295,
        video_end_token_id=294,
    )
    return in_patches("glm4v", Glm4vForConditionalGeneration(config), seed)


ROWS = (qwen2_vl, qwen2_5_vl, qwen3_vl, glm4v)
