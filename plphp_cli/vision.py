"""Which positions of a prompt hold vision tokens, and which image each belongs to."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plphp_cli import families
from plphp_cli.errors import ImageError, RefusedModelError, UnsupportedError
from plphp_cli.pruning import Span

# Where the families' configs say which id stands for one vision token of an image, and of a video.
IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index")
_VIDEO_TOKEN_NAMES = ("video_token_id", "video_token_index")
_PIXELS = "pixel_values"
_VIDEO_PIXELS = "pixel_values_videos"
_ENCODED = "mm_encoder_outputs"


@dataclass(frozen=True, eq=False)
class VisionTokens:
    """Vision tokens of one prompt.

    Attributes:
        positions: LongTensor [n_v] of prompt positions, ascending.
        spans: per image the half-open range of its tokens in `positions`; None when that is not known.
    """

    positions: Tensor
    spans: tuple[Span, ...] | None

    def text(self, prompt_tokens: int) -> Tensor:
        """BoolTensor [N], True at the other positions; made once, since every layer asks."""
        known = vars(self).setdefault("_text", {})
        if prompt_tokens not in known:
            others = torch.ones(prompt_tokens, dtype=torch.bool, device=self.positions.device)
            others[self.positions] = False
            known[prompt_tokens] = others
        return known[prompt_tokens]


def image_token_id(config: Any) -> int | None:
    """The id that stands for one vision token in a prompt; None if the model's config names none."""
    return _first_id(config, IMAGE_TOKEN_NAMES)


def no_image_token(config: Any) -> RefusedModelError:
    """The error for a config that names no image token."""
    hint = f"expected one of {', '.join(IMAGE_TOKEN_NAMES)} in the model's config"
    return families.refusal(config, families.Assumption.IMAGE_TOKEN, hint=hint)


def image_encoder(model: nn.Module) -> Callable[..., Any] | None:
    """The method by which the model itself encodes a prompt's images; None if it has none of that name."""
    return getattr(getattr(model, "base_model", model), "get_image_features", None)


def takes_features(model: nn.Module) -> bool:
    """Whether the model's forward can be given encoded images: since transformers 5.18."""
    return _ENCODED in inspect.signature(model.forward).parameters


def image_features(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What the model's own vision encoder makes of the pixels in `inputs`; None where there are none."""
    encoder = image_encoder(model)
    if inputs.get(_PIXELS) is None or inputs.get(_ENCODED) or encoder is None:
        return None
    names = inspect.signature(encoder).parameters
    return encoder(**{name: inputs[name] for name in names if name in inputs}, return_dict=True)


def encode_images(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` with the pixels replaced by the features of the model's own vision encoder.

    This is what `generate` does before it prefills; it also tells how many tokens each image expands to.
    Inputs without pixels, and those of models that do not take encoded images, are returned as they came.
    """
    features = image_features(model, inputs) if takes_features(model) else None
    if features is None:
        return dict(inputs)
    return {**{k: v for k, v in inputs.items() if k != _PIXELS}, **as_inputs(features)}


def as_inputs(features: Any) -> dict[str, Any]:
    """Encoded images as a model's forward takes them."""
    return {_ENCODED: {"image": features}}


def find_vision_tokens(
    config: Any, inputs: Mapping[str, Any], image_tokens: Sequence[int] | None = None
) -> VisionTokens:
    """Find the vision tokens of one prompt from what its prefill is called with.

    Args:
        config: the model's config.
        inputs: the keyword arguments of the forward call: `input_ids` [1, N], pixels or encoded images.
        image_tokens: vision tokens of each image, where the processor told; else the family's features may
            tell.

    Raises:
        ImageError: the prompt's vision tokens are not as many as its images expand to.
        UnsupportedError: the config names no image token, or the prompt holds video tokens.
    """
    ids = inputs["input_ids"][0]
    token = image_token_id(config)
    if token is None:
        raise no_image_token(config)
    video = _first_id(config, _VIDEO_TOKEN_NAMES)
    # Some families spell a video's frames with the image token: its pixels tell.
    shown = video is not None and video != token and bool((ids == video).any())
    if shown or inputs.get(_VIDEO_PIXELS) is not None:
        raise UnsupportedError(
            "the prompt holds video tokens; only images are pruned", hint="pass frames as images"
        )
    positions = (ids == token).nonzero().squeeze(-1)
    encoded = (inputs.get(_ENCODED) or {}).get("image")
    features = getattr(encoded, "pooler_output", None)
    if features is None and (encoded is not None or inputs.get(_PIXELS) is not None):
        # The model encodes its images itself, or tells nothing of each; it checks their number itself.
        return VisionTokens(positions, None)
    counts = [image.shape[:-1].numel() for image in features] if features is not None else []
    if sum(counts) != positions.numel():
        raise ImageError(
            f"the prompt holds {positions.numel()} vision tokens, but its images expand to {sum(counts)}",
            hint="give one image per image placeholder, prepared by the model's own processor",
        )
    if image_tokens is None and _entries_are_images(config, len(counts)):
        image_tokens = counts
    if image_tokens is None or sum(image_tokens) != positions.numel():
        return VisionTokens(positions, None)
    stops = torch.tensor(image_tokens, dtype=torch.long).cumsum(0).tolist()
    return VisionTokens(positions, tuple(zip([0, *stops[:-1]], stops, strict=False)))


def _entries_are_images(config: Any, entries: int) -> bool:
    """Whether each of so many entries of the encoder's features is the whole of one image."""
    family = families.find(config.model_type)
    if family is None:
        return False
    return family.features == families.IMAGE or (family.features == families.TILE and entries <= 1)


def _first_id(config: Any, names: Sequence[str]) -> int | None:
    return next(
        (getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), None
    )
