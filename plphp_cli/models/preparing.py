"""From decoded images and text to a model's inputs."""

import contextlib
import inspect
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from PIL import Image

from plphp_cli import families
from plphp_cli.errors import ImageError, ModelError, UnsupportedError, UsageError
from plphp_cli.images import LoadedImage
from plphp_cli.models.conversation import (
    PLACEHOLDER,
    Turn,
    choose_template,
    dialogue,
    image_placeholder,
    is_placed,
    messages,
)
from plphp_cli.models.failures import beginning, first_line
from plphp_cli.models.loaded import LoadedModel
from plphp_cli.models.loading import quiet
from plphp_cli.prompt import Prompt

# What transformers' validator says of a value, before it goes through every kind that would have done.
_UNFIT = re.compile(r"Validation error for field '(\w+)'.*?doesn't match any type in \((.*?)\)\.", re.DOTALL)
# Larger images are not prepared a second time only to say what their size would have cost.
_TRIED_PIXELS = 1 << 24
# Per processor: vision tokens of images at their full sizes.
_AT_FULL_SIZE: WeakKeyDictionary[Any, dict[tuple[tuple[int, int], ...], int]] = WeakKeyDictionary()


def prepare(
    loaded: LoadedModel,
    images: Sequence[LoadedImage],
    prompt_text: str,
    system: str | None = None,
    *,
    raw: bool = False,
) -> Prompt:
    """Apply the chat template, expand the images, and put the inputs on the model's device.

    `<image>` in the text places the images, in order; without it they come first. Any other special token of
    the model that the user typed is read as plain text. A processor without a chat template gets LLaVA-1.5's
    conversation (`USER: ... ASSISTANT:`), or none where the family has none, and the prompt's notes say so.

    Args:
        loaded: the model.
        images: decoded images, in order; none for a text prompt.
        prompt_text: the user's text.
        system: a system message, or None for the template's own.
        raw: send the text as typed, special tokens included, without a chat template. The model's own image
            placeholder places the images, too.

    Raises:
        UsageError: the text is blank or not Unicode, or the template has no place for a system message.
        ImageError: `<image>` occurs in the text, but not once per image, or the processor refuses an image.
        ModelError: the processor cannot make a prompt of this.
    """
    _check_text("prompt", prompt_text)
    if system is not None:
        _check_text("system message", system)
    if raw and system is not None:
        raise UsageError("a raw prompt has no system message", hint="write it into the prompt")
    own = image_placeholder(loaded)
    conversation = messages(images, prompt_text, system, own if raw and own in prompt_text else PLACEHOLDER)
    typed = [] if raw else _special_tokens(loaded, *prompt_text.split(PLACEHOLDER), system or "")
    placed = PLACEHOLDER in prompt_text
    return _prepared(loaded, conversation, images, system, typed, placed=placed, raw=raw)


def prepare_turns(loaded: LoadedModel, turns: Sequence[Turn], system: str | None = None) -> Prompt:
    """`prepare` for a conversation: the whole of it, up to its last question, which has no answer yet.

    Special tokens in the answers are read as plain text, too.

    Args:
        loaded: the model.
        turns: the questions in order, all but the last with their answers.
        system: a system message, or None for the template's own.

    Raises:
        UnsupportedError: the model was made for no conversation.
        UsageError, ImageError, ModelError: as `prepare`.
    """
    family = families.find(loaded.model.config.model_type)
    if family is not None and family.plain and not getattr(loaded.processor, "chat_template", None):
        raise UnsupportedError(
            f"{loaded.name} was made for no conversation", hint="ask its questions one by one, without --chat"
        )
    for turn in turns:
        _check_text("question", turn.question)
    if system is not None:
        _check_text("system message", system)
    conversation = dialogue(turns, system)
    asked = [piece for turn in turns for piece in turn.question.split(PLACEHOLDER)]
    typed = _special_tokens(loaded, *asked, *(turn.answer or "" for turn in turns), system or "")
    images = [image for turn in turns for image in turn.images]
    placed = any(PLACEHOLDER in turn.question for turn in turns)
    return _prepared(loaded, conversation, images, system, typed, placed=placed, raw=False)


