"""`RequestState`: what the scheduler knows of one request while it is in its hands."""

from anabranch.serving.core.batch import PENDING
from anabranch.serving.core.request import Finish, Request


class RequestState:
    """One request, its tokens and its blocks.

    Attributes:
        request: what was asked.
        rank: (priority, arrival, serial number): order of service.
        key, cost: for fairness, see `WaitingQueue`.
        tokens: prompt and output; the last is `PENDING` while the step that samples it is under way.
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
        is_pending: the last token is `PENDING`.
        finish: why it ended.
    """

    __slots__ = (
        "blocks", "cached_tokens", "computed", "cost", "epoch", "finish", "is_known", "is_pending", "key", "keys", "last_step",
        "most_tokens", "num_prompt", "num_published", "queue_s", "rank", "request", "root", "stop_tokens", "table", "tokens",
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
        self.is_known = self.is_pending = False
        self.finish: Finish | None = None
        self.cached_tokens: int | None = None  # until it has been told
        self.queue_s: float | None = None  # likewise

    @property
    def num_output(self) -> int:
        """New tokens so far, a pending one among them."""
        return len(self.tokens) - self.num_prompt

    def send_back(self) -> None:
        """It has lost its blocks: all is to be computed again."""
        self.blocks, self.table = [], ()
        self.computed = self.num_published = 0
        self.epoch += 1

    def expect(self) -> None:
        """A step that samples its next token has been formed."""
        self.tokens.append(PENDING)
        self.is_pending = True

    def take(self, token: int) -> bool:
        """Put the sampled token in the place of the pending one; True if it is part of the output, False if it ended the request."""
        self.is_pending = False
        # As many as min_tokens must come before a stop token counts as one.
        if token in self.stop_tokens and len(self.tokens) - 1 - self.num_prompt >= self.request.sampling.min_tokens:
            self.tokens.pop()
            self.finish = Finish.STOP
            return False
        self.tokens[-1] = token
        if len(self.tokens) >= self.most_tokens:
            self.finish = Finish.LENGTH
        return True
