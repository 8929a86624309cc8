"""Log probabilities of prompts are those of one pass over the prompt alone, whatever else goes on in the engine."""

import pytest
import torch

from anabranch import presets
from anabranch.errors import AnabranchError
from anabranch.serving import LLM, Sampling
from anabranch.serving.engine import score
from anabranch.serving.engine.head import StepHead
from anabranch.serving.engine.runner import ModelRunner
from anabranch.serving.nanoflow.runtime import NanoRunner

CLOSE = 1e-4  # chunks and company change the order of sums
LENGTHS = (7, 1, 20, 33, 12, 2, 9, 40)
PLENTY = {"num_blocks": 200, "block_tokens": 4}
SCARCE = {"num_blocks": 14, "block_tokens": 4, "max_batched_tokens": 9, "max_seqs": 4, "long_prefill_chunk": 5}


def prompts_of(model, lengths=LENGTHS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(model.config.vocab_size, (length,), generator=draw).tolist()) for length in lengths]


def scoring(top=2, max_tokens=4, **more):
    return Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=top, **more)


def check(model, answers, top=2):
    """Each answer's scores are the log-softmax of a naive pass."""
    for answer in answers:
        told = answer.output.prompt_logprobs
        assert [one.token for one in told] == list(answer.prompt[1:])
        with torch.no_grad():
            wanted_LV = model(torch.tensor([answer.prompt])).logits_BLV[0].float().log_softmax(-1)
        for row_V, one in zip(wanted_LV, told, strict=False):
            assert one.logprob == pytest.approx(row_V[one.token].item(), abs=CLOSE)
            best_K, _ = row_V.topk(top)
            assert [value for _, value in one.top] == pytest.approx(best_K.tolist(), abs=CLOSE)
            assert [row_V[token].item() for token, _ in one.top] == pytest.approx(best_K.tolist(), abs=CLOSE)


def run(model, prompts, sampling, **options):
    llm = LLM(model, **options)
    answers = llm.generate(prompts, sampling)
    counters = llm.engine.scheduler.stats().counters
    llm.close()
    return answers, counters


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


@pytest.mark.parametrize("use_kernel", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_any_size_of_chunks(model, chunk, use_kernel):
    def make_runner(*args, **options):
        return ModelRunner(*args, use_kernel=use_kernel, **options)

    options = {**PLENTY, "max_batched_tokens": max(chunk, 8), "long_prefill_chunk": chunk, "max_seqs": 3}
    answers, _ = run(model, prompts_of(model), scoring(), make_runner=make_runner, **options)
    check(model, answers)


@pytest.mark.parametrize("scheduling", ["sync", "async"])
@pytest.mark.parametrize("limits", [PLENTY, SCARCE], ids=["plenty", "scarce"])
@pytest.mark.parametrize("name", ["moe", "versatile", "chain", "parscale"])
def test_designs_with_and_without_preemption(name, limits, scheduling):
    model = presets.find(name)("tiny").model.replace(init_std=0.2).build(seed=0).eval()
    prompts = prompts_of(model, (5, 1, 23, 40, 8))
    answers, counters = run(model, prompts, scoring(max_tokens=10), scheduling=scheduling, **limits)
    assert (counters["preemptions"] > 0) == (limits is SCARCE)
    check(model, answers)
    plain, _ = run(model, prompts, scoring(None, max_tokens=10), **PLENTY)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in plain]


def test_several_streams(tiny_model):
    model = tiny_model(streams=2)
    check(model, run(model, prompts_of(model), scoring(), max_batched_tokens=16, **PLENTY)[0])


def test_beside_others_that_do_not_ask(model):
    prompts = prompts_of(model)
    mixed = [scoring(number % 3 if number % 2 else None) for number in range(len(prompts))]
    answers, _ = run(model, prompts, mixed, max_batched_tokens=16, **PLENTY)
    plain, _ = run(model, prompts, scoring(None), **PLENTY)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in plain]
    for number, answer in enumerate(answers):
        if number % 2:
            check(model, [answer], top=number % 3) if number % 3 else None
            assert all(len(one.top) == number % 3 for one in answer.output.prompt_logprobs)
        else:
            assert answer.output.prompt_logprobs == ()


