"""Where and how a model runs: device, dtype and attention back-end, checked before anything loads."""

from typing import TYPE_CHECKING, Any

from plphp_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION = ("sdpa", "eager")


def choose_device(name: str) -> "torch.device":
    """The device that `auto`, `cpu`, `cuda`, `cuda:1` or `mps` names.

    Raises:
        UsageError: the name is none of these, or there is no such device here.
    """
    import torch

    kind, _, ordinal = name.partition(":")
    known = kind in ("auto", "cpu", "cuda", "mps") and (
        not ordinal or (kind == "cuda" and ordinal.isdecimal())
    )
    if not known or name.endswith(":"):
        raise UsageError(f"device {name!r}; expected auto, cpu, cuda, cuda:N or mps")
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


def check_attention(name: str) -> None:
    """Refuse an attention back-end that pruning is not proven with. Raises `UsageError`."""
    if name not in ATTENTION:
        raise UsageError(f"attention {name!r}; expected {' or '.join(ATTENTION)}")
