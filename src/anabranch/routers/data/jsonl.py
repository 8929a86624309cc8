"""Recorded outcomes as JSON lines.

    {"query": "...", "task": "maths", "scores": {"small": 0, "large": 1}, "cost": {"small": 0.0001, "large": 0.002}}

A model that answered a question several times has a list of scores, ``{"small": [0, 1, 1]}``, of which the mean is its score; where one
model is all there is, ``samples`` is that list (and ``model`` its name, which is ``model`` otherwise), and ``question`` is ``query``:

    {"question": "...", "samples": [false, true, true]}

``cost`` is in dollars, of one answer. ``tokens`` ({model: [prompt, completion]}), ``latency`` ({model: seconds}), ``answers``
({model: text}, or a list of texts, one for each of several scores; a list alone beside ``samples``) and ``signals`` ({"logprob":
{model: number}}, see `Recorded`) may be there too, and in a log of traffic ``probability`` ({model: number}), the chance with which the
model that answered was chosen. Other fields are not looked at, and named as left out (`Reading`). A model that is left out of a row, or
null, was not asked.

With ``messages`` the query is the last text of a conversation, as strategies see it. What was said before decides the answers too, so
such a row never stands beside, or in the place of, one of the query alone: where a file has both, it is left out.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from anabranch.bounds import shown_json
from anabranch.errors import DataError
from anabranch.routers.contract.dataset import Reading, Recorded
from anabranch.routers.contract.query import Model
from anabranch.routers.data.splits import question
from anabranch.routers.data.table import Row, gather, number
from anabranch.text_lines import read_lines


def load_jsonl(path: str | Path, *, prices: Mapping[str, Model] | None = None) -> Recorded:
    """Outcomes from a file, plain or gzipped.

    Args:
        path: of the file.
        prices: models with prices (`read_prices`), for costs where the rows hold none.

    Raises DataError that names file and line.
    """
    path = Path(path)
    rows = []
    for line, text in read_lines(path):
        if not text.strip():
            continue
        try:
            rows.append(replace(row_of(text), line=line))
        except DataError as error:
            raise DataError(f"{path}, line {line}: {error}") from None
    unread = list(dict.fromkeys(name for row in rows for name in row.unread))
    alone = {question(row.query) for row in rows if not row.is_conversation}
    rows = [row for row in rows if not row.is_conversation or question(row.query) not in alone]
    left = {name: _why_unread(name) for name in unread}
    return replace(gather(rows, path, prices), reading=Reading(left_out=left))


def _why_unread(name: str) -> str:
    if name in KNOWN:
        return "another field of the row says it"
    near = get_close_matches(name.lower(), KNOWN, n=1, cutoff=0.8)
    return f"not a field of outcomes; did you mean {near[0]!r}?" if near else "not a field of outcomes"


def row_of(text: str) -> Row:
    """One line of such a file. Raises DataError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError("a row must be an object with query and scores")
    query, task = found.get("query", found.get("question")), found.get("task")
    if not isinstance(query, str) or not query.strip():
        raise DataError(f"query is {shown_json(query)}; it must be a text that is not empty")
    if any("\ud800" <= letter <= "\udfff" for letter in query):
        raise DataError("query holds half of a surrogate pair, which is no character; write the whole pair")
    if task is not None and not isinstance(task, str):
        raise DataError(f"task is {shown_json(task)}; it must be a name")
    unread = tuple(_unread(found))
    found, samples = _split(found)
    values = {part: _numbers(found, field, low) for part, field, low in _FIELDS if field in found}
    if not any(score is not None for score in values.get("score", {}).values()):
        raise DataError("scores are missing; write them as {model: number}")
    signals = {name: _numbers(_table(found, "signals"), name, -float("inf")) for name in _table(found, "signals")}
    if "probability" in found:
        signals["probability"] = _numbers(found, "probability", 0.0)
    messages = found.get("messages")
    is_conversation = messages is not None and messages != [{"role": "user", "content": query}]
    answers, texts = _answers(found, samples)
    return Row(query, task, values | _tokens(found), answers, signals, samples, texts, is_conversation, unread=unread)


