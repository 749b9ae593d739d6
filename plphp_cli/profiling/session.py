"""The work of `plphp profile`, in its order; what is known at any moment can be recorded."""

import dataclasses
import gc
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from plphp_cli.attention import prune
from plphp_cli.compiled import StepCompiler, caveats
from plphp_cli.config import PLPHPConfig
from plphp_cli.decoding import step_compiler
from plphp_cli.memory import known
from plphp_cli.models import LoadedModel, is_out_of_memory, prepare
from plphp_cli.models.dummy import check_room, dummy_prompt
from plphp_cli.prefilling import prefill
from plphp_cli.products import remarks
from plphp_cli.profiling.answers import Answers, answer_with, judge, stock_answer
from plphp_cli.profiling.bound import Limits
from plphp_cli.profiling.circumstances import circumstances, figures_of, fresh_job
from plphp_cli.profiling.compose import compose
from plphp_cli.profiling.fresh import load_model, measure_fresh
from plphp_cli.profiling.layers import check_bytes, layer_profiles
from plphp_cli.profiling.machine import how_busy, measure_machine
from plphp_cli.profiling.pace import Pace, Progress
from plphp_cli.profiling.records import PRUNED, STOCK, UNPRUNED, ProfileRecord
from plphp_cli.profiling.schedule import CONTROL, alternated, slots
from plphp_cli.profiling.state import KVBytes, ModelFigures, ProfileRequest, PromptState
from plphp_cli.profiling.timing import Arm, PathArm, StockArm, Timer, time_pruning, time_vision
from plphp_cli.prompt import Prompt
from plphp_cli.pruning import Policy
from plphp_cli.results import CompileRecord
from plphp_cli.stopwatch import Clock
from plphp_cli.support import layer_kinds

# Passes of their own for the prune time: enough for a median, and a prefill each.
PRUNE_PASSES = 3
# Seconds that a fresh process, and measuring the machine, take about: for the progress bar alone.
FRESH_S, MACHINE_S = 6.0, 2.0


