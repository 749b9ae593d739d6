"""One prompt under all settings: one prefill, one unpruned answer, and per distinct cut one short chunk.

At any moment there is one whole cache with its score rows, and one cut of it at most.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plphp_cli import __version__
from plphp_cli.attention import prune
from plphp_cli.config import PLPHPConfig
from plphp_cli.decoding import Done, decode
from plphp_cli.errors import UnsupportedError
from plphp_cli.generate import decode_after, own_place
from plphp_cli.models import prepare
from plphp_cli.prefilling import Prefilled, advance, prefill
from plphp_cli.profiling.answers import is_exact
from plphp_cli.profiling.state import Question
from plphp_cli.profiling.timing import Timer
from plphp_cli.pruning import FixedRates, PLPHPPolicy
from plphp_cli.quality import Divergence, along, divergence
from plphp_cli.sampling import Settings
from plphp_cli.sweep.matching import Budget, policy_of
from plphp_cli.sweep.plan import CutPlan, plan
from plphp_cli.sweep.records import BASELINE, Row, Setting
from plphp_cli.sweep.request import prompt_id
from plphp_cli.units import finite

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel


@dataclass(frozen=True)
class Job:
    """A prompt, its place among the prompts, and the settings that are still to be measured on it."""

    index: int
    question: Question
    settings: tuple[Setting, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Refused:
    """A setting that cannot cut a prompt, and why."""

    setting: Setting
    reason: str


@dataclass
class Tally:
    """What was done.

    Attributes:
        prefills: one a prompt, and their seconds.
        chunks: distinct cuts judged; `shared_cuts` how many settings kept the tokens of an earlier one.
        own_answers: decoded on from where they leave the unpruned answer.
        notes: what was done unasked, in words.
    """

    prefills: int = 0
    prefill_s: float = 0.0
    chunks: int = 0
    shared_cuts: int = 0
    own_answers: int = 0
    notes: tuple[str, ...] = ()

    def add(self, other: "Tally") -> None:
        """Count another's too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def take(self) -> "Tally":
        """What was counted so far; counting begins anew."""
        taken = replace(self)
        for name, value in vars(Tally()).items():
            setattr(self, name, value)
        return taken


def measure_prompt(loaded: "LoadedModel", job: Job, tally: Tally) -> Generator[Row | Refused, None, None]:
    """Measure a prompt under each of its settings, in their order; close it to restore the model.

    Raises:
        UnsupportedError: the model or the prompt cannot be pruned at all, with the reason.
    """
    question = job.question
    prompt = prepare(loaded, question.images, question.prompt, question.system)
    tally.notes += prompt.notes
    timer = Timer(loaded.device)
    with prune(loaded.model, None, keep_attention=True) as pruner:
        start = timer.now()
        whole = prefill(loaded, prompt, pruner, 0)
        tally.prefill_s += timer.now() - start
        tally.prefills += 1
        bench = _Bench(loaded, job, whole, tally)
        for setting in job.settings:
            try:
                yield bench.row(setting)
            except UnsupportedError as error:
                yield Refused(setting, error.message)


@dataclass(frozen=True)
class _Outcome:
    """What one cut of the prompt holds, costs and answers."""

    held: int
    full: int
    divergence: Divergence
    answer: str | None


