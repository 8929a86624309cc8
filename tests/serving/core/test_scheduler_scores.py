"""Prompts that are scored: which rows a step scores, what the cache may give them, and that every score is told once."""

import pytest

from anabranch.errors import InputError
from anabranch.serving.core.batch import Sampled
from anabranch.serving.core.request import Finish, Sampling, TokenLogprob
from scheduler_runs import drive, expected_scores, request, to_end


def scored(id, length=10, *, max_tokens=3, **named):
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=1)
    return request(id, length, sampling=sampling, **named)


def test_each_row_of_a_chunk_scores_the_token_after_it():
    driven = drive(max_batched_tokens=4, block_tokens=2)
    asked = scored("a", 10)
    driven.add(asked)
    seen = []
    while driven.form():
        (chunk,) = driven.formed[0].chunks
        seen.append((chunk.start, len(chunk.tokens), chunk.targets, chunk.first_scored, chunk.samples))
        driven.finish_step()
    prompt = asked.prompt
    assert seen == [
        (0, 4, prompt[1:5], 0, False),
        (4, 4, prompt[5:9], 0, False),
        (8, 2, prompt[9:], 0, True),
        (10, 1, (), 0, True),
        (11, 1, (), 0, True),
    ]
    driven.check_end()
    assert [len(output.prompt_logprobs) for output in driven.seen["a"].outputs] == [4, 4, 1, 0, 0]


def test_who_did_not_ask_is_not_scored():
    driven = drive()
    driven.add(request("a"))
    driven.form()
    (chunk,) = driven.formed[0].chunks
    assert chunk.targets == ()
    to_end(driven)


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_prompt_alone(length, is_async):
    driven = drive(max_batched_tokens=4, is_async=is_async)
    driven.add(scored("a", length, max_tokens=0))
    to_end(driven)
    assert driven.seen["a"].finish is Finish.LENGTH
    assert driven.seen["a"].tokens == []
    assert len(driven.seen["a"].scores) == length - 1
    assert driven.runner.computed == length


def test_a_prompt_alone_may_fill_the_model():
    driven = drive(max_positions=8)
    driven.add(scored("a", 8, max_tokens=0))
    to_end(driven)
    with pytest.raises(InputError, match="the prompt has 8 tokens; with one new token it must fit in 8"):
        driven.add(scored("b", 8, max_tokens=1))
    with pytest.raises(InputError, match="the prompt has 9 tokens; it must fit in 8"):
        driven.add(scored("c", 9, max_tokens=0))


def test_it_uses_no_cached_rows_and_fills_the_cache_for_others():
    driven = drive(block_tokens=4)
    driven.add(request("first", 12, start=5))
    to_end(driven)
    for name, cached in (("scored", 0), ("plain", 8)):
        driven.add((scored if name == "scored" else request)(name, 12, start=5))
        to_end(driven)
        assert driven.seen[name].outputs[0].cached_tokens == cached
    fresh = drive(block_tokens=4)
    fresh.add(scored("scored", 12, start=5))
    fresh.add(request("plain", 12, start=5))  # waits for the one that computes the same prompt just now
    to_end(fresh)
    assert fresh.seen["plain"].outputs[0].cached_tokens == 8
    assert fresh.runner.computed == 12 + 2 + 4 + 4


@pytest.mark.parametrize("is_async", [False, True])
def test_a_preempted_prompt_is_scored_on_from_where_it_was(is_async):
    driven = drive(
        num_blocks=12, block_tokens=2, max_positions=24, max_batched_tokens=5, prefix_cache=True, is_async=is_async
    )
    driven.add(request("first", 4, max_tokens=16))
    for _ in range(4):
        driven.step()
    driven.add(scored("second", 12))
    to_end(driven)  # compares the scores, each of which must have come once
    assert driven.scheduler.stats().counters["preemptions"] > 0
    assert len(driven.seen["second"].outputs) > 2


def test_scores_come_with_an_end_that_is_not_part_of_the_output():
    driven = drive()
    asked = scored("a", 3, max_tokens=4)
    driven.scheduler.add(asked)
    batch = driven.scheduler.schedule()
    told = (TokenLogprob(token=asked.prompt[1], logprob=-1.0), TokenLogprob(token=asked.prompt[2], logprob=-2.0))
    driven.scheduler._states["a"].stop_tokens = frozenset([9])
    (output,) = driven.scheduler.update(batch, [Sampled(id="a", token=9, prompt_logprobs=told)])
    assert (output.tokens, output.finish, output.prompt_logprobs) == ((), Finish.STOP, told)


def test_a_chunk_that_should_be_scored_and_is_not_fails():
    driven = drive(max_batched_tokens=2)
    driven.scheduler.add(scored("a"))
    (output,) = driven.scheduler.update(driven.scheduler.schedule(), [])
    assert output.finish is Finish.ERROR
    assert "gave no token" in output.error


def test_scores_that_were_given_elsewhere_are_not_given_again():
    driven = drive(max_batched_tokens=64)
    asked = scored("a", 10)
    driven.add(asked)
    driven.scheduler.abort("a")
    state = driven.scheduler.add(asked, num_scored=6)
    chunk = driven.scheduler.schedule().chunks[0]
    assert chunk.targets == asked.prompt[7:]
    assert chunk.start + chunk.first_scored == 6
    assert state.num_scored == 9
    assert len(expected_scores(asked)) == 9


@pytest.mark.parametrize("told", [-1, 21])
def test_how_many_may_be_told(told):
    with pytest.raises(InputError, match=f"prompt_logprobs is {told}; it must be 0 to 20"):
        Sampling(prompt_logprobs=told)
