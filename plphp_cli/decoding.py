"""The decode loop: one new token of each prompt at a step, from one reading of the weights.

    with prune(model, config) as pruner:
        prompts = [prefill(loaded, prompt, pruner, room) for prompt in ...]  # each with its cut
        for event in decode_batch(loaded, prompts, Settings(64)):
            ...  # Row(index, Token) as they come, Row(index, Done) as each ends and leaves the batch

One prompt is a batch of one. With a `StepCompiler` the steps are compiled; without, they run in Python.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from plphp_cli.answer_text import AnswerText
from plphp_cli.cache import PrunableLayer
from plphp_cli.compiled import Step, StepCompiler
from plphp_cli.errors import UnsupportedError
from plphp_cli.joined import join
from plphp_cli.prefilling import Prefilled, advance, forward
from plphp_cli.products import as_columns, column_products, time_products
from plphp_cli.sampling import Sampler, Settings
from plphp_cli.stopwatch import Clock, Stopwatch

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel


@dataclass(frozen=True)
class Token:
    """One new token.

    Attributes:
        index: 0 for the first new token.
        token_id: its id.
        text: what it adds to the text; empty while a character is incomplete, and for special tokens.
        elapsed_s: seconds since the start of prefill (of decoding, for prompts prefilled before) at which
            its id was on the host. Time that the consumer of the events spends between two of them does not
            count, but where steps run ahead: the device goes on meanwhile.
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


@dataclass(frozen=True)
class Row:
    """What came of one sequence of a batch, by its place among the prompts given."""

    index: int
    event: Token | Done


