"""Answers to a file of prompts, decoded in batches: prefilled and cut one at a time, then joined."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plphp_cli.config import PLPHPConfig
from plphp_cli.results import MIN_DECODE_STEPS, CompileRecord, GenerationRecord
from plphp_cli.serialize import SCHEMA_VERSION

if TYPE_CHECKING:
    from plphp_cli.compiled import StepCompiler
    from plphp_cli.models import LoadedModel
    from plphp_cli.profiling.state import Question
    from plphp_cli.sampling import Settings


@dataclass(frozen=True)
class AnswerRecord:
    """One prompt's answer. Bytes are of its prompt's cache after the cut, and of what it would be uncut.

    `line` is its line in the file; `expected` the answer that the file names; `stop_reason` is `eos`,
    `stop`, `length`, `interrupted` or `failed`.
    """

    line: int | None
    images: tuple[str, ...]
    prompt: str
    text: str
    new_tokens: int
    stop_reason: str
    prompt_tokens: int
    vision_tokens: int
    kv_bytes_held: int
    kv_bytes_full: int
    expected: str | None = None
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class AnswersRecord:
    """All answers, and what they took.

    Attributes:
        prefill_s: all prefills, one after another, without image preprocessing; no warm-up goes before.
        decode_s: from a batch's first tokens to its last, over all batches, without compiling.
        decode_tokens_per_s: all sequences' tokens but their first, over `decode_s`; None under 16 steps.
        compiled: captures, hits and seconds of compiling; None where that was not asked for.
    """

    model: str
    config: PLPHPConfig
    generation: GenerationRecord
    batch_size: int
    answers: tuple[AnswerRecord, ...]
    prefill_s: float
    decode_s: float
    decode_tokens_per_s: float | None
    compiled: CompileRecord | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False
    command: str = "run"
    schema_version: int = SCHEMA_VERSION


class Answering:
    """Answers prompts batch by batch; what is done at any moment can be recorded.

    Args:
        loaded: the model.
        config: the setting of PLPHP; None answers unpruned.
        settings: how to generate.
        batch_size: prompts that are decoded together.
        compiler: compiles the steps, where it can.
        answered: takes each answer, in the file's order, as its batch ends.
        check: called between tokens; raises `KeyboardInterrupt` when the user wants to stop.
    """

    def __init__(
        self,
        loaded: "LoadedModel",
        config: PLPHPConfig | None,
        settings: "Settings",
        batch_size: int,
        compiler: "StepCompiler | None",
        answered: Callable[[AnswerRecord], None],
        check: Callable[[], None],
    ) -> None:
        self.answers: list[AnswerRecord] = []
        self.prefill_s = self.decode_s = 0.0
        self.decoded = self.steps = 0
        self._loaded, self._config, self._settings = loaded, config, settings
        self._batch_size, self._compiler = batch_size, compiler
        self._answered, self._check = answered, check

    def run(self, questions: Sequence["Question"]) -> None:
        """Answer them all, in order."""
        from plphp_cli.attention import prune

        for start in range(0, len(questions), self._batch_size):
            with prune(self._loaded.model, self._config) as pruner:
                self._batch(questions[start : start + self._batch_size], pruner)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Of all sequences together; None under 16 steps."""
        return self.decoded / self.decode_s if self.steps >= MIN_DECODE_STEPS and self.decode_s > 0 else None

    def remarks(self) -> list[str]:
        """How the steps were computed, where that is not as always."""
        from plphp_cli.products import remarks

        return remarks(self._loaded.model)

    def _batch(self, questions: Sequence["Question"], pruner: Any) -> None:
        from plphp_cli.models import prepare
        from plphp_cli.prefilling import prefill

        runs: list[Any] = []
        prompts: list[Any] = []
        failure: Exception | None = None
        for question in questions:
            try:
                prompt = prepare(self._loaded, question.images, question.prompt, question.system)
                started = time.perf_counter()
                runs.append(prefill(self._loaded, prompt, pruner, self._settings.max_new_tokens))
                _synchronize(self._loaded.device)
            except Exception as error:
                if not runs:
                    raise
                failure = error  # those before it are answered first
                break
            self.prefill_s += time.perf_counter() - started
            prompts.append(prompt)
            self._check()
        self._decode(questions[: len(runs)], runs, prompts)
        if failure is not None:
            raise failure

    def _decode(self, questions: Sequence["Question"], runs: Sequence[Any], prompts: Sequence[Any]) -> None:
        """Decode prefilled prompts together, and record each answer, or what there was of it by a failure."""
        from plphp_cli.decoding import Done, decode_batch

        texts: dict[int, list[Any]] = {place: [] for place in range(len(questions))}
        done: dict[int, Any] = {}
        broken = "failed"
        try:
            for row in decode_batch(self._loaded, runs, self._settings, self._compiler):
                if isinstance(row.event, Done):
                    done[row.index] = row.event
                else:
                    texts[row.index].append(row.event)
                self._check()
        except KeyboardInterrupt:
            broken = "interrupted"
            raise
        finally:
            times = [token.elapsed_s for tokens in texts.values() for token in tokens]
            self.decode_s += max(times, default=0.0) - min(times, default=0.0)
            self.decoded += sum(max(0, len(tokens) - 1) for tokens in texts.values())
            self.steps += max(0, max(map(len, texts.values())) - 1)
            # A batch that failed before its first token has no answers to record.
            for place, question in enumerate(questions if any(texts.values()) else ()):
                tokens, whole = texts[place], done.get(place)
                record = AnswerRecord(
                    line=question.line,
                    images=tuple(str(image.path) for image in question.images),
                    prompt=question.prompt,
                    text="".join(token.text for token in tokens) if whole is None else whole.text,
                    new_tokens=len(tokens),
                    stop_reason=broken if whole is None else whole.stop_reason,
                    prompt_tokens=prompts[place].prompt_tokens,
                    vision_tokens=prompts[place].vision_tokens,
                    kv_bytes_held=sum(layer.held_bytes for layer in runs[place].state.layers),
                    kv_bytes_full=sum(layer.full_bytes for layer in runs[place].state.layers),
                    expected=question.answer,
                    token_ids=tuple(token.token_id for token in tokens),
                )
                self.answers.append(record)
                self._answered(record)


def _synchronize(device: Any) -> None:
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize(device)
