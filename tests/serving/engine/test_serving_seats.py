"""Who makes room for another key goes on later, and gives what it gives alone."""

import random

import pytest
import torch

from anabranch.lm import SamplingConfig, generate
from anabranch.nn.kernels import load
from anabranch.serving import LLM, Sampling
from anabranch.serving.core.batch import Sampled
from anabranch.serving.core.request import Request
from anabranch.serving.engine.messages import Add

LONG, SHORT = 180, 3


def prompts_of(model, lengths):
    draw = random.Random(0)
    return [tuple(draw.randrange(model.config.vocab_size) for _ in range(length)) for length in lengths]


def asked(id, prompt, max_tokens):
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(id=id, prompt=prompt, key=id[0], sampling=sampling)


def crowded(llm, prompts):
    """Tokens by id where one key has both seats, and two others ask for a few tokens when it has given most of its own."""
    seen, order = {}, []
    late = [asked("b", prompts[2], SHORT), asked("c", prompts[3], SHORT)]

    def emit(events):
        for event in events:
            if not getattr(event, "tokens", ()):
                continue
            order.append(event.id)
            seen[event.id] = seen.get(event.id, ()) + event.tokens
            if late and len(seen.get("a0", ())) >= 140:
                llm._loop.put(Add(late.pop()))

    llm._loop._emit = emit
    for number in range(2):
        llm._loop.put(Add(asked(f"a{number}", prompts[number], LONG)))
    llm._loop.run(until_idle=True)
    last = {id: len(order) - 1 - order[::-1].index(id) for id in seen}
    assert max(last["b"], last["c"]) < min(last["a0"], last["a1"]), "they did not have to wait for its end"
    return seen


@pytest.mark.parametrize("options", [{"scheduling": "sync"}, {"scheduling": "async"}, {"prefix_cache": False}], ids=str)
def test_tokens_are_those_of_each_alone(tiny_model, options):
    model = tiny_model(max_positions=256)
    prompts = prompts_of(model, (9, 30, 5, 12))
    llm = LLM(model, num_blocks=200, block_tokens=4, max_seqs=2, **options)
    seen = crowded(llm, prompts)
    assert llm.engine.scheduler.stats().counters["preemptions"] >= 1
    for id, prompt in zip(("a0", "a1", "b", "c"), prompts, strict=True):
        config = SamplingConfig(temperature=0.0, max_tokens=LONG if id[0] == "a" else SHORT)
        assert seen[id] == tuple(generate(model, [prompt], config)[0]), id
    assert llm.engine.scheduler.pool.num_free == 200
    llm.close()


class Peeking:
    """A sampler that keeps the logits of every token it chooses."""

    def __init__(self):
        self.rows = {}

    def add(self, request):
        pass

    def forget(self, id):
        pass

    def __call__(self, logits_RV, ids):
        for id, row_V in zip(ids, logits_RV, strict=True):
            self.rows.setdefault(id, []).append(row_V.clone())
        return [Sampled(id=id, token=int(row_V.argmax())) for id, row_V in zip(ids, logits_RV, strict=True)]


@pytest.mark.skipif(load() is None, reason="no C++ compiler")
def test_logits_are_the_same_to_the_bit(tiny_model):
    model = tiny_model(max_positions=256)
    prompts = prompts_of(model, (9, 30, 5, 12))
    rows = {}
    for seats in (2, 4):
        sampler = Peeking()
        llm = LLM(model, num_blocks=200, block_tokens=4, max_seqs=seats, deterministic=True, sampler=sampler)
        crowded(llm, prompts)
        rows[seats] = sampler.rows
        assert (llm.engine.scheduler.stats().counters["preemptions"] > 0) == (seats == 2)
        llm.close()
    assert rows[2].keys() == rows[4].keys()
    for id, alone in rows[4].items():
        assert torch.equal(torch.stack(rows[2][id]), torch.stack(alone)), id
