"""Make torchvision importable beside a build of torch that its own library was not linked for.

The registry's torchvision is linked for the CUDA build of torch. Beside the build for CPUs alone its library
does not load, its operators are not there, and importing it fails, though what processors use of it
(resizing, normalising) is torch alone. Here the missing operators are declared, without any code behind them:
the tests of the processors then run where 8 MB were installed, and not 5 GB.
"""

import importlib.util
import re
import sys
from pathlib import Path

import torch

_KEPT = []


def declare() -> None:
    """Declare torchvision's operators, if torchvision is installed and cannot be imported without."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    else:
        return
    folder = Path(spec.submodule_search_locations[0])
    source = (folder / "_meta_registrations.py").read_text(encoding="utf-8")
    found = re.findall(r'register_meta\("(\w+)"|torchvision::(\w+)', source)
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted({first or second for first, second in found}):
        library.define(f"{name}(Tensor x) -> Tensor")
    _KEPT.append(library)  # the operators live as long as it does
