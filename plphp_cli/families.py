"""The families of vision-language models: what is proven for each, and what is refused by name.

The one place where families differ. Pruning itself knows none of them: it works on transformers' attention
and cache interfaces, and takes from here only how an encoder's features belong to images. A family is added
by a row here and a row in `tests/`, where the method's invariants are held on its true architecture at toy
size; a test walks transformers' whole image-text-to-text mapping, so that no type is left out.

Importing it does not import torch or transformers.
"""

from dataclasses import dataclass
from typing import Any

from plphp_cli.errors import UnsupportedError

# What one entry of the vision encoder's features stands for.
IMAGE = "image"
TILE = "tile"
PROMPT = "prompt"


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
    Family("Idefics2, 3", ("idefics3", "idefics2"), PROMPT, "tiles, padded images", brief=("idefics2",)),
    Family("Gemma 3", ("gemma3",), TILE, "mask open within an image; sliding layers left alone"),
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
        ("glm4v", "glm4v_moe", "glm46v"),
        IMAGE,
        "any size, mRoPE, experts",
        torchvision=True,
        brief=("glm4v_moe", "glm46v"),
    ),
    Family("GLM-OCR", ("glm_ocr",), IMAGE, "any size, mRoPE", torchvision=True, brief=("glm_ocr",)),
    Family("GOT-OCR 2", ("got_ocr2",), TILE, "one size", brief=("got_ocr2",)),
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
)

# Types that have every part that PLPHP looks for, and still cannot be pruned rightly: why, by name.
REFUSED = {
    "pi0": "a robot's policy: it generates actions, not text from a cache",
    "diffusion_gemma": "block diffusion: tokens are not generated one by one from a cache",
}


def find(model_type: str | None) -> Family | None:
    """The family that a model type belongs to; None if it is not among those proven."""
    return next((family for family in FAMILIES if model_type in family.types), None)


def refuse_type(config: Any) -> None:
    """Raise `UnsupportedError` for a model type that is refused by name."""
    reason = REFUSED.get(config.model_type)
    if reason is not None:
        raise UnsupportedError(f"model type {config.model_type} is not supported: {reason}")


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
