"""The prompts of commands that take one from the command line, or many from a file."""

from pathlib import Path
from typing import Any

from plphp_cli.cli import options as opt
from plphp_cli.dataset import read_examples
from plphp_cli.errors import UsageError
from plphp_cli.images import load_image
from plphp_cli.profiling.state import Question


def read_questions(
    image: list[str] | None, prompt: str | None, data: str | None, system: str | None, max_pixels: int | None
) -> tuple[Question, ...]:
    """What to ask: the prompts of `--data`, or the one of `--image` and `--prompt`; images decoded once.

    Raises:
        UsageError: neither or both were given, or a prompt or image cannot be used.
    """
    text = opt.read_prompt(prompt) if data is None else ""
    if system is not None:
        opt.check_text("system message", system)
    if data is None:
        return (Question(tuple(load_image(path, max_pixels) for path in image or ()), text, system),)
    if image or prompt is not None:
        raise UsageError("--data was given with --image or --prompt", hint="use one or the other")
    decoded: dict[Path, Any] = {}
    questions = []
    for example in read_examples(Path(data)):
        for path in example.images:
            if path not in decoded:
                decoded[path] = load_image(path, max_pixels)
        images = tuple(decoded[path] for path in example.images)
        asked = example.system if example.system is not None else system
        questions.append(Question(images, example.prompt, asked, example.answer, example.line))
    return tuple(questions)
