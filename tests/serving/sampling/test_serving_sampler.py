"""Tokens that requests ask for: exact on hand-computed logits, and the same whoever shares the batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from anabranch.data.tokenizer import ByteTokenizer
from anabranch.errors import InputError
from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.sampling import Sampler, Uniforms
from anabranch.serving.sampling.adjust import adjust
from anabranch.serving.sampling.state import SequenceState
from anabranch.testing import DEVICES

V = 8
LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.0, 0.0, -1.0, 2.5, -4.0])


def request(id="a", prompt=(0,), **sampling):
    return Request(id=id, prompt=prompt, sampling=Sampling(**sampling))


def one(logits=LOGITS, prompt=(0,), *, sampler=None, output=(), **sampling):
    """What one row gives."""
    sampler = sampler or Sampler(V, stop_tokens=(7,), seed=0)
    sampler.add(request(prompt=prompt, **sampling), output)
    return sampler(logits[None], ["a"])[0]


def run(sampler, ids, steps, logits_of):
    """Tokens of ``steps`` steps; ``logits_of(id, index)`` are the logits of a request's token."""
    tokens = {id: [] for id in ids}
    for _ in range(steps):
        logits_RV = torch.stack([logits_of(id, len(tokens[id])) for id in ids])
        for sampled in sampler(logits_RV, ids):
            assert sampled.error is None
            tokens[sampled.id].append(sampled.token)
    return tokens


def random_logits(id, index):
    return torch.from_numpy(np.random.default_rng([ord(id[0]), index]).normal(size=V) * 2).float()


# -- greedy


def test_greedy_takes_the_first_of_the_most_likely():
    sampler = Sampler(V)
    for id in "ab":
        sampler.add(request(id, temperature=0))
    logits_RV = torch.stack([LOGITS, torch.tensor([0.0, 2.0, 2.0, 1, 1, 1, 1, 1])])
    assert [sampled.token for sampled in sampler(logits_RV, ["a", "b"])] == [1, 1]
    assert sampler(logits_RV[:0], []) == []


def test_greedy_and_sampled_rows_share_a_step():
    sampler = Sampler(V, seed=0)
    sampler.add(request("a", temperature=0))
    sampler.add(request("b", temperature=1, seed=1))
    sampler.add(request("c", temperature=0))
    tokens = [sampled.token for sampled in sampler(LOGITS.repeat(3, 1), ["a", "b", "c"])]
    alone = Sampler(V)
    alone.add(request("b", temperature=1, seed=1))
    assert tokens == [1, alone(LOGITS[None], ["b"])[0].token, 1]


# -- the distribution: the token is the inverse of the cumulative probability at the request's own uniform number


def inverse(probability, uniform):
    total = 0.0
    for token, share in enumerate(probability):
        total += share / sum(probability)
        if uniform < total:
            return token
    raise AssertionError("uniform number of 1")


def softmax(logits, temperature=1.0):
    weight = [math.exp(float(value) / temperature) for value in logits]
    return [value / sum(weight) for value in weight]


def kept(probability, tokens):
    return [share if token in tokens else 0.0 for token, share in enumerate(probability)]


ORDER = [1, 6, 3, 0, 4, 5, 2, 7]  # tokens of LOGITS, most likely first


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, ORDER),
        ({"top_k": 3}, ORDER[:3]),
        ({"top_k": 100}, ORDER),
        ({"top_p": 0.7}, ORDER[:2]),  # 0.458, 0.278, 0.168, ...
        ({"top_p": 0.8}, ORDER[:3]),
        ({"top_p": 0.0}, ORDER[:1]),
        ({"top_p": 0.999, "top_k": 4}, ORDER[:4]),
        ({"min_p": 0.3}, ORDER[:3]),  # exp(-0.5) = 0.61, exp(-1) = 0.37, exp(-2) = 0.14 of the most likely
        ({"min_p": 1.0}, ORDER[:1]),
    ],
)
def test_rows_invert_the_cut_distribution(settings, tokens):
    probability = softmax(LOGITS)
    seeds = range(60)
    sampler = Sampler(V)
    for seed in seeds:
        sampler.add(request(str(seed), seed=seed, **settings))
    drawn = [sampled.token for sampled in sampler(LOGITS.repeat(60, 1), [str(seed) for seed in seeds])]
    assert drawn == [inverse(kept(probability, tokens), Uniforms(seed)[0]) for seed in seeds]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    drawn = [one(seed=seed, temperature=temperature).token for seed in range(30)]
    assert drawn == [inverse(softmax(LOGITS, temperature), Uniforms(seed)[0]) for seed in range(30)]


