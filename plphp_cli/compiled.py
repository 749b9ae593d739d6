"""Compiled decoding: a step without Python and, on CUDA, without launches.

The decoder's layers are compiled by torch.compile, once for all layers of a model (their attention is one
opaque operation, so that neither lengths nor layers make a variant). On CUDA the whole step is then captured
in a graph. Where caches lie and how long they are is data that the graph reads: one capture serves any
prompts whose capacities fall into the same buckets, that is, whose caches are split alike. No capacity is
rounded up for that: a compiled step's caches take the bytes that an uncompiled one's do.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as linear_function
from transformers.cache_utils import Cache

from plphp_cli.errors import PLPHPError, UnsupportedError
from plphp_cli.joined import HANDLE, JoinedLayer
from plphp_cli.models.failures import first_line
from plphp_cli.products import column_products, times_columns

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel

Run = Callable[[Tensor, Cache, Tensor | None], Tensor]
Product = Callable[[nn.Linear, Tensor], Tensor]
# Runs before a capture: what is compiled, tuned and allocated once must be so before it.
_WARM_UPS = 3
# Of a layer's code: one, and more for batch sizes and dynamic shapes. torch's own limit is 8.
_MOST_VARIANTS = 64
# Graphs kept, the latest used: each has a memory pool of its own, of a step's activations and logits.
MOST_CAPTURES = 16


@dataclass
class CompileStats:
    """What compiling came to. Only what succeeded is counted: captures + hits = joins >= batches.

    Attributes:
        captures: CUDA graphs captured (on a CPU: numbers of rows that layers were compiled for).
        hits: joins that an earlier capture served.
        joins: prompts put together for compiled steps: as a batch begins, and as it goes on without those
            that ended.
        batches: batches that began with compiled steps.
        evictions: captures let go for newer ones, since `MOST_CAPTURES` are kept.
        compile_s: seconds of compiling and capturing, warm-up and failed attempts included.
        refused: why steps run uncompiled from then on; None while they are compiled.
    """

    captures: int = 0
    hits: int = 0
    joins: int = 0
    batches: int = 0
    evictions: int = 0
    compile_s: float = 0.0
    refused: str | None = None

    @property
    def hit_rate(self) -> float | None:
        """Hits over joins; None before any."""
        return self.hits / self.joins if self.joins else None


def caveats(loaded: "LoadedModel") -> list[str]:
    """What a reader must know of compiled steps on this model's device, with its attention back-end."""
    found = []
    if loaded.attn != "sdpa":
        found.append(f"compiled steps do not attend by {loaded.attn}, which is for prefill and other steps")
    if loaded.device.type == "cpu":
        found.append("compiled steps seldom pay on a CPU: a step waits for memory there, not for launches")
    return found


