"""What has been measured of a prompt so far: filled step by step, so that an interruption loses nothing."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import UsageError
from plphp_cli.images import LoadedImage
from plphp_cli.models.options import DEFAULTS, LoadOptions
from plphp_cli.profiling.records import LayerProfile

if TYPE_CHECKING:
    from plphp_cli.profiling.answers import Answers
    from plphp_cli.profiling.fresh import FreshPeaks
    from plphp_cli.profiling.timing import DecodeSample, PrefillSample
    from plphp_cli.prompt import Prompt
    from plphp_cli.pruning import FixedRates


@dataclass(frozen=True)
class Question:
    """One prompt to profile: decoded images, text, and the expected answer where it is known."""

    images: tuple[LoadedImage, ...]
    prompt: str
    system: str | None = None
    answer: str | None = None
    line: int | None = None


@dataclass(frozen=True)
class DummyPlan:
    """Dummy weights and a synthetic prompt, in place of a model's own.

    `layer_rates` are retention rates, repeated over the layers: random weights give no meaningful scores.
    `rates_from` is the profile that they were taken from, whose layers they are then one by one.
    """

    vision_tokens: int
    images: int
    layer_rates: tuple[float, ...]
    text_tokens: int = 64
    seed: int = 0
    rates_from: str | None = None

    def check_layers(self, layers: int, model: str) -> None:
        """Refuse recorded rates of another number of layers. Raises `UsageError`."""
        if self.rates_from is not None and len(self.layer_rates) != layers:
            raise UsageError(
                f"{self.rates_from} has rates of {len(self.layer_rates)} layers; {model} has {layers}",
                hint="name a profile of a model with as many layers, or give --layer-rates",
            )

    def policy(self, layers: int) -> "FixedRates":
        """The rates as a policy for so many layers."""
        from plphp_cli.pruning import FixedRates

        return FixedRates({index: self.layer_rates[index % len(self.layer_rates)] for index in range(layers)})


@dataclass(frozen=True)
class ProfileRequest:
    """What the user asked for, checked as far as that is possible without the model.

    `arms` are those to run, in the order of `records.ARMS`. A batch is so many copies of each prompt, decoded
    together from its one prefill.
    """

    questions: tuple[Question, ...]
    config: PLPHPConfig
    arms: tuple[str, ...]
    model: str
    options: LoadOptions = DEFAULTS
    max_pixels: int | None = None
    repeats: int = 9
    warmup: int = 1
    max_new_tokens: int = 128
    command: tuple[str, ...] = ()
    batch_size: int = 1
    compile: bool = False
    dummy: DummyPlan | None = None

    @property
    def used_config(self) -> PLPHPConfig | None:
        """The knobs that decide what is cut; None where the rates are given."""
        return self.config if self.dummy is None else None


@dataclass(frozen=True)
class KVBytes:
    """Bytes of one prompt's cache in one arm, real and by arithmetic (None where there is none: stock)."""

    held: int
    allocated: int
    held_predicted: int | None = None
    allocated_predicted: int | None = None


@dataclass
class PromptState:
    """One prompt under measurement. Times by slot: an arm, or the A/A control.

    `batch_size` prompts are decoded together. `one_token` says that a single new token is made, so that
    nothing is decoded.
    """

    index: int
    question: Question
    one_token: bool = False
    batch_size: int = 1
    prompt: "Prompt | None" = None
    answers: "Answers | None" = None
    layers: tuple[LayerProfile, ...] = ()
    kv: dict[str, KVBytes] = field(default_factory=dict)
    preprocess_s: list[float] = field(default_factory=list)
    vision_s: list[float] = field(default_factory=list)
    prune_s: list[float] = field(default_factory=list)
    prune_shares: list[float] = field(default_factory=list)
    prefills: "dict[str, list[PrefillSample]]" = field(default_factory=dict)
    decodes: "dict[str, list[DecodeSample]]" = field(default_factory=dict)
    peaks: "dict[str, FreshPeaks]" = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def samples(self, slot: str, figure: str) -> list[float]:
        """Samples of a time of one slot, one a repeat: `prefill_s`, `ttft_s`, `decode_s`, `end_to_end_s`."""
        prefills, decodes = self.prefills.get(slot, []), self.decodes.get(slot, [])
        if figure == "prefill_s":
            return [sample.prefill_s for sample in prefills]
        decode = [sample.decode_s for sample in decodes if sample.step_s]
        if figure == "decode_s":
            return decode
        ttft = [
            before + sample.first_token_s for before, sample in zip(self.preprocess_s, prefills, strict=False)
        ]
        if figure == "ttft_s":
            return ttft
        if self.batch_size > 1:
            return []  # one prefill and a whole batch's decoding make no time of anything
        # One new token has no steps: its end is its first token.
        return ttft if self.one_token else [one + two for one, two in zip(ttft, decode, strict=False)]


@dataclass(frozen=True)
class ModelFigures:
    """What the bound needs to know of the model."""

    weight_bytes: int
    model_bytes: int
    item_bytes: int
    query_heads: int
    kv_heads: int = 0
    context_tokens: int | None = None
