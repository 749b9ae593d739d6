"""Products of one row as a vector: the same numbers but for their last digit, and nothing of it stays."""

import shutil

import pytest
import torch
from families import as_prompt, load
from laws import CUT, snapshot
from torch import nn

from plphp_cli import products
from plphp_cli.attention import prune
from plphp_cli.decoding import DecodeBatch, step_compiler
from plphp_cli.prefilling import prefill
from plphp_cli.products import VectorProducts, one_row, remarks, vector_products

STEPS = 3
ROUNDING = 2**-8  # bfloat16 keeps eight bits


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (1, 1, 48)])
def test_one_row_is_as_the_linear_layer_has_it_and_more_rows_are_the_linear_layer_s(bias, shape):
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias, dtype=torch.bfloat16)
    row, rows = torch.randn(shape).bfloat16(), torch.randn(2, 3, 48).bfloat16()
    with torch.no_grad():
        expected, many = linear(row), linear(rows)
        exact = row.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
        with one_row([linear]):
            found, unchanged = linear(row), linear(rows)
    assert found.shape == expected.shape
    assert (found.double() - exact).abs().max() <= ROUNDING * exact.abs().max()
    assert torch.equal(unchanged, many)
    assert "forward" not in vars(linear)


def test_what_something_else_has_replaced_stays_as_it_is():
    linear, other, own = nn.Linear(4, 4), nn.Linear(4, 4), lambda states: states
    vars(linear)["forward"] = own
    with one_row([linear, other]):
        assert vars(linear)["forward"] is own
        assert "forward" in vars(other)
    assert vars(linear)["forward"] is own
    assert "forward" not in vars(other)


def test_nothing_is_timed_for_float32_nor_for_matrices_that_fit_a_cache():
    family = load("llava").fresh()
    assert vector_products(family.model) == VectorProducts()
    assert vector_products(family.model.to(torch.bfloat16)) == VectorProducts()
    assert remarks(family.model) == []


def logits_of(family, compiler=None):
    """Logits [STEPS, vocab] of one cut prompt fed with equal tokens, and how many products went by vector."""
    with torch.no_grad(), prune(family.model, CUT) as pruner:
        run = prefill(family.loaded, as_prompt(family.prompts[0]), pruner, STEPS)
        batch = DecodeBatch(family.loaded, [run], STEPS, compiler)
        with pytest.MonkeyPatch.context() as patch:
            calls, way = [], products._by_vector
            patch.setattr(products, "_by_vector", lambda *tensors: (calls.append(1), way(*tensors))[1])
            steps = [batch.step(torch.tensor([[token]])).clone() for token in range(3, 3 + STEPS)]
    return torch.cat(steps), len(calls)


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_of_one_prompt_go_by_vector_and_are_as_near_to_float32(monkeypatch, compiled):
    if compiled and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    family = load("llava").fresh()
    plain, none = logits_of(family_in(family, torch.bfloat16))
    exact, _ = logits_of(family_in(family, torch.float32))
    family_in(family, torch.bfloat16)
    assert none == 0
    # Every matrix by the vector way, whatever is faster here.
    monkeypatch.setattr(products, "_LEAST_BYTES", 0)
    monkeypatch.setattr(products, "_LEAST_GAIN", 0.0)
    products._FOUND.pop(family.model)
    before = snapshot(family.model)
    linears = [part for part in family.model.get_decoder().modules() if type(part) is nn.Linear]
    linears.append(family.model.get_output_embeddings())
    assert set(vector_products(family.model).linears) == set(linears)
    assert "as by a vector" in remarks(family.model)[0]
    compiler = step_compiler(family.loaded) if compiled else None
    found, calls = logits_of(family, compiler)
    assert calls == STEPS * len(linears)
    assert compiler is None or compiler.stats.refused is None
    assert (found - exact).abs().max() <= 3 * (plain - exact).abs().max()
    assert snapshot(family.model) == before


def family_in(family, dtype):
    """The family in that dtype, its weights rounded to bfloat16 in any case."""
    family.model.to(torch.bfloat16).to(dtype)
    return family


def test_a_batch_of_several_goes_by_the_linear_layers(monkeypatch):
    family = family_in(load("llava").fresh(), torch.bfloat16)
    monkeypatch.setattr(products, "_LEAST_BYTES", 0)
    monkeypatch.setattr(products, "_LEAST_GAIN", 0.0)
    assert vector_products(family.model).linears
    monkeypatch.setattr(products, "_by_vector", None)
    with torch.no_grad(), prune(family.model, CUT) as pruner:
        runs = [prefill(family.loaded, as_prompt(inputs), pruner, 1) for inputs in family.prompts[:2]]
        DecodeBatch(family.loaded, runs, 1).step(torch.tensor([[3], [4]]))
