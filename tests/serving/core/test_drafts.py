"""Guesses in a scheduler's steps: what they may take, what becomes of them, and that streams stay what they are alone."""

import random

import pytest

from anabranch.errors import ConfigError, InputError
from anabranch.serving.core.lookup import PromptLookup
from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.core.scheduler import Scheduler, SchedulerConfig
from scheduler_runs import PENDING, RandomTier, drive, random_run, to_end


def looping(id, *, length=8, max_tokens=20, **named):
    """A prompt that repeats, so there is always a guess."""
    sampling = named.pop("sampling", None) or Sampling(max_tokens=max_tokens, ignore_eos=True)
    return Request(id=id, prompt=tuple([1, 2] * (length // 2)), sampling=sampling, **named)


def started(driven, *requests):
    """Their prompts have run, and what they say repeats as their prompts do, so guesses are right."""
    for each in requests:
        driven.add(each)
    while len(driven.scheduler._places.running) < len(requests) or any(
        len(state.tokens) == state.num_prompt for state in driven.scheduler._places.running
    ):
        driven.step()


def drafts(driven):
    driven.form()
    return {chunk.id: chunk.drafts for chunk in driven.formed[-1].chunks}


def guessing(driven, monkeypatch, guess=(3,) * 50):
    """All guesses are these tokens, whatever stood before."""
    monkeypatch.setattr(PromptLookup, "guess", lambda self, tokens, length, most: list(guess[:most]))
    return driven


def test_a_guess_is_of_the_text_and_rows_before_it_sample():
    driven = drive(prompt_lookup=3)
    driven.add(Request(id="a", prompt=(1, 2, 3, 4, 5, 6, 0) * 2, sampling=Sampling(max_tokens=9, ignore_eos=True)))
    driven.step()
    [new] = driven.seen["a"].tokens
    driven.form()
    [chunk] = driven.formed[0].chunks
    assert (chunk.start, chunk.samples, chunk.drafts, chunk.num_samples) == (14, True, 3, 4)
    # What followed the token in the second half of the prompt.
    assert chunk.tokens == tuple((new + at) % 7 for at in range(4))
    driven.finish_step()
    to_end(driven)


def test_off_by_default():
    driven = drive()
    started(driven, looping("a"))
    assert drafts(driven) == {"a": 0}


def test_guesses_take_what_is_left_of_the_budget_in_turn(monkeypatch):
    driven = guessing(drive(prompt_lookup=4, max_batched_tokens=5), monkeypatch, (-5,) * 8)
    started(driven, looping("a", arrival=2.0), looping("b", arrival=1.0), looping("c", arrival=3.0))
    given = {"a": 0, "b": 0, "c": 0}
    for _ in range(3):
        counts = drafts(driven)
        assert sum(counts.values()) == 2
        given = {id: given[id] + count for id, count in counts.items()}
        driven.finish_step()
    assert given == {"a": 2, "b": 2, "c": 2}
    to_end(driven)


def test_beside_others_there_are_no_more_guesses_than_requests_that_decode(monkeypatch):
    driven = guessing(drive(prompt_lookup=50, max_batched_tokens=64, num_blocks=100), monkeypatch, (-5,) * 50)
    started(driven, looping("hog", max_tokens=40))
    assert drafts(driven) == {"hog": 38}
    driven.finish_step()
    for number in range(3):
        driven.add(
            Request(id=f"r{number}", prompt=(5, 6, 7, number), sampling=Sampling(max_tokens=12, ignore_eos=True))
        )
    driven.step()
    # Only the first of them guesses, and takes what the others leave.
    monkeypatch.setattr(PromptLookup, "guess", lambda self, tokens, length, most: [-5] * most if tokens[0] == 1 else [])
    assert drafts(driven) == {"hog": 4, "r0": 0, "r1": 0, "r2": 0}
    driven.finish_step()
    while driven.form():
        chunks = driven.formed[0].chunks
        if len(chunks) > 1:
            decodes = [chunk for chunk in chunks if len(chunk.tokens) - chunk.drafts == 1]
            assert sum(chunk.drafts for chunk in chunks) <= len(decodes)
        driven.finish_step()


def test_a_guess_takes_no_block_that_may_be_found_again(monkeypatch):
    """The cache is full of the prefix of another: wrong guesses leave all of it there."""
    driven = guessing(
        drive(prompt_lookup=40, block_tokens=2, num_blocks=24, max_batched_tokens=64), monkeypatch, (-5,) * 40
    )
    driven.add(Request(id="first", prompt=tuple(range(40)), sampling=Sampling(max_tokens=1, ignore_eos=True)))
    to_end(driven)
    assert driven.scheduler.pool.num_cached == 20
    started(driven, looping("a", length=4, max_tokens=4))
    while driven.step():
        pass
    counters = driven.scheduler.stats().counters
    assert counters["drafted_tokens"] > 0
    assert counters["evicted_blocks"] == 0
    driven.add(Request(id="again", prompt=tuple(range(40)), sampling=Sampling(max_tokens=1, ignore_eos=True)))
    to_end(driven)
    assert driven.seen["again"].outputs[0].cached_tokens == 38


def test_a_long_text_is_read_in_pieces(monkeypatch):
    monkeypatch.setattr("anabranch.serving.core.drafts.MOST_READ", 10)
    driven = drive(prompt_lookup=2, max_batched_tokens=64, num_blocks=100)
    started(driven, looping("a", length=32, max_tokens=20), looping("b", length=8, max_tokens=20))
    states = {state.request.id: state for state in driven.scheduler.states()}

    def read():
        return sum(len(state.lookup._before) for state in states.values() if state.lookup is not None)

    steps = 0
    while any(state.lookup is None or state.lookup.missing(state.num_prompt) for state in states.values()):
        before = read()
        assert driven.step()
        assert read() - before <= 10
        steps += 1
    assert steps >= 4
    to_end(driven)
    assert driven.scheduler.stats().counters["drafted_tokens"]


def test_a_prompt_goes_before_guesses(monkeypatch):
    driven = guessing(drive(prompt_lookup=4, max_batched_tokens=8), monkeypatch)
    started(driven, looping("a", max_tokens=50))
    driven.add(Request(id="new", prompt=tuple(range(12)), sampling=Sampling(max_tokens=1)))
    assert drafts(driven) == {"a": 0, "new": 0}
    assert [len(chunk.tokens) for chunk in driven.formed[0].chunks] == [1, 7]
    driven.finish_step()
    assert drafts(driven) == {"a": 1, "new": 0}
    driven.finish_step()
    to_end(driven)


@pytest.mark.parametrize(("max_tokens", "most"), [(2, 0), (3, 1), (5, 3), (40, 8)])
def test_no_guess_is_beyond_the_last_token(monkeypatch, max_tokens, most):
    driven = guessing(drive(prompt_lookup=8), monkeypatch)
    started(driven, looping("a", max_tokens=max_tokens))
    assert drafts(driven) == {"a": most}
    driven.finish_step()
    to_end(driven)


def test_no_guess_is_an_end_of_the_text_or_behind_one(monkeypatch):
    driven = guessing(drive(prompt_lookup=4), monkeypatch, (5, 3, 6, 5))
    started(driven, looping("a", sampling=Sampling(max_tokens=30, stop_tokens=(6,), min_tokens=30)))
    assert drafts(driven) == {"a": 2}
    driven.finish_step()
    to_end(driven)


def test_blocks_of_guesses_go_back_when_the_step_has_run(monkeypatch):
    driven = guessing(drive(prompt_lookup=8, block_tokens=2, num_blocks=16, prefix_cache=False), monkeypatch, (-5,) * 8)
    started(driven, looping("a", length=6))
    pool, before = driven.scheduler.pool, driven.scheduler.pool.num_free
    assert drafts(driven) == {"a": 8}
    assert before - pool.num_free == 5
    driven.finish_step()
    assert before - pool.num_free == 1


def test_guesses_stay_in_the_blocks_there_are_where_none_is_free(monkeypatch):
    driven = guessing(drive(prompt_lookup=8, block_tokens=4, num_blocks=3, prefix_cache=False), monkeypatch)
    started(driven, looping("a", length=8, max_tokens=4))
    assert drafts(driven) == {"a": 2}
    driven.finish_step()
    to_end(driven)


def test_nobody_is_sent_back_for_a_guess(monkeypatch):
    """The same two requests, which fill the cache together, without guesses and with wrong ones."""
    preemptions = []
    for changes in ({}, {"prompt_lookup": 8}):
        driven = drive(block_tokens=2, num_blocks=24, prefix_cache=False, **changes)
        guessing(driven, monkeypatch, (-5,) * 8)
        for name in "ab":
            driven.add(looping(name, length=8, max_tokens=16))
        to_end(driven)
        preemptions.append(driven.scheduler.stats().counters["preemptions"])
    assert preemptions == [0, 0]


def test_what_is_guessed_wrong_is_never_found_by_others(monkeypatch):
    """Every block that the prefix cache has is of tokens that a request has: what it holds is what a request alone would store."""
    driven = guessing(drive(prompt_lookup=8, block_tokens=1, num_blocks=200), monkeypatch, (3, 1, 4, 1, 5, 2, 6, 5))
    started(driven, looping("a", max_tokens=30))
    to_end(driven)
    counters = driven.scheduler.stats().counters
    assert counters["drafted_tokens"] > counters["accepted_draft_tokens"] > 0
    # The same text again, and every beginning of it with another end.
    text = (*driven.requests["a"].prompt, *driven.seen["a"].tokens)
    driven.add(Request(id="whole", prompt=(*text, 0), sampling=Sampling(max_tokens=1, ignore_eos=True)))
    to_end(driven)
    assert driven.seen["whole"].outputs[0].cached_tokens == len(text) - 1
    for end in range(2, len(text)):
        driven.add(Request(id=f"r{end}", prompt=(*text[:end], 0), sampling=Sampling(max_tokens=3, ignore_eos=True)))
    to_end(driven)
    assert driven.scheduler.stats().counters["cached_prompt_tokens"] > 100


def test_accepted_tokens_are_told_together_and_counted(monkeypatch):
    driven = drive(prompt_lookup=3, block_tokens=4)
    started(driven, looping("a", max_tokens=9))
    alone = drive()
    alone.add(looping("a", max_tokens=9))
    to_end(alone)
    said = alone.seen["a"].tokens
    guessing(driven, monkeypatch, (said[1], said[2], -5))
    driven.step()
    assert driven.seen["a"].outputs[-1].tokens == tuple(said[1:4])
    driven.form()
    [chunk] = driven.formed[0].chunks
    # What held is not computed again.
    assert (chunk.start, chunk.tokens[0]) == (8 + 3, said[3])
    counters = driven.scheduler.stats().counters
    assert (counters["drafted_tokens"], counters["accepted_draft_tokens"]) == (3, 2)
    assert counters["generation_tokens"] == 4


def test_a_text_whose_guesses_are_wrong_is_given_fewer_and_with_right_ones_more_again(monkeypatch):
    """`PromptLookup` hears what became of each guess: whatever it says, here is the wrong token, and then the right ones."""
    driven = drive(prompt_lookup=8, num_blocks=100)
    alone = drive(num_blocks=100)
    for each in (driven, alone):
        started(each, looping("a", max_tokens=60))
    to_end(alone)
    said, guess, is_right = alone.seen["a"].tokens, PromptLookup.guess, False

    def judged(self, tokens, length, most):
        count = len(guess(self, tokens, length, most))
        after = length - 8
        return said[after : after + count] if is_right else [-5] * count

    monkeypatch.setattr(PromptLookup, "guess", judged)
    # As if any token stood before, so that how much is guessed depends on nothing but what was learned.
    monkeypatch.setattr(PromptLookup, "_find", lambda self, tokens, end: 0)
    counts = []
    for step in range(8):
        is_right = step >= 5
        counts.append(drafts(driven)["a"])
        driven.finish_step()
    assert counts == [8, 4, 2, 1, 1, 1, 2, 4]
    to_end(driven)


def test_one_that_is_aborted_or_paused_while_guesses_run(monkeypatch):
    driven = guessing(drive(prompt_lookup=4, num_blocks=40), monkeypatch)
    started(driven, looping("a"), looping("b"), looping("c"))
    driven.form()
    driven.abort("a")
    driven.pause("b")
    driven.finish_step()
    assert not driven.scheduler._tables.kinds[0].num_held
    driven.resume("b")
    to_end(driven)


def test_steps_formed_ahead_have_no_tokens_to_look_up():
    with pytest.raises(InputError, match=r"prompt_lookup is 2; .* is_async must be false"):
        Scheduler(SchedulerConfig(num_blocks=4, max_positions=8, prompt_lookup=2, is_async=True))


@pytest.mark.parametrize("changes", [{"prompt_lookup": -1}, {"prompt_lookup": 65}, {"prompt_lookup_ngram": 0}])
def test_numbers_that_cannot_be(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        SchedulerConfig(num_blocks=4, max_positions=8, **changes)


def test_no_token_of_a_guess_is_one_that_nobody_knows(monkeypatch):
    driven = drive(prompt_lookup=4)
    started(driven, looping("a"))
    while driven.form():
        assert all(PENDING not in chunk.tokens for chunk in driven.formed[0].chunks)
        driven.finish_step()


def lives(seeds, **arguments):
    counts = {"drafted_tokens": 0, "accepted_draft_tokens": 0, "preemptions": 0, "swapped_in_blocks": 0}
    for seed in seeds:
        tier = RandomTier(random.Random(seed)) if seed % 3 == 0 else None
        counters = (
            random_run(seed, pauses=0.1 * (seed % 2), has_drafts=True, tier=tier, **arguments)
            .scheduler.stats()
            .counters
        )
        for name in counts:
            counts[name] += counters[name]
    return counts


def test_random_lives_with_guesses_give_what_each_request_gives_alone():
    counts = lives(range(60))
    assert counts["drafted_tokens"] > 4 * counts["accepted_draft_tokens"] > 200
    assert counts["preemptions"] > 10
    assert counts["swapped_in_blocks"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 5000, 1000))
def test_thousands_of_random_lives_with_guesses(first):
    lives(range(first, first + 1000))
