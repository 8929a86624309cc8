"""Taking personal data out of texts before they are kept. A hook: anything from text to text will do."""

import re
from collections.abc import Callable

from anabranch.redaction import hide_keys, hide_passwords

Redact = Callable[[str], str]

PATTERNS = (
    ("email", re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+")),
    ("iban", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,4})?\b")),
    ("card", re.compile(r"\b\d(?:[ -]?\d){12,18}\b")),
    ("ssn", re.compile(r"\b\d{3}-\d{2}-\d{4}\b")),
    ("ip", re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b")),
    ("phone", re.compile(r"(?<![\w/.-])\+?\(?\d{2,4}\)?(?:[ .-]\d{2,4}){2,4}(?![\w/.-])")),
)


def redact_personal(text: str) -> str:
    """The text with mail and network addresses, telephone, card, account and social security numbers, and keys as ``[email]`` and so on.

    Patterns miss names and much else: it is a net for what slips through, not consent.
    """
    text = hide_keys(hide_passwords(text, "[key]"), "[key]")
    for name, pattern in PATTERNS:
        text = pattern.sub(f"[{name}]", text)
    return text
