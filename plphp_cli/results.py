"""What a command measured: frozen records with units in their names, that round-trip through JSON.

A figure that could not be taken is None (`null`), never 0 and never NaN. `from_json(to_json(x)) == x`.
No torch here: a record can be read and shown on any machine.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from plphp_cli.config import PLPHPConfig
from plphp_cli.serialize import (
    SCHEMA_VERSION,
    RecordError,
    parse,
    to_dict,
    to_json,
)
from plphp_cli.units import finite

__all__ = [
    "SCHEMA_VERSION",
    "ArmRecord",
    "BoundRecord",
    "CompileRecord",
    "GenerationRecord",
    "ImageRecord",
    "LayerRecord",
    "MemoryByArm",
    "MemoryRecord",
    "RankRecord",
    "RanksByArm",
    "RatioRecord",
    "RecordError",
    "RunRecord",
    "decode_bound",
    "decode_rate",
    "from_json",
    "run_ratios",
    "to_dict",
    "to_json",
]

# Fewer steps than this are too short to time a decode rate.
MIN_DECODE_STEPS = 16


@dataclass(frozen=True)
class ImageRecord:
    """One image as it entered the prompt. Sizes are in pixels; `original_*` as the file holds it."""

    path: str
    sha256: str
    width: int
    height: int
    original_width: int
    original_height: int
    notes: tuple[str, ...] = ()

    @classmethod
    def from_image(cls, image: Any) -> Self:
        """The record of one `images.LoadedImage`."""
        (width, height), (original_width, original_height) = image.image.size, image.original_size
        return cls(image.path, image.sha256, width, height, original_width, original_height, image.notes)


@dataclass(frozen=True)
class GenerationRecord:
    """How tokens were chosen, greedy when `temperature` is None, and the texts that ended an answer."""

    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    stop_at_eos: bool = True
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerRecord:
    """One decoder layer after prefill and cut. Bytes are keys + values of the prompt, all KV heads together.

    `vision_tokens_kept` is per KV head (each head of a layer keeps the same number); `kv_bytes_full` is what
    the layer would hold uncut; `kv_bytes_allocated` is its storage with the room for new tokens;
    `clamped` says that the rate left [0, 1] and was clamped.
    """

    index: int
    gamma: float | None
    group: str | None
    rate: float | None
    vision_tokens_kept: int | None
    kv_bytes_held: int | None
    kv_bytes_held_per_head: int | None
    kv_bytes_full: int | None
    kv_bytes_allocated: int | None = None
    kv_heads: int | None = None
    clamped: bool = False

    @classmethod
    def from_state(cls, state: Any) -> Self:
        """The record of one `attention.LayerState`."""
        return cls(
            index=state.index,
            gamma=finite(state.gamma),
            group=state.group,
            rate=finite(state.rate),
            vision_tokens_kept=state.vision_tokens,
            kv_bytes_held=state.held_bytes,
            kv_bytes_held_per_head=state.held_bytes // state.kv_heads if state.kv_heads else None,
            kv_bytes_full=state.full_bytes,
            kv_bytes_allocated=state.allocated_bytes,
            kv_heads=state.kv_heads,
            clamped=state.clamped,
        )


@dataclass(frozen=True)
class ArmRecord:
    """One arm (`pruned` or `unpruned`) of a run: its text, its times (seconds) and its cache (bytes).

    `ttft_s` is preprocessing + prefill + choosing the first token. `decode_tokens_per_s` is null under 16
    decode steps. `kv_bytes_held` is the cache after the cut, prompt only; `kv_bytes_full` had nothing been
    cut; `kv_bytes_allocated` the storages with the room for new tokens. `stop_reason` is `eos`, `stop`,
    `length` or `interrupted`.
    """

    text: str
    new_tokens: int
    stop_reason: str | None = None
    preprocess_s: float | None = None
    prefill_s: float | None = None
    ttft_s: float | None = None
    decode_s: float | None = None
    decode_steps: int = 0
    decode_tokens_per_s: float | None = None
    kv_bytes_held: int | None = None
    kv_bytes_full: int | None = None
    kv_bytes_allocated: int | None = None
    token_ids: tuple[int, ...] = ()

    @classmethod
    def from_stream(
        cls,
        *,
        text: str,
        token_ids: Sequence[int],
        elapsed_s: Sequence[float],
        preprocess_s: float | None,
        prefill_s: float | None,
        stop_reason: str | None,
        layers: Sequence[LayerRecord] = (),
    ) -> Self:
        """The record of one stream of events, complete or broken off.

        Args:
            text: the text generated.
            token_ids: the new tokens.
            elapsed_s: per new token, seconds from the start of prefill to that token on the host.
            preprocess_s: seconds spent on images and text before prefill.
            prefill_s: seconds of prefill; None when it did not end.
            stop_reason: `eos`, `stop`, `length` or `interrupted`.
            layers: this arm's layers, empty when prefill did not end.
        """
        decode_s = elapsed_s[-1] - elapsed_s[0] if len(elapsed_s) > 1 else None
        ttft_s = elapsed_s[0] + preprocess_s if elapsed_s and preprocess_s is not None else None
        return cls(
            text=text,
            new_tokens=len(token_ids),
            stop_reason=stop_reason,
            preprocess_s=preprocess_s,
            prefill_s=prefill_s,
            ttft_s=ttft_s,
            decode_s=decode_s,
            decode_steps=max(len(elapsed_s) - 1, 0),
            decode_tokens_per_s=decode_rate(elapsed_s),
            kv_bytes_held=_total([layer.kv_bytes_held for layer in layers]),
            kv_bytes_full=_total([layer.kv_bytes_full for layer in layers]),
            kv_bytes_allocated=_total([layer.kv_bytes_allocated for layer in layers]),
            token_ids=tuple(token_ids),
        )


@dataclass(frozen=True)
class RatioRecord:
    """`value` = `numerator` / `denominator`, each named `arm.figure`; above 1 favours pruning (not `kv`)."""

    value: float | None
    numerator: str
    denominator: str


@dataclass(frozen=True)
class BoundRecord:
    """What a decode step could gain if bytes read alone decided: arithmetic, not a measurement."""

    weight_bytes: int
    kv_bytes_pruned: int
    kv_bytes_unpruned: int
    kv_share_unpruned: float
    ideal_decode_ratio: float


@dataclass(frozen=True)
class MemoryRecord:
    """Memory of one arm, shown and never asserted. `device_*` come from NVML, `allocator_*` from torch."""

    device_name: str | None = None
    device_total_bytes: int | None = None
    device_used_bytes: int | None = None
    device_used_peak_bytes: int | None = None
    device_process_bytes: int | None = None
    allocator_bytes: int | None = None
    allocator_peak_bytes: int | None = None
    rss_bytes: int | None = None
    rss_peak_bytes: int | None = None


@dataclass(frozen=True)
class MemoryByArm:
    """Memory of each arm that ran."""

    pruned: MemoryRecord | None = None
    unpruned: MemoryRecord | None = None


@dataclass(frozen=True)
class RankRecord:
    """What one rank of a tensor-parallel run holds of the prompt's cache; arms and layers hold the sums."""

    rank: int
    kv_bytes_held: int
    kv_bytes_full: int
    kv_bytes_allocated: int


