"""Samples of prefill and decode, each arm by its own path, the device synchronised before the clock is read.

`PathArm` is the tool's own loop, pruned or not; `StockArm` is plain `model.generate`. Every decode starts
from a copy of one prefilled cache and makes exactly the same number of new tokens.
"""

import copy
import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from plphp_cli.attention import prune
from plphp_cli.cache import cache_name, cache_of
from plphp_cli.compiled import StepCompiler
from plphp_cli.config import PLPHPConfig
from plphp_cli.decoding import Token, decode_batch
from plphp_cli.prefilling import Prefilled, prefill
from plphp_cli.prompt import Prompt
from plphp_cli.pruning import Policy
from plphp_cli.sampling import Settings
from plphp_cli.stopwatch import Clock
from plphp_cli.support import without_left_out
from plphp_cli.vision import image_features

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel


@dataclass(frozen=True)
class PrefillSample:
    """Seconds from the inputs on the device to the first logits, and to the first token's id on the host."""

    prefill_s: float
    first_token_s: float


@dataclass(frozen=True)
class DecodeSample:
    """The new tokens of one decode, and the seconds of each step from the first token on."""

    step_s: tuple[float, ...]
    token_ids: tuple[int, ...]

    @property
    def decode_s(self) -> float:
        """First token to last."""
        return sum(self.step_s)


class Timer:
    """A clock that lets the device end its work before it is read."""

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self._device = device

    def now(self) -> float:
        """Seconds."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return self.clock()


class Arm(Protocol):
    """One way to answer a prompt; it keeps the cache of its latest prefill."""

    def prefill(self) -> PrefillSample:
        """Prefill the prompt anew."""
        ...

    def decode(self) -> DecodeSample:
        """Decode from a copy of the prefilled cache."""
        ...

    def drop(self) -> None:
        """Let the cache go."""
        ...


class PathArm:
    """The tool's own path: pruned by `policy`, or unpruned where that is None."""

    def __init__(
        self,
        loaded: "LoadedModel",
        prompt: Prompt,
        policy: PLPHPConfig | Policy | None,
        new_tokens: int,
        timer: Timer,
        batch_size: int = 1,
        compiler: StepCompiler | None = None,
    ) -> None:
        self._loaded, self._prompt, self._policy = loaded, prompt, policy
        self._new_tokens, self._timer = new_tokens, timer
        self._batch_size, self._compiler = batch_size, compiler
        self.prefilled: Prefilled | None = None

    def prefill(self) -> PrefillSample:
        """See `Arm`."""
        self.prefilled = None
        with prune(self._loaded.model, self._policy) as pruner:
            start = self._timer.now()
            self.prefilled = prefill(self._loaded, self._prompt, pruner, self._new_tokens)
            logits = self._timer.now()
            int(self.prefilled.logits.argmax())
            return PrefillSample(logits - start, self._timer.now() - start)

    def decode(self) -> DecodeSample:
        """See `Arm`."""
        assert self.prefilled is not None
        twins = [self.prefilled.fork(self._new_tokens) for _ in range(self._batch_size)]
        with prune(self._loaded.model, self._policy):
            return time_decode(self._loaded, twins, self._new_tokens, self._timer, self._compiler)

    def drop(self) -> None:
        """See `Arm`."""
        self.prefilled = None


class StockArm:
    """Plain `model.generate`, no hooks; the clock is read by its streamer and a logits processor.

    One prompt is prefilled; a batch is decoded from as many copies of its cache.
    """

    def __init__(
        self, loaded: "LoadedModel", prompt: Prompt, new_tokens: int, timer: Timer, batch_size: int = 1
    ) -> None:
        self._batch_size = batch_size
        self._model: Any = loaded.model
        self._inputs: dict[str, Any] = dict(prompt.inputs)
        self._new_tokens, self._timer = new_tokens, timer
        self._cache: Any = None
        self.held_bytes = self.allocated_bytes = 0

    def prefill(self) -> PrefillSample:
        """See `Arm`."""
        self._cache = None
        watch = _Watch(self._timer)
        start = self._timer.now()
        output = generate_exactly(self._model, self._inputs, 1, watch, watch.processor)
        self._cache = cache_of(output)
        self.held_bytes, self.allocated_bytes = _cache_bytes(self._cache)
        return PrefillSample(watch.logits[0] - start, watch.tokens[0] - start)

    def decode(self) -> DecodeSample:
        """See `Arm`. The last prompt token is run again, so that `generate` has one to start from."""
        # Where there is none it prefills again, which the steps timed do not include.
        cache = stock_rows(copy.deepcopy(self._cache), self._batch_size)
        return time_stock(self._model, self._inputs, cache, self._batch_size, self._new_tokens, self._timer)

    def drop(self) -> None:
        """See `Arm`."""
        self._cache = None


def stock_rows(cache: Any, batch_size: int) -> Any:
    """Stock's own cache as `time_stock` takes it: without its last token, `batch_size` times (in place).

    None where the cache cannot give a token back.
    """
    try:
        cache.crop(-1)
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        return None
    if batch_size > 1:
        cache.batch_repeat_interleave(batch_size)
    return cache


