"""What a cut costs, without labels: what the model expects along an answer, with and without the cut."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plphp_cli.attention import prune
from plphp_cli.config import PLPHPConfig
from plphp_cli.prefilling import Prefilled, advance, prefill
from plphp_cli.prompt import Prompt
from plphp_cli.pruning import FixedRates, Policy

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel


@dataclass(frozen=True)
class Divergence:
    """How far two arms are apart along one answer.

    Attributes:
        first_kl: KL at position 1, which must be 0: it is only where the logits are equal.
        kl: KL in nats at each of positions 2 .. T.
        agree: whether both arms prefer the same token there.
    """

    first_kl: float
    kl: list[float]
    agree: list[bool]

    @property
    def finite(self) -> bool:
        """Whether every divergence is a number: logits that overflow, or are masked away, have none."""
        return all(map(math.isfinite, self.kl))

    @property
    def kl_mean(self) -> float | None:
        """Mean over positions 2 .. T; None when T = 1, or where logits that are not finite leave none."""
        return fmean(self.kl) if self.kl and self.finite else None

    @property
    def kl_max(self) -> float | None:
        """The largest of positions 2 .. T; None where `kl_mean` is."""
        return max(self.kl, default=None) if self.finite else None

    @property
    def top1_agreement(self) -> float | None:
        """Share of positions 2 .. T at which both prefer the same token; None when T = 1."""
        return fmean(self.agree) if self.agree else None

    @property
    def first_divergence(self) -> int | None:
        """First position, counted from 1, at which they do not; None when they never differ."""
        return next((place for place, same in enumerate(self.agree, 2) if not same), None)


def teacher_forced(
    loaded: "LoadedModel",
    prompt: Prompt,
    policy: PLPHPConfig | Policy | None,
    answer_ids: Sequence[int],
) -> Tensor:
    """What the model expects at each position of a given answer, with its cache cut by `policy`.

    Args:
        loaded: the model.
        prompt: the prompt, on the model's device.
        policy: a config, a policy, or None for the unpruned arm.
        answer_ids: y_1 .. y_T, at least one.

    Returns:
        float32 logits [T, vocab]; row t is the expectation of y_t given the prompt and y_1 .. y_(t-1).

    Raises:
        UnsupportedError: the model or the prompt cannot be pruned, with the reason.
    """
    with prune(loaded.model, policy) as pruner:
        return along(loaded, prefill(loaded, prompt, pruner, len(answer_ids)), answer_ids)


def along(loaded: "LoadedModel", prefilled: Prefilled, answer_ids: Sequence[int]) -> Tensor:
    """`teacher_forced` from a prefilled prompt, inside `prune`: one forward over the whole answer.

    The answer is added to the prompt's cache; fork the prompt to use it again.
    """
    first = prefilled.logits[None]
    if len(answer_ids) == 1:
        return first
    ids = torch.tensor([list(answer_ids[:-1])], device=prefilled.input_ids.device)
    return torch.cat([first, advance(loaded, prefilled, ids)])


def kl(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || other) per position, in nats, float32 [T], of two logits [T, vocab].

    Position 1 is zero when both come from the same prompt: prefill is not cut.
    """
    reference = reference_logits.float().log_softmax(dim=-1)
    other = logits.float().log_softmax(dim=-1)
    shares = reference.exp()
    # What the reference rules out adds nothing, though its logarithm is infinite.
    terms = torch.where(shares > 0, shares * (reference - other), 0.0)
    # Rounding can make the sum a hair negative; equal rows give exactly zero.
    return terms.sum(dim=-1).clamp_min(0)


def divergence(reference_logits: Tensor, logits: Tensor) -> Divergence:
    """What two arms' logits [T, vocab] along one answer differ by."""
    nats = kl(reference_logits, logits)
    same_first = torch.allclose(reference_logits[0], logits[0], rtol=0, atol=0, equal_nan=True)
    # Logits that differ must not pass because their divergence rounds to zero.
    first_kl = 0.0 if same_first else max(float(nats[0]), 1e-12)
    agree = reference_logits.argmax(dim=-1) == logits.argmax(dim=-1)
    return Divergence(first_kl, nats[1:].tolist(), agree[1:].tolist())


def layer_need(loaded: "LoadedModel", prompt: Prompt, answer_ids: Sequence[int]) -> list[float | None]:
    """How much the answer needs each layer's vision cache.

    Per layer: mean KL in nats over positions 2 .. T of the answer when that layer alone loses all its
    vision tokens. None for layers that are never pruned, and for all layers when T = 1. One prefill serves
    all layers.

    Args:
        loaded: the model.
        prompt: the prompt, on the model's device.
        answer_ids: y_1 .. y_T, usually the unpruned greedy answer.
    """
    room = len(answer_ids)
    with prune(loaded.model, None, keep_attention=True) as pruner:
        whole = prefill(loaded, prompt, pruner, room)
        reference = along(loaded, whole.fork(room), answer_ids)
        needs: list[float | None] = []
        for layer in whole.state.layers:
            if not layer.prunable or room == 1:
                needs.append(None)
                continue
            without = along(loaded, whole.cut(FixedRates({layer.index: 0.0}), room), answer_ids)
            needs.append(kl(reference, without)[1:].mean().item())
    return needs
