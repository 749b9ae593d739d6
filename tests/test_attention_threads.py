"""One model, several threads or contexts: what is handed over, refused, or goes side by side."""

import contextlib
import queue
import threading

import laws
import pytest
import torch
from families import as_prompt, load
from laws import CUT, answer, snapshot
from transformers.generation.streamers import BaseStreamer

from plphp_cli.attention import prune
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import NestedPruneError
from plphp_cli.prefilling import prefill


class Letterbox(BaseStreamer):
    """Hands each token to another thread, and can be made to wait."""

    def __init__(self):
        self.tokens, self.gate = queue.Queue(), threading.Event()
        self.gate.set()

    def put(self, value):
        self.tokens.put(value.flatten().tolist())
        assert self.gate.wait(60)

    def end(self):
        self.tokens.put(None)


def in_thread(function, *args, **kwargs):
    """Start a call in another thread; returns the thread and the box that its result or error will be in."""
    box = []

    def call():
        try:
            box.append(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001
            box.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    return thread, box


def test_a_streamer_in_a_thread_sees_the_tokens_of_a_plain_call(llava):
    inputs = llava.prompts[0]
    with prune(llava.model, CUT):
        expected, _ = answer(llava.model, inputs)
        streamer = Letterbox()
        options = {"max_new_tokens": 8, "do_sample": False, "streamer": streamer}
        thread, _ = in_thread(llava.model.generate, **inputs, **options)
        received = list(iter(lambda: streamer.tokens.get(timeout=60), None))
        thread.join()
    assert [token for tokens in received[1:] for token in tokens] == expected.tolist()


def test_a_nested_context_on_one_model_is_refused(llava):
    with prune(llava.model, CUT):
        inside = snapshot(llava.model)
        with pytest.raises(NestedPruneError), prune(llava.model, None):
            pass
        assert snapshot(llava.model) == inside
        thread, box = in_thread(contextlib.ExitStack().enter_context, prune(llava.model, CUT))
        thread.join()
        assert isinstance(box[0], NestedPruneError)
        answer(llava.model, llava.prompts[0])


def test_two_generate_calls_at_once_on_one_model_are_refused(llava):
    with prune(llava.model, CUT):
        expected, _ = answer(llava.model, llava.prompts[0])
        streamer = Letterbox()
        streamer.gate.clear()
        thread, box = in_thread(
            llava.model.generate, **llava.prompts[0], max_new_tokens=8, do_sample=False, streamer=streamer
        )
        streamer.tokens.get(timeout=60)
        with pytest.raises(NestedPruneError):
            answer(llava.model, llava.prompts[1])
        streamer.gate.set()
        thread.join()
    assert box[0][0, -8:].tolist() == expected.tolist()


def test_two_forwards_at_once_on_one_model_are_refused(llava):
    reached, gate = threading.Event(), threading.Event()

    class Waiting:
        def cut(self, layer, attention, vision, spans, kv_heads):
            reached.set()
            assert gate.wait(60)
            return laws.FixedRates({}, 0.5).cut(layer, attention, vision, spans, kv_heads)

    with prune(llava.model, Waiting()) as pruner:
        thread, box = in_thread(prefill, llava.loaded, as_prompt(llava.prompts[0]), pruner)
        assert reached.wait(60)
        with pytest.raises(NestedPruneError):
            prefill(llava.loaded, as_prompt(llava.prompts[1]), pruner)
        gate.set()
        thread.join()
    assert box[0].state.layers[3].vision_tokens == 16


def test_a_forward_that_failed_does_not_hold_up_other_threads(llava):
    prompt = as_prompt(llava.prompts[0])
    with prune(llava.model, laws._Broken(RuntimeError("broken"))) as pruner:
        thread, box = in_thread(prefill, llava.loaded, prompt, pruner)
        thread.join()
        assert isinstance(box[0], RuntimeError)
        pruner.policy = None
        assert prefill(llava.loaded, prompt, pruner).cache.get_seq_length() == 47


def test_two_models_are_pruned_side_by_side_from_threads():
    families = [load("llava"), load("qwen2_5_vl")]
    configs = [CUT, PLPHPConfig(r=0.2, delta_r=0)]

    def run(family, config, barrier=None):
        with prune(family.model, config) as pruner:
            if barrier:
                barrier.wait(60)
            return [
                (*answer(family.model, inputs), [layer.kept for layer in pruner.layers])
                for inputs in family.prompts * 3
            ]

    expected = [run(*pair) for pair in zip(families, configs, strict=True)]
    barrier = threading.Barrier(2)
    started = [in_thread(run, *pair, barrier) for pair in zip(families, configs, strict=True)]
    for (thread, box), results in zip(started, expected, strict=True):
        thread.join()
        for (tokens, logits, kept), result in zip(box[0], results, strict=True):
            assert torch.equal(tokens, result[0])
            assert torch.equal(logits, result[1])
            assert all(torch.equal(a, b) for a, b in zip(kept, result[2], strict=True))