def _unread(found: dict[str, Any]) -> Iterator[str]:
    """Fields that mean nothing, be it because of others."""
    idle = {name for name, other in (("question", "query"), ("model", "scores")) if other in found}
    return (name for name in found if (name not in KNOWN or name in idle) and name not in BESIDE)


def _split(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[float, ...]]]:
    """The row with one score of each model, and the scores of single answers where there are several."""
    if "samples" in found:
        if "scores" in found:
            raise DataError(
                "scores and samples are both there; samples are of one model, scores of several: leave one out"
            )
        name = found.get("model", ONE)
        if not isinstance(name, str) or not name:
            raise DataError(f"model is {shown_json(name)}; it must be the name of the model whose samples these are")
        if not isinstance(found["samples"], list):
            raise DataError(f"samples are {shown_json(found['samples'])}; they must be a list, such as [true, false]")
        found = {**found, "scores": {name: found["samples"]}}
        if isinstance(found.get("answers"), list):
            found = {**found, "answers": {name: found["answers"]}}
    scores = found.get("scores")
    if not isinstance(scores, dict) or not any(isinstance(of, list) for of in scores.values()):
        return found, {}
    several = {name: _samples(name, of) for name, of in scores.items() if isinstance(of, list)}
    means = {name: sum(of) / len(of) if of else None for name, of in several.items()}
    return {**found, "scores": {**scores, **means}}, {name: of for name, of in several.items() if of}


def _samples(name: str, scores: list[Any]) -> tuple[float, ...]:
    if len(scores) > MOST_SAMPLES:
        raise DataError(
            f"there are {len(scores):,} samples of {name!r}; at most {MOST_SAMPLES:,} of a question are read"
        )
    read = [number(score, f"sample {place} of {name!r}", is_known=True) for place, score in enumerate(scores, start=1)]
    return tuple(score for score in read if score is not None)


# What a model is called of which nobody says the name, and samples of a question that are read.
ONE, MOST_SAMPLES = "model", 10_000

KNOWN = (
    "query",
    "question",
    "task",
    "scores",
    "samples",
    "model",
    "cost",
    "tokens",
    "latency",
    "answers",
    "signals",
    "probability",
    "messages",
)
# What ``gateway collect`` writes beside outcomes, for its own next run.
BESIDE = frozenset({"judge", "request_id"})


_FIELDS = (("score", "scores", -float("inf")), ("cost", "cost", 0.0), ("latency", "latency", 0.0))


def _table(found: dict[str, Any], field: str) -> dict[str, Any]:
    value = found.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict) or "" in value:
        raise DataError(f"{field} is {shown_json(value)}; it must be a table by name")
    return value


def _numbers(found: dict[str, Any], field: str, low: float) -> dict[str, float | None]:
    return {name: number(value, f"{field} of {name!r}", low=low) for name, value in _table(found, field).items()}


def _tokens(found: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    values: dict[str, dict[str, float | None]] = {"prompt": {}, "completion": {}}
    for name, pair in _table(found, "tokens").items():
        if isinstance(pair, dict):
            pair = [
                pair.get("prompt", pair.get("prompt_tokens")),
                pair.get("completion", pair.get("completion_tokens")),
            ]
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"tokens of {name!r} are {shown_json(pair)}; they must be [prompt, completion]")
        for part, value in zip(values, pair, strict=True):
            values[part][name] = number(value, f"{part} tokens of {name!r}", low=0)
    return {part: of_model for part, of_model in values.items() if of_model}


def _answers(
    found: dict[str, Any], samples: dict[str, tuple[float, ...]]
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Texts of models that answered once, and of the single answers of those that did several times."""
    once: dict[str, str] = {}
    several: dict[str, tuple[str, ...]] = {}
    for name, said in _table(found, "answers").items():
        if isinstance(said, list) and name in samples:
            if len(said) != len(samples[name]) or not all(isinstance(text, str) for text in said):
                raise DataError(
                    f"answers of {name!r} are {shown_json(said)}; they must be {len(samples[name]):,} texts, one for each sample"
                )
            several[name] = tuple(said)
        elif isinstance(said, str):
            once[name] = said
        else:
            raise DataError(f"answer of {name!r} is {shown_json(said)}; it must be a text, or a text for each sample")
    return once, several
