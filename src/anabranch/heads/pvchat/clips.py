"""Clips: a few frames in which drawn subjects move over a background, and what there is to say about each of them.

A `Composer` makes them: every subject has a quadrant, an action, a colour and a stroke width of its own, so that only who knows a subject
can say what it does. Clips of files are read by `read_clip`; of them nobody knows what they show.
"""
# Shapes: A actors, F frames, C colours (3), H height, W width, S side of a drawing

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.bounds import Size
from anabranch.config import Config as BaseConfig
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError, DataError
from anabranch.files import atomic_file
from anabranch.heads.pvchat.drawings import SIDE, Portrait, evenly, read_pictures

__all__ = ["ACTIONS", "COLOURS", "PLACES", "STROKES", "Actor", "Clip", "Composer", "fitted", "read_clip", "write_clip"]

# Red, green and blue of each, from 0 to 1; all far brighter than any background.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.25, 0.2),
    "green": (0.25, 0.95, 0.3),
    "blue": (0.3, 0.5, 1.0),
    "yellow": (0.95, 0.9, 0.2),
    "white": (0.95, 0.95, 0.95),
}
# Pixels of a drawing of `SIDE` by which its lines are widened.
STROKES = {"thin": 2, "thick": 4}
ACTIONS = ("moves left", "moves right", "moves up", "moves down", "spins", "grows")
# Column and row of each quadrant, -1 or 1.
PLACES = {"top left": (-1, -1), "top right": (1, -1), "bottom left": (-1, 1), "bottom right": (1, 1)}
_DIRECTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
# Of half a frame: where quadrants have their middle, how far one moves from there, and half the side of a drawing.
_MIDDLE, _REACH, _HALF = 0.5, 0.2, 0.4
_TURN, _SMALLEST, _LARGEST = 1.5 * math.pi, 0.6, 1.2
_MOST_TILT = math.radians(8)


