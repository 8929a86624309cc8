"""Asynchronous scheduling on a real model: the same tokens, little thrown away, no page freed that a step under way uses."""

import random
from collections import Counter

import pytest

from anabranch.lm import Decoder
from anabranch.nn import MoE
from anabranch.nn.attention import SelfAttention
from anabranch.routing import Router, TopK
from anabranch.serving.core.offload import LruTier, PeakMemory
from anabranch.serving.core.request import Finish, Output, Request, Sampling
from anabranch.serving.core.scheduler import SchedulerConfig
from anabranch.serving.engine.loop import EngineLoop
from anabranch.serving.engine.messages import Add, Close
from anabranch.serving.engine.paged import PagedShape
from anabranch.serving.engine.runner import ModelRunner
from anabranch.serving.engine.tiered import TieredPool
from anabranch.serving.nanoflow.execute import Threads
from anabranch.serving.nanoflow.runtime import NanoRunner

VOCAB, STOPS = 31, tuple(range(0, 31, 4))


def model_of(kind):
    moe = MoE.Config(num_experts=4, hidden_dim=12, router=Router.Config(select=TopK.Config(top_k=2)))
    config = Decoder.Config(
        vocab_size=VOCAB,
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=2, num_kv_heads=1),
        max_positions=64,
    )
    return (config.replace(feed_forward=moe) if kind == "moe" else config.replace()).build(seed=7)


def requests_of(seed, count=14, stops=True):
    """Short and long, some with stop tokens that come at once, some that share a beginning."""
    draw = random.Random(seed)
    shared = tuple(draw.randrange(VOCAB) for _ in range(12))
    return [
        Request(
            id=str(number),
            prompt=(shared if number % 3 == 0 else ())
            + tuple(draw.randrange(VOCAB) for _ in range(draw.randint(1, 12))),
            sampling=Sampling(
                max_tokens=draw.randint(1, 20) if stops else 20, temperature=0, ignore_eos=not stops or number % 4 == 1
            ),
            arrival=float(number),
        )
        for number in range(count)
    ]


class Watch:
    """A scheduler seen at every step: what is under way, and that its pages have holders."""

    def __init__(self, scheduler):
        self.scheduler, self.flight, self.deepest, self.checked = scheduler, {}, 0, 0

    def __getattr__(self, name):
        return getattr(self.scheduler, name)

    def check(self):
        for batch in self.flight.values():
            for chunk in batch.chunks:
                assert all(self.scheduler.pool.holders(block) for block in chunk.blocks), (
                    "a page of a step under way is free"
                )
                self.checked += 1

    def schedule(self):
        batch = self.scheduler.schedule()
        if batch is not None:
            self.flight[batch.step] = batch
            self.deepest = max(self.deepest, len(self.flight))
        self.check()
        return batch

    def update(self, batch, sampled):
        self.check()  # until it has been told of, the step counts as under way
        del self.flight[batch.step]
        outputs = self.scheduler.update(batch, sampled)
        self.check()
        return outputs


def serve(
    model, requests, *, is_async, runner_class=ModelRunner, memory=None, tier=None, pool=None, num_blocks=24, **options
):
    """Streams and ends of all requests through the engine's loop; tokens that were sampled for each; the watch."""
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_tokens=4,
        max_positions=48,
        max_batched_tokens=20,
        max_seqs=5,
        is_async=is_async,
        stop_tokens=STOPS,
    )
    watch = Watch(config.build(tier=tier, memory=memory))
    runner = runner_class(model, num_blocks=num_blocks, block_tokens=4, pool=pool, **options)
    sampled, run = Counter(), runner.run

    def counted(batch):
        results = run(batch)
        sampled.update(result.id for result in results)
        return results

    runner.run = counted
    streams, ends = {request.id: [] for request in requests}, {}

    def emit(events):
        for event in events:
            if isinstance(event, Output):
                streams[event.id] += event.tokens
                if event.finish is not None:
                    assert event.id not in ends
                    ends[event.id] = event.finish

    loop = EngineLoop(watch, runner, emit, is_async=is_async)
    for request in requests:
        loop.put(Add(request))
    loop.put(Close(60.0))
    loop.run()
    return streams, ends, sampled, watch


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("seed", range(3))
def test_streams_are_those_of_synchronous_scheduling(kind, seed):
    model, requests = model_of(kind), requests_of(seed)
    streams, ends, sampled, watch = serve(model, requests, is_async=True)
    expected, expected_ends, exact, plain = serve(model, requests, is_async=False)
    assert streams == expected
    assert ends == expected_ends
    assert len(ends) == len(requests)
    assert watch.deepest == 2
    assert plain.deepest == 1
    assert watch.checked > 0
    stopped = [id for id, finish in ends.items() if finish is Finish.STOP]
    assert stopped, "no request stopped early, so nothing could be discarded"
    for request in requests:
        told = len(expected[request.id]) + (ends[request.id] is Finish.STOP)  # a stop token is sampled and not told
        assert exact[request.id] == told
        assert told <= sampled[request.id] <= told + 1, "more than one token was thrown away"
        if ends[request.id] is Finish.LENGTH:
            assert sampled[request.id] == told, "an end by length is known before, so nothing is computed for it"
    counters = watch.stats().counters
    assert counters["discarded_tokens"] == sum(sampled.values()) - sum(exact.values())


