"""PLPHP: per-layer per-head vision token pruning of the KV cache, for transformers' vision-language models.

    from plphp_cli import PLPHPConfig, prune

    with prune(model, PLPHPConfig(r=0.4, delta_r=0.3, alpha=0.25, beta=0.1)) as pruner:
        output = model.generate(**inputs, max_new_tokens=64)
    pruner.layers  # what each layer kept

Importing this package imports neither torch nor transformers; the first use of `prune` does.
"""

from typing import TYPE_CHECKING, Any

from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import PLPHPError

if TYPE_CHECKING:
    from plphp_cli.attention import LayerState, Pruner, prune

__version__ = "0.1.0"
__all__ = ["LayerState", "PLPHPConfig", "PLPHPError", "Pruner", "__version__", "prune"]

_LAZY = {"LayerState", "Pruner", "prune"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from plphp_cli import attention

        return getattr(attention, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
