"""`GRank`: the ranking of G-Rank over a log of clicks that lies in one place, by term and for a node.

    model = GRank(F=0.0).fit("clicks.parquet")        # columns node, term, item
    model.rank("jazz", node="alice", k=10)            # what users like alice clicked for it
    model.similarity("alice")                         # S of every node, 0 to 1

Nothing is trained: `fit` counts. Clicks are kept as distinct cells (term, item, node) with a count, sorted by term; inverted lists
over (term, item) pairs and over items give all similarities of one node in time proportional to the clicks of those who share
something with it.
"""
# Shapes: N nodes, T terms, I items, D cells

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from anabranch.bounds import is_whole, shown, whole
from anabranch.errors import InputError
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.header import described
from anabranch.graph.rank.clicks import read_clicks
from anabranch.graph.rank.defences import Defences
from anabranch.graph.rank.formula import check_parameters, raw_similarity, saturated, top_terms_mask
from anabranch.graph.rank.items import Item, by_id, matches, normalize, order_of
from anabranch.graph.rank.measures import ndcg
from anabranch.graph.rank.peer import Match, _check_k
from anabranch.graph.rank.results import Ranked

KIND = "rank model"
PARAMETERS = ("F", "top_terms", "saturation", "click_cap", "min_common", "term_key", "match")