def time_stock(
    model: Any, inputs: dict[str, Any], cache: Any, batch_size: int, new_tokens: int, timer: Timer
) -> DecodeSample:
    """Plain `generate` of a batch of equal prompts from `cache`, which lacks the last prompt token.

    Without a cache (None) it prefills again, which the steps timed do not include.
    """
    watch = _Watch(timer)
    if cache is not None:
        inputs = {name: v for name, v in inputs.items() if not name.startswith(("pixel_", "mm_encoder"))}
        inputs[cache_name(model)] = cache
    if batch_size > 1:
        rows = {n: v.repeat_interleave(batch_size, 0) for n, v in inputs.items() if isinstance(v, Tensor)}
        inputs = {**inputs, **rows}
    output = generate_exactly(model, inputs, new_tokens, watch, watch.processor)
    count = len(watch.tokens)
    return _sample(watch.tokens, output.sequences[0, -count:].tolist())


@torch.no_grad()
def generate_exactly(
    model: Any,
    inputs: dict[str, Any],
    count: int,
    streamer: BaseStreamer,
    processor: LogitsProcessor | None = None,
) -> Any:
    """Plain greedy `model.generate` of exactly `count` new tokens, end of sequence suppressed.

    What the tool's arms leave out of the model's generation config, it does, too.
    """
    return model.generate(
        **inputs,
        **without_left_out(model.generation_config),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        streamer=streamer,
        logits_processor=LogitsProcessorList([] if processor is None else [processor]),
        return_dict_in_generate=True,
    )


class _Watch(BaseStreamer):
    """Reads the clock as `generate` has logits, and as it hands out tokens."""

    def __init__(self, timer: Timer) -> None:
        self.logits: list[float] = []
        self.tokens: list[float] = []
        self.processor = _LogitsWatch(self.logits, timer)
        self._timer = timer
        self._prompt_came = False

    def put(self, value: Tensor) -> None:
        if self._prompt_came:
            self.tokens.append(self._timer.now())
        self._prompt_came = True

    def end(self) -> None:
        pass


class _LogitsWatch(LogitsProcessor):
    def __init__(self, logits: list[float], timer: Timer) -> None:
        self._logits, self._timer = logits, timer

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Only the first counts: synchronising at every step would slow what is timed.
        if not self._logits:
            self._logits.append(self._timer.now())
        return scores


def time_decode(
    loaded: "LoadedModel",
    prompts: Sequence[Prefilled],
    new_tokens: int,
    timer: Timer,
    compiler: StepCompiler | None = None,
) -> DecodeSample:
    """Decode exactly `new_tokens` from each prompt, inside `prune`, all together; the first one's tokens.

    They are added to the prompts' caches. A step is one token of every prompt.
    """
    # Without a processor no text is made: that would count as the next token's time.
    mute: Any = _without_text(loaded)
    settings = Settings(new_tokens, stop_at_eos=False)
    rows = decode_batch(mute, prompts, settings, compiler, clock=timer.clock)
    events = [row.event for row in rows if row.index == 0]
    tokens = [event for event in events if isinstance(event, Token)]
    return _sample([t.elapsed_s for t in tokens], [t.token_id for t in tokens])


@dataclass
class CutTimer:
    """Adds up the time of scores and gathers while it is set on a pruner as `around_cut`."""

    timer: Timer
    total_s: float = field(default=0.0)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around one layer's cut."""
        start = self.timer.now()
        yield
        self.total_s += self.timer.now() - start


def time_pruning(
    loaded: "LoadedModel", prompt: Prompt, policy: PLPHPConfig | Policy, new_tokens: int, timer: Timer
) -> tuple[float, float]:
    """Seconds of scores and gathers of one prefill, and of that whole prefill, which this slows."""
    cuts = CutTimer(timer)
    with prune(loaded.model, policy) as pruner:
        pruner.around_cut = cuts
        start = timer.now()
        prefill(loaded, prompt, pruner, new_tokens)
        return cuts.total_s, timer.now() - start


@torch.no_grad()
def time_vision(loaded: "LoadedModel", prompt: Prompt, timer: Timer) -> float | None:
    """Seconds of the vision encoder alone; None where the model has none that can be called alone."""
    start = timer.now()
    features = image_features(loaded.model, prompt.inputs)
    return None if features is None else timer.now() - start


def _without_text(loaded: "LoadedModel") -> Any:
    if dataclasses.is_dataclass(loaded):
        return dataclasses.replace(loaded, processor=None)
    bare = copy.copy(loaded)
    bare.processor = None
    return bare


def _sample(elapsed_s: list[float], token_ids: list[int]) -> DecodeSample:
    steps = tuple(later - earlier for earlier, later in pairwise(elapsed_s))
    return DecodeSample(steps, tuple(token_ids))


def _cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes of the keys and values of transformers' own cache, and of the storages that they lie in."""
    tensors = [
        t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))
    ]
    held = [t for t in tensors if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(t.nbytes for t in held), sum(storages.values())
