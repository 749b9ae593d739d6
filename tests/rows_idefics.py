"""Rows of families that cut an image into tiles beside one view of the whole: Idefics3 and SmolVLM."""

import torch
from toys import IMAGE, TEXT, TOWER, VISION_END, VISION_START, Family, pixels, prompt_ids, randomised
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)


def in_tiles(name: str, model, seed: int) -> Family:
    """Tiles of all images in one row of the batch, 16 tokens each; the second prompt's is padded below."""
    prompts = []
    for tiles in ([3, 2], [1]):
        ids = prompt_ids([16 * n for n in tiles], seed + len(prompts), ([VISION_START], [VISION_END]), 16)
        images = pixels(sum(tiles), seed + len(prompts))[None]
        shown = torch.ones(1, sum(tiles), 32, 32, dtype=torch.bool)
        if tiles == [1]:
            images[..., 20:, :] = 0
            shown[..., 20:, :] = False
        prompts.append({"input_ids": ids, "pixel_values": images, "pixel_attention_mask": shown})
    return Family(name, randomised(model, seed), tuple(prompts), tells_images=False)


def _parts() -> dict:
    return {
        "vision_config": {**TOWER, "patch_size": 4},
        "text_config": LlamaConfig(**TEXT),
        "image_token_id": IMAGE,
        "scale_factor": 2,
    }


def idefics3(seed: int = 0) -> Family:
    return in_tiles("idefics3", Idefics3ForConditionalGeneration(Idefics3Config(**_parts())), seed)


def smolvlm(seed: int = 0) -> Family:
    return in_tiles("smolvlm", SmolVLMForConditionalGeneration(SmolVLMConfig(**_parts())), seed)


ROWS = (idefics3, smolvlm)
