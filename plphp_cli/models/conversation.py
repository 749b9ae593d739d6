"""What the chat template is given: the conversation, and a template for models that bring none."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plphp_cli import families
from plphp_cli.errors import ImageError
from plphp_cli.images import LoadedImage
from plphp_cli.models.loaded import LoadedModel

# What a user types to place an image, whatever the model's own placeholder is.
PLACEHOLDER = "<image>"

# LLaVA-1.5's conversation, for a processor that brings no chat template of its own.
FALLBACK_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}"
    "{%- for part in message.content -%}{{- part.text -}}{%- endfor -%}{{- '\n\n' -}}"
    "{%- else -%}"
    "{{- 'ASSISTANT: ' if message.role == 'assistant' else 'USER: ' -}}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- IMAGE_TOKEN ~ '\n' -}}"
    "{%- else -%}{{- part.text | trim if message.role == 'assistant' else part.text -}}{%- endif -%}"
    "{%- endfor -%}"
    "{{- eos_token if message.role == 'assistant' else '\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{- 'ASSISTANT:' -}}"
)
# The images and the text, nothing else: a raw prompt, and models that were made for no conversation.
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- IMAGE_TOKEN -}}{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
)


@dataclass(frozen=True, eq=False)
class Turn:
    """One question of a conversation with the images that come with it, and its answer once there is one."""

    images: tuple[LoadedImage, ...]
    question: str
    answer: str | None = None


def dialogue(turns: Sequence[Turn], system: str | None) -> list[dict[str, Any]]:
    """A conversation of several turns: each one's images where `messages` puts them, then its answer.

    Raises:
        ImageError: the placeholder occurs in a question, but not once per image of its turn.
    """
    said: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        said += messages(turn.images, turn.question, None if number else system, of_turn=True)
        if turn.answer is not None:
            said.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return said


def messages(
    images: Sequence[LoadedImage],
    text: str,
    system: str | None,
    placeholder: str = PLACEHOLDER,
    *,
    of_turn: bool = False,
) -> list[dict[str, Any]]:
    """The conversation: images in order, where `placeholder` stands in the text, else first.

    `of_turn`: the text is one of several questions, and the images those that come with it.

    Raises:
        ImageError: the placeholder occurs, but not once per image, or it occurs in the system message.
    """
    pieces = text.split(placeholder)
    placed = len(pieces) - 1
    if placed and placed != len(images):
        raise _misplaced(placed, placeholder, len(images), of_turn)
    if system is not None and placeholder in system:
        raise ImageError(f"the system message holds {placeholder}", hint="place images in the prompt")
    shown: list[dict[str, Any]] = [{"type": "image", "image": image.image} for image in images]
    content = [*shown, {"type": "text", "text": text}]
    if placed:
        content = [{"type": "text", "text": pieces[0]}]
        for image, piece in zip(shown, pieces[1:], strict=True):
            content += [image, {"type": "text", "text": piece}]
        content = [part for part in content if part.get("text") != ""]
    first = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system is not None else []
    return [*first, {"role": "user", "content": content}]


def _misplaced(placed: int, placeholder: str, images: int, of_turn: bool) -> ImageError:
    if of_turn:
        come = "1 image comes" if images == 1 else f"{images} images come"
        return ImageError(
            f"this question holds {placed} {placeholder}, but {come} with it",
            hint=f"write {placeholder} once per image that joins with this question, or leave it out",
        )
    given = "1 image is" if images == 1 else f"{images} images are"
    return ImageError(
        f"the prompt holds {placed} {placeholder}, but {given} given",
        hint=f"write {placeholder} once per image, or leave it out to put the images first",
    )


def choose_template(loaded: LoadedModel, raw: bool) -> tuple[str | None, list[str]]:
    """The template to use in place of the processor's own (None: its own), and what to say about that."""
    token = json.dumps(image_placeholder(loaded))
    plain = PLAIN_TEMPLATE.replace("IMAGE_TOKEN", token)
    if raw:
        return plain, ["raw prompt: sent as typed, without a chat template"]
    if getattr(loaded.processor, "chat_template", None):
        return None, []
    family = families.find(loaded.model.config.model_type)
    if family is not None and family.plain:
        return plain, ["the model was made for no conversation: the images and the text are sent as they are"]
    return FALLBACK_TEMPLATE.replace("IMAGE_TOKEN", token), [
        "the model brings no chat template: LLaVA-1.5's is used (USER: ... ASSISTANT:)"
    ]


def image_placeholder(loaded: LoadedModel) -> str:
    """What stands for one image in a text that the model's processor takes."""
    from plphp_cli.vision import image_token_id

    token = getattr(loaded.processor, "image_token", None)
    if token is None:
        token = loaded.processor.tokenizer.convert_ids_to_tokens(image_token_id(loaded.model.config))
    return str(token)


def is_placed(text: str, conversation: list[dict[str, Any]], placeholder: str) -> bool:
    """Whether a rendered text has the user's images and pieces of text in the order that the user gave."""
    at = 0
    for part in (part for said in conversation if said["role"] == "user" for part in said["content"]):
        wanted = placeholder if part["type"] == "image" else part["text"].strip()
        found = text.find(wanted, at)
        if found < 0:
            return False
        at = found + len(wanted)
    return True
