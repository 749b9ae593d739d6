"""Where a model's weights go, and in how few bits: accelerate's device map, and quantisation."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from plphp_cli.errors import ModelError, UsageError
from plphp_cli.models.options import LoadOptions
from plphp_cli.parallel import world_size

if TYPE_CHECKING:
    import torch


def check_packages(options: LoadOptions, device: "torch.device") -> None:
    """Refuse a device map or quantisation that this installation, the device or several ranks cannot do.

    Raises:
        UsageError: accelerate or bitsandbytes is missing, the device is not CUDA, or there are several ranks.
    """
    placed = {"--device-map": options.device_map, "--quantize": options.quantize}
    for option, value in placed.items():
        if value is not None and world_size() > 1:
            raise UsageError(
                f"{option} {value} does not go with torchrun, which gives each rank its share of the weights",
                hint=f"leave out {option}, or start it without torchrun",
            )
    if options.device_map is not None and find_spec("accelerate") is None:
        raise UsageError(
            f"--device-map {options.device_map} needs accelerate", hint="pip install 'plphp-cli[accelerate]'"
        )
    if options.quantize is None:
        return
    if device.type != "cuda":
        raise UsageError(
            f"--quantize {options.quantize} needs CUDA, and this would run on {device}",
            hint="leave out --quantize",
        )
    missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--quantize {options.quantize} needs {' and '.join(missing)}",
            hint="pip install 'plphp-cli[quantize]'",
        )
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:
        raise UsageError(
            f"bitsandbytes does not work here: {type(error).__name__}: {str(error).strip()[:200]}",
            hint="leave out --quantize, or install a bitsandbytes that suits this torch and its CUDA",
        ) from error


def stored_quantisation(config: Any) -> str | None:
    """How the checkpoint's weights are quantised, in a word; None if they are not."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return str(getattr(method, "value", method) or "in a way of its own")


def placement(
    name: str, config: Any, options: LoadOptions, dtype: Any, device: "torch.device"
) -> dict[str, Any]:
    """What `from_pretrained` is told about devices and bits; empty where the model is moved after it.

    Args:
        name: of the model, for messages.
        config: the model's.
        options: what the user asked for.
        dtype: to load in, or `"auto"`.
        device: the one, or the main one of a device map.

    Raises:
        UsageError: it is to be quantised, and is already.
        ModelError: it is quantised, in an unknown way, or accelerate is missing, which places such weights,
            or several ranks would share it.
    """
    stored = stored_quantisation(config)
    arguments: dict[str, Any] = {}
    if options.device_map is not None:
        arguments["device_map"] = options.device_map
    elif options.quantize is not None or stored is not None:
        # Packed weights cannot be moved like others: they are put where they belong at once.
        arguments["device_map"] = {"": device}
    if stored is not None:
        if options.quantize is not None:
            raise UsageError(
                f"the weights of {name} are quantised already ({stored})", hint="leave out --quantize"
            )
        if world_size() > 1:
            raise ModelError(
                f"the weights of {name} are quantised ({stored}), which several ranks cannot share",
                hint="start it without torchrun",
            )
        if not _is_known(stored):
            raise ModelError(
                f"the weights of {name} are quantised in a way that transformers does not know ({stored})",
                hint="a newer transformers may know it",
            )
        if find_spec("accelerate") is None:
            raise ModelError(
                f"the weights of {name} are quantised ({stored}), and placing them needs accelerate",
                hint="pip install 'plphp-cli[accelerate]'",
            )
    if options.quantize is not None:
        arguments["quantization_config"] = _bitsandbytes(options.quantize, config, dtype)
    return arguments


def _is_known(method: str) -> bool:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    return any(known == method or known.startswith(f"{method}_") for known in KNOWN)


def _bitsandbytes(bits: str, config: Any, dtype: Any) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    kind = dtype if isinstance(dtype, torch.dtype) else getattr(config, "dtype", None)
    # What is not said is computed in float32, which is slow; and of the two kinds of 4 bits NF4 is closer.
    compute = kind if isinstance(kind, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def main_device(model: Any) -> "torch.device":
    """The device that a prompt's inputs belong on: where the input embedding is looked up.

    A layer that accelerate keeps in the machine's memory still runs on a device of its own.
    """
    import torch

    embedding = model.get_input_embeddings()
    executed = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if executed is None:
        found = embedding.weight.device
    elif isinstance(executed, int):
        found = torch.device("cuda", executed)
    else:
        found = torch.device(executed)
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


def described(model: Any) -> str | None:
    """How a device map spread the model, in words; None where there is one device alone."""
    places = getattr(model, "hf_device_map", None) or {}
    counts: dict[str, int] = {}
    for place in places.values():
        word = f"cuda:{place}" if isinstance(place, int) else str(place)
        counts[word] = counts.get(word, 0) + 1
    if len(counts) < 2:
        return None
    return ", ".join(f"{count} parts on {word}" for word, count in counts.items())
