"""Ablations at the bytes that a setting of PLPHP holds on the same prompt, to the token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from plphp_cli.config import PLPHPConfig
from plphp_cli.pruning import (
    Cut,
    HeadOnlyPolicy,
    LayerOnlyPolicy,
    PLPHPPolicy,
    Policy,
    RandomPolicy,
    Span,
    UniformPolicy,
)
from plphp_cli.sweep.records import HEAD_ONLY, LAYER_ONLY, PLPHP, RANDOM, UNIFORM, Setting


@dataclass(frozen=True)
class Budget:
    """Vision tokens that each KV head of each pruned layer holds under a setting, of `vision_tokens`."""

    tokens: Mapping[int, int]
    vision_tokens: int

    @property
    def even(self) -> dict[int, float]:
        """Per layer a rate that is the same for all, but for the token that rounding moves.

        The layers' tokens add up to those of the setting: layers differ by one token at most, and those with
        one more lie spread over the depth.
        """
        total, count = sum(self.tokens.values()), len(self.tokens)
        shares = [(place + 1) * total // count - place * total // count for place in range(count)]
        return {
            layer: share / self.vision_tokens if self.vision_tokens else 1.0
            for layer, share in zip(sorted(self.tokens), shares, strict=True)
        }


class _MakePolicy(Protocol):
    def __call__(self, rate: float) -> Policy: ...


@dataclass(frozen=True)
class EvenPolicy:
    """One method at the rates of a budget: `make` gives its policy at a rate."""

    rates: Mapping[int, float]
    make: _MakePolicy

    def cut(
        self, layer: int, attention: Tensor, vision: Tensor, spans: Sequence[Span] | None, kv_heads: int
    ) -> Cut:
        """See `Policy.cut`."""
        return self.make(rate=self.rates[layer]).cut(layer, attention, vision, spans, kv_heads)


def policy_of(setting: Setting, budget: Callable[[PLPHPConfig], Budget]) -> Policy:
    """The policy of a setting other than the baseline.

    `layer-only` holds by construction what PLPHP holds, layer by layer. The others take the same total,
    spread evenly over the layers, exempt ones included; they rank the whole prompt, whatever the scope.

    Args:
        setting: a method and the config that it is compared to.
        budget: of a config on the prompt at hand.
    """
    config = setting.config
    assert config is not None
    if setting.method == PLPHP:
        return PLPHPPolicy(config)
    if setting.method == LAYER_ONLY:
        return LayerOnlyPolicy(config)
    makers: dict[str, _MakePolicy] = {
        HEAD_ONLY: partial(HeadOnlyPolicy, head_reduce=config.head_reduce),
        UNIFORM: partial(UniformPolicy, head_reduce=config.head_reduce),
        RANDOM: partial(RandomPolicy, seed=setting.seed or 0),
    }
    return EvenPolicy(budget(config).even, makers[setting.method])
