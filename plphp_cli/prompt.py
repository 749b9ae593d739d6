"""A prompt as the model reads it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt, preprocessed for one model.

    Attributes:
        inputs: what the model's forward takes, on its device: `input_ids` [1, prompt_tokens] and, when there
            are images, `pixel_values` and whatever else the family's processor makes. Floats have the model's
            dtype.
        text: the text after the chat template, before tokenization (one placeholder per image).
        images: paths of the images as given, in the order in which the prompt holds them.
        prompt_tokens: length N of the prompt in tokens, vision tokens included.
        vision_tokens: n_v, the prompt positions that hold vision tokens; 0 for a text prompt.
        preprocess_s: seconds from decoded images and text to `inputs` on the device.
        image_tokens: vision tokens of each image, in the same order; None when the processor did not tell.
        notes: what was done unasked, in words: an image turned, a missing chat template replaced.
    """

    inputs: "dict[str, Tensor]"
    text: str
    images: tuple[str, ...]
    prompt_tokens: int
    vision_tokens: int
    preprocess_s: float
    image_tokens: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
