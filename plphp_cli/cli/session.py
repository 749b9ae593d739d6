"""The work of `plphp run`: both arms of one prompt. What is known at any moment survives an interruption."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from plphp_cli import parallel
from plphp_cli.cli.loading import identity, load_model, model_notes, settings_of
from plphp_cli.config import PLPHPConfig
from plphp_cli.images import LoadedImage
from plphp_cli.memory import MemorySampler, MemorySnapshot
from plphp_cli.models.options import LoadOptions
from plphp_cli.reports.profile_text import compiled_steps
from plphp_cli.reports.snapshot import DECODING, DONE, INTERRUPTED, PREFILL, ArmSnapshot, LiveSnapshot
from plphp_cli.reports.terminal import config_line
from plphp_cli.results import (
    ArmRecord,
    BoundRecord,
    CompileRecord,
    GenerationRecord,
    ImageRecord,
    LayerRecord,
    MemoryByArm,
    MemoryRecord,
    RankRecord,
    RunRecord,
    decode_bound,
    run_ratios,
)

if TYPE_CHECKING:
    from plphp_cli.compiled import StepCompiler
    from plphp_cli.models import LoadedModel
    from plphp_cli.prompt import Prompt
    from plphp_cli.sampling import Settings

PRUNED, UNPRUNED = "pruned", "unpruned"
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class RunRequest:
    """What the user asked for, checked as far as that is possible without the model."""

    images: tuple[LoadedImage, ...]
    prompt: str
    system: str | None
    model: str
    config: PLPHPConfig
    config_origin: str
    generation: GenerationRecord
    baseline: bool
    options: LoadOptions
    command: tuple[str, ...]
    raw_prompt: bool = False
    compile: bool = False


class RunSession:
    """One run. The main thread works; another thread may read `snapshot` at any time.

    Args:
        request: what to run.
        say: takes notes for the user.
        answer: takes the pruned arm's text, piece by piece.
        check: called between tokens; raises `KeyboardInterrupt` when the user wants to stop.
    """

    def __init__(
        self,
        request: RunRequest,
        say: Callable[[str], None],
        answer: Callable[[str], None],
        check: Callable[[], None],
    ) -> None:
        self._request = request
        self._say, self._answer, self._check = say, answer, check
        self._loaded: LoadedModel | None = None
        self._compiler: StepCompiler | None = None
        self._prompt: Prompt | None = None
        self._sampler: MemorySampler | None = None
        self._memory: dict[str, MemoryRecord] = {}
        self._stop_reasons: dict[str, str] = {}
        self._token_ids: dict[str, list[int]] = {PRUNED: [], UNPRUNED: []}
        self._ranks: dict[str, tuple[RankRecord, ...]] = {}
        self._view = LiveSnapshot(
            title=f"plphp run  {request.model}",
            config=f"{request.config_origin}: {config_line(request.config)}",
            stage="loading",
            pruned=ArmSnapshot(PRUNED),
            unpruned=ArmSnapshot(UNPRUNED) if request.baseline else None,
        )

    @property
    def snapshot(self) -> LiveSnapshot:
        """Everything a view shows, as of now."""
        sampler = self._sampler
        return replace(self._view, memory=MemorySnapshot() if sampler is None else sampler.latest)

    @property
    def loaded(self) -> bool:
        """Whether the model is there."""
        return self._loaded is not None

    @property
    def answered(self) -> bool:
        """Whether the pruned arm is complete."""
        return self._view.pruned.phase == DONE

    @property
    def started(self) -> bool:
        """Whether there is anything to report."""
        return self._view.pruned.prefill_s is not None

    def load(self) -> None:
        """Load the model and prepare the prompt. Raises what `models.load` and `models.prepare` raise."""
        request = self._request
        self._loaded = loaded = load_model(request.model, request.options, self._say, self._check)
        self._prepare()
        self._prepare()  # the first time is a warm-up: processors set themselves up
        assert self._prompt is not None
        images, prompt = len(request.images), self._prompt
        what = (
            f"{identity(loaded)}, {images} image{'s'[: images != 1]}, "
            f"{prompt.prompt_tokens} tokens, {prompt.vision_tokens} vision"
        )
        for note in (*model_notes(loaded), *prompt.notes, *self._caveats()):
            self._say(f"note: {note}")
        self._say(what)
        self._view = replace(
            self._view, title=f"plphp run  {what}", stage="warm-up", vision_tokens=prompt.vision_tokens
        )

    def warm_up(self) -> None:
        """One short pass of the pruned arm that counts for nothing; to be compiled, of the unpruned too.

        A captured step is for caches of about one capacity: each arm has its own, with the room for a whole
        answer. Otherwise the unpruned arm would compile while it is timed.
        """
        self._view = replace(self._view, stage="warm-up, discarded")
        request = self._request
        whole = request.generation.max_new_tokens
        policies = (request.config, None) if request.compile and request.baseline else (request.config,)
        assert self._loaded is not None
        with MemorySampler(self._loaded.device) as self._sampler:
            for policy in policies:
                room = whole if request.compile else min(WARM_UP_TOKENS, whole)
                self._pass(self._stream(policy, settings_of(request.generation, room)))

    def _pass(self, events: Any) -> None:
        """The first tokens of a stream, to no end; it is closed, so that the model is restored."""
        try:
            # The prefill is an event, too.
            for _ in itertools.islice(events, 1 + WARM_UP_TOKENS):
                self._check()
        finally:
            events.close()

    def run_arm(self, name: str) -> None:
        """Generate with the config (`pruned`) or with scoring and cutting switched off (`unpruned`)."""
        assert self._prompt is not None
        assert self._loaded is not None
        number = f"{1 if name == PRUNED else 2} of {2 if self._request.baseline else 1}"
        self._view = replace(self._view, stage=f"{name} arm, {number}")
        arm = ArmSnapshot(
            name,
            PREFILL,
            preprocess_s=self._prompt.preprocess_s,
            prompt_tokens=self._prompt.prompt_tokens,
        )
        self._show(arm)
        policy = self._request.config if name == PRUNED else None
        settings = settings_of(self._request.generation)
        sampler = MemorySampler(self._loaded.device)
        try:
            with sampler:
                self._sampler = sampler
                self._follow(arm, self._stream(policy, settings))
        finally:
            self._memory[name] = sampler.record()

    def interrupt(self) -> None:
        """Mark the arm that was at work as interrupted."""
        for arm in (self._view.pruned, self._view.unpruned):
            if arm is not None and arm.phase in (PREFILL, DECODING):
                self._show(replace(arm, phase=INTERRUPTED))
                self._stop_reasons[arm.name] = INTERRUPTED
        if self._view.pruned.phase not in (DONE, INTERRUPTED):
            self._stop_reasons[PRUNED] = INTERRUPTED

    def record(self, interrupted: bool, notes: Sequence[str] = ()) -> RunRecord:
        """What is known so far, as a record."""
        from plphp_cli.environment import environment

        request, prompt, loaded = self._request, self._prompt, self._loaded
        pruned = self._arm_record(self._view.pruned)
        unpruned = self._view.unpruned
        compared = None
        if unpruned is not None and unpruned.phase in (DONE, INTERRUPTED):
            compared = self._arm_record(unpruned)
        return RunRecord(
            model=request.model if loaded is None else loaded.name,
            config=request.config,
            prompt=request.prompt,
            system=request.system,
            generation=request.generation,
            prompt_tokens=None if prompt is None else prompt.prompt_tokens,
            vision_tokens=None if prompt is None else prompt.vision_tokens,
            images=tuple(_image_record(image) for image in request.images),
            pruned=pruned,
            unpruned=compared,
            layers=self._view.pruned.layers,
            memory=MemoryByArm(
                self._memory.get(PRUNED), None if compared is None else self._memory.get(UNPRUNED)
            ),
            environment=environment(
                loaded=loaded,
                config=request.config,
                seed=request.generation.seed,
                command=request.command,
                images=request.images,
                prompt=request.prompt,
            ),
            ratios=run_ratios(pruned, compared),
            bound=self._bound(pruned),
            ranks=parallel.by_arm(self._ranks),
            compiled=None if self._compiler is None else CompileRecord.from_stats(self._compiler.stats),
            notes=(
                *(() if loaded is None else loaded.warnings),
                *(() if prompt is None else prompt.notes),
                *self._caveats(),
                *self.engine_notes(),
                *notes,
            ),
            interrupted=interrupted,
        )

    def _caveats(self) -> list[str]:
        from plphp_cli.compiled import caveats

        return caveats(self._loaded) if self._request.compile and self._loaded is not None else []

    def engine_notes(self) -> list[str]:
        """How the engine decoded, where that is not as always: compiled steps, products by another way."""
        from plphp_cli.products import remarks

        found = [] if self._loaded is None else remarks(self._loaded.model)
        if self._compiler is not None:
            # A run decodes four times at most, its warm-ups included.
            found.append(compiled_steps(CompileRecord.from_stats(self._compiler.stats)))
        return found

    def _prepare(self) -> None:
        from plphp_cli.models import prepare

        assert self._loaded is not None
        request = self._request
        self._prompt = prepare(
            self._loaded, request.images, request.prompt, request.system, raw=request.raw_prompt
        )
        self._check()

    def _stream(self, policy: PLPHPConfig | None, settings: "Settings") -> Any:
        from plphp_cli.decoding import step_compiler
        from plphp_cli.generate import stream

        assert self._prompt is not None
        assert self._loaded is not None
        if self._request.compile and self._compiler is None:
            # The warm-up compiles and captures; both arms then decode by what it left.
            self._compiler = step_compiler(self._loaded)
        return stream(self._loaded, self._prompt, policy, settings, self._compiler)

    def _follow(self, arm: ArmSnapshot, events: Any) -> None:
        """Show each event of a stream; close the stream whatever happens, so that the model is restored."""
        from plphp_cli.decoding import Done, Token
        from plphp_cli.generate import PrefillDone

        try:
            for event in events:
                match event:
                    case PrefillDone():
                        assert self._loaded is not None
                        states, self._ranks[arm.name] = parallel.gathered(self._loaded.model, event.layers)
                        layers = tuple(LayerRecord.from_state(state) for state in states)
                        arm = replace(arm, phase=DECODING, prefill_s=event.prefill_s, layers=layers)
                    case Token():
                        self._token_ids[arm.name].append(event.token_id)
                        arm = arm.with_token(event.text, event.elapsed_s)
                        if arm.name == PRUNED:
                            self._answer(event.text)
                    case Done():
                        self._stop_reasons[arm.name] = event.stop_reason
                        arm = replace(arm, phase=DONE, text=event.text)
                self._show(arm)
                self._check()
        finally:
            events.close()

    def _show(self, arm: ArmSnapshot) -> None:
        self._view = (
            replace(self._view, pruned=arm) if arm.name == PRUNED else replace(self._view, unpruned=arm)
        )

    def _arm_record(self, arm: ArmSnapshot) -> ArmRecord:
        # An interruption may fall between an id and its time: what is recorded has both.
        count = len(arm.elapsed_s)
        return ArmRecord.from_stream(
            text=arm.text,
            token_ids=self._token_ids[arm.name][:count],
            elapsed_s=arm.elapsed_s,
            preprocess_s=arm.preprocess_s,
            prefill_s=arm.prefill_s,
            stop_reason=self._stop_reasons.get(arm.name),
            layers=arm.layers,
        )

    def _bound(self, pruned: ArmRecord) -> BoundRecord | None:
        from plphp_cli.models import decoder_weight_bytes

        held, full, prompt = pruned.kv_bytes_held, pruned.kv_bytes_full, self._prompt
        if self._loaded is None or prompt is None or held is None or full is None:
            return None
        # Over the answer the new tokens' cache grows from nothing: half of it on average.
        new_token_bytes = full / prompt.prompt_tokens * pruned.decode_steps / 2
        return decode_bound(decoder_weight_bytes(self._loaded), held, full, new_token_bytes)


def _image_record(image: LoadedImage) -> ImageRecord:
    width, height = image.image.size
    return ImageRecord(image.path, image.sha256, width, height, *image.original_size, image.notes)
