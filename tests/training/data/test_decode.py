"""Pictures of every mode become 8-bit RGB with their greys in place, upright, first frame."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from mesa_train.training.data.decode import decode

# A ramp over 16 bits, and its upper 8 bits.
RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
GREY = (RAMP >> 8).astype(np.uint8)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(encoded):
    """(H, W) of a picture whose three channels must be equal."""
    image = decode(encoded)
    assert image.mode == "RGB"
    array = np.asarray(image)
    assert (array == array[..., :1]).all()
    return array[..., 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits(kind):
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(RAMP), kind)), GREY)


def test_16_bits_the_other_way_round():
    image = Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(saved(image, "TIFF")), GREY)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 256, 65535], [0, 1, 255]),  # 16 bits in 32
        ([0, 1, 200], [0, 0, 0]),  # 16 bits, dark
        ([-1000, 0, 3000], [0, 64, 255]),  # its own range: 1000 / 4000 * 255 = 63.75
        ([0, 2**30, 2**31 - 1], [0, 128, 255]),
        ([-5, -5, -5], [0, 0, 0]),
    ],
)
def test_32_bit_integers(values, expected):
    image = Image.fromarray(np.array([values], np.int32))
    assert image.mode == "I"
    assert pixels(saved(image, "TIFF")).tolist() == [expected]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.4, 255.0], [0, 100, 255]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 5e4, 1e5], [0, 128, 255]),
        ([np.nan, 0.5, np.inf], [128, 128, 128]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
    ],
)
def test_floats(values, expected):
    image = Image.fromarray(np.array([values], np.float32))
    assert pixels(saved(image, "TIFF")).tolist() == [expected]


def test_floats_without_a_finite_pixel_are_no_picture():
    image = Image.fromarray(np.full((2, 2), np.nan, np.float32))
    with pytest.raises(ValueError, match="no pixel is finite"):
        decode(saved(image, "TIFF"))


def test_other_modes():
    """None warns, and each has the greys of the ramp."""
    grey = Image.fromarray(GREY)
    rgb = grey.convert("RGB")
    alpha = Image.fromarray(255 - GREY)
    palette = rgb.quantize(256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for encoded, tolerance in (
            (saved(grey, "PNG"), 0),
            (saved(Image.merge("LA", (grey, alpha)), "PNG"), 0),
            (saved(Image.merge("RGBA", (grey, grey, grey, alpha)), "PNG"), 0),
            # Median cut merges neighbouring greys.
            (saved(palette, "PNG", transparency=bytes(range(256))), 2),
            (saved(palette, "GIF"), 2),
        ):
            found = pixels(encoded)
            assert np.abs(found.astype(int) - GREY).max() <= tolerance
    bits = Image.fromarray(GREY > 127)
    assert np.unique(pixels(saved(bits, "PNG"))).tolist() == [0, 255]
    cmyk = np.asarray(decode(saved(rgb.convert("CMYK"), "TIFF")))
    assert np.abs(cmyk[..., 0].astype(int) - GREY).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    colours = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    encoded = saved(Image.fromarray(colours), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(np.asarray(decode(encoded)), np.asarray(expected))
    assert decode(encoded).size == ((4, 6) if orientation > 4 else (6, 4))


def test_damaged_exif_is_ignored():
    colours = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    for damaged in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\1"):
        assert decode(saved(colours, "PNG", exif=damaged)).size == (6, 4)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), (v, v, v)) for v in (10, 200)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    encoded = saved(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert pixels(encoded).max() == 10


def test_no_picture():
    with pytest.raises(ValueError, match="null"):
        decode(None)
