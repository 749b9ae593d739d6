"""What a turn's cut costs against the unpruned full prompt, and what a cut made for its question would."""

import math
from statistics import fmean
from typing import TYPE_CHECKING

from torch import Tensor

from plphp_cli.attention import prune
from plphp_cli.chat.conversation import Conversation
from plphp_cli.chat.records import TurnQuality
from plphp_cli.decoding import Done, decode
from plphp_cli.prefilling import prefill
from plphp_cli.prompt import Prompt
from plphp_cli.quality import along, kl
from plphp_cli.sampling import Settings

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel


def judge_turn(
    loaded: "LoadedModel", conversation: Conversation, prompt: Prompt, settings: Settings
) -> TurnQuality:
    """Judge the turn that `conversation` answered last, along the unpruned greedy answer to its prompt.

    One prefill serves the unpruned arm and the cut made anew for this question. A turn that continued is
    judged from the cache it went on with, which `ask` was told to keep (`keep_start`).

    Args:
        loaded: the model.
        conversation: after the turn.
        prompt: the turn's prompt.
        settings: of the turn; the unpruned answer is greedy whatever they say.

    Raises:
        UnsupportedError: as `generate.prefill`.
    """
    with prune(loaded.model, None, keep_attention=True) as pruner:
        whole = prefill(loaded, prompt, pruner, 0)
        greedy = Settings(settings.max_new_tokens, stop=settings.stop)
        *_, done = decode(loaded, whole.fork(greedy.max_new_tokens), greedy)
        assert isinstance(done, Done)
        ids, room = done.token_ids, len(done.token_ids)
        reference = along(loaded, whole.fork(room), ids)
        anew = along(loaded, whole.cut(conversation.policy, room), ids)
        start = conversation.start
        if start is None:
            return TurnQuality(done.text, *_figures(reference[1:], anew[1:]))
        figures = _figures(reference, along(loaded, start.fork(room), ids))
        _, mean, _, agreement = _figures(reference, anew)
        return TurnQuality(done.text, *figures, mean, agreement)


def _figures(reference: Tensor, logits: Tensor) -> tuple[int, float | None, float | None, float | None]:
    """Positions, mean and largest KL, and top-1 agreement of two logits [n, vocab]."""
    nats = kl(reference, logits).tolist()
    agree = (reference.argmax(dim=-1) == logits.argmax(dim=-1)).float().tolist()
    finite = bool(nats) and all(map(math.isfinite, nats))
    return (
        len(nats),
        fmean(nats) if finite else None,
        max(nats) if finite else None,
        fmean(agree) if agree else None,
    )
