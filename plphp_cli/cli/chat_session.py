"""The work of `plphp run --chat`: one conversation. What is known at any moment survives an interruption."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from plphp_cli.chat.records import ChatRecord, TurnRecord
from plphp_cli.cli.loading import identity, load_model, model_notes, settings_of
from plphp_cli.cli.session import RunRequest
from plphp_cli.images import load_image
from plphp_cli.reports.chat import begun_line
from plphp_cli.results import ImageRecord, LayerRecord, decode_rate

if TYPE_CHECKING:
    from plphp_cli.chat.conversation import Begun, Conversation
    from plphp_cli.models import LoadedModel, Turn
    from plphp_cli.prompt import Prompt

INTERRUPTED, FAILED = "interrupted", "failed"


class ChatSession:
    """One conversation on one model.

    Args:
        request: what to run; its images come with the first question, its prompt is not asked by itself.
        recut: when the cache is cut, one of `records.RECUTS`.
        max_pixels: of images that join later.
        say: takes notes for the user.
        answer: takes the text of answers, piece by piece.
        check: called between tokens; raises `KeyboardInterrupt` when the user wants to stop.

    Attributes:
        turns: the records of the turns so far, one broken off included.
    """

    def __init__(
        self,
        request: RunRequest,
        recut: str,
        max_pixels: int | None,
        say: Callable[[str], None],
        answer: Callable[[str], None],
        check: Callable[[], None],
    ) -> None:
        self.turns: list[TurnRecord] = []
        self._request, self._recut, self._max_pixels = request, recut, max_pixels
        self._say, self._answer, self._check = say, answer, check
        self._pending = list(request.images)
        self._shown = list(request.images)
        self._history: list[Turn] = []
        self._noted: set[str] = set()
        self._loaded: LoadedModel | None = None
        self._conversation: Conversation | None = None
        self._prompt: Prompt | None = None

    @property
    def loaded(self) -> bool:
        """Whether the model is there."""
        return self._loaded is not None

    def load(self) -> None:
        """Load the model. Raises what `models.load` raises."""
        request = self._request
        self._loaded = loaded = load_model(request.model, request.options, self._say, self._check)
        from plphp_cli.chat.conversation import Conversation

        self._conversation = Conversation(loaded, request.config, self._recut)
        self._say(f"{identity(loaded)}, recut {self._recut}")
        for note in model_notes(loaded):
            self._say(f"note: {note}")

    def join(self, path: str) -> None:
        """Let an image join with the next question. Raises what `load_image` raises."""
        image = load_image(path, self._max_pixels)
        self._pending.append(image)
        self._shown.append(image)

    def ask(self, question: str) -> None:
        """Ask one question and stream its answer; `turns` then ends with its record, even if broken off.

        A question of which nothing was answered is not part of what is asked next; its images are.

        Raises:
            PLPHPError: the question cannot be asked, or not be answered.
        """
        from plphp_cli.decoding import Done, Token
        from plphp_cli.models import Turn, prepare_turns

        assert self._loaded is not None
        assert self._conversation is not None
        self._prompt = None
        turn = Turn(tuple(self._pending), question)
        prompt = prepare_turns(self._loaded, [*self._history, turn], self._request.system)
        self._check()
        notes = tuple(note for note in prompt.notes if note not in self._noted)
        self._noted.update(notes)
        for note in notes:
            self._say(f"note: {note}")
        images = tuple(map(ImageRecord.from_image, turn.images))
        record = TurnRecord(question, images, stop_reason=INTERRUPTED, notes=notes)
        elapsed_s: list[float] = []
        events = self._conversation.ask(
            prompt, settings_of(self._request.generation), keep_start=self._request.baseline
        )
        try:
            for event in events:
                match event:
                    case Token():
                        elapsed_s.append(event.elapsed_s)
                        ids, text = (*record.token_ids, event.token_id), record.answer + event.text
                        record = replace(record, token_ids=ids, answer=text)
                        self._answer(event.text)
                    case Done():
                        record = replace(record, answer=event.text, stop_reason=event.stop_reason)
                        self._prompt = prompt
                    case _:
                        record = _begun(record, event, prompt)
                        self._say(begun_line(record))
                self._check()
        except Exception as error:
            broken_off = isinstance(error, BrokenPipeError)
            record = replace(record, stop_reason=INTERRUPTED if broken_off else FAILED)
            raise
        finally:
            events.close()
            self.turns.append(_timed(record, elapsed_s))
            if record.token_ids:
                self._history.append(replace(turn, answer=record.answer))
                self._pending.clear()

    def judge(self) -> None:
        """Add to the latest turn what its cut costs, unless it was broken off."""
        from plphp_cli.chat.quality import judge_turn

        if self._prompt is None:
            return
        assert self._loaded is not None
        assert self._conversation is not None
        settings = settings_of(self._request.generation)
        found = judge_turn(self._loaded, self._conversation, self._prompt, settings)
        self.turns[-1] = replace(self.turns[-1], quality=found)

    def record(self, interrupted: bool, notes: Sequence[str] = ()) -> ChatRecord:
        """What is known so far, as a record."""
        from plphp_cli.environment import environment

        request, loaded = self._request, self._loaded
        return ChatRecord(
            model=request.model if loaded is None else loaded.name,
            config=request.config,
            system=request.system,
            generation=request.generation,
            recut=self._recut,
            turns=tuple(self.turns),
            environment=environment(
                loaded=loaded,
                config=request.config,
                seed=request.generation.seed,
                command=request.command,
                images=self._shown,
                prompt="\n".join(turn.question for turn in self.turns),
            ),
            notes=(*(() if loaded is None else loaded.warnings), *notes),
            interrupted=interrupted,
        )


def _begun(record: TurnRecord, event: "Begun", prompt: "Prompt") -> TurnRecord:
    return replace(
        record,
        how=event.how,
        why=event.why,
        prompt_tokens=event.prompt_tokens,
        vision_tokens=prompt.vision_tokens,
        fed_tokens=event.fed_tokens,
        kv_bytes_held=event.kv_bytes_held,
        kv_bytes_full=event.kv_bytes_full,
        preprocess_s=prompt.preprocess_s,
        prefill_s=event.prefill_s,
        layers=tuple(LayerRecord.from_state(state) for state in event.layers),
    )


def _timed(record: TurnRecord, elapsed_s: Sequence[float]) -> TurnRecord:
    """With the times that follow from those of its tokens, in seconds from the start of decoding."""
    before = (record.preprocess_s, record.prefill_s)
    if not elapsed_s or None in before:
        return record
    ttft_s = sum(value for value in before if value is not None) + elapsed_s[0]
    return replace(record, ttft_s=ttft_s, decode_tokens_per_s=decode_rate(elapsed_s))
