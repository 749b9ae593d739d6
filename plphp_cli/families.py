"""The families of vision-language models: what is proven for each, and what is refused by name.

The one place where families differ. Pruning itself knows none of them: it works on transformers' attention
and cache interfaces, and takes from here only how an encoder's features belong to images. A family is added
by a row here and a row in `tests/`, where the method's invariants are held on its true architecture at toy
size; a test walks transformers' whole image-text-to-text mapping, so that no type is left out.

Importing it does not import torch or transformers.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from plphp_cli.errors import RefusedModelError

# What one entry of the vision encoder's features stands for.
IMAGE = "image"
TILE = "tile"
PROMPT = "prompt"


class Assumption(StrEnum):
    """What pruning assumes of a model, said as it fails: each refusal of a model names one of these."""

    NO_CACHE = "no KV cache from which text is generated token by token"
    OWN_GENERATE = "a generate of its own, past which no prompt's token ids come"
    ENCODER_DECODER = "an encoder-decoder, whose vision tokens are not in the decoder's cache"
    CROSS_ATTENTION = "vision by cross-attention, whose vision tokens are not in the decoder's cache"
    IMAGE_TOKEN = "unknown image token: its config names none, so vision tokens cannot be told from text"
    PIXELS = "images that are not given as pixel_values"
    POSITIONS = "positions of image tokens that only its forward works out, not transformers' generate"
    LATENT = "latent attention (MLA), whose cache has no keys and values per head"
    SHARED = "layers that share keys and values"
    LAYOUT = "layers that are neither full, sliding-window nor linear attention"
    NO_FULL = "no full-attention layer, so there is no vision cache to prune"


@dataclass(frozen=True)
class Family:
    """A family whose invariants are proven.

    Attributes:
        title: the name that users know it by.
        types: transformers' `model_type` of its models.
        features: what one entry of the encoder's features stands for: an image, a tile, or the whole prompt.
            Only the first tells which vision tokens belong to which image.
        traits: what sets it apart, and is part of its proof.
        torchvision: whether its processor needs torchvision.
        brief: those of its types that are held to fewer settings, and without their real processor.
        plain: whether a prompt without a chat template is the images and the text, nothing else.
        whole: whether every token of a prompt sees every other, so that a longer prompt is another one.
    """

    title: str
    types: tuple[str, ...]
    features: str
    traits: str = ""
    torchvision: bool = False
    brief: tuple[str, ...] = ()
    plain: bool = False
    whole: bool = False


def _brief(
    title: str, types: tuple[str, ...], features: str, traits: str, torchvision: bool = False
) -> Family:
    """A family all of whose types are held to fewer settings."""
    return Family(title, types, features, traits, torchvision, brief=types)


FAMILIES = (
    Family(
        "LLaVA-1.5, ViP-LLaVA, Pixtral 12B",
        ("llava", "vipllava"),
        IMAGE,
        "one size; Pixtral: any size, needs torchvision",
        brief=("vipllava",),
    ),
    Family("LLaVA-NeXT", ("llava_next",), IMAGE, "tiles"),
    Family(
        "LLaVA-NeXT-Video (images)",
        ("llava_next_video",),
        IMAGE,
        "tiles",
        torchvision=True,
        brief=("llava_next_video",),
    ),
    Family("LLaVA-OneVision", ("llava_onevision",), IMAGE, "tiles", torchvision=True),
    Family("Qwen2-VL", ("qwen2_vl",), IMAGE, "any size, mRoPE", torchvision=True),
    Family("Qwen2.5-VL", ("qwen2_5_vl",), IMAGE, "any size, mRoPE", torchvision=True),
    Family(
        "Qwen3-VL",
        ("qwen3_vl", "qwen3_vl_moe"),
        IMAGE,
        "any size, mRoPE, DeepStack, experts",
        torchvision=True,
        brief=("qwen3_vl_moe",),
    ),
    Family(
        "Qwen3.5",
        ("qwen3_5", "qwen3_5_moe"),
        IMAGE,
        "any size, mRoPE, experts; linear layers left alone",
        torchvision=True,
        brief=("qwen3_5", "qwen3_5_moe"),
    ),
    Family("InternVL 2.5, 3", ("internvl",), TILE, "tiles", torchvision=True),
    Family("SmolVLM", ("smolvlm",), PROMPT, "tiles, padded images", torchvision=True),
    Family("Idefics3", ("idefics3",), PROMPT, "tiles, padded images"),
    Family(
        "Idefics2",
        ("idefics2",),
        PROMPT,
        "padded images; only where `sliding_window` is null (its default is 4096)",
        brief=("idefics2",),
    ),
    Family(
        "Gemma 3, ShieldGemma 2",
        ("gemma3", "shieldgemma2"),
        TILE,
        "mask open within an image; sliding layers left alone",
        brief=("shieldgemma2",),
    ),
    _brief(
        "Gemma 4",
        ("gemma4",),
        IMAGE,
        "any size, mask open within an image; sliding layers left alone; not E2B, E4B (shared caches)",
        torchvision=True,
    ),
    _brief(
        "Gemma 4 Unified",
        ("gemma4_unified",),
        PROMPT,
        "any size, mask open within an image; sliding layers left alone; not E2B, E4B (shared caches)",
        torchvision=True,
    ),
    Family("Mistral 3", ("mistral3",), IMAGE, "any size", torchvision=True),
    Family(
        "PaliGemma 1, 2",
        ("paligemma",),
        IMAGE,
        "the whole prompt sees itself; 2: sliding layers left alone, softcap (`--attn eager`)",
        plain=True,
        whole=True,
    ),
    Family(
        "GLM-4.1V, 4.5V, 4.6V",
        ("glm4v", "glm4v_moe", "glm46v", "glmga"),
        IMAGE,
        "any size, mRoPE, experts",
        torchvision=True,
        brief=("glm4v_moe", "glm46v", "glmga"),
    ),
    Family("GLM-OCR", ("glm_ocr",), IMAGE, "any size, mRoPE", torchvision=True, brief=("glm_ocr",)),
    _brief("GOT-OCR 2, PP-Chart2Table", ("got_ocr2", "pp_chart2table"), TILE, "one size"),
    Family("LightOnOCR", ("lighton_ocr",), IMAGE, "any size", brief=("lighton_ocr",)),
    Family("Aya Vision", ("aya_vision",), TILE, "tiles; sliding layers left alone"),
    Family(
        "Command A Vision",
        ("cohere2_vision",),
        TILE,
        "tiles; sliding layers left alone",
        torchvision=True,
        brief=("cohere2_vision",),
    ),
    Family(
        "LFM2-VL",
        ("lfm2_vl",),
        TILE,
        "any size; convolutions left alone",
        torchvision=True,
        brief=("lfm2_vl",),
    ),
    _brief("LFM3-VL", ("lfm3_vl",), IMAGE, "any size; convolutions left alone", torchvision=True),
    _brief(
        "MiniCPM-V 4.6, 4.7, MiniCPM-OCR",
        ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"),
        TILE,
        "tiles; linear layers left alone",
        torchvision=True,
    ),
    _brief(
        "Qwen2.5-Omni, Qwen3-Omni thinkers (images)",
        ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
        IMAGE,
        "any size, mRoPE, DeepStack, experts; from transformers 5.17 on",
        torchvision=True,
    ),
    _brief(
        "Cosmos 3",
        ("cosmos3_omni", "cosmos3_edge"),
        IMAGE,
        "any size, mRoPE, DeepStack",
        torchvision=True,
    ),
    _brief(
        "North Vision (Cohere Compass)",
        ("cohere_compass",),
        IMAGE,
        "any size, mRoPE, DeepStack; sliding layers left alone",
        torchvision=True,
    ),
    _brief("EXAONE 4.5", ("exaone4_5",), IMAGE, "any size; sliding layers left alone", torchvision=True),
    _brief("ERNIE 4.5 VL", ("ernie4_5_vl_moe",), IMAGE, "any size, mRoPE, experts", torchvision=True),
    _brief("HyperCLOVA X Vision 2", ("hyperclovax_vision_v2",), IMAGE, "any size", torchvision=True),
    _brief("HunYuan-VL", ("hunyuan_vl",), PROMPT, "any size, mRoPE"),
    _brief("PaddleOCR-VL", ("paddleocr_vl",), IMAGE, "any size, mRoPE"),
    _brief("VideoLLaMA 3 (images)", ("video_llama_3",), IMAGE, "any size", torchvision=True),
    _brief(
        "MiniMax M3",
        ("minimax_m3_vl",),
        PROMPT,
        "any size, experts; not with sparse attention",
        torchvision=True,
    ),
    _brief(
        "Muse Glimmer, Spark",
        ("muse_glimmer", "muse_spark"),
        IMAGE,
        "any size, experts; sliding layers left alone",
        torchvision=True,
    ),
    _brief("DeepSeek-VL", ("deepseek_vl", "deepseek_vl_hybrid"), IMAGE, "one size"),
    _brief("DeepSeek-OCR 2", ("deepseek_ocr2",), IMAGE, "tiles, experts"),
    _brief("Janus", ("janus",), IMAGE, "one size"),
    _brief("Qianfan-OCR, Ovis2", ("qianfan_ocr", "ovis2"), TILE, "tiles"),
    _brief("Aria", ("aria",), TILE, "tiles, experts"),
    _brief(
        "Granite Vision 4, Granite Docling",
        ("granite4_vision", "granite_docling"),
        PROMPT,
        "tiles, DeepStack",
    ),
    _brief("Step 3.7", ("step3p7",), IMAGE, "tiles, experts; sliding layers left alone", torchvision=True),
    _brief("Molmo 2", ("molmo2",), IMAGE, "tiles, mask open among vision tokens", torchvision=True),
    _brief("FastVLM", ("fast_vlm",), IMAGE, "one size; with another tower than timm's"),
    _brief(
        "Perception LM", ("perception_lm",), TILE, "tiles; with another tower than timm's", torchvision=True
    ),
    _brief("Chameleon", ("chameleon",), IMAGE, "one size, as codes of the vocabulary"),
    _brief("Emu3", ("emu3",), PROMPT, "any size, as codes of the vocabulary"),
    _brief("Apertus 1.5", ("apertus1p5",), IMAGE, "any size, as codes of the vocabulary", torchvision=True),
)

_BY_NAME = {
    "pi0": (Assumption.NO_CACHE, "a robot's policy, which generates actions"),
    "diffusion_gemma": (Assumption.NO_CACHE, "block diffusion"),
    "blip-2": (Assumption.OWN_GENERATE, "it hands embeddings to its language model"),
    "instructblip": (Assumption.OWN_GENERATE, "it hands embeddings to its language model"),
    "fuyu": (Assumption.PIXELS, "its processor gives image_patches"),
    "video_llava": (Assumption.PIXELS, "its processor gives pixel_values_images"),
    "instructblipvideo": (Assumption.OWN_GENERATE, "it hands embeddings to its language model"),
}
# Types that have every part that a config tells of, and still cannot be pruned rightly: why, by name.
REFUSED = {name: f"{assumption}: {why}" for name, (assumption, why) in _BY_NAME.items()}


def find(model_type: str | None) -> Family | None:
    """The family that a model type belongs to; None if it is not among those proven."""
    return next((family for family in FAMILIES if model_type in family.types), None)


def refuse_type(config: Any) -> None:
    """Raise `RefusedModelError` for a model type that is refused by name."""
    if config.model_type in _BY_NAME:
        raise refusal(config, *_BY_NAME[config.model_type])


def refusal(
    config: Any, assumption: Assumption, detail: str = "", hint: str | None = None
) -> RefusedModelError:
    """The error that says which assumption fails on the model of a config."""
    why = f"{assumption} ({detail})" if detail else str(assumption)
    return RefusedModelError(
        f"model type {config.model_type} cannot be pruned: {why}",
        assumption=assumption.name,
        hint=hint or "`plphp models` lists the families that can be pruned",
    )


def unproven(model_type: str) -> str:
    """What is to be known of a model whose type is in no family, though no assumption fails on its config."""
    return (
        f"pruning is not proven on model type {model_type}: nothing in its config is against it; "
        "`plphp profile --compare-stock` compares it with plain generation"
    )


def table() -> str:
    """The families as a Markdown table, as the README shows it."""
    rows = [
        "| family | `model_type` | proven with | processor needs torchvision |",
        "|---|---|---|---|",
    ]
    for family in FAMILIES:
        marks = dict.fromkeys(family.brief, r"\*")
        types = ", ".join(f"`{name}`{marks.get(name, '')}" for name in family.types)
        rows.append(
            f"| {family.title} | {types} | {family.traits} | {'yes' if family.torchvision else 'no'} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
