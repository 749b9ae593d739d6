"""The attention back-ends that prefill can run on, and how each of them decodes over a cut cache.

Each has masks of its own kind: a tensor for sdpa and eager, a `BlockMask` for flex attention, and none for
flash attention, which aligns the last query with the last key by itself. After a cut the model's one mask has
the wrong width: one new token then needs no mask, and a chunk gets a tensor as wide as what the layer holds.
Flash attention needs no such tensor; flex attention hands the chunk to the eager function of the same module,
since a `BlockMask` per layer would be compiled anew for every width.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from plphp_cli.errors import UnsupportedError

FLEX, FLASH = "flex_attention", "flash_attention_2"
# Back-end -> the name that pruning registers for it. The word flash is left out of a name: transformers takes
# every name that holds it for a kernel to fetch from the hub.
REGISTERED = {
    "sdpa": "plphp_sdpa",
    "eager": "plphp_eager",
    FLEX: "plphp_flex_attention",
    FLASH: "plphp_fa2",
}


def register(attention: Callable[..., Any]) -> None:
    """Make `attention(backend, module, ...)` known to transformers under every registered name, for good."""
    for backend, name in REGISTERED.items():
        mask = ALL_MASK_ATTENTION_FUNCTIONS[backend]
        AttentionInterface.register(name, partial(attention, backend))
        AttentionMaskInterface.register(name, partial(_compiled, mask) if backend == FLEX else mask)


def registered(backend: str) -> str:
    """The name that stands for a back-end while its model is pruned. Raises `UnsupportedError`."""
    if backend not in REGISTERED:
        raise UnsupportedError(
            f"attention back-end {backend!r} is not supported",
            hint=f"load the model with {', '.join(REGISTERED)}",
        )
    return REGISTERED[backend]


def stock(backend: str, module: nn.Module) -> Callable[..., Any]:
    """The back-end as the module's own file has it: `attend(module, query, key, value, mask, **options)`.

    Queries are [1, H, q, d], keys and values [1, K, n, d]; the mask is of the back-end's own kind, or a
    tensor that shows each of q new tokens all held ones up to itself.
    """
    source = sys.modules[type(module).__module__]
    interface = getattr(source, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    eager = getattr(source, "eager_attention_forward", None)
    attend = interface.get_interface(backend, eager)
    if backend == FLEX:
        return partial(_flex, attend, eager)
    if backend == FLASH:
        return partial(_flash, attend)
    return attend


def _flex(
    attend: Callable[..., Any], eager: Callable[..., Any] | None, *arguments: Any, **options: Any
) -> Any:
    *tensors, mask = arguments
    if eager is None or not isinstance(mask, Tensor):
        return _compiled(attend, *arguments, **options)
    if mask.dtype == torch.bool:
        dtype = tensors[1].dtype
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return eager(*tensors, mask, **options)


def _compiled(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Flex attention is compiled at its first call, which fails without a compiler, and for some models."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        first = str(error).strip().partition("\n")[0]
        raise UnsupportedError(
            f"torch cannot compile {FLEX} for this model on this machine: {first}", hint="use --attn sdpa"
        ) from error


def _flash(
    attend: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> Any:
    if mask is not None and mask.dim() == 4:
        if mask.shape[0] != 1:
            raise UnsupportedError(f"a batch on {FLASH}", hint="use --attn sdpa")
        mask = None
    return attend(_Named(module, FLASH), query, key, value, mask, **options)


class _Named:
    """A module (or config) to whoever reads its attributes, but with the back-end's name in its config."""

    def __init__(self, thing: Any, backend: str) -> None:
        self._thing = thing
        self._attn_implementation = backend

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._thing, name)
        return _Named(value, self._attn_implementation) if name == "config" else value
