"""The bound as a record: what a decoding step must read, and what could be gained at most. Unknown is None.

Bytes are of the device, times in seconds, every ratio is unpruned / pruned. No torch here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class CapacityRecord:
    """How much fits in the device's memory beside the weights, and one prefill at a time.

    Attributes:
        prompts: such prompts with their new tokens, all in memory at once.
        images: images like this prompt's in one prompt with its text.
        images_limit: what ends their number: `memory`, or the model's `context window`.
    """

    prompts: int | None
    images: int | None
    images_limit: str | None = None


@dataclass(frozen=True)
class BatchRow:
    """Ideal decode ratios of one batch size, by context length in tokens.

    `reached_at_tokens` gives, for the gains `1.1`, `1.5` and `2`, the context from which the ideal ratio
    passes them; None if it never does.
    """

    batch: int
    ideal_decode_ratio: dict[str, float]
    reached_at_tokens: dict[str, int | None]


@dataclass(frozen=True)
class BoundRecord:
    """What decoding could gain at most: per part of a step max(bytes / bandwidth, operations / rate).

    Attributes:
        weight_bytes: decoder layers, final norm and output head as stored: read at every step.
        kv_bytes_per_step: per arm, cache read by a step, mean over the answer (stock: 3 x its cache, since
            concatenation reads and writes it again at every token).
        operations_per_step: per arm.
        kv_share_of_step: per arm, of the bytes that a step reads.
        bandwidth_bytes_per_s: measured; `operations_per_s` the measured matrix rate in the model's dtype.
        ideal_step_s: per arm, the least time of a step.
        ideal_decode_ratio: unpruned / pruned of those; `ideal_decode_ratio_by_bytes` by bytes alone.
        attained: per arm, ideal_step_s / measured time per token.
        expected_decode_ratio: what would come of it if all that the ideal saves were saved from the measured
            step.
        beaten_by: the measured decode ratio, where it lies beyond the bound; None elsewhere.
        failed_assumption: why a measurement beats the bound; None when none does.
        speed_up_expected: whether a speed-up that can be measured is to be expected, in a sentence.
        repaid_after_tokens: output length at which the time saved has repaid prune_s; None if it never does.
        device_memory_bytes: of the device (of the machine on a CPU).
        capacity: per arm.
        table: batch size against context.
    """

    weight_bytes: int
    kv_bytes_per_step: dict[str, int | None]
    operations_per_step: dict[str, int | None]
    kv_share_of_step: dict[str, float | None]
    ideal_decode_ratio: float | None
    ideal_decode_ratio_by_bytes: float | None
    bandwidth_bytes_per_s: float | None
    operations_per_s: float | None
    ideal_step_s: dict[str, float | None]
    attained: dict[str, float | None]
    expected_decode_ratio: float | None
    beaten_by: float | None
    failed_assumption: str | None
    speed_up_expected: str
    repaid_after_tokens: int | None
    device_memory_bytes: int | None
    capacity: dict[str, CapacityRecord]
    table: tuple[BatchRow, ...] = ()
