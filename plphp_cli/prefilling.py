"""A prompt into a cache, cut, and further tokens behind it. All of it runs inside `prune(model, ...)`.

Positions are kept with each prompt and passed explicitly: Qwen-VL models remember the position offset of the
last prompt they saw, so that prompts that take turns would decode at each other's positions.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from plphp_cli.attention import Pruner
from plphp_cli.cache import cache_name, cache_of, fork_cache
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import ImageError, UnsupportedError
from plphp_cli.prompt import Prompt
from plphp_cli.pruning import Policy, as_policy
from plphp_cli.sequence import SequenceState, cut_anew
from plphp_cli.vision import encode_images

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel


@dataclass(eq=False)
class Prefilled:
    """A prompt in a cache, ready for its next token.

    Attributes:
        input_ids: LongTensor [1, N], the prompt.
        cache: the prompt's cache; whatever is decoded is added to it.
        logits: float32 [vocab], what the model expects after the prompt.
        positions: [..., 1], position of the last token seen; None for models that count by themselves.
        state: what each layer kept.
    """

    input_ids: Tensor
    cache: Cache
    logits: Tensor
    positions: Tensor | None
    state: SequenceState

    def fork(self, room: int | None = None) -> "Prefilled":
        """A copy with a cache of its own and room for `room` new tokens: one prefill, decoded many times."""
        cache = fork_cache(self.cache, room)
        return Prefilled(self.input_ids, cache, self.logits, self.positions, self.state)

    def cut(self, policy: PLPHPConfig | Policy | None, room: int | None = None) -> "Prefilled":
        """A copy cut by `policy`, from a whole prefill that kept its attention; see `cut_anew`."""
        cache, state = cut_anew(self.cache, self.state, as_policy(policy), room)
        return Prefilled(self.input_ids, cache, self.logits, self.positions, state)

    def take_back(self, count: int) -> bool:
        """Forget the last `count` tokens fed after the prompt; False, and unusable, if its cache cannot."""
        try:
            for layer in self.cache.layers if count else ():
                layer.crop(-count)
        except (RuntimeError, ValueError, NotImplementedError, TypeError):
            return False
        if self.positions is not None:
            self.positions = self.positions - count
        return True


@torch.no_grad()
def prefill(loaded: "LoadedModel", prompt: Prompt, pruner: Pruner, room: int | None = None) -> Prefilled:
    """Run the prompt through the model under `pruner`; `room` is how many new tokens to make room for."""
    model: Any = loaded.model
    inputs: dict[str, Any] = dict(prompt.inputs)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask", None)
    if mask is not None and not bool(mask.all()):
        raise UnsupportedError("a padded prompt is not supported", hint="prepare one prompt at a time")
    parameters = inspect.signature(model.forward).parameters
    positions = None
    if "position_ids" in parameters:
        # Qwen's omni models take a prompt without a mask for one without images.
        given = {**inputs, "attention_mask": torch.ones_like(ids)}
        positions = model._prepare_position_ids_for_generation(ids, given)
    with _arguments_named(loaded):
        inputs = encode_images(model, inputs)
        pruner.room, pruner.image_tokens = room, prompt.image_tokens
        try:
            output = forward(model, ids, DynamicCache(), positions, is_first_iteration=True, **inputs)
        finally:
            pruner.room = pruner.image_tokens = None
    last = None if positions is None else positions[..., -1:]
    for layer in cache_of(output).layers:
        layer.fused = True
    return Prefilled(ids, cache_of(output), output.logits[0, -1].float(), last, pruner.sequences[0])


@contextlib.contextmanager
def _arguments_named(loaded: "LoadedModel") -> Iterator[None]:
    """Where the user changed what the processor makes, a model that cannot take it is told of as that."""
    given = getattr(getattr(loaded, "options", None), "processor_arg", ())
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not given or "memory" in str(error):
            raise
        what = str(error).strip().partition("\n")[0]
        raise ImageError(
            f"the model cannot take the images as they were prepared: {what}",
            hint=f"check --processor-arg {' '.join(given)}",
        ) from error


@torch.no_grad()
def advance(loaded: "LoadedModel", prefilled: Prefilled, ids: Tensor) -> Tensor:
    """Feed new tokens [1, q] to a prefilled prompt, inside `prune`; returns float32 logits [q, vocab]."""
    positions = prefilled.positions
    if positions is not None:
        # The offset of multimodal positions stays with the prompt: the next position is the last plus one.
        positions = positions + torch.arange(1, ids.shape[1] + 1, device=positions.device)
        prefilled.positions = positions[..., -1:]
    output = forward(loaded.model, ids, prefilled.cache, positions)
    return output.logits[0].float()


def forward(model: Any, ids: Tensor, cache: Cache, positions: Tensor | None, **inputs: Any) -> Any:
    """The model's own forward of ids [B, q] behind `cache`, at `positions` [..., B, q], as it prepares it."""
    if positions is not None:
        inputs["position_ids"] = positions
    if model._supports_logits_to_keep():
        inputs["logits_to_keep"] = 1 if inputs.get("is_first_iteration") else ids.shape[1]
    inputs[cache_name(model)] = cache
    arguments = model.prepare_inputs_for_generation(ids, use_cache=True, **inputs)
    return model(**arguments, return_dict=True)
