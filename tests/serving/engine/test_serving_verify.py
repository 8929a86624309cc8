"""Tokens that are guessed change nothing but when tokens come: greedy or sampled, with every option, whoever is beside them."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch import presets
from anabranch.errors import ConfigError
from anabranch.nn.kernels import load
from anabranch.routing import record_routing
from anabranch.serving import LLM, Sampling, ServingConfig
from anabranch.serving.core.batch import Batch, Chunk, Sampled
from anabranch.serving.core.request import Request
from anabranch.serving.engine import ModelRunner
from anabranch.serving.engine.messages import Add
from anabranch.serving.engine.verify import sampled_rows, verify, without_drafts
from anabranch.serving.grammar import regex
from anabranch.serving.http.serve import ServeConfig
from anabranch.serving.sampling import Sampler

PLENTY = {"num_blocks": 200, "block_tokens": 4}
SCARCE = {"num_blocks": 18, "block_tokens": 4, "max_batched_tokens": 13, "max_seqs": 4, "long_prefill_chunk": 5}
LIMITS = (PLENTY, SCARCE)
GREEDY = Sampling(temperature=0.0, max_tokens=24, ignore_eos=True)
# Few tokens to choose from, so what is said repeats.
FEW = Sampling(temperature=0.0, max_tokens=24, ignore_eos=True, logit_bias=tuple((token, 50.0) for token in (1, 2, 3)))
REPEATING = [(1, 2, 3) * 4, (7,), (5, 6) * 5, tuple(range(20)), (4, 4, 4, 4)]


# What a step's logits give


class Scripted:
    """A sampler that takes the largest logit, and says who was asked; it raises, or gives an error, at some number of its calls."""

    def __init__(self, raises=None, error=None):
        self.asked, self._raises, self._error = [], raises, error

    def __call__(self, logits_RV, ids):
        self.asked.append(list(ids))
        if len(self.asked) == self._raises:
            raise ValueError("a fault")
        error = "broken" if len(self.asked) == self._error else None
        return [Sampled(id=id, token=int(row.argmax()), error=error) for id, row in zip(ids, logits_RV, strict=True)]


def chunk(id, *tokens, drafts=0, samples=True):
    return Chunk(id=id, tokens=tokens, start=0, blocks=(0,), samples=samples, drafts=drafts)


def logits(*tokens):
    return torch.eye(10)[list(tokens)]


def given_tokens(results):
    return {result.id: [result.token, *(each.token for each in result.later)] for result in results}


def test_rows_that_sample_are_the_last_one_and_those_before_guesses():
    chunks = [chunk("a", 1, 2, 3), chunk("b", 4, 5, samples=False), chunk("c", 1, 8, 9, drafts=2), chunk("d", 3)]
    assert sampled_rows(chunks) == [2, 5, 6, 7, 8]


def test_a_step_without_guesses_is_sampled_at_once():
    sampler = Scripted()
    assert given_tokens(verify(sampler, logits(3, 4), [chunk("a", 1, 2), chunk("b", 1)])) == {"a": [3], "b": [4]}
    assert sampler.asked == [["a", "b"]]


def test_guesses_hold_up_to_the_first_that_does_not_and_one_token_is_its_own():
    sampler = Scripted()
    chunks = [
        chunk("a", 1, 5, 6, 7, drafts=3),
        chunk("b", 2),
        chunk("c", 3, 8, drafts=1),
        chunk("d", 4, 9, 9, drafts=2),
    ]
    results = verify(sampler, logits(5, 6, 0, 1, 2, 8, 3, 4, 9, 9), chunks)
    assert given_tokens(results) == {"a": [5, 6, 0], "b": [2], "c": [8, 3], "d": [4]}
    # Nobody is asked for a row whose guess did not hold.
    assert sampler.asked == [["a", "b", "c", "d"], ["a", "c"], ["a"]]


def test_a_row_behind_a_guess_that_cannot_be_sampled_is_left_to_the_next_step(caplog):
    for sampler in (Scripted(raises=2), Scripted(error=2)):
        [result] = verify(sampler, logits(5, 6, 7), [chunk("a", 1, 5, 6, drafts=2)])
        assert (result.token, result.error, result.later) == (5, None, ())
    assert "guessed tokens of a step could not be sampled" in caplog.text
    with pytest.raises(ValueError, match="a fault"):
        verify(Scripted(raises=1), logits(5, 6, 7), [chunk("a", 1, 5, 6, drafts=2)])


def test_behind_a_row_that_failed_no_guess_holds():
    """A failed row has no token; what stands in its place, a 0, is not one that was taken."""
    sampler = Scripted(error=1)
    [result] = verify(sampler, logits(0, 6, 7), [chunk("a", 1, 0, 6, drafts=2)])
    assert (result.token, result.error, result.later) == (0, "broken", ())
    assert sampler.asked == [["a"]]


def test_a_step_without_its_guesses():
    batch = without_drafts(Batch(step=3, chunks=(chunk("a", 1, 5, 6, drafts=2), chunk("b", 2, 3))))
    assert [(each.tokens, each.drafts) for each in batch.chunks] == [((1,), 0), ((2, 3), 0)]


# What an engine gives


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


def run(model, prompts, sampling, *, request=None, **options):
    """What each was told, and the counters."""
    llm = LLM(model, seed=0, **options)
    answers = [told(answer) for answer in llm.generate(prompts, sampling, **(request or {}))]
    counters = llm.engine.scheduler.stats().counters
    llm.close()
    return answers, counters


def told(answer):
    output = answer.output
    return answer.tokens, answer.finish, [each.token for each in output.logprobs], output.routing


def same(model, prompts, sampling, **options):
    """With guesses and without; the counters of the former."""
    plain, before = run(model, prompts, sampling, **options)
    guessed, counters = run(model, prompts, sampling, prompt_lookup=5, **options)
    assert guessed == plain
    assert before["drafted_tokens"] == 0
    assert counters["generation_tokens"] == before["generation_tokens"]
    return counters


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("use_kernel", [True, False])
@pytest.mark.parametrize("limits", LIMITS, ids=["plenty", "scarce"])
def test_greedy_tokens_and_their_routes(tiny_model, limits, use_kernel, streams):
    def make_runner(*arguments, **options):
        return ModelRunner(*arguments, use_kernel=use_kernel, **options)

    model = tiny_model(streams)
    counters = same(model, REPEATING, GREEDY, make_runner=make_runner, request={"record_routing": True}, **limits)
    assert counters["accepted_draft_tokens"] > 10
    assert (counters["preemptions"] > 0) == (limits is SCARCE)


def test_a_text_that_repeats_takes_fewer_steps(model):
    steps = [run(model, [(1, 2, 3) * 4], FEW, prompt_lookup=number, **PLENTY)[1]["steps"] for number in (0, 5)]
    assert steps[1] < 0.7 * steps[0]


options = st.builds(
    Sampling,
    max_tokens=st.integers(1, 20),
    min_tokens=st.sampled_from([0, 0, 6]),
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 99),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7]),
    logit_bias=st.sampled_from([(), ((3, 4.0), (5, 3.0))]),
    stop_tokens=st.sampled_from([(), (3,), (1, 2, 9)]),
    logprobs=st.sampled_from([None, None, 0, 3]),
    prompt_logprobs=st.sampled_from([None, None, None, 1]),
)
prompts = st.builds(
    lambda part, times, rest: tuple(part * times + rest),
    st.lists(st.integers(0, 30), min_size=1, max_size=5),
    st.integers(1, 4),
    st.lists(st.integers(0, 30), max_size=3),
)
asked = st.lists(st.tuples(prompts, options), min_size=1, max_size=6)


def outputs_of(model, requests, **limits):
    llm = LLM(model, seed=0, **limits)
    answers = llm.generate([prompt for prompt, _ in requests], [sampling for _, sampling in requests])
    llm.close()
    return [(*told(answer), answer.output) for answer in answers]


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked, st.sampled_from(LIMITS), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_random_requests(model, requests, limits, most, ngram, prefix_cache):
    limits = {**limits, "prefix_cache": prefix_cache}
    plain = outputs_of(model, requests, **limits)
    guessed = outputs_of(model, requests, prompt_lookup=most, prompt_lookup_ngram=ngram, **limits)
    for one, other in zip(plain, guessed, strict=True):
        assert other[:4] == one[:4]
        for name in ("logprobs", "prompt_logprobs"):
            for mine, theirs in zip(getattr(one[4], name), getattr(other[4], name), strict=True):
                assert theirs.logprob == pytest.approx(mine.logprob, abs=1e-4)
                assert [token for token, _ in theirs.top] == [token for token, _ in mine.top]


@pytest.mark.slow
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(asked, st.sampled_from(LIMITS), st.integers(1, 9), st.integers(1, 4))
def test_many_random_requests(model, requests, limits, most, ngram):
    plain = [each[:4] for each in outputs_of(model, requests, **limits)]
    guessed = outputs_of(model, requests, prompt_lookup=most, prompt_lookup_ngram=ngram, **limits)
    assert [each[:4] for each in guessed] == plain


@pytest.mark.skipif(load() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["moe-lossfree", pytest.param("rmoe", marks=pytest.mark.slow)])
def test_deterministic_logits_are_those_of_plain_decoding_to_the_bit(name):
    """Of every token that is told, beside others and alone, guessed or not."""
    model = presets.find(name)("tiny").model.replace(init_std=0.2).build(seed=0)
    sampling = Sampling(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=5)

    def told(prompts, **options):
        llm = LLM(model, deterministic=True, **options)
        answers = llm.generate(prompts, sampling)
        llm.close()
        return [(answer.tokens, answer.output.logprobs) for answer in answers]

    plain = told(REPEATING, **PLENTY)
    assert told(REPEATING, prompt_lookup=5, **PLENTY) == plain
    assert told(REPEATING, prompt_lookup=5, **SCARCE) == plain
    assert told(REPEATING[:1], prompt_lookup=3, **PLENTY) == plain[:1]


@pytest.mark.parametrize("name", sorted({"rmoe", "chain", "versatile", "parscale"} & set(presets.PRESETS)))
def test_designs_that_carry_more_than_keys_and_values_down_the_layers(name):
    model = presets.find(name)("tiny").model.replace(init_std=0.2).build(seed=0)
    assert same(model, REPEATING, FEW, **SCARCE)["accepted_draft_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_design(name):
    model = presets.find(name)("tiny").model.replace(init_std=0.2).build(seed=0)
    assert same(model, REPEATING, FEW, **SCARCE)["accepted_draft_tokens"] > 0


def test_guesses_of_others_change_nobodys_tokens(model):
    """Who wants no two tokens alike, and so has no guess that holds, beside those whose guesses all do."""
    alone = Sampling(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True, frequency_penalty=2.0, logprobs=2)
    [wanted], _ = run(model, REPEATING[3:4], alone, **PLENTY)
    crowd = [Sampling(temperature=0.0, max_tokens=40, ignore_eos=True, logit_bias=((9, 1e3),))] * 6
    answers, counters = run(model, [REPEATING[3]] + [(9,) * 8] * 6, [alone, *crowd], prompt_lookup=8, **PLENTY)
    assert answers[0] == wanted
    assert all(tokens == (9,) * 40 for tokens, *_ in answers[1:])
    assert counters["accepted_draft_tokens"] > 100


def test_what_listens_in_the_model_is_told_of_tokens_and_not_of_guesses(model):
    traces = []
    for number in (0, 5):
        with record_routing(model) as recorder:
            answers, counters = run(model, REPEATING, GREEDY, prompt_lookup=number, **PLENTY)
        trace = recorder.trace()
        found = {}
        for layer, decided in trace:
            columns = decided.item_N, decided.position_N, decided.token_N, decided.index_NK
            for item, position, token, index_K in zip(*(column.tolist() for column in columns), strict=True):
                assert (layer.layer, position) not in found.setdefault(item, {})
                found[item][layer.layer, position] = token, tuple(index_K)
        traces.append((answers, {frozenset(decided.items()) for decided in found.values()}))
    assert counters["drafted_tokens"] > counters["accepted_draft_tokens"] == 0
    assert traces[0] == traces[1]


def test_grammars_follow_the_tokens_that_were_taken():
    from anabranch.data import ByteTokenizer
    from serving_models import small_moe

    model, found = small_moe(), []
    prompts = [tuple(b"abcabcabc"), tuple(b"xyz")]
    each = [
        Sampling(grammar=regex("(abc){3,8}x"), max_tokens=30, temperature=0.0),
        Sampling(grammar={"enum": ["xyzxyzxyzxyz", "xyzxyz"]}, max_tokens=30, temperature=1.0, seed=1),
    ]
    for number in (0, 6):
        llm = LLM(model, ByteTokenizer(), prompt_lookup=number, **PLENTY)
        found.append([(answer.text, answer.finish) for answer in llm.generate(prompts, each)])
        counters = llm.engine.scheduler.stats().counters
        llm.close()
    assert found[0] == found[1]
    assert counters["accepted_draft_tokens"] > 8
    assert counters["accepted_draft_tokens"] < counters["drafted_tokens"]


def test_a_sampler_that_raises_at_a_guess_takes_nothing_twice(model, caplog):
    """Others go on with their own random numbers, as if nothing had been guessed."""
    plain, _ = run(model, REPEATING, Sampling(temperature=0.8, seed=1, max_tokens=16, ignore_eos=True), **PLENTY)

    class Fails(Sampler):
        calls = 0

        def __call__(self, logits_RV, ids):
            self.calls += 1
            if len(ids) < 5 and self.calls % 2 == 0 and self.calls < 20:
                raise ValueError("a fault")
            return super().__call__(logits_RV, ids)

    sampling = Sampling(temperature=0.8, seed=1, max_tokens=16, ignore_eos=True)
    sampler = Fails(model.config.vocab_size)
    answers, _ = run(model, REPEATING, sampling, prompt_lookup=4, sampler=sampler, **PLENTY)
    assert answers == plain
    assert "guessed tokens of a step could not be sampled" in caplog.text


def test_requests_that_come_later_find_no_guess_in_the_prefix_cache(model):
    """What was said is asked again, with every end."""
    llm = LLM(model, prompt_lookup=6, num_blocks=400, block_tokens=2)
    plain = LLM(model, num_blocks=400, block_tokens=2, prefix_cache=False)
    [first] = llm.generate([REPEATING[0]], GREEDY)
    text = (*REPEATING[0], *first.tokens)
    again = [(*text[:end], 11) for end in range(4, len(text), 3)]
    wanted = [answer.tokens for answer in plain.generate(again, GREEDY)]
    assert [answer.tokens for answer in llm.generate(again, GREEDY)] == wanted
    assert llm.engine.scheduler.stats().counters["cached_prompt_tokens"] > 50
    llm.close()
    plain.close()


def test_requests_that_come_while_others_are_guessed(model):
    """They join in the middle, step by step."""
    found = []
    for number in (0, 5):
        llm = LLM(model, prompt_lookup=number, **SCARCE)
        events, loop = llm._events, llm._loop
        for at, prompt in enumerate(REPEATING):
            loop.put(Add(Request(id=f"r{at}", prompt=prompt, sampling=GREEDY)))
            for _ in range(3):
                loop._turn()
        loop.run(until_idle=True)
        said = {f"r{at}": () for at in range(len(REPEATING))}
        for event in events:
            if getattr(event, "tokens", ()):
                said[event.id] += event.tokens
        found.append(said)
        llm.close()
    assert found[0] == found[1]


# What a config may say


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_lookup": 4, "scheduling": "async"}, "before the next one is formed; leave scheduling='async' out"),
        ({"prompt_lookup": 4, "nano_batches": True}, "leave nano_batches out"),
        (
            {"prompt_lookup": 4, "expert_budget": "1MiB"},
            "load experts for guesses that do not hold; leave expert_budget out",
        ),
        ({"prompt_lookup_ngram": 2}, "prompt_lookup_ngram is 2, but prompt_lookup is 0"),
        ({"prompt_lookup": -1}, "prompt_lookup"),
        ({"prompt_lookup": 4, "prompt_lookup_ngram": 0}, "prompt_lookup_ngram"),
    ],
)
def test_what_contradicts_itself(changes, message):
    with pytest.raises(ConfigError, match=message):
        ServingConfig(**changes)


def test_a_group_of_devices_does_not_guess():
    with pytest.raises(ConfigError, match=r"devices is 2, but engine\.prompt_lookup is for one engine"):
        ServeConfig(engine=ServingConfig(prompt_lookup=4), devices=2)


def test_steps_are_formed_one_by_one_where_nobody_says():
    assert ServingConfig(device="cuda").is_async
    assert not ServingConfig(device="cuda", prompt_lookup=4).is_async
