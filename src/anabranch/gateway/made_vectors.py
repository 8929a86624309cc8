"""`MadeVectors`: vectors of one request's text, each under the embedder that made it."""
# Shapes: D dimensions

import numpy as np

from anabranch.routers.embed import Embedder


class MadeVectors:
    """What one part of the gateway has embedded no other embeds again, if it has the same embedder.

    A vector means nothing to who learned from those of another embedder, though it may be as long as these.
    """

    def __init__(self) -> None:
        self._made: list[tuple[Embedder, str, np.ndarray]] = []

    def put(self, embedder: Embedder, text: str, vector_D: np.ndarray) -> None:
        """Keep what ``embedder`` made of ``text``."""
        self._made.append((embedder, text, vector_D))

    def get(self, embedder: Embedder, text: str) -> np.ndarray | None:
        """What this very embedder made of this text; None if it has made nothing of it."""
        return next((made for whose, of, made in self._made if whose is embedder and of == text), None)
