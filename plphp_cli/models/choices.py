"""Where and how a model runs: device, dtype and attention back-end, checked before anything loads."""

import importlib.util
from typing import TYPE_CHECKING, Any

from plphp_cli.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION = ("sdpa", "flash_attention_2", "flex_attention", "eager")
# What transformers can build a whole model on; the others are for the decoder alone.
_PLAIN = ("sdpa", "eager")


def check_names(dtype: str, device: str, attn: str) -> None:
    """Refuse words that name nothing, before torch is imported. Raises `UsageError`."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}; expected {', '.join(DTYPES)}")
    check_device_name(device)
    if attn not in ATTENTION:
        raise UsageError(f"attention {attn!r}; expected {', '.join(ATTENTION)}")


def check_device_name(name: str) -> None:
    """Refuse what is no device's name, whatever devices there are. Raises `UsageError`."""
    kind, _, ordinal = name.partition(":")
    known = kind in ("auto", "cpu", "cuda", "mps") and (
        not ordinal or (kind == "cuda" and ordinal.isascii() and ordinal.isdecimal())
    )
    if not known or name.endswith(":"):
        raise UsageError(f"device {name!r}; expected auto, cpu, cuda, cuda:N or mps")


def choose_device(name: str) -> "torch.device":
    """The device that `auto`, `cpu`, `cuda`, `cuda:1` or `mps` names.

    Raises:
        UsageError: the name is none of these, or there is no such device here.
    """
    import torch

    check_device_name(name)
    kind, _, ordinal = name.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda":
        if not torch.cuda.is_available():
            why = (
                "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is seen"
            )
            raise UsageError(
                f"device {name}: {why}", hint="use --device cpu, or install a CUDA build of torch"
            )
        count = torch.cuda.device_count()
        index = int(ordinal) if ordinal else torch.cuda.current_device()
        if index >= count:
            raise UsageError(f"device {name}: this machine has {count}, numbered from 0")
        return torch.device("cuda", index)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device {name}: Metal is not available here", hint="use --device cpu")
    return torch.device(kind)


def choose_dtype(name: str, device: "torch.device", builtin: bool) -> Any:
    """The torch dtype to load in, or `"auto"` for the checkpoint's own.

    Raises:
        UsageError: the name is none of `DTYPES`, or the device cannot compute in it.
    """
    import torch

    if name not in DTYPES:
        raise UsageError(f"dtype {name!r}; expected {', '.join(DTYPES)}")
    if name == "auto":
        # The built-in weights are stored in float16 to be small; CPUs are slow in it and less exact.
        return torch.float32 if builtin and device.type == "cpu" else "auto"
    if name == "bfloat16" and _lacks_bfloat16(device):
        raise UsageError(f"device {device} does not compute in bfloat16", hint="use --dtype float16")
    return getattr(torch, name)


def check_stored_dtype(config: Any, dtype: Any, device: "torch.device") -> None:
    """Refuse a checkpoint in a dtype that the device cannot compute in, unless another was asked for.

    Args:
        config: the model's.
        dtype: what `choose_dtype` gave.
        device: that it is to run on.

    Raises:
        UsageError: the checkpoint is bfloat16, and so is not what the device computes in.
    """
    if dtype == "auto" and "bfloat16" in str(getattr(config, "dtype", None)) and _lacks_bfloat16(device):
        raise UsageError(
            f"the model is stored in bfloat16, in which device {device} does not compute",
            hint="use --dtype float16, or --dtype float32",
        )


def _lacks_bfloat16(device: "torch.device") -> bool:
    import torch

    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def check_attention(name: str, device: "torch.device", dtype: Any) -> None:
    """Refuse an attention back-end that is unknown, or that cannot run here.

    Args:
        name: as the user typed it.
        device: that the model is to run on.
        dtype: of its weights, as far as it is known; `"auto"` is not.

    Raises:
        UsageError: it is none of `ATTENTION`, or lacks its package, its device or a dtype that it takes.
    """
    if name not in ATTENTION:
        raise UsageError(f"attention {name!r}; expected {', '.join(ATTENTION)}")
    if name != "flash_attention_2":
        return
    if device.type != "cuda":
        raise UsageError(f"attention {name} runs on CUDA devices, not on {device}", hint="use --attn sdpa")
    if importlib.util.find_spec("flash_attn") is None:
        raise UsageError(
            f"attention {name} needs the package flash-attn, which is not installed",
            hint="pip install flash-attn --no-build-isolation, or use --attn sdpa",
        )
    if dtype != "auto" and dtype.itemsize != 2:
        raise UsageError(
            f"attention {name} computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}",
            hint="use --dtype bfloat16, or --attn sdpa",
        )


def attention_to_load(name: str) -> str:
    """The back-end that a model is built on before `set_attention`: the vision encoder stays on it."""
    return name if name in _PLAIN else "sdpa"


def set_attention(model: Any, name: str, source: str) -> None:
    """Put the decoder of a loaded model on a back-end that not every part of the model may support.

    Raises:
        UnsupportedError: transformers does not run this decoder on it.
    """
    if name in _PLAIN:
        return
    decoder = model.get_decoder()
    try:
        decoder.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise UnsupportedError(
            f"transformers does not run {source} on {name}", hint="use --attn sdpa"
        ) from error
    if decoder.config._attn_implementation != name:
        raise UnsupportedError(
            f"transformers runs {source} on {decoder.config._attn_implementation} in place of {name}",
            hint="use --attn sdpa",
        )
