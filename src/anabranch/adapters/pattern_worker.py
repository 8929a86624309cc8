"""A process of its own that compares names with regular expressions; `anabranch.adapters.patterns` starts it.

An expression comes with an adapter, and may take for ever on a name of forty characters, in which nothing else of its process runs.
So it runs where that ends this process alone. A request has ``patterns`` and ``names``; the answer is, for each pattern, the places of the
names that it fits whole.
"""

import json
import re
from typing import Any

from anabranch.sandbox_worker import Limits, serve

__all__ = ["LIMITS"]

# All layers of a large mixture and one pattern take a hundredth of a second.
LIMITS = Limits(seconds=1.0, memory=1 << 30)


def main() -> None:
    """Answer requests until there are no more."""
    serve(answer, LIMITS)


def answer(line: bytes) -> dict[str, Any]:
    """See above."""
    request = json.loads(line)
    found = []
    for pattern in request["patterns"]:
        try:
            compiled = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            return {"error": f"{pattern[:200]!r} is no regular expression: {error}"[:400]}
        found.append([place for place, name in enumerate(request["names"]) if compiled.fullmatch(name)])
    return {"answer": found}


if __name__ == "__main__":
    main()
