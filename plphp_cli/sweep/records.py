"""What `plphp sweep` measured, as records. Unknown is None. No torch here.

A *setting* is a method with its config (and, for chance, a seed). A *row* is one setting on one prompt: one
line of `results.jsonl`. A *point* is one setting over all prompts: what the front and the report are made of.
"""

from dataclasses import dataclass, field
from typing import Any

from plphp_cli.config import PLPHPConfig
from plphp_cli.results import ImageRecord
from plphp_cli.serialize import SCHEMA_VERSION

PLPHP, LAYER_ONLY, HEAD_ONLY, UNIFORM, RANDOM = "plphp", "layer-only", "head-only", "uniform", "random"
METHODS = (PLPHP, LAYER_ONLY, HEAD_ONLY, UNIFORM, RANDOM)
BASELINE = "unpruned"

# Under this many prompts a recommendation is an indication only.
FEW_PROMPTS = 10


@dataclass(frozen=True)
class Setting:
    """What is cut, and how.

    Attributes:
        method: one of `METHODS`, or `BASELINE`.
        config: of the PLPHP setting itself, or of the one whose held bytes an ablation matches on every
            prompt; None for the baseline.
        seed: of `random`; None elsewhere.
    """

    method: str
    config: PLPHPConfig | None
    seed: int | None = None


@dataclass(frozen=True)
class Row:
    """One setting on one prompt.

    Attributes:
        prompt_id: hash of the prompt's text, system message, expected answer and images.
        prompt_index: its place among the sweep's prompts, from 0.
        rate: mean of r_l over the layers that can be pruned, exempt ones included.
        kv_bytes_held: cache after the cut, prompt only; `kv_bytes_full` had nothing been cut; `kv_ratio`
            held / full.
        kl_mean: KL(unpruned || this) in nats, mean over positions 2..T of the unpruned answer; `kl_max` the
            largest; None when T = 1.
        top1_agreement: share of positions 2..T at which both prefer the same token.
        first_divergence: first position (from 1) at which they do not; None if they never differ.
        answer_tokens: T, end of sequence included.
        answer: the setting's own greedy answer; None where no expected answer is given, except for the
            baseline.
        answer_correct: whether that is the expected answer, by exact match; None without one.
        decode_tokens_per_s: measured as `profile` does; None where speed was not measured.
        cut_id: digest of the tokens kept; equal cuts are computed once.
        model: name of the model; `tool_version` of plphp-cli.
        prompt_tokens: N; `vision_tokens` n_v.
        decode_samples_s: seconds of each timed decode, paired by place with the baseline's on this prompt.
        control_samples_s: the baseline once more in the same schedule, the A/A control; of its own row alone.
    """

    method: str
    config: PLPHPConfig | None
    seed: int | None
    prompt_id: str
    prompt_index: int
    rate: float | None
    kv_bytes_held: int
    kv_bytes_full: int
    kv_ratio: float
    kl_mean: float | None
    kl_max: float | None
    top1_agreement: float | None
    first_divergence: int | None
    answer_tokens: int
    answer: str | None
    answer_correct: bool | None
    decode_tokens_per_s: float | None
    cut_id: str | None
    model: str
    tool_version: str
    prompt_tokens: int | None = None
    vision_tokens: int | None = None
    decode_samples_s: tuple[float, ...] = ()
    control_samples_s: tuple[float, ...] = ()

    @property
    def setting(self) -> Setting:
        """The setting of this row."""
        return Setting(self.method, self.config, self.seed)


