"""What the utility proxy looks at: a request, an example, and how the example has served."""
# Shapes: K candidates, F features

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.routers.ic_cache.example import Example, Traits

OPPOSITES = tuple(
    frozenset(pair.split("/"))
    for pair in (
        "enable/disable start/stop add/remove add/delete create/delete create/remove include/exclude allow/deny allow/block open/close "
        "lock/unlock mount/unmount show/hide on/off true/false yes/no increase/decrease raise/lower up/down more/less larger/smaller "
        "bigger/smaller newer/older before/after first/last ascending/descending compress/decompress compress/extract encrypt/decrypt "
        "install/uninstall install/remove connect/disconnect activate/deactivate load/unload push/pop attach/detach best/worst "
        "minimum/maximum upper/lower uppercase/lowercase with/without start/end head/tail accept/reject join/split import/export "
        "upload/download read/write success/failure"
    ).split()
)
# Of each word, those that it is the opposite of.
OPPOSITE_OF = {
    word: frozenset().union(*(pair for pair in OPPOSITES if word in pair)) - {word}
    for word in frozenset().union(*OPPOSITES)
}
_OPPOSED = frozenset(OPPOSITE_OF)
NEGATIONS = frozenset("not no never without none except isn don doesn cannot exclude excluding non".split())
MODEL_BUCKETS = 4
NAMES = (
    "similarity",
    "behind the best",
    "rank",
    "shared words",
    "request covered",
    "example covered",
    "differing words",
    "literals shared",
    "foreign literals",
    "words in answer",
    "length",
    "example length",
    "answer length",
    "length ratio",
    "success rate",
    "uses",
    "quality",
    "trust",
    "opposite",
    "copied from request",
    "literals copied",
    *(f"model {bucket}" for bucket in range(MODEL_BUCKETS)),
)


@dataclass(frozen=True)
class Pairs:
    """A request with some candidates, as proxies see them.

    Attributes:
        feature_KF: float64, the columns of `NAMES`.
        texts: request, the example's request, the example's answer.
    """

    feature_KF: np.ndarray
    texts: Sequence[tuple[str, str, str]]

    def __len__(self) -> int:
        return len(self.texts)


def pairs(request: str, examples: Sequence[Example], similarity_K: np.ndarray, model: str) -> Pairs:
    """Features of candidates that come by falling similarity.

    Args:
        request: what is asked.
        examples: candidates, K.
        similarity_K: cosines with the request.
        model: that is to answer.
    """
    asked = Traits.of(request)
    bucket = zlib.crc32(model.encode()) % MODEL_BUCKETS
    feature_KF = np.zeros((len(examples), len(NAMES)))
    if len(examples):
        similarity_K = np.asarray(similarity_K, np.float64)
        near = [similarity_K, similarity_K[0] - similarity_K, np.log1p(np.arange(len(examples)))]
        columns = [*near, *_overlap(asked, examples), *_history(examples), *_copying(asked, examples)]
        feature_KF[:, : len(columns)] = np.array(columns).T
        feature_KF[:, len(columns) + bucket] = 1.0
    return Pairs(feature_KF, [(request, example.request, example.response) for example in examples])


def _overlap(asked: Traits, examples: Sequence[Example]) -> list[np.ndarray]:
    """Counted for each candidate, and computed for all together: every request does this, with all of its candidates."""
    words, literals = asked.words, asked.literals
    counted_KN = np.array(
        [
            (
                len(words & then.words),
                len(then.words),
                len(literals & then.literals) if literals else 0,
                len(then.literals),
                len(words & answer.words),
                then.length,
                answer.length,
            )
            for then, answer in (example.traits for example in examples)
        ],
        np.float64,
    )
    both_K, words_K, shared_K, literals_K, answered_K, length_K, answer_K = counted_KN.T
    either_K, asked_words = len(words) + words_K - both_K, max(len(words), 1)
    return [
        both_K / np.maximum(either_K, 1),
        both_K / asked_words,
        both_K / np.maximum(words_K, 1),
        np.log1p(either_K - both_K),
        shared_K / len(literals) if literals else np.ones(len(examples)),
        np.where(literals_K > 0, 1 - shared_K / np.maximum(literals_K, 1), 0.0),
        answered_K / asked_words,
        np.full(len(examples), math.log1p(asked.length)),
        np.log1p(length_K),
        np.log1p(answer_K),
        np.abs(np.log((1 + asked.length) / (1 + length_K))),
    ]


def _history(examples: Sequence[Example]) -> list[np.ndarray]:
    """Mean rating with one good and one bad added, uses, quality (half if unknown), trust."""
    known_KN = np.array(
        [(one.helped, one.rated, one.uses, 0.5 if one.quality is None else one.quality, one.trust) for one in examples],
        np.float64,
    )
    helped_K, rated_K, uses_K, quality_K, trust_K = known_KN.T
    return [(helped_K + 1) / (rated_K + 2), np.log1p(uses_K), quality_K, trust_K]


def _copying(asked: Traits, examples: Sequence[Example]) -> list[np.ndarray]:
    """Opposite requests, and how much of an answer stands in its own request."""
    rows = [(is_opposite(asked.words, example.traits[0].words), *example.copied) for example in examples]
    return list(np.array(rows, np.float64).T)


def is_opposite(first: frozenset[str], second: frozenset[str]) -> bool:
    """Whether one asks what the other forbids: a pair of opposites is split between them, or just one has a negation."""
    only_second = second - first
    # Few texts have a word that has an opposite, so the pairs themselves are hardly ever looked at.
    if any(word not in second and not only_second.isdisjoint(OPPOSITE_OF[word]) for word in _OPPOSED & first):
        return True
    return NEGATIONS.isdisjoint(first - second) != NEGATIONS.isdisjoint(only_second)
