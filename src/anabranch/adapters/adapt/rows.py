"""Rows of tasks out of JSON lines: what is asked, what is to be answered, and of which task it is.

    {"task": "summaries", "input": "...", "output": "..."}

What is asked may be called ``input``, ``prompt``, ``question`` or ``instruction``, the answer ``output``, ``target``, ``completion`` or
``answer``; a ``definition`` or ``instruction`` beside an input stands before it. Of several answers the first that is not empty is
learned. ``choices`` may list what else could be said, the answer among it or not: what is no answer is a wrong choice, see `choices`. Rows
whose ``split`` is test, validation, dev or eval are held out, others learned; where no row says so, a share of each task is
held out, by what the rows ask, so that it stays so when others are added.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.adapters.adapt.prompts import asked_ids
from anabranch.bounds import shown_json
from anabranch.data import Tokenizer
from anabranch.data.reading import read_bytes
from anabranch.errors import DataError
from anabranch.files import parse_json

__all__ = ["Encoded", "Row", "check_file", "digest_of", "encoded", "parted", "read_rows", "spread_rows"]

_BEFORE = ("definition", "instruction")
_ASKED = ("input", "prompt", "question")
_ANSWERED = ("output", "target", "completion", "answer")
_HELD_OUT = frozenset({"test", "validation", "valid", "val", "dev", "eval"})
# Half of a pair of UTF-16, which JSON can say.
_LONE = re.compile(r"[\ud800-\udfff]")
# Bytes of a line: a row of a book is no row.
_LONGEST = 64 * 2**20


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        task: its name; empty where the row names none.
        prompt: what is asked.
        answer: what is to be said.
        split: as the row says; empty where it says nothing.
        where: its file and line, for messages.
        others: answers that are as good, which are not learned.
        wrong: choices that are no answers.
    """

    task: str
    prompt: str
    answer: str
    split: str = ""
    where: str = field(default="", compare=False)
    others: tuple[str, ...] = field(default=(), compare=False)
    wrong: tuple[str, ...] = ()

    @property
    def is_held_out(self) -> bool:
        """Whether its split says that it is not to be learned."""
        return self.split in _HELD_OUT


def read_rows(path: str | Path, *, needs_task: bool = False) -> list[Row]:
    """The rows of a file of JSON lines, which may be gzip (``.gz``).

    Args:
        path: the file.
        needs_task: whether a row without a task is an error.

    Raises DataError: a file that cannot be read or has no rows, and a line that is no row, with its number.
    """
    place = Path(path)
    check_file(place)
    try:
        text = read_bytes(place).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is no UTF-8 text ({error.reason} at byte {error.start})") from None
    rows = []
    # Not splitlines: JSON may hold other line separators in its strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_row(line, f"{place}, line {number}", needs_task))
    if not rows:
        raise DataError(
            f'{place} holds no rows; each line is to be one, as {{"task": ..., "input": ..., "output": ...}}'
        )
    return rows


def check_file(path: str | Path) -> None:
    """Raise DataError for a folder."""
    if Path(path).is_dir():
        raise DataError(f"{path} is a folder; name a file of JSON lines, one row each")


def _row(line: str, where: str, needs_task: bool) -> Row:
    if len(line) > _LONGEST:
        raise DataError(f"{where}: {len(line):,} characters; a row has at most {_LONGEST:,}")
    try:
        table = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: this is no JSON ({error}); the file is to be JSON lines, one object each") from None
    if not isinstance(table, dict):
        raise DataError(
            f'{where}: {shown_json(table)} is no object; write {{"task": ..., "input": ..., "output": ...}}'
        )
    asked = [_text(table, name, where) for name in _BEFORE] + _first(table, _ASKED, where)
    prompt = "\n\n".join(part for part in asked if part)
    if not prompt:
        raise DataError(f"{where}: nothing is asked; one of {', '.join((*_ASKED, *_BEFORE))} must be a text")
    answers = [found for name in _ANSWERED if (found := _text(table, name, where))]
    if not answers:
        raise DataError(f"{where}: there is no answer; one of {', '.join(_ANSWERED)} must be a text, or a list of them")
    task = _text(table, "task", where)
    if needs_task and not task:
        raise DataError(f"{where}: the row names no task, by which this method routes; give each row a task")
    others = tuple(dict.fromkeys(one for one in _texts_of(table) if one != answers[0]))
    wrong = tuple(one for one in _choices(table, where) if one != answers[0] and one not in others)
    row = Row(task, prompt, answers[0], _text(table, "split", where).lower(), where, others, wrong)
    if lone := _LONE.search("\n".join((task, prompt, row.answer, row.split, *others, *wrong))):
        raise DataError(
            f"{where}: a text holds half of a character (\\u{ord(lone[0]):04x}), which stands for nothing alone; write the whole pair"
        )
    return row


def _choices(table: dict[str, Any], where: str) -> list[str]:
    """All that could be said, each once; none where the row lists nothing."""
    found = table.get("choices")
    # As tables of multiple choice have them, letters beside.
    found = found.get("text") if isinstance(found, dict) else found
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(one, str | int | float) and one != "" for one in found):
        raise DataError(f"{where}: choices is {shown_json(found)}; it must be a list of texts")
    return list(dict.fromkeys(str(one) for one in found))


def _texts_of(table: dict[str, Any]) -> list[str]:
    """All that may be said, in the row's own order."""
    found: list[str] = []
    for name in _ANSWERED:
        value = table.get(name)
        found += [
            str(one)
            for one in (value if isinstance(value, list) else [value])
            if isinstance(one, str | int | float) and not isinstance(one, bool) and one != ""
        ]
    return found