class _Bench:
    """A prompt, prefilled whole, on which settings are tried one after another."""

    def __init__(self, loaded: "LoadedModel", job: Job, whole: Prefilled, tally: Tally) -> None:
        self._loaded, self._job, self._whole, self._tally = loaded, job, whole, tally
        self._vision_tokens = whole.state.vision.positions.numel()
        self._budgets: dict[PLPHPConfig, Budget] = {}
        count = job.max_new_tokens
        *_, done = decode(loaded, whole.fork(count), Settings(count))
        assert isinstance(done, Done)
        self._done, self._ids = done, done.token_ids
        self._reference: Tensor = along(loaded, whole.fork(len(self._ids)), self._ids)
        full = sum(layer.full_bytes for layer in whole.state.layers)
        alike = len(self._ids) - 1
        uncut = _Outcome(full, full, Divergence(0.0, [0.0] * alike, [True] * alike), done.text)
        self._uncut_id = plan(whole.state, FixedRates({})).cut_id
        # By cut: a setting that keeps everything is the baseline.
        self._known = {self._uncut_id: uncut}

    def row(self, setting: Setting) -> Row:
        """One setting. Raises `UnsupportedError` where it cannot cut this prompt."""
        if setting.method == BASELINE:
            return self._row(setting, None, self._uncut_id, self._known[self._uncut_id])
        cuts = plan(self._whole.state, policy_of(setting, self._budget))
        outcome = self._known.get(cuts.cut_id)
        if outcome is None:
            self._known[cuts.cut_id] = outcome = self._try(cuts)
        else:
            self._tally.shared_cuts += 1
        return self._row(setting, cuts.rate, cuts.cut_id, outcome)

    def _budget(self, config: PLPHPConfig) -> Budget:
        if config not in self._budgets:
            self._budgets[config] = plan(self._whole.state, PLPHPPolicy(config)).budget(self._vision_tokens)
        return self._budgets[config]

    def _try(self, cuts: CutPlan) -> _Outcome:
        """Cut, and compare along the unpruned answer; if one is expected, go on where the answers part."""
        loaded, whole, ids = self._loaded, self._whole, self._ids
        wanted = self._job.question.answer is not None
        room = self._job.max_new_tokens if wanted else len(ids)
        cut = whole.cut(cuts, room)
        held, full = (
            sum(getattr(layer, name) for layer in cut.state.layers) for name in ("held_bytes", "full_bytes")
        )
        logits = along(loaded, cut, ids)
        self._tally.chunks += 1
        found = divergence(self._reference, logits)
        if not wanted:
            return _Outcome(held, full, found, None)
        place = own_place(loaded, whole, ids, logits)
        if place is None:
            return _Outcome(held, full, found, self._done.text)
        self._tally.own_answers += 1
        if not cut.take_back(len(ids) - 1 - place):
            del cut
            cut = whole.cut(cuts, room)
            advance(loaded, cut, torch.tensor([ids[:place]], device=whole.input_ids.device))
        done = decode_after(loaded, cut, ids[:place], logits[place], self._job.max_new_tokens)
        return _Outcome(held, full, found, done.text)

    def _row(self, setting: Setting, rate: float | None, cut_id: str, outcome: _Outcome) -> Row:
        question, found = self._job.question, outcome.divergence
        expected = question.answer
        correct = None
        if expected is not None and outcome.answer is not None:
            correct = is_exact(outcome.answer, expected)
        return Row(
            method=setting.method,
            config=setting.config,
            seed=setting.seed,
            prompt_id=prompt_id(question),
            prompt_index=self._job.index,
            rate=rate,
            kv_bytes_held=outcome.held,
            kv_bytes_full=outcome.full,
            kv_ratio=outcome.held / outcome.full,
            kl_mean=finite(found.kl_mean),
            kl_max=finite(found.kl_max),
            top1_agreement=found.top1_agreement,
            first_divergence=found.first_divergence,
            answer_tokens=len(self._ids),
            answer=outcome.answer if expected is not None or setting.method == BASELINE else None,
            answer_correct=correct,
            decode_tokens_per_s=None,
            cut_id=cut_id,
            model=self._loaded.name,
            tool_version=__version__,
            prompt_tokens=self._whole.state.prompt_tokens,
            vision_tokens=self._vision_tokens,
        )


def check_settings(loaded: "LoadedModel", settings: Sequence[Setting]) -> None:
    """Refuse a model, or layers to skip, before any work. Raises what `prune` raises."""
    # Every config of a grid skips the same layers.
    with prune(loaded.model, next((s.config for s in settings if s.config is not None), None)):
        pass
