"""`Matcher`: which experts an instruction is nearest to, and how much that is to count. Knows no model."""
# Shapes: E experts, D dimensions of a text's vector, Q queries

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.adapters.glider.calibration import Calibration, calibrate, thinned
from anabranch.adapters.glider.embed import Sparse, Stack, TextEmbedder, TextFeatures, Vector, embedded, is_zero
from anabranch.bounds import MOST_QUERY
from anabranch.errors import ConfigError
from anabranch.extras import extras

__all__ = ["Match", "Matcher"]


# Who asks, the query, the instruction.
_Key = tuple[str, str, str | None]


@dataclass(frozen=True)
class Match:
    """An expert that was found.

    Attributes:
        name: its name.
        cosine: of its instruction and the query's.
    """

    name: str
    cosine: float


class Matcher:
    """Instructions of experts by name, and cosines with those of queries.

    Args:
        embedder: see `embedded`; None for `TextFeatures`.
        writer: makes the instruction of a query that comes without one; None takes the query itself.
        cached: queries whose vectors are kept.
        many: experts from which on a graph finds neighbours, where the extra ``graph`` is installed.

    Attributes:
        warns: whether a query whose vector has length 0 is warned of; a server, whose clients may ask what they like, sets it to False.
    """

    def __init__(
        self,
        embedder: TextEmbedder | Callable[[Sequence[str]], Any] | None = None,
        writer: Callable[[str], str] | None = None,
        *,
        cached: int = 4096,
        many: int = 2048,
    ) -> None:
        self.embedder: Any = TextFeatures() if embedder is None else embedder
        self.writer, self.cached, self.many = writer, cached, many
        self.warns = True
        self.texts: dict[str, tuple[str, ...]] = {}
        # Unit vectors, by name; None for an expert without an instruction.
        self.vectors: dict[str, Vector | None] = {}
        self.written = 0
        self._seen: OrderedDict[_Key, tuple[str, Vector]] = OrderedDict()
        # What threads are asking for at the moment; several may, of an endpoint.
        self._under_way: dict[_Key, Future[tuple[str, Vector]]] = {}
        self._lock = threading.Lock()
        self._stacked: tuple[list[str], Stack] | None = None
        self._places: np.ndarray | None = None
        self._index: Any = None
        self._calibration: Calibration | None = None

    def add(self, name: str, texts: Sequence[str]) -> None:
        """An expert with these wordings; none for one that the global router does not know. No other vector changes."""
        vector_D = self._vectors_of({name: texts}, self.dim)[name]
        # Ids of the graph are places among the members, of whom a new one is the last; one that is told anew stays where it was.
        index = None if name in self.vectors else self._index
        # Before all else: where it cannot be, nothing has changed.
        if index is not None and isinstance(vector_D, np.ndarray) and not is_zero(vector_D):
            index.add(vector_D[None])
        self.vectors[name], self.texts[name] = vector_D, tuple(texts)
        self._changed()
        self._index = index

    def remove(self, name: str) -> None:
        """Without the expert. No other vector changes."""
        del self.texts[name], self.vectors[name]
        self._changed()

    def fit(self) -> None:
        """Let an embedder that learns how rare features are (`TextFeatures`) learn it from the wordings, and embed them again."""
        if not hasattr(self.embedder, "fit"):
            return
        self.embedder.fit([text for texts in self.texts.values() for text in texts])
        # All of them, before any is forgotten.
        made = self._vectors_of(self.texts, None)
        self._seen.clear()
        self.vectors = made
        self._changed()

    def fill(self, texts: Mapping[str, Sequence[str]]) -> None:
        """These experts in the place of those there are, embedded in one call, after the embedder has learned from them where it does."""
        if hasattr(self.embedder, "fit"):
            self.embedder.fit([text for own in texts.values() for text in own])
        self.vectors, self.texts = self._vectors_of(texts, None), {name: tuple(own) for name, own in texts.items()}
        self._seen.clear()
        self._changed()

    def _vectors_of(self, texts: Mapping[str, Sequence[str]], dim: int | None) -> dict[str, Vector | None]:
        """Of each expert its first wording's, in one call of the embedder, which may be far away; None for one without."""
        first = {name: own[0] for name, own in texts.items() if own}
        made = dict(zip(first, embedded(self.embedder, list(first.values()), dim) if first else [], strict=True))
        for name, vector_D in made.items():
            if is_zero(vector_D):
                warnings.warn(
                    f"the instruction of {name!r} has a vector of length 0, so that no query finds it: its global score is 0",
                    stacklevel=4,
                )
        return {name: made.get(name) for name in texts}

    @property
    def dim(self) -> int | None:
        """D; None where no expert has an instruction, or vectors are sparse."""
        first = next((vector for vector in self.vectors.values() if vector is not None), None)
        return None if first is None or isinstance(first, Sparse) else len(first)

    def _changed(self) -> None:
        self._stacked = self._index = self._calibration = self._places = None

    def members(self) -> tuple[list[str], Stack]:
        """(names, vectors) of the M experts that queries can find: with an instruction whose vector has a length."""
        if self._stacked is None:
            known = {
                name: vector for name, vector in self.vectors.items() if vector is not None and not is_zero(vector)
            }
            self._stacked = list(known), Stack(list(known.values()))
        return self._stacked

    def instruct(self, query: str, instruction: str | None = None, *, asker: str = "") -> tuple[str, Vector]:
        """(instruction, its unit vector) of a query: as told (a system prompt), or as the writer writes it; kept for the next time.

        Of a query the first 2,000 characters are compared (`anabranch.bounds.MOST_QUERY`), as by a server.

        ``asker`` is whoever asks: what one asked is not known to another, who would learn from the time it takes that it was asked.
        """
        key = _key(query, instruction, asker)
        with self._lock:
            if key in self._seen:
                self._seen.move_to_end(key)
                return self._seen[key]
            first = self._under_way.get(key)
            own: Future[tuple[str, Vector]] = Future()
            if first is None:
                self._under_way[key] = own
        if first is not None:
            # Another thread asks for the same, which may cost money.
            return first.result()
        try:
            found = self._instructed(*key[1:])
        except BaseException as error:
            own.set_exception(error)
            raise
        else:
            own.set_result(found)
            with self._lock:
                self._seen[key] = found
                while len(self._seen) > self.cached:
                    self._seen.popitem(last=False)
        finally:
            with self._lock:
                del self._under_way[key]
        return found

    def knows(self, query: str, instruction: str | None = None, *, asker: str = "") -> bool:
        """Whether `instruct` of the same has no need of the writer and the embedder."""
        with self._lock:
            return _key(query, instruction, asker) in self._seen

    def _instructed(self, query: str, instruction: str | None) -> tuple[str, Vector]:
        text = instruction
        if text is None:
            text = query if self.writer is None else self.writer(query)
            self.written += self.writer is not None
            if not isinstance(text, str):
                raise ConfigError(f"the writer gave a {type(text).__name__} for a query; it must be a text")
        found = text, embedded(self.embedder, [text], self.dim)[0]
        if self.warns and self.members()[0] and is_zero(found[1]):
            warnings.warn("the instruction of a query has a vector of length 0: all global scores are 0", stacklevel=5)
        return found

    def cosines(self, query: str, instruction: str | None = None) -> dict[str, float]:
        """By expert, in the order they were added; 0 for one without an instruction, or with one whose vector has length 0."""
        return dict(zip(self.vectors, self.cosine_array(query, instruction).tolist(), strict=True))

    def cosine_array(self, query: str, instruction: str | None = None, *, asker: str = "") -> np.ndarray:
        """The same as an array, cosine_E; ``asker`` as of `instruct`."""
        names, stack = self.members()
        cosine_E = np.zeros(len(self.vectors))
        if names:
            cosine_E[self.member_M] = stack.cosines(self.instruct(query, instruction, asker=asker)[1])
        return cosine_E

    @property
    def member_M(self) -> np.ndarray:
        """Places of `members` among all experts, in the order they were added."""
        if self._places is None:
            known = set(self.members()[0])
            self._places = np.array([place for place, name in enumerate(self.vectors) if name in known], np.int64)
        return self._places

    def retrieve(
        self, query: str, k: int = 1, *, instruction: str | None = None, exact: bool | None = None
    ) -> list[Match]:
        """The ``k`` experts whose instructions are nearest, best first; fewer where fewer have one. Ties go to what was added first.

        One whose vector has length 0 is found by no query. A query of length 0 is as near to all: 0.

        Args:
            query: the text.
            k: how many.
            instruction: in the place of what the writer would write.
            exact: compare with all, or ask a graph (`anabranch.graph.HNSW`, approximate); None for a graph from ``many`` experts on.
                Sparse vectors are compared with all that share a number with them.
        """
        if k < 1:
            raise ConfigError(f"k is {k}; it must be at least 1")
        names, stack = self.members()
        if not names:
            return []
        vector_D, k = self.instruct(query, instruction)[1], min(k, len(names))
        if exact is None:
            exact = stack.is_sparse or len(names) < self.many or bool(extras()["graph"].missing)
        # A graph has no neighbours of a vector without a direction.
        if exact or stack.is_sparse or is_zero(vector_D):
            row_K, cosine_K = stack.nearest(vector_D, k)
            return [Match(names[row], cosine) for row, cosine in zip(row_K.tolist(), cosine_K.tolist(), strict=True)]
        ids, _ = self._graph().search(vector_D, k=k)
        found = [int(number) for number in np.asarray(ids).reshape(-1) if number >= 0]
        return [Match(names[number], float(stack.vector_MD[number] @ vector_D)) for number in found]

    def _graph(self) -> Any:
        if self._index is None:
            from anabranch.graph import HNSW

            vector_MD = self.members()[1].vector_MD
            self._index = HNSW(vector_MD.shape[1], metric="cosine")
            self._index.add(vector_MD)
        return self._index

    def _other_wordings(self, name: str) -> tuple[str, ...]:
        """Of an expert's instruction, each once. The same words again would be a query whose cosine is 1."""
        said: dict[str, str] = {}
        for text in self.texts[name]:
            said.setdefault(" ".join(text.split()), text)
        return tuple(said.values())[1:]

    def calibration(self) -> Calibration:
        """See `calibrate`, of the experts as they are; kept until one comes or goes. Raises ConfigError for fewer than two."""
        if self._calibration is None:
            names, stack = self.members()
            others = {number: self._other_wordings(name) for number, name in enumerate(names)}
            own = [number for number, texts in others.items() if texts]
            wordings: Mapping[int, Sequence[str]] = {
                number: others[number] or thinned(self.texts[name][0]) for number, name in enumerate(names)
            }
            said = [text for texts in wordings.values() for text in texts]
            made = iter(embedded(self.embedder, said, self.dim) if said else [])
            worded = {}
            for number, texts in wordings.items():
                # A wording whose vector has length 0 is a query that no threshold decides of: its scores are 0.
                if cosines := [stack.cosines(other) for _ in texts if not is_zero(other := next(made))]:
                    worded[number] = np.stack(cosines)
            known = [vector for name in names if (vector := self.vectors[name]) is not None]
            asked = {number: stack.cosines(vector) for number, vector in enumerate(known)}
            self._calibration = calibrate(asked, worded, own=own)
        return self._calibration


def _key(query: str, instruction: str | None, asker: str) -> _Key:
    """A query is not looked at beside an instruction, and no further than a server looks."""
    return (asker, query[:MOST_QUERY], None) if instruction is None else (asker, "", instruction)
