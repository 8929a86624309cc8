"""Drawings of subjects: a folder, or a zip of one, in which each folder of pictures is one subject.

    FOLDER/Greek/character01/0394_01.png        # subject Greek/character01, group Greek
    FOLDER/cat/1.png                            # subject cat, in no group

Omniglot's zips (brendenlake/omniglot, MIT) are read as they are: twenty people drew each character of an alphabet.
"""
# Shapes: N drawings, S side of a drawing

from __future__ import annotations

import io
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.bounds import shown
from anabranch.errors import DataError
from anabranch.extras import require

__all__ = [
    "IS_INK",
    "SHOWS_SOMETHING",
    "SIDE",
    "Opened",
    "Portrait",
    "Subject",
    "framed",
    "ink_of",
    "is_picture",
    "portraits",
    "read_drawing",
    "read_drawings",
    "read_ink",
    "read_pictures",
]

# Of a drawing as it is kept, with an empty border so that it can be turned and widened.
SIDE = 32
_BORDER = 3
_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")
_MOST_BYTES = 50_000_000
_MOST_PIXELS = 16_000_000
_MOST_PICTURES = 100_000
# What is this far from the colour around it is ink; and a picture where nothing is further shows nothing.
IS_INK, SHOWS_SOMETHING = 0.3, 0.08


@dataclass(frozen=True, eq=False)
class Portrait:
    """One picture of one subject, cut out: what clips are composed of.

    Attributes:
        subject: its name.
        ink_SS: float32 [S, S], 0 where there is nothing, 1 where there is ink.
    """

    subject: str
    ink_SS: Tensor


@dataclass(frozen=True, eq=False)
class Subject:
    """Somebody or something of whom there are several drawings.

    Attributes:
        name: its folder, ``Greek/character01``.
        ink_NSS: float32 [N, S, S], each as of a `Portrait`, in the order of their files' names.
    """

    name: str
    ink_NSS: Tensor

    @property
    def group(self) -> str:
        """The folder of its folder, such as an alphabet; empty where there is none."""
        return self.name.rpartition("/")[0]

    def portrait(self, number: int) -> Portrait:
        """One of its drawings. Raises DataError for a number that it has not."""
        if not 0 <= number < len(self.ink_NSS):
            raise DataError(f"{self.name} has drawings 0 to {len(self.ink_NSS) - 1}, not {number}")
        return Portrait(self.name, self.ink_NSS[number])


def portraits(subjects: Sequence[Subject]) -> list[Portrait]:
    """Every drawing of every subject."""
    return [subject.portrait(number) for subject in subjects for number in range(len(subject.ink_NSS))]


def read_drawings(
    place: str | Path, *, groups: Sequence[str] | None = None, least: int = 1, most: int | None = None
) -> list[Subject]:
    """The subjects in a folder or a zip, by name.

    Args:
        place: of the drawings.
        groups: only these alphabets; None for all.
        least: drawings that a subject must have to be taken.
        most: drawings taken of each; None for all.

    Raises DataError if there is nothing there, a picture cannot be read or shows nothing, or a group has no subject.
    """
    require("pillow", by="reading drawings", of="images")
    place = Path(place)
    found: dict[str, list[tuple[str, Callable[[], bytes]]]] = {}
    with Opened(place) as files:
        for path, read in files:
            subject = str(path.parent)
            found.setdefault(subject, []).append((path.name, read))
        named = _without_common_folder(found)
        groups_there = sorted({name.rpartition("/")[0] for name in named})
        for group in groups or ():
            if group not in groups_there:
                known = ", ".join(each for each in groups_there if each) or "none"
                raise DataError(f"{place} has no group {group!r}; it has {known}")
        chosen = {
            name: sorted(pictures, key=itemgetter(0))[:most]
            for name, pictures in sorted(named.items())
            if (groups is None or name.rpartition("/")[0] in groups) and len(pictures) >= least
        }
        if not chosen:
            enough = f" of at least {least} pictures" if least > 1 else ""
            raise DataError(
                f"{place} has no folder{enough}; put the drawings of each subject into a folder of its own, as {', '.join(_ENDINGS[:4])}"
            )
        return [
            Subject(name, torch.stack([read_ink(data(), f"{place}: {name}/{file}") for file, data in pictures]))
            for name, pictures in chosen.items()
        ]


