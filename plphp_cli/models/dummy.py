"""A decoder at its true size with random weights: memory and speed before a download, and nothing else.

The vision encoder is left out (a stand-in of a few kilobytes): prompts bring synthetic embeddings. Every
decoder is run inside LLaVA's class, whose own part in a step is nil; multimodal positions are plain ones.
"""

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from plphp_cli.errors import DeviceMemoryError, ModelError, UsageError
from plphp_cli.models.choices import (
    attention_to_load,
    check_attention,
    choose_device,
    choose_dtype,
    set_attention,
)
from plphp_cli.models.failures import is_out_of_memory
from plphp_cli.models.loaded import LoadedModel
from plphp_cli.models.loading import quiet
from plphp_cli.models.options import LoadOptions
from plphp_cli.models.shapes import SHAPES
from plphp_cli.models.sources import BUILTIN, locate, read_config_json
from plphp_cli.models.weights import check_host_memory
from plphp_cli.prompt import Prompt
from plphp_cli.support import FULL, layer_kinds
from plphp_cli.units import format_bytes

NOTE = "dummy weights: speed and memory only"
_STD = 0.02
_SMALLER = "use --dtype bfloat16, another --device, or a smaller shape"
# A prompt may be longer than what the shape's own config allows: only its memory and time are of interest.
_LONGEST = 1 << 20


def load_dummy(
    name: str, *, dtype: str = "auto", device: str = "auto", attn: str = "sdpa", seed: int = 0
) -> LoadedModel:
    """A model of the shape `name` with seeded normal weights (norms 1), and no processor.

    Args:
        name: a name of `shapes.SHAPES`, a model folder, or a hub id, of which config.json alone is read.
        dtype: `auto` is bfloat16 on a GPU and float32 on a CPU.
        device: see `loading.load`.
        attn: attention back-end of prefill, one of `choices.ATTENTION`.
        seed: of the weights.

    Raises:
        UsageError: an option is unknown or cannot be met on this machine.
        ModelError: the model is unknown, or its config is none of a vision-language model.
        UnsupportedError: transformers does not run such a decoder on this back-end.
        DeviceMemoryError: it does not fit; the message says how much was needed.
    """
    from transformers import AutoModelForImageTextToText

    where = choose_device(device)
    if dtype == "auto":
        dtype = "float32" if where.type == "cpu" else "bfloat16"
    kind = choose_dtype(dtype, where, builtin=False)
    check_attention(attn, where, kind)
    with quiet():
        config = _config(name)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters())
        if where.type == "cpu":
            check_host_memory(size * kind.itemsize, f"weights of {name}", _SMALLER)
        try:
            model = _random(config, kind, where, attn, seed)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"out of memory on {where}: weights of {name} take {format_bytes(size * kind.itemsize)}",
                hint=_SMALLER,
            ) from error
    options = LoadOptions(dtype=dtype, device=str(where), attn=attn)
    return LoadedModel(
        model, None, name, None, kind, where, builtin=False, attn=attn, notes=(NOTE,), options=options
    )


def _config(name: str) -> Any:
    from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig

    if name in SHAPES:
        shape = dict(SHAPES[name])
        text = AutoConfig.for_model(shape.pop("model_type"), max_position_embeddings=_LONGEST, **shape)
    else:
        if name == BUILTIN:
            raise UsageError(
                "dummy weights of the built-in model", hint=f"name one of {', '.join(SHAPES)}, or a model"
            )
        source = locate(name)
        read_config_json(source)
        whole = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        text = whole.get_text_config(decoder=True)
        if text is whole:
            raise ModelError(f"{name} is not a vision-language model", hint="name one, or a built-in shape")
        if FULL not in layer_kinds(whole):
            raise ModelError(f"{name} has no full-attention layer")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, image_size=28
    )
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=text.vocab_size - 1,
        tie_word_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
    )


def _random(config: Any, dtype: torch.dtype, device: torch.device, attn: str, seed: int) -> Any:
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=attention_to_load(attn)
        )
    set_attention(model, attn, "this decoder")
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for weight in {id(weight): weight for weight in model.parameters()}.values():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, _STD, generator=generator)
    # Nothing of a random model ends an answer.
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.eval().requires_grad_(False)


def check_room(loaded: LoadedModel, tokens: int, sequences: int) -> None:
    """Refuse uncut caches that the machine cannot hold beside the weights; a GPU says so by itself.

    Raises:
        DeviceMemoryError: they take more than the machine's memory and its swap space.
    """
    if loaded.device.type != "cpu":
        return
    text = loaded.model.config.get_text_config(decoder=True)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * width * tokens * sequences
    weights = sum(weight.nbytes for weight in loaded.model.parameters())
    check_host_memory(
        weights + numbers * loaded.dtype.itemsize,
        f"weights and caches of {sequences} x {tokens:,} tokens",
        "use fewer tokens, a smaller --batch-size, or --dtype bfloat16",
    )


def dummy_prompt(
    loaded: LoadedModel, vision_tokens: int, images: int, text_tokens: int = 64, seed: int = 0
) -> Prompt:
    """A prompt of random text with `images` images of random embeddings, `vision_tokens` in all.

    Raises:
        UsageError: there are fewer vision tokens than images, or no room for them.
    """
    if images < 1 or vision_tokens < images:
        raise UsageError(
            f"{vision_tokens} vision tokens in {images} images", hint="expected at least one token an image"
        )
    config, device = loaded.model.config, loaded.device
    width = config.get_text_config(decoder=True).hidden_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, min(1000, config.image_token_id), (1, text_tokens), generator=generator)
    shares = [vision_tokens // images + (number < vision_tokens % images) for number in range(images)]
    pictures = torch.full((1, vision_tokens), config.image_token_id)
    whole = torch.cat([ids[:, : text_tokens // 2], pictures, ids[:, text_tokens // 2 :]], dim=1)
    random = torch.Generator(device).manual_seed(seed)
    features = [
        torch.randn(share, width, device=device, generator=random).mul_(_STD).to(loaded.dtype)
        for share in shares
    ]
    encoded: Any = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    return Prompt(
        inputs={"input_ids": whole.to(device), "mm_encoder_outputs": encoded},
        text="",
        images=(),
        prompt_tokens=whole.shape[1],
        vision_tokens=vision_tokens,
        preprocess_s=0.0,
        image_tokens=tuple(shares),
        notes=(NOTE,),
    )
