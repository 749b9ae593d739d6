"""The environment as a bug report needs it, and what is wrong with it. The home folder is told as `~`.

Importing it does not import torch: whether that works is what is asked, in a process of its own.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plphp_cli import __version__
from plphp_cli.environment import cpu_model, package_version
from plphp_cli.inventory import folder_bytes
from plphp_cli.memory import known
from plphp_cli.probe import BUILTIN, NVML, TORCH, TORCHVISION, TRANSFORMERS
from plphp_cli.serialize import SCHEMA_VERSION
from plphp_cli.units import format_bytes

WORKS, FAILS, ABSENT, CRASHED, LATE, NOT_REACHED = (
    "works",
    "fails",
    "absent",
    "crashed",
    "too slow",
    "not reached",
)
PARTS = (NVML, TORCH, TRANSFORMERS, BUILTIN, TORCHVISION)
# Without these nothing runs; the others are wanted by some models or figures.
_NEEDED = (TORCH, TRANSFORMERS, BUILTIN)
_PACKAGES = (
    *("torch", "transformers", "huggingface-hub", "tokenizers", "safetensors", "typer", "rich", "numpy"),
    *("pillow", "nvidia-ml-py", "accelerate", "bitsandbytes", "torchvision", "num2words", "ray"),
)
_VARIABLES = (
    *("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "PYTHONPATH"),
)
# The versions that the method's laws were run on; `pyproject.toml` says the same.
OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = (5, 15), (5, 24)
# A 7B model in bfloat16, and room to unpack it.
_ROOM_BYTES = 20 << 30
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Part:
    """One part that was tried: `state` is one of the words above; `found` is what it told."""

    name: str
    state: str
    seconds: float | None = None
    error: str | None = None
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to do; `fatal` when nothing runs because of it."""

    text: str
    hint: str
    fatal: bool = False


@dataclass(frozen=True)
class HubCache:
    """The local hub cache: its folder, what is in it, and what its disk has left."""

    folder: str | None
    bytes: int | None
    free_bytes: int | None
    writable: bool | None
    offline: bool


@dataclass(frozen=True)
class DoctorRecord:
    """Everything that `plphp doctor` knows. `packages` are None where they are not installed."""

    usable: bool
    plphp: str
    python: str
    platform: str
    cpu: str | None
    usable_cores: int | None
    memory_bytes: int | None
    packages: dict[str, str | None]
    gpus_seen: bool | None
    hub: HubCache
    variables: dict[str, str]
    parts: tuple[Part, ...]
    problems: tuple[Problem, ...]
    schema_version: int = SCHEMA_VERSION

    def part(self, name: str) -> Part:
        """One of the parts that were tried."""
        return next(part for part in self.parts if part.name == name)


def examine(command: tuple[str, ...] | None = None) -> DoctorRecord:
    """Look at everything; takes as long as importing torch and answering one question.

    Args:
        command: what tries the parts, in place of `python -m plphp_cli.probe`.
    """
    parts = try_parts((sys.executable, "-m", "plphp_cli.probe") if command is None else command)
    packages = {name: package_version(name) for name in _PACKAGES}
    hub, gpus = _hub(), _nvidia_seen()
    problems = (
        *_failures(parts),
        *_device_problems(parts, packages, gpus),
        *_package_problems(parts, packages),
        *_disk_problems(hub),
    )
    return DoctorRecord(
        usable=not any(problem.fatal for problem in problems),
        plphp=__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        platform=platform.platform(),
        cpu=cpu_model(),
        usable_cores=known(lambda: len(os.sched_getaffinity(0))) or os.cpu_count(),
        memory_bytes=known(_memory_bytes),
        packages=packages,
        gpus_seen=gpus,
        hub=hub,
        variables={name: _harmless(os.environ[name]) for name in _VARIABLES if name in os.environ},
        parts=tuple(parts.values()),
        problems=tuple(Problem(hide_home(p.text), hide_home(p.hint), p.fatal) for p in problems),
    )


def try_parts(command: tuple[str, ...], timeout_s: float = _TIMEOUT_S) -> dict[str, Part]:
    """Run the probe and read what it told of each part, also when it crashed or hung half-way."""
    try:
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=timeout_s, check=False
        )
        output, ended = run.stdout, CRASHED
        how = (
            f"ended with code {run.returncode}"
            if run.returncode >= 0
            else f"killed by signal {-run.returncode}"
        )
    except subprocess.TimeoutExpired as error:
        output, ended, how = error.stdout or b"", LATE, f"no answer in {timeout_s:.0f} s"
    parts: dict[str, Part] = {}
    for line in output.decode("utf-8", errors="replace").splitlines():
        told = known(lambda line=line: dict(json.loads(line)))  # type: ignore[misc]
        if told is None or told.get("part") not in PARTS:
            continue
        name, state, text = told["part"], told.get("state", FAILS), told.get("error")
        if state == "began":
            parts[name] = Part(name, ended, error=how)
        else:
            parts[name] = Part(
                name,
                state,
                told.get("seconds"),
                None if text is None else hide_home(text),
                _at_home(told.get("found") or {}),
            )
    return {name: parts.get(name, Part(name, NOT_REACHED)) for name in PARTS}


def hide_home(text: str) -> str:
    """`text` with the home folder as `~`."""
    home = str(Path.home())
    return text if len(home) < 2 else re.sub(rf"{re.escape(home)}(?=[/\\\s:'\",)]|$)", "~", text)


