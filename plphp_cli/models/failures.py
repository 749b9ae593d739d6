"""What transformers says when a model cannot be loaded, told in one line that says what to do."""

import json
from collections.abc import Iterator
from typing import Any

from plphp_cli import parallel
from plphp_cli.errors import DeviceMemoryError, ModelError, PLPHPError, UnsupportedError
from plphp_cli.models.options import LoadOptions
from plphp_cli.models.sources import Source, again
from plphp_cli.units import format_bytes

# Files of which a processor's part needs at least one.
_FILES = {
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"),
    "image processor": ("preprocessor_config.json", "processor_config.json"),
}
SAME_MODEL = "config.json and the weights must come from the same model"


def config_error(source: Source, config_json: dict[str, Any], error: BaseException) -> ModelError:
    """For a config that transformers does not take: the part, the value or the reason, in one short line.

    Args:
        source: the model.
        config_json: what its `config.json` holds.
        error: what was raised.
    """
    from transformers import CONFIG_MAPPING

    parts = ((f"{place}.{key}" if place else key, value) for place, key, value in _entries(config_json))
    named = [(place, value) for place, value in parts if isinstance(value, str)]
    for place, value in named:
        if place.endswith(".model_type") and value not in CONFIG_MAPPING and value in str(error):
            part = place.removesuffix(".model_type")
            return ModelError(
                f"{source.name}: this version of transformers has no model type {value!r}, "
                f"which config.json names for its {part}",
                hint="a newer transformers may know it",
            )
    # Of a word that no table has, some errors hold nothing else.
    word = error.args[0] if isinstance(error, KeyError) and error.args else getattr(error, "name", None)
    places = [place for place, value in named if value == word]
    why = beginning(error)
    if places:
        why = f"{places[0]} = {word!r}"
    elif type(error).__module__ == "builtins" and not isinstance(error, ValueError):
        why = f"{type(error).__name__}: {why}"
    return ModelError(
        f"config.json of {source.name} cannot be used: {why}",
        hint="correct config.json, or fetch or save the model again",
    )


def check_generation_config(source: Source) -> None:
    """Refuse a `generation_config.json` that transformers passes over silently, or fails on without its name.

    Raises:
        ModelError: it cannot be read, or asks for what contradicts itself.
    """
    from transformers import GenerationConfig

    file = source.folder / "generation_config.json"
    if not file.is_file():
        return
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{file.name} of {source.name} is broken: {beginning(error)}", hint=again(source, file.name)
        ) from error
    try:
        GenerationConfig.from_pretrained(source.folder)
    except Exception as error:
        raise ModelError(
            f"{file.name} of {source.name} cannot be used: {beginning(error)}",
            hint="correct it in a copy of the model, or leave the file out: it is not needed",
        ) from error


def _entries(config: dict[str, Any], place: str = "") -> Iterator[tuple[str, str, Any]]:
    """Each entry of a config and of its parts: the part's place, the key, the value."""
    for key, value in config.items():
        yield place, key, value
        if isinstance(value, dict):
            yield from _entries(value, f"{place}.{key}" if place else key)


def own_code_fails(source: Source, error: BaseException) -> ModelError:
    """For code that a model brings."""
    return ModelError(
        f"the code that {source.name} brings fails: {first_line(error)}",
        hint="it may need another version of transformers, or a package that its page names",
    )


def processor_error(source: Source, error: BaseException) -> ModelError:
    """For a processor that cannot be loaded: the package or the file that it is about, by name."""
    text = "\n".join(str(part) for part in _chain(error)).lower()
    for package in ("torchvision", "num2words"):
        if package in text:
            return ModelError(
                f"the processor of {source.name} needs {package}", hint="pip install 'plphp-cli[vision]'"
            )
    if "trust_remote_code" in text:
        return ModelError(
            f"the processor of {source.name} is code that the model brings, which is not run",
            hint="--trust-remote-code runs it with all your rights: read it first",
        )
    if (broken := _broken_file(source)) is not None:
        file, why = broken
        return ModelError(f"{file} of {source.name} is broken: {why}", hint=again(source, file))
    there = {path.name for path in source.folder.glob("*") if path.is_file()}
    lacking = [part for part, names in _FILES.items() if not there.intersection(names)]
    if lacking:
        return lacks_files(source, lacking)
    return ModelError(
        f"the processor of {source.name} cannot be loaded: {beginning(error)}",
        hint="its files may be missing: save the processor into the same folder",
    )