def test_the_smallest_temperature_is_greedy():
    assert {one(seed=seed, temperature=1e-30).token for seed in range(5)} == {1}


# -- random numbers


def test_the_numbers_of_a_seed_are_a_function_of_the_index():
    forward, backward = Uniforms(5), Uniforms(5)
    there = [forward[index] for index in range(200)]
    assert [backward[index] for index in reversed(range(200))] == there[::-1]
    assert len(set(there)) == 200
    assert all(0 <= number < 1 for number in there)
    assert Uniforms(6)[0] != there[0]
    assert Uniforms(-1)[0] == Uniforms(2**64 - 1)[0]


@pytest.mark.parametrize("device", DEVICES)
def test_batch_mates_change_nothing(device):
    settings = {
        "a": {"logprobs": 2},
        "b": {"top_k": 2, "logit_bias": ((5, 1.0), (5, 0.5)), "min_tokens": 3, "stop_tokens": (1,)},
        "c": {"top_p": 0.8, "temperature": 1.7, "min_p": 0.05},
        "d": {"temperature": 0},
    }
    together = Sampler(V, seed=0)
    for number, (id, setting) in enumerate(settings.items()):
        together.add(request(id, seed=number, frequency_penalty=0.5, **setting))
    tokens = run(together, list(settings), 20, lambda id, index: random_logits(id, index).to(device))
    for number, (id, setting) in enumerate(settings.items()):
        alone = Sampler(V, seed=99)
        alone.add(request(id, seed=number, frequency_penalty=0.5, **setting))
        assert run(alone, [id], 20, random_logits)[id] == tokens[id]


def test_a_request_goes_on_elsewhere_as_if_here():
    whole = Sampler(V)
    whole.add(request("a", seed=3, presence_penalty=1.0, repetition_penalty=1.3))
    tokens = run(whole, ["a"], 12, random_logits)["a"]
    other = Sampler(V)
    other.add(request("a", seed=3, presence_penalty=1.0, repetition_penalty=1.3), output=tokens[:5])
    rest = run(other, ["a"], 7, lambda id, index: random_logits(id, index + 5))["a"]
    assert tokens == tokens[:5] + rest


