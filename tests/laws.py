"""METHOD.md's invariants as laws: functions that take any family and raise when it breaks one.

Bit-equality is meant where a law says "equal"; the masked reference is the one comparison with a tolerance.
"""

import contextlib
import gc
import math

import torch
from families import as_prompt
from reference import Forced, masked_reference
from runs import (
    CUT,
    NEW_TOKENS,
    SETTINGS,
    WHOLE,
    answer,
    forced_logits,
    full_layers,
    in_turn,
    pruned_answer,
    settings_of,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessorList

from plphp_cli.attention import prune
from plphp_cli.prefilling import advance, prefill
from plphp_cli.pruning import FixedRates
from plphp_cli.support import LINEAR, layer_kinds


def rate_one_equals_stock(family):
    """1. Nothing cut: tokens and logits equal those of the model without hooks; also in the unpruned arm."""
    for inputs in family.prompts:
        tokens, logits = answer(family.model, inputs)
        for policy in (WHOLE, None):
            with prune(family.model, policy) as pruner:
                pruned_tokens, pruned_logits = answer(family.model, inputs)
            assert torch.equal(pruned_tokens, tokens)
            assert torch.equal(pruned_logits, logits), "a mask or a copy that the stock path does not make?"
            for state in full_layers(pruner.layers):
                assert state.held_bytes == state.full_bytes


def physical_cut_equals_masked_reference(family):
    """2. A real cut gives the logits of a full cache whose dropped positions are masked per KV head."""
    for number, inputs in enumerate(family.prompts):
        for name in settings_of(family):
            tokens, logits, layers = pruned_answer(family, number, name)
            forced = LogitsProcessorList([Forced(tokens.tolist(), inputs["input_ids"].shape[1])])
            with masked_reference(family.model, layers, inputs):
                _, reference = answer(family.model, inputs, logits_processor=forced)
            worst = (logits - reference).abs().max().item()
            assert worst <= 1e-4 * reference.abs().max().item(), f"{name}: logits differ by {worst}"


def first_token_is_unpruned(family):
    """3. The first token's logits equal the unpruned model's, whatever the setting; later ones differ."""
    for number, inputs in enumerate(family.prompts):
        _, logits = answer(family.model, inputs)
        for name in settings_of(family):
            _, pruned, _ = pruned_answer(family, number, name)
            assert torch.equal(pruned[0], logits[0]), name
            assert not torch.equal(pruned[1], logits[1]), f"{name}: nothing was cut"


def plain_cut(attention, vision, spans, kv_heads, config, layer):
    """PLPHP for one layer in plain Python: lists of floats in, (gamma, group, rate, kept lists) out."""
    heads, group_size = len(attention), len(attention) // kv_heads
    gamma = sum(sum(row[j] for j in vision) for row in attention) / heads
    if gamma >= config.alpha:
        group, rate = "attentive", config.r + config.delta_r
    elif gamma >= config.beta:
        group, rate = "balanced", config.r
    else:
        group, rate = "indifferent", config.r - config.delta_r
    rate = max(0.0, min(1.0, rate))
    if layer in config.skip_layers:
        group, rate, spans = "skipped", 1.0, None
    parts = [vision] if config.scope == "prompt" or spans is None else [vision[a:b] for a, b in spans]
    kept = []
    for head in range(kv_heads):
        rows = attention[head * group_size : (head + 1) * group_size]
        chosen = []
        for part in parts:
            vote = max if config.head_reduce == "max" else (lambda values: sum(values) / len(values))
            ranked = sorted(part, key=lambda j: (-vote([row[j] for row in rows]), j))
            chosen += ranked[: math.ceil(rate * len(part) - 1e-6)]
        kept.append(sorted(chosen))
    return gamma, group, rate, kept


def kept_equals_plain_loop(family):
    """4. What is kept equals a plain loop over the attention of the eager model; all text stays, in order."""
    model = family.model
    scope = "image" if family.tells_images else "prompt"
    decoder, config = model.get_decoder(), CUT.replace(scope=scope, head_reduce="max", r=0.5, delta_r=0.2)
    for inputs in family.prompts:
        before = decoder.config._attn_implementation
        decoder.set_attn_implementation("eager")
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
        decoder.set_attn_implementation(before)
        if len(attentions) < len(layer_kinds(model.config)):  # linear attention reports none
            scored = [i for i, kind in enumerate(layer_kinds(model.config)) if kind != LINEAR]
            attentions = dict(zip(scored, attentions, strict=True))
        with prune(model, None) as pruner:
            whole = prefill(family.loaded, as_prompt(inputs), pruner)
        with prune(model, config) as pruner:
            cut = prefill(family.loaded, as_prompt(inputs), pruner)
        ids = inputs["input_ids"][0]
        vision = (ids == model.config.image_token_id).nonzero().squeeze(1).tolist()
        text = sorted(set(range(len(ids))) - set(vision))
        for state in full_layers(cut.state.layers):
            index = state.index
            rows = attentions[index][0, :, -1].float().tolist()
            expected = plain_cut(rows, vision, cut.state.vision.spans, state.kv_heads, config, index)
            assert abs(state.gamma - expected[0]) < 1e-5
            assert (state.group, state.rate, state.kept.tolist()) == expected[1:]
            for head, kept in enumerate(expected[3]):
                held = sorted(text + kept)
                for part in ("keys", "values"):
                    full = getattr(whole.cache.layers[index], part)[0, head]
                    assert torch.equal(getattr(cut.cache.layers[index], part)[0, head], full[held])


def bytes_are_as_predicted(family):
    """5. Storages are as large as predicted, to the byte, at every moment; what was dropped is freed."""
    room = NEW_TOKENS + 3  # such that no capacity is as large as a whole prompt
    for inputs in family.prompts:
        for policy in (CUT, None):
            with prune(family.model, policy) as pruner:
                prefilled = prefill(family.loaded, as_prompt(inputs), pruner, room)
                states = full_layers(pruner.layers)
                _check_storages(prefilled, states, room)
                if policy is not None and inputs is family.prompts[0]:
                    _check_nothing_lingers(prefilled, states)
                token = prefilled.logits.argmax()[None, None]
                for _ in range(room):
                    token = advance(family.loaded, prefilled, token)[-1:].argmax(-1, keepdim=True)
                _check_storages(prefilled, states, room)
                seen = prefilled.cache.get_seq_length()
                advance(family.loaded, prefilled, token)  # beyond the room: grows by a chunk
                for state in states:
                    layer = prefilled.cache.layers[state.index]
                    assert layer.seen == seen + 1
                    assert layer.allocated_bytes <= math.ceil(layer.held * 1.05) * layer.token_bytes


def _check_storages(prefilled, states, room):
    for state in states:
        layer = prefilled.cache.layers[state.index]
        text = prefilled.state.prompt_tokens - prefilled.state.vision.positions.numel()
        capacity = text + state.vision_tokens + room
        width = state.kv_heads * layer.keys.element_size()
        assert layer.keys.untyped_storage().nbytes() == capacity * width * layer.keys.shape[-1]
        assert layer.values.untyped_storage().nbytes() == capacity * width * layer.values.shape[-1]
        assert state.allocated_bytes == layer.allocated_bytes == capacity * layer.token_bytes
        assert state.held_bytes == (capacity - room) * layer.token_bytes
        assert state.full_bytes == prefilled.state.prompt_tokens * layer.token_bytes


def _check_nothing_lingers(prefilled, states):
    gc.collect()
    whole = (1, states[0].kv_heads, prefilled.state.prompt_tokens, states[0].head_dim)
    assert any(state.held_bytes < state.full_bytes for state in states)
    # Sliding-window layers are transformers' own: they hold a view of the whole.
    others = [layer for layer in prefilled.cache.layers if not hasattr(layer, "held")]
    kept = [t for layer in others for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    allowed = {t.untyped_storage().data_ptr() for t in kept if t is not None}
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == whole]
    lingering = [t for t in tensors if t.untyped_storage().data_ptr() not in allowed]
    assert not lingering, "a whole layer's keys or values are still alive"


def snapshot(model):
    """Everything about a model that a pruner could leave changed."""
    modules = [
        (
            name,
            type(module),
            sorted(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_always_called),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    ]
    return modules, model.generation_config.to_dict(), model.config.to_dict()


class _Broken:
    """A policy that fails at the second layer."""

    def __init__(self, error):
        self.error = error

    def cut(self, layer, attention, vision, spans, kv_heads):
        if layer:
            raise self.error
        return FixedRates({}, 0.5).cut(layer, attention, vision, spans, kv_heads)


def the_model_is_restored(family):
    """6. Leaving the context restores the model, also after an exception in the body or the forward."""
    model, inputs = family.model, family.prompts[0]
    before, stock = snapshot(model), answer(model, inputs)
    with prune(model, CUT):
        assert snapshot(model) != before
        answer(model, inputs)
    assert snapshot(model) == before
    for error in (RuntimeError("body"), KeyboardInterrupt()):
        with contextlib.suppress(type(error)), prune(model, CUT):
            answer(model, inputs)
            raise error
        assert snapshot(model) == before
        with contextlib.suppress(type(error)), prune(model, _Broken(error)):
            answer(model, inputs)
            raise AssertionError("the error was swallowed")
        assert snapshot(model) == before
    tokens, logits = answer(model, inputs)
    assert torch.equal(tokens, stock[0])
    assert torch.equal(logits, stock[1])


def a_failed_call_does_not_spoil_the_next(family):
    """7a. After a failed or interrupted call the same context still gives what a fresh one gives."""
    model, inputs = family.model, family.prompts[0]
    with prune(model, CUT):
        expected = answer(model, inputs)
    for error in (RuntimeError("forward"), KeyboardInterrupt()):
        with prune(model, CUT) as pruner:
            answer(model, family.prompts[1])
            policy, pruner.policy = pruner.policy, _Broken(error)
            with contextlib.suppress(type(error)):
                answer(model, inputs)
            assert pruner.layers == ()
            pruner.policy = policy
            tokens, logits = answer(model, inputs)
        assert torch.equal(tokens, expected[0])
        assert torch.equal(logits, expected[1])


def no_state_is_left_behind(family):
    """7b. A second run of another prompt equals that run on a model that never ran; so do prompts in turn."""
    first, second = family.prompts[:2]
    fresh = []
    for inputs in (first, second):
        twin = family.fresh()
        with prune(twin.model, CUT) as pruner:
            fresh.append((*answer(twin.model, inputs), pruner.layers))
    with prune(family.model, CUT) as pruner:
        for inputs, (tokens, logits, layers) in ((first, fresh[0]), (second, fresh[1]), (first, fresh[0])):
            again = answer(family.model, inputs)
            assert torch.equal(again[0], tokens)
            assert torch.equal(again[1], logits)
            for state, expected in zip(full_layers(pruner.layers), full_layers(layers), strict=True):
                assert (state.gamma, state.group) == (expected.gamma, expected.group)
                assert torch.equal(state.kept, expected.kept)
    interleaved = in_turn(family, [first, second])
    for logits, (_, expected, _) in zip(interleaved, fresh, strict=True):
        assert torch.equal(logits, expected), "a prompt was decoded at another prompt's positions"


def no_cache_tensor_is_kept(family):
    """After generate, or a step of the engine, returns, the pruner reaches no tensor of the cache."""
    inputs = family.prompts[0]
    with prune(family.model, CUT) as pruner:
        answer(family.model, inputs)
        _check_no_cache_within(pruner)
        run = prefill(family.loaded, as_prompt(inputs), pruner)
        _check_no_cache_within(pruner)
        advance(family.loaded, run, run.logits.argmax()[None, None])
        _check_no_cache_within(pruner)


def _check_no_cache_within(pruner):
    reachable, frontier = {}, [vars(pruner)]
    while frontier:
        thing = frontier.pop()
        if id(thing) in reachable or isinstance(thing, torch.nn.Module | type):
            continue
        reachable[id(thing)] = thing
        ours = type(thing).__module__.startswith(("plphp_cli", "transformers.cache_utils"))
        if ours or isinstance(thing, dict | list | tuple):
            frontier += gc.get_referents(thing)
    tensors = [thing for thing in reachable.values() if isinstance(thing, torch.Tensor)]
    assert tensors
    assert not [t for t in tensors if t.is_floating_point()]


class _Watch(TorchDispatchMode):
    """Counts operations and notes the largest output that is square in the prompt's length."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.square, self.counts = tokens, 0, {}
        self.cat = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        name = function.overloadpacket._qualified_op_name
        self.counts[name] = self.counts.get(name, 0) + 1
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2 and tensor.dtype.is_floating_point:
                rows, columns = tensor.shape[-2:]
                if rows == columns == self.tokens:
                    self.square += 1
                if name == "aten::cat" and tensor.dim() == 4 and rows >= self.tokens // 2:
                    self.cat += 1
        return output


def the_cost_is_small(family):
    """No N x N matrix; keys and values of a layer are gathered once; no concatenation per token."""
    inputs = family.prompts[0]
    tokens = inputs["input_ids"].shape[1]
    with prune(family.model, None) as pruner, _Watch(tokens) as unpruned:
        prefill(family.loaded, as_prompt(inputs), pruner, NEW_TOKENS)
    with prune(family.model, CUT) as pruner:
        with _Watch(tokens) as watch:
            prefilled = prefill(family.loaded, as_prompt(inputs), pruner, NEW_TOKENS)
        cut = [state for state in full_layers(pruner.layers) if state.held_bytes < state.full_bytes]
        assert cut
        assert watch.square == unpruned.square, "scoring made a matrix of all tokens by all tokens"
        gathers = unpruned.counts.get("aten::gather", 0)  # a mixture of experts makes its own
        assert watch.counts["aten::gather"] == gathers + 2 * len(cut)
        layers = [prefilled.cache.layers[state.index] for state in cut]
        storages = [layer.keys.data_ptr() for layer in layers]
        with _Watch(tokens) as watch:
            for _ in range(3):
                advance(family.loaded, prefilled, prefilled.logits.argmax()[None, None])
        assert watch.cat == 0
        assert watch.counts.get("aten::gather", 0) == 3 * gathers
        assert storages == [layer.keys.data_ptr() for layer in layers]


def one_prefill_serves_many(family):
    """Forks and cuts of one prefill decode as separate prefills do, and leave the original as it was."""
    inputs = family.prompts[0]
    tokens = answer(family.model, inputs)[0]
    policies = [None, CUT, SETTINGS["everything goes"], SETTINGS["random"]]
    expectations = [forced_logits(family, inputs, policy, tokens) for policy in policies]
    with prune(family.model, None, keep_attention=True) as pruner:
        whole = prefill(family.loaded, as_prompt(inputs), pruner)
        for policy, expected in zip(policies * 2, expectations * 2, strict=True):
            for copied in (whole.cut(policy, NEW_TOKENS), whole.cut(policy).fork(NEW_TOKENS)):
                rows = [advance(family.loaded, copied, token[None, None])[-1] for token in tokens[:-1]]
                assert torch.equal(torch.stack([copied.logits, *rows]), expected)
        assert whole.cache.get_seq_length() == inputs["input_ids"].shape[1]


OF_EVERY_MODEL = (
    rate_one_equals_stock,
    physical_cut_equals_masked_reference,
    first_token_is_unpruned,
    kept_equals_plain_loop,
    bytes_are_as_predicted,
    the_model_is_restored,
    a_failed_call_does_not_spoil_the_next,
    no_state_is_left_behind,
)
