"""`RequestState`: what the scheduler knows of one request while it is in its hands."""

from anabranch.serving.core.batch import PENDING, Sampled
from anabranch.serving.core.request import Finish, Output, Request


class RequestState:
    """One request, its tokens and its blocks.

    Attributes:
        request: what was asked.
        rank: (priority, arrival, serial number): order of service.
        key, cost: for fairness, see `WaitingQueue`.
        tokens: prompt and output; the last ``num_pending`` are `PENDING`, since the steps that sample them are under way.
        computed: tokens whose keys and values are stored, or will be when the steps under way have run.
        blocks: in order; ``table`` is the same as a tuple.
        root: prefix key before the first block; empty until it is asked for.
        keys: prefix keys of full blocks, each hashed once.
        num_published: how many of ``blocks`` have been given theirs.
        epoch: how often it was sent back; what a step computed for an earlier one is of no account.
        last_step: the last step that it is in; -1 for none.
        stop_tokens: what ends it.
        most_tokens: length at which it ends.
        is_known: the runner has been told of it.
        finish: why it ended.
    """

    __slots__ = (
        "blocks", "cached_tokens", "computed", "cost", "epoch", "finish", "is_known", "key", "keys", "last_step",
        "most_tokens", "num_pending", "num_prompt", "num_published", "queue_s", "rank", "request", "root", "stop_tokens", "table", "tokens",
    )  # fmt: skip

    def __init__(
        self, request: Request, *, serial: int, now: float, stop_tokens: frozenset[int], max_positions: int
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.num_prompt = len(request.prompt)
        self.most_tokens = min(self.num_prompt + sampling.max_tokens, max_positions)
        self.rank = (request.priority, request.arrival or now, serial)
        self.key, self.cost = request.key, self.most_tokens
        self.tokens = list(request.prompt)
        self.computed = 0
        self.blocks: list[int] = []
        self.table: tuple[int, ...] = ()
        self.root = b""
        self.keys: list[bytes] = []
        self.num_published = 0
        self.epoch = 0
        self.last_step = -1
        self.stop_tokens = frozenset(sampling.stop_tokens) | (frozenset() if sampling.ignore_eos else stop_tokens)
        self.is_known = False
        self.num_pending = 0
        self.finish: Finish | None = None
        self.cached_tokens: int | None = None  # until it has been told
        self.queue_s: float | None = None  # likewise

    @property
    def num_output(self) -> int:
        """New tokens so far, pending ones among them."""
        return len(self.tokens) - self.num_prompt

    @property
    def decodes(self) -> bool:
        """Whether it lacks one token, and that is not one that the step under way will end it with."""
        length = len(self.tokens)
        return length - self.computed == 1 and not (self.num_pending and length >= self.most_tokens)

    def drop_blocks(self) -> None:
        """Its blocks are no longer its own; should it go on, all is to be computed again."""
        self.blocks, self.table = [], ()
        self.computed = self.num_published = 0
        self.epoch += 1

    def expect(self) -> None:
        """A step that samples its next token has been formed."""
        self.tokens.append(PENDING)
        self.num_pending += 1

    def take(self, token: int) -> bool:
        """Put a sampled token in the place of the first pending one; True if it is part of the output, not the end of it."""
        index = len(self.tokens) - self.num_pending
        self.num_pending -= 1
        # As many as min_tokens must come before a stop token counts as one.
        if token in self.stop_tokens and index - self.num_prompt >= self.request.sampling.min_tokens:
            self.finish = Finish.STOP
            del self.tokens[index:]
            return False
        self.tokens[index] = token
        if index + 1 >= self.most_tokens:
            self.finish = Finish.LENGTH
        return True

    def output(self, item: Sampled | None = None, error: str | None = None) -> Output:
        """News of it: a new token or none."""
        cached_tokens, queue_s = self.cached_tokens, self.queue_s
        self.cached_tokens = self.queue_s = None  # told once
        if item is None:
            return Output(
                id=self.request.id, finish=self.finish, error=error, cached_tokens=cached_tokens, queue_s=queue_s
            )
        return Output(
            id=self.request.id,
            tokens=(item.token,),
            logprobs=() if item.logprob is None else (item.logprob,),
            finish=self.finish,
            cached_tokens=cached_tokens,
            queue_s=queue_s,
            routing=(item.routing,) if item.routing else (),
        )
