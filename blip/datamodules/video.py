"""Clips to frames: uniformly sampled, decoded by PyAV with one thread, within bounds that strangers' files cannot leave.

PyAV is in the extra `video`. Only the formats below are opened, told by the first bytes and never guessed, so that no playlist can name another file.
Like pictures, frames are seen as they are stored: rotation and pixel shape are ignored.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from blip.datamodules.images import ImageError, resize_square

MAX_CLIP_BYTES = 200_000_000  # of one clip's file
MAX_FRAMES = 30_000  # 1,000 seconds at 30 a second
MAX_FRAME_PIXELS = 9_000_000  # 4,096 x 2,160
SOUND = 0.9  # share of the packets that must give frames
MAX_PIXELS = 40_000_000_000  # of all frames that have to be decoded: 15,000 of 1,920 x 1,080


def clip(data: bytes, frames: int, size: int) -> np.ndarray:
    """`frames` frames as squares, [F, size, size, 3] uint8 RGB; ImageError as `frames_of`."""
    return np.stack(frames_of(data, frames, size))


def sampled(length: int, frames: int) -> list[int]:
    """Numbers of the frames that are seen of `length`: 0, s, 2s, ... with s = length // frames (paper's code).

    Of a clip with fewer frames than that, each is seen several times.
    """
    step = length // frames
    return [i * step for i in range(frames)] if step else [i * length // frames for i in range(frames)]


def frames_of(data: bytes, frames: int, size: int | None = None) -> list[np.ndarray]:
    """The sampled frames in a clip's bytes, [H, W, 3] uint8 RGB each, as squares of `size` where that is given.

    ImageError for anything that does not give all of them.
    """
    av = library()
    try:
        length = _length(av, data)
        wanted = sampled(length, frames)
        found, seen = _decode(av, data, wanted, size)
        if wanted[-1] not in found and seen >= SOUND * length:  # some codecs have packets that show nothing
            wanted = sampled(seen, frames)
            found, seen = _decode(av, data, wanted, size)
    except ImageError:
        raise
    except Exception as error:  # PyAV raises one class for each of libav's errors, and others where headers lie
        raise ImageError("damaged", f"{len(data)} bytes, {error or type(error).__name__}") from error
    if wanted[-1] not in found:
        raise ImageError("cut short", f"{seen} frames of {length}")
    return [found[number] for number in wanted]


def _decode(av: Any, data: bytes, wanted: list[int], size: int | None) -> tuple[dict[int, np.ndarray], int]:
    """(the wanted frames by number, as many as there are; how many were decoded)"""
    found: dict[int, np.ndarray] = {}
    number = -1
    with _opened(av, data) as container:
        stream = container.streams.video[0]
        # before a frame is decoded, for the header decides how much memory it takes
        if stream.width * stream.height > MAX_FRAME_PIXELS:
            raise ImageError("too large", f"frames of {stream.width} x {stream.height}")
        if (wanted[-1] + 1) * stream.width * stream.height > MAX_PIXELS:
            raise ImageError("too costly", f"{wanted[-1] + 1} frames of {stream.width} x {stream.height}")
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # what follows may say otherwise
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                if frame.is_corrupt:
                    raise ImageError("damaged", f"frame {number}")
                pixels = frame.to_ndarray(format="rgb24")
                found[number] = pixels if size is None else resize_square(pixels, size)
            if number == wanted[-1]:
                break
    return found, number + 1


def _length(av: Any, data: bytes) -> int:
    """Frames of a clip, by its packets: what its header tells may be wrong."""
    with _opened(av, data) as container:
        if not container.streams.video:
            raise ImageError("without pictures", f"{len(container.streams)} streams, none of video")
        length = 0
        for packet in container.demux(container.streams.video[0]):
            length += packet.size > 0
            if length > MAX_FRAMES:
                raise ImageError("too long", f"more than {MAX_FRAMES} frames")
    if not length:
        raise ImageError("empty", "no frame")
    return length


def _opened(av: Any, data: bytes) -> Any:
    if data[4:8] == b"ftyp":
        name = "mp4"
    elif data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        name = "avi"
    elif data[:4] == b"\x1aE\xdf\xa3":
        name = "matroska"
    else:
        raise ImageError("not a clip" if data else "empty", f"{len(data)} bytes that begin with {data[:16]!r}")
    return av.open(io.BytesIO(data), format=name)


def library() -> Any:
    """PyAV; OSError that says how to get it where it is missing."""
    try:
        import av
    except ImportError:
        raise OSError(
            "clips are decoded by PyAV, which is not installed: pip install 'blip-lightning[video]'"
        ) from None
    return av