def lacks_files(source: Source, parts: list[str]) -> ModelError:
    """For a processor of which parts (`tokenizer`, `image processor`) are not there."""
    hint = "save the processor into the same folder: processor.save_pretrained(folder)"
    return ModelError(f"{source.name} lacks its processor's files ({' and '.join(parts)})", hint=hint)


def _broken_file(source: Source) -> tuple[str, str] | None:
    """A file of the processor that cannot be read, and why; None if that is not what is wrong."""
    from tokenizers import Tokenizer

    for path in sorted(source.folder.glob("*.json")):
        if path.name == "config.json" or path.name.endswith(".index.json"):
            continue
        try:
            content = path.read_text(encoding="utf-8")
            json.loads(content)
        except json.JSONDecodeError as error:
            told = (
                f"its JSON breaks off or is garbled at line {error.lineno}"
                if content.strip()
                else "it is empty"
            )
            return path.name, f"{told} ({path.stat().st_size:,} bytes)"
        except (OSError, ValueError, RecursionError) as error:
            return path.name, first_line(error)
    tokenizer = source.folder / "tokenizer.json"
    if tokenizer.is_file():
        try:
            Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # noqa: BLE001  (the library raises nothing more particular)
            return tokenizer.name, f"it holds no tokenizer ({first_line(error)[:80]})"
    return None


def model_error(
    source: Source, error: Exception, device: Any, options: LoadOptions, needed: int
) -> PLPHPError:
    """For weights that cannot be loaded.

    Args:
        source: the model.
        error: what was raised.
        device: that it was to run on.
        options: how it was to be loaded.
        needed: bytes of its weights.
    """
    from safetensors import SafetensorError

    name = source.name
    if isinstance(error, SafetensorError):
        return ModelError(
            f"the weights of {name} are corrupted: {first_line(error)}",
            hint=again(source, "model.safetensors"),
        )
    if is_out_of_memory(error):
        size = f"{format_bytes(needed)} of weights{_free(device)}"
        return DeviceMemoryError(
            f"out of memory on {device} while loading {name} ({size})",
            hint="try --dtype bfloat16, --quantize 4bit, --device-map auto, or a smaller model",
        )
    text = "\n".join(str(part) for part in _chain(error))
    if "dispatched on the CPU" in text or "offload_folder" in text:
        return DeviceMemoryError(
            f"the {format_bytes(needed)} of weights of {name} do not fit on {device}{_free(device)}",
            hint="leave out --quantize to let --device-map use the machine's memory, or use a smaller model",
        )
    if "`tp_plan`" in str(error):
        return parallel.no_plan(name)
    if "attn_implementation" in str(error):
        return UnsupportedError(
            f"{name} does not run on the attention back-end {options.attn}", hint="use --attn eager"
        )
    if isinstance(error, ImportError) or "pip install" in text:
        # Named by its extra, where it has one.
        packed = "bitsandbytes" in text
        return ModelError(
            f"the weights of {name} need a package that is missing: "
            + ("bitsandbytes" if packed else first_line(error)),
            hint="pip install 'plphp-cli[quantize]'" if packed else "install it",
        )
    if "size mismatch" in text or "mismatched" in text.lower() or "ignore_mismatched_sizes" in text:
        told = next((line.strip() for line in text.splitlines() if "mismatch" in line.lower()), text)
        return ModelError(f"the weights of {name} do not match its config: {told[:200]}", hint=SAME_MODEL)
    return ModelError(f"{name} cannot be loaded: {first_line(error)}", hint=SAME_MODEL)


def _free(device: Any) -> str:
    """How much of a CUDA device is free, in words; nothing where that is not known."""
    import torch

    if device.type != "cuda":
        return ""
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return ""
    return f"; {format_bytes(free)} of {format_bytes(total)} are free"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or on the host."""
    import torch

    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        word in str(error) for word in words
    )


def first_line(error: BaseException) -> str:
    """An error in one line: its first line (and what it announces), or its kind when it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def beginning(error: BaseException, most: int = 160) -> str:
    """`first_line`, where another library goes on at length: its first characters."""
    line = first_line(error)
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