@dataclass(frozen=True)
class RanksByArm:
    """What each rank holds, by arm; `backend` carries what they tell each other (`gloo`, `nccl`)."""

    backend: str
    pruned: tuple[RankRecord, ...] = ()
    unpruned: tuple[RankRecord, ...] = ()


@dataclass(frozen=True)
class CompileRecord:
    """Compiled steps, as `compiled.CompileStats` counts them: captures + hits = joins.

    Attributes:
        captures: graphs captured (on a CPU: numbers of rows that layers were compiled for).
        hits: joins that an earlier capture served.
        joins: prompts put together: as a batch begins, and as it goes on without those that ended.
        batches: batches that began with compiled steps.
        evictions: captures let go for newer ones.
        hit_rate: hits over joins; None before any.
        compile_s: seconds of compiling and capturing.
        refused: why steps ran uncompiled from some point on; None where they were compiled.
    """

    captures: int
    batches: int
    hit_rate: float | None
    compile_s: float
    refused: str | None = None
    hits: int = 0
    joins: int = 0
    evictions: int = 0

    @classmethod
    def from_stats(cls, stats: Any) -> Self:
        """The record of one `compiled.CompileStats`."""
        return cls(**asdict(stats), hit_rate=stats.hit_rate)


@dataclass(frozen=True)
class RunRecord:
    """Everything that `plphp run` has to say.

    `layers` are the pruned arm's; `ranks` is of torchrun alone, `compiled` of `--compile`.
    """

    model: str
    config: PLPHPConfig
    prompt: str
    system: str | None
    generation: GenerationRecord
    prompt_tokens: int | None
    vision_tokens: int | None
    images: tuple[ImageRecord, ...]
    pruned: ArmRecord
    unpruned: ArmRecord | None
    layers: tuple[LayerRecord, ...]
    memory: MemoryByArm = field(default_factory=MemoryByArm)
    environment: dict[str, Any] = field(default_factory=dict)
    ratios: dict[str, RatioRecord] = field(default_factory=dict)
    bound: BoundRecord | None = None
    ranks: RanksByArm | None = None
    compiled: CompileRecord | None = None
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    command: str = "run"
    schema_version: int = SCHEMA_VERSION


