"""A reference that is a clip: the subject that moves in it, cut out of its frames.

    portrait = cut_out(read_clip("ab.webp"), "ab")      # Seen, with a view for each frame; of one frame, a Portrait

What moves is what differs from the median over frames, which is the background; where half of the frames show one thing and half another,
it is what is more like the border of all that changes, so that neither dark nor light is taken for the subject. That alone loses parts: a
level line that moves sideways lies where it lay. So a frame is cut out around what moves in it, and what differs there from the colour of
the cut's border and hangs together with something that moves is the subject. What stands still beside it is left out.
"""
# Shapes: F frames, C colours (3), H height, W width, S side of a drawing, N views

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.errors import DataError
from anabranch.heads.pvchat.clips import Clip, read_clip
from anabranch.heads.pvchat.drawings import IS_INK, SHOWS_SOMETHING, Portrait, framed, ink_of, read_drawing

__all__ = ["Seen", "cut_out", "read_reference", "views_of"]

# Frames that are looked at, and the longer side that they are made smaller to.
_FRAMES, _LONGEST = 16, 160
# What moves stands out of the noise of all pixels by this.
_ABOVE_NOISE = 5.0
# Of a frame's longer side: parts of one thing are no further apart; and of a thing, how much around it is cut out with it.
_APART, _AROUND = 0.08, 0.12
# Of the pixels of what moves most: what has as many is another thing.
_ANOTHER = 0.25
# Of luma, as pictures are made grey.
_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True, eq=False)
class Seen(Portrait):
    """A subject as it is seen in several frames; as a portrait it is the view that is most like the others.

    Attributes:
        view_NSS: float32 [N, S, S], in the order of the frames.
    """

    view_NSS: Tensor


def views_of(reference: Any) -> list[Any]:
    """Portraits of all that is seen of a reference; of any other than `Seen`, itself."""
    if not isinstance(reference, Seen):
        return [reference]
    return [Portrait(reference.subject, view_SS) for view_SS in reference.view_NSS]


def read_reference(path: str | Path, name: str | None = None) -> Portrait:
    """A picture (`read_drawing`), or a clip (`read_clip`) as `cut_out`, as a portrait of ``name`` (default: the file's, or the folder's).

    Raises DataError as they do.
    """
    path = Path(path)
    clip = read_clip(path, most_frames=_FRAMES)
    own = (path.name if path.is_dir() else path.stem) if name is None else name
    if clip.is_image:
        inside = path.iterdir() if path.is_dir() else iter((path,))
        return read_drawing(next(each for each in inside if each.is_file() and not each.name.startswith(".")), own)
    try:
        return cut_out(clip, own)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def cut_out(clip: Clip, subject: str) -> Portrait:
    """What moves in a clip as a portrait of ``subject``: `Seen`, unless one frame shows it.

    A clip of one frame, or in which nothing moves, is a picture. Frames in which the subject reaches the edge are left out where others
    are there.

    Raises DataError where several things move, or none can be cut out.
    """
    frame_FCHW = _smaller(clip.frame_FCHW.float() / 255)
    moving_FHW = None if clip.is_image else _moving(frame_FCHW)
    if moving_FHW is None:
        return Portrait(subject, ink_of((frame_FCHW[0] * torch.tensor(_GREY)[:, None, None]).sum(0)))
    found = [
        view
        for frame_CHW, moving_HW in zip(frame_FCHW, moving_FHW, strict=True)
        if (view := _view(frame_CHW, moving_HW)) is not None
    ]
    several = sum(view.has_others for view in found)
    if 2 * several > len(frame_FCHW):
        raise DataError(
            f"several things move in {several} of {len(frame_FCHW)} frames; give a clip in which the subject alone moves"
        )
    alone = [view for view in found if not view.has_others]
    if not alone:
        raise DataError("something moves in it, and cannot be told from what is around it; give a picture instead")
    whole = [view.ink_SS for view in alone if view.is_whole] or [view.ink_SS for view in alone]
    view_NSS = torch.stack(whole)
    if len(view_NSS) == 1:
        return Portrait(subject, view_NSS[0])
    away_N = (view_NSS[:, None] - view_NSS[None]).abs().mean((1, 2, 3))
    return Seen(subject, view_NSS[int(away_N.argmin())], view_NSS)


def _smaller(frame_FCHW: Tensor) -> Tensor:
    height, width = frame_FCHW.shape[2:]
    share = _LONGEST / max(height, width)
    if share >= 1:
        return frame_FCHW
    size = max(1, round(height * share)), max(1, round(width * share))
    return F.interpolate(frame_FCHW, size, mode="area")


def _moving(frame_FCHW: Tensor) -> Tensor | None:
    """bool [F, H, W]: what is not as the background is; None where nothing moves."""
    away_FCHW = frame_FCHW - _background(frame_FCHW)
    away_FHW = _smooth(away_FCHW).square().mean(1).sqrt()
    top = float(away_FHW.max())
    if top < SHOWS_SOMETHING or top < _ABOVE_NOISE * float(away_FHW.median()):
        return None
    return away_FHW > IS_INK * top


