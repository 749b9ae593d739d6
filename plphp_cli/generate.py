"""The decode engine behind every command: one prompt in, a stream of typed events out. Nothing here prints.

    for event in stream(loaded, prompt, PLPHPConfig(), Settings(max_new_tokens=64)):
        ...  # PrefillDone, then one Token per token, then Done

`prefill`, `advance` and `decode` are its parts, for callers that prefill once and decode many times; they
run inside `prune(model, ...)`. Positions are kept with each prompt and passed explicitly: Qwen-VL models
remember the position offset of the last prompt they saw, so that prompts that take turns would decode at
each other's positions.
"""

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from plphp_cli import parallel
from plphp_cli.answer_text import AnswerText, check_stop
from plphp_cli.attention import Pruner, prune
from plphp_cli.cache import cache_name, cache_of, fork_cache
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import ImageError, UnsupportedError, UsageError
from plphp_cli.prompt import Prompt
from plphp_cli.pruning import Policy, as_policy
from plphp_cli.sequence import LayerState, SequenceState, cut_anew
from plphp_cli.vision import encode_images

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel

Clock = Callable[[], float]


@dataclass(frozen=True)
class Settings:
    """How an answer is generated.

    Attributes:
        max_new_tokens: at least 1.
        temperature: above 0 samples; None or 0 takes the likeliest token.
        top_p: in (0, 1], samples from the smallest set of tokens that holds this probability; None is the
            model's.
        seed: of the sampling.
        stop_at_eos: False suppresses the end of sequence, so that exactly `max_new_tokens` come (for timing).
        stop: texts that end the answer, which then ends with the one that was met.

    Raises:
        UsageError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    stop_at_eos: bool = True
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens = {self.max_new_tokens}; expected at least 1")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature = {self.temperature:g}; expected a number of at least 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p:g}; expected a number in (0, 1]")
        check_stop(self.stop)


@dataclass(frozen=True, eq=False)
class PrefillDone:
    """The prompt is in the cache, cut; `prefill_s` seconds from inputs on the device to the first logits."""

    prefill_s: float
    layers: tuple[LayerState, ...]
    prompt_tokens: int
    vision_tokens: int


@dataclass(frozen=True)
class Token:
    """One new token.

    Attributes:
        index: 0 for the first new token.
        token_id: its id.
        text: what it adds to the text; empty while a character is incomplete, and for special tokens.
        elapsed_s: seconds since the start of prefill at which its id was on the host. Time that the
            consumer of the events spends between two of them does not count.
    """

    index: int
    token_id: int
    text: str
    elapsed_s: float


@dataclass(frozen=True)
class Done:
    """The whole answer; `stop_reason` is `eos`, `stop` or `length`. The ids include the end of sequence."""

    text: str
    token_ids: tuple[int, ...]
    stop_reason: str


Event = PrefillDone | Token | Done


@dataclass(eq=False)
class Prefilled:
    """A prompt in a cache, ready for its next token.

    Attributes:
        input_ids: LongTensor [1, N], the prompt.
        cache: the prompt's cache; whatever is decoded is added to it.
        logits: float32 [vocab], what the model expects after the prompt.
        positions: [..., 1], position of the last token seen; None for models that count by themselves.
        state: what each layer kept.
    """

    input_ids: Tensor
    cache: Cache
    logits: Tensor
    positions: Tensor | None
    state: SequenceState

    def fork(self, room: int | None = None) -> "Prefilled":
        """A copy with a cache of its own and room for `room` new tokens: one prefill, decoded many times."""
        cache = fork_cache(self.cache, room)
        return Prefilled(self.input_ids, cache, self.logits, self.positions, self.state)

    def cut(self, policy: PLPHPConfig | Policy | None, room: int | None = None) -> "Prefilled":
        """A copy cut by `policy`, from a whole prefill that kept its attention; see `cut_anew`."""
        cache, state = cut_anew(self.cache, self.state, as_policy(policy), room)
        return Prefilled(self.input_ids, cache, self.logits, self.positions, state)

    def take_back(self, count: int) -> bool:
        """Forget the last `count` tokens fed after the prompt; False, and unusable, if its cache cannot."""
        try:
            for layer in self.cache.layers if count else ():
                layer.crop(-count)
        except (RuntimeError, ValueError, NotImplementedError, TypeError):
            return False
        if self.positions is not None:
            self.positions = self.positions - count
        return True


def stream(
    loaded: "LoadedModel",
    prompt: Prompt,
    policy: PLPHPConfig | Policy | None,
    settings: Settings,
    *,
    clock: Clock = time.perf_counter,
) -> Iterator[Event]:
    """Answer one prompt: `PrefillDone`, one `Token` per new token, `Done`. Closing it restores the model.

    Args:
        loaded: the model, and the processor whose tokenizer makes the text.
        prompt: the prompt, on the model's device.
        policy: a config, a policy, or None for the unpruned arm.
        settings: how to generate.
        clock: seconds, for tests.

    Raises:
        UnsupportedError: the model or the prompt cannot be pruned, with the reason.
        ImageError: the prompt's vision tokens are not as many as its images expand to.
    """
    ids = prompt.inputs["input_ids"]
    with prune(loaded.model, policy) as pruner:
        choose = _Sampler(loaded.model, ids, settings)
        text = AnswerText(loaded.processor, settings.stop, choose.eos)  # not timed: it reads the vocabulary
        watch = _Stopwatch(clock, ids.device)
        prefilled = prefill(loaded, prompt, pruner, settings.max_new_tokens)
        state, vision_tokens = prefilled.state, prefilled.state.vision.positions.numel()
        done = PrefillDone(watch.elapsed(), state.layers, state.prompt_tokens, vision_tokens)
        yield from watch.pausing(iter([done]))
        yield from watch.pausing(_decode(loaded, prefilled, settings.max_new_tokens, choose, text, watch))


def decode(
    loaded: "LoadedModel", prefilled: Prefilled, settings: Settings, *, clock: Clock = time.perf_counter
) -> Iterator[Token | Done]:
    """Decode from a prefilled prompt, inside `prune`; `elapsed_s` counts from the start of decoding."""
    choose = _Sampler(loaded.model, prefilled.input_ids, settings)
    text = AnswerText(loaded.processor, settings.stop, choose.eos)
    watch = _Stopwatch(clock, prefilled.input_ids.device)
    yield from watch.pausing(_decode(loaded, prefilled, settings.max_new_tokens, choose, text, watch))


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
    choose = _Sampler(loaded.model, prefilled.input_ids, Settings(len(ids)))
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


@torch.no_grad()
def prefill(loaded: "LoadedModel", prompt: Prompt, pruner: Pruner, room: int | None = None) -> Prefilled:
    """Run the prompt through the model under `pruner`; `room` is how many new tokens to make room for."""
    model: Any = loaded.model
    inputs: dict[str, Any] = dict(prompt.inputs)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask", None)
    if mask is not None and not bool(mask.all()):
        raise UnsupportedError("a padded prompt is not supported", hint="prepare one prompt at a time")
    parameters = inspect.signature(model.forward).parameters
    positions = None
    if "position_ids" in parameters:
        # Qwen's omni models take a prompt without a mask for one without images.
        given = {**inputs, "attention_mask": torch.ones_like(ids)}
        positions = model._prepare_position_ids_for_generation(ids, given)
    with _arguments_named(loaded):
        inputs = encode_images(model, inputs)
        pruner.room, pruner.image_tokens = room, prompt.image_tokens
        try:
            output = _forward(model, ids, DynamicCache(), positions, is_first_iteration=True, **inputs)
        finally:
            pruner.room = pruner.image_tokens = None
    last = None if positions is None else positions[..., -1:]
    for layer in cache_of(output).layers:
        layer.fused = True
    return Prefilled(ids, cache_of(output), output.logits[0, -1].float(), last, pruner.sequences[0])


@contextlib.contextmanager
def _arguments_named(loaded: "LoadedModel") -> Iterator[None]:
    """Where the user changed what the processor makes, a model that cannot take it is told of as that."""
    given = getattr(getattr(loaded, "options", None), "processor_arg", ())
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not given or "memory" in str(error):
            raise
        what = str(error).strip().partition("\n")[0]
        raise ImageError(
            f"the model cannot take the images as they were prepared: {what}",
            hint=f"check --processor-arg {' '.join(given)}",
        ) from error


@torch.no_grad()
def advance(loaded: "LoadedModel", prefilled: Prefilled, ids: Tensor) -> Tensor:
    """Feed new tokens [1, q] to a prefilled prompt, inside `prune`; returns float32 logits [q, vocab]."""
    positions = prefilled.positions
    if positions is not None:
        # The offset of multimodal positions stays with the prompt: the next position is the last plus one.
        positions = positions + torch.arange(1, ids.shape[1] + 1, device=positions.device)
        prefilled.positions = positions[..., -1:]
    output = _forward(loaded.model, ids, prefilled.cache, positions)
    return output.logits[0].float()


def _forward(model: Any, ids: Tensor, cache: Cache, positions: Tensor | None, **inputs: Any) -> Any:
    if positions is not None:
        inputs["position_ids"] = positions
    if model._supports_logits_to_keep():
        inputs["logits_to_keep"] = 1 if inputs.get("is_first_iteration") else ids.shape[1]
    inputs[cache_name(model)] = cache
    arguments = model.prepare_inputs_for_generation(ids, use_cache=True, **inputs)
    return model(**arguments, return_dict=True)


def _decode(
    loaded: "LoadedModel",
    prefilled: Prefilled,
    count: int,
    choose: "_Sampler",
    text: AnswerText,
    watch: "_Stopwatch",
) -> Iterator[Token | Done]:
    ids, logits = prefilled.input_ids, prefilled.logits
    for index in range(count):
        token = choose(ids, logits)
        token_id = int(token)
        elapsed_s = watch.elapsed()
        ids = torch.cat([ids, token], dim=-1)
        piece, reason = text.take(token_id, ids, last=index + 1 == count)
        yield Token(index, token_id, piece, elapsed_s)
        if reason is not None:
            yield Done(text.text, tuple(text.ids), reason)
            return
        logits = advance(loaded, prefilled, token)[-1]


class _Sampler:
    """The next token from logits, by the logits processors that `generate` would use."""

    def __init__(self, model: Any, prompt: Tensor, settings: Settings) -> None:
        wanted = {"temperature": settings.temperature, "top_p": settings.top_p}
        options = {name: value for name, value in wanted.items() if value is not None}
        self.sample = bool(options) and settings.temperature != 0
        config, _ = model._prepare_generation_config(
            None,
            do_sample=self.sample,
            # What a checkpoint's own generation config may ask for, and this loop does not do.
            num_beams=1,
            num_return_sequences=1,
            guidance_scale=None,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=None if settings.stop_at_eos else settings.max_new_tokens,
            **(options if self.sample else {}),
        )
        model._prepare_special_tokens(config, True, device=prompt.device)
        self.eos = set() if config._eos_token_tensor is None else set(config._eos_token_tensor.tolist())
        self.processors = model._get_logits_processor(
            config, prompt.shape[1], encoder_input_ids=prompt, device=prompt.device, model_kwargs={}
        )
        self.generator = torch.Generator(prompt.device).manual_seed(settings.seed)
        self.agree = parallel.agreement(model)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """The next token [1, 1] after `ids` [1, n], from `logits` [vocab]."""
        scores = self.processors(ids, logits[None].clone())
        if self.sample:
            return self.agree(torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator))
        return self.agree(scores.argmax(dim=-1, keepdim=True))


class _Stopwatch:
    """Seconds since it was made, without those that pass between an event's delivery and the next request."""

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self._clock = clock
        self._device = device
        self._start = self._now()

    def elapsed(self) -> float:
        """Seconds, after the device has done all it was given."""
        return self._now() - self._start

    def skip(self, seconds: float) -> None:
        """Leave out so many seconds that have passed: of compiling, say."""
        self._start += seconds

    def elapsed_on_host(self) -> float:
        """Seconds, whatever the device is still doing."""
        return self._clock() - self._start

    def pausing(self, events: Iterator[Any]) -> Iterator[Any]:
        """The events, with the time that their consumer takes left out."""
        for event in events:
            before = self._clock()
            yield event
            self._start += self._clock() - before

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return self._clock()