class StepCompiler:
    """Compiled steps of one model, kept for as long as this lives; nothing is left on the model.

    Args:
        loaded: the model.
        run: one uncompiled step: ids [B, 1], joined cache, positions -> logits [B, vocab].
    """

    def __init__(self, loaded: "LoadedModel", run: Run) -> None:
        self.stats = CompileStats()
        self._model: Any = loaded.model
        self._run = run
        self._forwards: dict[tuple[type, bool], Callable[..., Any]] = {}
        self._captures: OrderedDict[tuple[Any, ...], _Capture] = OrderedDict()

    def step_for(self, cache: Cache, positions: Tensor | None, *, begins: bool = True) -> "Step | None":
        """A compiled step for a joined cache; None where it cannot be, and `stats.refused` says why.

        Args:
            cache: of `joined.join`.
            positions: of the rows' latest tokens [..., B, 1].
            begins: whether a batch begins; else one goes on with fewer rows.
        """
        stats = self.stats
        if stats.refused is not None:
            return None
        started, hit = time.perf_counter(), False
        try:
            step, hit = self._step_for(cache, positions)
        except PLPHPError as error:
            stats.refused = error.message
        # Whatever a compiler of another project may raise: decoding goes on without it, and says so.
        except Exception as error:  # noqa: BLE001
            stats.refused = f"{type(error).__name__}: {first_line(error)}"
        else:
            stats.hits += hit
            stats.captures += not hit
            stats.joins += 1
            stats.batches += begins
            return step
        finally:
            if not hit:
                stats.compile_s += time.perf_counter() - started
        return None

    def _step_for(self, cache: Cache, positions: Tensor | None) -> tuple["Step", bool]:
        """The step, and whether an earlier capture serves it."""
        layers: list[JoinedLayer] = cache.layers
        device = layers[0].rows[0].keys.device
        if any(not hasattr(row, "buffers") for layer in layers for row in layer.rows):
            raise UnsupportedError("layers of sliding or linear attention are not compiled")
        if positions is None:
            raise UnsupportedError("the model counts its positions by itself")
        rows = len(layers[0].rows)
        if device.type == "cpu":
            key: tuple[Any, ...] = (rows,)
            capture = self._kept(key)
            if capture is None:
                self._warm_up(cache, positions)
                return Step(self._keep(key, _Capture(self, None)), cache, positions), False
            return Step(capture, cache, positions), True
        if any(layer.table is None for layer in layers):
            raise UnsupportedError(
                "compiled decoding on a GPU needs Triton and a head width of a power of two"
            )
        key = (
            rows,
            tuple(positions.shape[:-2]),
            tuple(layer.table.splits for layer in layers if layer.table),
        )
        capture = self._kept(key)
        if capture is None:
            capture = _Capture(self, positions)
            capture.take(cache)
            return Step(self._keep(key, capture), cache, positions), False
        capture.adopt(cache, positions)
        return Step(capture, cache, positions), True

    def _kept(self, key: tuple[Any, ...]) -> "_Capture | None":
        """The capture of that key, which is then the latest used."""
        if key in self._captures:
            self._captures.move_to_end(key)
        return self._captures.get(key)

    def _keep(self, key: tuple[Any, ...], capture: "_Capture") -> "_Capture":
        """Keep a capture that was taken, in place of the one unused for longest where there are too many.

        A batch that still runs by that one holds it until its end.
        """
        self._captures[key] = capture
        if len(self._captures) > MOST_CAPTURES:
            self._captures.popitem(last=False)
            self.stats.evictions += 1
        return capture

    def _warm_up(self, cache: Cache, positions: Tensor) -> None:
        """Compile, and take back the token that this wrote."""
        rows = [row for layer in cache.layers for row in layer.rows]
        before = [row.held for row in rows]
        ids = torch.zeros(positions.shape[-2], 1, dtype=torch.long, device=positions.device)
        try:
            self.run(ids, cache, positions + 1)
        finally:
            # Also where it failed half way: uncompiled steps go on from here.
            for row, held in zip(rows, before, strict=True):
                row.crop(held - row.held)

    @contextmanager
    def compiled_layers(self, cache: Cache) -> Iterator[None]:
        """While open, the decoder's layers run compiled, each on its joined layer."""
        layers = list(self._model.get_decoder().layers)
        if any("forward" in vars(module) for layer in layers for module in layer.modules()):
            raise UnsupportedError("layers whose forward something else has replaced are not compiled")
        one = len(cache.layers[0].rows) == 1
        on_cuda = next(layers[0].parameters()).is_cuda
        parts = _row_products(layers, column_products(self._model, 1).linears) if one else []
        changed: list[Any] = []
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=_MOST_VARIANTS):
            try:
                for layer, joined in zip(layers, cache.layers, strict=True):
                    kind = (type(layer), one)
                    compiled = self._forwards.setdefault(kind, _compiled(type(layer), one and on_cuda))
                    vars(layer)["forward"] = partial(_call, compiled, layer, joined)
                    changed.append(layer)
                for part, product in parts:
                    # A method, not a partial: compiled code would tell those apart by layer.
                    vars(part)["forward"] = MethodType(product, part)
                    changed.append(part)
                yield
            finally:
                for module in changed:
                    vars(module).pop("forward", None)

    def run(self, ids: Tensor, cache: Cache, positions: Tensor | None) -> Tensor:
        """One step with compiled layers, from Python."""
        with self.compiled_layers(cache):
            return self._run(ids, cache, positions)