class GRank:
    """Ranks items for terms by the clicks of similar nodes, in the manner of scikit-learn.

    Args:
        F: the isolation constant, at least 0: what nodes without overlap weigh.
        top_terms: K, most searched terms that are compared.
        saturation: what C clicks of a node on an item for a term count: "cap" min(C, click_cap), "log" log(1 + C), None C (the paper's).
        click_cap: see saturation.
        min_common: m; a node with fewer common clicks counts kappa_m / m of its similarity.
        term_key: under which text clicks for a term are counted; terms with one key are one term.
        match: whether an item's metadata match a term; used with ``items`` of `fit`.

    Attributes:
        nodes_: names of nodes, sorted, [N].
        terms_: keys of terms, sorted, [T].
        items_: ids of items, sorted, [I].
        num_clicks_: clicks counted.
    """

    _library: dict[Any, Item]

    def __init__(
        self,
        F: float = 0.0,
        top_terms: int = 10,
        *,
        saturation: str | None = "cap",
        click_cap: int = 3,
        min_common: int = 0,
        term_key: Callable[[str], str] = normalize,
        match: Match = matches,
    ) -> None:
        self.F, self.top_terms, self.saturation, self.click_cap, self.min_common = (
            F,
            top_terms,
            saturation,
            click_cap,
            min_common,
        )
        self.term_key, self.match = term_key, match

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def set_params(self, **parameters: Any) -> Self:
        """Change arguments of the constructor. Raises InputError for an unknown one."""
        for name, value in parameters.items():
            if name not in PARAMETERS:
                raise InputError(f"GRank has no parameter {name!r}; there are {', '.join(PARAMETERS)}")
            setattr(self, name, value)
        return self

    def fit(
        self,
        clicks: Any,
        y: Any = None,
        *,
        items: Iterable[Item] = (),
        columns: tuple[str, str, str] = ("node", "term", "item"),
    ) -> Self:
        """Count clicks.

        Args:
            clicks: what `read_clicks` takes: a Parquet or CSV path, a table, three arrays, or (node, term, item) rows.
            y: ignored.
            items: metadata; those that match a term stand above all others, clicked or not.
            columns: names of the columns of files and tables.

        Raises as `read_clicks`, and InputError for bad parameters.
        """
        self._defences()
        library = by_id(items)
        nodes, terms, found = read_clicks(clicks, columns)
        if len(found) and any(isinstance(id, str) != (found.dtype.kind == "U") for id in library):
            raise InputError(
                "ids of items in clicks and of `items` are of different types; use integers or texts in both"
            )
        return self._become(library, nodes, self._keys(terms), found, np.ones(len(nodes), np.int64))

    def partial_fit(
        self, clicks: Any, y: Any = None, *, columns: tuple[str, str, str] = ("node", "term", "item")
    ) -> Self:
        """Add clicks to those there are. The first call is a `fit`. Raises as `fit`."""
        if not hasattr(self, "nodes_"):
            return self.fit(clicks, columns=columns)
        nodes, terms, items = read_clicks(clicks, columns)
        old = self.nodes_[self._node_D], self.terms_[self._term_D], self.items_[self._item_D]
        new = nodes, self._keys(terms), items
        if not len(old[0]):
            return self._become(self._library, *new, np.ones(len(nodes), np.int64))
        for name, before, after in zip(columns, old, new, strict=True):
            if len(after) and (before.dtype.kind == "U") != (after.dtype.kind == "U"):
                raise InputError(
                    f"{name}: integers and texts do not mix; the clicks before were of type {before.dtype}"
                )
        if len(nodes):
            all_nodes, all_terms, all_items = (np.concatenate(pair) for pair in zip(old, new, strict=True))
            weight = np.concatenate([self._count_D, np.ones(len(nodes), np.int64)])
            self._become(self._library, all_nodes, all_terms, all_items, weight)
        return self

    def _defences(self) -> Defences:
        check_parameters(self.F, 0.0, self.top_terms)
        return Defences(saturation=self.saturation, click_cap=self.click_cap, min_common=self.min_common)  # type: ignore[arg-type]

    def _keys(self, terms: np.ndarray) -> np.ndarray:
        """The key of each term, computed once for each distinct one."""
        distinct, place = np.unique(terms, return_inverse=True)
        return (
            np.array([str(self.term_key(str(term))) for term in distinct.tolist()], dtype=str)[place]
            if len(terms)
            else terms
        )

    def _become(
        self, library: dict[Any, Item], nodes: np.ndarray, terms: np.ndarray, items: np.ndarray, weight: np.ndarray
    ) -> Self:
        """Count these, and be of them all at once: what is refused or interrupted leaves what there was."""
        made = copy(self)
        made._library = library
        made._count(nodes, terms, items, weight)
        vars(self).update(vars(made))
        return self

    def _count(self, nodes: np.ndarray, terms: np.ndarray, items: np.ndarray, weight: np.ndarray) -> None:
        self.nodes_, node = np.unique(nodes, return_inverse=True)
        self.terms_, term = np.unique(terms, return_inverse=True)
        self.items_, item = np.unique(items, return_inverse=True)
        if len(self.nodes_) * len(self.terms_) * len(self.items_) >= 2**63:
            raise InputError("nodes x terms x items must stay below 2**63")
        cell = (term.astype(np.int64) * len(self.items_) + item) * max(len(self.nodes_), 1) + node
        cell_D, place = np.unique(cell, return_inverse=True)
        self._count_D = np.bincount(place, weight, minlength=len(cell_D)).astype(np.int64)
        self.num_clicks_ = int(self._count_D.sum())
        pair_D, self._node_D = np.divmod(cell_D, max(len(self.nodes_), 1))
        self._term_D, self._item_D = np.divmod(pair_D, max(len(self.items_), 1))
        self._index()

    def _index(self) -> None:
        """Where cells of each term, pair, item and node lie."""
        self._start_T = np.searchsorted(self._term_D, np.arange(len(self.terms_) + 1))
        pair_D = self._term_D * len(self.items_) + self._item_D
        self._pair_D = np.cumsum(np.append(True, pair_D[1:] != pair_D[:-1])) - 1 if len(pair_D) else pair_D
        self._start_P = np.searchsorted(self._pair_D, np.arange(self._pair_D[-1] + 2 if len(pair_D) else 1))
        self._by_node = np.argsort(self._node_D, kind="stable")
        self._start_N = np.searchsorted(self._node_D[self._by_node], np.arange(len(self.nodes_) + 1))
        # (item, node), each once.
        both = np.unique(self._item_D * max(len(self.nodes_), 1) + self._node_D)
        self._clicker = both % max(len(self.nodes_), 1)
        self._start_I = np.searchsorted(both // max(len(self.nodes_), 1), np.arange(len(self.items_) + 1))
        self._num_items_N = np.bincount(self._clicker, minlength=len(self.nodes_))
        self._top: _Top | None = None

    def _top_terms(self) -> "_Top":
        """The most searched terms of each node; made when first needed, and kept once it is whole."""
        size = int(self.top_terms)
        if (found := self._top) is not None and found.size == size:
            return found
        terms_N = []
        for node in range(len(self.nodes_)):
            cells = self._by_node[self._start_N[node] : self._start_N[node + 1]]
            term, place = np.unique(self._term_D[cells], return_inverse=True)
            count = np.bincount(place, self._count_D[cells])
            terms_N.append(term[top_terms_mask(count[None, :], size)[0]])
        self._top = found = _Top(size, terms_N, *_inverted(terms_N, len(self.terms_)))
        return found

    def similarity(self, node: Any) -> np.ndarray:
        """S of every node of ``nodes_`` as ``node`` sees it, float64 ``[N]``: 0 to 1, 1 of itself.

        Raises InputError for an unknown node.
        """
        i, count = self._place(node), len(self.nodes_)
        own = self._by_node[self._start_N[i] : self._start_N[i + 1]]
        top = self._top_terms()
        terms_N = _count_lists(top.nodes, top.start_T, top.terms_N[i], count)
        common_N = _count_lists(self._node_D, self._start_P, self._pair_D[own], count)
        items = np.unique(self._item_D[own])
        shared_N = _count_lists(self._clicker, self._start_I, items, count)
        union_N = len(items) + self._num_items_N - shared_N
        raw_N = raw_similarity(terms_N, common_N, union_N, self.min_common)
        raw_N[i] = 0.0
        largest = raw_N.max()
        found_N = raw_N / largest if largest > 0 else raw_N
        found_N[i] = 1.0
        return found_N

    def rank(self, term: str, node: Any = None, k: int | None = 10) -> list[Ranked]:
        """The best items for a term, with scores, best first; fewer than ``k`` if there are no more.

        Args:
            term: any text. One that nobody searched for gives matching items by their clicks, or else the most clicked items of all.
            node: for whom, by name; None for everybody alike (every node weighs 1).
            k: how many; None for all.

        Raises InputError for an unknown node, an empty term, a ``k`` below 1.
        """
        _check_k(k)
        self._check_fitted()
        text, defences = normalize(term), self._defences()
        weight_N = np.ones(len(self.nodes_)) if node is None else self.similarity(node) + self.F
        place = int(np.searchsorted(self.terms_, key := str(self.term_key(text))))
        seen = place < len(self.terms_) and self.terms_[place] == key
        cells = slice(self._start_T[place], self._start_T[place + 1]) if seen else slice(0, len(self._item_D))
        value = saturated(self._count_D[cells], defences) * weight_N[self._node_D[cells]] if seen else self._count_D
        score_I = np.bincount(self._item_D[cells], value, minlength=len(self.items_))
        first = {id for id, item in self._library.items() if self.match(text, item)}
        clicked = np.unique(self._item_D[cells])
        score = dict(zip(self.items_[clicked].tolist(), score_I[clicked].tolist(), strict=True))
        if not seen and first:
            score = {id: value for id, value in score.items() if id in first}
        score |= {id: 0.0 for id in first if id not in score}
        order = sorted(score, key=lambda id: (id not in first, -score[id], order_of(id)))
        return [Ranked(id, score[id]) for id in order[:k]]

    def score(
        self, clicks: Any, y: Any = None, *, k: int = 10, columns: tuple[str, str, str] = ("node", "term", "item")
    ) -> float:
        """Mean NDCG@k of clicks that were not fitted, each with its item as the only good one; nodes that are not known get the
        ranking for everybody.

        Raises as `fit`.
        """
        _check_k(whole("k", k, 1))
        self._check_fitted()
        nodes, terms, items = read_clicks(clicks, columns)
        known = set(self.nodes_.tolist())
        cache: dict[tuple[Any, str], list[Any]] = {}
        values = []
        for node, term, item in zip(nodes.tolist(), terms.tolist(), items.tolist(), strict=True):
            who = node if node in known else None
            if (who, term) not in cache:
                cache[who, term] = [found for found, _ in self.rank(term, who, k)]
            gain = [float(found == item) for found in cache[who, term]]
            values.append(ndcg(gain, k) if any(gain) else 0.0)
        return float(np.mean(values)) if values else 0.0

    def _check_fitted(self) -> None:
        if not hasattr(self, "nodes_"):
            raise InputError("nothing is counted yet; call fit with clicks first")

    def _place(self, node: Any) -> int:
        self._check_fitted()
        is_text = self.nodes_.dtype.kind == "U"
        is_name = isinstance(node, str) if is_text else is_whole(node) and -(2**63) <= node < 2**63
        place = int(np.searchsorted(self.nodes_, node)) if is_name else -1
        if not 0 <= place < len(self.nodes_) or self.nodes_[place] != node:
            raise InputError(
                f"no clicks of node {shown(node)}; there are {len(self.nodes_):,} nodes (node=None ranks for everybody)"
            )
        return place

    def save(self, path: str | Path) -> None:
        """Write the counts, metadata and parameters into one checked file, all or nothing; not ``term_key`` and ``match``."""
        self._check_fitted()
        arrays = {
            "cell_count": self._count_D,
            "cell_node": self._node_D,
            "cell_term": self._term_D,
            "cell_item": self._item_D,
        }
        names = {"nodes": self.nodes_.tolist(), "terms": self.terms_.tolist(), "items": self.items_.tolist()}
        library = [{**asdict(item), "tags": list(item.tags)} for item in self._library.values()]
        parameters = {name: getattr(self, name) for name in PARAMETERS if name not in ("term_key", "match")}
        write_arrays(path, KIND, arrays, {"parameters": parameters, "names": names, "library": library})

    @classmethod
    def load(cls, path: str | Path, **others: Any) -> Self:
        """Read what `save` wrote; ``others`` are ``term_key`` and ``match`` if they are not the usual ones.

        Raises DataError for a file that is missing, foreign or damaged.
        """
        file = read_arrays(path, KIND)
        with described(path, "a G-Rank"):
            model = cls(**{**dict(file.meta["parameters"]), **others})
            model._defences()
            model._library = by_id(Item(**{**item, "tags": tuple(item["tags"])}) for item in file.meta["library"])
            model.nodes_, model.terms_, model.items_ = (
                _distinct(file.meta["names"][name], name) for name in ("nodes", "terms", "items")
            )
            model._count_D, model._node_D, model._term_D, model._item_D = (
                file.arrays[f"cell_{name}"] for name in ("count", "node", "term", "item")
            )
            _check_cells(model, file.arrays)
        model.num_clicks_ = int(model._count_D.sum())
        model._index()
        return model

    def __repr__(self) -> str:
        changed = ", ".join(
            f"{name}={getattr(self, name)!r}" for name in PARAMETERS if name not in ("term_key", "match")
        )
        return f"GRank({changed})"


def _distinct(values: Any, name: str) -> np.ndarray:
    """Names of a file: all integers or all text, in rising order. Raises ValueError."""
    found = np.array(values, dtype=None if values else str)
    if not isinstance(values, list) or found.ndim != 1 or found.dtype.kind not in "iuU":
        raise ValueError(f"{name} are no list of integers, and none of texts")
    if len({type(value) for value in values}) > 1 or (found[1:] <= found[:-1]).any():
        raise ValueError(f"{name} are not in order")
    return found


def _check_cells(model: GRank, arrays: dict[str, np.ndarray]) -> None:
    """Raise ValueError unless cells are those of nodes, terms and items that there are, in order."""
    most = {"count": 2**62, "node": len(model.nodes_), "term": len(model.terms_), "item": len(model.items_)}
    for name, end in most.items():
        cell_D = arrays[f"cell_{name}"]
        if cell_D.dtype != np.int64 or cell_D.shape != arrays["cell_count"].shape or cell_D.ndim != 1:
            raise ValueError(f"cell_{name} is {cell_D.dtype} {list(cell_D.shape)}")
        if len(cell_D) and not 0 <= cell_D.min() <= cell_D.max() < end:
            raise ValueError(f"cell_{name} is out of range")
    rising = np.lexsort((model._node_D, model._item_D, model._term_D))
    if (rising != np.arange(len(rising))).any():
        raise ValueError("cells are not in order")


class _Top(NamedTuple):
    """The ``size`` most searched terms of each node, sorted, and the nodes that have each term among theirs."""

    size: int
    terms_N: list[np.ndarray]
    start_T: np.ndarray
    nodes: np.ndarray


def _inverted(lists: list[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each value below ``size`` the lists that hold it, as (starts, lists)."""
    value = np.concatenate([np.empty(0, np.int64), *lists])
    owner = np.repeat(np.arange(len(lists)), [len(entry) for entry in lists]) if lists else np.empty(0, np.int64)
    order = np.argsort(value, kind="stable")
    return np.searchsorted(value[order], np.arange(size + 1)), owner[order]


def _count_lists(member: np.ndarray, start: np.ndarray, chosen: np.ndarray, size: int) -> np.ndarray:
    """How often each of ``size`` numbers is in the lists ``member[start[c]:start[c + 1]]`` of the chosen."""
    parts = [member[start[c] : start[c + 1]] for c in chosen]
    return np.bincount(np.concatenate(parts), minlength=size) if parts else np.zeros(size, np.int64)