class DecodeBatch:
    """Prefilled prompts that take their steps together, inside `prune`. Their caches are filled further.

    Args:
        loaded: the model.
        prompts: one or more, each with a cache of its own.
        room: new tokens that each will take at most.
        compiler: compiles the steps, where it can.

    Raises:
        UnsupportedError: prompts of this model cannot share a step.
    """

    def __init__(
        self,
        loaded: "LoadedModel",
        prompts: Sequence[Prefilled],
        room: int,
        compiler: StepCompiler | None = None,
    ) -> None:
        self.prompts = list(prompts)
        self._loaded, self._room, self._compiler = loaded, room, compiler
        self._cache: Any = None
        self._positions: Tensor | None = None
        self._compiled: Step | None = None
        self._steps = 0
        # One prompt needs no joining, unless its steps are compiled: it goes on in its own cache.
        self._alone = len(self.prompts) == 1 and compiler is None
        if len(prompts) > 1 and any(prompt.positions is None for prompt in prompts):
            raise UnsupportedError(
                "a batch of prompts: this model counts positions by itself, one prompt's only",
                hint="leave out --batch-size",
            )
        self._join()

    @property
    def compiled(self) -> bool:
        """Whether its steps are compiled."""
        return self._compiled is not None

    @property
    def runs_ahead(self) -> bool:
        """Whether steps start before their token is read: a prompt in its own cache may not take one back."""
        return self._cache is not None and runs_ahead(self.prompts[0].logits.device)

    def step(self, ids: Tensor) -> Tensor:
        """Feed one token to each prompt, ids [B, 1]; returns logits [B, vocab], good until the next step."""
        if self._cache is None:
            with as_columns(column_products(self._loaded.model, 1).linears):
                return advance(self._loaded, self.prompts[0], ids)[-1:]
        self._steps += 1
        if self._compiled is not None:
            return self._compiled(ids)
        if self._positions is not None:
            self._positions = self._positions + 1
        logits = run_step(self._loaded, ids, self._cache, self._positions)
        lengths = getattr(self._cache, "lengths", None)
        if lengths is not None:
            lengths.add_(1)
        return logits

    def forget(self, rows: Sequence[int]) -> None:
        """What these rows hold is read no more, where they must stay in a captured step's batch."""
        lengths = getattr(self._cache, "lengths", None)
        if lengths is not None:
            lengths[:, list(rows)] = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these prompts, by their places in the batch; the others have left it.

        Those are done with: a step that ran ahead of their last token is not taken back.
        """
        self.settle()
        self.prompts = [self.prompts[row] for row in rows]
        if self.prompts:
            self._join(begins=False)

    def settle(self, unread: int = 0) -> None:
        """Let each prompt know the tokens it took, all but the last `unread` that nobody asked for."""
        if self._cache is None:
            return
        taken = self._steps - unread
        self._steps, self._room = 0, self._room - taken
        for prompt in self.prompts:
            if prompt.positions is not None:
                prompt.positions = prompt.positions + taken
        if getattr(self._cache, "lengths", None) is not None:
            for layer in self._cache.layers:
                for row in layer.rows:
                    row.note_written(taken)
        elif unread:
            for prompt in self.prompts:
                for row in prompt.cache.layers:
                    if isinstance(row, PrunableLayer):
                        row.crop(-unread)

    def _join(self, begins: bool = True) -> None:
        self._steps = 0
        if self._alone:
            return
        for prompt in self.prompts:
            for layer in prompt.cache.layers:
                if isinstance(layer, PrunableLayer):
                    layer.make_room(max(self._room, 1))
        try:
            self._cache = join([prompt.cache for prompt in self.prompts])
        except UnsupportedError as error:
            if len(self.prompts) > 1:
                raise
            self._cache = None
            if self._compiler is not None:
                self._compiler.stats.refused = error.message
            return
        positions = [prompt.positions for prompt in self.prompts if prompt.positions is not None]
        self._positions = torch.cat(positions, dim=-2) if positions else None
        self._compiled = None
        if self._compiler is not None:
            self._compiled = self._compiler.step_for(self._cache, self._positions, begins=begins)


def run_step(loaded: "LoadedModel", ids: Tensor, cache: Cache, positions: Tensor | None) -> Tensor:
    """A step of a joined cache, in Python: ids [B, 1], positions [..., B, 1] -> float32 logits [B, vocab]."""
    with as_columns(column_products(loaded.model, ids.shape[0]).linears):
        return forward(loaded.model, ids, cache, positions).logits[:, -1].float()


def step_compiler(loaded: "LoadedModel") -> StepCompiler:
    """A compiler of this model's steps, to be kept for as long as prompts are decoded."""
    return StepCompiler(loaded, lambda ids, cache, positions: run_step(loaded, ids, cache, positions))


class Answer:
    """One prompt's own sampler, ids and text; made before the clock starts, since it reads the vocabulary.

    Args:
        loaded: the model, and the processor whose tokenizer makes the text.
        input_ids: LongTensor [1, N], the prompt.
        settings: how to generate.
    """

    def __init__(self, loaded: "LoadedModel", input_ids: Tensor, settings: Settings) -> None:
        self._choose = Sampler(loaded.model, input_ids, settings)
        self._text = AnswerText(loaded.processor, settings.stop, self._choose.eos)
        self._ids = input_ids
        self.ended = False

    def choose(self, logits: Tensor) -> Tensor:
        """The next token [1, 1], from `logits` [vocab]."""
        token = self._choose(self._ids, logits)
        self._ids = torch.cat([self._ids, token], dim=-1)
        return token

    def take(self, index: int, token_id: int, elapsed_s: float, last: bool) -> list[Token | Done]:
        """The token's event, and `Done` where it is the answer's last."""
        text, reason = self._text.take(token_id, self._ids, last)
        self.ended = reason is not None
        events: list[Token | Done] = [Token(index, token_id, text, elapsed_s)]
        if reason is not None:
            events.append(Done(self._text.text, tuple(self._text.ids), reason))
        return events


def decode(
    loaded: "LoadedModel", prefilled: Prefilled, settings: Settings, *, clock: Clock = time.perf_counter
) -> Iterator[Token | Done]:
    """Decode from a prefilled prompt, inside `prune`; `elapsed_s` counts from the start of decoding."""
    for row in decode_batch(loaded, [prefilled], settings, clock=clock):
        yield row.event


