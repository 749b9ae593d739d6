"""Does it run here? Each part is tried in turn, and told in a line of JSON, so that a crash tells where.

`plphp doctor` runs it in a process of its own: `python -m plphp_cli.probe`. What libraries print goes to
stderr.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TORCH, TRANSFORMERS, BUILTIN, TORCHVISION, NVML = (
    "torch",
    "transformers",
    "built-in model",
    "torchvision",
    "NVML",
)


def main() -> int:
    """Try every part; a part that fails ends none of the others."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for name, attempt in PARTS.items():
        out.write(json.dumps({"part": name, "state": "began"}) + "\n")
        out.flush()
        started = time.perf_counter()
        try:
            found: dict[str, Any] = {"state": "works", "found": attempt()}
        except ModuleNotFoundError as error:
            # A package that is not there is one thing, one that is there and lacks another is a fault.
            absent = error.name in (name, "pynvml")
            found = {"state": "absent" if absent else "fails", "error": _told(error)}
        except BaseException as error:  # noqa: BLE001  (whatever it is, it is what the user must see)
            found = {"state": "fails", "error": _told(error)}
        seconds = time.perf_counter() - started
        out.write(json.dumps({"part": name, "seconds": seconds, **found}) + "\n")
        out.flush()
    return 0


def _told(error: BaseException) -> str:
    """An error with what caused it, in one line."""
    parts: list[str] = []
    while error is not None and len(parts) < 4:
        text = str(error).strip()
        lines = text.splitlines()
        if lines and lines[0] not in "\n".join(parts):
            parts.append(f"{type(error).__name__}: {lines[0]}")
        elif not lines:
            parts.append(type(error).__name__)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return "; caused by ".join(parts)


def _torch() -> dict[str, Any]:
    import torch

    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            with torch.cuda.device(index):
                bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            devices.append(
                {
                    "device": f"cuda:{index}",
                    "name": properties.name,
                    "memory_bytes": properties.total_memory,
                    "free_bytes": torch.cuda.mem_get_info(index)[0],
                    "capability": f"{properties.major}.{properties.minor}",
                    "bfloat16": bfloat16,
                }
            )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU"})
    return {
        "file": str(Path(torch.__file__).parent),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "devices": devices,
    }


def _transformers() -> dict[str, Any]:
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401

    import plphp_cli.attention  # noqa: F401

    return {"file": str(Path(transformers.__file__).parent)}


def _builtin() -> dict[str, Any]:
    from PIL import Image

    from plphp_cli import models
    from plphp_cli.decoding import Done
    from plphp_cli.generate import stream
    from plphp_cli.images import LoadedImage
    from plphp_cli.sampling import Settings

    loaded = models.load(models.BUILTIN)
    red = LoadedImage(Image.new("RGB", (96, 96), "red"), "red", (96, 96), (), "")
    prompt = models.prepare(loaded, [red], "Describe the image.")
    *_, done = stream(loaded, prompt, models.default_config(loaded), Settings(max_new_tokens=8))
    assert isinstance(done, Done)
    return {"device": str(loaded.device), "new_tokens": len(done.token_ids)}


def _torchvision() -> dict[str, Any]:
    import torchvision

    return {"file": str(Path(torchvision.__file__).parent)}


def _nvml() -> dict[str, Any]:
    import pynvml

    pynvml.nvmlInit()
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        names = [
            pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index))
            for index in range(pynvml.nvmlDeviceGetCount())
        ]
    finally:
        pynvml.nvmlShutdown()
    texts = [text.decode(errors="replace") if isinstance(text, bytes) else text for text in (driver, *names)]
    return {"driver": texts[0], "devices": texts[1:]}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    NVML: _nvml,
    TORCH: _torch,
    TRANSFORMERS: _transformers,
    BUILTIN: _builtin,
    TORCHVISION: _torchvision,
}

if __name__ == "__main__":
    sys.exit(main())
