"""What a model would take, told from its config alone: no weights are read or fetched.

Importing it does not import torch or transformers.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from plphp_cli import families
from plphp_cli.errors import PLPHPError, UsageError
from plphp_cli.memory import known
from plphp_cli.serialize import SCHEMA_VERSION

if TYPE_CHECKING:
    import torch

    from plphp_cli.models.options import LoadOptions
    from plphp_cli.models.sources import Source
    from plphp_cli.models.weights import WeightsState

# What a processor is made of, and the table of contents of the weights; not the weights.
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
# Longer sides than this are no photograph, and would cost the processor gigabytes.
MAX_SIDE = 16384
DEFAULT_CONTEXT = 8192


@dataclass(frozen=True)
class ImageCost:
    """What one image of a size takes; counts are None where `unknown` says why, and `hint` what to do."""

    width: int
    height: int
    vision_tokens: int | None = None
    prompt_tokens: int | None = None
    kv_bytes: int | None = None
    unknown: str | None = None
    hint: str | None = None


@dataclass(frozen=True)
class Fit:
    """Whether a model with the cache of a context fits a device; None when its memory is not known.

    `needed_bytes` are the weights and the cache; what a prefill takes beside them is not in it.
    """

    device: str
    memory_bytes: int | None
    context_tokens: int
    kv_bytes: int
    needed_bytes: int
    fits: bool | None


@dataclass(frozen=True)
class ModelCard:
    """What a model's config tells.

    Attributes:
        family: None for a type on which pruning is not proven.
        parameters: of the whole model; `weight_bytes` of them in `dtype`.
        stored_bytes: of the weight files, where that is known without them.
        step_bytes: of weights that a decoding step reads.
        layers: decoder layers by kind: `full` are pruned, `sliding` and `linear` left alone.
        kv_bytes_per_token: of all full-attention layers, keys and values of all heads.
        sliding_bytes_per_token: of all sliding layers, which hold at most `sliding_tokens`.
        weights_state: how the weights lie on this machine, one of the words of `models.weights`.
        kv_share_of_step: cache of the context over what a step reads at that context.
        max_context: tokens that the model was made for.
        notes: what was assumed, in words.
    """

    name: str
    revision: str | None
    model_type: str
    family: str | None
    brief: bool
    parameters: int
    dtype: str
    weight_bytes: int
    stored_bytes: int | None
    step_bytes: int
    layers: dict[str, int]
    attention_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    kv_bytes_per_token: int
    sliding_bytes_per_token: int
    sliding_tokens: int | None
    max_context: int | None
    image: ImageCost
    fit: Fit
    kv_share_of_step: float
    weights_state: str
    notes: tuple[str, ...] = field(default=())
    schema_version: int = SCHEMA_VERSION


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels from `1024x768`. Raises `UsageError`."""
    width, cross, height = text.lower().partition("x")
    sides = [int(side) for side in (width, height) if side.isascii() and side.isdecimal() and len(side) < 9]
    if not cross or len(sides) != 2 or not all(1 <= side <= MAX_SIDE for side in sides):
        raise UsageError(
            f"image size {text!r}; expected WIDTHxHEIGHT in pixels, each 1 to {MAX_SIDE}",
            hint="e.g. 1024x768",
        )
    return sides[0], sides[1]


