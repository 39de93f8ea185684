"""A clip is seen as a few frames at even distances, and a clip that would hurt is not seen at all."""

from __future__ import annotations

import sys
from contextlib import suppress

import numpy as np
import pytest

from blip.datamodules import video
from blip.datamodules.images import ImageError
from blip.datamodules.video import frames_of, sampled
from tests.datamodules.making import clip

pytest.importorskip("av", reason="clips need PyAV, the extra `video`")


def levels(frames) -> list[float]:
    return [float(frame.mean()) for frame in frames]


@pytest.mark.parametrize(
    ("length", "numbers"),
    [(20, [0, 5, 10, 15]), (23, [0, 5, 10, 15]), (4, [0, 1, 2, 3]), (3, [0, 0, 1, 2]), (1, [0, 0, 0, 0])],
)
def test_frames_are_taken_at_even_distances_from_the_first(length, numbers):
    assert sampled(length, 4) == numbers


@pytest.mark.parametrize(
    ("codec", "container"),
    [("mpeg4", "mp4"), ("libx264", "mp4"), ("mpeg4", "avi"), ("libvpx", "webm"), ("libx264", "matroska")],
)
def test_the_frames_asked_for_come_whatever_the_container(codec, container):
    found = levels(frames_of(clip(3, 20, codec, container), 4))
    assert np.allclose(found, [3, 43, 83, 123], atol=3)


def test_a_clip_shorter_than_the_frames_asked_for_shows_some_twice():
    assert np.allclose(levels(frames_of(clip(0, 3), 6)), [0, 0, 8, 8, 16, 16], atol=3)


def test_frames_come_as_squares():
    frames = video.clip(clip(0), 4, 24)
    assert (frames.shape, frames.dtype) == ((4, 24, 24, 3), np.uint8)
    assert np.allclose(levels(frames), levels(frames_of(clip(0), 4)), atol=1)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "empty"),
        (lambda data: b"#EXTM3U\n/etc/passwd\n", "not a clip"),
        (lambda data: b"ffconcat version 1.0\nfile /etc/passwd\n", "not a clip"),
        (lambda data: data[: len(data) // 2], "damaged"),
        (lambda data: data[:100], "damaged"),
        (lambda data: data[:12] + bytes(5000), "damaged"),
    ],
)
def test_damaged_and_foreign_files_have_a_reason(damage, reason):
    with pytest.raises(ImageError) as caught:
        frames_of(damage(clip(0, codec="libx264")), 4)
    assert caught.value.reason == reason


def test_bytes_changed_at_random_give_frames_or_a_reason_and_nothing_else():
    data, rng = clip(0, codec="libx264"), np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(data)
        for at in rng.integers(0, len(data), 20):
            changed[at] = int(rng.integers(256))
        with suppress(ImageError):
            assert len(frames_of(bytes(changed), 4)) == 4


@pytest.mark.parametrize(
    ("bound", "value", "reason"),
    [
        ("MAX_FRAMES", 19, "too long"),
        ("MAX_FRAME_PIXELS", 48 * 32 - 1, "too large"),
        ("MAX_PIXELS", 1000, "too costly"),
    ],
)
def test_clips_beyond_the_bounds_are_not_decoded(monkeypatch, bound, value, reason):
    monkeypatch.setattr(video, bound, value)
    with pytest.raises(ImageError) as caught:
        frames_of(clip(0, 20), 4)
    assert caught.value.reason == reason


def test_a_file_with_sound_alone_is_no_clip():
    import io

    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(ImageError) as caught:
        frames_of(file.getvalue(), 4)
    assert caught.value.reason == "without pictures"


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(OSError, match=r"blip-lightning\[video\]"):
        frames_of(b"", 4)
