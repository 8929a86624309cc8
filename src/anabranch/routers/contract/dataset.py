"""Recorded outcomes: queries, and for each model what its answer was worth and cost. What routers learn from and are judged on."""
# Shapes: N queries, M models, D dimensions of a vector

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.routers.contract.query import Query


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a file of outcomes was read, so that nobody has to guess it.

    Attributes:
        query, task: columns of a table; None where the file has none.
        columns: of a table, by part (score, cost, prompt, completion, latency, answer) the column of each model.
        left_out: columns, or fields of rows, that were not read, and why.
    """

    query: str | None = None
    task: str | None = None
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Outcomes of every query on every model, as far as they are known.

    Attributes:
        query: texts.
        models: names.
        score_NM: float64, quality; NaN where a model was not asked.
        cost_NM: float64, dollars of the call; NaN where unknown; None if no cost is known at all.
        task: of each query; None where there is none.
        tokens_NM2: float64, prompt and completion tokens; None if not recorded.
        latency_NM: float64, seconds; None if not recorded.
        answers: of each query, model to answer; empty if not recorded.
        samples: of each query, model to the scores of its single answers, in their order, whose mean is the score; empty if every model
            was asked once.
        texts: of each query, model to the texts of those single answers, as many as ``samples``; empty if not recorded.
        vector_ND: float32 unit vectors of the texts; None until embedded.
        signals: float64 ``[N, M]`` by name: what is known of an answer beside its score, NaN where it is not: ``logprob`` (mean of its
            tokens), ``entropy``, ``votes`` (share of self-verifications for it), ``agreement`` (share of samples that say the same).
        line: of each query, the line of its file that it stands in first, from 1; empty where there is none.
        reading: how they were read from a file.
    """

    query: tuple[str, ...]
    models: tuple[str, ...]
    score_NM: np.ndarray
    cost_NM: np.ndarray | None = None
    task: tuple[str | None, ...] = ()
    tokens_NM2: np.ndarray | None = None
    latency_NM: np.ndarray | None = None
    answers: tuple[Mapping[str, str], ...] = ()
    samples: tuple[Mapping[str, tuple[float, ...]], ...] = ()
    texts: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    vector_ND: np.ndarray | None = None
    signals: Mapping[str, np.ndarray] = field(default_factory=dict)
    line: tuple[int, ...] = ()
    reading: Reading = field(default_factory=Reading)

    def __post_init__(self) -> None:
        shape = (len(self.query), len(self.models))
        if not self.models or len(set(self.models)) < len(self.models):
            raise DataError(f"recorded outcomes need models with different names; got {list(self.models)}")
        if not self.task:
            object.__setattr__(self, "task", (None,) * len(self.query))
        lengths = {
            "task": self.task,
            "answers": self.answers or self.query,
            "samples": self.samples or self.query,
            "texts": self.texts or self.query,
            "line": self.line or self.query,
            "vector_ND": self.query if self.vector_ND is None else self.vector_ND,
        }
        for name, value in lengths.items():
            if len(value) != len(self.query):
                raise DataError(f"{name} has {len(value)} rows; there are {len(self.query)} queries")
        for name in ("score_NM", "cost_NM", "tokens_NM2", "latency_NM"):
            value = getattr(self, name)
            if value is not None and value.shape[:2] != shape:
                raise DataError(
                    f"{name} has shape {list(value.shape)}; it must begin with {list(shape)} (queries, models)"
                )
        for name, value in self.signals.items():
            if value.shape != shape:
                raise DataError(
                    f"signal {name!r} has shape {list(value.shape)}; it must be {list(shape)} (queries, models)"
                )
        if np.isinf(self.score_NM).any() or (
            self.cost_NM is not None and (np.isinf(self.cost_NM).any() or (self.cost_NM < 0).any())
        ):
            raise DataError("scores must be finite and costs neither negative nor infinite (NaN where unknown)")

    def __len__(self) -> int:
        return len(self.query)

    def take(self, rows: np.ndarray | Sequence[int]) -> Self:
        """These rows, in this order."""
        at = np.asarray(rows, np.int64)
        part: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[at]
            for name in ("cost_NM", "tokens_NM2", "latency_NM", "vector_ND")
        }
        return replace(
            self,
            query=tuple(self.query[row] for row in at),
            task=tuple(self.task[row] for row in at),
            score_NM=self.score_NM[at],
            answers=tuple(self.answers[row] for row in at) if self.answers else (),
            samples=tuple(self.samples[row] for row in at) if self.samples else (),
            texts=tuple(self.texts[row] for row in at) if self.texts else (),
            line=tuple(self.line[row] for row in at) if self.line else (),
            signals={name: value[at] for name, value in self.signals.items()},
            **part,
        )

    def only(self, models: Sequence[str]) -> Self:
        """These models, in this order. Raises InputError for one that is not there."""
        unknown = [name for name in models if name not in self.models]
        if unknown:
            raise InputError(f"no model {unknown[0]!r} in the recorded outcomes; known: {', '.join(self.models)}")
        at = [self.models.index(name) for name in models]
        part: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[:, at]
            for name in ("cost_NM", "tokens_NM2", "latency_NM")
        }
        signals = {name: value[:, at] for name, value in self.signals.items()}
        return replace(self, models=tuple(models), score_NM=self.score_NM[:, at], signals=signals, **part)

    def samples_of(self, row: int, column: int) -> tuple[float, ...]:
        """Scores of a model's single answers to a query; none where it was not asked."""
        known = self.samples[row].get(self.models[column]) if self.samples else None
        if known is not None:
            return known
        score = float(self.score_NM[row, column])
        return () if np.isnan(score) else (score,)

    def texts_of(self, row: int, column: int) -> tuple[str, ...]:
        """Texts of a model's single answers to a query, one for each of `samples_of`; none where one of them is not known."""
        name, count = self.models[column], len(self.samples_of(row, column))
        known = self.texts[row].get(name, ()) if self.texts else ()
        if not known and self.answers and name in self.answers[row]:
            known = (self.answers[row][name],)
        return known if len(known) == count else ()

    def with_vectors(self, vector_ND: np.ndarray) -> Self:
        """The same with vectors of the texts."""
        return replace(self, vector_ND=np.ascontiguousarray(vector_ND, np.float32))

    def what_was_read(self) -> dict[str, Any]:
        """For a report: ``models``; ``costs``, those of them with any cost; ``columns`` of a table; ``left_out``."""
        costs = [] if self.cost_NM is None else np.isfinite(self.cost_NM).any(0).tolist()
        columns = {part: dict(of) for part, of in self.reading.columns.items() if of}
        named = {"query": self.reading.query, "task": self.reading.task}
        return {
            "models": list(self.models),
            "costs": [name for name, known in zip(self.models, costs, strict=False) if known],
            "columns": {**named, **columns} if columns else None,
            "left_out": dict(self.reading.left_out),
        }

    def queries(self) -> Iterator[Query]:
        """Each row as a strategy sees it."""
        copies: dict[str, int] = {}
        for row, text in enumerate(self.query):
            copy = copies[text] = copies.get(text, -1) + 1
            known = (
                [] if self.tokens_NM2 is None else self.tokens_NM2[row, :, 0][np.isfinite(self.tokens_NM2[row, :, 0])]
            )
            yield Query(
                text=text,
                task=self.task[row],
                prompt_tokens=round(float(np.mean(known))) if len(known) else None,
                vector_D=None if self.vector_ND is None else self.vector_ND[row],
                answers=self.answers[row] if self.answers else {},
                request_id=str(copy) if copy else "",
            )
