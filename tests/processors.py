"""Each family's real processor around a small tokenizer, made for the toy model of its row.

The chat templates have the structure of those that the families publish: their markers, the order of images
and text, and what comes before the answer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from rows_llava import PINPOINTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toys import IMAGE, VIDEO, VISION_END, VISION_START, VOCABULARY
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- for part in message.content -%}{{- IMAGE if part.type == 'image' else part.text -}}{%- endfor -%}"
    "{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# Published by llava-hf: all images come first, whatever the order.
IMAGES_FIRST = (
    "{%- for message in messages -%}{{- message.role.upper() + ': ' -}}"
    "{%- for part in message.content | selectattr('type', 'equalto', 'image') -%}{{- '<image>\n' -}}"
    "{%- endfor -%}"
    "{%- for part in message.content | selectattr('type', 'equalto', 'text') -%}{{- part.text + ' ' -}}"
    "{%- endfor -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
INSTRUCT = (
    "{{- bos_token -}}{%- for message in messages -%}{{- '[INST]' if message.role != 'assistant' -}}"
    "{%- for part in message.content -%}{{- IMAGE if part.type == 'image' else part.text -}}{%- endfor -%}"
    "{{- eos_token if message.role == 'assistant' else '[/INST]' -}}{%- endfor -%}"
)
IDEFICS = (
    "{{- '<|im_start|>' -}}{%- for message in messages -%}{{- message.role | capitalize -}}"
    "{{- ':' if message.content[0].type == 'image' else ': ' -}}"
    "{%- for part in message.content -%}{{- '<image>' if part.type == 'image' else part.text -}}"
    "{%- endfor -%}"
    "{{- '<end_of_utterance>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)
GEMMA = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' -}}"
    "{%- for part in message.content -%}"
    "{{- '<start_of_image>' if part.type == 'image' else part.text | trim -}}{%- endfor -%}"
    "{{- '<end_of_turn>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
)
GLM = (
    "{{- '[gMASK]<sop>' -}}{%- for message in messages -%}{{- '<|' + message.role + '|>\n' -}}"
    "{%- for part in message.content -%}"
    "{{- '<|begin_of_image|><|image|><|end_of_image|>' if part.type == 'image' else part.text -}}"
    "{%- endfor -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)
AYA = (
    "{{- bos_token -}}{%- for message in messages -%}{{- '<|START_OF_TURN_TOKEN|>' -}}"
    "{{- '<|CHATBOT_TOKEN|>' if message.role == 'assistant' else '<|USER_TOKEN|>' -}}"
    "{%- for part in message.content -%}{{- '<image>' if part.type == 'image' else part.text -}}"
    "{%- endfor -%}"
    "{{- '<|END_OF_TURN_TOKEN|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Made:
    """How a family's processor is made, and what is particular to it.

    Attributes:
        torchvision: whether it needs torchvision.
        images_first: whether its chat template puts the images before all text.
        one_tile: whether an image that is not alone in its prompt gets a single tile.
    """

    make: Callable[[], Any]
    torchvision: bool
    images_first: bool = False
    one_tile: bool = False


def tokenizer(image: str, start: str = "<start>", end: str = "<end>", *others: str, **named: str) -> Any:
    """A byte-level tokenizer whose image token has the id that the toy models expect."""
    special = {PAD: 0, BOS: 1, EOS: 2, image: IMAGE, "<video>": VIDEO, start: VISION_START, end: VISION_END}
    vocabulary = special | {other: 260 + i for i, other in enumerate(others)}
    vocabulary |= {char: 3 + i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    unused = sorted(set(range(VOCABULARY)) - set(vocabulary.values()))
    vocabulary |= {f"<unused{number}>": number for number in unused}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*special, *others])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, extra_special_tokens=named
    )


def images(name: str, **options: Any) -> Any:
    """An image processor: torchvision's where there is torchvision, as a user gets it, else Pillow's."""
    if is_torchvision_available():
        return getattr(transformers, f"{name}ImageProcessor")(**options)
    module = {"CLIP": "clip", "LlavaNext": "llava_next", "Idefics3": "idefics3", "Gemma3": "gemma3"} | {
        "Siglip": "siglip",
        "GotOcr2": "got_ocr2",
    }
    source = __import__(
        f"transformers.models.{module[name]}.image_processing_pil_{module[name]}", fromlist=["*"]
    )
    return getattr(source, f"{name}ImageProcessorPil")(**options)


def videos(name: str, **options: Any) -> Any:
    return getattr(transformers, f"{name}VideoProcessor")(**options)


SQUARE = {"size": {"height": 32, "width": 32}}
CLIP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
WITHOUT_CLS = {
    "patch_size": 8,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def llava() -> Any:
    return transformers.LlavaProcessor(
        images("CLIP", **CLIP), tokenizer("<image>"), chat_template=IMAGES_FIRST, **WITHOUT_CLS
    )


def llava_next() -> Any:
    return transformers.LlavaNextProcessor(
        images("LlavaNext", **CLIP, image_grid_pinpoints=PINPOINTS),
        tokenizer("<image>", "[INST]", "[/INST]"),
        chat_template=INSTRUCT.replace("IMAGE", "'<image>\n'"),
        **WITHOUT_CLS,
    )


def llava_onevision() -> Any:
    return transformers.LlavaOnevisionProcessor(
        images("LlavaOnevision", **SQUARE, image_grid_pinpoints=PINPOINTS),
        tokenizer("<image>", "<|im_start|>", "<|im_end|>"),
        videos("LlavaOnevision", **SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "'<image>\n'"),
    )


GRID = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
}


def _qwen(processor: str, video: str) -> Any:
    return getattr(transformers, processor)(
        images("Qwen2VL", **GRID),
        tokenizer("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"),
        videos(video, **GRID),
        chat_template=CHATML.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'"),
    )


def qwen2_vl() -> Any:
    return _qwen("Qwen2VLProcessor", "Qwen2VL")


def qwen2_5_vl() -> Any:
    return _qwen("Qwen2_5_VLProcessor", "Qwen2VL")


def qwen3_vl() -> Any:
    return _qwen("Qwen3VLProcessor", "Qwen3VL")


def glm4v() -> Any:
    return transformers.Glm4vProcessor(
        images("Glm4v", **GRID),
        tokenizer(
            "<|image|>",
            "<|begin_of_image|>",
            "<|end_of_image|>",
            "[gMASK]",
            "<sop>",
            "<|user|>",
            "<|assistant|>",
            "<|begin_of_video|>",
            "<|end_of_video|>",
        ),
        videos("Glm4v", **GRID),
        chat_template=GLM,
    )


def internvl() -> Any:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return transformers.InternVLProcessor(
        images("GotOcr2", **SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer("<IMG_CONTEXT>", "<img>", "</img>", "<|im_start|>", "<|im_end|>", **named),
        videos("InternVL", **SQUARE),
        image_seq_length=16,
        chat_template=CHATML.replace("IMAGE", "'<IMG_CONTEXT>\n'"),
    )


TILED = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def _idefics_tokenizer() -> Any:
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    return tokenizer(
        "<image>",
        "<|im_start|>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<global-img>",
        *tiles,
    )


def idefics3() -> Any:
    return transformers.Idefics3Processor(
        images("Idefics3", **TILED), _idefics_tokenizer(), image_seq_len=16, chat_template=IDEFICS
    )


def smolvlm() -> Any:
    sampling = {"fps": 1, "max_frames": 2, "video_size": {"longest_edge": 32}}
    return transformers.SmolVLMProcessor(
        images("SmolVLM", **TILED),
        _idefics_tokenizer(),
        videos("SmolVLM", video_sampling=sampling),
        image_seq_len=16,
        chat_template=IDEFICS,
    )


def gemma3() -> Any:
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    return transformers.Gemma3Processor(
        images("Gemma3", **SQUARE),
        tokenizer("<image_soft_token>", "<start_of_image>", "<end_of_image>", "<start_of_turn>", **named),
        image_seq_length=16,
        chat_template=GEMMA,
    )


def mistral3() -> Any:
    return transformers.PixtralProcessor(
        images("Pixtral", size={"longest_edge": 48}, patch_size=8),
        tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
        patch_size=4,
        spatial_merge_size=2,
        chat_template=INSTRUCT.replace("IMAGE", "'[IMG]'"),
    )


def paligemma() -> Any:
    siglip = images("Siglip", **SQUARE)
    siglip.image_seq_length = 16
    return transformers.PaliGemmaProcessor(siglip, tokenizer("<image>"))


def aya_vision() -> Any:
    return transformers.AyaVisionProcessor(
        images("GotOcr2", **SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer(
            "<|IMG_PATCH|>",
            "<|START_OF_IMG|>",
            "<|END_OF_IMG|>",
            "<image>",
            "<|IMG_LINE_BREAK|>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
        ),
        patch_size=4,
        img_size=32,
        downsample_factor=2,
        chat_template=AYA,
    )


PROCESSORS = {
    "llava": Made(llava, False, images_first=True),
    "llava_next": Made(llava_next, False),
    "llava_onevision": Made(llava_onevision, True, one_tile=True),
    "qwen2_vl": Made(qwen2_vl, True),
    "qwen2_5_vl": Made(qwen2_5_vl, True),
    "qwen3_vl": Made(qwen3_vl, True),
    "internvl": Made(internvl, True),
    "smolvlm": Made(smolvlm, True),
    "idefics3": Made(idefics3, False),
    "gemma3": Made(gemma3, False),
    "mistral3": Made(mistral3, True),
    "paligemma": Made(paligemma, False),
    "glm4v": Made(glm4v, True),
    "aya_vision": Made(aya_vision, False),
}
