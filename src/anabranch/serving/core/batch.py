"""`Batch`: what the scheduler tells the runner to do in one step; the runner keeps what it needs of each request by its id."""

from dataclasses import dataclass, field

from anabranch.serving.core.request import Request, TokenLogprob

PENDING = -1  # a token that the step before has yet to sample (asynchronous scheduling); the runner knows it


@dataclass(slots=True, kw_only=True)
class Chunk:
    """Tokens of one request to run: positions ``start`` to ``start + len(tokens)``.

    Attributes:
        id: the request's.
        tokens: ids; the last may be `PENDING`.
        start: tokens before them whose keys and values are stored.
        blocks: numbers of the request's blocks, all of them, in order: position p is at slot ``blocks[p // 16] * 16 + p % 16``.
        samples: whether the last token's logits give a new token; not while a part of the prompt is still to come.
    """

    id: str
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step.

    Attributes:
        step: serial number.
        chunks: what to run.
        new: requests that appear for the first time, whose sampling the runner has to set up.
        gone: ids of requests that will not appear again; to be forgotten before ``new`` is set up, as an id may come again.
        copies: (from, to) numbers of blocks to copy before anything runs, after what is saved and before what is brought back.
        swaps_out: (block, host slot) to save before anything runs, where KV is offloaded; swaps_in: (host slot, block) to bring back.
    """

    step: int
    chunks: tuple[Chunk, ...]
    new: tuple[Request, ...] = ()
    gone: tuple[str, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    swaps_out: tuple[tuple[int, int], ...] = ()
    swaps_in: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens in all chunks."""
        return sum(len(chunk.tokens) for chunk in self.chunks)


@dataclass(slots=True, kw_only=True)
class Sampled:
    """What the runner gives back for one chunk that samples: the token, its log probability where asked, where it was routed."""

    id: str
    token: int
    logprob: TokenLogprob | None = None
    routing: dict[int, tuple[int, ...]] = field(default_factory=dict)
    error: str | None = None
