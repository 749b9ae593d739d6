"""Products of a few rows as columns: the same numbers but for their last digit, and nothing of it stays."""

import shutil

import pytest
import torch
from families import as_prompt, load
from laws import CUT, snapshot
from torch import nn

from plphp_cli import products
from plphp_cli.attention import prune
from plphp_cli.decoding import DecodeBatch, decode_batch, step_compiler
from plphp_cli.generate import stream
from plphp_cli.prefilling import prefill
from plphp_cli.products import MOST_ROWS, ColumnProducts, as_columns, column_products, remarks
from plphp_cli.sampling import Settings

STEPS = 3
ROUNDING = 2**-8  # bfloat16 keeps eight bits


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 1), (MOST_ROWS, 1), (MOST_ROWS + 1, 1), (2, 3)])
def test_rows_as_columns_give_what_the_linear_layer_gives_and_many_rows_are_its_own(bias, shape):
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias, dtype=torch.bfloat16)
    rows = torch.randn(*shape, 48).bfloat16()
    with torch.no_grad():
        expected = linear(rows)
        exact = rows.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
        with as_columns([linear]):
            found = linear(rows)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert (found.double() - exact).abs().max() <= 2 * ROUNDING * exact.abs().max()
    assert torch.equal(found, expected) or rows.numel() // 48 <= MOST_ROWS
    assert "forward" not in vars(linear)


def test_what_something_else_has_replaced_stays_as_it_is():
    linear, other, own = nn.Linear(4, 4), nn.Linear(4, 4), lambda states: states
    vars(linear)["forward"] = own
    with as_columns([linear, other]):
        assert vars(linear)["forward"] is own
        assert "forward" in vars(other)
    assert vars(linear)["forward"] is own
    assert "forward" not in vars(other)


def test_nothing_is_timed_for_float32_nor_for_matrices_that_fit_a_cache(monkeypatch):
    model = load("llava").fresh().model
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        # One model, moved: what holds for one dtype holds for no other.
        model.to(dtype)
        if dtype is not torch.bfloat16:
            monkeypatch.setattr(products, "_LEAST_BYTES", 1)
        for rows in (1, 2, MOST_ROWS, MOST_ROWS + 1):
            found = column_products(model, rows)
            assert (found.linears, found.gain) == ((), None)
        assert remarks(model) == []


@pytest.mark.parametrize(("gain", "taken"), [(0.9, False), (1.0, False), (1.2, True)])
def test_the_faster_way_is_taken_once_it_was_timed_and_said_so(monkeypatch, gain, taken):
    model = load("llava").fresh().model.to(torch.bfloat16)
    timed = []
    monkeypatch.setattr(products, "_LEAST_BYTES", 0)
    monkeypatch.setattr(products, "_gain", lambda linears, rows: (timed.append((linears, rows)), gain)[1])
    decoder = [part for part in model.get_decoder().modules() if type(part) is nn.Linear]
    for _ in range(2):
        for rows in (1, 2, 3, MOST_ROWS):
            linears = column_products(model, rows).linears
            assert list(linears) == ([*decoder, model.get_output_embeddings()] if taken else [])
    # The output head, larger than all layers of a small model together, would decide for them.
    assert [(linears, rows) for linears, rows in timed] == [(decoder, 1), (decoder, products._FEW)]
    assert ("not taken" in remarks(model)[0]) == (not taken)


def test_nothing_is_timed_while_a_token_is(monkeypatch):
    family = load("llava").fresh()
    family.model.to(torch.bfloat16)
    timed = []
    monkeypatch.setattr(products, "_found", lambda model, rows: (timed.append(rows), ColumnProducts(rows))[1])
    settings = Settings(STEPS, stop_at_eos=False)
    prompt = as_prompt(family.prompts[0])
    with torch.no_grad(), prune(family.model, CUT) as pruner:
        runs = [prefill(family.loaded, prompt, pruner, STEPS) for _ in range(2)]
        events = decode_batch(family.loaded, runs, settings)
        next(events)
        assert timed == [1, products._FEW]
        list(events)
    assert timed == [1, products._FEW]
    products._FOUND.pop(family.model)
    events = stream(family.loaded, prompt, CUT, settings, clock=lambda: float(len(timed)))
    assert next(events).prefill_s == 0
    assert timed[2:] == [1]
    events.close()


def logits_of(family, prompts, compiler=None):
    """Logits [STEPS, B, vocab] of cut prompts fed with given tokens; which linear layers took columns."""
    with torch.no_grad(), prune(family.model, CUT) as pruner:
        runs = [
            prefill(family.loaded, as_prompt(inputs), pruner, STEPS) for inputs in family.prompts[:prompts]
        ]
        products.time_products(family.model, prompts)
        batch = DecodeBatch(family.loaded, runs, STEPS, compiler)
        with pytest.MonkeyPatch.context() as patch:
            taken, way = [], products.times_columns
            patch.setattr(products, "times_columns", lambda *given: (taken.append(given[0]), way(*given))[1])
            ids = torch.arange(3, 3 + STEPS * prompts).view(STEPS, prompts, 1)
            steps = [batch.step(row).clone() for row in ids]
    return torch.stack(steps), taken


@pytest.mark.parametrize("prompts", [1, 2])
def test_steps_of_few_prompts_take_columns_and_are_as_near_to_float32(every_matrix_as_columns, prompts):
    family, exact, plain = every_matrix_as_columns(prompts)
    before = snapshot(family.model)
    linears = [part for part in family.model.get_decoder().modules() if type(part) is nn.Linear]
    linears.append(family.model.get_output_embeddings())
    found, taken = logits_of(family, prompts)
    assert sorted(map(id, taken)) == sorted(STEPS * list(map(id, linears)))
    assert (found - exact).abs().max() <= 3 * (plain - exact).abs().max()
    assert "as columns" in remarks(family.model)[0]
    assert "not taken" not in remarks(family.model)[0]
    assert snapshot(family.model) == before


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("prompts", [1, 2])
def test_compiled_steps_take_columns_and_are_as_near_to_float32(every_matrix_as_columns, prompts):
    family, exact, plain = every_matrix_as_columns(prompts)
    before = snapshot(family.model)
    compiler = step_compiler(family.loaded)
    found, _ = logits_of(family, prompts, compiler)
    assert compiler.stats.refused is None
    assert (found - exact).abs().max() <= 3 * (plain - exact).abs().max()
    assert snapshot(family.model) == before


@pytest.fixture
def every_matrix_as_columns(monkeypatch):
    """A bfloat16 family whose matrices take columns, whatever is faster; logits in float32, and without."""

    def made(prompts):
        family = load("llava").fresh()
        family.model.to(torch.bfloat16)
        plain, taken = logits_of(family, prompts)
        assert not taken
        family.model.to(torch.float32)
        exact, _ = logits_of(family, prompts)
        family.model.to(torch.bfloat16)
        monkeypatch.setattr(products, "_LEAST_BYTES", 0)
        monkeypatch.setattr(products, "_LEAST_GAIN", 0.0)
        products._FOUND.pop(family.model)
        return family, exact, plain

    return made
