"""Against fooling oneself: duplicates go, copies of a question stay on one side of a split, a test seen in training is refused."""
# Shapes: N queries, G different questions, T those of one task, P parts

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.wording import normal_form

T = TypeVar("T")

HOLD_OUT = (0.8, 0.2)  # train, test


def question(text: str) -> str:
    """What tells a question from others: its `normal_form`, or itself if it is nothing but white space."""
    return normal_form(text) or text


def groups(data: Recorded) -> np.ndarray:
    """int64 ``[N]``: a number for each row, the same for rows that ask the same (`question`), counted by first appearance."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(question(text), len(seen)) for text in data.query], np.int64)


def deduplicated(data: Recorded) -> Recorded:
    """The first row of each question."""
    return data.take(np.sort(np.unique(groups(data), return_index=True)[1]))


def pooled(data: Recorded) -> Recorded:
    """One row of each question, each value the mean over all its copies that know it; texts, tasks and vectors of the first.

    Of a log, in which every copy was answered by one model, that is all that is known of the question. Scores of single answers are put
    one behind another. Probabilities, which are of one answer each, are left out.
    """
    group_N = groups(data)
    first_G = np.unique(group_N, return_index=True)[1]
    found = data.take(first_G)

    def mean(value_NM: np.ndarray | None) -> np.ndarray | None:
        if value_NM is None:
            return None
        known_NM = np.isfinite(value_NM)
        total_GM, count_GM = (np.zeros((len(first_G), *value_NM.shape[1:])) for _ in range(2))
        np.add.at(total_GM, group_N, np.where(known_NM, value_NM, 0.0))
        np.add.at(count_GM, group_N, known_NM)
        return np.where(count_GM > 0, total_GM / np.maximum(count_GM, 1), np.nan)

    answers: list[dict[str, str]] = [{} for _ in first_G]
    for group, of_model in zip(group_N, data.answers, strict=False):
        answers[group] = {**of_model, **answers[group]}
    samples = _joined(data.samples_of, data, group_N, len(first_G))
    # What single answers say is of use where it is known of all of them.
    said = _joined(data.texts_of, data, group_N, len(first_G)) if data.texts or data.answers else ()
    said = tuple(
        {name: texts for name, texts in of.items() if len(texts) == len(own.get(name, ()))}
        for of, own in zip(said, samples, strict=False)
    )
    means_of_signals: Any = {name: mean(of) for name, of in data.signals.items() if name != "probability"}
    means: dict[str, Any] = {
        name: mean(getattr(data, name)) for name in ("score_NM", "cost_NM", "tokens_NM2", "latency_NM")
    }
    if data.samples:
        # The mean of all answers, however many of them stood in one row.
        means["score_NM"] = np.array(
            [[float(np.mean(of[name])) if name in of else np.nan for name in data.models] for of in samples]
        )
    texts = tuple(answers) if data.answers else ()
    return replace(found, answers=texts, samples=samples, texts=said, signals=means_of_signals, **means)


def _joined(
    single: Callable[[int, int], tuple[T, ...]], data: Recorded, group_N: np.ndarray, num_groups: int
) -> tuple[dict[str, tuple[T, ...]], ...]:
    """Single answers of each question, one row's behind another's; nothing where each question stands in one row, once.

    ``single`` gives those of a row and a column.
    """
    if not data.samples and num_groups == len(data):
        return ()
    found: list[dict[str, tuple[T, ...]]] = [{} for _ in range(num_groups)]
    for row, group in enumerate(group_N):
        for column, name in enumerate(data.models):
            own = single(row, column)
            if own:
                found[group][name] = (*found[group].get(name, ()), *own)
    return tuple(found)


def split(data: Recorded, fractions: Sequence[float] = HOLD_OUT, *, seed: int) -> list[Recorded]:
    """Parts of about these sizes, drawn within each task; rows that ask the same stay together.

    Args:
        data: what to split; rows keep their order within a part.
        fractions: of the questions; their sum is 1.
        seed: of the draw.

    Raises InputError for other fractions, or too few questions to fill every part.
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise InputError(f"fractions are {list(fractions)}; they must be above 0 and add up to 1")
    part_N = _drawn(data, np.array(fractions, float), seed)
    parts = [data.take(np.flatnonzero(part_N == part)) for part in range(len(fractions))]
    if not all(map(len, parts)):
        raise InputError(
            f"{len(data)} rows are too few to split into parts of {', '.join(f'{share:.0%}' for share in fractions)}"
        )
    return parts


def folds(data: Recorded, count: int, *, seed: int) -> list[tuple[Recorded, Recorded]]:
    """(train, test) of each fold; every row is tested once. Raises InputError for fewer than 2 folds, or more than there are questions."""
    if count < 2:
        raise InputError(f"folds are {count}; there must be at least 2")
    part_N = _drawn(data, np.full(count, 1 / count), seed)
    if len(np.unique(part_N)) < count:
        raise InputError(f"{len(data)} rows are too few for {count} folds")
    return [
        (data.take(np.flatnonzero(part_N != part)), data.take(np.flatnonzero(part_N == part))) for part in range(count)
    ]


def _drawn(data: Recorded, share_P: np.ndarray, seed: int) -> np.ndarray:
    """The part of each row. Task by task, shuffled questions go where most are still missing, so that small tasks fill parts too."""
    group_N = groups(data)
    first_G = np.unique(group_N, return_index=True)[1]
    tasks = sorted({data.task[row] or "" for row in first_G})
    number = {task: at for at, task in enumerate(tasks)}
    task_G = np.array([number[data.task[row] or ""] for row in first_G])
    generator = np.random.default_rng(seed)
    part_G = np.empty(len(first_G), np.int64)
    missing_P = np.zeros(len(share_P))
    for task in range(len(tasks)):
        member_T = generator.permutation(np.flatnonzero(task_G == task))
        missing_P += share_P * len(member_T)
        taken_P = np.floor(np.maximum(missing_P, 0))
        while taken_P.sum() < len(member_T):
            taken_P[np.argmax(missing_P - taken_P)] += 1
        while taken_P.sum() > len(member_T):
            taken_P[np.argmin(np.where(taken_P > 0, missing_P - taken_P, np.inf))] -= 1
        missing_P -= taken_P
        part_G[member_T] = np.repeat(np.arange(len(share_P)), taken_P.astype(np.int64))
    return part_G[group_N]


def check_disjoint(train: Recorded, test: Recorded) -> None:
    """Raises DataError if they share a question, with how many and the first."""
    known = {question(text) for text in train.query}
    check_unseen(known, test)


def check_unseen(known: set[str], test: Recorded) -> None:
    """Raises DataError if a question of ``test`` is in ``known`` (as `question` gives it)."""
    shared = [text for text in test.query if question(text) in known]
    if shared:
        first = " ".join(shared[0].split())
        raise DataError(
            f"{len(shared):,} of {len(test):,} test questions were learned from, which would flatter every router; the first is "
            f"{first[:60] + '...' if len(first) > 60 else first!r}. Take them out, or "
            "allow the leak on purpose (--allow-leak; in Python allow_leak=True)"
        )
