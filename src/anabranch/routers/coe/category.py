"""The first step of a composition of experts: which category a prompt belongs to, how sure that is, and when to say "none of these".

    router = CategoryRouter(head="knn", k=32)
    router.fit(vectors, labels)                        # None labels: filled in from confident neighbours
    router.abstain(target_rate=0.05)                   # the least confident go to "general"
    router.predict(vectors).category
    router.report().ece

Source: arXiv 2412.01868 (a frozen embedding, k-NN or linear heads, semi-supervised labels, uncertain prompts to a general category);
temperature scaling is Guo et al., ICML 2017. Deciding needs numpy alone.
"""
# Shapes: N rows, D dimensions, C categories, E examples, K neighbours

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from anabranch.errors import InputError
from anabranch.routers.coe.calibration import CategoryReport, best_temperature, report_of
from anabranch.routers.coe.heads import Head, KnnHead, LogisticHead, MlpHead, nearest, softmax
from anabranch.routers.embed.checked import unit_vectors
from anabranch.routers.embed.embedder import Embedder

HeadKind = Literal["knn", "logreg", "mlp"]
Uncertainty = Literal["probability", "entropy", "similarity"]


class Categories(NamedTuple):
    """What a router says of N prompts.

    Attributes:
        category: names; the general one where it abstains.
        confidence_N: between 0 and 1 (-1 to 1 where uncertainty is by similarity).
        distribution_NC: calibrated probabilities of the learned categories.
        abstained_N: bool.
    """

    category: tuple[str, ...]
    confidence_N: np.ndarray
    distribution_NC: np.ndarray
    abstained_N: np.ndarray