def describe(
    name: str,
    *,
    image_size: tuple[int, int] = (1024, 768),
    context: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    offline: bool = False,
    trust_remote_code: bool = False,
) -> ModelCard:
    """What a model would take, before its weights are fetched.

    Of a hub model `config.json` is fetched, and if the type is proven, the other small files.

    Args:
        name: `builtin`, a local folder, or a hub id with an optional `@revision`.
        image_size: width and height of one image, in pixels.
        context: tokens whose cache must fit beside the weights; None: 8192, or what the model was made for.
        dtype: as for `models.load`.
        device: as for `models.load`.
        offline: as for `models.load`.
        trust_remote_code: as for `models.load`.

    Raises:
        UsageError: an option is unknown or cannot be met on this machine.
        ModelError: the model is unknown, broken, or not a vision-language model.
        UnsupportedError: its type is refused, with the assumption that fails.
        PLPHPError: the hub cannot be reached.
    """
    if context is not None and context < 1:
        raise UsageError(f"context = {context}; expected 1 or more tokens")
    from plphp_cli.models import LoadOptions, hub
    from plphp_cli.models.choices import choose_device, choose_dtype
    from plphp_cli.models.loading import quiet, read_config
    from plphp_cli.models.outline import outline
    from plphp_cli.models.sources import locate, read_config_json

    options = LoadOptions(dtype, device, offline=offline, trust_remote_code=trust_remote_code)
    options.check()
    with hub.offline(offline):
        source = locate(name)
        config_json = read_config_json(source)
        with quiet():
            where = choose_device(device)
            asked = choose_dtype(dtype, where, source.builtin)
            config = read_config(source, config_json, trust_remote_code)
            notes: list[str] = []
            kind = _weight_dtype(asked, config, notes)
            source = _with_small_files(source)
            model = outline(source, config, trusted=trust_remote_code)
        return _card(source, config, model, kind, where, image_size, context, notes, options)


def _card(
    source: "Source",
    config: Any,
    model: Any,
    kind: "torch.dtype",
    where: "torch.device",
    image_size: tuple[int, int],
    context: int | None,
    notes: list[str],
    options: "LoadOptions",
) -> ModelCard:
    from plphp_cli.models import decoder_weight_bytes
    from plphp_cli.models.weights import DAMAGED, weights_state
    from plphp_cli.support import FULL, SLIDING, layer_kinds

    text = config.get_text_config(decoder=True)
    kinds = layer_kinds(config)
    width = kind.itemsize
    sizes = _token_bytes(text, kinds, width)
    full, sliding = sizes.get(FULL, 0), sizes.get(SLIDING, 0)
    longest = known(lambda: int(text.max_position_embeddings))
    if context is None:
        context = min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    window = getattr(text, "sliding_window", None) if sliding else None
    cache = full * context + sliding * (context if window is None else min(context, window - 1))
    weights = sum(parameter.numel() for parameter in model.parameters())
    lie = weights_state(source, ask=True)
    stored = None if lie.state == DAMAGED else known(lambda: _stored_bytes(source.folder))
    step = decoder_weight_bytes(SimpleNamespace(model=model)) // 4 * width  # type: ignore[arg-type]
    needed = weights * width
    if getattr(config, "quantization_config", None) is not None:
        known_size = "as the files are" if stored else "not known, so that of unquantised ones is shown"
        notes.append(f"the weights are quantised: their size is {known_size}")
        needed, step = stored or needed, step * (stored or needed) // needed
    family = families.find(config.model_type)
    one = next(_layer_configs(text, kinds, FULL))
    return ModelCard(
        name=source.name,
        revision=source.revision,
        model_type=config.model_type,
        family=None if family is None else family.title,
        brief=family is not None and config.model_type in family.brief,
        parameters=weights,
        dtype=str(kind).removeprefix("torch."),
        weight_bytes=needed,
        stored_bytes=stored,
        step_bytes=step,
        layers={name: kinds.count(name) for name in dict.fromkeys(kinds)},
        attention_heads=getattr(one, "num_attention_heads", None),
        kv_heads=_kv_heads(one),
        head_dim=_head_dim(one),
        kv_bytes_per_token=full,
        sliding_bytes_per_token=sliding,
        sliding_tokens=None if window is None else window - 1,
        max_context=longest,
        image=_image_cost(source, config, image_size, full, options),
        fit=_fit(where, needed, cache, context),
        kv_share_of_step=cache / (cache + step),
        weights_state=lie.state,
        notes=(*notes, *_remarks(source, config, model, kinds, lie)),
    )


