"""Questions of one's own to learn from: those of a file, some of which are kept for tests; the same whatever else is in the file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anabranch.errors import CheckpointError, DataError
from anabranch.questions import QuestionRow, question_rows
from anabranch.rl.tokens.world import Split

__all__ = ["OwnQuestions", "check_began"]


class OwnQuestions:
    """The questions of a file by split.

    Attributes:
        digest: of what is asked and what is right, in their order.

    Args:
        path: of JSON lines, see `anabranch.questions`.
        held_out: share of them that is for tests, by a digest of their text.
        needs_answer: all of them must say what is right.

    Raises DataError for a file that cannot be read, a line that is no question, and a split without any.
    """

    def __init__(self, path: str | Path, held_out: float, *, needs_answer: bool = True) -> None:
        self._of: dict[Split, list[QuestionRow]] = {"train": [], "test": []}
        digest = hashlib.sha256()
        for row in question_rows(path, needs_answer=needs_answer):
            if not row.prompt.strip():
                raise DataError(f"{row.where}: the question is blank")
            digest.update(repr((row.prompt, row.answers, row.options, row.row)).encode("utf-8", "surrogatepass"))
            self._of["test" if _is_test(row.prompt, held_out) else "train"].append(row)
        self.digest = digest.hexdigest()[:16]
        for split, rows in self._of.items():
            if not rows:
                raise DataError(
                    f"{path} has no question for {split}; it needs more of them, or another held_out than {held_out}"
                )

    def __getitem__(self, split: Split) -> list[QuestionRow]:
        """Those of a split, in the order of the file."""
        return self._of[split]


def check_began(state: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Raise CheckpointError where a run began with other files: its numbers of questions, its tokens or its rewards would mean others.

    Args:
        state: that a checkpoint kept; of older ones it may lack what is looked at.
        now: digests of what there is, by what it is.
    """
    for name, digest in now.items():
        if state.get(name, digest) != digest:
            raise CheckpointError(
                f"the {name} of the run changed since it began ({state[name]}, now {digest}); put back what was there, or begin a new run"
            )


def _is_test(question: str, held_out: float) -> bool:
    digest = hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < held_out * 2**64
