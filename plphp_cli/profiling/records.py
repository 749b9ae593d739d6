"""What `plphp profile` measured, as records. Every figure is defined in its docstring; unknown is None.

Times are in seconds and medians over repeats, bytes are of this process, every ratio names its two arms.
Over several prompts the times and bytes of an arm are means per prompt, and `samples` sums over prompts.
No torch here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plphp_cli.config import PLPHPConfig
from plphp_cli.profiling.bound_records import BoundRecord
from plphp_cli.results import CompileRecord, ImageRecord, MemoryRecord
from plphp_cli.serialize import SCHEMA_VERSION, parse

PRUNED, UNPRUNED, STOCK = "pruned", "unpruned", "stock"
ARMS = (PRUNED, UNPRUNED, STOCK)

FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no measurable difference"
# Under this many prompts a verdict is an indication only.
FEW_PROMPTS = 10


@dataclass(frozen=True)
class PlanRecord:
    """How it was measured: pairs of samples, discarded runs before them, new tokens of every timed run."""

    repeats: int
    warmup: int
    max_new_tokens: int
    order: tuple[str, ...] = ()


@dataclass(frozen=True)
class Percentiles:
    """Of the time per token from the second token on, all repeats together."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class SampleRecord:
    """Raw samples, one entry a repeat. `step_s` holds the single decoding steps of each repeat."""

    preprocess_s: tuple[float, ...] = ()
    vision_s: tuple[float, ...] = ()
    prefill_s: tuple[float, ...] = ()
    prune_s: tuple[float, ...] = ()
    ttft_s: tuple[float, ...] = ()
    decode_s: tuple[float, ...] = ()
    end_to_end_s: tuple[float, ...] = ()
    step_s: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class ArmProfile:
    """One arm.

    Attributes:
        new_tokens: tokens that each timed run generated.
        failed: why the arm could not be measured to the end; None when it was.
        preprocess_s: decoded images and text to the model's inputs on the device. Taken once per repeat for
            all arms, which do the same: it adds nothing to what they differ by.
        vision_s: the vision encoder alone, in a pass of its own; it is a part of prefill.
        prefill_s: inputs on the device to the first token's logits.
        prune_s: scores and gather of all layers, in a pass of its own; it is a part of prefill.
        prune_share_of_prefill: the two's ratio, both of that pass.
        ttft_s: preprocessing, prefill and the first token on the host.
        decode_s: first token to last.
        decode_tokens_per_s: (T - 1) / decode_s; None under 16 steps.
        tpot_s: time per token from the second on; None under 16 steps.
        end_to_end_s: ttft_s + decode_s.
        kv_bytes_held: the prompt's cache after the cut; `kv_bytes_allocated` its storages with the room for
            new tokens; `*_predicted` the same by arithmetic. Stock's figures are of its own cache.
        peak_bytes: most bytes of live tensor storage at one moment, weights included, in a fresh process;
            None where that of prefill or of decoding is not known.
        peak_prefill_bytes: of prefill; `peak_prefill_decoder_bytes` while the decoder ran (without the
            vision encoder); `peak_decode_bytes` of decoding, of the whole batch and its steps uncompiled.
        memory: resident size and NVML figures of that process: shown, never asserted.
    """

    new_tokens: int | None = None
    failed: str | None = None
    preprocess_s: float | None = None
    vision_s: float | None = None
    prefill_s: float | None = None
    prune_s: float | None = None
    prune_share_of_prefill: float | None = None
    ttft_s: float | None = None
    decode_s: float | None = None
    decode_tokens_per_s: float | None = None
    tpot_s: Percentiles | None = None
    end_to_end_s: float | None = None
    kv_bytes_held: int | None = None
    kv_bytes_allocated: int | None = None
    kv_bytes_held_predicted: int | None = None
    kv_bytes_allocated_predicted: int | None = None
    peak_bytes: int | None = None
    peak_prefill_bytes: int | None = None
    peak_prefill_decoder_bytes: int | None = None
    peak_decode_bytes: int | None = None
    memory: MemoryRecord | None = None
    samples: SampleRecord = field(default_factory=SampleRecord)


