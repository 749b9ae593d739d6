"""What the live view shows: immutable snapshots, replaced whole by who works, read by who draws."""

from dataclasses import dataclass, field, replace
from typing import Self

from plphp_cli.memory import MemorySnapshot
from plphp_cli.results import LayerRecord

WAITING, PREFILL, DECODING, DONE, INTERRUPTED = "waiting", "prefill", "decoding", "done", "interrupted"


@dataclass(frozen=True)
class ArmSnapshot:
    """One arm as far as it has come.

    Attributes:
        name: `pruned` or `unpruned`.
        phase: `waiting`, `prefill`, `decoding`, `done` or `interrupted`.
        text: generated so far.
        elapsed_s: per new token, seconds from the start of prefill to its id on the host.
        preprocess_s: seconds spent on images and text before prefill.
        prefill_s: None until prefill has ended.
        prompt_tokens: N, to tell what one more token adds to the cache.
        layers: this arm's, empty until prefill has ended.
    """

    name: str
    phase: str = WAITING
    text: str = ""
    elapsed_s: tuple[float, ...] = ()
    preprocess_s: float | None = None
    prefill_s: float | None = None
    prompt_tokens: int | None = None
    layers: tuple[LayerRecord, ...] = ()

    def with_token(self, text: str, elapsed_s: float) -> Self:
        """The snapshot after one more token."""
        return replace(self, phase=DECODING, text=self.text + text, elapsed_s=(*self.elapsed_s, elapsed_s))

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token, preprocessing included; None before it."""
        if not self.elapsed_s or self.preprocess_s is None:
            return None
        return self.elapsed_s[0] + self.preprocess_s

    @property
    def tokens_per_s(self) -> float | None:
        """Decode tokens per second so far; None before the second token."""
        steps = len(self.elapsed_s) - 1
        if steps < 1 or self.elapsed_s[-1] <= self.elapsed_s[0]:
            return None
        return steps / (self.elapsed_s[-1] - self.elapsed_s[0])

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of the cache now: what the prompt left, and the tokens that were fed since."""
        return self._with_new_tokens([layer.kv_bytes_held for layer in self.layers])

    @property
    def kv_bytes_uncut(self) -> int | None:
        """What `kv_bytes` would be had nothing been cut."""
        return self._with_new_tokens([layer.kv_bytes_full for layer in self.layers])

    def _with_new_tokens(self, prompt_bytes: list[int | None]) -> int | None:
        if not prompt_bytes or not self.prompt_tokens:
            return None
        # The newest token is chosen but not yet fed.
        fed, total = max(len(self.elapsed_s) - 1, 0), 0
        for layer, count in zip(self.layers, prompt_bytes, strict=True):
            if count is None or layer.kv_bytes_full is None:
                return None
            total += count
            # A sliding window or a linear state does not grow with the answer.
            if layer.group not in ("sliding", "linear"):
                total += fed * (layer.kv_bytes_full // self.prompt_tokens)
        return total


@dataclass(frozen=True)
class LiveSnapshot:
    """Everything on the screen at one moment.

    Attributes:
        title: model and prompt in one line.
        config: the setting in one line; it says so when it is the built-in model's calibrated one.
        stage: what is going on, in a few words.
        pruned: the pruned arm.
        unpruned: the unpruned arm, or None with `--no-baseline`.
        vision_tokens: n_v, or None before the prompt is prepared.
        memory: of device and process.
    """

    title: str
    config: str
    stage: str
    pruned: ArmSnapshot
    unpruned: ArmSnapshot | None
    vision_tokens: int | None = None
    memory: MemorySnapshot = field(default_factory=MemorySnapshot)
