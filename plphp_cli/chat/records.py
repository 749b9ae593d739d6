"""What a conversation came to, turn by turn; no torch here."""

from dataclasses import dataclass, field
from typing import Any

from plphp_cli.config import PLPHPConfig
from plphp_cli.results import GenerationRecord, ImageRecord, LayerRecord
from plphp_cli.serialize import SCHEMA_VERSION, parse

# When the cache is cut: for each question, or for the first (and whenever it has to start over).
EACH_TURN, FIRST_TURN = "each-turn", "first-turn"
RECUTS = (EACH_TURN, FIRST_TURN)
CONTINUED, STARTED_OVER = "continued", "started over"


@dataclass(frozen=True)
class TurnQuality:
    """What a turn's cut costs, along the unpruned greedy answer to the same full prompt.

    KL(unpruned || pruned) in nats a token. Of a turn that continued all positions count, because its first
    token comes from the cut cache, too; else position 1 is left out, which costs nothing by construction.
    `*_cut_anew` is what the cut would have cost had it been made for this question; null where it was.
    Figures are null where no position counts, or where logits are not finite.
    """

    unpruned_text: str
    positions: int
    kl_mean: float | None
    kl_max: float | None
    top1_agreement: float | None
    kl_mean_cut_anew: float | None = None
    top1_agreement_cut_anew: float | None = None


@dataclass(frozen=True)
class TurnRecord:
    """One question and its answer.

    `how` is `continued` (the cut cache went on; the next tokens attend to what it holds) or `started over`
    (the whole conversation was prefilled and cut anew), `why` the reason for that. `fed_tokens` of the
    `prompt_tokens` went through the model; `kv_bytes_held` is the cache of the prompt after that, and
    `kv_bytes_full` what it would be had nothing ever been cut. `images` are those that joined at this turn.
    `stop_reason` is `eos`, `stop`, `length`, `interrupted` or `failed`.
    """

    question: str
    images: tuple[ImageRecord, ...]
    how: str | None = None
    why: str | None = None
    answer: str = ""
    token_ids: tuple[int, ...] = ()
    stop_reason: str | None = None
    prompt_tokens: int | None = None
    vision_tokens: int | None = None
    fed_tokens: int | None = None
    kv_bytes_held: int | None = None
    kv_bytes_full: int | None = None
    preprocess_s: float | None = None
    prefill_s: float | None = None
    ttft_s: float | None = None
    decode_tokens_per_s: float | None = None
    layers: tuple[LayerRecord, ...] = ()
    quality: TurnQuality | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatRecord:
    """Everything that `plphp run --chat` has to say."""

    model: str
    config: PLPHPConfig
    system: str | None
    generation: GenerationRecord
    recut: str
    turns: tuple[TurnRecord, ...]
    environment: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    command: str = "run --chat"
    schema_version: int = SCHEMA_VERSION


def from_json(text: str) -> ChatRecord:
    """The record that `to_json` wrote. Raises `RecordError` as `results.from_json` does."""
    return parse(ChatRecord, text)