@dataclass(frozen=True)
class ArmsRecord:
    """The arms; those that were not run are None."""

    pruned: ArmProfile | None = None
    unpruned: ArmProfile | None = None
    stock: ArmProfile | None = None

    def __getitem__(self, name: str) -> ArmProfile | None:
        return getattr(self, name) if name in ARMS else None

    def items(self) -> list[tuple[str, ArmProfile]]:
        """Names and profiles of the arms that were run."""
        return [(name, arm) for name in ARMS if (arm := self[name]) is not None]


@dataclass(frozen=True)
class RatioProfile:
    """A ratio of two arms over paired samples; above 1 favours pruning (`kv` alone: below 1 is good).

    Attributes:
        median: of the paired ratios.
        low: lower end of the 95 % paired bootstrap interval of the median; `high` the upper end. None of
            too few pairs; of `kv`, which is exact, the ratio itself.
        numerator: `arm.figure`; likewise `denominator`.
        control_low: lower end of the A/A interval: how far identical arms differed in the same schedule.
        control_high: its upper end.
        verdict: `faster`, `slower` or `no measurable difference`; None where nothing can be called.
        samples: the paired ratios.
    """

    median: float
    low: float | None
    high: float | None
    numerator: str
    denominator: str
    control_low: float | None = None
    control_high: float | None = None
    verdict: str | None = None
    samples: tuple[float, ...] = ()


@dataclass(frozen=True)
class TextsRecord:
    """What each arm answered, greedily and until its own end of sequence; `answer` is the expected text."""

    pruned: str | None = None
    unpruned: str | None = None
    stock: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class QualityRecord:
    """What the cut costs along the unpruned greedy answer y_1 .. y_T, end of sequence included.

    Attributes:
        answer_tokens: T, summed over prompts.
        kl_mean: KL(unpruned || pruned) in nats, mean over positions 2..T of all prompts (token-weighted).
        kl_mean_over_prompts: mean of the prompts' means (prompt-weighted).
        kl_p95: of the positions; `kl_max` the largest.
        top1_agreement: share of positions 2..T at which both arms prefer the same token.
        first_divergence: first position (from 1) at which they do not, the earliest of all prompts; None if
            they never differ.
        first_token_agrees: whether position 1 is the same in logits, as it must be; False is a fault of the
            tool.
        perplexity: per arm, of the unpruned answer.
        exact_match: per arm, share of prompts answered exactly; None without expected answers.
        answer_token_accuracy: per arm, along the expected answers, share of tokens 2..T preferred.
        texts: the two texts; over several prompts those of the prompt with the largest KL.
    """

    answer_tokens: int | None = None
    kl_mean: float | None = None
    kl_mean_over_prompts: float | None = None
    kl_p95: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    first_divergence: int | None = None
    first_token_agrees: bool | None = None
    perplexity: dict[str, float | None] = field(default_factory=dict)
    exact_match: dict[str, float | None] = field(default_factory=dict)
    answer_token_accuracy: dict[str, float | None] = field(default_factory=dict)
    texts: TextsRecord = field(default_factory=TextsRecord)


