"""A step that raises ends the requests alone that it fails for."""

import pytest
import torch

from anabranch.data.tokenizer import ByteTokenizer
from anabranch.errors import AnabranchError
from anabranch.serving import LLM, Finish, Sampling
from anabranch.serving.core.batch import Chunk, Sampled
from anabranch.serving.core.request import Output, Request
from anabranch.serving.engine.isolate import Isolation
from anabranch.serving.sampling import Sampler
from anabranch.serving.sampling import sampler as sampler_module


def chunk(id, *tokens):
    return Chunk(id=id, tokens=tokens or (1,), start=0, blocks=(0,), samples=True)


def failing(*bad, error=ValueError):
    """A step that raises for chunks of these ids, and what it was asked for."""
    asked = []

    def step(chunks, tokens):
        asked.append(([each.id for each in chunks], list(tokens)))
        if any(each.id in bad for each in chunks):
            raise error("a fault")
        return [Sampled(id=each.id, token=each.tokens[-1] + 1) for each in chunks]

    return step, asked


def isolation(step, engine_error=None):
    """With a token of nobody's that works, or raises."""

    def try_out(chunk):
        if engine_error is not None:
            raise engine_error

    return Isolation(step, try_out)


def test_a_step_that_works_is_run_once():
    step, asked = failing()
    assert [each.token for each in isolation(step).run([chunk("a", 1, 2), chunk("b", 3)], [1, 2, 3])] == [3, 4]
    assert asked == [(["a", "b"], [1, 2, 3])]


def test_one_that_fails_ends_whom_it_fails_for_and_the_others_get_theirs(caplog):
    step, asked = failing("b")
    results = isolation(step).run([chunk("a", 1, 2), chunk("b", 3, 4, 5), chunk("c", 6)], [1, 2, 3, 4, 5, 6])
    assert asked[1:] == [(["a"], [1, 2]), (["b"], [3, 4, 5]), (["c"], [6])]
    assert [(each.id, each.token, each.error) for each in results] == [
        ("a", 3, None),
        ("b", 0, "the request failed in a step: ValueError: a fault"),
        ("c", 7, None),
    ]
    assert "a step of 3 requests failed (ValueError: a fault)" in caplog.text


@pytest.mark.parametrize(
    ("bad", "error"), [("ab", ValueError), ("a", ConnectionResetError), ("b", ConnectionResetError)]
)
def test_what_is_no_request_of_it_is_raised(bad, error, caplog):
    step, _ = failing(*bad, error=error)
    with pytest.raises(error, match="a fault"):
        isolation(step, RuntimeError("dead")).run([chunk("a"), chunk("b")], [1, 1])
    assert ("a token of nobody's fails as well" in caplog.text) == (error is ValueError)


@pytest.mark.parametrize("ids", ["a", "ab", "abcd"])
def test_however_many_fail_the_engine_goes_on_where_a_token_of_nobodys_works(ids):
    step, _ = failing("a", "b", "c", "d")
    own = isolation(step)
    for _ in range(4):
        results = own.run([chunk(id) for id in ids], [1] * len(ids))
        assert [result.id for result in results] == list(ids)
        assert all("ValueError: a fault" in result.error for result in results)
    assert own.run([chunk("x")], [1])[0].error is None


