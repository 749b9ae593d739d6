import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from plphp_cli.errors import ImageError
from plphp_cli.images import MAX_IMAGE_PIXELS, load_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def halves(mode="RGB"):
    """4x2: left half red, right half blue."""
    image = Image.new("RGB", (4, 2), RED)
    image.paste(BLUE, (2, 0, 4, 2))
    return image.convert(mode)


def png(width, height, rows=b""):
    """A PNG whose header claims any size."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def write(tmp_path):
    def write(content, name="picture"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def refused(path, message):
    with pytest.raises(ImageError, match=message) as caught:
        load_image(path)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF"])
def test_a_plain_file_keeps_its_pixels(write, file_format):
    path = write(encoded(halves(), file_format, **({"lossless": True} if file_format == "WEBP" else {})))
    loaded = load_image(path)
    assert (loaded.image.mode, loaded.image.size, loaded.original_size) == ("RGB", (4, 2), (4, 2))
    assert loaded.image.tobytes() == halves().tobytes()
    assert loaded.notes == ()
    assert loaded.path == str(path)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# Broken files


def test_missing(tmp_path, write):
    write(b"x", "picture.png")
    assert "did you mean" in refused(tmp_path / "pictrue.png", "does not exist").hint
    assert "no folder" in refused(tmp_path / "nowhere" / "a.png", "does not exist").hint


def test_empty(write):
    refused(write(b""), "empty")


def test_directory(tmp_path):
    refused(tmp_path, "directory")


def test_not_an_image(write):
    refused(write(b"Dear diary, today I rendered a triangle."), "not an image")


def test_an_address(write):
    refused("https://example.org/a.png", "address")


def test_a_device_is_not_read_for_ever():
    refused("/dev/zero", "not a file")


@pytest.mark.skipif(sys.platform != "linux", reason="a file that nobody can read")
def test_unreadable():
    refused("/proc/self/mem", "cannot be read")


@pytest.mark.skipif(os.name != "posix", reason="needs users")
def test_permission_denied(write):
    path = write(encoded(halves(), "PNG"))
    path.chmod(0)
    code = (
        "import os, sys, plphp_cli.images as images, plphp_cli.errors as errors\n"
        "if os.geteuid() == 0: os.setegid(65534); os.seteuid(65534)\n"
        "try: images.load_image(sys.argv[1])\n"
        "except errors.ImageError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert "permission denied" in run.stdout


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated(write, file_format, share):
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    content = encoded(noise, file_format)
    refused(write(content[: int(len(content) * share)]), "damaged|not an image")


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_no_pixels(write, size):
    refused(write(png(*size)), "no pixels|damaged|not an image")
    refused(write(b"GIF89a" + struct.pack("<HHBBB", *size, 0, 0, 0) + b";"), "no pixels|damaged|not an image")


@pytest.mark.parametrize("size", [(MAX_IMAGE_PIXELS + 1, 1), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(write, size):
    refused(write(png(*size)), "decompression bomb")


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file_format=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "PPM", "BMP", "ICO", "TGA"]),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_any_damage_gives_an_image_or_one_clear_error(write, file_format, damage):
    content = bytearray(encoded(Image.effect_noise((16, 16), 50).convert("RGB"), file_format))
    for place, value in damage:
        content[int(place * (len(content) - 1))] = value
    try:
        assert load_image(write(bytes(content))).image.mode == "RGB"
    except ImageError as caught:
        message = caught.message
    else:
        message = ""
    assert "\n" not in message


# Odd files


def test_animated_gif_gives_its_first_frame(write):
    frames = [Image.new("RGB", (3, 3), colour) for colour in (RED, BLUE, (0, 255, 0))]
    loaded = load_image(write(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    assert loaded.image.getpixel((1, 1)) == RED
    assert loaded.notes == ("first of 3 frames",)


def test_cmyk(write):
    loaded = load_image(write(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)))
    assert np.allclose(loaded.image.getpixel((4, 4)), RED, atol=4)
    assert "CMYK" in loaded.notes[0]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_is_scaled_and_not_clipped(write, file_format):
    samples = np.array([[0, 257, 256 * 128, 65535]], dtype=np.uint16)
    loaded = load_image(write(encoded(Image.fromarray(samples), file_format)))
    assert [loaded.image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    assert "16-bit" in loaded.notes[0]


def test_16_bit_colour_is_scaled(write):
    rows = b"\x00" + struct.pack(">6H", 65535, 0, 32896, 0, 65535, 257)
    content = bytearray(png(2, 1, rows))
    content[24] = 16
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    image = load_image(write(bytes(content))).image
    assert [image.getpixel((0, 0)), image.getpixel((1, 0))] == [(255, 0, 128), (0, 255, 1)]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([-10.0, 0.0, 990.0], [0, 3, 255]),
    ],
)
def test_float_samples_are_scaled(write, samples, expected):
    loaded = load_image(write(encoded(Image.fromarray(np.array([samples], dtype=np.float32)), "TIFF")))
    assert [loaded.image.getpixel((x, 0))[0] for x in range(3)] == expected
    assert "scaled" in loaded.notes[0]


def test_samples_that_are_not_numbers_are_refused(write):
    path = write(encoded(Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)), "TIFF"))
    refused(path, "not numbers")


def test_a_flat_deep_image_is_an_image(write):
    samples = np.full((2, 2), 70_000, dtype=np.int32)
    assert load_image(write(encoded(Image.fromarray(samples), "TIFF"))).image.getpixel((0, 0)) == (0, 0, 0)


def test_palette_with_transparency_lies_over_white(write):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    loaded = load_image(write(encoded(image, "PNG", transparency=1)))
    assert [loaded.image.getpixel((x, 0)) for x in (0, 1)] == [RED, (255, 255, 255)]
    assert loaded.notes == ("transparency laid over white",)


def test_half_transparency_mixes_with_white(write):
    loaded = load_image(write(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 51)), "PNG")))
    assert loaded.image.getpixel((0, 0)) == (204, 204, 204)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_alpha_channel_is_not_worth_a_note(write, mode):
    loaded = load_image(write(encoded(Image.new("RGB", (2, 2), (9, 9, 9)).convert(mode), "PNG")))
    assert loaded.notes == ()
    assert loaded.image.getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "LAB"])
def test_other_modes(write, mode):
    image = Image.new("RGB", (2, 2), (255, 255, 255))
    image = image.convert(mode) if mode != "LAB" else Image.new("LAB", (2, 2), (255, 128, 128))
    path = write(encoded(image, "PNG" if mode in "1LP" else "TIFF"))
    assert load_image(path).image.mode == "RGB"


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (20_000, 1), (20_000, 4)])
def test_extreme_shapes(write, size):
    loaded = load_image(write(encoded(Image.new("RGB", size, RED), "PNG")))
    assert loaded.image.size == size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_shows_what_the_camera_saw(write, orientation):
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    undo |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    upright = Image.new("RGB", (16, 8), RED)
    upright.paste(BLUE, (8, 0, 16, 4))
    stored = upright.transpose(Image.Transpose[undo[orientation]]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(write(encoded(stored, "PNG", exif=exif)))
    assert loaded.image.tobytes() == upright.tobytes()
    assert loaded.original_size == stored.size
    assert bool(loaded.notes) == (orientation != 1)


def test_broken_exif_is_ignored(write):
    loaded = load_image(write(encoded(halves(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")))
    assert loaded.image.size == (4, 2)


# Size


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 200_000))
def test_max_pixels_is_kept_and_so_is_the_shape(write, width, height, most):
    loaded = load_image(write(encoded(Image.new("RGB", (width, height)), "BMP")), max_pixels=most)
    new_width, new_height = loaded.image.size
    assert new_width * new_height <= most
    assert loaded.original_size == (width, height)
    if width * height <= most:
        assert (new_width, new_height) == (width, height)
        assert not loaded.notes
    else:
        assert "reduced" in loaded.notes[0]
        scale = (most / (width * height)) ** 0.5
        if min(width, height) * scale >= 1:
            assert abs(new_width - width * scale) <= 1
            assert abs(new_height - height * scale) <= 1


@pytest.mark.parametrize("most", [0, -5])
def test_max_pixels_below_one_is_refused(write, most):
    with pytest.raises(ImageError, match="max pixels"):
        load_image(write(encoded(halves(), "PNG")), max_pixels=most)
