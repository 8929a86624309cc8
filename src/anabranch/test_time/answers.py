"""What is compared of an answer in text: `WAYS` to take it out of what a model wrote.

WAYS["boxed"](r"so \\boxed{42}")               # "42"; None where there is no answer, which is never right
"""

import re
from collections.abc import Callable, Mapping

from anabranch.test_time.verify import gsm8k_answer

__all__ = ["WAYS", "boxed", "first_letter"]


def first_letter(text: str) -> str | None:
    """The letter that a multiple-choice answer is: the first capital that stands alone at the beginning, as ``B``, ``(B)``, ``B.``."""
    found = re.match(r"[\s(\[*]*([A-Z])(?![A-Za-z])", text)
    return found[1] if found else None


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` holds, braces within it included; a plain answer without any is itself."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return text.strip() or None
    depth, begin = 0, start + len(r"\boxed")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin + 1 : place].strip()
    return None


# By name: all of the text, the letter of a choice, the last box, the last number.
WAYS: Mapping[str, Callable[[str], str | None]] = {
    "exact": str.strip,
    "letter": first_letter,
    "boxed": boxed,
    "number": gsm8k_answer,
}
