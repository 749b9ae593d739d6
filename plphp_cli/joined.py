"""Several prefilled prompts as one batch: each keeps its own cut and its own buffer, nothing is padded.

A batch shares the weights that a step reads; the caches stay apart. Each sequence was prefilled and cut by
itself, so a layer holds another number of tokens for each of them: attention runs sequence by sequence over
what each holds, on CUDA in one kernel. No cache is copied to join or to leave.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from plphp_cli.cache import PrunableLayer
from plphp_cli.errors import UnsupportedError

# Options of an attention layer that change its scores: the fused ways below do not know them.
_SCORE_OPTIONS = ("softcap", "s_aux", "position_bias")

# The option of a layer's forward that names its joined layer to the attention function, inside compiled code.
HANDLE = "plphp_handle"
_NUMBERS = count()
_HANDLES: WeakValueDictionary[int, "JoinedLayer"] = WeakValueDictionary()


class JoinedLayer(CacheLayerMixin):
    """One layer of several sequences: a row of the batch is one sequence's own cache layer.

    Attributes:
        rows: the sequences' layers, in the batch's order.
        table: on CUDA, where the rows lie and how much they hold, for the kernel; None elsewhere.
    """

    is_sliding = False

    def __init__(self, rows: Sequence[Any]) -> None:
        super().__init__()
        self.rows = list(rows)
        self.is_initialized = True
        self.table: Table | None = None
        self.handle = torch.tensor(next(_NUMBERS))
        _HANDLES[int(self.handle)] = self

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: every row is filled already."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands back the new token's states [B, K, 1, d]: `step` writes them, row by row."""
        return key_states, value_states

    def step(
        self,
        stock: Callable[..., Any],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        """Write the new tokens and attend over what each row then holds.

        Args:
            stock: the back-end's attention function, for what has no faster way.
            module: the attention module.
            query: [B, H, 1, d].
            key: [B, K, 1, d], the new tokens'; `value` likewise.
            value: see `key`.
            options: what the module passes on to its attention function.

        Returns:
            [B, 1, H, d].
        """
        if self.table is not None and not _scored_otherwise(options):
            scaling = options.get("scaling") or query.shape[-1] ** -0.5
            return self.table.attend(query[:, :, 0], key[:, :, 0], value[:, :, 0], scaling)[:, None]
        outputs = []
        for number, row in enumerate(self.rows):
            keys, values = row.update(key[number : number + 1], value[number : number + 1])
            one = query[number : number + 1]
            outputs.append(attend_held(stock, module, one, keys, values, options))
        return torch.cat(outputs)

    def get_seq_length(self) -> int:
        """Tokens seen by the longest row; positions are always passed explicitly."""
        return max(row.get_seq_length() for row in self.rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a dynamic layer has them; no row's attention uses a mask."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length


class Table:
    """On CUDA, where a layer's rows lie and how much they hold, as tensors [B] that a kernel reads."""

    def __init__(self, rows: Sequence[PrunableLayer], splits: int, length: Tensor) -> None:
        device = rows[0].keys.device
        self.splits, self.length = splits, length
        self._key_at, self._value_at, self._capacity = (
            torch.empty(len(rows), dtype=dtype, device=device)
            for dtype in (torch.int64, torch.int64, torch.int32)
        )
        self.point_at(rows)

    def point_at(self, rows: Sequence[PrunableLayer]) -> None:
        """Take over other rows, as many and of the same kind: a captured graph then works on them."""
        buffers = [row.buffers for row in rows]
        for tensor, values in (
            (self._key_at, [keys.data_ptr() for keys, _ in buffers]),
            (self._value_at, [values.data_ptr() for _, values in buffers]),
            (self._capacity, [keys.shape[2] for keys, _ in buffers]),
            (self.length, [row.held for row in rows]),
        ):
            tensor.copy_(torch.tensor(values, dtype=tensor.dtype))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """See `kernels.attend_and_write`."""
        from plphp_cli.kernels import attend_and_write

        return attend_and_write(
            query, key, value, self._key_at, self._value_at, self._capacity, self.length, scaling, self.splits
        )


def attend_held(
    stock: Callable[..., Any],
    module: Any,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """Attention of one new token [1, H, 1, d] over all of `keys` [1, K, n, d]; returns [1, 1, H, d].

    The query heads of a KV head go through SDPA as rows of one head, which reads its keys once for all of
    them: on a CPU twice as fast as SDPA's own grouped attention.
    """
    if stock is not sdpa_attention_forward or not query.is_cpu or _scored_otherwise(options):
        return stock(module, query, keys, values, None, **options)[0]
    heads, width = query.shape[1], query.shape[3]
    rows = query.reshape(1, keys.shape[1], -1, width)
    output = scaled_dot_product_attention(rows, keys, values, scale=options.get("scaling"))
    return output.reshape(1, 1, heads, output.shape[-1])


def _scored_otherwise(options: dict[str, Any]) -> bool:
    """Whether a layer's attention has options that the fused ways do not know."""
    return any(name in options and options[name] is not None for name in _SCORE_OPTIONS)


@torch.library.custom_op("plphp::step", mutates_args=())
def _step(query: Tensor, key: Tensor, value: Tensor, handle: Tensor, scaling: float) -> Tensor:
    """`JoinedLayer.step` for compiled code, to which it is one opaque operation.

    It writes into the rows' buffers, which no compiled code sees: a layer's next reader is its next step.
    """
    return _HANDLES[int(handle)].step(sdpa_attention_forward, None, query, key, value, {"scaling": scaling})


@_step.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, handle: Tensor, scaling: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


def attend_joined(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention of the joined layer that `options` name, for a compiled layer; see `JoinedLayer.step`.

    Raises:
        UnsupportedError: the layer's attention has options that the fused ways do not know.
    """
    for name in _SCORE_OPTIONS:
        if options.get(name) is not None:
            raise UnsupportedError(f"attention with {name} cannot be compiled")
    scaling = options.get("scaling")
    return _step(query, key, value, options[HANDLE], query.shape[-1] ** -0.5 if scaling is None else scaling)


def is_joined(cache: Cache) -> bool:
    """Whether a cache is of several sequences, made by `join`."""
    return bool(cache.layers) and isinstance(cache.layers[0], JoinedLayer)


def join(caches: Sequence[Cache], names: Sequence[str] = ()) -> Cache:
    """One cache whose rows are the sequences of `caches`, for steps of one token each.

    Args:
        caches: prefilled caches of one sequence each; they are filled further by the batch's steps.
        names: kinds of the layers, for messages.

    Raises:
        UnsupportedError: a layer is of a kind that cannot be joined (linear attention, convolutions).
    """
    joined = DynamicCache()
    joined.layers = []
    for index, rows in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        for row in rows:
            if type(row) not in (PrunableLayer, DynamicSlidingWindowLayer):
                kind = names[index] if index < len(names) else type(row).__name__
                raise UnsupportedError(
                    f"a batch of prompts on a model with {kind} layers is not supported",
                    hint="leave out --batch-size and --compile",
                )
        joined.layers.append(JoinedLayer(rows))
    joined.layer_class_to_replicate = None
    if fast_kernel(joined):
        lay_out(joined)
    return joined


def lay_out(joined: Cache) -> None:
    """Give the layers of a joined cache their tables; lengths are rows of one tensor, int32 [L, B]."""
    from plphp_cli.kernels import splits_for

    rows = [layer.rows for layer in joined.layers]
    device = rows[0][0].keys.device
    lengths = torch.zeros(len(rows), len(rows[0]), dtype=torch.int32, device=device)
    for layer, length in zip(joined.layers, lengths, strict=True):
        longest = max(row.buffers[0].shape[2] for row in layer.rows)
        splits = splits_for(longest, len(layer.rows) * layer.rows[0].keys.shape[1])
        layer.table = Table(layer.rows, splits, length)
    joined.lengths = lengths


def fast_kernel(joined: Cache) -> bool:
    """Whether every layer can attend by the CUDA kernel: full attention, equal widths, a power of two."""
    first = joined.layers[0].rows[0].keys.device
    for layer in joined.layers:
        for row in layer.rows:
            if not isinstance(row, PrunableLayer) or first.type != "cuda" or row.keys.device != first:
                return False
            width = row.keys.shape[-1]
            if row.values.shape[-1] != width or width & (width - 1) or not 16 <= width <= 256:
                return False
    return triton_works()


@lru_cache
def triton_works() -> bool:
    """Whether Triton is installed and can be imported."""
    try:
        import plphp_cli.kernels  # noqa: F401
    except ImportError:
        return False
    return True
