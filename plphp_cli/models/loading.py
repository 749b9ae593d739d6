"""Load a vision-language model and its processor; every failure is one line that says what to do."""

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from plphp_cli import families, parallel
from plphp_cli.errors import ModelError, PLPHPError, UsageError
from plphp_cli.models.choices import (
    attention_to_load,
    check_attention,
    check_stored_dtype,
    choose_device,
    choose_dtype,
    set_attention,
)
from plphp_cli.models.failures import (
    SAME_MODEL,
    check_generation_config,
    config_error,
    lacks_files,
    model_error,
    own_code_fails,
    processor_error,
)
from plphp_cli.models.hub import offline
from plphp_cli.models.loaded import LoadedModel
from plphp_cli.models.options import DEFAULTS, LoadOptions
from plphp_cli.models.outline import check_size, outline
from plphp_cli.models.placing import check_packages, described, main_device, placement
from plphp_cli.models.sources import (
    BUILTIN,
    Source,
    complete,
    fetch_code,
    locate,
    read_config_json,
    weight_files,
)
from plphp_cli.models.weights import check_host_memory, needed_bytes

# Arguments of image processors that say where and as what the pixels go: not the user's to choose.
_OURS = {"return_tensors", "device", "data_format", "input_data_format", "disable_grouping"}


def load(name: str = BUILTIN, options: LoadOptions = DEFAULTS, **changes: Any) -> LoadedModel:
    """Load a model by name.

    Only transformers' own classes are used (`AutoModelForImageTextToText`, `AutoProcessor`), only safetensors
    are read, and no code that comes with a model is run unless `trust_remote_code` says so.

    Args:
        name: `builtin`, a local folder, or a hub id with an optional `@revision`.
        options: how to load it.
        **changes: fields of `LoadOptions` by name, which go before `options`: `dtype="bfloat16"`.

    Raises:
        UsageError: an option is unknown or cannot be met on this machine.
        ModelError: the model is unknown, broken, or not a vision-language model.
        UnsupportedError: its architecture cannot be pruned.
        DeviceMemoryError: it does not fit.
        PLPHPError: the hub cannot be reached.
    """
    options = dataclasses.replace(options, **changes)
    options.check()
    with offline(options.offline):
        source = locate(name)
        config_json = read_config_json(source)
        with quiet():
            where = parallel.device_of_rank(choose_device(options.device), options.device)
            kind = choose_dtype(options.dtype, where, source.builtin)
            check_attention(options.attn, where, kind)
            check_packages(options, where)
            config = read_config(source, config_json, options.trust_remote_code)
            check_stored_dtype(config, kind, where)
            parallel.check_heads(config, source.name)
            place = placement(source.name, config, options, kind, where)
        source = complete(source, options.trust_remote_code)
        with quiet():
            processor = _processor(source, options)
            model = _model(source, config, kind, where, options, place)
    if place:
        where = main_device(model)
    check_attention(options.attn, where, model.dtype)
    return LoadedModel(
        model=model,
        processor=processor,
        name=source.name,
        revision=source.revision,
        dtype=model.dtype,
        device=where,
        builtin=source.builtin,
        attn=options.attn,
        folder=source.folder,
        notes=_notes(model, kind, where, options),
        warnings=_warnings(model, config_json, options),
        options=options,
    )


def fetch(name: str, options: LoadOptions = DEFAULTS) -> Source:
    """Bring a model's files onto this machine, unless its config alone says that it cannot be used.

    Args:
        name: as for `load`.
        options: of which `offline` and `trust_remote_code` matter here.

    Raises what `load` raises of names, configs and the hub.
    """
    with offline(options.offline):
        source = locate(name)
        config_json = read_config_json(source)
        with quiet():
            read_config(source, config_json, options.trust_remote_code)
        return complete(source, options.trust_remote_code)


def _notes(model: Any, kind: Any, where: Any, options: LoadOptions) -> tuple[str, ...]:
    """What was chosen for the user, in words."""
    notes = []
    if options.dtype == "auto":
        reason = "the built-in model on a CPU" if kind != "auto" else "as the checkpoint is stored"
        notes.append(f"dtype {_plain(model.dtype)} ({reason})")
    if options.device_map is not None:
        notes.append(f"device map: {described(model) or f'all of it on {where}'}")
    elif options.device == "auto":
        notes.append(f"device {where} (the fastest here)")
    return tuple(notes)


