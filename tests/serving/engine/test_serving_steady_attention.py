"""Attention of single rows is what attention of many is, and the same to the bit whatever rows and keys a step has beside it."""
# Shapes: P streams, H query heads, G key heads, L rows, D head width, M entries in front

import pytest
import torch

from anabranch.lm import Decoder
from anabranch.nn import SelfAttention
from anabranch.nn.latent_attention import LatentAttention
from anabranch.nn.scored import PLAIN, Scoring, scored_attention
from anabranch.serving import LLM, Sampling
from anabranch.serving.core.request import Output, Request
from anabranch.serving.engine.messages import Add
from anabranch.serving.engine.steady_attention import KEYS, ROWS, steady_attention

HEADS, WIDTH, LENGTH = 4, 9, KEYS + 3 * ROWS + 5
SINK_H = torch.linspace(-1, 2, HEADS)
SCORINGS = {
    "plain": PLAIN,
    "scale": Scoring(0.7),
    "window": Scoring(window=13),
    "wide window": Scoring(window=KEYS + 2),
    "sinks": Scoring(sink_H=SINK_H),
    "window and sinks": Scoring(window=1, sink_H=SINK_H),
    "shared values": Scoring(0.3, value_width=7),
}


def parts(dtype, groups=2, streams=1):
    generator = torch.Generator().manual_seed(0)
    sizes = [(streams, heads, LENGTH, WIDTH) for heads in (HEADS, groups, groups)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("name", SCORINGS)
def test_it_is_scored_attention(name):
    query, key, value = parts(torch.float64, streams=2)
    scoring = SCORINGS[name]
    expected = scored_attention(query, key, value, scoring)
    torch.testing.assert_close(steady_attention(query, key, value, scoring, 0), expected)


def test_entries_in_front_are_seen_by_all():
    query, key, value = parts(torch.float64)
    front = key[:, :, :5] + 1, value[:, :, :5] - 1
    behind = [torch.cat((more, part), dim=2) for more, part in zip(front, (key, value), strict=True)]
    made = steady_attention(query[:, :, 3:], key, value, PLAIN, 3, front)
    torch.testing.assert_close(made, scored_attention(query[:, :, 3:], *behind, PLAIN))


@pytest.mark.parametrize("name", ["window", "wide window", "window and sinks"])
def test_windows_are_counted_in_positions_wherever_a_step_begins_and_ends(name):
    """Of tokens between which others were left out: equal to attention without tiles, and to the bit to any part of it."""
    query, key, value = parts(torch.float32)
    scoring = SCORINGS[name]
    gaps = torch.randint(1, 4, (LENGTH,), generator=torch.Generator().manual_seed(2))
    position_S = gaps.cumsum(0)
    whole = steady_attention(query, key, value, scoring, 0, position_S=position_S)
    torch.testing.assert_close(whole, scored_attention(query, key, value, scoring, position_S=position_S))
    for first, end in ((0, 1), (5, 6), (5, 17), (250, 251), (255, 258), (LENGTH - 1, LENGTH), (17, LENGTH)):
        begin = int((position_S > position_S[first] - scoring.window).nonzero()[0])
        seen = slice(begin, end)
        cut = steady_attention(
            query[:, :, first:end], key[:, :, seen], value[:, :, seen], scoring, first, position_S=position_S[seen]
        )
        assert torch.equal(cut, whole[:, :, first:end]), f"rows {first} to {end}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCORINGS)
def test_a_row_is_the_same_wherever_a_step_begins_and_ends(name, dtype):
    query, key, value = parts(dtype)
    scoring = SCORINGS[name]
    whole = steady_attention(query, key, value, scoring, 0)
    for first, end in ((0, 1), (5, 6), (5, 17), (250, 251), (255, 258), (LENGTH - 1, LENGTH), (17, LENGTH)):
        begin = 0 if scoring.window is None else max(0, first + 1 - scoring.window)
        cut = steady_attention(query[:, :, first:end], key[:, :, begin:end], value[:, :, begin:end], scoring, first)
        assert torch.equal(cut, whole[:, :, first:end]), f"rows {first} to {end}"


ATTENTION = {
    "window": {"attention": SelfAttention.Config(num_heads=4, num_kv_heads=2, window=13)},
    "sinks": {"attention": SelfAttention.Config(num_heads=4, num_kv_heads=2, sinks=True)},
    "some with a window": {
        "attention": SelfAttention.Config(num_heads=4, num_kv_heads=2),
        "local_attention": SelfAttention.Config(num_heads=4, num_kv_heads=2, window=6, sinks=True),
        "local_layers": (0,),
    },
    "latent": {
        "attention": LatentAttention.Config(num_heads=4, head_dim=9, rotary_dim=6, value_dim=7, kv_rank=20, q_rank=12)
    },
}
PROMPTS = [[*([7 * n % 64] * 3), *(n * n * at % 64 for at in range(length))] for n, length in enumerate((21, 7, 12), 1)]
SAMPLING = Sampling(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=1)


def model_of(name, dtype):
    config = Decoder.Config(vocab_size=64, dim=64, num_layers=2, init_std=0.3, max_positions=64)
    model = config.replace(**ATTENTION[name]).build(seed=0).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "sink" in parameter_name:
                parameter.copy_(torch.linspace(-1, 2, parameter.numel()))
    return model.to(dtype)


def told(model, prompts, **options):
    llm = LLM(model, deterministic=True, block_tokens=4, max_batched_tokens=17, num_blocks=60, **options)
    answers = llm.generate(prompts, SAMPLING)
    llm.close()
    return [[(token.token, token.logprob) for token in answer.output.logprobs] for answer in answers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ATTENTION)
def test_log_probabilities_are_the_same_to_the_bit_in_any_company(name, dtype):
    model = model_of(name, dtype)
    alone = [told(model, [prompt])[0] for prompt in PROMPTS]
    assert told(model, PROMPTS) == alone
    assert told(model, PROMPTS, prompt_lookup=5) == alone


@pytest.mark.parametrize("name", ["plain", "window"])
def test_mean_vectors_are_the_same_to_the_bit_wherever_a_prompt_is_cut(name):
    changes = {"attention": SelfAttention.Config(num_heads=4, num_kv_heads=2)} if name == "plain" else ATTENTION[name]
    config = Decoder.Config(vocab_size=64, dim=64, num_layers=2, init_std=0.3, max_positions=64)
    model = config.replace(**changes).build(seed=0).eval()
    vectors = set()
    for size in (64, 7, 5, 1):
        llm = LLM(model, deterministic=True, block_tokens=4, max_batched_tokens=size, num_blocks=60)
        request = Request(id="a", prompt=tuple(PROMPTS[0]), pooling="mean", sampling=Sampling(max_tokens=0))
        llm._loop.put(Add(request))
        llm._loop.run(until_idle=True)
        vectors |= {event.embedding for event in llm._events if isinstance(event, Output) and event.embedding}
        llm.close()
    assert len(vectors) == 1
    assert len(vectors.pop()) == 64
