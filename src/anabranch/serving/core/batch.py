"""`Batch`: what the scheduler tells the runner to do in one step; the runner keeps what it needs of each request by its id."""

from dataclasses import dataclass, field
from typing import Any

from anabranch.serving.core.request import Request, Route, TokenLogprob

# A token that the step before has yet to sample (asynchronous scheduling); the runner knows it.
PENDING = -1


@dataclass(slots=True, kw_only=True)
class Chunk:
    """Tokens of one request to run: positions ``start`` to ``start + len(tokens)``.

    Attributes:
        id: the request's.
        tokens: ids; the last may be `PENDING`.
        start: tokens before them whose keys and values are stored.
        blocks: numbers of the request's blocks, all of them, in order: position p is at slot ``blocks[p // 16] * 16 + p % 16``.
        local: the same of layers that see less far back than others, where a model has both, see `Kind`; each with a memory of its own. In
            both, what no token from ``start`` on sees may be `GONE`.
        samples: whether the last token's logits give a new token; not while a part of the prompt is still to come.
        drafts: so many of the last ``tokens`` are guesses of what the request samples. The row before each of them samples, too, and the
            guess holds if that gives the same token; what comes behind the first that does not counts for nothing.
        targets: tokens of the prompt whose log probabilities are asked for; the last may be the one after ``tokens``.
        pooling: how its states become a vector, see `Request.pooling`.
        is_whole: the prompt, or what there is of the text, ends with it.
        first_scored: the row of the chunk whose logits the first of ``targets`` is scored by, the next ones by the rows after it.
    """

    id: str
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    samples: bool
    targets: tuple[int, ...] = ()
    first_scored: int = 0
    drafts: int = 0
    pooling: str | None = None
    is_whole: bool = False
    local: tuple[int, ...] = ()

    @property
    def num_samples(self) -> int:
        """Rows that sample, the last ones."""
        return 1 + self.drafts if self.samples else 0

    @property
    def is_answered(self) -> bool:
        """Whether the runner gives a `Sampled` for it."""
        return self.samples or bool(self.targets) or (self.pooling is not None and self.is_whole)


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
    """What the runner gives back for one chunk that samples or is scored: the token, its log probability where asked, where it was routed.

    Attributes:
        id: the request's.
        token: the new one; `PENDING` for a chunk that does not sample.
        logprob: its own, where asked.
        routing: where recorded, see `Output.routing`.
        explained: likewise, see `Output.explained`.
        error: why there is neither a token nor a score.
        prompt_logprobs: of the chunk's ``targets``.
        embedding: the vector of the prompt, where asked for and whole.
        path, computed: as of `Output`, where depth routers or a skipper have just decided.
        later: the tokens behind it, one for each guess of the chunk that held (`Chunk.drafts`); perhaps fewer, never with errors.
    """

    id: str
    token: int
    logprob: TokenLogprob | None = None
    routing: Route = field(default_factory=dict)
    explained: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    embedding: tuple[float, ...] = ()
    path: tuple[int, ...] | None = None
    computed: tuple[int, ...] | None = None
    later: "tuple[Sampled, ...]" = ()