def _prepared(
    loaded: LoadedModel,
    conversation: list[dict[str, Any]],
    images: Sequence[LoadedImage],
    system: str | None,
    typed: list[str],
    *,
    placed: bool,
    raw: bool,
) -> Prompt:
    """The prompt of a conversation; `typed` special tokens are read as text, `placed` images checked."""
    template, notes = choose_template(loaded, raw)
    if typed and not _can_sanitize(loaded):
        raise UsageError(
            f"this version of transformers would obey {typed[0]} in the text instead of reading it",
            hint="remove it, send it as it is with --raw-prompt, or install transformers 5.20 or newer",
        )
    started = time.perf_counter()
    with quiet():
        text = _render(loaded, conversation, template)
        batch = _process(loaded, conversation, template, sanitize=bool(typed))
        expanded = batch.pop("text_replacement_offsets", None)
        batch.pop("labels", None)  # PaliGemma's processor makes them, for training
        inputs = dict(batch.to(device=loaded.device, dtype=loaded.dtype))
        _synchronize(loaded.device)
    preprocess_s = time.perf_counter() - started
    if system is not None and system.strip() not in text:
        raise UsageError(
            "this model's chat template has no place for a system message", hint="put it into the prompt"
        )
    vision_tokens, image_tokens = _vision_tokens(loaded, inputs, expanded, len(images))
    if placed and not is_placed(text, conversation, image_placeholder(loaded)):
        notes.append(f"this model's chat template puts images elsewhere than where {PLACEHOLDER} stands")
    prompt_tokens = inputs["input_ids"].shape[1]
    notes += [f"{image.path}: {note}" for image in images for note in image.notes]
    if _saved_nothing(loaded, conversation, template, images, vision_tokens):
        notes.append(f"reducing saved no vision tokens: at full size there are {vision_tokens}, too")
    if typed:
        notes.append(f"{', '.join(typed)} in the text is read as plain text, not as a special token")
    limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(limit, int) and prompt_tokens > limit:
        notes.append(f"the prompt's {prompt_tokens} tokens are more than the {limit} the model was made for")
    return Prompt(
        inputs=inputs,
        text=text,
        images=tuple(image.path for image in images),
        prompt_tokens=prompt_tokens,
        vision_tokens=vision_tokens,
        preprocess_s=preprocess_s,
        image_tokens=image_tokens,
        notes=tuple(notes),
    )


def _check_text(what: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"the {what} is not valid UTF-8 text", hint="check the encoding") from error
    # In a system message it is refused by its own name.
    if not (text if what == "system message" else text.replace(PLACEHOLDER, "")).strip():
        raise UsageError(f"the {what} is blank", hint="say what you want to know")


def _special_tokens(loaded: LoadedModel, *texts: str) -> list[str]:
    """The model's special tokens that occur in what the user typed."""
    added = loaded.processor.tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special}
    names = ("image_token", "video_token", "audio_token")
    special |= {token for name in names if isinstance(token := getattr(loaded.processor, name, None), str)}
    return sorted(token for token in special if token.strip() and any(token in text for text in texts))


def _can_sanitize(loaded: LoadedModel) -> bool:
    """Whether the processor can be told to read special tokens as text: transformers since 5.20."""
    return "sanitize_control_tokens" in inspect.signature(loaded.processor.apply_chat_template).parameters


def _render(loaded: LoadedModel, conversation: list[dict[str, Any]], template: str | None) -> str:
    try:
        return loaded.processor.apply_chat_template(
            conversation, chat_template=template, add_generation_prompt=True
        )
    except Exception as error:
        raise ModelError(f"the chat template of {loaded.name} fails: {first_line(error)}") from error


def _process(
    loaded: LoadedModel, conversation: list[dict[str, Any]], template: str | None, sanitize: bool
) -> Any:
    how: dict[str, Any] = {"sanitize_control_tokens": True} if sanitize else {}
    try:
        return loaded.processor.apply_chat_template(
            conversation,
            chat_template=template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **how,
            processor_kwargs={"return_text_replacement_offsets": True, **loaded.options.processor_args},
        )
    except Exception as error:
        if (unfit := _unfit_argument(loaded, error)) is not None:
            raise unfit from error
        hint = "remove special tokens from the text" if sanitize else "try another image size (--max-pixels)"
        if loaded.options.processor_arg:
            hint = f"check --processor-arg {' '.join(loaded.options.processor_arg)}"
        raise ImageError(
            f"the processor of {loaded.name} refuses the prompt: {beginning(error)}", hint=hint
        ) from error


