"""Moving pictures of what a policy does: an episode as a GIF, drawn without a display."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import atomic_file
from anabranch.rl.environment import Environment, Gymnasium, World
from anabranch.rl.evaluation import evaluation_seed, judge
from anabranch.rl.network import ActorCritic

__all__ = ["Film", "record"]

# Of a frame, in a GIF.
_SHOWN_MS = 50


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


def record(
    model: ActorCritic,
    environment: Environment,
    *,
    seed: int = 0,
    every: int = 1,
    most: int = 500,
    on_frame: Callable[[int], None] | None = None,
) -> Film:
    """Draw the first episode of an evaluation.

    Args:
        model: acts as in an evaluation.
        environment: where.
        seed: of the episode's beginning.
        every: steps between two frames.
        most: frames at most; the episode goes on without.
        on_frame: told how many frames there are.

    Raises ConfigError if the environment draws no pictures.
    """
    if every < 1 or most < 1:
        raise ConfigError(f"every is {every} and most {most}; both must be at least 1")
    drawing: dict[str, Any] = {"render_mode": "rgb_array"} if isinstance(environment, Gymnasium) else {}
    world = environment.make(1, seed=evaluation_seed(seed), **drawing)
    frames: list[np.ndarray] = []
    steps = 0

    def look(now: World, ended: int) -> None:
        nonlocal steps
        steps += 1
        # After its end the next episode stands there already.
        if not ended and steps % every == 0 and len(frames) < most:
            frames.append(np.ascontiguousarray(environment.frame(now), dtype=np.uint8))
            if on_frame is not None:
                on_frame(len(frames))

    try:
        found = judge(model, environment, episodes=1, seed=seed, on_step=look, world=world)
        if not frames:
            world.reset()
            frames.append(np.ascontiguousarray(environment.frame(world), dtype=np.uint8))
    finally:
        world.close()
    return Film(frames, steps, float(found.return_E[0]))
