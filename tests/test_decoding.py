"""Batches and compiled steps: what they give is what one prompt alone, uncompiled, gives."""

import shutil

import pytest
import torch
from families import as_prompt, load
from laws import CUT, snapshot

from plphp_cli import compiled as compiled_module
from plphp_cli import decoding as decoding_module
from plphp_cli.attention import prune
from plphp_cli.cache import PrunableLayer
from plphp_cli.decoding import DecodeBatch, Done, Token, decode, decode_batch, step_compiler
from plphp_cli.errors import UnsupportedError
from plphp_cli.prefilling import advance, prefill
from plphp_cli.pruning import FixedRates
from plphp_cli.sampling import Settings
from plphp_cli.support import LINEAR, layer_kinds

STEPS = 6
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def prefilled(family, policies, pruner):
    """One prompt per policy, the family's prompts in turn: their caches differ in length in every layer."""
    runs = []
    for number, policy in enumerate(policies):
        pruner.policy = policy
        inputs = family.prompts[number % len(family.prompts)]
        runs.append(prefill(family.loaded, as_prompt(inputs), pruner, STEPS + 1))
    return runs


def policies():
    return [FixedRates({0: 0.2, 1: 0.7}, 0.5), None, FixedRates({}, 0.1)]


def along(family, ids, compiler=None):
    """Logits [T, B, vocab] of a batch fed with ids [T, B]; and each prompt's alone."""
    with torch.no_grad(), prune(family.model, None) as pruner:
        batch = DecodeBatch(family.loaded, prefilled(family, policies(), pruner), STEPS, compiler)
        together = torch.stack([batch.step(row[:, None]).clone() for row in ids])
        batch.settle()
        alone = []
        for number, run in enumerate(prefilled(family, policies(), pruner)):
            alone.append(
                torch.stack([advance(family.loaded, run, row[number][None, None])[-1] for row in ids])
            )
            assert run.cache.get_seq_length() == batch.prompts[number].cache.get_seq_length()
            assert run.positions is None or torch.equal(run.positions, batch.prompts[number].positions)
            for one, other in zip(run.cache.layers, batch.prompts[number].cache.layers, strict=True):
                if isinstance(one, PrunableLayer):
                    assert (one.seen, one.held) == (other.seen, other.held)
                    assert one.allocated_bytes == other.allocated_bytes, "a batch pads nothing"
    return together, torch.stack(alone, dim=1)


def random_ids():
    return torch.randint(2, 290, (STEPS, 3), generator=torch.Generator().manual_seed(0))


def test_a_batch_gives_each_prompt_the_logits_that_it_has_alone(family):
    if family.name == "builtin":
        pytest.skip("its vocabulary is another")
    together, alone = along(family, random_ids())
    assert (together - alone).abs().max() <= 1e-4 * alone.abs().max()


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_layers_that_cannot_share_a_step_are_refused_by_name(name):
    family = load(name)
    assert LINEAR in layer_kinds(family.model.config)
    with torch.no_grad(), prune(family.model, None) as pruner:
        runs = prefilled(family, [None, None], pruner)
        with pytest.raises(UnsupportedError, match="batch"):
            DecodeBatch(family.loaded, runs, STEPS)


def test_sequences_leave_as_they_end_and_the_others_go_on():
    family = load("llava")
    with torch.no_grad(), prune(family.model, CUT) as pruner:
        prompts = [as_prompt(inputs) for inputs in family.prompts[:2]]

        def fresh():
            return [prefill(family.loaded, prompt, pruner, 12) for prompt in prompts]

        whole = [list(decode(family.loaded, run, Settings(12)))[-1].token_ids for run in fresh()]
        # An id that one answer reaches early, and the other later or never, ends it.
        ends = next(i for i in whole[0] if i not in whole[1][: whole[0].index(i) + 2])
        family.model.generation_config.eos_token_id = ends
        try:
            alone = [list(decode(family.loaded, run, Settings(12)))[-1] for run in fresh()]
            rows = list(decode_batch(family.loaded, fresh(), Settings(12)))
        finally:
            family.model.generation_config.eos_token_id = None
    done = {row.index: row.event for row in rows if isinstance(row.event, Done)}
    assert [done[0], done[1]] == alone
    assert len(done[0].token_ids) < len(done[1].token_ids)
    for index, answer in enumerate(alone):
        tokens = [row.event for row in rows if row.index == index and isinstance(row.event, Token)]
        assert tuple(token.token_id for token in tokens) == answer.token_ids
        assert [token.index for token in tokens] == list(range(len(tokens)))


