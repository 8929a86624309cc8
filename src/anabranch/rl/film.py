"""Moving pictures of what a policy does: an episode as a GIF or as PNGs, drawn without a display."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import atomic_file
from anabranch.rl.environment import Environment, Gymnasium, World
from anabranch.rl.evaluation import evaluation_seed, judge, num_beside
from anabranch.rl.network import ActorCritic

__all__ = ["Film", "record"]

# Of a frame, in a GIF.
_SHOWN_MS = 50
# A text in PNGs, by which those of an earlier film are known.
_MARK = ("Source", "a frame of a film by anabranch rl replay")


@dataclass(frozen=True)
class Film:
    """An episode.

    Attributes:
        frames: pictures ``[height, width, 3]``, red, green and blue from 0 to 255.
        steps: of the episode.
        total: its return.
    """

    frames: list[np.ndarray]
    steps: int
    total: float

    def write_png(self, path: str | Path) -> list[Path]:
        """Write each frame as a PNG: ``drive.png`` gives ``drive-0000.png`` and so on; the files.

        Frames of an earlier film of this name that lie behind the last one are removed. They are told by a mark in the file; whatever else
        lies there stays.

        Raises MissingExtraError without pillow, DataError if one cannot be written.
        """
        require("images", by="writing a .png")
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        path, mark = Path(path), PngInfo()
        mark.add_text(*_MARK)
        named = (path.with_name(f"{path.stem}-{number:04}.png") for number in itertools.count())
        files = list(itertools.islice(named, len(self.frames)))
        for file, frame in zip(files, self.frames, strict=True):
            with atomic_file(file) as temporary:
                Image.fromarray(frame).save(temporary, format="PNG", pnginfo=mark)
        for file in itertools.takewhile(_is_frame, named):
            file.unlink()
        return files

    def write_gif(self, path: str | Path) -> None:
        """Write it as a GIF that begins anew when it is over.

        Raises MissingExtraError without pillow, DataError if the file cannot be written.
        """
        require("images", by="writing a .gif")
        from PIL import Image

        pictures = [Image.fromarray(frame) for frame in self.frames]
        with atomic_file(path) as temporary:
            pictures[0].save(
                temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=_SHOWN_MS, loop=0
            )


def _is_frame(file: Path) -> bool:
    from PIL import Image

    if not file.is_file():
        return False
    try:
        # Nor does anybody want to be warned of how large it is: its pixels are not read.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            with Image.open(file, formats=["PNG"]) as picture:
                return picture.info.get(_MARK[0]) == _MARK[1]
    except (OSError, ValueError, Image.DecompressionBombError):
        # No picture, or none that pillow opens: whoever's it is, it is no frame of ours.
        return False


def record(
    model: ActorCritic,
    environment: Environment,
    *,
    seed: int = 0,
    every: int = 1,
    most: int = 500,
    episode: int = 0,
    episodes: int = 100,
    on_frame: Callable[[int], None] | None = None,
) -> Film:
    """Draw an episode of an evaluation.

    Args:
        model: acts as in an evaluation.
        environment: where.
        seed: of the evaluation.
        every: steps between two frames.
        most: frames at most; the episode goes on without.
        episode, episodes: number of it, from 0, among so many that `judge` plays.
        on_frame: told how many frames there are.

    Raises ConfigError if the environment draws no pictures, or there is no such episode.
    """
    if every < 1 or most < 1:
        raise ConfigError(f"every is {every} and most {most}; both must be at least 1")
    drawing: dict[str, Any] = {"render_mode": "rgb_array"} if isinstance(environment, Gymnasium) else {}
    if not 0 <= episode < episodes:
        raise ConfigError(f"episode is {episode}; an evaluation of {episodes} has 0 to {episodes - 1}")
    num = num_beside(episodes)
    before, place = divmod(episode, num)
    world: Any = environment.make(1, seed=evaluation_seed(seed), first=place, **drawing)
    frames: list[np.ndarray] = []
    steps, ended_before = 0, 0

    def draw(now: World) -> None:
        if len(frames) < most:
            frames.append(np.ascontiguousarray(environment.frame(now), dtype=np.uint8))
            if on_frame is not None:
                on_frame(len(frames))

    def look(now: World, ended: int) -> None:
        nonlocal steps, ended_before
        is_within = ended_before == ended == before
        ended_before = ended
        steps += is_within
        if is_within and steps % every == 0:
            draw(now)

    def look_last(place: int) -> None:
        # In the step that ends an episode the next one begins: what ended it would not be seen.
        if ended_before == before:
            draw(world)

    try:
        world.on_end = look_last
        found = judge(model, environment, episodes=before + 1, seed=seed, on_step=look, world=world)
        if not frames:
            world.reset()
            frames.append(np.ascontiguousarray(environment.frame(world), dtype=np.uint8))
    finally:
        world.close()
    return Film(frames, int(found.length_E[before]), float(found.return_E[before]))
