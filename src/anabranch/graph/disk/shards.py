"""Shards: which vectors are linked with which, where memory does not hold all of them at once.

As in DiskANN (section 3.2): k-means of a sample, then each vector goes to the two nearest centres, and what is built of each centre's
vectors is joined by those that are in two. Here a shard takes no more than memory holds: what comes later goes to the next nearest, so that
no data, however uneven, breaks the limit.
"""
# Shapes: N vectors, D dimension, C shards, S sample, P rows of a piece

import numpy as np

from anabranch.graph.disk.source import Source

ROUNDS = 10
# So many vectors for each centre are enough to place it.
ENOUGH = 64
# Rows that are compared with all centres at once, at most.
STEP = 1024


def centres_of(sample_SD: np.ndarray, count: int, seed: int) -> np.ndarray:
    """K-means, float32 [C, D]. One that is nearest to nothing goes to a vector of the sample."""
    draw = np.random.default_rng(seed)
    centre_CD = sample_SD[draw.choice(len(sample_SD), count, replace=len(sample_SD) < count)].copy()
    for _ in range(ROUNDS):
        near_S = np.concatenate(
            [_squares(sample_SD[row : row + STEP], centre_CD).argmin(1) for row in range(0, len(sample_SD), STEP)]
        )
        number_C = np.bincount(near_S, minlength=count)
        sum_CD = np.zeros(centre_CD.shape)
        np.add.at(sum_CD, near_S, sample_SD)
        some = number_C > 0
        centre_CD[some] = sum_CD[some] / number_C[some, None]
        centre_CD[~some] = sample_SD[draw.integers(0, len(sample_SD), int((~some).sum()))]
    return centre_CD


def _squares(vector_PD: np.ndarray, centre_CD: np.ndarray) -> np.ndarray:
    """Squared distances less those of the vectors to 0, which change no order; float64, since lengths may differ much."""
    centre_CD = centre_CD.astype(np.float64)
    return (centre_CD * centre_CD).sum(1) - 2 * (vector_PD.astype(np.float64) @ centre_CD.T)


def assigned(source: Source, centre_CD: np.ndarray, most: int, piece: int) -> np.ndarray:
    """Two shards of each vector, int16 [N, 2], none of more than ``most``; -1 where only one of all has room left."""
    shard_N2 = np.full((source.count, 2), -1, np.int16)
    room_C = np.full(len(centre_CD), most)
    step = min(piece, STEP)
    for first in range(0, source.count, step):
        last = min(first + step, source.count)
        order_PC = np.argsort(_squares(source.piece(first, last), centre_CD), axis=1, kind="stable")
        _assign(order_PC, shard_N2[first:last], room_C)
    return shard_N2


def _assign(order_PC: np.ndarray, shard_P2: np.ndarray, room_C: np.ndarray) -> None:
    """Let rows go to the first two of their shards that have room, one choice after the other; ``room_C`` becomes less."""
    for which in range(2):
        for rank in range(order_PC.shape[1]):
            row_S = np.flatnonzero(shard_P2[:, which] < 0)
            if not row_S.size:
                break
            wish_S = order_PC[row_S, rank]
            row_S, wish_S = _those(row_S, wish_S, wish_S != shard_P2[row_S, 0])
            # The first of each wish, as many as there is room for.
            by_wish = np.argsort(wish_S, kind="stable")
            row_S, wish_S = row_S[by_wish], wish_S[by_wish]
            number_S = np.arange(len(wish_S)) - np.searchsorted(wish_S, wish_S)
            row_S, wish_S = _those(row_S, wish_S, number_S < room_C[wish_S])
            shard_P2[row_S, which] = wish_S
            room_C -= np.bincount(wish_S, minlength=len(room_C))


def _those(row_S: np.ndarray, wish_S: np.ndarray, chosen_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return row_S[chosen_S], wish_S[chosen_S]
