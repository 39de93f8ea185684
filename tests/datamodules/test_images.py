"""Decoding of any bytes and the augmentation, against PIL and against the released operations written out plainly."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from benchmarks.loader import RELEASED_OPERATIONS
from blip.datamodules.images import (
    OPERATIONS,
    OPERATIONS_AS_RELEASED,
    AugmentConfig,
    ImageError,
    augment,
    crop_box,
    decode,
    resize_square,
    training_view,
)


def picture(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    """A smooth coloured picture with some texture, [H, W, 3] uint8, no channel reaching 0 or 255."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(6 * x + 2), np.cos(5 * y), np.sin(7 * (x + y))], axis=2)
    return (125 + 70 * waves + rng.uniform(-15, 15, (height, width, 3))).clip(20, 240).astype(np.uint8)


def encoded(image: PIL.Image.Image | np.ndarray, **how) -> bytes:
    out = io.BytesIO()
    image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
    image.save(out, **{"format": "JPEG", "quality": 90} | how)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises `width` x `height` grey pixels, and whose data is a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def many_scans(data: bytes, count: int) -> bytes:
    """A progressive JPEG with its last scan written `count` times."""
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "no bytes": (lambda: b"", "empty"),
    "a web page": (lambda: b"<html><body>404 not found</body></html>", "not an image"),
    "half a JPEG": (lambda: encoded(picture())[: len(encoded(picture())) // 2], "cut short"),
    "a JPEG's beginning": (lambda: encoded(picture())[:40], "cut short"),
    "half a PNG": (lambda: encoded(picture(), format="PNG")[:2000], "cut short"),
    "a PNG with a changed byte": (
        lambda: encoded(picture(), format="PNG")[:100] + b"?" + encoded(picture(), format="PNG")[101:],
        "damaged",
    ),
    "a PNG of 400 megapixels": (lambda: png_header(20_000, 20_000), "too large"),
    "a PNG of 100 megapixels": (lambda: png_header(10_000, 10_000), "too large"),
    "a PNG of 64 megapixels": (lambda: png_header(8_000, 8_000), "too large"),
    "a JPEG of a thousand scans": (lambda: many_scans(encoded(picture(), progressive=True), 1000), "too costly"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n", "not an image"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_an_error_that_says_what_is_wrong(name: str):
    make, reason = BROKEN[name]
    with pytest.raises(ImageError, match=f"^{reason}: ") as caught:
        decode(make())
    assert caught.value.reason == reason


def test_every_file_made_to_hurt_gives_a_picture_or_an_error(reference: Path):
    refused = {}
    for path in sorted((reference / "data/broken").iterdir()):
        try:
            image = decode(path.read_bytes())
        except ImageError as error:
            refused[path.name] = error.reason
            continue
        assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3), path.name
        for size in (1, 32):
            view = augment(image, AugmentConfig(size), np.random.default_rng(0))
            assert view.shape == resize_square(image, size).shape == (size, size, 3), path.name
    assert refused == {
        "README.md": "not an image",
        "bad_crc.png": "damaged",
        "bomb_20000x20000.png": "too large",
        "not_an_image.jpg": "not an image",
        "random_bytes.jpg": "not an image",
        "truncated.jpg": "cut short",
        "truncated_header.jpg": "cut short",
        "zero_bytes.jpg": "empty",
    }


def test_jpeg_decoding_equals_pil():
    for how in ({}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}):
        data = encoded(picture(61, 83), **how)
        assert np.array_equal(decode(data), np.array(PIL.Image.open(io.BytesIO(data)))), how
    grey = encoded(PIL.Image.fromarray(picture()).convert("L"))
    assert np.array_equal(decode(grey)[..., 1], np.array(PIL.Image.open(io.BytesIO(grey))))


def test_the_limit_of_pixels_is_read_from_the_header():
    data = encoded(picture(60, 80))
    assert decode(data, max_pixels=4800).shape == (60, 80, 3)
    with pytest.raises(ImageError, match="80 x 60"):
        decode(data, max_pixels=4799)
    with pytest.raises(ImageError, match="80 x 60"):
        decode(encoded(picture(60, 80), format="PNG"), max_pixels=4799)


def test_tall_pictures_are_converted_in_bands_without_a_seam():
    tall = picture(2500, 7)
    assert np.array_equal(decode(encoded(tall, format="PNG")), tall)
    palette = PIL.Image.fromarray(tall).quantize(16)
    assert np.array_equal(decode(encoded(palette, format="PNG")), np.array(palette.convert("RGB")))


def test_transparent_parts_become_white():
    image = np.zeros((4, 4, 4), np.uint8)
    image[:2] = (200, 10, 20, 255)
    image[2] = (0, 0, 0, 128)
    decoded = decode(encoded(image, format="PNG"))
    assert decoded[0, 0].tolist() == [200, 10, 20]
    assert decoded[2, 0].tolist() == [127, 127, 127]
    assert decoded[3, 0].tolist() == [255, 255, 255]
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.putpixel((1, 0), 1)
    assert decode(encoded(palette, format="PNG", transparency=0)).tolist() == [[[255, 255, 255], [9, 8, 7]]]


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    ramp = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    assert decode(encoded(PIL.Image.fromarray(ramp), format="PNG"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(kind: str):
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(
        frames[0],
        format=kind,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


def test_pictures_stay_as_they_are_stored():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # "turn by a quarter": ignored, as in the released pipeline
    image = picture(60, 80)
    assert np.array_equal(decode(encoded(image, exif=exif)), decode(encoded(image)))


def test_cmyk_gives_the_colours_that_were_meant():
    data = encoded(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)))
    assert np.abs(decode(data)[0, 0].astype(int) - (255, 0, 0)).max() < 5


def test_resizing_is_close_to_pil():
    image = picture(97, 131)
    for size in (24, 64, 200):
        pil = np.array(PIL.Image.fromarray(image).resize((size, size), PIL.Image.Resampling.BICUBIC)).astype(int)
        difference = np.abs(resize_square(image, size).astype(int) - pil)
        assert difference.mean() < 0.2, size
        assert difference.max() <= 9, size


def test_crops_stay_inside_and_keep_their_share():
    rng = np.random.default_rng(0)
    for height, width in ((480, 640), (300, 200), (1, 1), (1, 1000), (1000, 1), (7, 3)):
        for _ in range(200):
            top, left, h, w = crop_box(height, width, (0.2, 1.0), rng)
            assert 0 <= top <= height - h
            assert 0 <= left <= width - w
            assert h > 0
            assert w > 0
            if min(height, width) >= 200:
                assert 0.19 < h * w / (height * width) <= 1
                assert 0.74 < w / h < 1.35


def test_crops_cover_the_whole_range():
    rng = np.random.default_rng(0)
    shares = [h * w / (480 * 640) for _, _, h, w in (crop_box(480, 640, (0.2, 1.0), rng) for _ in range(2000))]
    assert min(shares) < 0.22
    assert max(shares) > 0.93
    assert 0.45 < np.mean(shares) < 0.55  # below 0.6: many large ones do not fit and are drawn again


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_equal_the_released_ones(number: int, sign: int):
    for seed in range(5):
        image = picture(64, 64, seed)
        if seed % 2:
            image[:, :20] = 0  # a dark part: where the released AutoContrast works
        operation = OPERATIONS_AS_RELEASED[number]
        ours = image if operation is None else operation(image, sign)
        assert np.array_equal(ours, RELEASED_OPERATIONS[number](image.copy(), sign)), seed


def test_autocontrast_is_repaired_unless_asked_for():
    image = picture()
    repaired, released = OPERATIONS[1](image, 1), OPERATIONS_AS_RELEASED[1](image, 1)
    assert released.min() == 255  # no channel of this picture is ever black
    assert repaired.min((0, 1)).tolist() == [0, 0, 0]
    assert repaired.max((0, 1)).min() >= 254  # PIL too cuts 254.99 to 254
    rank = np.argsort(image[..., 0].ravel(), kind="stable")
    assert (np.diff(repaired[..., 0].ravel()[rank].astype(int)) >= 0).all()
    flat = np.full((8, 8, 3), 77, np.uint8)
    assert np.array_equal(OPERATIONS[1](flat, 1), flat)


def test_augmentation_is_a_function_of_its_generator():
    image = picture()
    views = [augment(image, AugmentConfig(32), np.random.default_rng(seed)) for seed in range(30)]
    again = [augment(image, AugmentConfig(32), np.random.default_rng(seed)) for seed in range(30)]
    assert all(np.array_equal(a, b) for a, b in zip(views, again, strict=True))
    assert len({view.tobytes() for view in views}) == 30


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"subsampling": 0},
        {"subsampling": 1},
        {"restart_marker_blocks": 4},
        {"progressive": True},
        {"format": "PNG"},
    ],
    ids=str,
)
def test_skipping_the_rows_below_the_crop_changes_no_bit(how: dict):
    config = AugmentConfig(24, scale=(0.05, 0.5))
    for seed in range(30):
        data = encoded(picture(97, 40 + seed, seed), **how)
        expected = augment(decode(data), config, np.random.default_rng(seed))
        assert np.array_equal(training_view(data, config, np.random.default_rng(seed)), expected), seed