@dataclass(frozen=True)
class Actor:
    """Who is in a clip.

    Attributes:
        subject: its name.
        appearance: ``red and thick``.
        action: one of `ACTIONS`; None where it cannot be seen, as in one frame.
        place: one of `PLACES`: where it is on average.
    """

    subject: str
    appearance: str
    action: str | None
    place: str


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames, and who is in them.

    Attributes:
        frame_FCHW: uint8 [F, 3, H, W]; one frame is an image.
        actors: those that are known to be in it.

    Raises DataError for frames of another kind, or none at all.
    """

    frame_FCHW: Tensor
    actors: tuple[Actor, ...] = ()

    def __post_init__(self) -> None:
        shape = list(self.frame_FCHW.shape)
        if len(shape) != 4 or shape[1] != 3 or self.frame_FCHW.dtype != torch.uint8:
            raise DataError(
                f"a clip of shape {shape} and type {self.frame_FCHW.dtype}; it must be uint8 [frames, 3, height, width]"
            )
        if not self.frame_FCHW.numel():
            raise DataError(f"a clip of shape {shape} is empty; it must have a frame at least")

    @property
    def is_image(self) -> bool:
        """Whether it has one frame."""
        return len(self.frame_FCHW) == 1

    def actor(self, subject: str) -> Actor | None:
        """What is known of a subject; None if it is not in the clip."""
        return next((actor for actor in self.actors if actor.subject == subject), None)

    def first_frame(self) -> Clip:
        """The image that it begins with, in which nobody is seen to act."""
        return Clip(self.frame_FCHW[:1], tuple(replace(actor, action=None) for actor in self.actors))


@dataclass(frozen=True, eq=False)
class _Part:
    """An actor as it is drawn: its lines, and how it goes from frame to frame."""

    ink_SS: Tensor
    colour: str
    stroke: str
    action: str
    place: str
    # Of the draw: where it is off its place (of half a frame), and how it is turned.
    offset: tuple[float, float] = (0.0, 0.0)
    tilt: float = 0.0


@dataclass(frozen=True)
class Composer:
    """Composes clips of portraits. All that is random comes from the generator that is given.

    Attributes:
        config: sizes.
    """

    @configclass
    class Config(BaseConfig):
        """What clips are.

        Attributes:
            frames: F.
            size: H and W, pixels.
            noise: standard deviation of each pixel's noise, of the range from black to white.
        """

        frames: Size = Field(default=8, ge=1, le=64)
        size: Size = Field(default=48, ge=16, le=512)
        noise: float = Field(default=0.04, ge=0, le=0.5)

    config: Config = field(default_factory=lambda: Composer.Config())

    def compose(self, cast: Sequence[Portrait], generator: torch.Generator) -> Clip:
        """A clip of one to four portraits, each in a quadrant of its own. Raises ConfigError for another number."""
        if not 1 <= len(cast) <= len(PLACES):
            raise ConfigError(f"a clip shows 1 to {len(PLACES)} subjects, not {len(cast)}")
        places = torch.randperm(len(PLACES), generator=generator).tolist()[: len(cast)]
        # Nobody is told from another by colour and width alone, so these may be alike.
        parts = [
            _Part(
                portrait.ink_SS,
                _any(list(COLOURS), generator),
                _any(list(STROKES), generator),
                _any(ACTIONS, generator),
                list(PLACES)[place],
                offset=(_shift(generator), _shift(generator)),
                tilt=_MOST_TILT * (2 * float(torch.rand((), generator=generator)) - 1),
            )
            for portrait, place in zip(cast, places, strict=True)
        ]
        # The first of the cast is not always on top where two touch.
        order = torch.randperm(len(parts), generator=generator).tolist()
        frame_FCHW = self._background(generator)
        for number in order:
            frame_FCHW = self._drawn(frame_FCHW, parts[number])
        noise = self.config.noise * torch.randn(frame_FCHW.shape, generator=generator)
        actors = [
            Actor(portrait.subject, f"{part.colour} and {part.stroke}", part.action, part.place)
            for portrait, part in zip(cast, parts, strict=True)
        ]
        clip = Clip(((frame_FCHW + noise).clamp(0, 1) * 255).round().to(torch.uint8), tuple(actors))
        return clip.first_frame() if self.config.frames == 1 else clip

    def _background(self, generator: torch.Generator) -> Tensor:
        """[F, 3, H, W]: dark, of one colour, with clouds or stripes; it stays as it is through the clip."""
        size = self.config.size
        colour_C = 0.25 * torch.rand(3, generator=generator)
        if int(torch.randint(2, (), generator=generator)):
            clouds = torch.rand(1, 1, 5, 5, generator=generator)
            texture_HW = F.interpolate(clouds, (size, size), mode="bicubic", align_corners=True)[0, 0].clamp(0, 1)
        else:
            angle = math.pi * float(torch.rand((), generator=generator))
            waves = 2 + 4 * float(torch.rand((), generator=generator))
            line_H = torch.linspace(0, 2 * math.pi * waves, size)
            texture_HW = 0.5 + 0.5 * torch.sin(math.cos(angle) * line_H[None] + math.sin(angle) * line_H[:, None])
        picture_CHW = colour_C[:, None, None] + 0.15 * texture_HW
        return picture_CHW.expand(self.config.frames, -1, -1, -1)

    def _drawn(self, frame_FCHW: Tensor, part: _Part) -> Tensor:
        """The frames with an actor on top."""
        size, count = self.config.size, len(frame_FCHW)
        width = STROKES[part.stroke]
        ink = F.max_pool2d(F.pad(part.ink_SS[None, None], (width // 2, (width - 1) // 2) * 2), width, stride=1)
        theta_F23 = _placed(part, count)
        grid = F.affine_grid(theta_F23, [count, 1, size, size], align_corners=False)
        cover_F1HW = F.grid_sample(ink.expand(count, 1, SIDE, SIDE), grid, mode="bilinear", align_corners=False)
        colour_C11 = torch.tensor(COLOURS[part.colour])[:, None, None]
        return frame_FCHW * (1 - cover_F1HW) + colour_C11 * cover_F1HW


def _placed(part: _Part, count: int) -> Tensor:
    """[F, 2, 3]: from places of a frame, each from -1 to 1, to those of the drawing, as `affine_grid` takes them."""
    time_F = torch.linspace(0, 1, count) if count > 1 else torch.tensor([0.5])
    sign, towards = PLACES[part.place], _DIRECTIONS.get(part.action, (0, 0))
    way_F = (2 * time_F - 1) * _REACH
    x_F = _MIDDLE * sign[0] + part.offset[0] + towards[0] * way_F
    y_F = _MIDDLE * sign[1] + part.offset[1] + towards[1] * way_F
    half_F = torch.full((count,), _HALF)
    if part.action == "grows":
        half_F = _HALF * (_SMALLEST + (_LARGEST - _SMALLEST) * time_F)
    turn_F = torch.full((count,), part.tilt)
    if part.action == "spins":
        turn_F = turn_F + _TURN * time_F
    cos_F, sin_F = turn_F.cos() / half_F, turn_F.sin() / half_F
    rows = torch.stack([cos_F, sin_F, -(cos_F * x_F + sin_F * y_F), -sin_F, cos_F, sin_F * x_F - cos_F * y_F], 1)
    return rows.view(count, 2, 3)


def _shift(generator: torch.Generator) -> float:
    return 0.12 * float(torch.rand((), generator=generator)) - 0.06


def _any(options: Sequence[str], generator: torch.Generator) -> str:
    return options[int(torch.randint(len(options), (), generator=generator))]


def fitted(clip: Clip, frames: int, size: int) -> Tensor:
    """uint8 [F, 3, size, size] of any clip: at most ``frames`` spread evenly, cut to a square in the middle."""
    frame_FCHW = clip.frame_FCHW[evenly(len(clip.frame_FCHW), frames)]
    height, width = frame_FCHW.shape[2:]
    if height != width:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        frame_FCHW = frame_FCHW[:, :, top : top + side, left : left + side]
    if frame_FCHW.shape[-1] == size:
        return frame_FCHW
    smaller = F.interpolate(frame_FCHW.float(), (size, size), mode="bilinear", antialias=True)
    return smaller.round().clamp(0, 255).to(torch.uint8)


def read_clip(path: str | Path, *, most_frames: int = 64) -> Clip:
    """A clip of a file: an animation (GIF, WebP), a picture, or a folder of pictures, one a frame, in the order of their names.

    Raises DataError if it is none of these, or the frames differ in size.
    """
    path = Path(path)
    if path.is_dir():
        try:
            files = sorted(each for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        if not files:
            raise DataError(f"{path} holds no frames; put pictures into it, one a frame")
        images = [read_pictures(files[number], 1)[0] for number in evenly(len(files), most_frames)]
    else:
        images = read_pictures(path, most_frames)
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise DataError(f"the frames of {path} have sizes {sorted(sizes)}; all must have one")
    return Clip(torch.stack([_tensor_of(image) for image in images]))


def _tensor_of(image: Any) -> Tensor:
    numbers = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return numbers.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def write_clip(path: str | Path, clip: Clip, *, scale: int = 4, milliseconds: int = 150) -> None:
    """Write a clip as an animated GIF or WebP, by the file's ending, without loss of pixels in WebP.

    Args:
        path: of the file.
        clip: is not changed.
        scale: pixels for each pixel, so that it can be seen; 1 keeps the size.
        milliseconds: of each frame.

    Raises ConfigError for another ending.
    """
    from anabranch.extras import require

    require("pillow", by="writing clips", of="images")
    from PIL import Image

    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".gif", ".webp"):
        raise ConfigError(f"{path} ends in {path.suffix!r}; a clip is written as .gif or .webp")
    frame_FHWC = clip.frame_FCHW.permute(0, 2, 3, 1).contiguous().numpy()
    images = [Image.fromarray(frame_HWC) for frame_HWC in frame_FHWC]
    images = [image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in images]
    options: dict[str, Any] = {"save_all": True, "append_images": images[1:], "duration": milliseconds, "loop": 0}
    with atomic_file(path) as temporary:
        images[0].save(
            temporary,
            "GIF" if ending == ".gif" else "WEBP",
            **options,
            **({"lossless": True} if ending == ".webp" else {}),
        )
