"""Rows of further types whose images are lists of patches with a grid, or a place, each.

Each is made by its `model_type`, so that a transformers that lacks it lacks the row, and with two decoder
layers, so that many types stay cheap.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rows_more import GLM_IDS, gated_deltas
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
    made,
    prompt_ids,
    randomised,
)

SHORT = {**TEXT, "num_hidden_layers": 2}
MIXED = {**SHORT, **HYBRID, "num_hidden_layers": 2, "layer_types": HYBRID["layer_types"][:2], "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWS = {**PATCHES, "window_size": 16, "fullatt_block_indexes": [1]}
DEEPSTACK = {**PATCHES, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
PLACEHOLDERS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
SMALL_TOWER = {key: value for key, value in TOWER.items() if key != "image_size"} | {"patch_size": 4}


def changed(family: Family, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Family:
    return replace(family, prompts=tuple(change(dict(prompt)) for prompt in family.prompts))


def untyped(prompt: dict[str, Any]) -> dict[str, Any]:
    """Without the types of tokens, which the model does not take."""
    return {key: value for key, value in prompt.items() if key != "mm_token_type_ids"}


def one_frame(prompt: dict[str, Any]) -> dict[str, Any]:
    """Patches of one frame, not of two."""
    return {**prompt, "pixel_values": prompt["pixel_values"][:, : 3 * 4**2]}


def glmga(seed: int = 0) -> Family:
    vision = {**PATCHES, "model_type": "glm4v_vision", "image_size": 32}
    text = {**SHORT, **mrope(), "model_type": "glm4v_text"}
    return in_patches("glmga", made("glmga", vision_config=vision, text_config=text, **GLM_IDS), seed)


def cosmos3_omni(seed: int = 0) -> Family:
    vision = {**DEEPSTACK, "model_type": "qwen3_vl_vision"}
    text = {**SHORT, **mrope(), "model_type": "qwen3_vl_text", "head_dim": 16}
    return in_patches(
        "cosmos3_omni", made("cosmos3_omni", vision_config=vision, text_config=text, **IDS), seed
    )


def cosmos3_edge(seed: int = 0) -> Family:
    model = made(
        "cosmos3_edge",
        vision_config={**SMALL_TOWER, "num_patches": 64},
        text_config={**SHORT, **mrope(), "head_dim": 16},
        projector_hidden_size=64,
        **IDS,
    )
    return changed(in_patches("cosmos3_edge", model, seed), one_frame)


def cohere_compass(seed: int = 0) -> Family:
    rope = {kind: mrope()["rope_parameters"] for kind in MIXED["layer_types"]}
    text = {key: value for key, value in MIXED.items() if key != "head_dim"} | {"rope_parameters": rope}
    model = made("cohere_compass", vision_config=DEEPSTACK, text_config=text, **IDS)
    return in_patches("cohere_compass", model, seed)


def exaone4_5(seed: int = 0) -> Family:
    model = made(
        "exaone4_5",
        vision_config={**WINDOWS, "num_key_value_heads": 2},
        text_config={**MIXED, "model_type": "exaone4"},
        **PLACEHOLDERS,
    )
    return changed(in_patches("exaone4_5", model, seed), untyped)


def ernie4_5_vl_moe(seed: int = 0) -> Family:
    """Each token goes to the experts of text or of images, by its type."""
    rope = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [3, 3, 2]}
    experts = {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": [32, 32],
        "moe_num_shared_experts": 1,
    }
    model = made(
        "ernie4_5_vl_moe",
        vision_config={key: value for key, value in PATCHES.items() if key != "out_hidden_size"},
        text_config={**SHORT, **experts, "rope_parameters": rope},
        **GLM_IDS,
    )
    family = changed(in_patches("ernie4_5_vl_moe", model, seed), one_frame)
    return changed(family, lambda prompt: {**prompt, "moe_mm_token_type_ids": prompt["mm_token_type_ids"]})


def hyperclovax_vision_v2(seed: int = 0) -> Family:
    model = made(
        "hyperclovax_vision_v2",
        vision_config={**WINDOWS, "model_type": "qwen2_5_vl_vision"},
        text_config={**SHORT, "model_type": "hyperclovax"},
        **PLACEHOLDERS,
    )
    return changed(in_patches("hyperclovax_vision_v2", model, seed), untyped)


def paddleocr_vl(seed: int = 0) -> Family:
    model = made(
        "paddleocr_vl",
        vision_config={**TOWER, "patch_size": 4},
        text_config={**SHORT, **mrope(), "head_dim": 16},
        **IDS,
    )
    family = changed(in_patches("paddleocr_vl", model, seed), one_frame)
    return changed(family, lambda p: {**p, "pixel_values": p["pixel_values"].view(-1, 3, 4, 4)})


def video_llama_3(seed: int = 0) -> Family:
    text = {**SHORT, "model_type": "qwen2"}
    model = made("video_llama_3", vision_config=SMALL_TOWER, text_config=text, **PLACEHOLDERS)
    family = changed(changed(in_patches("video_llama_3", model, seed), one_frame), untyped)
    merged_by = torch.tensor([2])
    return changed(family, lambda p: {**p, "image_merge_sizes": merged_by.repeat(len(p["image_grid_thw"]))})


def hunyuan_vl(seed: int = 0) -> Family:
    """A feature ends each row of an image, and one stands before and one behind it."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}
    model = made(
        "hunyuan_vl",
        vision_config={
            **SMALL_TOWER,
            "out_hidden_size": 64,
            "spatial_merge_size": 2,
            "max_image_size": 64,
            "img_max_token_num": 64,
        },
        text_config={**SHORT, "head_dim": 16, "rope_parameters": rope},
        image_token_id=IMAGE,
        im_start_id=VISION_START,
        im_end_id=VISION_END,
        im_newline_id=VIDEO,
    )
    generator, prompts = torch.Generator().manual_seed(seed), []
    for grids in ([[1, 4, 8], [1, 6, 4]], [[1, 8, 8]]):
        ids = prompt_ids([h // 2 * (w // 2 + 1) + 2 for _, h, w in grids], seed + len(prompts))
        prompts.append(
            {
                "input_ids": ids,
                "mm_token_type_ids": (ids == IMAGE).int(),
                "pixel_values": torch.randn(sum(h * w for _, h, w in grids), 48, generator=generator),
                "image_grid_thw": torch.tensor(grids),
            }
        )
    # Older ones give the features of all images in one piece.
    return Family("hunyuan_vl", randomised(model, seed), tuple(prompts), tells_images=False)


def lfm3_vl(seed: int = 0) -> Family:
    model = made(
        "lfm3_vl",
        vision_config={
            **SMALL_TOWER,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention"],
        },
        text_config={**TEXT, "model_type": "lfm3", "num_hidden_layers": 4},
        projector_hidden_size=64,
        **IDS,
    )
    return changed(in_patches("lfm3_vl", model, seed), untyped)


def minimax_m3_vl(seed: int = 0) -> Family:
    model = made(
        "minimax_m3_vl",
        vision_config={**TOWER, "patch_size": 4},
        text_config={
            **SHORT,
            "head_dim": 16,
            "rotary_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 32,
        },
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=64,
    )
    # Older ones give the features of all images in one piece.
    return replace(changed(in_patches("minimax_m3_vl", model, seed), untyped), tells_images=False)


def _muse(kind: str, seed: int, text: dict[str, Any], **more: Any) -> Family:
    model = made(
        kind,
        vision_config={
            **SMALL_TOWER,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            "max_position_embeddings": 64,
            "merge_size": 2,
        },
        text_config={**MIXED, **text},
        out_hidden_size=128,
        projector_hidden_size=64,
        **PLACEHOLDERS,
        **more,
    )
    return changed(in_patches(kind, model, seed), untyped)


def muse_glimmer(seed: int = 0) -> Family:
    return _muse("muse_glimmer", seed, {})


def muse_spark(seed: int = 0) -> Family:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    audio = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "out_hidden_size": 64}
    return _muse(
        "muse_spark", seed, {**experts, "moe_hidden_size": 32}, audio_config=audio, audio_token_id=293
    )


def _omni(kind: str, seed: int, audio: dict[str, Any], **config: Any) -> Family:
    """The thinker: its positions are those of a prompt with images only where a mask is given, too."""
    ears = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    markers = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    model = made(kind, audio_config={**ears, "d_model": 16, "output_dim": 64, **audio}, **config, **markers)
    family = changed(in_patches(kind, model, seed), untyped)
    return changed(family, lambda prompt: {**prompt, "attention_mask": torch.ones_like(prompt["input_ids"])})


def qwen2_5_omni_thinker(seed: int = 0) -> Family:
    ids = {"image_token_index": IMAGE, "video_token_index": VIDEO, "audio_token_index": 293}
    text = {**SHORT, **mrope()}
    return _omni("qwen2_5_omni_thinker", seed, {}, vision_config=WINDOWS, text_config=text, **ids)


def qwen3_omni_moe_thinker(seed: int = 0) -> Family:
    ids = {**PLACEHOLDERS, "audio_token_id": 293}
    text = {**SHORT, **mrope(), **EXPERTS, "head_dim": 16}
    audio = {"downsample_hidden_size": 8}
    return _omni("qwen3_omni_moe_thinker", seed, audio, vision_config=DEEPSTACK, text_config=text, **ids)


def _minicpm(kind: str, seed: int, **more: Any) -> Family:
    """Slices of images, each an entry of the features: none says whose it is. Older ones take one size."""
    deltas = {**gated_deltas(), "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    model = made(
        kind,
        vision_config={**TOWER, "image_size": 64, "patch_size": 4, "insert_layer_id": 0},
        text_config={**deltas, "model_type": "qwen3_5_text"},
        insert_layer_id=0,
        downsample_mode="16x",
        **PLACEHOLDERS,
        **more,
    )
    generator, prompts = torch.Generator().manual_seed(seed), []
    for sizes in ([[8, 16], [8, 16]], [[16, 8]]):
        counts = [height * width // 16 for height, width in sizes]
        ids = prompt_ids(counts, seed + len(prompts), ([VISION_START], [VISION_END]))
        patches = torch.randn(1, 3, 4, 4 * 16 * sum(counts), generator=generator)
        prompts.append({"input_ids": ids, "pixel_values": patches, "target_sizes": torch.tensor(sizes)})
    return Family(kind, randomised(model, seed), tuple(prompts), tells_images=False)


def minicpmv4_6(seed: int = 0) -> Family:
    return _minicpm("minicpmv4_6", seed)


def minicpmv4_7(seed: int = 0) -> Family:
    ids = {"image_start_id": VISION_START, "image_end_id": VISION_END}
    markers = {**ids, "slice_start_id": 295, "slice_end_id": 294, "newline_id": 293}
    family = _minicpm("minicpmv4_7", seed, **markers)
    return changed(family, lambda p: {**p, "mm_token_type_ids": (p["input_ids"] == IMAGE).int()})


def minicpm_ocr(seed: int = 0) -> Family:
    return _minicpm("minicpm_ocr", seed)


def _gemma4(kind: str, seed: int, vision: dict[str, Any], tokens: int, width: int) -> Family:
    """Full-attention layers have heads of another number and width than sliding ones."""
    model = made(
        kind,
        vision_config={**vision, "patch_size": 4, "pooling_kernel_size": 2},
        text_config={
            **MIXED,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "use_bidirectional_attention": "vision",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 300,
        },
        **PLACEHOLDERS,
        audio_token_id=293,
        boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
    )
    generator, prompts = torch.Generator().manual_seed(seed), []
    for shapes in ([(4, 8), (8, 4)], [(8, 4)]):
        places = [[(x, y) for y in range(height) for x in range(width)] for height, width in shapes]
        ids = prompt_ids([tokens] * len(shapes), seed + len(prompts), ([VISION_START], [VISION_END]))
        prompts.append(
            {
                "input_ids": ids,
                "mm_token_type_ids": (ids == IMAGE).int(),
                "pixel_values": torch.rand(len(shapes), 32, width, generator=generator),
                "image_position_ids": torch.tensor(places),
            }
        )
    return Family(kind, randomised(model, seed), tuple(prompts))


def gemma4(seed: int = 0) -> Family:
    tower = {key: value for key, value in {**TOWER, **HEADS}.items() if key != "image_size"}
    return _gemma4("gemma4", seed, {**tower, "position_embedding_size": 64}, 8, 48)


def gemma4_unified(seed: int = 0) -> Family:
    vision = {"mm_embed_dim": 32, "mm_posemb_size": 64, "output_proj_dims": 32}
    return replace(_gemma4("gemma4_unified", seed, vision, 32, 192), tells_images=False)


ROWS = (
    glmga,
    cosmos3_omni,
    cosmos3_edge,
    cohere_compass,
    exaone4_5,
    ernie4_5_vl_moe,
    hyperclovax_vision_v2,
    paddleocr_vl,
    video_llama_3,
    hunyuan_vl,
    lfm3_vl,
    minimax_m3_vl,
    muse_glimmer,
    muse_spark,
    qwen2_5_omni_thinker,
    qwen3_omni_moe_thinker,
    minicpmv4_6,
    minicpmv4_7,
    minicpm_ocr,
    gemma4,
    gemma4_unified,
)