@dataclass(frozen=True)
class Interval:
    """A mean over prompts and its 95 % interval (bootstrap over prompts); no interval for one prompt."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Point:
    """One setting over all its prompts, each prompt weighing the same.

    Attributes:
        prompts: how many prompts it was measured on.
        kv_ratio: held / full; `kv_bytes_held` mean bytes per prompt.
        kl_mean: mean of the prompts' means; `kl_max` the largest of all.
        accuracy: share of prompts answered exactly, of those with an expected answer.
        accuracy_drop: the baseline's accuracy less this one's, on the same prompts (paired interval).
        decode_tokens_per_s: median over the prompts measured; `decode_ratio` to the baseline, as `profile`
            pairs it.
        on_front: no other point of `plphp` holds less at no more KL; `on_accuracy_front` at no less accuracy.
        feasible: whether it satisfies the constraint; None when what it constrains was not measured.
        seeds: of `random`: how many seeds this point is the mean of; `seed_sd` their standard deviation of
            `kl_mean`, `accuracy_sd` of accuracy.
    """

    setting: Setting
    prompts: int
    kv_ratio: Interval
    kv_bytes_held: float
    kl_mean: Interval | None
    kl_max: float | None
    top1_agreement: Interval | None
    accuracy: Interval | None
    accuracy_drop: Interval | None
    decode_tokens_per_s: float | None = None
    decode_ratio: Interval | None = None
    decode_verdict: str | None = None
    on_front: bool = False
    on_accuracy_front: bool = False
    feasible: bool | None = None
    seeds: int | None = None
    seed_sd: float | None = None
    accuracy_sd: float | None = None


@dataclass(frozen=True)
class Constraint:
    """What is recommended must satisfy: `kl` or `accuracy_drop` at most, `agreement` at least, `limit`."""

    name: str
    limit: float


@dataclass(frozen=True)
class Recommendation:
    """The feasible point that holds least, or why there is none.

    Attributes:
        point: index in `SweepRecord.points`; None when no point is feasible.
        reason: one sentence: what was chosen and why, or the nearest miss.
        indication_only: fewer than `FEW_PROMPTS` prompts.
        config_file: where the config was written; `next_command` what to type next.
    """

    point: int | None
    reason: str
    indication_only: bool
    config_file: str | None = None
    next_command: str | None = None


@dataclass(frozen=True)
class PromptRecord:
    """One prompt of the sweep. `line` is its line in the file of prompts, None for the command line's."""

    prompt_id: str
    line: int | None
    prompt: str
    system: str | None
    answer: str | None
    images: tuple[ImageRecord, ...]
    prompt_tokens: int | None = None
    vision_tokens: int | None = None
    unpruned_answer: str | None = None
    unpruned_correct: bool | None = None


@dataclass(frozen=True)
class Skipped:
    """A combination of knobs that is no setting, and why."""

    knobs: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class Ablation:
    """A method against PLPHP at equal held bytes, over the settings that both were swept with.

    Attributes:
        kl_excess: the method's mean KL less PLPHP's, in nats, paired by prompt, mean over settings and seeds;
            above 0 favours PLPHP. None where KL is not known.
        accuracy_loss: PLPHP's accuracy less the method's, likewise; above 0 favours PLPHP.
        plphp_better: in how many of the settings PLPHP's mean KL is lower, `plphp_worse` in how many higher.
        kv_ratio_gap: largest difference in mean `kv_ratio` between a setting and its match: 0 when the bytes
            are equal.
        seeds: of `random`: how many; `seed_sd` the standard deviation of `kl_excess` over them.
    """

    method: str
    settings: int
    prompts: int
    kl_excess: Interval | None
    accuracy_loss: Interval | None
    plphp_better: int
    plphp_worse: int
    kv_ratio_gap: float
    seeds: int | None = None
    seed_sd: float | None = None


@dataclass(frozen=True)
class Cost:
    """What the sweep itself took; counts are of this invocation, `resumed_rows` came from an earlier one."""

    wall_s: float | None = None
    prefill_s: float | None = None
    rows: int = 0
    resumed_rows: int = 0
    prefills: int = 0
    chunks: int = 0
    shared_cuts: int = 0
    own_answers: int = 0


@dataclass(frozen=True)
class SweepRecord:
    """Everything that `plphp sweep` has to say: `report.json`.

    Attributes:
        grid: the values of each knob as typed, and the methods.
        points: the baseline first, then settings in the order of the grid; seeds of chance are one point.
        ablations: every other method that was swept against PLPHP.
        rows_expected: settings x prompts.
    """

    model: str
    constraint: Constraint
    grid: dict[str, Any]
    prompts: tuple[PromptRecord, ...]
    points: tuple[Point, ...]
    recommendation: Recommendation | None
    ablations: tuple[Ablation, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    cost: Cost = field(default_factory=Cost)
    rows_done: int = 0
    rows_expected: int = 0
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    interrupted: bool = False
    command: str = "sweep"
    schema_version: int = SCHEMA_VERSION
