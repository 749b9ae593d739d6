"""Products of one token's states by a weight matrix, where torch has a faster way than the linear layer's.

A decoding step of one prompt multiplies one row by every matrix, and reading the matrix is what that takes.
In bfloat16 on a CPU the linear layer's kernel is made for many rows: by version of torch and machine it reads
at 0.7 to 1.2 times the rate of a product of a matrix by a vector. So both are timed once, on the model's own
matrices, and the faster one is taken, by every arm that this engine runs. Both add up in float32 and round
once; their last digits may differ.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as linear_function

# What is timed: more would take seconds, and less might stay in the processor's caches.
_SAMPLE_BYTES = 64 << 20
_LEAST_BYTES = 16 << 20
_ROUNDS = 4
# Below this gain the linear layer's own way stays, so that a busy moment decides nothing.
_LEAST_GAIN = 1.15


@dataclass(frozen=True)
class VectorProducts:
    """What was found for one model: which of its linear layers go by the vector way, and what that gains.

    Attributes:
        linears: of the decoder and the output head; empty where the linear layers' own way stays.
        gain: seconds of the linear way over those of the vector way; None where nothing was timed.
    """

    linears: tuple[nn.Linear, ...] = ()
    gain: float | None = None


_FOUND: WeakKeyDictionary[nn.Module, dict[int, VectorProducts]] = WeakKeyDictionary()


def vector_products(model: Any) -> VectorProducts:
    """What is faster for this model on this machine, with torch's present number of threads; timed once."""
    found = _FOUND.setdefault(model, {})
    threads = torch.get_num_threads()
    if threads not in found:
        found[threads] = _found(model)
    return found[threads]


def remarks(model: Any) -> list[str]:
    """What a reader of figures must know of the products of one row, once they were timed."""
    return [
        "bfloat16 weights are multiplied by one token's states as by a vector, in all arms but stock: "
        f"{found.gain:.2f}x as fast, on this machine, as the linear layers' own way"
        for found in _FOUND.get(model, {}).values()
        if found.linears and found.gain is not None
    ]


@contextmanager
def one_row(linears: Sequence[nn.Linear]) -> Iterator[None]:
    """While open, these multiply one row as a vector, and more rows as they always do."""
    changed = [linear for linear in linears if "forward" not in vars(linear)]
    for linear in changed:
        vars(linear)["forward"] = MethodType(times_row, linear)
    try:
        yield
    finally:
        for linear in changed:
            vars(linear).pop("forward", None)


def times_row(linear: nn.Linear, states: Tensor) -> Tensor:
    """As `linear.forward`: states [..., in] of one row or more -> [..., out]."""
    if states.numel() != linear.in_features:
        return linear_function(states, linear.weight, linear.bias)
    multiply = _times_vector if torch.compiler.is_compiling() else _by_vector
    output: Tensor = multiply(linear.weight, states.reshape(-1), linear.bias)
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


def _found(model: Any) -> VectorProducts:
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
        return VectorProducts()
    gain = _gain(sample)
    return VectorProducts(tuple(linears) if gain >= _LEAST_GAIN else (), gain)


def _may(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and type(module.weight) is nn.Parameter  # packed and sharded weights are types of their own
        and module.weight.is_cpu
        and module.weight.dtype is torch.bfloat16
    )


@torch.no_grad()
def _gain(linears: Sequence[nn.Linear]) -> float:
    rows = [torch.ones(1, linear.in_features, dtype=linear.weight.dtype) for linear in linears]

    def seconds(way: Callable[[nn.Linear, Tensor], Tensor]) -> float:
        started = time.perf_counter()
        for linear, row in zip(linears, rows, strict=True):
            way(linear, row)
        return time.perf_counter() - started

    def plain(linear: nn.Linear, row: Tensor) -> Tensor:
        return linear_function(row, linear.weight, linear.bias)

    pairs = [(seconds(plain), seconds(times_row)) for _ in range(_ROUNDS + 1)][1:]
    return min(own for own, _ in pairs) / min(vector for _, vector in pairs)
