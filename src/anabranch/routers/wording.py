"""When two texts say the same: questions for learning and judging, answers for rules that compare them.

A question is its words and its signs: only case and white space are looked past. An answer may also be put as a sentence or set in
bold, so that of it the marks around are looked past too, but never a sign, a digit or a letter of what it says.
"""

import re

# Around an answer, without a meaning of their own: emphasis, code, quotation.
_AROUND = "\"'`*_\u201c\u201d\u2018\u2019\u00ab\u00bb"

# Of a sentence, after an answer; those of `_LOUD` may be part of it too (``5!``).
_STOPS, _LOUD = ".,;:", "!?"

# What may come before an answer within a sentence: the start of a word, or a mark that opens or announces.
_BEFORE = r"(?<![^\s=:(\[{])(?<!\d:)"
_AFTER = r"(?=$|\s|[)\]}])"


def normal_form(text: str) -> str:
    """What two texts share that ask the same: any case, and one space for any white space. All else, every sign too, tells them apart."""
    return " ".join(text.casefold().split())


def letters_and_digits(text: str) -> str:
    """The words of a text in any case, without its signs: for finding near copies, where one too many does no harm."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def answer_form(text: str, *, loud: bool = True) -> str:
    """An answer without what is only around it: case, white space, emphasis, quotation marks, one pair of brackets, the end of a sentence.

    What may be part of it stays: signs (``-5``, ``C++``), points and commas within a number, a leading point (``.5``), and without
    ``loud`` also ``!`` and ``?``.
    """
    stops = _STOPS + _LOUD if loud else _STOPS
    found = normal_form(text)
    while True:
        # All of it at once: mark by mark, each copied what is left.
        found = found.lstrip(_AROUND + " ").rstrip(_AROUND + stops + " ")
        if found[:1] + found[-1:] not in ("()", "[]", "{}") or re.search(r"[()\[\]{}]", found[1:-1]):
            return found
        found = found[1:-1]


def is_same_answer(answer: str, wanted: str) -> bool:
    """Whether an answer is ``wanted``, as `answer_form` has it; where that is ``5!``, a ``5`` is another."""
    return answer_form(wanted, loud=False) in (answer_form(answer), answer_form(answer, loud=False))


def says(answer: str, wanted: str) -> bool:
    """Whether ``wanted`` stands in ``answer`` as words of its own: ``5`` is in ``it is **5**.``, not in ``-5``, ``5.2`` or ``5%``."""
    wanted = answer_form(wanted, loud=False)
    around = f"[{re.escape(_AROUND)}]*"
    ending = f"[{re.escape(_AROUND + _STOPS + _LOUD)}]*"
    return bool(wanted) and bool(
        re.search(rf"{_BEFORE}{around}{re.escape(wanted)}{ending}{_AFTER}", normal_form(answer))
    )
