"""Load a vision-language model and its processor; every failure is one line that says what to do."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from plphp_cli.errors import DeviceMemoryError, ModelError, PLPHPError, UnsupportedError
from plphp_cli.models.choices import check_attention, choose_device, choose_dtype
from plphp_cli.models.loaded import LoadedModel
from plphp_cli.models.sources import BUILTIN, Source, check_weights, complete, locate, read_config_json
from plphp_cli.units import format_bytes


def load(
    name: str = BUILTIN, *, dtype: str = "auto", device: str = "auto", attn: str = "sdpa"
) -> LoadedModel:
    """Load a model by name.

    Only transformers' own classes are used (`AutoModelForImageTextToText`, `AutoProcessor`), only safetensors
    are read, and no code that comes with a model is run.

    Args:
        name: `builtin`, a local folder, or a hub id with an optional `@revision`.
        dtype: `auto` (the checkpoint's; float32 for the built-in model on a CPU), `float32`, `bfloat16` or
            `float16`.
        device: `auto` (CUDA, else MPS, else CPU), `cpu`, `cuda`, `cuda:N` or `mps`.
        attn: attention back-end, `sdpa` or `eager`.

    Raises:
        UsageError: an option is unknown or cannot be met on this machine.
        ModelError: the model is unknown, broken, or not a vision-language model.
        UnsupportedError: its architecture cannot be pruned.
        DeviceMemoryError: it does not fit.
        PLPHPError: the hub cannot be reached.
    """
    source = locate(name)
    config_json = read_config_json(source)
    with quiet():
        where = choose_device(device)
        kind = choose_dtype(dtype, where, source.builtin)
        check_attention(attn)
        config = read_config(source, config_json)
    source = complete(source)
    with quiet():
        processor = _processor(source)
        model = _model(source, config, kind, where, attn)
    notes = []
    if dtype == "auto":
        reason = "the built-in model on a CPU" if kind != "auto" else "as the checkpoint is stored"
        notes.append(f"dtype {_plain(model.dtype)} ({reason})")
    if device == "auto":
        notes.append(f"device {where} (the fastest here)")
    return LoadedModel(
        model=model,
        processor=processor,
        name=source.name,
        revision=source.revision,
        dtype=model.dtype,
        device=where,
        builtin=source.builtin,
        attn=attn,
        folder=source.folder,
        notes=tuple(notes),
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no progress bars of transformers inside; the user's own settings again after."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_config(source: Source, config_json: dict[str, Any]) -> Any:
    """The model's config, after everything that a config alone can refuse.

    Raises:
        ModelError: its type is unknown or no image-text-to-text model, or the config is not valid.
        UnsupportedError: its architecture cannot be pruned.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    from plphp_cli.support import check_model

    kind = config_json["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{source.name}: this version of transformers has no model type {kind!r}",
            hint="models that bring their own code are not run; a newer transformers may know it",
        )
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        text_only = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        raise ModelError(
            f"{source.name} is {'a text-only' if text_only else 'not an image-text-to-text'} model ({kind})",
            hint="name a vision-language model, e.g. llava-hf/llava-1.5-7b-hf",
        )
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"config.json of {source.name} is not a valid {kind} config: {first_line(error)}",
            hint="fetch or save the model again",
        ) from error
    check_model(config)
    return config


def read_processor(source: Source) -> Any:
    """The processor of a model, without the model. Raises `ModelError` when it cannot be loaded."""
    with quiet():
        return _processor(source)


def _processor(source: Source) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:
        raise _processor_error(source, error) from error
    lacking = [part for part in ("tokenizer", "image_processor") if getattr(processor, part, None) is None]
    if lacking:
        raise ModelError(
            f"{source.name} lacks its processor's files ({' and '.join(lacking).replace('_', ' ')})",
            hint="save the processor into the same folder: processor.save_pretrained(folder)",
        )
    return processor


def _processor_error(source: Source, error: BaseException) -> ModelError:
    text = "\n".join(str(part) for part in _chain(error)).lower()
    for package in ("torchvision", "num2words"):
        if package in text:
            return ModelError(
                f"the processor of {source.name} needs {package}", hint="pip install 'plphp-cli[vision]'"
            )
    return ModelError(
        f"the processor of {source.name} cannot be loaded: {first_line(error)}",
        hint="its files may be missing: save the processor into the same folder",
    )


def _model(source: Source, config: Any, dtype: Any, device: Any, attn: str) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    size = check_weights(source)
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            source.folder,
            config=config,
            dtype=dtype,
            attn_implementation=attn,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        absent = sorted(report["missing_keys"])
        if absent:
            raise ModelError(
                f"the weights of {source.name} do not match its config: {len(absent)} are missing, "
                f"such as {absent[0]}",
                hint="config.json and the weights must come from the same model",
            )
        return model.to(device).eval().requires_grad_(False)
    except PLPHPError:
        raise
    except SafetensorError as error:
        raise ModelError(
            f"the weights of {source.name} are corrupted: {first_line(error)}", hint="fetch them again"
        ) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise DeviceMemoryError(
                f"out of memory on {device} while loading {source.name} ({format_bytes(size)} of weights)",
                hint="use --dtype bfloat16, another --device, or a smaller model",
            ) from error
        if "attn_implementation" in str(error):
            raise UnsupportedError(
                f"{source.name} does not run on the attention back-end {attn}", hint="use --attn eager"
            ) from error
        raise ModelError(
            f"{source.name} cannot be loaded: {first_line(error)}",
            hint="config.json and the weights must come from the same model",
        ) from error


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


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _plain(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