def decode_batch(
    loaded: "LoadedModel",
    prompts: Sequence[Prefilled],
    settings: Settings,
    compiler: StepCompiler | None = None,
    *,
    clock: Clock = time.perf_counter,
) -> Iterator[Row]:
    """Decode prefilled prompts together, inside `prune`; `elapsed_s` counts from the start of decoding."""
    answers = [Answer(loaded, prompt.input_ids, settings) for prompt in prompts]
    time_products(loaded.model, len(prompts))
    watch = Stopwatch(clock, prompts[0].input_ids.device)
    yield from decode_answers(loaded, prompts, answers, settings.max_new_tokens, watch, compiler)


@torch.no_grad()
def decode_answers(
    loaded: "LoadedModel",
    prompts: Sequence[Prefilled],
    answers: Sequence[Answer],
    count: int,
    watch: Stopwatch,
    compiler: StepCompiler | None = None,
) -> Iterator[Row]:
    """The loop of all: at most `count` tokens of each prompt, timed by `watch`, which may run already.

    Where prompts share steps on CUDA, or steps are compiled, from the second token on the next step starts
    before its token is read, so that no device waits for Python; the first token's time is taken before
    any step, and each later one's after as many steps. A sequence that ends leaves the batch; its
    cache may then hold a token that nobody read.
    """
    rows = list(enumerate(answers))
    logits = torch.stack([prompt.logits for prompt in prompts])
    batch: DecodeBatch | None = None
    ahead = False
    for index in range(count):
        tokens = torch.cat([row.choose(scores) for (_, row), scores in zip(rows, logits, strict=True)])
        reading, more = _Reading(tokens), index + 1 < count
        if batch is None and more:
            compiled_s = _compile_s(compiler)
            batch = DecodeBatch(loaded, prompts, count - 1, compiler)
            ahead = batch.runs_ahead
            watch.skip(_compile_s(compiler) - compiled_s)
        step_now = batch if ahead and more else None
        if step_now is not None and index:
            logits = step_now.step(tokens)
        ids = reading.ids()
        elapsed_s = watch.elapsed_on_host()
        if step_now is not None and not index:
            logits = step_now.step(tokens)
        for (number, row), token_id in zip(rows, ids, strict=True):
            if not row.ended:
                events = (Row(number, event) for event in row.take(index, token_id, elapsed_s, not more))
                # A device that runs ahead does not wait for who reads: that time passes for it, too.
                yield from events if ahead else watch.pausing(events)
        going = [place for place, (_, row) in enumerate(rows) if not row.ended]
        if not going or batch is None or not more:
            break
        if len(going) < len(rows) and ahead and batch.compiled and len(going) > len(rows) // 2:
            # A captured step is for so many rows: those that ended stay, unread, until half are gone.
            batch.forget([place for place, (_, row) in enumerate(rows) if row.ended])
        elif len(going) < len(rows):
            rows, logits = [rows[place] for place in going], logits[going]
            tokens = tokens[going]
            compiled_s = _compile_s(compiler)
            batch.keep(going)
            # So many rows may need a capture of their own: no time of a token.
            watch.skip(_compile_s(compiler) - compiled_s)
        if not ahead:
            logits = batch.step(tokens)
    if batch is not None:
        batch.settle(unread=int(ahead and more))


def runs_ahead(device: torch.device) -> bool:
    """Whether a step starts before its token is read; on a CPU that would only delay the token."""
    return device.type == "cuda"


def _compile_s(compiler: StepCompiler | None) -> float:
    return 0.0 if compiler is None else compiler.stats.compile_s


class _Reading:
    """Tokens [B, 1] on their way to the host, while the device goes on."""

    def __init__(self, tokens: Tensor) -> None:
        self._host, self._event = tokens, None
        if tokens.device.type == "cuda":
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def ids(self) -> list[int]:
        """The ids, as soon as they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host[:, 0].tolist()
