"""`Vocabulary`: the bytes of all tokens as a tree, so that one walk finds which of them a state allows."""
# Shapes: V tokens, M nodes of the tree

import weakref

import numpy as np
from numpy.typing import NDArray

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import InputError
from anabranch.serving.grammar.machine import DEAD, Machine

__all__ = ["Vocabulary", "vocabulary_of"]


class Vocabulary:
    """Tokens by their bytes. Special tokens and ids without a token stand for no bytes and are never allowed.

    Args:
        pieces: bytes of each token.

    Attributes:
        pieces: the same.
        longest: bytes of the longest.
    """

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.longest = max(map(len, pieces), default=0)
        # Nodes in order of depth, then of their bytes, so that the children of a node lie side by side.
        prefixes = {piece[:size] for piece in pieces for size in range(len(piece) + 1)}
        ordered = sorted(prefixes | {b""}, key=lambda prefix: (len(prefix), prefix))
        place = {prefix: at for at, prefix in enumerate(ordered)}
        parent_M = np.array([0, *(place[prefix[:-1]] for prefix in ordered[1:])], dtype=np.int64)
        self._byte_M = np.array([0, *(prefix[-1] for prefix in ordered[1:])], dtype=np.int64)
        self._children_M = np.bincount(parent_M[1:], minlength=len(ordered))
        self._first_M = 1 + np.cumsum(self._children_M) - self._children_M
        self._node_V = np.array([place[piece] for piece in pieces], dtype=np.int64)

    def allowed(self, machine: Machine, state: int) -> NDArray[np.bool_]:
        """[V]: the tokens whose bytes may follow in ``state``."""
        alive_M = np.zeros(len(self._byte_M), dtype=np.bool_)
        node, states = np.zeros(1, dtype=np.int64), np.array([state], dtype=np.int32)
        while len(node):
            child, states = self._children(node, states)
            for missing in np.unique(states[~machine.filled_N[states]]).tolist():
                machine.fill(missing)
            states = machine.next_N256[states, self._byte_M[child]]
            on = states != DEAD
            node, states = child[on], states[on]
            alive_M[node] = True
        return alive_M[self._node_V]

    def _children(
        self, node: NDArray[np.int64], states: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The children of each of ``node``, and the state above each."""
        count = self._children_M[node]
        offset = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        return np.repeat(self._first_M[node], count) + offset, np.repeat(states, count)


_known: "weakref.WeakKeyDictionary[Tokenizer, Vocabulary]" = weakref.WeakKeyDictionary()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The tree of ``tokenizer``, made once. Raises InputError if its tokens do not stand for fixed bytes (WordPiece)."""
    if tokenizer not in _known:
        pieces = [tokenizer.inner_bytes(token) for token in range(tokenizer.vocab_size)]
        if any(piece is None for piece in pieces):
            raise InputError(
                "a grammar needs tokens that stand for fixed bytes; this tokenizer's text depends on neighbours"
            )
        _known[tokenizer] = Vocabulary([piece or b"" for piece in pieces])
    return _known[tokenizer]