def test_a_batch_grows_its_buffers_where_there_is_no_room():
    family = load("llava")
    with torch.no_grad(), prune(family.model, CUT) as pruner:
        run = prefill(family.loaded, as_prompt(family.prompts[0]), pruner, 1)
        other = prefill(family.loaded, as_prompt(family.prompts[0]), pruner, 20)
        rows = list(decode_batch(family.loaded, [run, other], Settings(20, stop_at_eos=False)))
    one, two = (
        [r.event.token_id for r in rows if r.index == i and isinstance(r.event, Token)] for i in (0, 1)
    )
    assert one == two
    assert len(one) == 20


@needs_compiler
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_compiled_steps_give_the_same_and_serve_further_batches(name):
    family = load(name)
    before = snapshot(family.model)
    compiler = step_compiler(family.loaded)
    for _ in range(2):
        together, alone = along(family, random_ids(), compiler)
        assert (together - alone).abs().max() <= 1e-4 * alone.abs().max()
    stats = compiler.stats
    assert stats.refused is None
    assert (stats.captures, stats.hits, stats.joins, stats.batches) == (1, 1, 2, 2)
    assert stats.compile_s > 0
    assert snapshot(family.model) == before


def test_captures_hits_and_joins_are_what_they_say_and_captures_have_a_limit(monkeypatch):
    family = load("llava")
    compiler = step_compiler(family.loaded)
    # What is counted does not depend on what is compiled, which takes its time.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(compiled_module, "MOST_CAPTURES", 2)
    stats = compiler.stats

    def batch_of(rows):
        before = (stats.captures, stats.hits, stats.joins, stats.batches, stats.evictions)
        with torch.no_grad(), prune(family.model, None) as pruner:
            batch = DecodeBatch(family.loaded, prefilled(family, policies()[:rows], pruner), STEPS, compiler)
        after = (stats.captures, stats.hits, stats.joins, stats.batches, stats.evictions)
        assert stats.captures + stats.hits == stats.joins >= stats.batches
        return batch, tuple(later - earlier for earlier, later in zip(before, after, strict=True))

    assert batch_of(1)[1] == (1, 0, 1, 1, 0)
    batch, counts = batch_of(2)
    assert counts == (1, 0, 1, 1, 0)
    seconds = stats.compile_s
    # It goes on with one row, for which there is a capture: a join, no batch, and nothing compiled.
    with torch.no_grad(), prune(family.model, None):
        batch.keep([1])
    assert (stats.captures, stats.hits, stats.joins, stats.batches) == (2, 1, 3, 2)
    assert stats.compile_s == seconds
    # The third kind takes the place of the one unused for longest, two rows, which is then compiled anew.
    assert batch_of(3)[1] == (1, 0, 1, 1, 1)
    assert batch_of(1)[1] == (0, 1, 1, 1, 0)
    assert batch_of(2)[1] == (1, 0, 1, 1, 1)
    assert stats.hit_rate == stats.hits / stats.joins == 2 / 6