def _remarks(
    source: "Source", config: Any, model: Any, kinds: tuple[str, ...], lie: "WeightsState"
) -> Iterator[str]:
    """What a reader must know of how it is pruned and run, of its weights, and of its proof."""
    from plphp_cli.models.outline import check_size
    from plphp_cli.models.sources import weight_files
    from plphp_cli.models.weights import WHOLE
    from plphp_cli.support import SLIDING

    if SLIDING in kinds or len(set(kinds)) > 1:
        yield "only the full-attention layers are pruned; the others keep what they hold"
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        yield "it caps its attention logits, which sdpa does not compute: run it with --attn eager"
    if lie.note is not None:
        yield lie.note
    if lie.state == WHOLE:
        try:
            check_size(source, config, model, weight_files(source))
        except PLPHPError as error:
            yield error.message
    if families.find(config.model_type) is None:
        yield families.unproven(config.model_type)


def _with_small_files(source: "Source") -> "Source":
    """A hub model with its processor's files; as it came when they cannot be fetched."""
    if source.revision is None:
        return source
    from plphp_cli.models.hub import fetch_files

    # Without them the processor itself says what is missing.
    with contextlib.suppress(Exception):
        fetch_files(source.name, source.revision, _SMALL, ["*/*"])
    return source


def _weight_dtype(asked: Any, config: Any, notes: list[str]) -> "torch.dtype":
    """The dtype that the weights would be loaded in."""
    import torch

    if isinstance(asked, torch.dtype):
        return asked
    for each in (config, config.get_text_config(decoder=True)):
        stated = getattr(each, "dtype", None)
        if isinstance(stated, torch.dtype):
            return stated
    notes.append("the config names no dtype: float32 is assumed")
    return torch.float32


def _token_bytes(text: Any, kinds: tuple[str, ...], width: int) -> Mapping[str, int]:
    """Bytes of one token's keys and values, all layers of each kind together."""
    sizes: dict[str, int] = {}
    for kind in dict.fromkeys(kinds):
        layers = _layer_configs(text, kinds, kind)
        sizes[kind] = sum(2 * _kv_heads(layer) * _head_dim(layer) * width for layer in layers)
    return sizes


def _layer_configs(text: Any, kinds: tuple[str, ...], kind: str) -> Iterator[Any]:
    """The config of each layer of a kind; transformers states settings per layer since 5.15."""
    layers = getattr(text, "per_layer_config", None) or [text] * len(kinds)
    return (layer for layer, each in zip(layers, kinds, strict=True) if each == kind)


def _kv_heads(layer: Any) -> int:
    return int(getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads)


def _head_dim(layer: Any) -> int:
    return int(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)


def _stored_bytes(folder: Path) -> int:
    """Bytes of the weight files: theirs if they are there, else what their table of contents says."""
    files = list(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return int(json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"])
    if not files:
        raise FileNotFoundError(folder)
    return sum(file.stat().st_size for file in files)


def _image_cost(
    source: "Source", config: Any, size: tuple[int, int], token_bytes: int, options: "LoadOptions"
) -> ImageCost:
    """Vision tokens of one image of that size, by the model's own processor on a blank picture."""
    import torch
    from PIL import Image

    from plphp_cli.images import LoadedImage
    from plphp_cli.models import LoadedModel, prepare
    from plphp_cli.models.failures import first_line
    from plphp_cli.models.loading import read_processor

    width, height = size
    try:
        loaded = LoadedModel(
            model=SimpleNamespace(config=config),
            processor=read_processor(source, options),
            name=source.name,
            revision=source.revision,
            dtype=torch.float32,
            device=torch.device("cpu"),
            builtin=source.builtin,
            options=options,
        )
        blank = LoadedImage(Image.new("RGB", size, "white"), "blank", size, (), "")
        prompt = prepare(loaded, [blank], "Describe the image.")
    except PLPHPError as error:
        return ImageCost(width, height, unknown=error.message, hint=error.hint)
    except Exception as error:  # noqa: BLE001  (a processor that fails must not cost the rest of the card)
        return ImageCost(width, height, unknown=f"{type(error).__name__}: {first_line(error)}")
    tokens = prompt.vision_tokens
    return ImageCost(width, height, tokens, prompt.prompt_tokens, tokens * token_bytes)


def _fit(where: "torch.device", weights: int, cache: int, context: int) -> Fit:
    from plphp_cli.profiling.machine import memory_bytes

    memory, needed = known(lambda: memory_bytes(where)), weights + cache
    return Fit(str(where), memory, context, cache, needed, None if memory is None else needed <= memory)