class Step:
    """The compiled steps of one batch."""

    def __init__(self, capture: "_Capture", cache: Cache, positions: Tensor) -> None:
        self._capture, self._cache, self._positions = capture, cache, positions

    def __call__(self, ids: Tensor) -> Tensor:
        """Feed one token a sequence, ids [B, 1]; returns logits [B, vocab], overwritten by the next step."""
        if self._capture.graph is not None:
            return self._capture.replay(ids)
        self._positions = self._positions + 1
        return self._capture.compiler.run(ids, self._cache, self._positions)


@dataclass(eq=False)
class _Capture:
    """One CUDA graph of a step with the tensors it reads; without a graph on other devices."""

    compiler: StepCompiler
    positions: Tensor | None
    graph: Any = None
    ids: Tensor | None = None
    logits: Tensor | None = None
    lengths: Tensor | None = None
    tables: list[Any] = field(default_factory=list)

    def take(self, cache: Cache) -> None:
        """Warm up and capture. The tokens that this writes lie where the first real one will."""
        assert self.positions is not None
        lengths: Tensor = cache.lengths
        self.lengths, self.tables = lengths, [layer.table for layer in cache.layers]
        device = lengths.device
        first, positions = self.positions, self.positions.clone()
        self.positions = positions
        self.ids = ids = torch.zeros(lengths.shape[1], 1, dtype=torch.long, device=device)
        before = lengths.clone()

        def step() -> Tensor:
            positions.add_(1)
            logits = self.compiler.run(ids, cache, positions)
            lengths.add_(1)
            return logits

        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                step()
                lengths.copy_(before)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.logits = step()
        lengths.copy_(before)
        positions.copy_(first)

    def adopt(self, cache: Cache, positions: Tensor) -> None:
        """Serve another batch of the same kind."""
        if self.graph is None:
            return
        for layer, table in zip(cache.layers, self.tables, strict=True):
            table.point_at(layer.rows)
            layer.table = table
        cache.lengths = self.lengths
        assert self.positions is not None
        self.positions.copy_(positions)

    def replay(self, ids: Tensor) -> Tensor:
        """One step of the captured graph."""
        assert self.ids is not None
        assert self.logits is not None
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits


class _HandsBack:
    """What a compiled layer is given for its cache: the operation that attends also writes."""

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new token's states, as they are."""
        return key, value


def _call(compiled: Callable[..., Any], layer: Any, joined: JoinedLayer, *args: Any, **kwargs: Any) -> Any:
    for name in ("cache", "past_key_values"):
        if name in kwargs:
            kwargs[name] = _HandsBack()
    return compiled(layer, *args, **{**kwargs, HANDLE: joined.handle})


def _compiled(kind: Any, row: bool) -> Callable[..., Any]:
    """The compiled forward of a layer class; `row` says that it is for one sequence on CUDA."""
    options: dict[str, Any] = {}
    if row:
        # With one row a product is a sum over columns, which tuned kernels read faster than cuBLAS does;
        # what is cheap per element must not be computed anew for every row of the next matrix.
        options = {"coordinate_descent_tuning": True, "realize_opcount_threshold": 4}
    return torch.compile(kind.forward, options=options or None)


def _row_products(layers: list[Any], as_columns: Sequence[nn.Linear]) -> list[tuple[nn.Linear, Product]]:
    """The linear layers that take one row another way than their own, each with its way."""
    columns = set(as_columns)
    linears = [part for layer in layers for part in layer.modules() if type(part) is nn.Linear]
    apart = [part for part in linears if part.weight.is_cuda and part.bias is not None]
    found: list[tuple[nn.Linear, Product]] = [(part, _bias_apart) for part in apart]
    return found + [(part, times_columns) for part in linears if part in columns]


def _bias_apart(linear: nn.Linear, states: Tensor) -> Tensor:
    """As `linear.forward`, in two operations: products with a bias fused in are not tuned as sums."""
    return linear_function(states, linear.weight) + linear.bias
