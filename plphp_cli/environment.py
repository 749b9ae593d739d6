"""Under which circumstances a record was taken: versions, machine, model, inputs. Unknown is None."""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from plphp_cli import __version__
from plphp_cli.config import PLPHPConfig
from plphp_cli.memory import DeviceReader, known


def environment(
    *,
    loaded: Any = None,
    config: PLPHPConfig | None = None,
    seed: int | None = None,
    command: Sequence[str] | None = None,
    images: Sequence[Any] = (),
    prompt: str | None = None,
    attention_mask: str | None = None,
) -> dict[str, Any]:
    """The environment block of a record, as JSON values.

    Everything but `machine_state` is the same whenever the same command runs on the same machine.

    Args:
        loaded: a `models.LoadedModel`, or None.
        config: the setting of PLPHP.
        seed: of sampling.
        command: the words of the command line; by default those of this process.
        images: what was shown, each with a `sha256`.
        prompt: the user's text; only its hash is kept.
        attention_mask: which mask attention was given, in a word.
    """
    reader = DeviceReader("cpu" if loaded is None else loaded.device)
    try:
        device, clocks = _device(reader), _clocks(reader)
    finally:
        reader.close()
    return {
        "tool": {"name": "plphp-cli", "version": __version__},
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "transformers": package_version("transformers"),
        "platform": platform.platform(),
        "cpu": {
            "model": cpu_model(),
            "logical_cores": os.cpu_count(),
            "usable_cores": known(lambda: len(os.sched_getaffinity(0))),
            "governor": known(_governor),
        },
        "threads": _threads(),
        "device": device,
        "model": _model(loaded),
        "attention_mask": attention_mask,
        "seed": seed,
        "command": command_line(sys.argv if command is None else command),
        "image_sha256": [image.sha256 for image in images],
        "prompt_sha256": None if prompt is None else sha256_of_text(prompt),
        "config": None if config is None else config.to_dict(),
        "machine_state": {"load_average": known(lambda: list(os.getloadavg())), "device_clocks_mhz": clocks},
    }


def package_version(name: str) -> str | None:
    """The version of an installed package, without importing it; None when it is not installed."""
    return known(lambda: version(name))


def command_line(words: Sequence[str]) -> str:
    """The words as they would be typed into a shell; the program by its name instead of its path."""
    program, *rest = words or [""]
    name = Path(program).name
    shown = ["python", "-m", "plphp_cli"] if name == "__main__.py" else [name or "plphp"]
    return shlex.join([*shown, *rest])


def sha256_of_text(text: str) -> str:
    """Hex digest of the text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def cpu_model() -> str | None:
    """The CPU's name, or None."""
    if sys.platform.startswith("linux"):
        return known(_cpu_model_of_linux)
    if sys.platform == "darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return known(lambda: subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    return platform.processor() or None


def _cpu_model_of_linux() -> str | None:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or None


def _governor() -> str:
    return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text(encoding="utf-8").strip()


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return None if torch is None else known(torch.get_num_threads)


def _model(loaded: Any) -> dict[str, Any] | None:
    if loaded is None:
        return None
    return {
        "id": loaded.name,
        "revision": loaded.revision,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attention": loaded.attn,
        "quantize": loaded.options.quantize,
        "device_map": loaded.options.device_map,
        "processor_args": loaded.options.processor_args,
        "trust_remote_code": loaded.options.trust_remote_code,
    }


def _device(reader: DeviceReader) -> dict[str, Any]:
    power_limit_mw = reader.nvml_figure("nvmlDeviceGetEnforcedPowerLimit")
    driver = None if reader.nvml is None else known(reader.nvml.nvmlSystemGetDriverVersion)
    return {
        "type": reader.kind,
        "name": reader.name or (cpu_model() if reader.kind == "cpu" else None),
        "driver": driver.decode(errors="replace") if isinstance(driver, bytes) else driver,
        "power_limit_w": None if power_limit_mw is None else power_limit_mw / 1000,
    }


def _clocks(reader: DeviceReader) -> dict[str, int | None] | None:
    """Clocks now and at most, in MHz, of the device's cores (`graphics`) and memory."""
    if reader.handle is None:
        return None
    kinds = {"graphics": "NVML_CLOCK_GRAPHICS", "memory": "NVML_CLOCK_MEM"}
    codes = {name: getattr(reader.nvml, constant, None) for name, constant in kinds.items()}
    now = {name: reader.nvml_figure("nvmlDeviceGetClockInfo", code) for name, code in codes.items()}
    most = {
        f"{name}_max": reader.nvml_figure("nvmlDeviceGetMaxClockInfo", code) for name, code in codes.items()
    }
    return now | most
