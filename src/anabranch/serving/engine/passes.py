"""`Pass`: the part of a step that goes through the model at once, since its requests are computed alike.

Requests that run the model otherwise, in another number of parallel streams, over other blocks, with adapters or of another task, take
turns within the step. Each pass computes what a step of these requests alone would.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from anabranch.serving.core.batch import Chunk


@dataclass(frozen=True, slots=True)
class Variant:
    """How a request runs the model.

    Attributes:
        num_streams: parallel streams.
        path: the blocks that it runs; None for each once.
        is_adapted: module by module, with adapters.
        chooser: the request, where depth routers are to choose its path by this pass, or a skipper what blocks compute of its prompt, so
            that it runs alone.
        is_pruned: blocks pass over tokens of its prompt.
        task: number of the one that it is of, where the model goes by tasks.
    """

    num_streams: int = 1
    path: tuple[int, ...] | None = None
    is_adapted: bool = False
    chooser: str | None = None
    task: int | None = None
    is_pruned: bool = False


@dataclass
class Pass:
    """Some chunks of a step, in order.

    Attributes:
        chunks: of the step.
        tokens: theirs.
        place: of each of their rows in the step, its row in the pass.
    """

    chunks: list[Chunk] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)


def passes_of(chunks: Sequence[Chunk], tokens: Sequence[int], kind: Callable[[Chunk], Hashable]) -> list[Pass]:
    """A pass for each ``kind`` of chunk, in the order of their first chunks; ``tokens`` are those of all chunks."""
    passes: dict[Hashable, Pass] = {}
    start = 0
    for chunk in chunks:
        here = passes.setdefault(kind(chunk), Pass())
        here.chunks.append(chunk)
        for row in range(start, start + len(chunk.tokens)):
            here.place[row] = len(here.place)
        here.tokens += tokens[start : start + len(chunk.tokens)]
        start += len(chunk.tokens)
    return list(passes.values())
