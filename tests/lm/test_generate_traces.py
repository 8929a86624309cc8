"""A trace of batched generation: each sequence's decisions are those of its prompt alone, whoever leaves the batch and when."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.experts.chain import Chain
from anabranch.experts.parscale import ParScale
from anabranch.lm import Decoder, SamplingConfig, generate, stream
from anabranch.lm.cache import KeyValueCache
from anabranch.nn import MoE, SelfAttention
from anabranch.routing import LinearScore, Router, TopK, record_routing

PROMPTS = [[7], [1, 2, 3, 4, 5, 6], [8, 9, 10], [11, 12]]
GREEDY = SamplingConfig(temperature=0.0, max_tokens=9)
ROUTER = Router.Config(score=LinearScore.Config(init_std=0.5), select=TopK.Config(top_k=2))


def make(layer=MoE, streams=None):
    return Decoder.Config(
        vocab_size=31,
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=4),
        feed_forward=layer.Config(num_experts=4, hidden_dim=8, router=ROUTER),
        streams=streams,
        init_std=0.3,
    ).build(seed=0)


MODELS = {
    "moe": make(),
    "chain": make(Chain),
    "streams": make(streams=ParScale.Config(num_streams=2, prefix_len=2)),
}


def rows(trace):
    """{item: {(layer, position): (token, domain, destinations)}} of a trace."""
    found = {}
    for layer, decided in trace:
        columns = decided.item_N, decided.position_N, decided.token_N, decided.domain_N, decided.index_NK
        for item, position, token, domain, index_K in zip(*(column.tolist() for column in columns), strict=True):
            key = layer.layer, position
            assert key not in found.setdefault(item, {}), f"item {item} has layer and position {key} twice"
            found[item][key] = token, trace.domains[domain] if domain >= 0 else None, tuple(index_K)
    return found


def alone(model, prompts, config, domains):
    """The traces of each prompt alone, numbered as in a batch: all sequences of the first stream, then of the next."""
    traces = []
    for prompt, domain in zip(prompts, domains, strict=True):
        with record_routing(model) as recorder:
            recorder.domain = domain
            generate(model, [prompt], config)
        traces.append(rows(recorder.trace()))
    copies = len(traces[0])
    return {copy * len(prompts) + row: trace[copy] for copy in range(copies) for row, trace in enumerate(traces)}


def stops(model):
    """A token that ends the sequences of PROMPTS at different times, and when they end."""
    free = generate(model, PROMPTS, GREEDY)
    found = [
        (len({row.index(token) if token in row else 99 for row in free}), token)
        for token in {t for r in free for t in r}
    ]
    kinds, token = max(found)
    assert kinds >= 2
    return token


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_recorded_as_its_prompts_are_alone(name):
    model = MODELS[name]
    config = GREEDY.replace(stop=(stops(model),))
    domains = ["code", "prose", None, "code"]
    expected = alone(model, PROMPTS, config, domains)
    with record_routing(model) as recorder:
        recorder.domain = domains
        made = generate(model, PROMPTS, config)
    assert len({len(row) for row in made}) >= 2
    assert rows(recorder.trace()) == expected


def test_streams_of_a_sequence_have_its_domain():
    model = MODELS["streams"]
    with record_routing(model) as recorder, torch.no_grad():
        recorder.domain = ["code", "prose"]
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    domains = {item: {domain for _, domain, _ in found.values()} for item, found in rows(recorder.trace()).items()}
    assert domains == {0: {"code"}, 1: {"prose"}, 2: {"code"}, 3: {"prose"}}


def test_generations_that_take_turns_are_kept_apart():
    model = MODELS["moe"]
    config = GREEDY.replace(stop=(stops(model),))
    expected = alone(model, PROMPTS, config, [None] * 4)
    with record_routing(model) as recorder:
        pairs = [stream(model, PROMPTS[:2], config), stream(model, PROMPTS[2:], config)]
        while pairs:
            pairs = [pair for pair in pairs if next(pair, None) is not None]
    assert rows(recorder.trace()) == expected


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_names_follow_their_rows(data):
    """Whatever rows leave, repeat or move: a name goes on with the keys of its sequence, and no two rows share one."""
    batch = data.draw(st.integers(1, 5))
    cache = KeyValueCache(1, 4)
    names = cache.sequences(batch)
    key = torch.arange(batch, dtype=torch.float32).view(batch, 1, 1, 1)
    cache.append(0, key, key)
    cache.advance(1)
    sequence_of = dict(zip(names, range(batch), strict=True))
    for _ in range(data.draw(st.integers(1, 3))):
        count = len(cache.sequences(0))
        if not count:
            break
        if data.draw(st.booleans()):
            row_B = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
        else:
            row_B = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=6)), dtype=torch.int64)
        before = cache.sequences(0)
        origin = torch.arange(count)[row_B].tolist()
        cache.keep_rows(row_B)
        now = cache.sequences(0)
        assert len(set(now)) == len(now) == len(origin)
        for name, row in zip(now, origin, strict=True):
            sequence_of.setdefault(name, sequence_of[before[row]])
            assert name is before[row] or name not in before
        assert {before[row] for row in origin} <= set(now)
        kept = cache._slots[0, 0].key_BHSD[:, 0, 0, 0].long().tolist()
        assert kept == [sequence_of[name] for name in now]
