"""What rows of two invocations must share to stand in one table: tool, model, and how it is run."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from plphp_cli import __version__
from plphp_cli.models.choices import choose_device, choose_dtype
from plphp_cli.models.loaded import CONFIG_NAME
from plphp_cli.models.loading import fetch
from plphp_cli.models.sources import Source
from plphp_cli.sweep.request import SweepRequest

# Of larger files this much is read, in blocks spread over them: a model of other weights differs everywhere.
_WHOLE_BYTES = 256 << 20
_BLOCK_BYTES = 1 << 20

Identity = dict[str, str]


def identity(request: SweepRequest) -> Identity:
    """Everything but the prompts and settings that a row depends on, in words to compare and to show."""
    options = request.options
    source = fetch(request.model, options)
    # On a cluster the machines that run the model decide what `auto` is, not this one.
    where, dtype = options.device, options.dtype
    if request.ray_address is None:
        device = choose_device(options.device)
        where, dtype = device.type, str(choose_dtype(dtype, device, source.builtin)).removeprefix("torch.")
    return {
        "tool version": __version__,
        "model": source.name,
        "model files": model_digest(source),
        "dtype": dtype,
        "device": where,
        "attention back-end": options.attn,
        "quantisation": str(options.quantize),
        "device map": str(options.device_map),
        "processor arguments": json.dumps(options.processor_args, sort_keys=True),
        "max new tokens": str(request.max_new_tokens),
        "max pixels": str(request.max_pixels),
    }


def model_digest(source: Source) -> str:
    """The commit of a hub model, else a digest of what the model's folder holds."""
    if source.revision is not None:
        return source.revision
    digest = hashlib.sha256()
    kinds = ("*.json", "*.safetensors", "*.jinja", "*.model")
    files = [file for kind in kinds for file in source.folder.glob(kind)]
    # A setting is no part of the model, and has its own place in every row.
    for file in sorted(file for file in files if file.name != CONFIG_NAME):
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()[:16]


def _blocks(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    count = -(-min(size, _WHOLE_BYTES) // _BLOCK_BYTES)
    with path.open("rb") as file:
        for number in range(count):
            if size > _WHOLE_BYTES:
                file.seek(number * (size - _BLOCK_BYTES) // (count - 1))
            yield file.read(_BLOCK_BYTES)