def test_a_file_without_its_end_is_refused_in_training_too():
    data = encoded(picture(200, 200))
    for seed in range(20):
        with pytest.raises(ImageError, match="cut short"):
            training_view(data[: len(data) * 3 // 4], AugmentConfig(24, scale=(0.05, 0.2)), np.random.default_rng(seed))


def test_switches_of_the_augmentation_do_what_they_say():
    image = picture(40, 40)
    plain = AugmentConfig(40, scale=(1.0, 1.0), flip=False, randaugment=False)
    for seed in range(20):  # a crop of all of a square: the only one that fits
        assert np.array_equal(augment(image, plain, np.random.default_rng(seed)), image)
    flipping = AugmentConfig(40, scale=(0.2, 0.2), randaugment=False)
    steady = AugmentConfig(40, scale=(0.2, 0.2), randaugment=False, flip=False)
    flipped = 0
    for seed in range(200):
        a, b = (augment(image, config, np.random.default_rng(seed)) for config in (flipping, steady))
        flipped += np.array_equal(a, b[:, ::-1])
        assert np.array_equal(a, b) or np.array_equal(a, b[:, ::-1])
    assert 70 < flipped < 130
    with pytest.raises(ValueError, match="two shares"):
        AugmentConfig(40, scale=(0.0, 1.0))
