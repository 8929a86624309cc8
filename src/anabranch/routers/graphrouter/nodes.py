"""Features of nodes: vectors of descriptions, and the task of a query, as said by its sender or told from its vector."""
# Shapes: N queries, T tasks, D dimensions of a query's vector, V of a description's

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from anabranch.errors import InputError
from anabranch.routers.embed.checked import unit_vectors
from anabranch.routers.embed.embedder import Embedder

# Dimensions where nothing is described.
NAMELESS = 32


def described(
    names: Sequence[str],
    descriptions: Mapping[str, str],
    vectors: Mapping[str, np.ndarray],
    embedder: Embedder | None,
    dim: int | None = None,
) -> np.ndarray:
    """float32 [names, V]: the vector given, else that of the description, else one that stands for the name alone.

    Args:
        names: of models or tasks.
        descriptions: texts by name.
        vectors: by name; they come before descriptions.
        embedder: of descriptions; None where only vectors count.
        dim: V, where it is settled already.

    Raises InputError for vectors of different lengths, and for a description without an embedder.
    """
    given = {name: np.asarray(vectors[name], np.float32).reshape(-1) for name in names if name in vectors}
    texts = {name: descriptions[name] for name in names if name not in given and descriptions.get(name)}
    if texts and embedder is None:
        raise InputError(
            f"{next(iter(texts))!r} has a description and no embedder to read it; set embedder, or give its vector"
        )
    if texts and embedder is not None:
        given |= dict(zip(texts, unit_vectors(embedder, list(texts.values())), strict=True))
    sizes = {len(vector) for vector in given.values()} | ({dim} if dim else set())
    if len(sizes) > 1:
        raise InputError(
            f"vectors of descriptions have {' and '.join(map(str, sorted(sizes)))} dimensions; they must agree"
        )
    size = sizes.pop() if sizes else NAMELESS
    return np.stack([given[name] if name in given else of_name(name, size) for name in names]).astype(np.float32)


def of_name(name: str, dim: int) -> np.ndarray:
    """A vector of length 1 that depends on the name alone: what tells apart nodes that nobody described."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    vector = np.random.default_rng(seed).normal(size=dim)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class Tasks:
    """How much of each task a query is: a ridge regression from vectors to tasks, sharpened by a softmax.

    Attributes:
        names: T of them, in order of first appearance; a query without a task has the task "".
        weight_DT: regression.
        bias_T: shares of the tasks.
        sharpness: factor before the softmax.
    """

    RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
    SHARPNESS = (4.0, 6.0, 8.0, 12.0, 16.0, 24.0)

    def __init__(self, names: tuple[str, ...], weight_DT: np.ndarray, bias_T: np.ndarray, sharpness: float) -> None:
        self.names, self.weight_DT, self.bias_T, self.sharpness = names, weight_DT, bias_T, sharpness
        self.ridge = 0.0

    @classmethod
    def fit(cls, vector_ND: np.ndarray, names_N: Sequence[str | None]) -> tuple["Tasks", np.ndarray]:
        """Learn to tell tasks, and say of each row what would be told of it had it been left out (float32 [N, T]).

        Ridge and sharpness are those of the least log loss of rows left out.
        """
        names = tuple(dict.fromkeys(name or "" for name in names_N))
        label_NT = np.equal.outer([name or "" for name in names_N], names).astype(np.float64)
        bias_T = label_NT.mean(0)
        x_ND, found = vector_ND.astype(np.float64), []
        size_D, turn_DD = np.linalg.eigh(x_ND.T @ x_ND)
        turned_ND = x_ND @ turn_DD
        aim_DT = turned_ND.T @ (label_NT - bias_T)
        for ridge in cls.RIDGES:
            scale_D = 1 / (np.maximum(size_D, 0) + ridge)
            hat_N1 = (turned_ND**2 @ scale_D)[:, None]
            out_NT = (turned_ND @ (scale_D[:, None] * aim_DT) - hat_N1 * (label_NT - bias_T)) / np.maximum(
                1 - hat_N1, 1e-6
            )
            for sharpness in cls.SHARPNESS:
                share_NT = softmax(sharpness * (out_NT + bias_T))
                found.append(
                    (-np.log(np.maximum((share_NT * label_NT).sum(1), 1e-9)).mean(), ridge, sharpness, share_NT)
                )
        _, ridge, sharpness, share_NT = min(found, key=lambda item: item[0])
        weight_DT = turn_DD @ (aim_DT / (np.maximum(size_D, 0) + ridge)[:, None])
        made = cls(names, weight_DT.astype(np.float32), bias_T.astype(np.float32), sharpness)
        made.ridge = ridge
        return made, share_NT.astype(np.float32)

    def told(self, vector_ND: np.ndarray) -> np.ndarray:
        """float32 [N, T], rows that add up to 1: from vectors alone."""
        return softmax(np.float32(self.sharpness) * (vector_ND @ self.weight_DT + self.bias_T))

    def index(self, names_N: Sequence[str | None]) -> np.ndarray:
        """Int64 [N]: place of each name; -1 for an unknown one."""
        place = {name: at for at, name in enumerate(self.names)}
        return np.fromiter((place.get(name or "", -1) for name in names_N), np.int64, len(names_N))

    def one_hot(self, place_N: np.ndarray) -> np.ndarray:
        """float32 [N, T]; an unknown task is a row of zeros."""
        return (place_N[:, None] == np.arange(len(self.names))).astype(np.float32)


def softmax(value_NT: np.ndarray) -> np.ndarray:
    """Along rows."""
    power = np.exp(value_NT - value_NT.max(1, keepdims=True))
    return power / power.sum(1, keepdims=True)
