"""Products of a step's few rows by a weight matrix, where torch has a faster way than the linear layer's own.

A decoding step multiplies one row a prompt by every matrix, and reading the matrix is what that takes. In
bfloat16 on a CPU the linear layer's kernel is made for many rows: by version of torch and machine it reads at
0.6 to 1.2 times the rate of the product of the matrix by the rows as columns (one row: as a vector). So both
are timed once, on the model's own matrices, and the faster one is taken, by every arm that this engine runs.
Both add up in float32; the last digits of what they round to may differ.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as linear_function

# More rows are the linear layer's own: its kernel is made for them.
MOST_ROWS = 16
# Rows that are timed for all numbers of them but one.
_FEW = 4
# What is timed: more would take seconds, and less might stay in the processor's caches.
_SAMPLE_BYTES = 64 << 20
_LEAST_BYTES = 16 << 20
_ROUNDS = 9
# Below this gain the linear layer's own way stays: what is alike is not decided by a busy moment.
_LEAST_GAIN = 1.05


@dataclass(frozen=True)
class ColumnProducts:
    """What was found for one model and so many rows.

    Attributes:
        rows: that were timed.
        linears: linear layers of the decoder and the output head that take rows as columns; empty where their
            own way stays.
        gain: seconds of the linear layers' way over those of the other, median of alternated rounds; None
            where nothing was timed.
    """

    rows: int
    linears: tuple[nn.Linear, ...] = ()
    gain: float | None = None


# Model -> (rows that are timed, dtype, device, threads) -> what was found.
_FOUND: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], ColumnProducts]] = WeakKeyDictionary()


def column_products(model: Any, rows: int) -> ColumnProducts:
    """What is faster for steps of so many rows, with torch's present number of threads; timed once.

    That takes a tenth of a second for a large model in bfloat16 on a CPU, else nothing.
    """
    if rows > MOST_ROWS:
        return ColumnProducts(rows)
    found = _FOUND.setdefault(model, {})
    timed = 1 if rows == 1 else _FEW
    key = timed, model.dtype, model.device, torch.get_num_threads()
    if key not in found:
        found[key] = _found(model, timed)
    return found[key]


def time_products(model: Any, rows: int) -> None:
    """Find out now what a batch of so many rows, and what remains of it, will ask for: no time of a token."""
    for count in {1, rows}:
        column_products(model, count)


def remarks(model: Any) -> list[str]:
    """What a reader of figures must know of these products, whichever way was taken, once they were timed."""
    gains = [
        f"{found.gain:.2f}x as fast for {'one token' if found.rows == 1 else f'{found.rows} tokens'}"
        f"{'' if found.linears else ' and not taken'}"
        for _, found in sorted(_FOUND.get(model, {}).items(), key=lambda each: each[1].rows)
        if found.gain is not None
    ]
    if not gains:
        return []
    return [
        "bfloat16 weights may be multiplied by a step's tokens as columns, which generate never does: "
        f"timed here, {', '.join(gains)} as the linear layers' own way"
    ]


@contextmanager
def as_columns(linears: Sequence[nn.Linear]) -> Iterator[None]:
    """While open, these multiply a few rows as columns, and more rows as they always do."""
    changed = [linear for linear in linears if "forward" not in vars(linear)]
    for linear in changed:
        vars(linear)["forward"] = MethodType(times_columns, linear)
    try:
        yield
    finally:
        for linear in changed:
            vars(linear).pop("forward", None)


def times_columns(linear: nn.Linear, states: Tensor) -> Tensor:
    """As `linear.forward`: states [..., in] -> [..., out]."""
    rows = states.numel() // linear.in_features
    if rows == 1:
        multiply = _times_vector if torch.compiler.is_compiling() else _by_vector
        output: Tensor = multiply(linear.weight, states.reshape(-1), linear.bias)
    elif 1 < rows <= MOST_ROWS:
        output = torch.mm(linear.weight, states.reshape(rows, -1).t()).t().contiguous()
        if linear.bias is not None:
            output += linear.bias
    else:
        return linear_function(states, linear.weight, linear.bias)
    return output.view(*states.shape[:-1], -1)


def _by_vector(weight: Tensor, row: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)


@torch.library.custom_op("plphp::times_vector", mutates_args=())
def _times_vector(weight: Tensor, row: Tensor, bias: Tensor | None) -> Tensor:
    """For compiled code, which would write a loop of its own that reads at half the rate."""
    return _by_vector(weight, row, bias)


@_times_vector.register_fake
def _(weight: Tensor, row: Tensor, bias: Tensor | None) -> Tensor:
    return row.new_empty(weight.shape[0])


def _found(model: Any, rows: int) -> ColumnProducts:
    head = model.get_output_embeddings()
    linears = [
        module
        for part in (model.get_decoder(), head)
        for module in (() if part is None else part.modules())
        if _may(module)
    ]
    sample, taken = [], 0
    for linear in linears:
        if linear is not head and taken < _SAMPLE_BYTES:
            sample.append(linear)
            taken += linear.weight.nbytes
    if taken < _LEAST_BYTES:
        return ColumnProducts(rows)
    gain = _gain(sample, rows)
    return ColumnProducts(rows, tuple(linears) if gain >= _LEAST_GAIN else (), gain)


def _may(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and type(module.weight) is nn.Parameter  # packed and sharded weights are types of their own
        and module.weight.is_cpu
        and module.weight.dtype is torch.bfloat16
    )


@torch.no_grad()
def _gain(linears: Sequence[nn.Linear], rows: int) -> float:
    states = [torch.ones(rows, 1, linear.in_features, dtype=linear.weight.dtype) for linear in linears]

    def seconds(way: Callable[[nn.Linear, Tensor], Tensor]) -> float:
        started = time.perf_counter()
        for linear, given in zip(linears, states, strict=True):
            way(linear, given)
        return time.perf_counter() - started

    def own_way(linear: nn.Linear, given: Tensor) -> Tensor:
        return linear_function(given, linear.weight, linear.bias)

    pairs = [(seconds(own_way), seconds(times_columns)) for _ in range(_ROUNDS + 1)][1:]
    return median(own / columns for own, columns in pairs)
