"""Image files to RGB: what is odd about a file is put right and noted, what is broken is one clear error."""

import hashlib
import io
import os
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from plphp_cli.errors import ImageError

# Pillow's own limit for a suspected decompression bomb: 256 MiB of RGB.
MAX_IMAGE_PIXELS = 89_478_485
MAX_FILE_BYTES = 1 << 30

# What Pillow's decoders raise on damaged files; which one depends on the format and on the damaged byte.
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, ArithmeticError, LookupError, TypeError, AttributeError),
    *(RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
)
_BACKGROUND = (255, 255, 255)


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """One image ready for a processor.

    Attributes:
        image: RGB, 8 bit, upright.
        path: as the user gave it.
        original_size: (width, height) in pixels as the file holds them, before turning and resizing.
        notes: what was changed, in words.
        sha256: hex digest of the file's bytes.
    """

    image: Image.Image
    path: str
    original_size: tuple[int, int]
    notes: tuple[str, ...]
    sha256: str


def load_image(path: str | os.PathLike[str], max_pixels: int | None = None) -> LoadedImage:
    """Read an image file as 8-bit RGB.

    Of several frames the first is taken; EXIF rotation is applied; transparency is laid over white; deeper
    samples are scaled to 8 bit. With `max_pixels` a larger image is reduced, keeping its aspect ratio.

    Raises:
        ImageError: the file is missing, unreadable, empty, damaged, no image, without pixels or absurdly
            large, or `max_pixels` is below 1.
    """
    if max_pixels is not None and max_pixels < 1:
        raise ImageError(f"max pixels = {max_pixels}; expected 1 or more")
    name = os.fspath(path)
    content = _read(name)
    notes: list[str] = []
    with warnings.catch_warnings():
        # Pillow warns about metadata it cannot read; the pixels are what counts, and they are checked.
        warnings.simplefilter("ignore")
        image, original_size = _decode(name, content, notes)
        if max_pixels is not None:
            image = _reduce(image, max_pixels, notes)
    return LoadedImage(image, name, original_size, tuple(notes), hashlib.sha256(content).hexdigest())


def _read(name: str) -> bytes:
    if name.startswith(("http://", "https://")):
        raise ImageError(f"image {name} is an address, not a file", hint="download it and name the file")
    path = Path(name)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"image {name} is a directory", hint="name the image files in it")
        # A pipe is a file that a shell makes (`<(...)`); a device may never end.
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
            raise ImageError(f"image {name} is not a file")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise ImageError(f"image {name!r} does not exist", hint=_nearest(path)) from error
    except PermissionError as error:
        raise ImageError(
            f"image {name} cannot be read: permission denied", hint="check the file's permissions"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"image {name!r} cannot be read: {reason}") from error
    if not content:
        raise ImageError(f"image {name} is empty (0 bytes)", hint="fetch or export it again")
    if len(content) > MAX_FILE_BYTES:
        raise ImageError(f"image {name} is larger than 1 GiB", hint="reduce it first")
    return content


def _nearest(path: Path) -> str:
    from difflib import get_close_matches

    try:
        names = [item.name for item in path.parent.iterdir()]
    except OSError:
        return f"there is no folder {path.parent}"
    close = get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else "check the path"


def _decode(name: str, content: bytes, notes: list[str]) -> tuple[Image.Image, tuple[int, int]]:
    too_large = ImageError(
        f"image {name} has more than {MAX_IMAGE_PIXELS:,} pixels, which looks like a decompression bomb",
        hint="reduce the file first if you trust it",
    )
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        original_size = image.size
        if min(original_size) < 1:
            raise ImageError(f"image {name} has no pixels ({original_size[0]}x{original_size[1]})")
        if original_size[0] * original_size[1] > MAX_IMAGE_PIXELS:
            raise too_large
        frames, file_format = getattr(image, "n_frames", 1), image.format
        image.seek(0)
        image.load()
        # A camera's MPO holds a preview beside the picture: nobody calls that an animation.
        if frames > 1 and file_format != "MPO":
            notes.append(f"first of {frames} frames")
        image = _upright(image, notes)
        return _to_rgb(image, notes), original_size
    except UnidentifiedImageError as error:
        raise ImageError(
            f"image {name} is not an image in a format that Pillow reads",
            hint="convert it to PNG or JPEG",
        ) from error
    except Image.DecompressionBombError as error:
        raise too_large from error
    except ImageError:
        raise
    except _DECODER_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(
            f"image {name} is damaged: {reason}", hint="the file may be cut short: fetch or export it again"
        ) from error


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation not in range(2, 9):
            return image
        turned = ImageOps.exif_transpose(image)
    except _DECODER_ERRORS:
        return image
    notes.append(f"turned upright (EXIF orientation {orientation})")
    return turned


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_samples(image, notes)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        opaque = layer.getchannel("A").getextrema() == (255, 255)
        background = Image.new("RGBA", layer.size, (*_BACKGROUND, 255))
        if not opaque:
            notes.append("transparency laid over white")
        return Image.alpha_composite(background, layer).convert("RGB")
    if image.mode == "CMYK":
        notes.append("CMYK converted to RGB without a colour profile")
    return image.convert("RGB")


def _from_deep_samples(image: Image.Image, notes: list[str]) -> Image.Image:
    """Grey samples of 16 or 32 bits, or floats, scaled to 8 bit (Pillow's own conversion clips them)."""
    samples = np.asarray(image).astype(np.float64)
    if not np.isfinite(samples).all():
        raise ValueError("it holds samples that are not numbers")
    low, high = float(samples.min()), float(samples.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and high <= 65535):
        low, high, kind = 0.0, 65535.0, "16-bit samples"
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high, kind = 0.0, 1.0, "float samples in [0, 1]"
    elif image.mode == "F" and low >= 0 and high <= 255:
        low, high, kind = 0.0, 255.0, "float samples in [0, 255]"
    else:
        kind = f"samples from {low:g} to {high:g}"
    notes.append(f"{kind} scaled to 8 bit")
    scaled = (samples - low) * (255.0 / max(high - low, np.finfo(np.float64).tiny))
    return Image.fromarray(np.rint(scaled).astype(np.uint8), mode="L").convert("RGB")


def _reduce(image: Image.Image, max_pixels: int, notes: list[str]) -> Image.Image:
    width, height = image.size
    if width * height <= max_pixels:
        return image
    scale = (max_pixels / (width * height)) ** 0.5
    new_width, new_height = max(1, int(width * scale)), max(1, int(height * scale))
    # A side cannot fall below 1 pixel: the other one then carries the whole reduction.
    new_width, new_height = min(new_width, max_pixels), min(new_height, max_pixels)
    notes.append(f"reduced from {width}x{height} to {new_width}x{new_height}")
    return image.resize((new_width, new_height), Image.Resampling.LANCZOS)
