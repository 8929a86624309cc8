"""What strategies learn, as bytes of the store's rows, and back."""

import json
import logging
from collections.abc import Sequence

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import CheckpointError
from anabranch.gateway.logged_error import words
from anabranch.gateway.store.learned import LearnedRow
from anabranch.routers.contract.strategy import Arrays, Example, Facts
from anabranch.routers.fitted import VERSION, packed, unpacked

logger = logging.getLogger(__name__)

Part = tuple[Arrays, Facts]


def ready(arrays: Arrays, facts: Facts) -> tuple[Arrays, str]:
    """A copy, apart from what goes on changing. Raises TypeError for facts that are no JSON."""
    return {name: np.array(value, order="C") for name, value in arrays.items()}, json.dumps(facts)


def packed_ready(made: tuple[Arrays, str], name: str) -> bytes:
    """`ready` as the store keeps it."""
    return packed(made[0], {"version": VERSION, "facts": made[1]}, name)


def packed_part(part: Part, name: str) -> bytes:
    """A part, or a state, as the store keeps it. Raises InputError for what is not ready for JSON."""
    return packed_ready(ready(*part), name)


def read_part(body: bytes, name: str) -> Part:
    """The opposite. Raises CheckpointError, which begins with ``name``, for what is damaged."""
    arrays, content = unpacked(body, name)
    try:
        facts = json.loads(content["facts"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} holds no facts that can be read ({type(error).__name__})") from None
    if not isinstance(facts, dict):
        raise CheckpointError(f"the facts of {name} are {shown(facts)}; they must be a table")
    return arrays, facts


def example_rows(examples: Sequence[Example]) -> list[tuple[str, str, bytes]]:
    """Key, body and vector as the store has them."""
    return [
        (
            one.key,
            "" if one.body is None else json.dumps(one.body),
            b"" if one.vector_D is None else one.vector_D.astype("<f4").tobytes(),
        )
        for one in examples
    ]


def read_examples(rows: Sequence[tuple[str, str, int, int, str, bytes]]) -> list[Example]:
    """The opposite; a damaged one is as if it were gone."""
    found = []
    for key, _, version, _, body, vector in rows:
        try:
            value = json.loads(body) if body else None
            vector_D = np.frombuffer(vector, "<f4").astype(np.float32) if vector else None
            if value is not None and not isinstance(value, dict):
                raise ValueError("it is no object")
            found.append(Example(key, value, vector_D))
        except (ValueError, RecursionError) as error:
            logger.warning("an example (version %d) is damaged and left out: %s", version, words(error))
    return found


def part_of(row: LearnedRow) -> Part:
    """`read_part` of a row."""
    return read_part(row.body, f"version {row.version}")
