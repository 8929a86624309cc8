"""Rows of tasks measured on a model, with an adapter or without: how likely the answers are, and how good those are that it gives.

    scores = measure_rows(model, tokenizer, read_rows("rows.jsonl"), max_new_tokens=32)
    scores.all.rouge_l, scores.by_task["sql"].exact

Answers are chosen greedily. ROUGE-L is the F-measure of the longest common subsequence of words (Lin 2004, "ROUGE: A Package for Automatic
Evaluation of Summaries"), in lower case, without stems, against the best of a row's answers; Super-NaturalInstructions is measured by it.
"""
# Shapes: B rows of a pass, L positions, M tokens of answers

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from anabranch.adapters.adapt.answers import IGNORED, Answers, batch_of
from anabranch.adapters.adapt.prompts import asked_ids
from anabranch.adapters.adapt.rows import Row, encoded
from anabranch.data import Tokenizer
from anabranch.errors import ConfigError, DataError
from anabranch.lm.decoder import Decoder
from anabranch.lm.generate import SamplingConfig, evaluating, generate

__all__ = ["Score", "Scores", "is_exact", "measure_rows", "rouge_l"]

_WORD = re.compile(r"[a-z0-9]+")
_NUMBERS = re.compile(r"\w+")


@dataclass(frozen=True)
class Score:
    """Of some rows.

    Attributes:
        rows: how many.
        tokens: of their answers.
        nats_per_token: mean of -log p of the answers' tokens.
        rouge_l: mean over rows, 0 to 1; None where no answers were asked for.
        exact: share of rows whose answer is one of the row's, but for case, punctuation and space.
    """

    rows: int
    tokens: int
    nats_per_token: float
    rouge_l: float | None = None
    exact: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without what was not measured."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Scores:
    """Of all rows, and of those of each task; rows without a task are in ``all`` alone."""

    all: Score
    by_task: dict[str, Score]


def measure_rows(
    model: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    template: str = "{prompt}\n",
    most_tokens: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    telling: Callable[[Sequence[Row]], AbstractContextManager[Any]] = lambda rows: nullcontext(),
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Measure ``model`` on ``rows``.

    Args:
        model: with whatever adapter.
        tokenizer: of it.
        rows: what is asked and answered.
        template: what is written around a prompt, as in training.
        most_tokens: of a row; None for the model's positions.
        max_new_tokens: of an answer that it gives; None asks for none.
        batch_size: rows of a pass.
        telling: a block in which the model's passes know of these rows: their tasks (`on_tasks`), or what they ask a pool
            (`GliderPool.answering`).
        on_rows: called with the rows that are done, and all.

    Raises DataError for no rows, ConfigError for a ``most_tokens`` that leaves no room.
    """
    if not rows:
        raise DataError("there are no rows to measure")
    most = min(most_tokens or model.config.max_positions, model.config.max_positions)
    if most < 2 or (max_new_tokens is not None and max_new_tokens >= most):
        raise ConfigError(
            f"rows may have {most} tokens, and answers {max_new_tokens}: nothing could be asked; allow more, or shorter answers"
        )
    data = encoded(rows, [0] * len(rows), tokenizer, template, most)
    nats, counts = [0.0] * len(rows), [0] * len(rows)
    said: list[str | None] = [None] * len(rows)
    done = 0
    with evaluating(model):
        for row_B in data.length_N.argsort(stable=True).split(batch_size):
            on_rows(done, len(rows))
            some = [rows[number] for number in row_B.tolist()]
            with telling(some):
                _likelihoods(model, tuple(tensor[row_B] for tensor in data.tensors), row_B.tolist(), nats, counts)
                if max_new_tokens is not None:
                    texts = _answers(model, tokenizer, some, template, most, max_new_tokens)
                    for number, text in zip(row_B.tolist(), texts, strict=True):
                        said[number] = text
            done += len(some)
    numbers = {
        name: [place for place, row in enumerate(rows) if row.task == name] for name in sorted({r.task for r in rows})
    }
    scored = {name: _score(rows, places, nats, counts, said) for name, places in numbers.items() if name}
    return Scores(_score(rows, list(range(len(rows))), nats, counts, said), scored)


@torch.no_grad()
def _likelihoods(
    model: Decoder, data: tuple[Any, ...], places: list[int], nats: list[float], counts: list[int]
) -> None:
    device = model.embedding.weight.device
    given = batch_of(*(tensor.to(device) for tensor in data))
    del given["task_B"]
    nats_M, *_ = Answers(model)(**given)
    row_M = (given["target_BL"] != IGNORED).nonzero()[:, 0]
    for row, value in zip(row_M.tolist(), nats_M.tolist(), strict=True):
        nats[places[row]] += value
        counts[places[row]] += 1


def _answers(
    model: Decoder, tokenizer: Tokenizer, rows: Sequence[Row], template: str, most: int, max_new_tokens: int
) -> list[str]:
    prompts = []
    for row in rows:
        ids = asked_ids(tokenizer, row.prompt, template)[-(most - max_new_tokens) :]
        # A pass needs a token.
        prompts.append(ids or [0 if tokenizer.eos_id is None else tokenizer.eos_id])
    stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    made = generate(model, prompts, SamplingConfig(max_tokens=max_new_tokens, temperature=0.0, stop=stop))
    return [tokenizer.decode(ids) for ids in made]


def _score(
    rows: Sequence[Row], places: Sequence[int], nats: Sequence[float], counts: Sequence[int], said: Sequence[str | None]
) -> Score:
    tokens = sum(counts[place] for place in places)
    mean = math.fsum(nats[place] for place in places) / max(tokens, 1)
    answered = [
        (text, (rows[place].answer, *rows[place].others)) for place in places if (text := said[place]) is not None
    ]
    if not answered:
        return Score(len(places), tokens, mean)
    overlap = math.fsum(max(rouge_l(text, one) for one in wanted) for text, wanted in answered)
    exact = sum(is_exact(text, wanted) for text, wanted in answered)
    return Score(len(places), tokens, mean, overlap / len(answered), exact / len(answered))


def rouge_l(text: str, wanted: str) -> float:
    """F-measure of the longest common subsequence of words, 0 to 1; 1 where both have none."""
    one, other = _WORD.findall(text.lower()), _WORD.findall(wanted.lower())
    if not one or not other:
        return float(one == other)
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, with_word in enumerate(other, start=1):
            kept = row[place]
            row[place] = before + 1 if word == with_word else max(kept, row[place - 1])
            before = kept
    return 2 * row[-1] / (len(one) + len(other))


def is_exact(text: str, wanted: Sequence[str]) -> bool:
    """Whether ``text`` is one of ``wanted``, but for case, punctuation and space."""
    return _plain(text) in map(_plain, wanted)


def _plain(text: str) -> str:
    # What has no letters at all, a smile or an equation's sign, is what it is.
    return " ".join(_NUMBERS.findall(text.lower())) or " ".join(text.split())