def _warnings(model: Any, config_json: dict[str, Any], options: LoadOptions) -> tuple[str, ...]:
    """What a reader of figures must know of how the model is run, and what is left out of its own wishes."""
    from plphp_cli.support import left_out

    found = []
    if spread := described(model):
        found.append(f"the model is spread: {spread}")
    if options.trust_remote_code and config_json.get("auto_map"):
        found.append("the model runs code of its own, on which pruning is not proven")
    elif families.find(model.config.model_type) is None:
        found.append(families.unproven(model.config.model_type))
    asked = left_out(model.generation_config)
    found += [f"{feature}, which the model's generation config asks for, is left out" for feature in asked]
    return tuple(found)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no progress bars of transformers inside; the user's own settings again after.

    What code that a model brings prints goes to stderr: stdout is for answers.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_config(source: Source, config_json: dict[str, Any], trusted: bool = False) -> Any:
    """The model's config, after everything that a config alone can refuse.

    Args:
        source: where `config.json` is.
        config_json: what it holds.
        trusted: whether code that the model brings may run.

    Raises:
        ModelError: its type is unknown or no image-text-to-text model, or the config is not valid.
        UnsupportedError: its architecture cannot be pruned.
        PLPHPError: the code that it brings cannot be fetched.
    """
    from transformers import AutoConfig

    from plphp_cli.support import check_model

    kind = config_json["model_type"]
    own_code = config_json.get("auto_map") if trusted else None
    if own_code:
        if not isinstance(own_code, dict) or "AutoModelForImageTextToText" not in own_code:
            raise ModelError(
                f"the code that {source.name} brings offers no AutoModelForImageTextToText",
                hint="such models are not run: name one that transformers knows as a vision-language model",
            )
        fetch_code(source)
    else:
        _check_type(source, kind, "auto_map" in config_json)
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=bool(own_code))
    except Exception as error:
        if own_code:
            raise own_code_fails(source, error) from error
        raise config_error(source, config_json, error) from error
    check_model(config)
    return config


def _check_type(source: Source, kind: str, brings_code: bool) -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    if kind not in CONFIG_MAPPING:
        if brings_code:
            raise ModelError(
                f"{source.name}: transformers has no model type {kind!r}, and the model's code is not run",
                hint="--trust-remote-code runs it with all your rights: read it first",
            )
        raise ModelError(
            f"{source.name}: this version of transformers has no model type {kind!r}",
            hint="a newer transformers may know it",
        )
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        text_only = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        raise ModelError(
            f"{source.name} is {'a text-only' if text_only else 'not an image-text-to-text'} model ({kind})",
            hint="name a vision-language model, e.g. llava-hf/llava-1.5-7b-hf",
        )


def read_processor(source: Source, options: LoadOptions = DEFAULTS) -> Any:
    """The processor of a model, without the model. Raises `ModelError` when it cannot be loaded."""
    with quiet():
        return _processor(source, options)


def _processor(source: Source, options: LoadOptions) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source.folder, trust_remote_code=options.trust_remote_code)
    except Exception as error:
        raise processor_error(source, error) from error
    lacking = [part for part in ("tokenizer", "image_processor") if getattr(processor, part, None) is None]
    if lacking:
        raise lacks_files(source, [part.replace("_", " ") for part in lacking])
    _check_processor_args(processor, options, source.name)
    return processor


def _check_processor_args(processor: Any, options: LoadOptions, name: str) -> None:
    """Refuse arguments that the image processor does not know, where it says which it knows."""
    kinds = getattr(processor.image_processor, "valid_kwargs", None)
    known = sorted(set(getattr(kinds, "__annotations__", ())) - _OURS)
    for argument in options.processor_args if known else ():
        if argument not in known:
            close = get_close_matches(argument, known, n=1)
            raise UsageError(
                f"the image processor of {name} has no argument {argument!r}",
                hint=f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}",
            )


def _model(
    source: Source, config: Any, dtype: Any, device: Any, options: LoadOptions, place: dict[str, Any]
) -> Any:
    import torch
    from transformers import AutoModelForImageTextToText

    check_generation_config(source)
    files = weight_files(source)
    needed = needed_bytes(files, source, dtype if isinstance(dtype, torch.dtype) and not place else None)
    # Code that a model brings may work out numbers as it is built, which nothing without storage can.
    if not (options.trust_remote_code and hasattr(config, "auto_map")):
        built = outline(source, config, attention_to_load(options.attn))
        needed = int(needed * check_size(source, config, built, files))
    if device.type == "cpu" and not place:
        check_host_memory(needed, f"the weights of {source.name}")
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            source.folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention_to_load(options.attn),
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
            # Told by `_check_report`, with the shapes, which the error that it raises else does not name.
            ignore_mismatched_sizes=True,
            **place,
            **parallel.load_options(),
        )
        parallel.check_loaded(model, source.name)
        set_attention(model, options.attn, source.name)
        _check_report(report, source.name)
        return (model if place else model.to(device)).eval().requires_grad_(False)
    except PLPHPError:
        raise
    except Exception as error:
        raise model_error(source, error, device, options, needed) from error


def _check_report(report: dict[str, Any], name: str) -> None:
    """Refuse weights that are missing or of other shapes than the config says. Raises `ModelError`."""
    other = sorted((key, tuple(stored), tuple(ours)) for key, stored, ours in report["mismatched_keys"])
    if other:
        key, stored, ours = other[0]
        more = f"; so do {len(other) - 1} more" if other[1:] else ""
        raise ModelError(
            f"the weights of {name} do not match its config: {key} has the shape {list(stored)} in the file "
            f"and {list(ours)} by config.json{more}",
            hint=SAME_MODEL,
        )
    absent = sorted(report["missing_keys"])
    if absent:
        raise ModelError(
            f"the weights of {name} do not match its config: {len(absent)} are missing, such as {absent[0]}",
            hint=SAME_MODEL,
        )


def _plain(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
