"""What usage tells of a request is what was so when it began, and is told once: whatever it is preempted for, and wherever it goes on."""

import random

import pytest

from anabranch.serving.core.request import Finish, Request, Sampling
from anabranch.serving.elasticmoe.rank_boot import Limits
from paper_ranks import PaperGroup

# Few blocks and short steps: prompts are computed in pieces, and requests make room for one another.
LIMITS = Limits(
    num_blocks=26, block_tokens=4, max_positions=64, max_batched_tokens=12, max_seqs=3, long_prefill_chunk=4
)
ONCE = ("cached_tokens", "queue_s", "path", "computed")
KINDS = {
    "plain": {},
    "listed": {"path": (0, 1, 1, 2)},
    "routed": {"routes_depth": True},
    "pruned": {"skips_tokens": True},
}


def requests(draw, count=14):
    """Of every kind; their prompts begin alike, so that some find what others have stored, and some are scored."""
    for number in range(count):
        kind = draw.choice(list(KINDS))
        prompt = (*range(1, 1 + draw.choice((0, 9, 20))), *(draw.randrange(61) for _ in range(draw.randint(1, 5))))
        scores = draw.choice((None, None, 0))
        sampling = Sampling(max_tokens=draw.randint(1, 24), ignore_eos=True, prompt_logprobs=scores)
        yield Request(
            id=f"{kind} {number}",
            prompt=prompt,
            sampling=sampling,
            key=draw.choice("ab"),
            priority=draw.randrange(3),
            **KINDS[kind],
        )


def live_through(seed, changes, *, limits=LIMITS):
    """A group that answers requests while ``changes`` happen, each somewhere in between."""
    draw = random.Random(seed)
    group, asks = PaperGroup(limits, (0, 1)), list(requests(draw))
    changes, wait = [*changes], list(asks)
    while wait or changes or group.ledger.live:
        event = draw.randrange(12)
        if event == 0 and wait:
            group.submit(wait.pop())
        elif event == 1 and changes and len(wait) < len(asks) - 3:
            change = changes.pop()
            group.die() if change == "die" else group.change(change)
        elif event == 2 and group.ledger.live:
            group.ledger.pause_request(draw.choice(sorted(group.ledger.live)))
        elif event == 3:
            for id in list(group.ledger.live):
                group.ledger.resume_request(id)
        else:
            group.active.ranks[draw.choice(group.devices)].step()
    return group, asks


def told(group, request, name):
    """What its client was told, each time."""
    values = [getattr(output, name) for output in group.outputs[request.id]]
    return [value for value in values if value is not None]


CHANGES = {
    "nothing": (),
    "leave": ((0,),),
    "come and leave": ((1,), (0, 1, 2), (0,)),
    "die": ("die", "die"),
    "all": ((0, 1, 2), "die", (1,), "die", (0, 1)),
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_what_is_told_once_is_what_was_so_when_the_request_began(changes):
    cached, preemptions = set(), 0
    for seed in range(12):
        group, asks = live_through(seed, changes)
        for request in asks:
            outputs = group.outputs[request.id]
            assert outputs[-1].finish is Finish.LENGTH, outputs[-1]
            assert sum(len(output.tokens) for output in outputs) == request.sampling.max_tokens
            counts = {name: len(told(group, request, name)) for name in ONCE}
            decides = request.routes_depth or request.skips_tokens
            assert counts == {"cached_tokens": 1, "queue_s": 1, "path": decides, "computed": request.skips_tokens}
            assert outputs[0].cached_tokens == group.first[request.id] < len(request.prompt)
            assert outputs[0].queue_s is not None
            cached.add(outputs[0].cached_tokens)
        counters = group.stats().counters
        preemptions += counters["preemptions"]
        assert counters["prompt_tokens"] == sum(len(request.prompt) for request in asks)
        assert counters["cached_prompt_tokens"] == sum(group.first[request.id] for request in asks)
    assert len(cached) > 2
    assert preemptions
