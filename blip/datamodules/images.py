"""Bytes to pictures: decoding that strangers' files cannot hurt, and the augmentation of training, as uint8 throughout.

How a file is decoded depends on its bytes alone, never on its name, so a run can be repeated. Like the released pipeline, this
one ignores EXIF rotation and colour profiles: pictures are seen as they are stored. The augmentation is the released one
(RandomResizedCrop, horizontal flip, RandAugment with 2 operations at level 5 of 10) by cheaper means with equal results:
operations that do nothing at that level are skipped, tables and shifts stand for arithmetic and warps. What differs, and by
how much, is measured by `benchmarks/loader.py`.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import PIL.Image
import simplejpeg
import torch
from torch.nn.functional import interpolate

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # what PIL may take bytes for: none that starts other programs
MAX_PIXELS = 50_000_000
MAX_BYTES = 100_000_000  # of one picture's file; larger ones are left out unread
MAX_SCANS = 100  # of a progressive JPEG; each scan costs a pass over all pixels, and a file can hold thousands
BAND = 1024  # rows that are converted at once
FILL = 128  # grey that warps and shifts leave behind
_SHEAR, _DEGREES, _SHIFT = 0.15, 15.0, 5  # level 5 of 10
_LEVELS = np.arange(256)


class ImageError(ValueError):
    """A file that gives no picture; `reason` is one of a few words to count by, the text says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason

    def __reduce__(self) -> tuple:
        return ImageError, (self.reason, str(self).removeprefix(f"{self.reason}: "))


@dataclass(frozen=True)
class AugmentConfig:
    """What training does to a picture.

    size: side of the square that comes out, pixels
    scale: least and greatest share of the area that the crop keeps (paper: 0.2 in pre-training, 0.5 in fine-tuning, to 1)
    flip: mirror every second picture
    randaugment: two of ten operations, each with probability 1/2
    released_autocontrast: AutoContrast as the released code has it, where a channel without black turns all white
    """

    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    randaugment: bool = True
    released_autocontrast: bool = False

    def __post_init__(self) -> None:
        low, high = self.scale
        if self.size < 1 or not 0 < low <= high <= 1:
            raise ValueError(
                f"augment: size={self.size} must be positive and scale={self.scale} two shares, 0 < low <= high <= 1"
            )


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture in a file's bytes, [H, W, 3] uint8 RGB; of an animation the first frame.

    Transparent pictures are laid on white, 16-bit grey is scaled to 8 bits. Raises ImageError for anything else, and for a
    picture of more than `max_pixels` before a pixel of it is decoded.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if _plain_jpeg_size(data, max_pixels) is not None:
        try:
            return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:  # strict: damage that PIL may know to be harmless, or else can name
            pass
    return _decode_any(data, max_pixels)


