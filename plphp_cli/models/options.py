"""How a model is loaded, as one value that travels: to requests, fresh processes and workers."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from plphp_cli.errors import UsageError
from plphp_cli.models.choices import check_names

QUANTIZE = ("4bit", "8bit")
DEVICE_MAPS = ("auto",)


@dataclass(frozen=True)
class LoadOptions:
    """Everything but the model's name that decides how it is loaded and run.

    Its fields are strings, flags and tuples of strings, so that it can be hashed, and sent as JSON.

    Attributes:
        dtype: `auto` (the checkpoint's; float32 for the built-in model on a CPU), `float32`, `bfloat16` or
            `float16`.
        device: `auto` (CUDA, else MPS, else CPU), `cpu`, `cuda`, `cuda:N` or `mps`.
        attn: attention back-end of the decoder, one of `choices.ATTENTION`; the vision encoder has `eager` or
            `sdpa`.
        device_map: `auto` lets accelerate spread the layers over all GPUs and the machine's memory.
        quantize: `4bit` or `8bit` quantises the weights with bitsandbytes while they are loaded.
        trust_remote_code: run code that the model brings.
        offline: ask the hub nothing; what is in the local cache must do.
        processor_arg: `KEY=VALUE` words for the image processor; values are JSON, else text.
    """

    dtype: str = "auto"
    device: str = "auto"
    attn: str = "sdpa"
    device_map: str | None = None
    quantize: str | None = None
    trust_remote_code: bool = False
    offline: bool = False
    processor_arg: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what can be refused without loading anything. Raises `UsageError`."""
        check_names(self.dtype, self.device, self.attn)
        if self.quantize is not None and self.quantize not in QUANTIZE:
            raise UsageError(f"quantize {self.quantize!r}; expected {' or '.join(QUANTIZE)}")
        if self.device_map is not None and self.device_map not in DEVICE_MAPS:
            raise UsageError(f"device map {self.device_map!r}; expected {' or '.join(DEVICE_MAPS)}")
        if self.device_map is not None and self.device != "auto":
            raise UsageError(
                f"device map {self.device_map} and device {self.device} exclude each other",
                hint="a device map chooses the devices; CUDA_VISIBLE_DEVICES limits them",
            )
        parse_processor_args(self.processor_arg)

    @property
    def processor_args(self) -> dict[str, Any]:
        """What the image processor is given, by name. Raises `UsageError`."""
        return parse_processor_args(self.processor_arg)

    def words(self) -> list[str]:
        """The words of a command line that load in the same way; none for what is the default."""
        words: list[str] = []
        for field in fields(self):
            name, value = f"--{field.name.replace('_', '-')}", getattr(self, field.name)
            if value == field.default:
                continue
            if value is True:
                words.append(name)
            else:
                words += [word for item in _each(value) for word in (name, item)]
        return words

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LoadOptions":
        """From what `dataclasses.asdict` made, after a journey as JSON."""
        return cls(**{**values, "processor_arg": tuple(values["processor_arg"])})


DEFAULTS = LoadOptions()


def parse_processor_args(words: Iterable[str]) -> dict[str, Any]:
    """`KEY=VALUE` words as a mapping; a value that is no JSON is text.

    Raises:
        UsageError: a word has no `=` or no name before it, or a name comes twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(
                f"processor argument {word!r}; expected KEY=VALUE",
                hint="e.g. --processor-arg do_convert_rgb=true; which there are, the model's processor says",
            )
        if name in found:
            raise UsageError(f"processor argument {name} is given twice", hint="give it once")
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError):
            found[name] = text
    return found


def _each(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