def test_a_warm_prefix_cache(model):
    llm = LLM(model, **PLENTY)
    prompts = prompts_of(model)
    llm.generate(prompts, scoring(None))
    answers = llm.generate(prompts, scoring())
    check(model, answers)
    assert {answer.output.cached_tokens for answer in answers} == {0}
    assert max(answer.output.cached_tokens for answer in llm.generate(prompts, scoring(None))) > 0
    llm.close()


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_prompt_alone(model, deterministic):
    answers, counters = run(model, prompts_of(model), scoring(max_tokens=0), deterministic=deterministic, **PLENTY)
    check(model, answers)
    assert {answer.tokens for answer in answers} == {()}
    assert {answer.finish for answer in answers} == {"length"}
    assert counters["generation_tokens"] == 0


def test_unchanged_by_how_tokens_are_chosen(model):
    odd = scoring(repetition_penalty=1.5, logit_bias=((3, 5.0),), presence_penalty=1.0, logprobs=1, seed=1)
    answers, _ = run(model, prompts_of(model), odd, **PLENTY)
    check(model, answers)
    assert all(len(answer.output.logprobs) == len(answer.tokens) for answer in answers)


def test_scores_and_sampled_log_probabilities_are_of_one_kind(model):
    """What is told of a token that was chosen is told of it again once it is in a prompt."""
    (first,), _ = run(model, prompts_of(model, (6,)), scoring(logprobs=2), **PLENTY)
    (second,), _ = run(model, [first.prompt + first.tokens], scoring(max_tokens=0), **PLENTY)
    again = second.output.prompt_logprobs[-len(first.tokens) :]
    assert [one.token for one in again] == list(first.tokens)
    chosen = [one.logprob for one in first.output.logprobs]
    assert [one.logprob for one in again] == pytest.approx(chosen, abs=CLOSE)


def test_with_routes(model):
    llm = LLM(model, **PLENTY)
    prompts = prompts_of(model)
    answers = llm.generate(prompts, scoring(), record_routing=True)
    check(model, answers)
    plain = llm.generate(prompts, scoring(None), record_routing=True)
    assert [answer.output.routing for answer in answers] == [answer.output.routing for answer in plain]
    llm.close()


def test_with_overlapped_operations(model):
    def make_runner(*args, **options):
        return NanoRunner(*args, min_tokens=4, tile=2, **options)

    check(model, run(model, prompts_of(model), scoring(), make_runner=make_runner, max_batched_tokens=24, **PLENTY)[0])


def test_no_more_logits_at_once_than_a_tile(model, monkeypatch):
    seen = []
    plain = StepHead.plain

    def noting(self, x_RD, first=0):
        seen.append(len(x_RD))
        return plain(self, x_RD, first)

    monkeypatch.setattr(StepHead, "plain", noting)
    monkeypatch.setattr(score, "TILE", 8)
    (prompt,) = prompts_of(model, (30,))
    run(model, [prompt], scoring(None, max_tokens=2), **PLENTY)
    assert seen == [1, 1]  # nobody asked
    seen.clear()
    check(model, run(model, [prompt], scoring(max_tokens=2), **PLENTY)[0])
    assert seen == [8, 8, 8, 5, 1, 1]


def test_a_model_that_gives_no_numbers_ends_the_request(tiny_model):
    model = tiny_model()
    with torch.no_grad():
        model.embedding.weight[3] = float("nan")
    llm = LLM(model, max_batched_tokens=4, **PLENTY)
    with pytest.raises(AnabranchError, match="logits are not numbers"):
        llm.generate([(1, 2, 3, 4, 5, 6, 7)], scoring())
    (alone,) = llm.generate([(1, 2, 4)], Sampling(temperature=0.0, max_tokens=3))
    assert len(alone.tokens) == 3  # the engine goes on for everybody else
    llm.close()
