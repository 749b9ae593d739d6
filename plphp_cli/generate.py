"""The engine behind every command: one prompt in, a stream of typed events out. Nothing here prints.

    for event in stream(loaded, prompt, PLPHPConfig(), Settings(max_new_tokens=64)):
        ...  # PrefillDone, then one Token per token, then Done

`prefilling` and `decoding` hold its parts, for callers that prefill once and decode many times; they run
inside `prune(model, ...)`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plphp_cli.answer_text import AnswerText
from plphp_cli.attention import prune
from plphp_cli.compiled import StepCompiler
from plphp_cli.config import PLPHPConfig
from plphp_cli.decoding import Answer, Done, Token, decode, decode_answers
from plphp_cli.prefilling import Prefilled, prefill
from plphp_cli.products import time_products
from plphp_cli.prompt import Prompt
from plphp_cli.pruning import Policy
from plphp_cli.sampling import Sampler, Settings
from plphp_cli.sequence import LayerState
from plphp_cli.stopwatch import Clock, Stopwatch

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel


@dataclass(frozen=True, eq=False)
class PrefillDone:
    """The prompt is in the cache, cut; `prefill_s` seconds from inputs on the device to the first logits."""

    prefill_s: float
    layers: tuple[LayerState, ...]
    prompt_tokens: int
    vision_tokens: int


Event = PrefillDone | Token | Done


def stream(
    loaded: "LoadedModel",
    prompt: Prompt,
    policy: PLPHPConfig | Policy | None,
    settings: Settings,
    compiler: StepCompiler | None = None,
    *,
    clock: Clock = time.perf_counter,
) -> Iterator[Event]:
    """Answer one prompt: `PrefillDone`, one `Token` per new token, `Done`. Closing it restores the model.

    Args:
        loaded: the model, and the processor whose tokenizer makes the text.
        prompt: the prompt, on the model's device.
        policy: a config, a policy, or None for the unpruned arm.
        settings: how to generate.
        compiler: compiles the steps, where it can.
        clock: seconds, for tests.

    Raises:
        UnsupportedError: the model or the prompt cannot be pruned, with the reason.
        ImageError: the prompt's vision tokens are not as many as its images expand to.
    """
    ids = prompt.inputs["input_ids"]
    with prune(loaded.model, policy) as pruner:
        answer = Answer(loaded, ids, settings)
        time_products(loaded.model, 1)
        watch = Stopwatch(clock, ids.device)
        prefilled = prefill(loaded, prompt, pruner, settings.max_new_tokens)
        state, vision_tokens = prefilled.state, prefilled.state.vision.positions.numel()
        done = PrefillDone(watch.elapsed(), state.layers, state.prompt_tokens, vision_tokens)
        yield from watch.pausing(iter([done]))
        count = settings.max_new_tokens
        for row in decode_answers(loaded, [prefilled], [answer], count, watch, compiler):
            yield row.event


def own_place(loaded: "LoadedModel", prefilled: Prefilled, ids: Sequence[int], logits: Tensor) -> int | None:
    """Where the greedy answer leaves `ids`, counted from 0, by what is expected along them.

    Args:
        loaded: the model, whose logits processors choose.
        prefilled: the prompt.
        ids: y_1 .. y_T, an answer that ended as its own arm ends answers.
        logits: float32 [T, vocab], row t the expectation of y_t, under this prompt's cut.

    Returns:
        The place of the first token that is chosen otherwise; None if the answer is `ids`.
    """
    choose = Sampler(loaded.model, prefilled.input_ids, Settings(len(ids)))
    so_far = prefilled.input_ids
    for place, expected in enumerate(ids):
        token = choose(so_far, logits[place])
        if int(token) != expected:
            return place
        so_far = torch.cat([so_far, token], dim=-1)
    return None


def decode_after(
    loaded: "LoadedModel", prefilled: Prefilled, ids: Sequence[int], logits: Tensor, max_new_tokens: int
) -> Done:
    """The greedy answer that begins with `ids`, which were fed already, inside `prune`.

    Args:
        loaded: the model.
        prefilled: the prompt with `ids` in its cache; whatever is decoded is added to it.
        ids: the answer's first tokens.
        logits: float32 [vocab], what the model expects after them.
        max_new_tokens: of the whole answer, more than `ids` are.
    """
    start = torch.tensor([list(ids)], dtype=torch.long, device=prefilled.input_ids.device)
    longer = torch.cat([prefilled.input_ids, start], dim=-1)
    rest = Prefilled(longer, prefilled.cache, logits, prefilled.positions, prefilled.state)
    *_, done = decode(loaded, rest, Settings(max_new_tokens - len(ids)))
    assert isinstance(done, Done)
    whole, text = (*ids, *done.token_ids), AnswerText(loaded.processor)
    for place, token_id in enumerate(whole, 1):
        text.add(token_id, flush=place == len(whole))
    return Done(text.text, whole, done.stop_reason)