def read_drawing(path: str | Path, name: str | None = None) -> Portrait:
    """One picture as a portrait of ``name`` (default: the file's name). Raises DataError as `read_drawings`."""
    require("pillow", by="reading drawings", of="images")
    path = Path(path)
    return Portrait(path.stem if name is None else name, read_ink(_bytes_of(path), str(path)))


def read_pictures(path: Path, most: int) -> list[Any]:
    """The frames of a picture file, of an animation at most ``most`` spread evenly, as RGB pictures of Pillow's.

    Raises DataError for what is no picture.
    """
    require("pillow", by="reading clips", of="images")
    data = _bytes_of(path)

    def frames(image: Any) -> list[Any]:
        count = int(getattr(image, "n_frames", 1))
        found = []
        for number in evenly(count, most):
            image.seek(number)
            found.append(image.convert("RGB"))
        return found

    return _decoded(data, str(path), frames)


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers 0 to ``count`` - 1, the first and the last among them, evenly spread."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / max(most - 1, 1)) for number in range(most)]


def ink_of(gray_HW: Tensor) -> Tensor:
    """A picture [H, W] of numbers from 0 to 1 as ink [S, S]: what differs from its border, cut out, at full strength.

    Raises DataError if nothing does.
    """
    edge = torch.cat([gray_HW[0], gray_HW[-1], gray_HW[:, 0], gray_HW[:, -1]])
    ink_HW = (gray_HW - edge.median()).abs()
    top = float(ink_HW.max())
    if not top >= SHOWS_SOMETHING:
        raise DataError("it shows nothing: all of it is as its border is")
    return framed(ink_HW / top)


def framed(ink_HW: Tensor) -> Tensor:
    """Ink [H, W], at full strength somewhere, as ink [S, S]: cut out, made smaller, in the middle of an empty border."""
    rows, columns = (ink_HW > IS_INK).nonzero().unbind(1)
    cut = ink_HW[int(rows.min()) : int(rows.max()) + 1, int(columns.min()) : int(columns.max()) + 1]
    # What is narrow stays narrow. The strongest ink of each cell: thin lines of large pictures would be averaged away.
    most = SIDE - 2 * _BORDER
    height, width = (max(1, round(most * length / max(cut.shape))) for length in cut.shape)
    small = F.adaptive_max_pool2d(cut[None, None], (height, width))[0, 0]
    left, above = (SIDE - width) // 2, (SIDE - height) // 2
    return F.pad(small, (left, SIDE - width - left, above, SIDE - height - above)).contiguous()