def training_view(
    data: bytes, config: AugmentConfig, rng: np.random.Generator, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """`augment(decode(data), config, rng)` to the last bit and sooner: of a baseline JPEG, rows below the crop stay undecoded.

    Damage among those rows goes unseen where `decode` would refuse the file; a file that is cut short is refused as there.
    """
    size = _plain_jpeg_size(data, max_pixels)
    frame = _frame_header(data) if size is not None else None
    # without its end mark a file may be cut short, which only decoding it to the end can tell
    if size is None or frame is None or data[frame + 1] != 0xC0 or data[-2:] != b"\xff\xd9":
        return augment(decode(data, max_pixels), config, rng)
    top, left, height, width = crop_box(*size, config.scale, rng)
    # Whole blocks of up to 16 rows, and the two rows that smooth upsampling of the colours looks ahead.
    rows = -(-(top + height + 2) // 16) * 16
    if rows < size[0]:
        shortened = bytearray(data)
        struct.pack_into(">H", shortened, frame + 5, rows)  # the header's height is where decoding stops
        try:
            image = simplejpeg.decode_jpeg(shortened, "RGB", strict=False)  # strict would mind the bytes that are left
        except ValueError:
            image = decode(data, max_pixels)
    else:
        image = decode(data, max_pixels)
    return _finish(image[top : top + height, left : left + width], config, rng)


def resize_square(image: np.ndarray, size: int) -> np.ndarray:
    """The whole picture as a square, aspect not kept (evaluation), [H, W, 3] -> [size, size, 3] uint8."""
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # [1, 3, H, W], channels last: the fast path for uint8
    resized = interpolate(pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def augment(image: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """One random view of a picture for training, [H, W, 3] -> [size, size, 3] uint8; every draw comes from `rng`.

    Only `rng.random()` is used: its values, unlike those of other methods, follow from the bit stream alone.
    """
    top, left, height, width = crop_box(image.shape[0], image.shape[1], config.scale, rng)
    return _finish(image[top : top + height, left : left + width], config, rng)


def crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    rng: np.random.Generator,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random crop: area by `scale`, aspect log-uniform in `ratio` (torchvision's rule)."""
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w
    # no room for such a crop: the widest middle part whose aspect is allowed
    w, h = width, height
    if width < ratio[0] * height:
        h = max(1, round(width / ratio[0]))
    elif width > ratio[1] * height:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def autocontrast(image: np.ndarray, sign: int = 1) -> np.ndarray:
    """Stretches each channel over 0 to 255."""
    return _stretch(image, lambda low: -low)


def autocontrast_as_released(image: np.ndarray, sign: int = 1) -> np.ndarray:
    """AutoContrast with its offset computed in a byte: a channel whose darkest value is above 0 turns all white."""
    return _stretch(image, lambda low: -low % 256)


def equalize(image: np.ndarray, sign: int = 1) -> np.ndarray:
    """Makes each channel's histogram flat, as PIL does."""
    tables = np.empty((1, 256, 3), np.uint8)
    for channel, plane in enumerate(cv2.split(image)):
        counts = cv2.calcHist([plane], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        if step == 0:
            tables[0, :, channel] = _LEVELS
            continue
        before = np.cumsum(counts) - counts  # pixels darker than each level
        tables[0, :, channel] = ((before + step // 2) // step).clip(0, 255)
    return cv2.LUT(image, tables)


def shear_x(image: np.ndarray, sign: int) -> np.ndarray:
    return _warp(image, np.array([[1, sign * _SHEAR, 0], [0, 1, 0]], np.float32))


def shear_y(image: np.ndarray, sign: int) -> np.ndarray:
    return _warp(image, np.array([[1, 0, 0], [sign * _SHEAR, 1, 0]], np.float32))


def rotate(image: np.ndarray, sign: int) -> np.ndarray:
    height, width = image.shape[:2]
    return _warp(image, cv2.getRotationMatrix2D((width / 2, height / 2), sign * _DEGREES, 1))


def shift_x(image: np.ndarray, sign: int) -> np.ndarray:
    """Moves the picture left (sign 1) or right by 5 pixels: whole pixels, so a copy is what the warp gives."""
    moved = np.full_like(image, FILL)
    if sign > 0:
        moved[:, :-_SHIFT] = image[:, _SHIFT:]
    else:
        moved[:, _SHIFT:] = image[:, :-_SHIFT]
    return moved


def shift_y(image: np.ndarray, sign: int) -> np.ndarray:
    """Moves the picture up (sign 1) or down by 5 pixels."""
    moved = np.full_like(image, FILL)
    if sign > 0:
        moved[:-_SHIFT] = image[_SHIFT:]
    else:
        moved[_SHIFT:] = image[:-_SHIFT]
    return moved


# The released list in its order: identity, brightness and sharpness change nothing at level 5, yet take their share of draws.
OPERATIONS: tuple[Callable[..., np.ndarray] | None, ...] = (
    None, autocontrast, equalize, None, None, shear_x, shear_y, shift_x, shift_y, rotate,
)  # fmt: skip


OPERATIONS_AS_RELEASED = tuple(
    autocontrast_as_released if operation is autocontrast else operation for operation in OPERATIONS
)


def _finish(crop: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Resizing, flip and RandAugment of a crop."""
    view = resize_square(crop, config.size)
    if config.flip and rng.random() < 0.5:
        view = cv2.flip(view, 1)
    if config.randaugment:
        operations = OPERATIONS_AS_RELEASED if config.released_autocontrast else OPERATIONS
        for _ in range(2):
            operation = operations[int(rng.random() * len(operations))]
            applied, sign = rng.random() < 0.5, 1 if rng.random() < 0.5 else -1
            if applied and operation is not None:
                view = operation(view, sign)
    return view


def _stretch(image: np.ndarray, offset: Callable[[int], int]) -> np.ndarray:
    tables = np.empty((1, 256, 3), np.uint8)
    for channel, plane in enumerate(cv2.split(image)):
        low, high = int(plane.min()), int(plane.max())
        if high > low:
            scale = 255 / (high - low)
            tables[0, :, channel] = (_LEVELS * scale + offset(low) * scale).clip(0, 255)
        else:
            tables[0, :, channel] = _LEVELS
    return cv2.LUT(image, tables)


def _warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return cv2.warpAffine(image, matrix, image.shape[1::-1], flags=cv2.INTER_LINEAR, borderValue=(FILL, FILL, FILL))


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            "too large", f"{width} x {height} = {width * height / 1e6:.0f} megapixels, limit {max_pixels / 1e6:g}"
        )


def _plain_jpeg_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Height and width of a JPEG that simplejpeg decodes as PIL does; None for all else. ImageError where it would cost too much."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    frame = _frame_header(data)
    baseline = frame is not None and data[frame + 1] in (0xC0, 0xC1)
    if not baseline and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ImageError("too costly", f"a progressive JPEG of {scans} scans, more than {MAX_SCANS}")
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_pixels(width, height, max_pixels)
    return (height, width) if colours in ("YCbCr", "Gray", "RGB") else None  # of CMYK the two make different colours


def _frame_header(data: bytes) -> int | None:
    """Where a JPEG's frame header begins (marker, length, bits, height, width); walks the segments before the first scan."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return at
        at += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]  # segments may follow fill bytes
    return None


def _decode_any(data: bytes, max_pixels: int) -> np.ndarray:
    """The picture by PIL: whatever is not a plain JPEG, and the last word on what is broken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL tells of every odd EXIF field
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                _check_pixels(*picture.size, max_pixels)
                picture.load()
                image = np.empty((picture.height, picture.width, 3), np.uint8)
                for top in range(
                    0, picture.height, BAND
                ):  # in bands, or the copies on the way need four times the memory
                    bottom = min(top + BAND, picture.height)
                    image[top:bottom] = _rgb(picture.crop((0, top, picture.width, bottom)))
                return image
    except PIL.UnidentifiedImageError as error:
        raise ImageError("not an image", f"{len(data)} bytes that begin with {data[:16]!r}") from error
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise ImageError("too large", str(error)) from error
    except ImageError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error ... on damaged bytes
        reason = "cut short" if "truncated" in str(error).lower() else "damaged"
        raise ImageError(reason, f"{len(data)} bytes, {error or type(error).__name__}") from error


def _rgb(picture: PIL.Image.Image) -> np.ndarray:
    if picture.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would clip it at 255
        eight_bits = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(eight_bits[np.asarray(picture).clip(0, 65535)][..., None], 3, axis=2)
    if "transparency" in picture.info or picture.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        layer = picture.convert("RGBA")
        paper = PIL.Image.new("RGB", layer.size, "white")
        paper.paste(layer, mask=layer)
        return np.asarray(paper)
    return np.asarray(picture.convert("RGB"))
