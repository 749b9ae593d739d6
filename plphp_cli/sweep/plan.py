"""Cuts decided before they are made: equal ones are recognised, and made once."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from plphp_cli.pruning import Cut, Policy, Span
from plphp_cli.sequence import SequenceState
from plphp_cli.sweep.matching import Budget


@dataclass(frozen=True, eq=False)
class CutPlan:
    """What a policy keeps of one prompt; it is a policy itself, that of these cuts.

    Attributes:
        cuts: per full-attention layer.
        cut_id: digest of the tokens kept; equal ones hold the same cache.
    """

    cuts: Mapping[int, Cut]
    cut_id: str

    @property
    def rate(self) -> float | None:
        """Mean of r_l over the layers that can be pruned; None without vision tokens."""
        rates = [cut.rate for cut in self.cuts.values() if cut.rate is not None]
        return fmean(rates) if rates else None

    def budget(self, vision_tokens: int) -> Budget:
        """The vision tokens held, layer by layer."""
        return Budget({layer: cut.kept.shape[1] for layer, cut in self.cuts.items()}, vision_tokens)

    def cut(
        self, layer: int, attention: Tensor, vision: Tensor, spans: Sequence[Span] | None, kv_heads: int
    ) -> Cut:
        """See `Policy.cut`."""
        return self.cuts[layer]


def plan(state: SequenceState, policy: Policy) -> CutPlan:
    """Decide a policy's cuts of a prompt that was prefilled whole, its attention kept.

    Raises:
        UnsupportedError: the policy cannot cut this prompt, with the reason.
    """
    heads = {layer.index: layer.kv_heads for layer in state.layers}
    cuts: dict[int, Cut] = {}
    digest = hashlib.sha256()
    for index, attention in sorted(state.attention.items()):
        vision = state.vision.positions.to(attention.device)
        cuts[index] = cut = policy.cut(index, attention, vision, state.vision.spans, heads[index] or 1)
        digest.update(f"{index}:{tuple(cut.kept.shape)}:".encode())
        digest.update(cut.kept.cpu().contiguous().numpy().tobytes())
    return CutPlan(cuts, digest.hexdigest()[:16])