def _at_home(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: hide_home(value) if isinstance(value, str) else value for name, value in found.items()}


def _harmless(value: str) -> str:
    """A variable's value without the name and password that an address may carry."""
    return hide_home(re.sub(r"(?<=://)[^/@\s]*@", "***@", value))


def _failures(parts: Mapping[str, Part]) -> list[Problem]:
    """What does not run at all: the first part that fails, which those after it fail with."""
    for name in _NEEDED:
        part = parts[name]
        if part.state == WORKS:
            continue
        vision = parts[TORCHVISION]
        if name != TORCH and vision.state in (FAILS, CRASHED):
            return [_torchvision_problem(vision, fatal=True)]
        state = "is not installed" if part.state == ABSENT else part.state
        text = f"{name} {state}: {part.error or 'no reason was told'}"
        hint = {
            TORCH: "install torch anew: https://pytorch.org/get-started/locally",
            TRANSFORMERS: "pip install --upgrade plphp-cli transformers",
            BUILTIN: "`plphp run --debug` on an image shows where; please report it with this page",
        }[name]
        return [Problem(text, hint, fatal=True)]
    return []


def _torchvision_problem(part: Part, fatal: bool = False) -> Problem:
    then = ", and what imports it fails too" if fatal else ""
    return Problem(
        f"torchvision is installed but cannot be imported{then}: {part.error}",
        "it must be of the same build as torch (CPU or CUDA, from the same index): install both in one "
        "command, or `pip uninstall torchvision`",
        fatal,
    )


def _device_problems(
    parts: Mapping[str, Part], packages: Mapping[str, str | None], gpus: bool | None
) -> list[Problem]:
    torch, nvml = parts[TORCH], parts[NVML]
    if torch.state != WORKS:
        return []
    cuda = [one for one in torch.found.get("devices", ()) if str(one.get("device")).startswith("cuda")]
    built = torch.found.get("cuda") or torch.found.get("hip")
    if gpus and not built:
        return [
            Problem(
                "this machine has an NVIDIA GPU, but this torch is built without CUDA",
                "install a CUDA build: https://pytorch.org/get-started/locally",
            )
        ]
    if gpus and not cuda:
        return [
            Problem(
                "this machine has an NVIDIA GPU, but torch sees none",
                "CUDA_VISIBLE_DEVICES may hide it, or the driver is older than this build of torch needs: "
                "see what `nvidia-smi` says",
            )
        ]
    if cuda and nvml.state != WORKS and torch.found.get("hip") is None:
        hint = (
            "pip install nvidia-ml-py"
            if packages["nvidia-ml-py"] is None
            else "the driver may be half-installed"
        )
        return [Problem(f"GPU memory, power and clocks cannot be read (NVML): {nvml.error}", hint)]
    return []


def _package_problems(parts: Mapping[str, Part], packages: Mapping[str, str | None]) -> list[Problem]:
    problems = []
    vision, version = parts[TORCHVISION], packages["transformers"]
    if vision.state in (FAILS, CRASHED) and all(parts[name].state == WORKS for name in _NEEDED):
        problems.append(_torchvision_problem(vision))
    if packages["torchvision"] is None:
        text = "torchvision is not installed: many families' processors need it (`plphp models` says which)"
        problems.append(Problem(text, "pip install 'plphp-cli[vision]'"))
    elif packages["num2words"] is None:
        text = "num2words is not installed: the processor of SmolVLM needs it"
        problems.append(Problem(text, "pip install 'plphp-cli[vision]'"))
    if version is not None and not OLDEST_TRANSFORMERS <= _numbers(version) <= NEWEST_TRANSFORMERS:
        oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS))
        text = f"pruning is proven to be right on transformers {oldest} to {newest}, not on {version}"
        problems.append(Problem(text, f"pip install 'transformers=={newest}.*'"))
    return problems


def _disk_problems(hub: HubCache) -> list[Problem]:
    problems = []
    if hub.free_bytes is not None and hub.free_bytes < _ROOM_BYTES:
        left = format_bytes(hub.free_bytes)
        text = f"the disk of the hub cache has {left} left; a 7B model takes about 15 GiB"
        problems.append(Problem(text, "free some, or set HF_HOME to a folder on another disk"))
    if hub.writable is False:
        text = f"the hub cache {hub.folder} cannot be written to: no model can be downloaded"
        problems.append(Problem(text, "set HF_HOME to a folder of yours"))
    return problems


def _hub() -> HubCache:
    constants = known(_hub_constants)
    if constants is None:
        return HubCache(None, None, None, None, False)
    folder = Path(constants.HF_HUB_CACHE)
    there = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    return HubCache(
        hide_home(str(folder)),
        folder_bytes(folder),
        known(lambda: shutil.disk_usage(there).free),
        known(lambda: os.access(there, os.W_OK)),
        bool(constants.HF_HUB_OFFLINE),
    )


def _hub_constants() -> Any:
    from huggingface_hub import constants

    return constants


def _nvidia_seen() -> bool | None:
    """Whether the machine has an NVIDIA GPU, whatever torch says; None where that cannot be told."""
    if not sys.platform.startswith("linux"):
        return True if shutil.which("nvidia-smi") else None
    if Path("/dev/dxg").exists() and shutil.which("nvidia-smi"):  # Linux inside Windows
        return True
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/proc/driver/nvidia/gpus").glob("*"))


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