@pytest.mark.parametrize("room", [STEPS, 1, None])
def test_compiled_steps_allocate_no_more_than_the_byte_law_allows(room, monkeypatch):
    """METHOD's law: real bytes = capacity, at most 5 % beyond held + new tokens; compiling rounds up nothing,
    though 25 % would be allowed. Buffers without the room grow, also as sequences leave."""
    family = load("llava")
    compiler = step_compiler(family.loaded)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with torch.no_grad(), prune(family.model, CUT) as pruner:
        runs = [prefill(family.loaded, as_prompt(inputs), pruner, room) for inputs in family.prompts[:2]]
        held = [[layer.held for layer in run.cache.layers] for run in runs]
        batch = DecodeBatch(family.loaded, runs, STEPS, compiler)
        assert batch.compiled
        for _ in range(STEPS // 2):
            batch.step(torch.tensor([[3], [4]]))
        batch.keep([1])
        assert batch.compiled
        for _ in range(STEPS - STEPS // 2):
            batch.step(torch.tensor([[3]]))
        batch.settle()
    assert compiler.stats.refused is None
    for run, counts in zip(runs, held, strict=True):
        for layer, before in zip(run.cache.layers, counts, strict=True):
            needed, capacity = before + STEPS, layer.buffers[0].shape[2]
            assert needed <= capacity <= needed + max(1, needed // 20)
            assert room != STEPS or capacity == needed
            assert layer.allocated_bytes == capacity * layer.token_bytes
    assert runs[1].cache.layers[0].held == held[1][0] + STEPS


def test_compiling_is_no_time_of_a_token(monkeypatch):
    """Nor where a batch goes on with fewer rows: the clock here stands but for compiling."""
    family, now = load("llava"), [0.0]
    compiler = step_compiler(family.loaded)

    def compiles(cache, positions, *, begins=True):
        now[0] += 5
        compiler.stats.compile_s += 5

    monkeypatch.setattr(compiler, "step_for", compiles)
    with torch.no_grad(), prune(family.model, None) as pruner:
        runs = prefilled(family, [None] * 2, pruner)
        ids = list(decode(family.loaded, runs[0].fork(STEPS), Settings(STEPS)))[-1].token_ids
        monkeypatch.setattr(family.model.generation_config, "eos_token_id", ids[2])
        rows = list(decode_batch(family.loaded, runs, Settings(STEPS), compiler, clock=lambda: now[0]))
    times = [row.event.elapsed_s for row in rows if isinstance(row.event, Token)]
    assert now[0] == 10
    assert set(times) == {0.0}


def test_what_cannot_be_compiled_runs_uncompiled_and_says_why():
    family = load("gemma3")
    compiler = step_compiler(family.loaded)
    together, alone = along(family, random_ids(), compiler)
    assert (together - alone).abs().max() <= 1e-4 * alone.abs().max()
    assert "sliding" in compiler.stats.refused
    assert compiler.stats.captures == 0


def test_a_compiler_that_fails_costs_nothing_but_its_speed(monkeypatch):
    family = load("llava")
    compiler = step_compiler(family.loaded)
    before = snapshot(family.model)

    def broken(*args, **kwargs):
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr(torch, "compile", broken)
    together, alone = along(family, random_ids(), compiler)
    assert (together - alone).abs().max() <= 1e-4 * alone.abs().max()
    stats = compiler.stats
    assert stats.refused == "RuntimeError: no such"
    assert (stats.captures, stats.hits, stats.joins, stats.batches, stats.hit_rate) == (0, 0, 0, 0, None)
    assert snapshot(family.model) == before


def test_a_step_needs_no_mask_and_joins_without_copies():
    family = load("llava")
    with torch.no_grad(), prune(family.model, CUT) as pruner:
        runs = [prefill(family.loaded, as_prompt(inputs), pruner, 8) for inputs in family.prompts[:2]]
        places = [layer.buffers[0].data_ptr() for run in runs for layer in run.cache.layers]
        batch = DecodeBatch(family.loaded, runs, 8)
        batch.step(torch.tensor([[3], [4]]))
        assert places == [layer.buffers[0].data_ptr() for run in runs for layer in run.cache.layers]


def test_a_compiler_that_fails_half_way_leaves_the_caches_as_they_were(monkeypatch):
    family = load("llava")
    compiler = step_compiler(family.loaded)
    calls = []

    def later(function, **options):
        def run(*args, **kwargs):
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("out of luck")
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", later)
    together, alone = along(family, random_ids(), compiler)
    assert (together - alone).abs().max() <= 1e-4 * alone.abs().max()
    assert compiler.stats.refused == "RuntimeError: out of luck"


def test_one_prompt_of_a_model_that_cannot_be_joined_goes_on_uncompiled():
    family = load("lfm2_vl")
    compiler = step_compiler(family.loaded)
    with torch.no_grad(), prune(family.model, CUT) as pruner:
        runs = [prefill(family.loaded, as_prompt(family.prompts[0]), pruner, 8) for _ in range(2)]
        rows = list(decode_batch(family.loaded, runs[:1], Settings(8, stop_at_eos=False), compiler))
        *_, done = decode(family.loaded, runs[1], Settings(8, stop_at_eos=False))
    assert rows[-1].event == done
    assert "not supported" in compiler.stats.refused


def test_a_layer_whose_forward_is_another_s_is_not_compiled():
    family = load("llava")
    layer = family.model.get_decoder().layers[0]
    own = vars(layer)["forward"] = layer.forward
    try:
        compiler = step_compiler(family.loaded)
        along(family, random_ids(), compiler)
        assert "replaced" in compiler.stats.refused
        assert vars(layer)["forward"] is own
    finally:
        del vars(layer)["forward"]


@pytest.mark.parametrize("ahead", [False, True])
def test_as_many_steps_as_tokens_lie_between_the_first_time_and_any_other(monkeypatch, ahead):
    """Whether a step starts before its token is read (CUDA) or not: the clock here counts finished steps."""
    family, steps = load("llava"), []
    step = DecodeBatch.step
    monkeypatch.setattr(DecodeBatch, "step", lambda batch, ids: (steps.append(1), step(batch, ids))[1])
    monkeypatch.setattr(decoding_module, "runs_ahead", lambda device: ahead)
    settings = Settings(STEPS, stop_at_eos=False)
    with torch.no_grad(), prune(family.model, None) as pruner:
        runs = prefilled(family, policies(), pruner)
        events = decode_batch(family.loaded, runs, settings, clock=lambda: float(len(steps)))
        times = [row.event.elapsed_s for row in events if row.index == 0 and isinstance(row.event, Token)]
    assert times[0] == 0
    assert times[-1] == len(times) - 1 == len(steps)
    assert all(time >= place for place, time in enumerate(times))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_steps_started_before_their_token_is_read_change_no_answer(monkeypatch, name):
    """As on CUDA: a step that nobody asked for is taken back from who decodes to the end of the batch."""
    family, policy = load(name), FixedRates({}, 0.5)
    answers, states = {}, {}
    for ahead in (False, True):
        monkeypatch.setattr(decoding_module, "runs_ahead", lambda device, ahead=ahead: ahead)
        with torch.no_grad(), prune(family.model, policy) as pruner:
            runs = prefilled(family, [policy] * 2, pruner)
            # The id with which one answer goes on ends it, so that a step is under way as it ends.
            if not answers:
                ids = list(decode(family.loaded, runs[0].fork(STEPS), Settings(STEPS)))[-1].token_ids
            settings = Settings(STEPS + 4)
            monkeypatch.setattr(family.model.generation_config, "eos_token_id", ids[2])
            rows = list(decode_batch(family.loaded, runs, settings))
        answers[ahead] = {row.index: row.event.token_ids for row in rows if isinstance(row.event, Done)}
        states[ahead] = [
            (layer.seen, layer.held) for layer in runs[1].cache.layers if isinstance(layer, PrunableLayer)
        ]
    assert len(answers[False][0]) < len(answers[False][1])
    assert answers[True] == answers[False]
    assert states[True] == states[False]