class ProfileSession:
    """One profile.

    Args:
        request: what to measure.
        progress: shown before each piece of work.
        check: called between pieces; raises `KeyboardInterrupt` when the user wants to stop.
        clock: seconds, for tests; None is the real one.
    """

    def __init__(
        self,
        request: ProfileRequest,
        progress: Callable[[Progress], None] = lambda progress: None,
        check: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
    ) -> None:
        self._request, self._check, self._clock = request, check, clock
        self._slots = slots(request.arms)
        self.states = [
            PromptState(index, question, request.max_new_tokens == 1, request.batch_size)
            for index, question in enumerate(request.questions)
        ]
        self._pace = Pace(self._plan(), progress)
        self._policy: PLPHPConfig | Policy = request.config
        self._compiler: StepCompiler | None = None
        self._loaded: LoadedModel | None = None
        self._figures: ModelFigures | None = None
        self._limits = Limits()
        self._environment: dict[str, Any] = {}
        self._warnings: list[str] = []

    @property
    def loaded(self) -> bool:
        """Whether the model is there."""
        return self._loaded is not None

    @property
    def started(self) -> bool:
        """Whether there is anything to report."""
        return any(state.prefills for state in self.states)

    def load(self) -> None:
        """Load the model and note the circumstances."""
        request = self._request
        # Before the model is there, too: what is interrupted while it loads says under which circumstances.
        self._environment |= circumstances(request, None)
        self._note_machine()
        start = time.monotonic()
        self._loaded = loaded = load_model(request.model, request.options, request.dummy)
        self._warnings.extend(loaded.warnings)
        if request.compile:
            self._compiler = step_compiler(loaded)
            self._warnings.extend(caveats(loaded))
        if request.dummy is not None:
            layers = len(layer_kinds(loaded.model.config))
            request.dummy.check_layers(layers, request.model)
            self._policy = request.dummy.policy(layers)
            check_room(loaded, request.dummy.vision_tokens + request.dummy.text_tokens, request.batch_size)
        # A fresh process imports, loads and runs once more.
        self._pace.expect("peaks", FRESH_S + time.monotonic() - start)
        self._pace.expect("machine", MACHINE_S)
        self._figures = figures_of(request, loaded)
        self._environment |= circumstances(request, loaded)

    def run(self) -> None:
        """Measure every prompt, then the machine, then peaks in fresh processes."""
        for state in self.states:
            self._look(state)
            if state.prompt is not None:
                self._time(state)
        assert self._loaded is not None
        device, dtype = self._loaded.device, self._loaded.dtype
        self._release()
        with self._pace.piece("machine", "bandwidth and rate of this device"):
            machine = measure_machine(device, dtype)
            self._limits = Limits(**dataclasses.asdict(machine), cpu=device.type == "cpu")
        self._check()
        for arm in self._request.arms:
            self._measure_peaks(arm)

    def record(self, interrupted: bool = False) -> ProfileRecord:
        """Everything known so far."""
        state = self._environment.get("machine_state")
        if isinstance(state, dict):
            state["load_average_at_end"] = known(lambda: list(os.getloadavg()))
        loaded = self._loaded
        return compose(
            self._request,
            self.states,
            model=self._request.model if loaded is None else loaded.name,
            figures=self._figures,
            limits=self._limits,
            environment=self._environment,
            warnings=[*self._warnings, *self._remarks()],
            interrupted=interrupted,
            compiled=None if self._compiler is None else CompileRecord.from_stats(self._compiler.stats),
        )

    def _plan(self) -> Counter[str]:
        request = self._request
        prompts, rounds = len(request.questions), request.repeats + request.warmup
        each = rounds * len(self._slots)
        return Counter(
            {
                "prepare": prompts,
                "answer": prompts * len(request.arms),
                "judge": prompts * 2,
                "prefill": prompts * each,
                "pruning": prompts * PRUNE_PASSES,
                "decode": prompts * each if request.max_new_tokens > 1 else 0,
                "machine": 1,
                "peaks": len(request.arms),
            }
        )

    def _note_machine(self) -> None:
        """Whether others use the CPU, while this process does nothing."""
        self._environment["busy_share_before"], warning = how_busy()
        if warning is not None:
            self._warnings.append(warning)

    def _stage(self, state: PromptState, text: str) -> str:
        count = len(self.states)
        return text if count == 1 else f"prompt {state.index + 1} of {count}: {text}"

    def _look(self, state: PromptState) -> None:
        """Everything but times: texts, quality, layers, bytes."""
        request, loaded, question = self._request, self._loaded, state.question
        assert loaded is not None
        with self._pace.piece("prepare", self._stage(state, "preprocessing")):
            self._guarded(state, None, lambda: self._prepare(state))
        if state.prompt is None:
            state.failed |= dict.fromkeys(request.arms, "out of memory")
            for kind in ("answer", "judge", "prefill", "pruning", "decode"):
                self._pace.drop(kind, self._plan()[kind] // len(self.states))
            return
        self._warnings += [note for note in state.prompt.notes if note not in self._warnings]
        if request.dummy is not None:
            # Random weights answer nothing, and their answers cannot be judged.
            self._pace.drop("answer", len(request.arms))
            self._pace.drop("judge", 1)
            self._guarded(state, PRUNED, lambda: self._map_layers(state))
            return
        state.answers = answers = Answers(answer=question.answer)
        for arm in request.arms:
            with self._pace.piece("answer", self._stage(state, f"{arm} arm, its answer")):
                self._guarded(state, arm, partial(self._answer, state, arm))
            self._check()
        with self._pace.piece("judge", self._stage(state, "where the attention goes")):
            self._guarded(state, PRUNED, lambda: self._map_layers(state))
        self._check()
        with self._pace.piece("judge", self._stage(state, "quality, teacher-forced")):
            if {PRUNED, UNPRUNED} <= set(request.arms) - state.failed.keys() and answers.ids:
                self._guarded(state, None, lambda: judge(loaded, _of(state), request.config, answers))
        if not answers.finite:
            self._warnings.append(self._stage(state, "the model's logits are not finite, so KL is not known"))
        self._check()

    def _prepare(self, state: PromptState) -> None:
        """As often as is timed; nothing of it is kept if memory ends."""
        request, loaded, question = self._request, self._loaded, state.question
        assert loaded is not None
        if request.dummy is not None:
            plan = request.dummy
            state.prompt = dummy_prompt(loaded, plan.vision_tokens, plan.images, plan.text_tokens, plan.seed)
            return
        rounds = request.warmup + request.repeats
        seconds = []
        for _ in range(rounds):
            prompt = prepare(loaded, question.images, question.prompt, question.system)
            seconds.append(prompt.preprocess_s)
        state.prompt, state.preprocess_s = prompt, seconds[request.warmup :]

    def _answer(self, state: PromptState, arm: str) -> None:
        request, loaded, answers = self._request, self._loaded, state.answers
        assert loaded is not None
        assert answers is not None
        if arm == STOCK:
            answers.texts[arm], ids = stock_answer(loaded, _of(state), request.max_new_tokens)
        else:
            config = request.config if arm == PRUNED else None
            answers.texts[arm], ids = answer_with(loaded, _of(state), config, request.max_new_tokens)
        answers.first_tokens[f"{arm} answer"] = ids[0]
        if arm == UNPRUNED:
            answers.ids = ids

    def _map_layers(self, state: PromptState) -> None:
        loaded = self._loaded
        assert loaded is not None
        with prune(loaded.model, self._policy, keep_attention=True) as pruner:
            layers = layer_profiles(prefill(loaded, _of(state), pruner, self._request.max_new_tokens).state)
        if self._request.dummy is not None:
            # Random weights attend to nothing in particular: what they kept is known, why is not.
            layers = tuple(
                dataclasses.replace(layer, gamma=None, head_overlap=None, heads=(), image_shares=())
                for layer in layers
            )
        state.layers = layers

    def _time(self, state: PromptState) -> None:
        """Prefill in alternated rounds, then the passes of their own, then decoding in alternated rounds."""
        request, loaded = self._request, self._loaded
        assert loaded is not None
        prompt, device = _of(state), loaded.device
        timer = Timer(device) if self._clock is None else Timer(device, self._clock)
        arms = self._arms(prompt, timer)
        for repeat, slot in alternated(self._slots, request.warmup + request.repeats):
            sample = self._round(state, arms, slot, "prefill", repeat)
            if sample is not None and repeat >= request.warmup:
                state.prefills.setdefault(slot, []).append(sample)
        for _ in range(request.warmup + request.repeats):
            self._guarded(state, None, lambda: self._time_vision(state, timer))
        del state.vision_s[: request.warmup]
        for number in range(PRUNE_PASSES):
            with self._pace.piece("pruning", self._stage(state, f"pruning itself, pass {number + 1}")):
                self._guarded(state, PRUNED, lambda: self._time_pruning(state, timer))
            self._check()
        if request.max_new_tokens > 1:
            for repeat, slot in alternated(self._slots, request.warmup + request.repeats):
                sample = self._round(state, arms, slot, "decode", repeat)
                if sample is not None and repeat >= request.warmup:
                    state.decodes.setdefault(slot, []).append(sample)
        for arm in arms.values():
            arm.drop()

    def _arms(self, prompt: Any, timer: Timer) -> dict[str, Arm]:
        request, loaded = self._request, self._loaded
        assert loaded is not None
        count = request.max_new_tokens
        batch, compiler = request.batch_size, self._compiler
        unpruned = PathArm(loaded, prompt, None, count, timer, batch, compiler)
        every: dict[str, Arm] = {
            PRUNED: PathArm(loaded, prompt, self._policy, count, timer, batch, compiler),
            UNPRUNED: unpruned,
            CONTROL: unpruned,
            STOCK: StockArm(loaded, prompt, count, timer, batch),
        }
        return {slot: every[slot] for slot in self._slots}

    def _round(self, state: PromptState, arms: dict[str, Arm], slot: str, kind: str, repeat: int) -> Any:
        """One sample of one slot; None if its arm has failed."""
        arm = UNPRUNED if slot == CONTROL else slot
        if arm in state.failed:
            self._pace.drop(kind)
            return None
        number = repeat + 1 - self._request.warmup
        which = "warm-up" if number < 1 else f"{number} of {self._request.repeats}"
        name = "A/A control" if slot == CONTROL else f"{slot} arm"
        with self._pace.piece(kind, self._stage(state, f"{kind}, {name}, {which}")):
            sample = self._guarded(state, arm, getattr(arms[slot], kind))
        if sample is None:
            arms[slot].drop()
        elif kind == "prefill" and arm not in state.kv:
            state.kv[arm] = self._kv(arms[slot], arm)
        self._check()
        return sample

    def _kv(self, arm: Arm, name: str) -> KVBytes:
        if isinstance(arm, StockArm):
            # Its storages have no room to spare; concatenation grows them as tokens come.
            return KVBytes(arm.held_bytes, arm.allocated_bytes)
        assert isinstance(arm, PathArm)
        assert arm.prefilled is not None
        config = self._request.config if name == PRUNED else None
        return KVBytes(*check_bytes(arm.prefilled.state, self._request.max_new_tokens, config, name))

    def _time_vision(self, state: PromptState, timer: Timer) -> None:
        assert self._loaded is not None
        seconds = time_vision(self._loaded, _of(state), timer)
        if seconds is not None:
            state.vision_s.append(seconds)

    def _time_pruning(self, state: PromptState, timer: Timer) -> None:
        request, loaded = self._request, self._loaded
        assert loaded is not None
        prune_s, prefill_s = time_pruning(loaded, _of(state), self._policy, request.max_new_tokens, timer)
        state.prune_s.append(prune_s)
        if prefill_s > 0:
            state.prune_shares.append(prune_s / prefill_s)

    def _guarded(self, state: PromptState, arm: str | None, work: Callable[[], Any]) -> Any:
        """What `work` returns; out of memory ends the arm (or, without one, only this work) and is noted."""
        if arm in state.failed:
            return None
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if arm is not None:
            state.failed[arm] = "out of memory"
        self._warnings.append(f"{self._stage(state, arm or 'a pass')}: out of memory")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _remarks(self) -> list[str]:
        """What is known of the model's products while it is here."""
        return [] if self._loaded is None or self._loaded.model is None else remarks(self._loaded.model)

    def _release(self) -> None:
        """Let the model go: fresh processes load their own."""
        assert self._loaded is not None
        self._warnings += self._remarks()
        self._loaded = dataclasses.replace(self._loaded, model=None, processor=None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _measure_peaks(self, arm: str) -> None:
        request, loaded = self._request, self._loaded
        assert loaded is not None
        job = fresh_job(request, loaded, arm)
        with self._pace.piece("peaks", f"peak memory, {arm} arm in a fresh process"):
            found = measure_fresh(job)
        for state, peaks in zip(self.states, found, strict=True):
            state.peaks[arm] = peaks
        if failed := sorted({peaks.failed for peaks in found if peaks.failed}):
            self._warnings.append(f"peak memory of the {arm} arm is not known: {failed[0]}")
        if unknown := sorted({peaks.decode_unknown for peaks in found if peaks.decode_unknown}):
            self._warnings.append(f"peak memory of the {arm} arm's decoding is not known: {unknown[0]}")
        self._check()


def _of(state: PromptState) -> Prompt:
    assert state.prompt is not None
    return state.prompt