def test_requests_without_a_seed_differ_and_follow_the_samplers_seed():
    def drawn(seed):
        sampler = Sampler(V, seed=seed)
        ids = [f"a{number}" for number in range(12)]
        for id in ids:
            sampler.add(request(id))
        return [sampled.token for sampled in sampler(torch.zeros(12, V), ids)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 2


# -- changes of the logits


def test_penalties_by_hand():
    # prompt 1 1 6, output 3 3 0; tokens of the prompt alone meet only the repetition penalty
    settings = {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    state = SequenceState(request(prompt=(1, 1, 6, 2), **settings), seed=0, ends=(), grammar=None)
    for token in (3, 3, 0):
        state.took(token)
    expected = LOGITS.clone()
    expected[1], expected[6], expected[2] = 1.5, 1.25, -4.0
    expected[3] = 2.0 / 2 - 2 * 0.5 - 0.25
    expected[0] = 1.0 / 2 - 0.5 - 0.25
    assert torch.equal(adjust(LOGITS[None].clone(), [state])[0], expected)


def test_penalties_reach_only_their_own_rows():
    sampler = Sampler(V)
    sampler.add(request("a", temperature=0, presence_penalty=2.0), output=(1,))
    sampler.add(request("b", temperature=0))
    assert [sampled.token for sampled in sampler(LOGITS.repeat(2, 1), ["a", "b"])] == [6, 1]


def test_counts_grow_past_their_first_room():
    sampler = Sampler(300)
    sampler.add(request(temperature=0, presence_penalty=1.0, prompt=(299,)))
    tokens = run(sampler, ["a"], 250, lambda id, index: torch.linspace(0, 0.5, 300))["a"]
    assert tokens == list(range(299, 49, -1))  # never one again as long as another is within the penalty


def test_bias_adds_and_forbids():
    assert one(temperature=0, logit_bias=((2, 5.5),)).token == 2
    assert one(temperature=0, logit_bias=((2, 2.75), (2, 2.75))).token == 2
    assert one(temperature=0, logit_bias=((1, -math.inf),)).token == 6
    assert one(temperature=0, logit_bias=tuple((token, -math.inf) for token in range(V))).error is not None


def test_stop_tokens_wait_for_min_tokens():
    sampler = Sampler(V, stop_tokens=(1,))
    sampler.add(request(temperature=0, min_tokens=2, stop_tokens=(6,)))
    assert run(sampler, ["a"], 3, lambda id, index: LOGITS)["a"] == [3, 3, 1]
    sampler.add(request("b", temperature=0, min_tokens=2, stop_tokens=(6,), ignore_eos=True))
    assert sampler(LOGITS[None], ["b"])[0].token == 1  # an end that ends nothing need not wait


# -- log probabilities


def test_logprobs_are_the_models_own():
    raw = LOGITS.log_softmax(0)
    told = one(temperature=0.3, seed=1, logprobs=3, logit_bias=((5, 50.0),), top_k=1).logprob
    assert told.token == 5
    assert told.logprob == pytest.approx(float(raw[5]), abs=1e-6)
    assert [token for token, _ in told.top] == ORDER[:3]
    assert [value for _, value in told.top] == pytest.approx([float(raw[token]) for token in ORDER[:3]], abs=1e-6)


def test_logprobs_add_up_to_one_and_may_name_no_others():
    told = one(temperature=0, logprobs=20).logprob
    assert sum(math.exp(value) for _, value in told.top) == pytest.approx(1, abs=1e-6)
    assert one(temperature=0, logprobs=0).logprob.top == ()
    assert one(temperature=0).logprob is None


def test_rows_ask_for_different_numbers():
    sampler = Sampler(V)
    for id, many in (("a", 2), ("b", None), ("c", 5)):
        sampler.add(request(id, temperature=0, logprobs=many))
    told = [sampled.logprob for sampled in sampler(LOGITS.repeat(3, 1), ["a", "b", "c"])]
    assert told[1] is None
    assert [len(told[0].top), len(told[2].top)] == [2, 5]


# -- errors


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_fail_their_row_alone(value):
    sampler = Sampler(V)
    for id, temperature in (("a", 0), ("b", 0), ("c", 1), ("d", 1)):
        sampler.add(request(id, temperature=temperature, seed=2))
    logits_RV = LOGITS.repeat(4, 1)
    logits_RV[0, 3] = logits_RV[2, 5] = value
    errors = [sampled.error for sampled in sampler(logits_RV, list("abcd"))]
    assert "not numbers" in errors[0]
    assert "not numbers" in errors[2]
    assert errors[1] is errors[3] is None


def test_a_row_with_nothing_allowed_fails_alone():
    sampler = Sampler(V)
    sampler.add(request("a", temperature=1, logit_bias=tuple((token, -math.inf) for token in range(V))))
    sampler.add(request("b", temperature=1, seed=0))
    first, second = sampler(LOGITS.repeat(2, 1), ["a", "b"])
    assert "no token is allowed" in first.error
    assert second.error is None
    assert "not numbers" in one(torch.full((V,), -math.inf), temperature=0).error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_bias": ((V, 1.0),)}, "logit_bias names token 8; tokens are 0 to 7"),
        ({"stop_tokens": (-1,)}, "stop_tokens names token -1"),
    ],
)
def test_what_can_never_be_sampled_is_refused(settings, message):
    sampler = Sampler(V)
    with pytest.raises(InputError, match=message):
        sampler.check(Sampling(**settings))
    assert message in one(sampler=sampler, **settings).error  # and fails its own rows if it comes all the same


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_bias": ((1, math.nan),)}, "logit_bias has the value nan"),
        ({"logit_bias": ((1, math.inf),)}, "logit_bias has the value inf"),
        ({"logit_bias": ((1.5, 1.0),)}, "logit_bias names 1.5"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "1"}, "temperature is '1'; it must be 0 to 100"),
        ({"top_p": -1e-46}, "top_p is -1e-46"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
        ({"max_tokens": None}, "max_tokens is None"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"logprobs": math.nan}, "logprobs is nan"),
    ],
)
def test_settings_that_are_no_numbers_of_theirs_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Sampling(**settings)


SMALL = [0.0, 5e-324, 1e-46, 1e-45, 1.1754944e-38, 1e-30, 1e-8]


