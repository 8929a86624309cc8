"""Judged answers as MT-Bench keeps them (Zheng et al. 2023, arXiv 2306.05685): questions, and grades of models or verdicts on pairs.

    question.jsonl             {"question_id": 81, "category": "writing", "turns": ["Compose ...", "Rewrite ..."]}
    model_judgment/*.jsonl     {"question_id": 81, "model": "a", "score": 9, "turn": 1}                      grades, 1 to 10
                           or  {"question_id": 81, "model_1": "a", "model_2": "b", "g1_winner": "model_1", "g2_winner": "tie"}
                           or  {"question_id": 81, "model_a": "a", "model_b": "b", "winner": "model_a"}      people's
    model_answer/*.jsonl       {"question_id": 81, "model_id": "a", "choices": [{"turns": ["...", "..."]}]}  where they are there

A question is its first turn, its category the task. A grade counts a tenth of itself; a pair that a model judged what it comes to in both
orders of the answers (`both_orders`), and nothing where one of them is not there; people's verdicts count as they are. The score of
a model is the mean over turns and, of pairs, over the models that it was compared with on the question.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anabranch.errors import DataError
from anabranch.routers.both_orders import LOSS, TIE, WIN, of_both_orders
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model
from anabranch.routers.data.table import Row, gather
from anabranch.routers.score_scale import unit_score
from anabranch.text_lines import read_lines

QUESTIONS = "question.jsonl"
FOLDERS = (".", "model_judgment", "model_judgement")
MOST_GRADE = 10.0

# Question, model and score of one judgement.
Judged = tuple[str, str, float]


def is_judged(path: Path) -> bool:
    """Whether a file holds such judgements, by its first line; so does a folder with questions."""
    if path.is_dir():
        return (path / QUESTIONS).is_file()
    try:
        first = next((json.loads(text) for _, text in read_lines(path) if text.strip()), None)
    except (ValueError, RecursionError, DataError):
        # Whoever reads it says what is wrong.
        return False
    return isinstance(first, dict) and "question_id" in first and "query" not in first and "turns" not in first


def load_judgements(path: str | Path, *, prices: Mapping[str, Model] | None = None) -> Recorded:
    """Outcomes of a folder of MT-Bench, or of one of its files of judgements, whose questions lie beside or above it.

    Args:
        path: of the folder, which holds one file of judgements, or of the file.
        prices: of models, for costs by their usual lengths; None leaves costs unknown.

    Raises DataError that names file and line.
    """
    path = Path(path)
    file = _file_of(path) if path.is_dir() else path
    place = next((one for one in (file.parent, file.parent.parent) if (one / QUESTIONS).is_file()), None)
    if place is None:
        raise DataError(f"{file} holds judgements, and there is no {QUESTIONS} beside or above it with what was asked")
    questions = _questions(place / QUESTIONS)
    scores: dict[str, dict[str, list[float]]] = {}
    for number, row in _rows(file):
        for id, model, score in _judged(row, file, number):
            if id not in questions:
                raise DataError(f"{file}, line {number} judges question {id}, which is not in {place / QUESTIONS}")
            scores.setdefault(id, {}).setdefault(model, []).append(score)
    if not scores:
        raise DataError(f"{file} holds no judgement that counts")
    answers = _answers(place / "model_answer")
    rows = [
        Row(
            text,
            category,
            {"score": {model: sum(all) / len(all) for model, all in scores[id].items()}},
            answers={model: answers[id, model] for model in scores[id] if (id, model) in answers},
        )
        for id, (text, category) in questions.items()
        if id in scores
    ]
    return gather(rows, file, prices)


def _file_of(folder: Path) -> Path:
    """The only file of judgements of a folder."""
    found = sorted(
        path
        for name in FOLDERS
        for path in (folder / name).glob("*.jsonl")
        if path.name != QUESTIONS and is_judged(path)
    )
    if len(found) != 1:
        many = (
            f"{len(found)}: {', '.join(str(path.relative_to(folder)) for path in found)}; name one of them"
            if found
            else "none"
        )
        raise DataError(f"{folder} must hold one file of judgements beside {QUESTIONS}; there is {many}")
    return found[0]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of the lines that are not empty, with their numbers."""
    for number, text in read_lines(path):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("question_id"), int | str):
            raise DataError(f"{path}, line {number} must be an object with a question_id")
        yield number, row


def _questions(path: Path) -> dict[str, tuple[str, str | None]]:
    """First turn and category, by id."""
    found: dict[str, tuple[str, str | None]] = {}
    for number, row in _rows(path):
        turns, category = row.get("turns"), row.get("category")
        text = turns[0] if isinstance(turns, list) and turns else None
        if not isinstance(text, str) or not text.strip() or not isinstance(category, str | None):
            raise DataError(
                f"{path}, line {number} must have turns, the first a text that is not empty, and a category that is a name"
            )
        found[str(row["question_id"])] = (text, category)
    return found


def _judged(row: dict[str, Any], path: Path, number: int) -> list[Judged]:
    """What a line comes to; nothing where the judge could not be read."""
    id = str(row["question_id"])
    if "score" in row:
        model, score = row.get("model"), row["score"]
        if not isinstance(model, str) or isinstance(score, bool) or not isinstance(score, int | float):
            raise DataError(f"{path}, line {number} must have a model and a score that is a number")
        # -1 where no grade was found in what the judge wrote. An integer may be too long to be divided.
        worth = unit_score(score / MOST_GRADE) if -MOST_GRADE <= score <= 2 * MOST_GRADE else None
        return [] if worth is None else [(id, model, worth)]
    names = [row.get(name, row.get(other)) for name, other in (("model_1", "model_a"), ("model_2", "model_b"))]
    if not all(isinstance(name, str) for name in names) or names[0] == names[1]:
        raise DataError(f"{path}, line {number} must have a score, or two models and who won")
    if "g1_winner" in row or "g2_winner" in row:
        # The second game is the same pair in the other order; whoever wins is named as in the first.
        first = of_both_orders(_worth(row.get("g1_winner")), _worth(row.get("g2_winner")))
    else:
        first = _worth(row.get("winner"))
    return [] if first is None else [(id, str(names[0]), first), (id, str(names[1]), 1 - first)]


def _worth(verdict: Any) -> float | None:
    """Of the first model; None for what is no verdict."""
    if verdict in ("model_1", "model_a"):
        return WIN
    if verdict in ("model_2", "model_b"):
        return LOSS
    return TIE if isinstance(verdict, str) and verdict.startswith("tie") else None


def _answers(folder: Path) -> dict[tuple[str, str], str]:
    """First turns of answers, by question and model; what is not there in that form is left out."""
    found: dict[tuple[str, str], str] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for _, row in _rows(path):
            match row:
                case {"model_id": str(model), "choices": [{"turns": [str(text), *_]}, *_]}:
                    found[str(row["question_id"]), model] = text
    return found
