"""Settings of Dr.LLM's search, with the paper's defaults."""

import hashlib
import json
from typing import Literal

from anabranch.bounds import Seed
from anabranch.config import Config, Field, configclass, to_dict

__all__ = ["SearchConfig", "seed_of"]


@configclass
class SearchConfig(Config):
    """How paths are searched, and which of them may become labels.

    Attributes:
        simulations: N_s of a question (50).
        exploration: c (1.8).
        penalty: lambda, on the length of a path over the number of blocks, in selection alone (3).
        random_share: p_rand, how often a random child is gone into (0.1).
        widening: children that a node may have, times the root of its visits; None: all moves of a node before any child is gone into.
        late: how much sooner moves near the end of a path are tried: a move that leaves k entries before it weighs (k + 1)^late. Those cost
            little, as what is before them is known. 0: all alike (the paper).
        stop_saving: a question that the whole model answers is done once a right path is this many blocks shorter (2); None: never.
        right: the reward from which a path is right (1).
        flip_labels: what happens to questions that the whole model answers wrongly and some path rightly. ``auto`` keeps them where the
            null control says that they are more than luck, ``keep`` always, ``drop`` never.
        probe: questions of the null control (100).
        significance: of its one-sided test (0.05).
        quota: labels that are wanted; None for all.
        flip_share: of flips among them (0.3), where they are kept.
        keep_bytes: of states behind prefixes, of one input.
        seed: of all questions; each has its own, from this and its id.
    """

    simulations: int = Field(default=50, ge=1)
    exploration: float = Field(default=1.8, ge=0)
    penalty: float = Field(default=3.0, ge=0)
    random_share: float = Field(default=0.1, ge=0, le=1)
    widening: float | None = Field(default=1.0, gt=0)
    late: float = Field(default=0.0, ge=0, le=20)
    stop_saving: int | None = Field(default=2, ge=1)
    right: float = 1.0
    flip_labels: Literal["auto", "keep", "drop"] = "auto"
    probe: int = Field(default=100, ge=1)
    significance: float = Field(default=0.05, gt=0, lt=1)
    quota: int | None = Field(default=None, ge=1)
    flip_share: float = Field(default=0.3, ge=0, le=1)
    keep_bytes: int = Field(default=256 * 2**20, ge=0)
    seed: Seed = 0

    def digest(self, *others: str) -> str:
        """Twelve letters that follow from what decides the rows of a search, and from ``others``."""
        # How many labels are wanted changes no row; nor does what is kept in memory.
        free = {"quota", "flip_share", "keep_bytes"}
        told = {name: value for name, value in to_dict(self).items() if name not in free}
        return hashlib.sha256(json.dumps([told, *others], sort_keys=True).encode()).hexdigest()[:12]


def seed_of(seed: int, *names: str) -> int:
    """A seed that follows from another and from names, so that nothing depends on the order in which things are done."""
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return int.from_bytes(digest[:6], "big")
