"""Pictures a second, one core, from the bytes of a JPEG to its place in the batch; beside bare decoding and the released way.

    python benchmarks/loader.py [--photos FOLDER] [--json FILE]

The released way is put together here once more (torchvision around PIL, its ten operations written out plainly), so that both
are timed on the same files in the same run, turn by turn; its two float conversions at the end are also timed apart, because
ours normalises on the device. Time is the processor's, and a ratio is the median of the rounds' own ratios, so that a busy
neighbour hits both sides alike.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import simplejpeg
import torch

from benchmarks.report import begin, end
from blip.datamodules.images import AugmentConfig, augment, decode, training_view

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
GREY = (128, 128, 128)


# --- the released pipeline: decode, crop, resize, flip, two of ten operations, to float, normalise -----------------------


def released_autocontrast(image: np.ndarray) -> np.ndarray:
    planes = []
    for plane in cv2.split(image):
        low, high = plane.min(), plane.max()
        table = np.arange(256)
        if high > low:
            scale = 255 / (high - low)
            with np.errstate(over="ignore"):
                table = np.arange(256) * scale + -low * scale  # -low wraps around in a byte
        planes.append(table.clip(0, 255).astype(np.uint8)[plane])
    return cv2.merge(planes)


def released_equalize(image: np.ndarray) -> np.ndarray:
    planes = []
    for plane in cv2.split(image):
        counts = cv2.calcHist([plane], [0], None, [256], [0, 256])
        step = np.sum(counts[counts != 0][:-1]) // 255
        if step != 0:
            before = np.empty_like(counts)
            before[0], before[1:] = step // 2, counts[:-1]
            plane = (np.cumsum(before) // step).clip(0, 255).astype(np.uint8)[plane]
        planes.append(plane)
    return cv2.merge(planes)


def released_brightness(image: np.ndarray) -> np.ndarray:
    factor = 0.5 * 1.8 + 0.1
    return (np.arange(256, dtype=np.float32) * factor).clip(0, 255).astype(np.uint8)[image]


def released_warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return cv2.warpAffine(image, np.float32(matrix), (width, height), flags=cv2.INTER_LINEAR, borderValue=GREY)


def released_rotate(image: np.ndarray, sign: int) -> np.ndarray:
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), sign * 15.0, 1)
    return cv2.warpAffine(image, matrix, (width, height), borderValue=GREY)


RELEASED_OPERATIONS: tuple[Callable[[np.ndarray, int], np.ndarray], ...] = (
    lambda image, sign: image,  # identity
    lambda image, sign: released_autocontrast(image),
    lambda image, sign: released_equalize(image),
    lambda image, sign: released_brightness(image),
    lambda image, sign: image,  # sharpness, which returns its input at factor 1
    lambda image, sign: released_warp(image, [[1, sign * 0.15, 0], [0, 1, 0]]),
    lambda image, sign: released_warp(image, [[1, 0, 0], [sign * 0.15, 1, 0]]),
    lambda image, sign: released_warp(image, [[1, 0, -sign * 5], [0, 1, 0]]),
    lambda image, sign: released_warp(image, [[1, 0, 0], [0, 1, -sign * 5]]),
    released_rotate,
)


class Released:
    """The released way: torchvision around PIL, with the operations above between."""

    def __init__(self, size: int) -> None:
        from torchvision import transforms  # only after blip.datamodules, which makes it importable beside any torch

        bicubic = transforms.InterpolationMode.BICUBIC
        self.crop = transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=bicubic)
        self.flip = transforms.RandomHorizontalFlip()
        self.to_tensor = transforms.ToTensor()
        self.to_unit = transforms.Normalize(MEAN, STD)

    def view(self, data: bytes) -> np.ndarray:
        """All up to uint8, [S, S, 3]."""
        image = np.array(self.flip(self.crop(PIL.Image.open(io.BytesIO(data)).convert("RGB"))))
        for operation in np.random.choice(np.arange(10), 2):
            if np.random.random() <= 0.5:
                image = RELEASED_OPERATIONS[operation](image, 1 if np.random.random() <= 0.5 else -1)
        return image

    def normalise(self, image: np.ndarray) -> torch.Tensor:
        """uint8 [S, S, 3] to float [3, S, S]."""
        return self.to_unit(self.to_tensor(image))

    def batch(self, files: list[bytes]) -> torch.Tensor:
        """The float batch, [B, 3, S, S]."""
        return torch.stack([self.normalise(self.view(data)) for data in files])


# --- the measurement ----------------------------------------------------------------------------------------------------


def ours(files: list[bytes], size: int, seed: int) -> torch.Tensor:
    """The uint8 batch, [B, 3, S, S]."""
    config = AugmentConfig(size)
    views = [training_view(data, config, np.random.default_rng((seed, n))) for n, data in enumerate(files)]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def each(step: Callable, things: Iterable) -> None:
    """Does a step with each thing and keeps nothing: results that pile up would be paid for in page faults."""
    for thing in things:
        step(thing)


def measure(files: list[bytes], size: int, repeats: int, batch: int) -> dict[str, np.ndarray]:
    """Milliseconds of processor time a picture of each way in each round, [repeats]; the ways take turns within a round."""
    batches = [files[at : at + batch] for at in range(0, len(files), batch)]
    views = [augment(decode(data), AugmentConfig(size), np.random.default_rng(0)) for data in files]
    stacked = [
        torch.from_numpy(np.stack(views[at : at + batch])).permute(0, 3, 1, 2) for at in range(0, len(files), batch)
    ]
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (MEAN, STD))
    released = Released(size)
    ways: dict[str, Callable[[int], object]] = {
        "ours": lambda n: each(lambda part: ours(part, size, n), batches),
        "released": lambda n: each(released.batch, batches),
        "bare decoding": lambda n: each(lambda data: simplejpeg.decode_jpeg(data, "RGB"), files),
        "released, decoding": lambda n: each(lambda data: PIL.Image.open(io.BytesIO(data)).convert("RGB"), files),
        "released, normalising": lambda n: each(released.normalise, views),
        "normalising the uint8 batch": lambda n: each(
            lambda part: part.to(torch.float32).sub_(mean).div_(std), stacked
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(-1, repeats):
        for name, way in ways.items():
            start = time.process_time()
            way(n + 1)
            if n >= 0:  # the first round warms caches and allocators
                times[name].append((time.process_time() - start) / len(files) * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def rows(ms: dict[str, np.ndarray]) -> list[dict]:
    """The rows of the JSON contract: medians over the rounds; a ratio is the median of the rounds' own ratios."""

    def row(name: str, mine: np.ndarray, peer: str, other: np.ndarray, unit: str = "pairs/s per core") -> dict:
        value, peer_value = (mine, other) if unit.startswith("ms") else (1e3 / mine, 1e3 / other)
        return {
            "name": name,
            "value": round(float(np.median(value)), 2),
            "unit": unit,
            "peer": peer,
            "peer_value": round(float(np.median(peer_value)), 2),
            "ratio": round(float(np.median(value / peer_value)), 3),
        }

    unfinished = ms["released"] - ms["released, normalising"]
    return [
        row("file to uint8 batch", ms["ours"], "released pipeline, file to float batch", ms["released"]),
        row("file to uint8 batch", ms["ours"], "released pipeline less its normalising", unfinished),
        row("file to uint8 batch", ms["ours"], "bare JPEG decoding (simplejpeg)", ms["bare decoding"]),
        row("bare JPEG decoding (simplejpeg)", ms["bare decoding"], "PIL decoding", ms["released, decoding"]),
        row(
            "normalising the uint8 batch on this core (done on the device in training)",
            ms["normalising the uint8 batch"],
            "ToTensor + Normalize picture by picture",
            ms["released, normalising"],
            unit="ms a picture",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("BLIP_REFERENCE", Path(__file__).resolve().parents[2] / "shared")) / "data/photos"
    parser.add_argument("--photos", type=Path, default=default, help="folder of JPEG files (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=224, help="side of the pictures in the batch (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds over all files (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=50, help="pictures a batch (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    files = [path.read_bytes() for path in sorted(options.photos.glob("*.jpg"))]
    if not files:
        parser.error(f"no .jpg file in {options.photos}; give a folder of photos with --photos")
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    torch.manual_seed(0)
    np.random.seed(0)
    shapes = [decode(data).shape for data in files]
    megapixels = sum(height * width for height, width, _ in shapes) / len(shapes) / 1e6
    head = begin(
        f"{len(files)} JPEG files, mean {sum(map(len, files)) / len(files) / 1024:.0f} KiB and {megapixels:.2f} megapixels, "
        f"to {options.size} px in batches of {options.batch}, median of {options.repeats} rounds",
        note=", of which one core is measured",
        OpenCV=cv2.__version__,
        Pillow=PIL.__version__,
        simplejpeg=simplejpeg.__version__,
        NumPy=np.__version__,
    )
    end(head, rows(measure(files, options.size, options.repeats, options.batch)), options.json)


if __name__ == "__main__":
    main()
