"""A process of its own that tries grammars out, within limits of time, memory and stack; `anabranch.serving.grammar.trial` starts it.

A grammar comes from a client: it may take half a minute or a gigabyte to compile, or so many nested calls that the process ends. What
gets through here compiles elsewhere as well. Run as a file, by its path, so that it waits for llguidance only. A request has a
``grammar``; the answer is how many bytes of memory it takes, as text.
"""

import ctypes
import json
import os
import re
import sys
from typing import Any

from anabranch.sandbox_worker import Limits, serve

__all__ = ["LIMITS", "MOST_SIZE", "PARSER", "told"]

# Threads that compile have 8 MiB of stack where nobody says otherwise.
LIMITS = Limits(seconds=1.0, memory=128 << 20, is_beyond_start=True, stack=4 << 20)
# Of llguidance's, also for every step of an output: fuel is some 14,000 a millisecond, items 20,000, a state up to 2 kB.
PARSER: dict[str, Any] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 100_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}

# Bytes that a grammar may keep once it is compiled.
MOST_SIZE = 24 << 20
# The token after those of all bytes.
_END = 256
_MOST_ERROR = 500

# Models come first.
_NICE = 5


def main() -> None:
    """Answer requests until there are no more."""
    import llguidance

    class Bytes:
        """A vocabulary of bytes."""

        eos_token_id, bos_token_id = _END, None
        tokens = [*(bytes([byte]) for byte in range(_END)), b"<end>"]  # noqa: RUF012
        special_token_ids = [_END]  # noqa: RUF012

        def __call__(self, text: bytes) -> list[int]:
            return list(text)

    if hasattr(os, "nice"):
        os.nice(_NICE)
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), slices=[])
    limits = llguidance.LLParserLimits(**PARSER)

    def answer(line: bytes) -> dict[str, Any]:
        before = _allocated()
        matcher = llguidance.LLMatcher(tokenizer, json.loads(line)["grammar"], log_level=0, limits=limits)
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            return {"error": told(matcher.get_error())}
        if not any(mask):
            return {"error": "no text matches it"}
        size = _allocated() - before
        if size > MOST_SIZE:
            return {"error": f"it takes {size >> 20} MiB of memory, and at most {MOST_SIZE >> 20} can be kept"}
        return {"answer": str(max(0, size))}

    serve(answer, LIMITS)


def told(error: str) -> str:
    """The part of llguidance's error that is about what the client sent: not our lines around it, nor a fault of its own."""
    if error.startswith("panic"):
        return "no text matches it, or it is beyond what can be followed"
    error = re.split(r"\n +\d+ \| ", error, maxsplit=1)[0].replace("<non-verbose/>", "")
    error = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", error)
    if "regex parse error:" in error:
        error = f"a regular expression in it: {error.rpartition('error:')[2]}"
    if names := re.fullmatch(r'Unimplemented keys: \["(.*)"\]\s*', error):
        listed = names[1].split('", "')
        error = f"keyword{'s' * (len(listed) > 1)} {', '.join(map(repr, listed))} not supported"
    if error.startswith("NoExtension"):
        error = "no text matches it"
    error = error.replace("Unsatisfiable schema:", "no text matches it:").replace(
        "initial lexer configuration (grammar)", "it is"
    )
    return " ".join(error.split())[:_MOST_ERROR]


class _MallocInfo(ctypes.Structure):
    """What glibc tells of its heap: ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def _allocated() -> int:
    """Bytes that are allocated; 0 where the C library does not say."""
    if sys.platform != "linux":
        return 0
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    function.restype = _MallocInfo
    found = function()
    return int(found.uordblks + found.hblkhd)


if __name__ == "__main__":
    main()