def _background(frame_FCHW: Tensor) -> Tensor:
    """float32 [C, H, W]: the median over frames; of the two in the middle of an even number, the one that is more like the border."""
    sorted_FCHW = frame_FCHW.sort(0).values
    lower_CHW, upper_CHW = sorted_FCHW[(len(frame_FCHW) - 1) // 2], sorted_FCHW[len(frame_FCHW) // 2]
    if len(frame_FCHW) % 2:
        return lower_CHW
    # Noise of a pixel alone changes nothing.
    spread_HW = _smooth((sorted_FCHW[-1] - sorted_FCHW[0])[None]).square().mean(1).sqrt()[0]
    changed_HW = spread_HW > IS_INK * spread_HW.max()
    if not bool(changed_HW.any()):
        return lower_CHW
    (top, bottom), (left, right) = _extent(changed_HW)
    around = max(2, round(_AROUND * max(bottom - top, right - left)))
    rows, columns = slice(max(0, top - around), bottom + around), slice(max(0, left - around), right + around)
    colour_C11 = _border(frame_FCHW[:, :, rows, columns].transpose(0, 1))[:, None, None]
    return torch.where((lower_CHW - colour_C11).abs() <= (upper_CHW - colour_C11).abs(), lower_CHW, upper_CHW)


def _smooth(value_FCHW: Tensor) -> Tensor:
    """Of nine pixels, whose noise is a third."""
    return F.avg_pool2d(value_FCHW, 3, stride=1, padding=1, count_include_pad=False)


def _border(piece_CFHW: Tensor) -> Tensor:
    """float32 [C]: the colour of the border of a piece; of two in the middle their mean, which is no darker than it is lighter."""
    sides = piece_CFHW[..., 0, :], piece_CFHW[..., -1, :], piece_CFHW[..., 0], piece_CFHW[..., -1]
    edge_CE = torch.cat([side.flatten(1) for side in sides], 1)
    return edge_CE.quantile(0.5, 1)


@dataclass(frozen=True, eq=False)
class _View:
    """What moves in a frame.

    Attributes:
        ink_SS: the largest thing.
        is_whole: whether it is all within the frame.
        has_others: whether something else moves too.
    """

    ink_SS: Tensor
    is_whole: bool
    has_others: bool


def _view(frame_CHW: Tensor, moving_HW: Tensor) -> _View | None:
    """None where nothing is seen of what moves."""
    if not bool(moving_HW.any()):
        return None
    (top, bottom), (left, right) = _extent(moving_HW)
    height, width = moving_HW.shape
    around = max(2, round(_AROUND * max(bottom - top, right - left)))
    while True:
        rows, columns = slice(max(0, top - around), bottom + around), slice(max(0, left - around), right + around)
        found = _inked(frame_CHW[:, rows, columns], moving_HW[rows, columns])
        if found is None:
            return None
        ink_HW, kept_HW = found
        kept_HW, has_others = _largest(kept_HW, max(1, round(_APART * max(height, width) / 2)))
        (first, last), (near, far) = _extent(kept_HW)
        first, last, near, far = first + rows.start, last + rows.start, near + columns.start, far + columns.start
        # What does not move of it may reach beyond what moves.
        ends = (
            first == rows.start > 0,
            last == rows.stop < height,
            near == columns.start > 0,
            far == columns.stop < width,
        )
        if not any(ends):
            is_whole = first > 0 and last < height and near > 0 and far < width
            # The rims of lines are fainter than ink, and belong to them.
            return _View(framed(torch.where(_grown(kept_HW, 1), ink_HW, 0.0)), is_whole, has_others)
        around *= 2


def _inked(piece_CHW: Tensor, moving_HW: Tensor) -> tuple[Tensor, Tensor] | None:
    """(how far each pixel is from the colour of the border, by what moves; bool: ink that hangs together with what moves)."""
    away_HW = (piece_CHW - _border(piece_CHW[:, None])[:, None, None]).square().mean(0).sqrt()
    most = float(away_HW[moving_HW].max())
    if most < SHOWS_SOMETHING:
        return None
    ink_HW = (away_HW / most).clamp_max(1.0)
    inked_HW = ink_HW > IS_INK
    return ink_HW, _flooded(inked_HW & moving_HW, inked_HW)


def _largest(kept_HW: Tensor, reach: int) -> tuple[Tensor, bool]:
    """(the largest thing, of parts that are no more than twice ``reach`` apart; whether there is another that is not far smaller)."""
    label_HW = torch.where(kept_HW, _labels(_grown(kept_HW, reach)), 0)
    names, counts = label_HW[kept_HW].unique(return_counts=True)
    has_others = int((counts >= _ANOTHER * counts.max()).sum()) > 1
    return label_HW == names[counts.argmax()], has_others


def _extent(mask_HW: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """(first row and that behind the last, first column and that behind the last)."""
    rows, columns = mask_HW.nonzero().unbind(1)
    return (int(rows.min()), int(rows.max()) + 1), (int(columns.min()), int(columns.max()) + 1)


def _grown(mask_HW: Tensor, reach: int) -> Tensor:
    """bool: what is at most so many pixels away."""
    return F.max_pool2d(mask_HW[None, None].float(), 2 * reach + 1, stride=1, padding=reach)[0, 0] > 0


def _labels(mask_HW: Tensor) -> Tensor:
    """int64: a number for each part that hangs together, 0 elsewhere."""
    number_HW = torch.arange(1, mask_HW.numel() + 1).view_as(mask_HW).float() * mask_HW
    while True:
        wider_HW = F.max_pool2d(number_HW[None, None], 3, stride=1, padding=1)[0, 0] * mask_HW
        if torch.equal(wider_HW, number_HW):
            return number_HW.long()
        number_HW = wider_HW


def _flooded(seed_HW: Tensor, within_HW: Tensor) -> Tensor:
    """bool: the parts of ``within_HW`` in which there is a seed."""
    while True:
        wider_HW = _grown(seed_HW, 1) & within_HW
        if torch.equal(wider_HW, seed_HW):
            return seed_HW
        seed_HW = wider_HW