def _first(table: dict[str, Any], names: Sequence[str], where: str) -> list[str]:
    return [found for name in names if (found := _text(table, name, where))][:1]


def _text(table: dict[str, Any], name: str, where: str) -> str:
    """A text of a row, of a list the first that is not empty; empty where there is none."""
    value = table.get(name)
    if isinstance(value, list) and value:
        value = next((one for one in value if one not in ("", None)), "")
    if value is None or value == []:
        return ""
    if isinstance(value, bool | dict | list):
        raise DataError(f"{where}: {name} is {shown_json(value)}; it must be a text")
    return str(value)


def parted(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """(rows to learn, rows held out), as the rows say, or by ``share`` of what they ask where none does.

    Equal questions stand on one side, whatever their tasks. A task keeps something to learn; and if ``share`` is above 0 and of no question
    that is to be had, the first that its tasks can do without is held out.

    Raises DataError where the rows say that nothing is to be learned.
    """
    is_told = any(row.is_held_out for row in rows)
    held = set() if is_told else _held_out(rows, share)
    out = [row.is_held_out or row.prompt in held for row in rows]
    kept = [row for row, is_out in zip(rows, out, strict=True) if not is_out]
    if not kept:
        where, said = rows[0].where.rpartition(", line ")[0], ", ".join(sorted({row.split for row in rows}))
        raise DataError(
            f"all {len(rows)} rows{f' of {where}' if where else ''} say that they are held out (split: {said}), so there is nothing to "
            "learn; give rows to learn too, whose split is train or which have none"
        )
    return kept, [row for row, is_out in zip(rows, out, strict=True) if is_out]


def _held_out(rows: Sequence[Row], share: float) -> set[str]:
    """The prompts that are held out, see `parted`."""
    prompts_of: dict[str, set[str]] = {}
    for row in rows:
        prompts_of.setdefault(row.task, set()).add(row.prompt)
    order = sorted({row.prompt for row in rows}, key=_place)
    held = {prompt for prompt in order if _place(prompt) < share}
    # Of all tasks at once: what is held out does not follow from their order.
    held -= {max(prompts, key=_place) for prompts in prompts_of.values() if prompts <= held}
    if share and not held:
        spare = (prompt for prompt in order if not any(prompts == {prompt} for prompts in prompts_of.values()))
        held.update(itertools.islice(spare, 1))
    return held


def _place(prompt: str) -> float:
    """A number from 0 to 1 that follows from what is asked."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def digest_of(rows: Sequence[Row]) -> str:
    """Names rows by their content, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.task, row.prompt, row.answer, *row.wrong]).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Encoded:
    """Rows as tokens, padded on the right.

    Attributes:
        token_NL: int32 ids: prompt, answer, end of text.
        start_N: where the answer begins.
        length_N: tokens of each row.
        task_N: the number of its task; -1 where nobody routes by it.
        num_cut: rows that were too long, and lost the front of their prompt or the end of their answer.
    """

    token_NL: Tensor
    start_N: Tensor
    length_N: Tensor
    task_N: Tensor
    num_cut: int

    def __len__(self) -> int:
        return len(self.token_NL)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in this order."""
        return self.token_NL, self.start_N, self.length_N, self.task_N

    def passes(self, row_X: Tensor, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(token_BL, mask_BL, task_B) of the rows ``row_X``, in their order: what layers are given while a model learns them.

        That is all but the last token of each, which is foretold and not read.
        """
        for row_B in row_X.split(batch_size):
            length_B = self.length_N[row_B] - 1
            token_BL = self.token_NL[row_B, : int(length_B.max())].long()
            mask_BL = torch.arange(token_BL.shape[1]) < length_B[:, None]
            yield token_BL.to(device), mask_BL.to(device), self.task_N[row_B].to(device)


def encoded(
    rows: Sequence[Row], numbers: Sequence[int], tokenizer: Tokenizer, template: str, most_tokens: int
) -> Encoded:
    """``rows`` as tokens, at most ``most_tokens`` each.

    Args:
        rows: what is encoded.
        numbers: of their tasks.
        tokenizer: of the model.
        template: what is written around a prompt, ``{prompt}`` standing for it; or ``chat``, see `asked_ids`.
        most_tokens: of a row. A prompt loses its front first, down to one token, then an answer its end.
    """
    ids, starts, cut = [], [], 0
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for row in rows:
        # As it is encoded when the model is asked; what stands in an answer is data.
        asked = asked_ids(tokenizer, row.prompt, template)
        said = tokenizer.encode(row.answer, parse_special=False) + end
        cut += len(asked) + len(said) > most_tokens
        said = said[: most_tokens - 1]
        room = most_tokens - len(said)
        asked = asked[-room:] or end[:1] or [0]
        ids.append(asked + said)
        starts.append(len(asked))
    token_NL = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.int32)
    for number, own in enumerate(ids):
        token_NL[number, : len(own)] = torch.tensor(own, dtype=torch.int32)
    lengths = torch.tensor([len(row) for row in ids])
    return Encoded(token_NL, torch.tensor(starts), lengths, torch.tensor(list(numbers)), cut)


def spread_rows(rows: Encoded, most_tokens: int | None) -> Tensor:
    """row_N: the rows to measure on where ``most_tokens`` are enough: the first of each task, the second of each, and so on; sorted.

    At least one row; all of them where None.
    """
    seen: dict[int, int] = {}
    turns = []
    for task in rows.task_N.tolist():
        turns.append(seen.setdefault(task, 0))
        seen[task] += 1
    order_N = torch.tensor(turns).argsort(stable=True)
    if most_tokens is not None:
        within_N = rows.length_N[order_N].cumsum(0) <= most_tokens
        order_N = order_N[: max(1, int(within_N.sum()))]
    return order_N.sort().values