@pytest.mark.parametrize("seed", range(2))
def test_nor_do_preemption_offload_admission_and_nano_batches_change_them(seed):
    model, requests = model_of("dense"), requests_of(seed + 10, stops=False)
    expected, *_ = serve(model, requests, is_async=False, num_blocks=40)
    tight, _, _, watch = serve(model, requests, is_async=True, num_blocks=13)
    assert tight == expected
    assert watch.stats().counters["preemptions"] > 0
    pool = TieredPool(PagedShape.of(model), 13, block_tokens=4, host_blocks=6, disk_blocks=30)
    tier = LruTier(36, is_eager=True)
    offloaded, *_ = serve(model, requests, is_async=True, num_blocks=13, tier=tier, pool=pool)
    assert offloaded == expected
    assert tier.loaded > 0
    nano, *_ = serve(
        model,
        requests,
        is_async=True,
        runner_class=NanoRunner,
        executor=Threads({"compute": 1, "memory": 1}),
        min_tokens=2,
        tile=1,
    )
    assert nano == expected


def test_admission_by_expected_peak_preempts_less():
    model = model_of("dense")
    requests = [
        Request(
            id=str(number),
            prompt=(number + 1, 2),
            sampling=Sampling(max_tokens=18, temperature=0, ignore_eos=True),
            arrival=float(number),
        )
        for number in range(10)
    ]
    expected, _, _, plain = serve(model, requests, is_async=False, num_blocks=12)
    memory = PeakMemory(12 * 4, mean_output=18)
    streams, _, _, careful = serve(model, requests, is_async=False, num_blocks=12, memory=memory)
    assert streams == expected
    assert plain.stats().counters["preemptions"] > 0
    assert careful.stats().counters["preemptions"] == 0
    assert memory.mean_output == pytest.approx(18)


@pytest.mark.parametrize("is_async", [False, True])
def test_steps_are_filled_exactly_while_prompts_wait(is_async):
    """Decodes first, then prompts to the last token of the budget, at most one of them cut."""
    model = model_of("dense")
    requests = [
        Request(
            id=str(number),
            prompt=tuple((number + at) % VOCAB for at in range(23)),
            arrival=float(number),
            sampling=Sampling(max_tokens=6, temperature=0, ignore_eos=True),
        )
        for number in range(8)
    ]
    config = SchedulerConfig(
        num_blocks=80,
        block_tokens=4,
        max_positions=48,
        max_batched_tokens=20,
        max_seqs=8,
        is_async=is_async,
        prefix_cache=False,
    )
    scheduler = config.build()
    runner = ModelRunner(model, num_blocks=80, block_tokens=4)
    for request in requests:
        scheduler.add(request)
    prompts, flight, sizes, cut = {request.id: 23 for request in requests}, [], [], []
    while scheduler.has_work:
        while len(flight) < 1 + is_async and (batch := scheduler.schedule()) is not None:
            waiting = sum(prompts.values())
            decodes = sum(prompts[chunk.id] == 0 for chunk in batch.chunks)
            sizes.append((batch.num_tokens, min(20, decodes + waiting)))
            for chunk in batch.chunks:
                prompts[chunk.id] -= len(chunk.tokens) if prompts[chunk.id] else 0
            cut.append(sum(prompts[chunk.id] > 0 for chunk in batch.chunks))
            flight.append(batch)
        batch = flight.pop(0)
        scheduler.update(batch, runner.run(batch))
    assert all(tokens == wanted for tokens, wanted in sizes)
    assert sizes[0] == (20, 20)
    assert max(cut) == 1