def test_a_failure_of_all_that_is_the_engines_is_raised_at_once():
    step, asked = failing("a")
    with pytest.raises(ValueError, match="a fault"):
        isolation(step, RuntimeError("dead")).run([chunk("a")], [1])
    assert len(asked) == 1


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_a_model_that_fails_for_one_prompt_answers_the_others_as_alone(tiny_model, scheduling, caplog):
    model = tiny_model(vocab_size=257)
    options = {"num_blocks": 60, "block_tokens": 4, "scheduling": scheduling}
    sampling = Sampling(max_tokens=12, seed=1, logprobs=2)
    prompts = [tuple(f"prompt {number}".encode()) for number in range(4)]
    alone = [LLM(model, ByteTokenizer(), **options).generate([prompt], sampling)[0].tokens for prompt in prompts]
    llm = LLM(model, ByteTokenizer(), **options)
    step = llm.engine.runner._hidden_of

    def hidden(chunks, tokens, *more):
        if 255 in tokens:
            raise ValueError("a fault")
        return step(chunks, tokens, *more)

    llm.engine.runner._hidden_of = hidden
    with pytest.raises(AnabranchError, match="failed in a step: ValueError: a fault"):
        llm.generate([*prompts, (1, 255)], sampling)
    ended = {output.id: output for output in llm._events if getattr(output, "finish", None) is not None}
    assert [output.finish for output in ended.values()].count(Finish.ERROR) == 1
    assert [answer.tokens for answer in llm.generate(prompts, sampling)] == alone
    told = {}
    for event in llm._events:
        if hasattr(event, "tokens"):
            told[event.id] = told.get(event.id, ()) + event.tokens
    assert list(told.values()) == alone


@pytest.mark.parametrize("scheduling", ["sync", "async"])
@pytest.mark.parametrize(("num_bad", "max_seqs"), [(2, 2), (3, 1), (6, 8)])
def test_an_innocent_that_waits_behind_those_that_fail_is_answered(tiny_model, scheduling, num_bad, max_seqs, caplog):
    model = tiny_model(vocab_size=257)
    sampling = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)
    llm = LLM(model, num_blocks=60, block_tokens=4, scheduling=scheduling, max_seqs=max_seqs)
    alone = llm.generate([(1, 2, 3, 4, 5)], sampling)[0].tokens

    def fail(module, args):
        if (args[0] == 200).any():
            raise ValueError("a fault")

    model.embedding.register_forward_pre_hook(fail)
    prompts = [(7, 200, number) for number in range(num_bad)]
    with pytest.raises(AnabranchError, match="failed in a step: ValueError: a fault"):
        llm.generate([*prompts, (1, 2, 3, 4, 5)], sampling)
    told = {}
    for event in llm._events:
        if isinstance(event, Output):
            told[event.id] = told.get(event.id, ()) + event.tokens
    assert list(told.values()) == [*[()] * num_bad, alone]
    # What they left in the cache is right.
    assert llm.generate([(1, 2, 3, 4, 5)], sampling)[0].tokens == alone


def test_a_token_of_nobodys_leaves_every_block_as_it_was(tiny_model, caplog):
    llm = LLM(tiny_model(vocab_size=257), num_blocks=4, block_tokens=4)
    runner = llm.engine.runner
    runner.pool.key.normal_()
    runner.pool.value.normal_()
    before = runner.pool.key.clone(), runner.pool.value.clone()
    runner._try_out(Chunk(id="a", tokens=(1,), start=4, blocks=(1, 3), samples=True))
    assert torch.equal(runner.pool.key, before[0])
    assert torch.equal(runner.pool.value, before[1])
    runner.model.embedding.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate([(1, 2)], Sampling(max_tokens=1))
    with pytest.raises(AnabranchError, match="the engine has ended: ZeroDivisionError"):
        llm.generate([(1, 2)], Sampling(max_tokens=1))


def test_a_row_that_raises_as_it_is_sampled_fails_alone(monkeypatch, caplog):
    sampler, adjust = Sampler(8, seed=0), sampler_module.adjust

    def raising(logits_SV, states):
        if any(state.sampling.seed == 13 for state in states):
            raise RuntimeError("a fault")
        return adjust(logits_SV, states)

    monkeypatch.setattr(sampler_module, "adjust", raising)
    for id, seed in (("a", 1), ("b", 13), ("c", 2)):
        sampler.add(Request(id=id, prompt=(1,), sampling=Sampling(seed=seed, logprobs=1)))
    first, bad, last = sampler(torch.zeros(3, 8), ["a", "b", "c"])
    assert bad.error == "it could not be sampled: RuntimeError: a fault"
    assert first.error is last.error is None
    assert first.logprob.token == first.token
