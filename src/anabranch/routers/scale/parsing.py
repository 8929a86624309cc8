r"""What models wrote, read: outlines, a choice among them, scores, boxed answers. Each gives None for what is none of it, never an error.

Reply shapes that are taken (the prompts ask for the first of each):

    outline   {"step1": "...", "step2": "..."}    also in a code fence, between words, as ["...", "..."] or {"steps": ["...", "..."]}
    choice    version3                            also ``version 3``, ``3``, in bold, in a sentence that names one version alone
    score     0.35                                also ``.35``, ``0,35``, ``Score: 0.35``, ``0.35/1``, in bold; one number alone
    answer    \boxed{42}                          nested braces; of several the last

All of it takes time linear in the text, whatever a model wrote.
"""

import json
import re
from typing import Any

# Characters of a reply that are looked at, of one step, and places at which JSON may begin.
LONGEST, LONGEST_STEP, MOST_STARTS = 200_000, 4000, 16

_OPEN, _CLOSE = "<think>", "</think>"
_STEP = re.compile(r"\s*step[\s_-]{0,3}(\d{1,4})\s*", re.IGNORECASE)
_VERSION = re.compile(r"version[\s_-]{0,3}(\d{1,4})(?!\d)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\d.,])(\d{1,4})(?![\d.,]*\d)")
_SCORE = re.compile(
    r"[^\d.,]{0,60}(?<![-+\u2212\u2013])([01](?:[.,]\d{1,20})?|[.,]\d{1,20})(?:\s{0,3}/\s{0,3}1(?:\.0{1,3})?)?\D{0,400}"
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,8}\{|\\.|[{}]", re.DOTALL)


def final_content(text: str) -> str:
    """What is left of an answer without its thoughts: nothing where it ended within them."""
    _, closed, after = text.rpartition(_CLOSE)
    rest = after if closed else text
    return rest.partition(_OPEN)[0].strip()


def outline(text: str, *, most: int) -> tuple[str, ...] | None:
    """The steps of an outline, in order.

    None for text without one, a step that is empty, too long or no text, numbers that do not run from 1 up, a number that is there twice,
    no step, and more than ``most``.
    """
    text = final_content(text)[:LONGEST]
    for found in _values(text):
        steps = _steps_of(found)
        if steps is not None:
            return tuple(steps) if 0 < len(steps) <= most else None
    return None


def _values(text: str) -> list[Any]:
    """What stands in a text as JSON objects and lists, in order, none within another."""
    decoder = json.JSONDecoder(object_pairs_hook=_Pairs, parse_constant=_refused)
    found, at, starts = [], 0, 0
    while starts < MOST_STARTS:
        start = min((place for place in (text.find("{", at), text.find("[", at)) if place >= 0), default=-1)
        if start < 0:
            break
        starts += 1
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            at = start + 1
        else:
            found.append(value)
    return found


class _Pairs(list[tuple[str, Any]]):
    """An object with its keys as they were written, so that two of one name are seen."""


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _steps_of(value: Any) -> list[str] | None:
    """None for what is no outline at all; [] for one that may not be used."""
    if isinstance(value, _Pairs):
        if len(value) == 1 and value[0][0].casefold() == "steps":
            return _texts(value[0][1]) if type(value[0][1]) is list else []
        numbers = [_STEP.fullmatch(name) for name, _ in value]
        if not any(numbers):
            return None
        if not all(numbers):
            return []
        by_number = sorted((int(number[1]), text) for number, (_, text) in zip(numbers, value, strict=True) if number)
        runs = [number for number, _ in by_number] == list(range(1, len(value) + 1))
        return _texts([text for _, text in by_number]) if runs else []
    is_outline = type(value) is list and value and all(isinstance(one, str) for one in value)
    return _texts(value) if is_outline else None


def _texts(values: list[Any]) -> list[str]:
    """Steps, or none where one of them is not usable."""
    usable = all(isinstance(one, str) and one.strip() and len(one) <= LONGEST_STEP for one in values)
    return [one.strip() for one in values] if usable else []


def choice(text: str, count: int) -> int | None:
    """Which of ``count`` versions was chosen, from 0; None where none is named, or several, or one that there is not."""
    text = final_content(text)[:LONGEST]
    named = {int(number) for number in (_VERSION.findall(text) or _NUMBER.findall(text))}
    if len(named) != 1:
        return None
    number = named.pop()
    return number - 1 if 1 <= number <= count else None


def score(text: str) -> float | None:
    """A number from 0 to 1; None for anything else: another number, several, none, NaN."""
    found = _SCORE.fullmatch(final_content(text))
    if found is None:
        return None
    value = float(found[1].replace(",", "."))
    return value if 0.0 <= value <= 1.0 else None


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` of a text holds, braces within it as they are; None without one that ends."""
    open_at: list[int | None] = []
    found: tuple[int, int] | None = None
    for mark in _BOX.finditer(text):
        if mark[0] == "{":
            open_at.append(None)
        elif mark[0] == "}":
            start = open_at.pop() if open_at else None
            if start is not None:
                found = start, mark.start()
        elif mark[0].endswith("{") and len(mark[0]) > 2:
            open_at.append(mark.end())
    return None if found is None else text[found[0] : found[1]].strip()