def _unfit_argument(loaded: LoadedModel, error: Exception) -> UsageError | None:
    """The one of the user's arguments that a failure is about, with the kinds of values that it takes."""
    found = _UNFIT.search(str(error))
    if found is None or found[1] not in loaded.options.processor_args:
        return None
    kinds = [kind for kind in re.sub(r"<class '(\w+)'>", r"\1", found[2]).split(", ") if kind != "NoneType"]
    value = json.dumps(loaded.options.processor_args[found[1]])
    return UsageError(
        f"processor argument {found[1]}={value[:60]} is of no kind that {loaded.name} takes",
        hint=f"its image processor takes {', '.join(kinds)[:120]}",
    )


def _check_image_token(loaded: LoadedModel, ids: Any, named: int | None) -> None:
    """Refuse a model whose config names another image token than its processor puts into `ids`."""
    token = getattr(loaded.processor, "image_token", None)
    own = loaded.processor.tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else None
    if own is not None and own != named and bool((ids == own).any()):
        raise ModelError(
            f"config.json of {loaded.name} names token {named} for its images, and its processor puts "
            f"{own} ({token})",
            hint="config.json and the files of the processor must come from the same model",
        )


def _vision_tokens(
    loaded: LoadedModel, inputs: dict[str, Any], expanded: Any, images: int
) -> tuple[int, tuple[int, ...] | None]:
    """n_v in all and of each image (None: not told), checked against what the processor put for each image.

    `expanded` tells what it put, where it says so.
    """
    from plphp_cli.vision import image_token_id

    token_id = image_token_id(loaded.model.config)
    token = loaded.processor.tokenizer.convert_ids_to_tokens(token_id)
    found = expected = int((inputs["input_ids"] == token_id).sum())
    counts = None
    if expanded:
        places = [place for place in expanded[0] if place["type"] == "image"]
        counts = tuple(place["replacement"].count(str(token)) for place in places)
        expected = sum(counts)
    if found != expected or bool(found) != bool(images):
        _check_image_token(loaded, inputs["input_ids"], token_id)
        given = loaded.options.processor_arg
        raise ImageError(
            f"the prompt holds {found} vision tokens, which is not what its {images} "
            f"image{'s' if images != 1 else ''} expand{'s' if images == 1 else ''} to",
            hint=f"check --processor-arg {' '.join(given)}"
            if given
            else "remove the model's own image token from the text",
        )
    return found, counts if counts is None or len(counts) == images else None


def _saved_nothing(
    loaded: LoadedModel,
    conversation: list[dict[str, Any]],
    template: str | None,
    images: Sequence[LoadedImage],
    vision_tokens: int,
) -> bool:
    """Whether images were reduced in vain: as many tokens come of blank ones at their full size.

    False, too, where the full size is too large to be tried.
    """
    full = tuple(map(_full_size, images))
    if full == tuple(image.image.size for image in images):
        return False
    if sum(width * height for width, height in full) > _TRIED_PIXELS:
        return False
    counts = _AT_FULL_SIZE.setdefault(loaded.processor, {})
    if full not in counts:
        blanks = iter([Image.new("RGB", size) for size in full])
        swapped = [
            {
                **said,
                "content": [
                    {**part, "image": next(blanks)} if part["type"] == "image" else part
                    for part in said["content"]
                ],
            }
            for said in conversation
        ]
        with quiet(), contextlib.suppress(ImageError, UsageError):
            counts[full] = _count(loaded, _process(loaded, swapped, template, sanitize=False))
    return counts.get(full) == vision_tokens


def _full_size(image: LoadedImage) -> tuple[int, int]:
    """Width and height before it was reduced, upright."""
    width, height = image.original_size
    turned = (width > height) != (image.image.size[0] > image.image.size[1])
    return (height, width) if turned else (width, height)


def _count(loaded: LoadedModel, inputs: Mapping[str, Any]) -> int:
    from plphp_cli.vision import image_token_id

    return int((inputs["input_ids"] == image_token_id(loaded.model.config)).sum())


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
