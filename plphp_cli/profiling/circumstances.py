"""A profile's circumstances, what its bound needs to know of the model, and what a fresh process is to do."""

from typing import Any

from plphp_cli.environment import environment, sha256_of_text
from plphp_cli.models import LoadedModel, decoder_weight_bytes, model_bytes
from plphp_cli.models.loaded import settled_options
from plphp_cli.models.shapes import SHAPES
from plphp_cli.profiling.fresh import FreshJob, FreshPrompt
from plphp_cli.profiling.state import ModelFigures, ProfileRequest


def circumstances(request: ProfileRequest, loaded: LoadedModel | None) -> dict[str, Any]:
    """The environment block of the record, as far as it is known; without a model before that is loaded."""
    first = request.questions[0]
    found = environment(
        loaded=loaded,
        config=request.used_config,
        seed=0,
        command=request.command or None,
        images=[image for question in request.questions for image in question.images],
        prompt=first.prompt if len(request.questions) == 1 else None,
        attention_mask="none while decoding what was cut, else the model's own",
    )
    if loaded is None:
        # Where the model would have run is not known.
        found["device"] = None
    found["questions"] = [
        {
            "prompt_sha256": sha256_of_text(question.prompt),
            "image_sha256": [image.sha256 for image in question.images],
        }
        for question in request.questions
    ]
    return found


def figures_of(request: ProfileRequest, loaded: LoadedModel) -> ModelFigures:
    """What the bound needs to know of the model."""
    text = loaded.model.config.get_text_config(decoder=True)
    # A built-in shape with dummy weights takes prompts of any length: that is no model's context.
    endless = request.dummy is not None and request.model in SHAPES
    return ModelFigures(
        weight_bytes=decoder_weight_bytes(loaded),
        model_bytes=model_bytes(loaded),
        item_bytes=loaded.dtype.itemsize,
        query_heads=int(getattr(text, "num_attention_heads", 1)),
        kv_heads=int(getattr(text, "num_key_value_heads", None) or 0),
        context_tokens=None if endless else getattr(text, "max_position_embeddings", None),
    )


def fresh_job(request: ProfileRequest, loaded: LoadedModel, arm: str) -> FreshJob:
    """One arm's peaks on every prompt, for a process of its own; the model loaded as it was here."""
    return FreshJob(
        arm=arm,
        config=request.config,
        prompts=tuple(
            FreshPrompt(tuple(image.path for image in q.images), q.prompt, q.system)
            for q in request.questions
        ),
        max_pixels=request.max_pixels,
        new_tokens=request.max_new_tokens,
        model=request.model,
        options=settled_options(loaded),
        batch_size=request.batch_size,
        dummy=request.dummy,
    )