@dataclass(frozen=True)
class HeadProfile:
    """One KV head of a layer.

    `gamma` is the attention that its query heads give to vision tokens, `attention_kept` the share of that
    which lies on tokens kept, `image_shares` the share of each image's tokens that is kept.
    """

    gamma: float | None
    attention_kept: float | None
    image_shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerProfile:
    """One decoder layer of the pruned arm; over several prompts the means.

    Each mean is over the prompts that have the figure (gamma and heads: those with vision tokens; image i:
    those that have one). `group` is then the one that all of them share, else None; `groups` counts them.

    `vision_tokens_kept` is per KV head; `head_overlap` the mean Jaccard overlap of the tokens that two heads
    of the layer keep; `image_shares` the share of each image's vision tokens kept, mean over heads;
    `kv_bytes_full` what the layer would hold uncut.
    """

    index: int
    gamma: float | None
    group: str | None
    rate: float | None
    vision_tokens_kept: float | None
    kv_bytes_held: float | None
    kv_bytes_held_per_head: float | None
    kv_bytes_full: float | None
    kv_bytes_allocated: float | None
    kv_heads: int | None
    head_overlap: float | None = None
    image_shares: tuple[float, ...] = ()
    heads: tuple[HeadProfile, ...] = ()
    groups: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptProfile:
    """One prompt. `line` is its line in the file of prompts, None for a prompt of the command line."""

    index: int
    line: int | None
    prompt: str
    system: str | None
    images: tuple[ImageRecord, ...]
    prompt_tokens: int | None
    vision_tokens: int | None
    arms: ArmsRecord
    ratios: dict[str, RatioProfile | None]
    quality: QualityRecord
    layers: tuple[LayerProfile, ...]
    control: SampleRecord | None = None


@dataclass(frozen=True)
class SpreadRecord:
    """A figure over the prompts."""

    minimum: float
    quartile_1: float
    median: float
    quartile_3: float
    maximum: float


@dataclass(frozen=True)
class DummyRecord:
    """Dummy weights: speed and memory only. The prompt was synthetic, the layer rates given.

    `rates_from` is the file of the profile that the rates were taken from; None where they were typed.
    """

    vision_tokens: int
    images: int
    text_tokens: int
    layer_rates: tuple[float, ...]
    seed: int
    rates_from: str | None = None


@dataclass(frozen=True)
class ProfileRecord:
    """Everything that `plphp profile` has to say.

    Attributes:
        config: the knobs of pruning; None with dummy weights, whose layer rates are given.
        arms: over all prompts; `control` the A/A control's samples (the unpruned arm once more).
        ratios: `decode`, `ttft`, `end_to_end`, `kv` of pruned and unpruned; `loop_*` of stock and unpruned;
            None where they could not be taken.
        totals: per arm, sums of medians and bytes over the `prompts` that it answered.
        spread: per ratio and for `kl_mean`, over prompts.
        worst: prompts (their index) with the largest KL, and those with the smallest decode ratio.
        batch_size: copies of each prompt that are decoded together; times of decoding are of a step of all of
            them, tokens/s of them together. Prefill, TTFT and bytes are of one prompt.
        compiled: how decoding of the tool's own arms was compiled; None where that was not asked for.
        dummy: what stood in for a model's own weights and prompts; None for a real model.
        faults: what must not happen and did: faults of the tool, not of the model.
    """

    model: str
    config: PLPHPConfig | None
    plan: PlanRecord
    arms: ArmsRecord
    ratios: dict[str, RatioProfile | None]
    bound: BoundRecord | None
    quality: QualityRecord
    layers: tuple[LayerProfile, ...]
    prompts: tuple[PromptProfile, ...]
    control: SampleRecord | None = None
    totals: dict[str, dict[str, float | None]] = field(default_factory=dict)
    spread: dict[str, SpreadRecord] = field(default_factory=dict)
    worst: dict[str, tuple[int, ...]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    interrupted: bool = False
    batch_size: int = 1
    compiled: CompileRecord | None = None
    dummy: DummyRecord | None = None
    command: str = "profile"
    schema_version: int = SCHEMA_VERSION


def from_json(text: str) -> ProfileRecord:
    """The profile that `serialize.to_json` wrote. Raises `RecordError` as `serialize.parse` does."""
    return parse(ProfileRecord, text)


def ratio(ratios: Mapping[str, RatioProfile | None], name: str) -> float | None:
    """The median of a named ratio; None when it was not taken."""
    found = ratios.get(name)
    return None if found is None else found.median