def decode_rate(elapsed_s: Sequence[float]) -> float | None:
    """Decode tokens per second, (T - 1) / (t_last - t_first); None under 16 steps or without time passing."""
    steps = len(elapsed_s) - 1
    if steps < MIN_DECODE_STEPS or elapsed_s[-1] <= elapsed_s[0]:
        return None
    return steps / (elapsed_s[-1] - elapsed_s[0])


def run_ratios(pruned: ArmRecord, unpruned: ArmRecord | None) -> dict[str, RatioRecord]:
    """`decode` and `ttft` (above 1 favours pruning), `kv` (held pruned / held unpruned, below 1 is good)."""
    if unpruned is None:
        return {}
    arms = {"pruned": pruned, "unpruned": unpruned}

    def ratio(figure: str, over: str, under: str) -> RatioRecord:
        high, low = getattr(arms[over], figure), getattr(arms[under], figure)
        value = high / low if high is not None and low else None
        return RatioRecord(value, f"{over}.{figure}", f"{under}.{figure}")

    return {
        "decode": ratio("decode_tokens_per_s", "pruned", "unpruned"),
        "ttft": ratio("ttft_s", "unpruned", "pruned"),
        "kv": ratio("kv_bytes_held", "pruned", "unpruned"),
    }


def decode_bound(
    weight_bytes: int, kv_bytes_pruned: int, kv_bytes_unpruned: int, new_token_bytes: float = 0.0
) -> BoundRecord | None:
    """The ideal ratio of decode speeds by bytes read per step, (W + KV_unpruned) / (W + KV_pruned).

    Args:
        weight_bytes: W, decoder layers, final norm and output head as stored.
        kv_bytes_pruned: prompt cache held after the cut.
        kv_bytes_unpruned: prompt cache held had nothing been cut.
        new_token_bytes: mean bytes of generated tokens' cache during decoding, the same in both arms.

    Returns:
        The bound, or None when nothing at all would be read.
    """
    unpruned_step = weight_bytes + kv_bytes_unpruned + new_token_bytes
    pruned_step = weight_bytes + kv_bytes_pruned + new_token_bytes
    if pruned_step <= 0:
        return None
    return BoundRecord(
        weight_bytes=weight_bytes,
        kv_bytes_pruned=kv_bytes_pruned,
        kv_bytes_unpruned=kv_bytes_unpruned,
        kv_share_unpruned=(kv_bytes_unpruned + new_token_bytes) / unpruned_step,
        ideal_decode_ratio=unpruned_step / pruned_step,
    )


def from_json(text: str) -> RunRecord:
    """The run record that `to_json` wrote.

    Raises:
        RecordError: the text is not strict JSON, is of another schema version, or a key is missing, unknown
            or of the wrong type.
    """
    return parse(RunRecord, text)


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if values and len(known) == len(values) else None
