"""Files of prompts: one JSON object a line with `images`, `prompt` and, where known, `answer`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plphp_cli.errors import UsageError

_KEYS = ("images", "prompt", "answer", "system")
_EXAMPLE = '{"images": ["a.jpg"], "prompt": "What is this?", "answer": "a cat"}'


@dataclass(frozen=True)
class Example:
    """One prompt of a file.

    Attributes:
        images: paths of its images, in order; relative ones are taken from the file's own folder.
        prompt: the text.
        answer: the expected answer; None when it is not known.
        system: a system message; None for the model's own.
        line: its line in the file, from 1.
    """

    images: tuple[Path, ...]
    prompt: str
    answer: str | None = None
    system: str | None = None
    line: int = 1


def read_examples(path: Path) -> list[Example]:
    """All prompts of a JSON Lines file; blank lines are passed over.

    Raises:
        UsageError: the file cannot be read, holds no prompt, or a line is not such an object (its number is
            named).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    lines = enumerate(text.split("\n"), 1)
    examples = [_example(path, number, line) for number, line in lines if line.strip()]
    if not examples:
        raise UsageError(f"{path} holds no prompt", hint=f"expected one object a line, like {_EXAMPLE}")
    return examples


def _example(path: Path, number: int, line: str) -> Example:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{path} line {number} is not JSON: {error}", hint=f"like {_EXAMPLE}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} line {number} is a {type(values).__name__}", hint=f"like {_EXAMPLE}")
    unknown = sorted(set(values) - set(_KEYS))
    if unknown:
        raise UsageError(
            f"{path} line {number} has an unknown key {unknown[0]!r}", hint=f"keys are {', '.join(_KEYS)}"
        )
    images, prompt = values.get("images", []), values.get("prompt")
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UsageError(f"{path} line {number}: images = {images!r}; expected a list of paths")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f"{path} line {number}: prompt = {prompt!r}; expected a text that is not blank")
    return Example(
        images=tuple(path.parent / image for image in images),
        prompt=prompt,
        answer=_text_or_none(path, number, "answer", values.get("answer")),
        system=_text_or_none(path, number, "system", values.get("system")),
        line=number,
    )


def _text_or_none(path: Path, number: int, key: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{path} line {number}: {key} = {value!r}; expected a text")
    return value
