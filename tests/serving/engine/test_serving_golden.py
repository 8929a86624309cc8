"""Greedy tokens of the engine are those of one request after the other through `lm.generate`, whatever else goes on."""

import random

import pytest
import torch

from anabranch import presets
from anabranch.lm import SamplingConfig, generate
from anabranch.nn.feed_forward import MLP
from anabranch.nn.kernels import load
from anabranch.registry import BUILTIN
from anabranch.serving import LLM, Sampling
from anabranch.serving.core.batch import Sampled
from anabranch.serving.core.request import Finish, Request
from anabranch.serving.engine import ModelRunner
from anabranch.serving.engine.messages import Abort, Add
from anabranch.serving.fast import FastDecoder

GREEDY = Sampling(temperature=0.0, max_tokens=10, ignore_eos=True)
PLENTY = {"num_blocks": 200, "block_tokens": 4}
SCARCE = {"num_blocks": 14, "block_tokens": 4, "max_batched_tokens": 9, "max_seqs": 4, "long_prefill_chunk": 5}


def prompts_of(model, lengths, seed=0):
    draw = random.Random(seed)
    return [tuple(draw.randrange(model.config.vocab_size) for _ in range(length)) for length in lengths]


def one_by_one(model, prompts, max_tokens=GREEDY.max_tokens):
    config = SamplingConfig(temperature=0.0, max_tokens=max_tokens)
    return [tuple(generate(model, [prompt], config)[0]) for prompt in prompts]


def run(model, prompts, **options):
    llm = LLM(model, **options)
    results = [answer.tokens for answer in llm.generate(prompts, GREEDY)]
    stats = llm.engine.scheduler.stats()
    llm.close()
    return results, stats


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


@pytest.fixture(scope="module")
def prompts(model):
    return prompts_of(model, (7, 1, 20, 33, 12, 2, 9, 40))


@pytest.mark.parametrize("scheduling", ["sync", "async"])
@pytest.mark.parametrize("limits", [PLENTY, SCARCE], ids=["plenty", "scarce"])
@pytest.mark.parametrize("name", [*presets.PRESETS, "mlp"])
def test_every_design(name, limits, scheduling):
    config = presets.find("dense" if name == "mlp" else name)("tiny").model
    if name == "mlp":  # a feed-forward of others' models, which no preset has
        config = config.replace(feed_forward=MLP.Config(hidden_dim=64))
    model = config.replace(init_std=0.2).build(seed=0)
    prompts = prompts_of(model, (5, 1, 23, 40, 8))
    results, stats = run(model, prompts, scheduling=scheduling, **limits)
    assert results == one_by_one(model, prompts)
    assert len(set(results)) == len(prompts)  # the model does not say the same to all
    assert (stats.counters["preemptions"] > 0) == (limits is SCARCE)


def test_every_registered_feed_forward_is_among_the_presets():
    kinds = {type(presets.find(name)("tiny").model.feed_forward).owner.kind for name in presets.PRESETS}
    assert kinds | {"mlp"} == set(BUILTIN["feed_forward"])


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


STEADY = [
    name if name in ("moe-lossfree", "versatile") else pytest.param(name, marks=pytest.mark.slow)
    for name in presets.PRESETS
]


