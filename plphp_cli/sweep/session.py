"""The work of `plphp sweep`, in its order: what was measured is kept at once, and can be recorded."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from plphp_cli.environment import environment, sha256_of_text
from plphp_cli.memory import known
from plphp_cli.models import LoadedModel, load
from plphp_cli.profiling.machine import how_busy
from plphp_cli.profiling.timing import Timer
from plphp_cli.results import ImageRecord
from plphp_cli.sweep.ablations import ablations
from plphp_cli.sweep.coverage import coverage
from plphp_cli.sweep.identity import identity
from plphp_cli.sweep.points import points
from plphp_cli.sweep.progress import SweepProgress
from plphp_cli.sweep.recommendation import recommend
from plphp_cli.sweep.records import (
    BASELINE,
    Cost,
    Point,
    PromptRecord,
    Row,
    Setting,
    Skipped,
    SweepRecord,
)
from plphp_cli.sweep.request import NONE, SweepRequest, prompt_id
from plphp_cli.sweep.speed import samples, speeds, timed_row, to_time
from plphp_cli.sweep.store import Store
from plphp_cli.sweep.work import Job, Refused, Tally, check_settings, measure_prompt

# How often at most the best so far is worked out anew while rows come in.
LOOK_S = 2.0


class SweepSession:
    """One sweep; a context that holds the folder of results.

    Args:
        request: what to measure; its prompts differ from each other.
        show: takes the progress, before each prompt and after each row.
        check: called between rows; raises `KeyboardInterrupt` when the user wants to stop.

    Raises:
        UsageError: the folder cannot be used or continued, with the reason.
    """

    def __init__(
        self,
        request: SweepRequest,
        show: Callable[[SweepProgress], None] = lambda progress: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._request, self._show, self._check = request, show, check
        self._settings = list(request.grid.settings)
        self._skipped = list(request.grid.skipped)
        self._ids = [prompt_id(question) for question in request.questions]
        self._warnings = list(request.grid.warnings)
        self._environment: dict[str, Any] = {}
        self._loaded: LoadedModel | None = None
        self._tally, self._measured, self._paced = Tally(), 0, 0
        self._start = self._measuring = self._looked = time.monotonic()
        self._best: tuple[Point, ...] = ()
        self._stage = ""
        self._spreads = request.workers > 1 or request.ray_address is not None
        self._store = Store(request.out, identity(request), request.questions, request.resume)
        self._done = self._store.count(self._settings, self._ids)

    def __enter__(self) -> "SweepSession":
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    @property
    def started(self) -> bool:
        """Whether there is anything to report."""
        return bool(self.rows())

    def rows(self) -> list[Row]:
        """What is known of the sweep's settings and prompts, prompt by prompt, in the order of the grid."""
        found = []
        for index, prompt in enumerate(self._ids):
            for setting in self._settings:
                if (row := self._row(setting, prompt, index)) is not None:
                    found.append(row)
        return found

    def prepare(self) -> None:
        """Note the circumstances, and load the model if this process is to run it."""
        self._environment["busy_share_before"], warning = how_busy()
        if warning is not None and self._request.measure_speed != NONE:
            self._warnings.append(warning)
        if not self._spreads:
            self._load()

    def run(self) -> None:
        """Measure what the folder lacks: quality prompt by prompt, then speed."""
        if self._spreads:
            self._spread()
        else:
            self._measure_here()
        self._time()

    def record(self, interrupted: bool = False) -> SweepRecord:
        """Everything known so far, that of earlier invocations included."""
        request, rows, prompts = self._request, self.rows(), self._prompts()
        found = points(rows, prompts, request.constraint, speeds=speeds(rows))
        warnings = [*self._warnings, *self._tally.notes, *coverage(rows, prompts).warnings()]
        return SweepRecord(
            model=request.model if self._loaded is None else self._loaded.name,
            constraint=request.constraint,
            grid=request.grid.values,
            prompts=prompts,
            points=found,
            recommendation=recommend(found, request.constraint) if found else None,
            skipped=tuple(self._skipped),
            cost=self._cost(len(rows)),
            rows_done=len(rows),
            rows_expected=len(self._settings) * len(self._ids),
            environment=self._circumstances(),
            warnings=tuple(dict.fromkeys(warnings)),
            interrupted=interrupted,
            ablations=ablations(rows, prompts),
        )

    def _row(self, setting: Setting, prompt: str, index: int) -> Row | None:
        row = self._store.get(setting, prompt)
        # Where a prompt stands, and where its config was found, are this invocation's.
        return None if row is None else dataclasses.replace(row, config=setting.config, prompt_index=index)

    def _jobs(self) -> list[Job]:
        """The prompts that lack settings, with those."""
        jobs = []
        for index, (question, prompt) in enumerate(zip(self._request.questions, self._ids, strict=True)):
            missing = [s for s in self._settings if self._store.get(s, prompt) is None]
            if missing:
                jobs.append(Job(index, question, tuple(missing), self._request.max_new_tokens))
        return jobs

    def _load(self) -> LoadedModel:
        if self._loaded is None:
            request = self._request
            self._tell(f"loading {request.model}")
            self._loaded = load(request.model, request.options)
            self._warnings.extend(self._loaded.warnings)
            check_settings(self._loaded, self._settings)
            self._check()
        return self._loaded

    def _measure_here(self) -> None:
        self._measuring = time.monotonic()
        for job in self._jobs():
            self._tell(f"prompt {job.index + 1} of {len(self._ids)}")
            with contextlib.closing(measure_prompt(self._load(), job, self._tally)) as outcomes:
                for outcome in outcomes:
                    self._take(outcome)
                    self._check()

    def _spread(self) -> None:
        from plphp_cli.sweep.spread import spread

        self._tell("starting workers")
        self._measuring = time.monotonic()
        with contextlib.closing(spread(self._request, self._jobs(), self._check)) as portions:
            done = 0
            for number, portion in enumerate(portions):
                done += portion.last
                if number == 0:
                    # Until now workers started; from now on the pace is that of their work.
                    self._measuring, self._paced = time.monotonic(), -len(portion.outcomes)
                self._tally.add(portion.tally)
                self._environment.setdefault("workers", {}).update(portion.worker)
                for outcome in portion.outcomes:
                    self._take(outcome)
                self._tell(f"{done} prompt{'s'[: done != 1]} done by workers")

    def _take(self, outcome: Row | Refused) -> None:
        """Keep a row, or drop the setting that could not be measured."""
        if isinstance(outcome, Row):
            self._store.append(outcome)
            self._measured += 1
            self._paced += 1
            self._done += 1
        elif outcome.setting in self._settings:
            self._settings.remove(outcome.setting)
            config = outcome.setting.config
            knobs = {} if config is None else config.to_dict()
            self._skipped.append(Skipped({"method": outcome.setting.method, **knobs}, outcome.reason))
            self._done = self._store.count(self._settings, self._ids)
        self._tell()

    def _time(self) -> None:
        """Decoding speed of the settings that are wanted, on every prompt that lacks one of them."""
        request = self._request
        chosen = to_time(request, points(self.rows(), self._prompts(), request.constraint, intervals=False))
        chosen = tuple(setting for setting in chosen if setting in self._settings)
        untimed = [index for index in range(len(self._ids)) if not self._is_timed(index, chosen)]
        if len(chosen) < 2 or not untimed:
            return
        loaded = self._load()
        timer = Timer(loaded.device)
        each = (len(chosen) + 1) * (request.timed_repeats + request.warmup)
        start, done = time.monotonic(), 0
        for index in untimed:
            taken: dict[Setting | None, list[float]] = {}
            source = samples(loaded, request.questions[index], index, chosen, request, timer)
            with contextlib.closing(source) as pairs:
                for setting, seconds in pairs:
                    if seconds is not None:
                        taken.setdefault(setting, []).append(seconds)
                    done += 1
                    left = (len(untimed) * each - done) * (time.monotonic() - start) / done
                    self._tell(f"speed, prompt {index + 1} of {len(self._ids)}", left)
                    self._check()
            for setting in chosen:
                row = self._row(setting, self._ids[index], index)
                assert row is not None
                control = taken[None] if setting.method == BASELINE else ()
                self._store.append(timed_row(row, taken[setting], control, request.max_new_tokens))

    def _is_timed(self, index: int, chosen: Sequence[Setting]) -> bool:
        rows = [self._row(setting, self._ids[index], index) for setting in chosen]
        return all(row is not None and row.decode_samples_s for row in rows)

    def _tell(self, stage: str | None = None, remaining_s: float | None = None) -> None:
        """Show how far the sweep has come; the best so far is looked at now and then only."""
        now = time.monotonic()
        expected = len(self._settings) * len(self._ids)
        if stage is not None:
            self._stage = stage
        if self._paced > 0 and remaining_s is None:
            remaining_s = (expected - self._done) * (now - self._measuring) / self._paced
        if stage is not None and now - self._looked > LOOK_S:
            self._looked = now
            self._best = points(self.rows(), self._prompts(), self._request.constraint, intervals=False)
        self._show(
            SweepProgress(
                self._done,
                expected,
                remaining_s,
                self._stage,
                self._best,
                self._request.constraint,
                self._title(),
            )
        )

    def _title(self) -> str:
        settings, prompts = len(self._settings), len(self._ids)
        return f"plphp sweep  {self._request.model}, {settings} settings x {prompts} prompts"

    def _prompts(self) -> tuple[PromptRecord, ...]:
        """The prompts, with what their baseline rows know of them."""
        return tuple(self._prompt(index) for index in range(len(self._ids)))

    def _prompt(self, index: int) -> PromptRecord:
        question, prompt = self._request.questions[index], self._ids[index]
        row = self._store.get(Setting(BASELINE, None), prompt)
        return PromptRecord(
            prompt_id=prompt,
            line=question.line,
            prompt=question.prompt,
            system=question.system,
            answer=question.answer,
            images=tuple(ImageRecord.from_image(image) for image in question.images),
            prompt_tokens=None if row is None else row.prompt_tokens,
            vision_tokens=None if row is None else row.vision_tokens,
            unpruned_answer=None if row is None else row.answer,
            unpruned_correct=None if row is None else row.answer_correct,
        )

    def _cost(self, rows: int) -> Cost:
        tally = self._tally
        return Cost(
            wall_s=time.monotonic() - self._start,
            prefill_s=tally.prefill_s,
            rows=self._measured,
            resumed_rows=rows - self._measured,
            prefills=tally.prefills,
            chunks=tally.chunks,
            shared_cuts=tally.shared_cuts,
            own_answers=tally.own_answers,
        )

    def _circumstances(self) -> dict[str, Any]:
        request = self._request
        block = environment(
            loaded=self._loaded,
            seed=0,
            command=request.command or None,
            images=[image for question in request.questions for image in question.images],
            attention_mask="one per layer along an answer, none while decoding what was cut",
        )
        block["questions"] = [
            {"prompt_sha256": sha256_of_text(q.prompt), "image_sha256": [image.sha256 for image in q.images]}
            for q in request.questions
        ]
        state = block.get("machine_state")
        if isinstance(state, dict):
            state["load_average_at_end"] = known(lambda: list(os.getloadavg()))
        return block | self._environment