def numbers(low, high):
    """Floats of a range, those often at which float32 and float64 differ."""
    edges = [
        value
        for value in (*SMALL, low, high, math.nextafter(low, high), math.nextafter(high, low))
        if low <= value <= high
    ]
    return st.sampled_from(edges) | st.floats(low, high)


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "temperature": numbers(0, 100),
                "top_p": numbers(0, 1),
                "min_p": numbers(0, 1),
                "top_k": st.integers(0, 2**31 - 1),
                "presence_penalty": numbers(-2, 2),
                "frequency_penalty": numbers(-2, 2),
                "repetition_penalty": numbers(0.01, 100),
                "seed": st.none() | st.integers(-(2**70), 2**70),
                "logprobs": st.none() | st.integers(0, 20),
                "logit_bias": st.lists(
                    st.tuples(
                        st.integers(0, V - 2), st.floats(allow_nan=False, allow_infinity=False) | st.just(-math.inf)
                    )
                ).map(tuple),
            },
        ),
        min_size=1,
        max_size=4,
    ),
    scale=st.sampled_from([0.0, 1e-38, 1.0, 1e4, 1e38, 3e38]),
)
@given_settings(max_examples=150, deadline=None)
def test_whatever_is_asked_every_row_gets_a_token(rows, scale):
    sampler = Sampler(V, stop_tokens=(V - 1,), seed=0)
    ids = [str(number) for number in range(len(rows))]
    for id, row in zip(ids, rows, strict=True):
        sampler.add(request(id, **row))
    for step in range(3):
        logits_RV = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(step)).clamp(-1.1, 1.1) * scale
        for sampled, row in zip(sampler(logits_RV, ids), rows, strict=True):
            assert sampled.error is None
            assert 0 <= sampled.token < V
            forbidden = {token for token, value in row.get("logit_bias", ()) if value == -math.inf}
            assert sampled.token not in forbidden


def test_a_grammar_that_cannot_be_followed_fails_its_own_rows():
    assert "needs the model's tokenizer" in one(grammar={}).error
    sampler = Sampler(257, tokenizer=ByteTokenizer())
    assert "'not' not supported" in one(torch.zeros(257), sampler=sampler, grammar={"not": {}}).error


def test_forgotten_requests_are_gone():
    sampler = Sampler(V)
    sampler.add(request())
    assert "a" in sampler
    sampler.forget("a")
    sampler.forget("a")
    assert "a" not in sampler


# -- grammars


def test_a_grammar_holds_whatever_the_logits_and_ends_where_it_may():
    tokenizer = ByteTokenizer()
    sampler = Sampler(tokenizer.vocab_size + 7, stop_tokens=(256,), tokenizer=tokenizer, seed=0)
    grammar = {"enum": ["left", "right"]}
    sampler.add(request("a", grammar=grammar, seed=1))
    sampler.add(request("b", temperature=0, grammar=grammar, min_tokens=50))
    sampler.add(request("c", temperature=0))
    generator = torch.Generator().manual_seed(0)
    tokens = run(
        sampler, ["a", "b", "c"], 12, lambda id, index: torch.randn(tokenizer.vocab_size + 7, generator=generator)
    )
    for id in "ab":
        text = tokens[id][: tokens[id].index(256)]
        assert bytes(text).decode().strip() in ('"left"', '"right"')
        assert set(tokens[id][len(text) :]) == {256}  # after the end, which an engine that runs ahead throws away
    assert any(token > 256 for token in tokens["c"]) or len(set(tokens["c"])) > 5


def test_a_tokenizer_may_have_more_tokens_than_the_model():
    sampler = Sampler(200, stop_tokens=(256,), tokenizer=ByteTokenizer())
    sampler.add(request(grammar={"type": "boolean"}, temperature=0, min_tokens=3))
    tokens = run(sampler, ["a"], 4, lambda id, index: torch.linspace(0, 1, 200))["a"]
    assert bytes(tokens) == b"true"
    assert "no token is allowed" in sampler(torch.zeros(1, 200), ["a"])[0].error  # the end is not among the logits


def test_a_grammar_that_cannot_be_followed_any_further_fails_its_row_alone():
    sampler = Sampler(257, stop_tokens=(256,), tokenizer=ByteTokenizer(), seed=0)
    wide = {"properties": {f"property{n}": {} for n in range(1500)}, "additionalProperties": True, "type": "object"}
    sampler.add(request("a", grammar=wide, temperature=0), output=tuple(b'{"x":1'))
    sampler.add(request("b", grammar={"type": "boolean"}, temperature=0))
    sampler.add(request("c", seed=1))
    results = [sampler(torch.zeros(3, 257), ["a", "b", "c"]) for _ in range(3)]
    errors = [[sampled.error for sampled in row] for row in zip(*results, strict=True)]
    assert any("cannot be followed any further" in (error or "") for error in errors[0])
    assert errors[1] == errors[2] == [None] * 3


def test_a_token_that_does_not_fit_the_grammar_fails_the_request():
    sampler = Sampler(257, stop_tokens=(256,), tokenizer=ByteTokenizer())
    sampler.add(request(grammar={"type": "null"}), output=(ord("x"),))
    assert "does not fit" in sampler(torch.zeros(1, 257), ["a"])[0].error