@pytest.mark.skipif(load() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", STEADY)
def test_deterministic_logits_are_the_same_to_the_bit_in_any_company(name):
    model = presets.find(name)("tiny").model.replace(init_std=0.2).build(seed=0)
    prompts = prompts_of(model, (5, 1, 19, 40))
    seen = []
    for limits in (PLENTY, SCARCE):
        sampler = Peeking()
        run(model, prompts, sampler=sampler, deterministic=True, **limits)
        seen.append(sampler.rows)
    for other in seen[1:]:
        assert other.keys() == seen[0].keys()
        for id, rows in seen[0].items():
            assert torch.equal(torch.stack(rows), torch.stack(other[id][: len(rows)])), id
    assert all(getattr(module, "backend", "auto") == "auto" for module in model.modules())


@pytest.mark.parametrize("seed", range(6))
def test_random_mixes_of_limits(model, seed):
    draw = random.Random(seed)
    shared = prompts_of(model, (24,), seed)[0]
    prompts = [
        shared[: draw.randrange(25)] + prompt
        for prompt in prompts_of(model, [draw.randrange(1, 30) for _ in range(12)], seed)
    ]
    limits = {
        "block_tokens": draw.choice((1, 3, 4, 16)),
        "max_batched_tokens": draw.choice((4, 17, 64, 512)),
        "max_seqs": draw.choice((1, 3, 16)),
        "long_prefill_chunk": draw.choice((None, 2, 11)),
        "prefix_cache": draw.random() < 0.8,
        "scheduling": draw.choice(("sync", "async")),
    }
    num_blocks = -(-64 // limits["block_tokens"]) * draw.choice((1, 2, 10))
    assert run(model, prompts, num_blocks=num_blocks, **limits)[0] == one_by_one(model, prompts)


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("name", ["dense", "moe", "moe-lossfree"])
def test_the_decoder_gives_the_tokens_of_the_compiled_step(name, has_kernel, monkeypatch):
    model = presets.find(name)("tiny").model.replace(init_std=0.2).build(seed=0)
    prompts = prompts_of(model, (5, 1, 23, 40, 8))
    assert (ModelRunner(model, num_blocks=1).fast is None) == (load() is None)
    monkeypatch.setattr(FastDecoder, "supports", staticmethod(lambda model: "not today"))
    if not has_kernel:
        monkeypatch.setattr("anabranch.nn.kernels.paged.load", lambda: None)
    assert ModelRunner(model, num_blocks=1).fast is None
    assert run(model, prompts, **SCARCE)[0] == one_by_one(model, prompts)


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_prefix_hits(model, prompts, scheduling):
    llm = LLM(model, scheduling=scheduling, **PLENTY)
    expected = one_by_one(model, prompts)
    for _ in range(3):
        assert [answer.tokens for answer in llm.generate(prompts, GREEDY)] == expected
    longer = [prompt + tokens for prompt, tokens in zip(prompts, expected, strict=True)]
    answers = llm.generate(longer, GREEDY)
    assert [answer.tokens for answer in answers] == one_by_one(model, longer)
    assert all(
        answer.output.cached_tokens >= len(prompt) // 4 * 4
        for answer, prompt in zip(answers, longer, strict=True)
        if len(prompt) % 4
    )
    llm.close()


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_requests_that_are_cancelled_leave_the_others_alone(model, prompts, scheduling):
    llm = LLM(model, scheduling=scheduling, **SCARCE)
    expected = one_by_one(model, prompts)
    loop, seen = llm._loop, {}
    for number, prompt in enumerate(prompts):
        loop.put(Add(Request(id=str(number), prompt=prompt, sampling=GREEDY)))
    finished = {}

    def emit(events):
        for event in events:
            if hasattr(event, "tokens"):
                seen[event.id] = seen.get(event.id, ()) + event.tokens
                if event.finish:
                    finished[event.id] = event.finish
                if event.id in "0246" and len(seen[event.id]) == 2:
                    loop.put(Abort(event.id))

    loop._emit = emit
    loop.run(until_idle=True)
    for number in range(len(prompts)):
        tokens, id = seen[str(number)], str(number)
        assert tokens == expected[number][: len(tokens)]
        assert finished[id] is (Finish.ABORT if id in "0246" else Finish.LENGTH)
        assert len(tokens) == len(expected[number]) if id in "1357" else 2 <= len(tokens) <= 4
    pool = llm.engine.scheduler.pool
    assert pool.num_free == pool.num_blocks
    llm.close()


def test_half_precision_runs(tiny_model):
    model = tiny_model().to(torch.bfloat16)
    prompts = prompts_of(model, (5, 9))
    results, _ = run(model, prompts, **PLENTY)
    assert [len(tokens) for tokens in results] == [10, 10]
    assert run(model, prompts, **PLENTY)[0] == results


def test_routing_is_told_to_those_who_ask(model, prompts):
    llm = LLM(model, **PLENTY)
    requests = [
        Request(id=str(n), prompt=prompt, sampling=GREEDY, record_routing=n == 1)
        for n, prompt in enumerate(prompts[:3])
    ]
    events = []
    llm._loop._emit = events.extend
    for request in requests:
        llm._loop.put(Add(request))
    llm._loop.run(until_idle=True)
    told = {}
    for event in events:
        if hasattr(event, "routing"):
            told.setdefault(event.id, []).extend(event.routing)
    assert not told["0"]
    assert not told["2"]
    assert told["1"] == expected_routes(model, prompts[1], GREEDY.max_tokens)
    assert llm.engine.info.routed_layers == {0: 4, 1: 4}
    assert not any(block.feed_forward.router._forward_hooks for block in model.blocks)
    llm.close()


def expected_routes(model, prompt, count):
    """{layer: destinations} of the tokens before each of ``count`` new ones, by `record_routing` over the whole sequence."""
    from anabranch.routing import record_routing

    tokens = prompt + one_by_one(model, [prompt], count)[0]
    with record_routing(model) as recorder, torch.inference_mode():
        model(torch.tensor([tokens]))
    table = recorder.trace().table
    rows = [
        dict(zip(table.column_names, row, strict=True))
        for row in zip(*(column.to_pylist() for column in table.columns), strict=True)
    ]
    routes = [{} for _ in tokens]
    for row in sorted(rows, key=lambda row: row["rank"]):
        routes[row["position"]].setdefault(row["layer"], []).append(row["destination"])
    chosen = routes[len(prompt) - 1 : len(tokens) - 1]
    return [{layer: tuple(destinations) for layer, destinations in sorted(route.items())} for route in chosen]
