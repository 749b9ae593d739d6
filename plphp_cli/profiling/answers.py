"""What the cut costs in quality: the texts of both arms, and the model's expectations along an answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plphp_cli.config import PLPHPConfig
from plphp_cli.decoding import Done
from plphp_cli.generate import stream
from plphp_cli.profiling.records import PRUNED, STOCK, UNPRUNED, QualityRecord, TextsRecord
from plphp_cli.profiling.statistics import percentile
from plphp_cli.prompt import Prompt
from plphp_cli.quality import Divergence, divergence, teacher_forced
from plphp_cli.sampling import Settings
from plphp_cli.support import without_left_out

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel


@dataclass
class Answers:
    """What is known of one prompt's quality, filled step by step; raw figures, so that prompts can be pooled.

    Attributes:
        texts: per arm; `ids` the unpruned answer's.
        kl: per position 2..T; `agree` whether both arms prefer the same token there.
        first_kl: of position 1, which must be 0.
        nats: per arm, of the unpruned answer's tokens 1..T.
        right: per arm, whether each of tokens 2.. of the expected answer is preferred.
    """

    texts: dict[str, str] = field(default_factory=dict)
    answer: str | None = None
    ids: tuple[int, ...] | None = None
    kl: list[float] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)
    first_kl: float | None = None
    first_tokens: dict[str, int] = field(default_factory=dict)
    nats: dict[str, list[float]] = field(default_factory=dict)
    right: dict[str, list[bool]] = field(default_factory=dict)

    @property
    def divergence(self) -> Divergence:
        """How far the arms are apart along the unpruned answer."""
        return Divergence(self.first_kl or 0.0, self.kl, self.agree)

    @property
    def finite(self) -> bool:
        """Whether every divergence is a number."""
        return self.divergence.finite

    @property
    def first_token_agrees(self) -> bool | None:
        """Whether both arms expect exactly the same at position 1; None when that is not known."""
        if self.first_kl is None:
            return None
        # Stock has its own path; the two arms of the tool's path are the same until the first cut is read.
        own = {token for name, token in self.first_tokens.items() if not name.startswith(STOCK)}
        return self.first_kl == 0 and len(own) <= 1


def answer_with(
    loaded: "LoadedModel", prompt: Prompt, config: PLPHPConfig | None, max_new_tokens: int
) -> tuple[str, tuple[int, ...]]:
    """The greedy answer until its own end of sequence: text and ids."""
    settings = Settings(max_new_tokens)
    done = [event for event in stream(loaded, prompt, config, settings) if isinstance(event, Done)]
    return done[0].text, done[0].token_ids


@torch.no_grad()
def stock_answer(loaded: "LoadedModel", prompt: Prompt, max_new_tokens: int) -> tuple[str, tuple[int, ...]]:
    """The same from plain `model.generate`."""
    plain = without_left_out(loaded.model.generation_config)
    output = loaded.model.generate(**prompt.inputs, **plain, max_new_tokens=max_new_tokens, do_sample=False)
    ids = output[0, prompt.prompt_tokens :].tolist()
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False), tuple(ids)


def judge(loaded: "LoadedModel", prompt: Prompt, config: PLPHPConfig, answers: Answers) -> None:
    """Compare the arms along the unpruned answer, and along the expected one if there is one."""
    assert answers.ids is not None
    rows = {
        UNPRUNED: teacher_forced(loaded, prompt, None, answers.ids),
        PRUNED: teacher_forced(loaded, prompt, config, answers.ids),
    }
    found = divergence(rows[UNPRUNED], rows[PRUNED])
    answers.first_kl, answers.kl, answers.agree = found.first_kl, found.kl, found.agree
    preferred = {arm: logits.argmax(dim=-1) for arm, logits in rows.items()}
    answers.first_tokens |= {arm: int(ids[0]) for arm, ids in preferred.items()}
    answers.nats = {arm: _nats(logits, answers.ids) for arm, logits in rows.items()}
    expected = [] if answers.answer is None else _ids(loaded, answers.answer)
    if len(expected) > 1:
        for arm, policy in ((UNPRUNED, None), (PRUNED, config)):
            chosen = teacher_forced(loaded, prompt, policy, expected).argmax(dim=-1).tolist()
            answers.right[arm] = [one == two for one, two in zip(chosen, expected, strict=True)][1:]


def quality(prompts: Sequence[Answers]) -> QualityRecord:
    """The record of one prompt, or of several: positions pooled, and the worst prompt's texts."""
    judged = [one for one in prompts if one.ids is not None and one.first_kl is not None]
    pooled = [value for one in judged if one.finite for value in one.kl]
    agree = [value for one in judged for value in one.agree]
    means = [mean for one in judged if (mean := one.divergence.kl_mean) is not None]
    firsts = [place for one in judged if (place := one.divergence.first_divergence) is not None]
    shown = max(prompts, key=_badness, default=Answers())
    return QualityRecord(
        answer_tokens=sum(len(one.ids or ()) for one in judged) if judged else None,
        kl_mean=fmean(pooled) if pooled else None,
        kl_mean_over_prompts=fmean(means) if means else None,
        kl_p95=percentile(pooled, 0.95),
        kl_max=max(pooled, default=None),
        top1_agreement=fmean(agree) if agree else None,
        first_divergence=min(firsts, default=None),
        first_token_agrees=all(one.first_token_agrees for one in judged) if judged else None,
        perplexity={arm: _perplexity([n for one in judged for n in one.nats.get(arm, ())]) for arm in _BOTH},
        exact_match={arm: _exact_match(prompts, arm) for arm in _BOTH},
        answer_token_accuracy={arm: _accuracy(judged, arm) for arm in _BOTH},
        texts=TextsRecord(**shown.texts, answer=shown.answer),
    )


def is_exact(text: str, expected: str) -> bool:
    """Whether an answer is the expected one, but for white space around it."""
    return text.strip() == expected.strip()


def _badness(answers: Answers) -> float:
    mean = answers.divergence.kl_mean
    return -1.0 if mean is None else mean


_BOTH = (PRUNED, UNPRUNED)


def _nats(logits: Tensor, ids: Sequence[int]) -> list[float]:
    index = torch.tensor(list(ids), device=logits.device)[:, None]
    return (-logits.log_softmax(dim=-1).gather(1, index)[:, 0]).tolist()


def _perplexity(nats: Sequence[float]) -> float | None:
    if not nats:
        return None
    mean = fmean(nats)
    return math.exp(mean) if mean < 700 else None


def _exact_match(prompts: Sequence[Answers], arm: str) -> float | None:
    known = [one for one in prompts if one.answer is not None and arm in one.texts]
    same = [is_exact(one.texts[arm], one.answer or "") for one in known]
    return fmean(same) if same else None


def _accuracy(prompts: Sequence[Answers], arm: str) -> float | None:
    right = [value for one in prompts for value in one.right.get(arm, ())]
    return fmean(right) if right else None


def _ids(loaded: "LoadedModel", text: str) -> list[int]:
    """The expected answer as the model would write it."""
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
