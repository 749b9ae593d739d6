"""How a prompt is spelt: special tokens, system prompts, chat template, tokenizer, image processor."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from plphp_cli.builtin.architecture import PATCH
from plphp_cli.builtin.questions import ask, sample_group
from plphp_cli.builtin.scenes import SIZE, WORDS

PAD, BOS, EOS, IMAGE = "<|pad|>", "<|bos|>", "<|eos|>", "<image>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, BOS, EOS, IMAGE, SYSTEM, USER, ASSISTANT)

SYSTEM_PROMPTS = (
    "answer questions about pictures of shapes and signs. say what you see.",
    "you are a careful assistant. look at the images and answer the question.",
    "you see one or more images. reply to the user in a few plain words.",
    "you are a helpful assistant that describes images and answers questions about them.",
    "look first, then answer. name places, colors, shapes and sizes.",
    "the user shows you images and asks a question. your answer is short and exact.",
)
"""The first one is the chat template's default."""

CHAT_TEMPLATE = (
    "{%- set state = namespace(images=0) -%}"
    "{{- '" + BOS + "' -}}"
    "{%- if messages[0].role != 'system' -%}{{- '" + SYSTEM + SYSTEM_PROMPTS[0] + "' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|' + message.role + '|>' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}"
    "{%- set state.images = state.images + 1 -%}"
    "{{- 'image ' ~ state.images ~ ':" + IMAGE + "\n' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message.role == 'assistant' -%}{{- '" + EOS + "' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + ASSISTANT + "' -}}{%- endif -%}"
)


def train_tokenizer(seed: int, prompts: int = 3000, vocabulary: int = 640) -> Tokenizer:
    """A lower-casing byte-level BPE trained on the question language; digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(seed)
    lines = [
        *SYSTEM_PROMPTS * 300,
        *(f" {word} {word}" for word in WORDS * 50),
        *["image 1:\nimage 2:\nimage 3:\n"] * 300,
    ]
    for _ in range(prompts):
        for qa in ask(rng, sample_group(rng, "train", rng.choice((1, 2, 3))), 6):
            lines += [qa.question, qa.answer]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def processor(tokenizer: Tokenizer) -> LlavaProcessor:
    """The stock LLaVA processor around a tokenizer: 96 x 96 pixels, 144 image tokens, PIL back-end."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, padding_side="left"
    )
    wrapped.add_special_tokens({"additional_special_tokens": [IMAGE, SYSTEM, USER, ASSISTANT]})
    images = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, resample=3)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=wrapped,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=0,
    )


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the special tokens."""
    return {token: id_ for token in SPECIAL if (id_ := tokenizer.token_to_id(token)) is not None}


def prefix_text(system: str, images: int) -> str:
    """A prompt up to the question, as the chat template spells it."""
    return f"{BOS}{SYSTEM}{system}{USER}" + "".join(f"image {n}:{IMAGE}\n" for n in range(1, images + 1))


def described_prefix(system: str, captions: list[str]) -> str:
    """The same with each image told in words: text-only prompts for training."""
    told = "".join(f"image {n}:{text}\n" for n, text in enumerate(captions, 1))
    return f"{BOS}{SYSTEM}{system}{USER}{told}"


def load_tokenizer(folder: Path, seed: int) -> Tokenizer:
    """The tokenizer of a training folder, trained on first use."""
    path = folder / "tokenizer.json"
    if not path.exists():
        train_tokenizer(seed).save(str(path))
    return Tokenizer.from_file(str(path))
