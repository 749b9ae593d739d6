"""How an answer is generated: its length and its stops, and the next token from logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plphp_cli import parallel
from plphp_cli.answer_text import check_stop
from plphp_cli.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """How an answer is generated.

    Attributes:
        max_new_tokens: at least 1.
        temperature: above 0 samples; None or 0 takes the likeliest token.
        top_p: in (0, 1], samples from the smallest set of tokens that holds this probability; None is the
            model's.
        seed: of the sampling.
        stop_at_eos: False suppresses the end of sequence, so that exactly `max_new_tokens` come (for timing).
        stop: texts that end the answer, which then ends with the one that was met.

    Raises:
        UsageError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    stop_at_eos: bool = True
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens = {self.max_new_tokens}; expected at least 1")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature = {self.temperature:g}; expected a number of at least 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p:g}; expected a number in (0, 1]")
        check_stop(self.stop)


class Sampler:
    """The next token from logits, by the logits processors that `generate` would use."""

    def __init__(self, model: Any, prompt: Tensor, settings: Settings) -> None:
        wanted = {"temperature": settings.temperature, "top_p": settings.top_p}
        options = {name: value for name, value in wanted.items() if value is not None}
        self.sample = bool(options) and settings.temperature != 0
        config, _ = model._prepare_generation_config(
            None,
            do_sample=self.sample,
            # What a checkpoint's own generation config may ask for, and this loop does not do.
            num_beams=1,
            num_return_sequences=1,
            guidance_scale=None,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=None if settings.stop_at_eos else settings.max_new_tokens,
            **(options if self.sample else {}),
        )
        model._prepare_special_tokens(config, True, device=prompt.device)
        self.eos = set() if config._eos_token_tensor is None else set(config._eos_token_tensor.tolist())
        self.processors = model._get_logits_processor(
            config, prompt.shape[1], encoder_input_ids=prompt, device=prompt.device, model_kwargs={}
        )
        self.generator = torch.Generator(prompt.device).manual_seed(settings.seed)
        self.agree = parallel.agreement(model)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """The next token [1, 1] after `ids` [1, n], from `logits` [vocab]."""
        scores = self.processors(ids, logits[None].clone())
        if self.sample:
            return self.agree(torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator))
        return self.agree(scores.argmax(dim=-1, keepdim=True))