class CategoryRouter:
    """A classifier of prompts into categories.

    Args:
        embedder: of texts; None if only vectors are given.
        head: "knn", "logreg" (multinomial logistic regression) or "mlp" (one hidden layer).
        k: neighbours, of the head "knn" and of confidence by similarity.
        general: the category of prompts it is not sure of.
        C: inverse weight decay of the other two heads.
        hidden: units of the head "mlp".
        uncertainty: what confidence is: the largest "probability", 1 - "entropy" / log C, or mean "similarity" to the k nearest examples.
        seed: of folds and of the network's first weights.

    Attributes:
        categories: learned names, sorted.
        temperature: logits are divided by it.
        min_confidence: below it, the category is ``general``; -inf for never.

    Raises InputError for arguments of values they may not have.
    """

    def __init__(
        self,
        embedder: Embedder | None = None,
        head: HeadKind = "knn",
        k: int = 32,
        general: str = "general",
        *,
        C: float = 1.0,
        hidden: int = 64,
        uncertainty: Uncertainty = "probability",
        seed: int = 0,
    ) -> None:
        if head not in ("knn", "logreg", "mlp") or uncertainty not in ("probability", "entropy", "similarity"):
            raise InputError(
                f"head is {head!r} and uncertainty {uncertainty!r}; they must be knn, logreg or mlp, and probability, entropy or similarity"
            )
        if k < 1 or hidden < 1 or not C > 0:
            raise InputError(f"k is {k}, hidden {hidden} and C {C}; they must be above 0")
        self.embedder, self.head, self.k, self.general = embedder, head, k, general
        self.C, self.hidden, self.uncertainty, self.seed = C, hidden, uncertainty, seed
        self.categories: tuple[str, ...] = ()
        self.temperature, self.min_confidence = 1.0, -np.inf
        self._head: Head = self._new_head()
        self._example_ED, self._class_E = np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
        self._cross: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        """Examples it learned from."""
        return len(self._class_E)

    # Learning

    @property
    def dim(self) -> int | None:
        """D of the vectors that it learned from; None before."""
        return self._example_ED.shape[1] or None

    def fit(
        self,
        inputs: Sequence[str] | np.ndarray,
        labels: Sequence[str | None],
        *,
        neighbours: int = 5,
        min_share: float = 0.8,
        folds: int = 5,
    ) -> Self:
        """Learn the categories, then the temperature from rows that a fit without their fold predicted.

        Args:
            inputs: texts, or float32 unit vectors ``[N, D]``.
            labels: category of each; None where unknown: such rows are labelled by `label_by_neighbours` or left out.
            neighbours, min_share: of `label_by_neighbours`.
            folds: for the temperature; 0 leaves it at 1.

        Raises InputError for vectors that are not finite or of another width, an empty text, and no label at all.
        """
        vector_ND = self.vectors(inputs)
        if len(labels) != len(vector_ND):
            raise InputError(f"there are {len(labels)} labels for {len(vector_ND)} rows")
        empty = np.flatnonzero(~vector_ND.any(axis=1))
        if len(empty):
            raise InputError(f"row {empty[0]} is an empty text, or a vector of zeros; it can teach no category")
        if any(label is None for label in labels):
            labels = label_by_neighbours(vector_ND, labels, neighbours=neighbours, min_share=min_share)
        kept = [row for row, label in enumerate(labels) if label is not None]
        return self._learn(vector_ND[kept], [str(labels[row]) for row in kept], folds)

    def add_examples(
        self, inputs: Sequence[str] | np.ndarray, labels: Sequence[str], *, folds: int | None = None
    ) -> Self:
        """Learn from more examples, of known categories or new ones; ``min_confidence`` stays.

        The head "knn" only stores them, which is instant; the others are fitted again.

        Args:
            inputs: as of `fit`.
            labels: category of each.
            folds: to set the temperature anew with; None leaves it as it is.
        """
        vector_ND = self.vectors(inputs)
        if len(labels) != len(vector_ND):
            raise InputError(f"there are {len(labels)} labels for {len(vector_ND)} rows")
        names = [self.categories[at] for at in self._class_E] + [str(label) for label in labels]
        together = np.concatenate((self._example_ED, vector_ND)) if len(self._example_ED) else vector_ND
        temperature = self.temperature
        self._learn(together, names, folds or 0)
        if folds is None:
            self.temperature = temperature
        return self

    def _learn(self, vector_ND: np.ndarray, labels: list[str], folds: int) -> Self:
        if not labels:
            raise InputError("no row has a category; label at least one example of each")
        self.categories = tuple(sorted(set(labels)))
        at = {name: place for place, name in enumerate(self.categories)}
        self._example_ED, self._class_E = vector_ND, np.array([at[label] for label in labels], np.int64)
        self._cross, self.temperature = None, 1.0
        self._head = self._new_head().fit(vector_ND, self._targets(self._class_E), seed=self.seed)
        if folds and len(self.categories) > 1:
            self.temperature = best_temperature(self._cross_logits(folds, self.seed), self._class_E)
        return self

    def _new_head(self) -> Head:
        if self.head == "knn":
            return KnnHead(self.k)
        return LogisticHead(self.C) if self.head == "logreg" else MlpHead(self.C, self.hidden)

    def _targets(self, class_N: np.ndarray) -> np.ndarray:
        return np.eye(len(self.categories))[class_N]

    def _cross_logits(self, folds: int, seed: int) -> np.ndarray:
        """Logits of every example by a head that was fitted without its fold."""
        if self._cross is None or self._cross[0] != (folds, seed):
            fold_E = stratified_folds(self._class_E, folds, seed)
            logit_EC = np.zeros((len(self._class_E), len(self.categories)))
            for fold in np.unique(fold_E):
                rest = fold_E != fold
                if not rest.any():
                    raise InputError("cross-fitting needs examples in at least two folds; label more")
                head = self._new_head().fit(self._example_ED[rest], self._targets(self._class_E[rest]), seed=self.seed)
                logit_EC[~rest] = head.logits(self._example_ED[~rest])
            self._cross = (folds, seed), logit_EC
        return self._cross[1]

    def cross_predict(self, *, folds: int = 5, seed: int = 0) -> np.ndarray:
        """Calibrated distribution ``[E, C]`` of each example, predicted without the examples of its fold (stratified by category)."""
        self._checked()
        return softmax(self._cross_logits(folds, seed), self.temperature)

    def abstain(self, target_rate: float, inputs: Sequence[str] | np.ndarray | None = None, *, folds: int = 5) -> Self:
        """Set ``min_confidence`` so that this share of prompts goes to the general category.

        Args:
            target_rate: 0 to below 1; 0 turns abstention off.
            inputs: prompts to set it on; the examples, predicted without their fold, if left out.
            folds: of those.
        """
        if not 0 <= target_rate < 1:
            raise InputError(f"target_rate is {target_rate}; it must be a share from 0 to below 1")
        if target_rate == 0:
            self.min_confidence = -np.inf
            return self
        if inputs is None:
            confidence_N = self._confidence(self.cross_predict(folds=folds, seed=self.seed), self._example_ED, own=True)
        else:
            vector_ND = self.vectors(inputs)
            confidence_N = self._confidence(self.distribution(vector_ND), vector_ND)
        self.min_confidence = float(np.quantile(confidence_N, target_rate))
        return self

    # Deciding

    def predict(self, inputs: Sequence[str] | np.ndarray) -> Categories:
        """Categories of texts or vectors. An empty text (a vector of zeros) is of the general category, with confidence 0.

        Raises InputError if it has not learned yet, or a vector has another width or is not finite.
        """
        found = self.classify(self.vectors(inputs))
        category = tuple(
            self.general if abstained else self.categories[best]
            for best, abstained in zip(
                found.distribution_NC.argmax(axis=1).tolist(), found.abstained_N.tolist(), strict=True
            )
        )
        return found._replace(category=category)

    def classify(self, vector_ND: np.ndarray, min_confidence: float | None = None) -> Categories:
        """`predict` of checked vectors, without the names; ``min_confidence`` takes the place of the router's own."""
        distribution_NC = self.distribution(vector_ND)
        confidence_N = self._confidence(distribution_NC, vector_ND)
        empty_N = ~vector_ND.any(axis=1)
        confidence_N[empty_N] = 0.0
        least = self.min_confidence if min_confidence is None else min_confidence
        return Categories((), confidence_N, distribution_NC, (confidence_N < least) | empty_N)

    def distribution(self, vector_ND: np.ndarray) -> np.ndarray:
        """Calibrated probabilities ``[N, C]``."""
        self._checked()
        if vector_ND.shape[1] != self._example_ED.shape[1]:
            raise InputError(
                f"vectors have {vector_ND.shape[1]} dimensions; those it learned from have {self._example_ED.shape[1]}"
            )
        return softmax(self._head.logits(vector_ND), self.temperature)

    def _confidence(self, distribution_NC: np.ndarray, vector_ND: np.ndarray, *, own: bool = False) -> np.ndarray:
        """``own``: the vectors are the examples themselves, so the nearest is left out."""
        if self.uncertainty == "probability":
            return distribution_NC.max(axis=1)
        if self.uncertainty == "entropy":
            if distribution_NC.shape[1] == 1:
                return np.ones(len(distribution_NC))
            entropy_N = -(distribution_NC * np.log(np.maximum(distribution_NC, 1e-300))).sum(axis=1)
            return 1 - entropy_N / np.log(distribution_NC.shape[1])
        similarity_NE = vector_ND @ self._example_ED.T
        if own:
            np.fill_diagonal(similarity_NE, -np.inf)
        near_NK = nearest(similarity_NE, min(self.k, similarity_NE.shape[1] - own))[1]
        return near_NK.mean(axis=1, dtype=np.float64)

    # Judging

    def report(
        self, inputs: Sequence[str] | np.ndarray | None = None, labels: Sequence[str] | None = None, *, folds: int = 5
    ) -> CategoryReport:
        """Precision, recall and calibration on labelled prompts; on the examples, predicted without their fold, if none are given.

        Raises InputError for a label that was not learned.
        """
        if inputs is None or labels is None:
            distribution_NC, class_N = self.cross_predict(folds=folds, seed=self.seed), self._class_E
            confidence_N = self._confidence(distribution_NC, self._example_ED, own=True)
        else:
            vector_ND = self.vectors(inputs)
            unknown = [label for label in labels if label not in self.categories]
            if unknown:
                raise InputError(f"no category {unknown[0]!r} was learned; known: {', '.join(self.categories)}")
            distribution_NC = self.distribution(vector_ND)
            class_N = np.array([self.categories.index(label) for label in labels], np.int64)
            confidence_N = self._confidence(distribution_NC, vector_ND)
        return report_of(self.categories, distribution_NC, class_N, float((confidence_N < self.min_confidence).mean()))

    # Inputs and storage

    def vectors(self, inputs: Sequence[str] | np.ndarray) -> np.ndarray:
        """float32 ``[N, D]`` of texts or vectors. Raises InputError for texts without an embedder and for vectors that do not fit."""
        if not isinstance(inputs, np.ndarray):
            texts = list(inputs)
            if all(isinstance(text, str) for text in texts):
                if self.embedder is None:
                    raise InputError("texts need an embedder: CategoryRouter(embedder=...), or give vectors")
                inputs = unit_vectors(self.embedder, texts)
            else:
                inputs = np.asarray(texts)
        vector_ND = np.asarray(inputs, np.float32)
        if vector_ND.ndim != 2 or vector_ND.shape[1] == 0:
            raise InputError(f"vectors have shape {list(vector_ND.shape)}; they must be [rows, dimensions]")
        if len(self._example_ED) and vector_ND.shape[1] != self._example_ED.shape[1]:
            raise InputError(
                f"vectors have {vector_ND.shape[1]} dimensions; those it learned from have {self._example_ED.shape[1]}"
            )
        if not np.isfinite(vector_ND).all():
            row = int(np.argmin(np.isfinite(vector_ND).all(axis=1)))
            raise InputError(f"vector {row} has a number that is not finite")
        return vector_ND

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What it learned: arrays, and facts ready for JSON."""
        arrays = {f"head.{name}": value for name, value in self._head.state().items()}
        # Of "knn": the examples again.
        shared = {"head.example_ED", "head.target_EC"}
        arrays = {name: value for name, value in arrays.items() if name not in shared}
        facts = {
            "categories": list(self.categories),
            "temperature": self.temperature,
            "min_confidence": None if np.isinf(self.min_confidence) else self.min_confidence,
        }
        return {**arrays, "example_ED": self._example_ED, "class_E": self._class_E}, facts

    def load_state(self, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.categories, self.temperature = tuple(facts["categories"]), facts["temperature"]
        self.min_confidence = -np.inf if facts["min_confidence"] is None else facts["min_confidence"]
        self._example_ED, self._class_E, self._cross = arrays["example_ED"], arrays["class_E"], None
        self._head = self._new_head()
        if self.head == "knn":
            self._head.fit(self._example_ED, self._targets(self._class_E))
        else:
            self._head.load_state({name.removeprefix("head."): value for name, value in arrays.items()})

    def _checked(self) -> None:
        if not self.categories:
            raise InputError("the category router has not learned yet: call fit first")


def label_by_neighbours(
    vector_ND: np.ndarray, labels: Sequence[str | None], *, neighbours: int = 5, min_share: float = 0.8
) -> list[str | None]:
    """Labels with unknown ones filled in from the nearest known, where those agree; None stays where they do not.

    Args:
        vector_ND: unit vectors.
        labels: None where unknown.
        neighbours: of each row, among the labelled; at most as many as the rarest category has, so that it can win.
        min_share: of similarity that one category must have among them (negative similarities count nothing).
    """
    known = np.array([row for row, label in enumerate(labels) if label is not None], np.int64)
    unknown = np.array([row for row, label in enumerate(labels) if label is None], np.int64)
    if not len(known):
        raise InputError("no row has a category; label at least one example of each")
    counts = Counter(label for label in labels if label is not None)
    names = sorted(counts)
    class_E = np.array([names.index(str(labels[row])) for row in known])
    near_NK, similarity_NK = nearest(vector_ND[unknown] @ vector_ND[known].T, min(neighbours, min(counts.values())))
    weight_NK = np.maximum(similarity_NK, 0.0)
    vote_NC = np.zeros((len(unknown), len(names)))
    np.add.at(vote_NC, (np.arange(len(unknown))[:, None], class_E[near_NK]), weight_NK)
    total_N = vote_NC.sum(axis=1)
    sure_N = (total_N > 0) & (vote_NC.max(axis=1) >= min_share * total_N)
    filled = list(labels)
    for row, best, sure in zip(unknown, vote_NC.argmax(axis=1), sure_N, strict=True):
        filled[row] = names[best] if sure else None
    return filled


def stratified_folds(class_N: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold of each row: every class spread evenly, in an order drawn by ``seed``."""
    if folds < 2:
        raise InputError(f"folds is {folds}; cross-fitting needs at least 2")
    order = np.random.default_rng(seed).permutation(len(class_N))
    order = order[np.argsort(class_N[order], kind="stable")]
    fold_N = np.empty(len(class_N), np.int64)
    fold_N[order] = np.arange(len(class_N)) % folds
    return fold_N
