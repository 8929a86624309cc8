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
    one_hot = [float(at == bucket) for at in range(MODEL_BUCKETS)]
    best = float(similarity_K[0]) if len(examples) else 0.0
    rows = []
    for rank, (example, similarity) in enumerate(zip(examples, similarity_K, strict=True)):
        near = [float(similarity), best - float(similarity), math.log1p(rank)]
        rows.append([*near, *_overlap(asked, example), *_history(example), *_copying(asked, example), *one_hot])
    texts = [(request, example.request, example.response) for example in examples]
    return Pairs(np.array(rows, np.float64).reshape(len(examples), len(NAMES)), texts)


def _overlap(asked: Traits, example: Example) -> list[float]:
    then, answer = example.traits
    both = len(asked.words & then.words)
    shared = len(asked.literals & then.literals)
    # Counted, not made: every request does this for every candidate.
    either = len(asked.words) + len(then.words) - both
    return [
        both / max(either, 1),
        both / max(len(asked.words), 1),
        both / max(len(then.words), 1),
        math.log1p(either - both),
        shared / len(asked.literals) if asked.literals else 1.0,
        1 - shared / len(then.literals) if then.literals else 0.0,
        len(asked.words & answer.words) / max(len(asked.words), 1),
        math.log1p(asked.length),
        math.log1p(then.length),
        math.log1p(answer.length),
        abs(math.log((1 + asked.length) / (1 + then.length))),
    ]


def _history(example: Example) -> list[float]:
    """Mean rating with one good and one bad added, uses, quality (half if unknown), trust."""
    rate = (example.helped + 1) / (example.rated + 2)
    return [rate, math.log1p(example.uses), 0.5 if example.quality is None else example.quality, float(example.trust)]


def _copying(asked: Traits, example: Example) -> list[float]:
    then, answer = example.traits
    return [
        float(is_opposite(asked.words, then.words)),
        len(answer.words & then.words) / max(len(answer.words), 1),
        len(answer.literals & then.literals) / len(answer.literals) if answer.literals else 0.0,
    ]


def is_opposite(first: frozenset[str], second: frozenset[str]) -> bool:
    """Whether one asks what the other forbids: a pair of opposites is split between them, or just one has a negation."""
    only_second = second - first
    # Few texts have a word that has an opposite, so the pairs themselves are hardly ever looked at.
    if any(word not in second and not only_second.isdisjoint(OPPOSITE_OF[word]) for word in _OPPOSED & first):
        return True
    return NEGATIONS.isdisjoint(first - second) != NEGATIONS.isdisjoint(only_second)
