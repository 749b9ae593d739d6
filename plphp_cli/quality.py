"""What a cut costs, without labels: what the model expects along an answer, with and without the cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plphp_cli.attention import prune
from plphp_cli.config import PLPHPConfig
from plphp_cli.generate import Prefilled, advance, prefill
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
    def kl_mean(self) -> float | None:
        """Mean over positions 2 .. T; None when T = 1."""
        return fmean(self.kl) if self.kl else None

    @property
    def kl_max(self) -> float | None:
        """The largest of positions 2 .. T; None when T = 1."""
        return max(self.kl, default=None)

    @property
    def divergence(reference_logits: Tensor, logits: Tensor) -> Divergence:
    """What two arms' logits [T, vocab] along one answer differ by."""
    nats = kl(reference_logits, logits)
    same_first = torch.equal(reference_logits[0], logits[0])
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

