"""`matching`: which names a pattern of an adapter's config fits, where the pattern may be any regular expression that somebody wrote."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from anabranch.adapters import pattern_worker
from anabranch.errors import CheckpointError
from anabranch.sandbox import Refused, Sandbox, SandboxError, Work

__all__ = ["ends_with", "matching"]

WORK = Work(
    program=Path(pattern_worker.__file__),
    does="compares names with patterns",
    do="compare names with patterns",
    limits=pattern_worker.LIMITS,
    greeting={"patterns": ["a"], "names": ["a"]},
)
_PLAIN = re.compile(r"[\w.\-]+")


def ends_with(name: str, ending: str) -> bool:
    """Whether ``ending`` is the whole name or its last words: ``q_proj`` of ``model.layers.0.self_attn.q_proj``."""
    return name == ending or name.endswith(f".{ending}")


def matching(patterns: Sequence[str], names: Collection[str], *, is_ending: bool, what: str) -> list[set[str]]:
    """The names that each pattern fits.

    Args:
        patterns: names, which need no process, or regular expressions, which are tried in one with a second of computing.
        names: of modules.
        is_ending: a pattern may fit the last words of a name, as in ``rank_pattern``; otherwise it must fit all of it.
        what: the field they come from, for messages.

    Raises CheckpointError for one that is no regular expression, or that takes too long.
    """
    plain = {pattern for pattern in patterns if _PLAIN.fullmatch(pattern)}
    found = {
        pattern: {name for name in names if name == pattern or (is_ending and ends_with(name, pattern))}
        for pattern in plain
    }
    tried = [pattern for pattern in dict.fromkeys(patterns) if pattern not in plain]
    if tried:
        listed = list(names)
        asked = [rf"(?:.*\.)?(?:{pattern})" if is_ending else pattern for pattern in tried]
        try:
            places = Sandbox.of(WORK).ask("adapters", {"patterns": asked, "names": listed})
        except Refused as error:
            raise CheckpointError(f"{what} cannot be compared with the model's layers: {error}") from None
        except SandboxError as error:
            raise CheckpointError(f"{what} cannot be compared with the model's layers now: {error}") from None
        found |= {pattern: {listed[place] for place in own} for pattern, own in zip(tried, places, strict=True)}
    return [found[pattern] for pattern in patterns]
