"""`RequestState`: what the scheduler knows of one request while it is in its hands."""

from collections.abc import Sequence

from anabranch.serving.core.batch import PENDING, Chunk, Sampled
from anabranch.serving.core.lookup import PromptLookup
from anabranch.serving.core.request import Finish, Output, Request, TokenLogprob


class RequestState:
    """One request, its tokens and its blocks.

    Attributes:
        request: what was asked.
        rank: (priority, arrival, serial number): order of service.
        own_priority: goes before it among those of one key that wait.
        key, cost: for fairness, see `WaitingQueue`; ``cost`` is what it has left when it begins to wait.
        tokens: prompt and output; the last ``num_pending`` are `PENDING`, since the steps that sample them are under way.
        computed: tokens whose keys and values are stored, or will be when the steps under way have run.
        blocks: in order; ``table`` is the same as a tuple.
        local: of a model with two kinds of layers, the blocks of those that see less far back, see `Kind`; ``local_table`` likewise.
        root: prefix key before the first block; empty until it is asked for.
        keys: prefix keys of full blocks, each hashed once.
        num_published: how many of ``blocks`` have been given theirs.
        epoch: how often it was sent back; what a step computed for an earlier one is of no account.
        last_step: the last step that it is in; -1 for none.
        furthest: as ``computed`` was when its blocks went, at most; 0 if they never did.
        ahead_since: the step that computed more than that since it runs; -1 for none, see `Seats`.
        stop_tokens: what ends it.
        most_tokens: length at which it ends.
        turn_at: length at which it waits until it is told to go on, see `Request.turn_every`; ``most_tokens`` where it never does.
        holds: why nothing is computed for it now; empty while something is.
        num_scored: tokens of the prompt after the first whose log probabilities the steps formed so far give, or that nobody asked for.
        num_cached: tokens of the prompt that a prefix cache had when its first chunk ran, here or elsewhere; None before.
        lookup: guesses what it says next; None until that is asked for.
        is_known: the runner has been told of it.
        finish: why it ended.
    """

    __slots__ = (
        "ahead_since",
        "blocks",
        "cached_tokens",
        "computed",
        "cost",
        "epoch",
        "finish",
        "furthest",
        "holds",
        "is_known",
        "kept",
        "key",
        "keys",
        "last_step",
        "local",
        "local_table",
        "lookup",
        "most_tokens",
        "num_cached",
        "num_pending",
        "num_prompt",
        "num_published",
        "num_scored",
        "own_priority",
        "path",
        "prompt_logprobs",
        "queue_s",
        "rank",
        "request",
        "root",
        "stop_tokens",
        "table",
        "tokens",
        "turn_at",
    )

    def __init__(
        self, request: Request, *, serial: int, now: float, stop_tokens: frozenset[int], max_positions: int
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.num_prompt = len(request.prompt)
        self.most_tokens = min(self.num_prompt + sampling.max_tokens, max_positions)
        self.turn_at = self.most_tokens if request.turn_every is None else self.num_prompt + request.turn_every
        self.holds: set[str] = set()
        self.rank = (request.priority, request.arrival or now, serial)
        self.own_priority = request.own_priority
        self.key, self.cost = request.key, self.most_tokens
        self.tokens = list(request.prompt)
        self.computed = 0
        self.blocks: list[int] = []
        self.table: tuple[int, ...] = ()
        self.local: list[int] = []
        self.local_table: tuple[int, ...] = ()
        self.root = b""
        self.keys: list[bytes] = []
        self.num_published = 0
        self.num_scored = 0 if sampling.prompt_logprobs is not None else self.num_prompt - 1
        # Until they have been told.
        self.prompt_logprobs: list[TokenLogprob] = []
        self.epoch = 0
        self.last_step = -1
        self.furthest, self.ahead_since = 0, -1
        self.lookup: PromptLookup | None = None
        self.stop_tokens = frozenset(sampling.stop_tokens) | (frozenset() if sampling.ignore_eos else stop_tokens)
        self.is_known = False
        self.num_pending = 0
        self.num_cached: int | None = None
        self.finish: Finish | None = None
        # Until it has been told.
        self.cached_tokens: int | None = None
        self.queue_s: float | None = None  # likewise
        self.path: tuple[int, ...] | None = None  # likewise
        self.kept: tuple[int, ...] | None = None  # likewise

    @property
    def num_output(self) -> int:
        """New tokens so far, pending ones among them."""
        return len(self.tokens) - self.num_prompt

    @property
    def decodes(self) -> bool:
        """Whether it lacks one token, and that is not one that the step under way will end it with."""
        return len(self.tokens) - self.computed == 1 and not self.awaits_last

    @property
    def awaits_last(self) -> bool:
        """Whether the step under way gives its last token, or the last before it has to wait."""
        return self.num_pending > 0 and len(self.tokens) >= min(self.most_tokens, self.turn_at)

    @property
    def num_reusable(self) -> int:
        """Tokens whose keys and values may come from a cache. The others' rows have to run, for their logits sample or score."""
        last = len(self.tokens) - 1
        # Which blocks have made what is stored is not known before routers or a skipper have seen the whole prompt.
        if self.request.pooling == "mean" or not self.request.shares_prefix:
            return 0
        return last if self.num_scored >= self.num_prompt - 1 else min(last, self.num_scored)

    def advance(self, count: int, step: int) -> Chunk:
        """Its next ``count`` tokens, which ``step`` computes."""
        start, tokens = self.computed, self.tokens
        end = self.computed = start + count
        # Row r scores token r + 1.
        first, last = self.num_scored, min(end, self.num_prompt - 1)
        if first < last:
            self.num_scored = last
        chunk = Chunk(
            id=self.request.id,
            tokens=(tokens[start],) if count == 1 else tuple(tokens[start:end]),
            start=start,
            blocks=self.table,
            local=self.local_table,
            samples=end == len(tokens) < self.most_tokens and not self.awaits_last,
            targets=tuple(tokens[first + 1 : last + 1]) if first < last else (),
            first_scored=first - start if first < last else 0,
            pooling=self.request.pooling,
            is_whole=end == len(tokens),
        )
        self.last_step = step
        if self.ahead_since < 0 and end > self.furthest:
            self.ahead_since = step
        if chunk.samples:
            self.expect()
        return chunk

    @property
    def tables(self) -> tuple[list[int], list[int]]:
        """``blocks`` and ``local``: one for each kind of layers, and where there is but one kind an empty one behind."""
        return self.blocks, self.local

    def renew_tables(self) -> None:
        """What chunks carry from now on is as the lists are."""
        self.table, self.local_table = tuple(self.blocks), tuple(self.local)

    def drop_blocks(self) -> None:
        """Its blocks are no longer its own; should it go on, all is to be computed again."""
        self.blocks, self.local = [], []
        self.renew_tables()
        self.furthest, self.ahead_since = max(self.furthest, self.computed), -1
        self.computed = self.num_published = 0
        self.epoch += 1

    def go_on(self, request: Request | None) -> None:
        """Behind `turn_at`: as ``request``, whose keys and values are others, or None for as before."""
        assert self.request.turn_every is not None, "nothing else waits there"
        self.turn_at += self.request.turn_every
        # The row of the last token is to sample now.
        self.computed = min(self.computed, len(self.tokens) - 1)
        if request is not None:
            self.request, self.root = request, b""
            self.keys.clear()

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

    def take_all(self, item: Sampled) -> list[Sampled]:
        """Put what a chunk gave in its place, see `take`; what of it is part of the output.

        That there is a token behind another tells that the other was run in the same step, so its keys and values are stored.
        """
        kept = [item] if self.take(item.token) else []
        for each in item.later:
            if self.finish is not None:
                break
            self.computed += 1
            self.expect()
            if self.take(each.token):
                kept.append(each)
        return kept

    def output(self, items: Sequence[Sampled] = (), error: str | None = None) -> Output:
        """News of it: new tokens or none."""
        output = Output(
            id=self.request.id,
            finish=self.finish,
            error=error,
            cached_tokens=self.cached_tokens,
            queue_s=self.queue_s,
            prompt_logprobs=tuple(self.prompt_logprobs),
            path=self.path,
            computed=self.kept,
        )
        self.cached_tokens = self.queue_s = self.path = self.kept = None  # told once
        self.prompt_logprobs.clear()
        if items:
            output.tokens = tuple([item.token for item in items])
            output.logprobs = tuple([item.logprob for item in items if item.logprob is not None])
            output.routing = tuple([item.routing for item in items if item.routing])
            output.explained = items[-1].explained
        return output
