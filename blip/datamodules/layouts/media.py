"""Pictures and clips as they lie on the disk, in folders or zips: found by the names that annotations give them, read in limits.

Nothing that an annotation or a zip names is opened as a path: names are only looked up among the files found.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

from blip.datamodules.images import MAX_BYTES, ImageError

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # what is taken for a picture by its name
CLIP_ENDINGS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")


class File(NamedTuple):
    """A file that was found: the number of its folder or zip, and its path within that."""

    place: int
    name: str


class Place(Protocol):
    """A folder or a zip: `names` are the paths of its files within it."""

    names: list[str]

    def read(self, name: str, limit: int) -> bytes: ...

    def close(self) -> None: ...


class Media:
    """The files of folders and zips, found by their path or the end of it, with or without the ending.

    `a/b.jpg` is meant by `a/b.jpg`, `b.jpg`, `b` and `/data/a/b.jpg`.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """FileNotFoundError or ValueError for a path that is neither a folder nor a zip."""
        self.paths = list(paths)
        self.places: list[Place] = []
        try:
            for path in paths:
                self.places.append(_open(path))
        except BaseException:
            self.__exit__()
            raise
        self.files = [File(number, name) for number, place in enumerate(self.places) for name in place.names]
        self._by_name: dict[str, list[File]] = {}
        for file in self.files:
            path_within = PurePosixPath(file.name)
            for short in dict.fromkeys((path_within.name, path_within.stem)):
                self._by_name.setdefault(short, []).append(file)

    def find(self, name: str) -> list[File]:
        """All files that may be meant: one, where the name is good; the very path, where it exists once."""
        path = PurePosixPath(name)
        files = self._by_name.get(path.name, [])
        if len(exact := [file for file in files if file.name == str(path)]) == 1:
            return exact
        folders = path.parts[:-1]
        return [file for file in files if _ends_alike(folders, PurePosixPath(file.name).parts[:-1])]

    def read(self, file: File, limit: int = MAX_BYTES) -> bytes:
        """The file's bytes; ImageError for what cannot be read or is larger than `limit`."""
        return self.places[file.place].read(file.name, limit)

    def __enter__(self) -> Media:
        return self

    def __exit__(self, *_: object) -> None:
        for place in self.places:
            place.close()


class Folder:
    """The files of a folder and the folders in it, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = sorted(
            Path(root, file).relative_to(folder).as_posix() for root, _, files in os.walk(folder) for file in files
        )

    def read(self, name: str, limit: int) -> bytes:
        path = self.folder / name
        try:
            if not path.is_file():
                raise ImageError("not a file", "a broken link, a pipe or a device")
            _check_size(path.stat().st_size, limit)
            return path.read_bytes()
        except OSError as error:
            raise ImageError("unreadable in the folder", str(error)) from error

    def close(self) -> None:
        pass


class Zip:
    """The members of a zip, read where they are: nothing is unpacked to the disk."""

    def __init__(self, path: Path) -> None:
        self.zip = zipfile.ZipFile(path)
        self.members = {
            member.filename: member
            for member in self.zip.infolist()
            if not member.is_dir() and not member.filename.startswith("__MACOSX/")
        }
        self.names = list(self.members)

    def read(self, name: str, limit: int) -> bytes:
        member = self.members[name]
        _check_size(member.file_size, limit)
        try:
            return self.zip.read(member)  # stops at the size that was checked
        except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError) as error:
            raise ImageError("unreadable in the zip", str(error)) from error
        except Exception as error:  # zlib.error, lzma.LZMAError: damaged data
            raise ImageError("damaged in the zip", str(error)) from error

    def close(self) -> None:
        self.zip.close()


def _open(path: Path) -> Place:
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such folder or zip of pictures")
    try:
        return Zip(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: neither a folder nor a zip of pictures ({error})") from error


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ImageError("too large", f"a file of {size / 1e6:.0f} MB, limit {limit / 1e6:.0f}")


def _ends_alike(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether the shorter path is the end of the longer: of `train/1.jpg` and `val/1.jpg` neither is."""
    length = min(len(one), len(other))
    return one[len(one) - length :] == other[len(other) - length :]