def read_ink(data: bytes, where: str) -> Tensor:
    """A picture file's content as ink [S, S], see `ink_of`; ``where`` it lies, for messages. Raises DataError as `read_drawings`."""

    def gray(image: Any) -> Tensor:
        from PIL import Image

        image = image.convert("RGBA")
        # What is transparent is paper.
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        flat = Image.alpha_composite(paper, image).convert("L")
        numbers = torch.frombuffer(bytearray(flat.tobytes()), dtype=torch.uint8)
        return numbers.view(flat.height, flat.width).float() / 255

    picture_HW = _decoded(data, where, gray)
    try:
        return ink_of(picture_HW)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _decoded(data: bytes, where: str, use: Callable[[Any], Any]) -> Any:
    """What ``use`` makes of a picture. Raises DataError if it is none, or too large."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise DataError(
                    f"{where} has {image.width} x {image.height} pixels; at most {_MOST_PIXELS:,} are read, make it smaller"
                )
            return use(image)
    except DataError:
        raise
    # Its own words name an object in memory.
    except UnidentifiedImageError:
        raise DataError(
            f"{where} is no picture that can be read: it is in none of the formats that are known"
        ) from None
    # Pillow's readers raise whatever a damaged file brings about.
    except Exception as error:
        raise DataError(f"{where} is no picture that can be read: {shown(str(error))}") from None


def _bytes_of(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is no file; name a picture")
        if status.st_size > _MOST_BYTES:
            raise DataError(f"{path} has {status.st_size:,} bytes; pictures of at most {_MOST_BYTES:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


class Opened:
    """Path and content of every picture in a folder or a zip.

    Args:
        place: of them.
        takes: which files, by their paths in it; None for pictures.

    Raises DataError where there is nothing, or something that is neither.
    """

    def __init__(self, place: Path, *, takes: Callable[[PurePosixPath], bool] | None = None) -> None:
        self.place, self._takes = place, takes or is_picture
        self._zip: zipfile.ZipFile | None = None

    def __enter__(self) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
        if self.place.is_dir():
            return self._of_folder()
        if not self.place.exists():
            raise DataError(f"there is no {self.place}; name a folder of drawings, or a zip of one")
        try:
            self._zip = zipfile.ZipFile(self.place)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.place} is neither a folder nor a zip: {error}") from None
        return self._of_zip(self._zip)

    def __exit__(self, *_: object) -> None:
        if self._zip is not None:
            self._zip.close()

    def _of_folder(self) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
        count = 0
        try:
            for path in sorted(self.place.rglob("*")):
                inside = PurePosixPath(path.relative_to(self.place).as_posix())
                if self._takes(inside) and path.is_file():
                    count = _counted(count, self.place)
                    yield inside, lambda path=path: _bytes_of(path)  # type: ignore[misc]
        except OSError as error:
            raise DataError(f"cannot read {self.place}: {error.strerror or error}") from None

    def _of_zip(self, held: zipfile.ZipFile) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
        count = 0
        for entry in held.infolist():
            inside = PurePosixPath(entry.filename)
            if not entry.is_dir() and self._takes(inside):
                if entry.file_size > _MOST_BYTES:
                    raise DataError(f"{inside} in {self.place} has {entry.file_size:,} bytes; at most {_MOST_BYTES:,}")
                count = _counted(count, self.place)
                yield inside, lambda entry=entry: self._extracted(held, entry)  # type: ignore[misc]

    def _extracted(self, held: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
        try:
            return held.read(entry)
        # A damaged entry may be wrong in any of these ways; a password is a RuntimeError.
        except (
            OSError,
            zipfile.BadZipFile,
            zlib.error,
            RuntimeError,
            NotImplementedError,
            EOFError,
            ValueError,
        ) as error:
            raise DataError(f"cannot read {entry.filename} in {self.place}: {error}") from None


def _counted(count: int, place: Path) -> int:
    if count >= _MOST_PICTURES:
        raise DataError(f"{place} holds more than {_MOST_PICTURES:,} pictures; name a smaller folder")
    return count + 1


def is_picture(path: PurePosixPath) -> bool:
    """Whether a file in a folder of drawings is one, by its name."""
    hidden = any(part.startswith((".", "__")) for part in path.parts)
    return not hidden and len(path.parts) > 1 and path.suffix.lower() in _ENDINGS


def _without_common_folder(found: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Subjects without the folder that all of them lie in, as a zip has one; one subject keeps its own name."""
    names = [PurePosixPath(name).parts for name in found]
    shared = 0
    while names and all(len(parts) > shared + 1 and parts[shared] == names[0][shared] for parts in names):
        shared += 1
    # A group alone is a group, and not what everything was packed in.
    if shared and all(len(parts) == shared + 1 for parts in names):
        shared -= 1
    return {"/".join(PurePosixPath(name).parts[shared:]): pictures for name, pictures in found.items()}
