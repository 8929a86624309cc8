import random
from dataclasses import replace

import pytest

from anabranch.errors import ConfigError, InputError
from anabranch.serving.core.batch import Sampled
from anabranch.serving.core.request import Finish, Request, Sampling, TokenLogprob
from anabranch.serving.core.scheduler import COUNTERS, TURN, Scheduler, SchedulerConfig
from scheduler_runs import RandomTier, Seen, drive, expected, request, to_end

# One step after another


def test_decodes_go_beside_a_prompt_in_chunks():
    driven = drive(max_batched_tokens=10)
    driven.add(request("a", 4))
    driven.step()
    driven.add(request("b", 30))
    sizes = []
    for _ in range(5):
        driven.form()
        (batch,) = driven.formed
        sizes.append({chunk.id: (chunk.start, len(chunk.tokens), chunk.samples) for chunk in batch.chunks})
        driven.finish_step()
    assert sizes[0] == {"a": (4, 1, True), "b": (0, 9, False)}
    assert [size["b"] for size in sizes[:4]] == [(0, 9, False), (9, 9, False), (18, 9, False), (27, 3, True)]
    assert sizes[4] == {"b": (30, 1, True)}  # a has its five tokens
    to_end(driven)


def test_a_prompt_before_decodes_leaves_them_their_tokens():
    driven = drive(max_batched_tokens=6, long_prefill_chunk=None)
    for name in "bc":
        driven.add(request(name, 2, max_tokens=20))
    driven.step()
    driven.add(request("a", 40, priority=-1))
    for _ in range(4):
        driven.form()
        (batch,) = driven.formed
        assert [(chunk.id, len(chunk.tokens)) for chunk in batch.chunks] == (
            [("b", 1), ("c", 1), ("a", 4)] if batch.new else [("a", 4), ("b", 1), ("c", 1)]
        )
        driven.finish_step()
    to_end(driven)


def test_a_long_prompt_lets_others_start():
    driven = drive(max_batched_tokens=20, long_prefill_chunk=8)
    driven.add(request("long", 100))
    driven.add(request("short", 6))
    driven.form()
    assert [(chunk.id, len(chunk.tokens)) for chunk in driven.formed[0].chunks] == [("long", 8), ("short", 6)]
    to_end(driven)


def test_order_is_priority_then_arrival():
    driven = drive(max_seqs=1, num_blocks=64)
    order = [("late", 0, 3.0), ("urgent", -5, 9.0), ("early", 0, 1.0), ("whenever", 7, 0.5), ("early too", 0, 1.0)]
    for name, priority, arrival in order:
        driven.add(request(name, priority=priority, arrival=arrival))
    to_end(driven)
    assert driven.started == ["urgent", "early", "early too", "late", "whenever"]


def test_first_come_first_served_even_if_a_later_one_would_fit():
    driven = drive(num_blocks=8, block_tokens=4, max_positions=32, prefix_cache=False)
    driven.add(request("a", 16, max_tokens=8))
    driven.add(request("big", 28, max_tokens=2))
    driven.add(request("small", 2, max_tokens=2))
    to_end(driven)
    assert driven.started == ["a", "big", "small"]


def test_a_key_with_many_requests_does_not_hold_up_one_with_few():
    driven = drive(max_seqs=1, quantum=16)
    for number in range(40):
        driven.add(request(f"many{number}", 6, key="many"))
    driven.add(request("few", 6, key="few"))
    to_end(driven)
    assert driven.started.index("few") <= 3


def test_a_key_is_charged_for_what_it_uses_and_not_for_what_it_might():
    driven = drive(max_seqs=8, quantum=10)
    for number in range(60):  # each ends with its first token, whatever that is
        for key, max_tokens in (("modest", 5), ("cautious", 150)):
            sampling = Sampling(max_tokens=max_tokens, stop_tokens=tuple(range(7)))
            driven.add(request(f"{key}{number}", 6, key=key, sampling=sampling))
    to_end(driven)
    # For each that runs beside another of its key a reserve has to be saved up; what it did not use pays for those that follow. By what
    # they might use it would be one of fourteen.
    some = [id.startswith("cautious") for id in driven.started[30:70]]
    assert 12 <= sum(some) <= 24


def test_the_last_in_rank_is_sent_back_and_goes_on_first():
    driven = drive(num_blocks=6, block_tokens=4, max_positions=24, prefix_cache=False)
    driven.add(request("a", 7, max_tokens=12))
    driven.add(request("b", 7, max_tokens=12))
    driven.add(request("c", 7, max_tokens=2))
    sent_back = []
    while driven.step():
        counters = driven.scheduler.stats().counters
        sent_back.append(counters["preemptions"])
    driven.check_end()
    assert sent_back[-1] > 0
    ends = [id for id, seen in sorted(driven.seen.items(), key=lambda item: len(item[1].outputs))]
    assert ends[0] == "c"
    tokens_prompt = driven.scheduler.stats().counters["prompt_tokens"]
    assert tokens_prompt == 21, "a prompt counts once, however often it is computed"
    # Told once, with the first output
    for seen in driven.seen.values():
        assert [output.queue_s is None for output in seen.outputs] == [False] + [True] * (len(seen.outputs) - 1)


def test_what_does_not_fit_at_once_waits_instead_of_pushing_others_out():
    driven = drive(num_blocks=8, block_tokens=4, max_positions=32, max_batched_tokens=8, prefix_cache=False)
    for name in "abc":
        driven.add(request(name, 16, max_tokens=3))
    to_end(driven)
    assert driven.scheduler.stats().counters["preemptions"] == 0


def test_a_prompt_that_others_had_is_not_computed_again():
    driven = drive()
    driven.add(request("a", 17, start=1))
    to_end(driven)
    before = driven.runner.computed
    driven.add(request("b", 17, start=1, max_tokens=1))
    to_end(driven)
    assert driven.runner.computed - before == 1
    assert driven.seen["b"].outputs[0].cached_tokens == 16
    driven.add(request("c", 16, start=1, max_tokens=1))  # whole blocks: the last is computed for its logits
    to_end(driven)
    assert driven.seen["c"].outputs[0].cached_tokens == 12
    driven.add(request("d", 17, start=1, max_tokens=1, cache_salt="other"))
    driven.add(request("e", 17, start=1, max_tokens=1, options=(("adapter", "x"),)))
    to_end(driven)
    assert driven.seen["d"].outputs[0].cached_tokens == driven.seen["e"].outputs[0].cached_tokens == 0
    counters = driven.scheduler.stats().counters
    assert (counters["prompt_tokens"], counters["cached_prompt_tokens"]) == (17 * 4 + 16, 28)


def test_answers_are_cached_too_for_the_next_turn_of_a_conversation():
    driven = drive()
    driven.add(request("a", 9, start=1, max_tokens=12))
    to_end(driven)
    turn = (*range(1, 10), *driven.seen["a"].tokens, 5, 5)
    driven.add(Request(id="b", prompt=turn, sampling=Sampling(max_tokens=2)))
    to_end(driven)
    assert driven.seen["b"].outputs[0].cached_tokens == 20  # 9 + 12 tokens, the last of which was never run


def test_choices_of_one_prompt_wait_for_the_first_to_compute_it():
    driven = drive(max_batched_tokens=16)
    for number in range(4):
        driven.add(request(f"choice{number}", 41, start=1, max_tokens=3))
    to_end(driven)
    assert driven.runner.computed <= 41 + 3 * 1 + 4 * 3
    assert driven.scheduler.stats().counters["cached_prompt_tokens"] == 3 * 40


def test_those_who_wait_for_a_prompt_go_on_if_its_first_reader_goes_away():
    driven = drive(max_batched_tokens=16)
    for number in range(3):
        driven.add(request(f"choice{number}", 41, start=1, max_tokens=3))
    driven.step()
    driven.abort("choice0")
    to_end(driven)
    assert driven.seen["choice1"].finish is driven.seen["choice2"].finish is Finish.LENGTH


def test_an_urgent_request_does_not_wait_for_one_that_is_not():
    driven = drive(max_batched_tokens=16, long_prefill_chunk=8)
    driven.add(request("slow", 41, start=1, max_tokens=3, priority=1))
    driven.step()
    driven.add(request("urgent", 41, start=1, max_tokens=3))
    driven.form()
    assert "urgent" in {chunk.id for chunk in driven.formed[0].chunks}
    to_end(driven)


def test_after_a_reset_nothing_from_before_is_found():
    driven = drive()
    driven.add(request("a", 17, start=1, max_tokens=30))
    driven.step()
    driven.add(request("waits", 17, start=1, max_tokens=1))
    assert driven.scheduler.reset_prefixes() == 4
    to_end(driven)  # what "a" fills from now on has the old root
    driven.add(request("b", 17, start=1, max_tokens=1))
    to_end(driven)
    assert driven.seen["waits"].outputs[0].cached_tokens == 0
    assert driven.seen["b"].outputs[0].cached_tokens == 16  # of "waits"


# Ends


def test_ends_by_length_positions_and_stop_tokens():
    driven = drive(max_positions=20, stop_tokens=(3,))
    sampling = Sampling(max_tokens=100, ignore_eos=True)
    driven.add(request("positions", 6, sampling=sampling))
    driven.add(request("length", 6, max_tokens=4))
    found = None
    for start in range(1, 200):  # one whose answer has the model's end early
        wanted = request("stop", 6, start=start, sampling=Sampling(max_tokens=10))
        tokens, finish = expected(wanted, 20, (3,))
        if finish is Finish.STOP and 0 < len(tokens) < 4:
            found = wanted
            break
    driven.add(found)
    as_before = {"start": found.prompt[0]}
    driven.add(request("ignores", 6, sampling=Sampling(max_tokens=10, ignore_eos=True), **as_before))
    driven.add(request("own", 6, sampling=Sampling(max_tokens=10, ignore_eos=True, stop_tokens=(3,)), **as_before))
    driven.add(request("at least", 6, sampling=Sampling(max_tokens=10, min_tokens=len(tokens) + 1), **as_before))
    to_end(driven)
    seen = driven.seen
    assert (len(seen["positions"].tokens), seen["positions"].finish) == (14, Finish.LENGTH)
    assert (len(seen["length"].tokens), seen["length"].finish) == (4, Finish.LENGTH)
    assert seen["stop"].tokens == seen["own"].tokens == tokens
    assert seen["stop"].outputs[-1].tokens == ()
    assert seen["ignores"].tokens[: len(tokens) + 1] == [*tokens, 3]
    assert seen["at least"].tokens[: len(tokens) + 1] == [*tokens, 3]


def test_an_answer_that_is_only_a_stop_token_still_tells_what_was_cached():
    scheduler = Scheduler(SchedulerConfig(num_blocks=4, max_positions=40, stop_tokens=(9,)), clock=lambda: 5.0)
    scheduler.add(Request(id="a", prompt=(1, 2), arrival=2.0))
    batch = scheduler.schedule()
    (output,) = scheduler.update(batch, [Sampled(id="a", token=9)])
    assert (output.tokens, output.finish, output.cached_tokens, output.queue_s) == ((), Finish.STOP, 0, 3.0)


def test_log_probabilities_and_routing_are_passed_on():
    scheduler = Scheduler(SchedulerConfig(num_blocks=4, max_positions=40))
    scheduler.add(Request(id="a", prompt=(1, 2), sampling=Sampling(logprobs=1)))
    batch = scheduler.schedule()
    logprob = TokenLogprob(token=5, logprob=-0.5, top=((5, -0.5),))
    (output,) = scheduler.update(batch, [Sampled(id="a", token=5, logprob=logprob, routing={0: (1, 2)})])
    assert output.tokens == (5,)
    assert output.logprobs == (logprob,)
    assert output.routing == ({0: (1, 2)},)


def test_an_error_ends_its_request_only():
    driven = drive(max_batched_tokens=8)
    driven.add(request("a"))
    driven.add(request("fails in its prompt", 30))
    driven.seen["fails in its prompt"].is_failing = True
    to_end(driven)
    (output,) = driven.seen["fails in its prompt"].outputs
    assert (output.finish, output.error) == (Finish.ERROR, "made to fail")
    assert driven.seen["a"].finish is Finish.LENGTH


def test_a_token_that_is_missing_is_an_error():
    scheduler = Scheduler(SchedulerConfig(num_blocks=4, max_positions=40))
    scheduler.add(Request(id="a", prompt=(1, 2)))
    batch = scheduler.schedule()
    (output,) = scheduler.update(batch, [])
    assert (output.finish, output.error) == (Finish.ERROR, "the step gave no token")
    assert scheduler.pool.num_free == 4


@pytest.mark.parametrize("is_async", [False, True])
def test_abort_in_every_state(is_async):
    driven = drive(max_seqs=2, max_batched_tokens=8, is_async=is_async)
    assert driven.scheduler.abort("unknown") is None
    for name in ("prefill", "decode", "waiting", "under way", "other"):
        driven.add(request(name, 20 if name == "prefill" else 4, max_tokens=30, priority=name == "prefill"))
    driven.abort("waiting")
    driven.step()
    driven.abort("decode")
    driven.step()
    driven.form()
    driven.abort("under way")
    blocks = [block for batch in driven.formed for chunk in batch.chunks for block in chunk.blocks]
    assert all(driven.scheduler.pool.holders(block) for block in blocks)
    while "prefill" not in driven.started:
        driven.step()
    driven.abort("prefill")
    to_end(driven)
    assert driven.seen["other"].finish is Finish.LENGTH
    assert driven.scheduler.stats().counters["finished_abort"] == 4


def test_an_id_can_be_used_again_while_a_step_of_the_old_one_is_under_way():
    driven = drive(is_async=True)
    driven.add(request("a", 9, start=1, max_tokens=9))
    driven.form()
    driven.form()
    driven.abort("a")
    again = request("a", 5, start=50, max_tokens=4)
    driven.add(again)
    driven.form()
    while driven.formed or driven.form():
        batch = driven.formed.popleft()
        for output in driven.scheduler.update(batch, driven.runner.run(batch)):
            driven.seen["a"].tokens += output.tokens
    assert driven.seen["a"].tokens == expected(again, 200)[0]


# What is refused, and what is told


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Request(id="x", prompt=()), "no tokens"),
        (Request(id="x", prompt=tuple(range(40))), "has 40 tokens; with one new token it must fit in 40"),
        (Request(id="x", prompt=(1, -1)), "the token -1"),
        (Request(id="there", prompt=(1,)), "'there' is under way"),
    ],
)
def test_what_can_never_run_is_refused(wrong, message):
    scheduler = Scheduler(SchedulerConfig(num_blocks=10, block_tokens=4, max_positions=50))
    scheduler.add(Request(id="there", prompt=tuple(range(39))))
    with pytest.raises(InputError, match=message):
        scheduler.add(wrong)
    assert scheduler.stats().gauges["waiting"] == 1


def test_policies_that_do_not_fit_the_config_are_refused():
    config = {"num_blocks": 4, "max_positions": 8}
    with pytest.raises(InputError, match="needs prefix_cache"):
        SchedulerConfig(**config, prefix_cache=False).build(tier=RandomTier(random.Random(0)))
    with pytest.raises(InputError, match="needs max_decodes"):
        SchedulerConfig(**config).build(order=lambda ids, size: ids)
    with pytest.raises(ConfigError, match="max_seqs"):
        SchedulerConfig(**config, max_seqs=0)


def test_counters_are_zero_before_traffic_and_gauges_follow():
    driven = drive(max_seqs=1)
    stats = driven.scheduler.stats()
    assert stats.counters == dict.fromkeys(COUNTERS, 0)
    assert stats.gauges["kv_usage_ratio"] == 0
    driven.add(request("a", 8))
    driven.add(request("b", 5))
    driven.form()
    gauges = driven.scheduler.stats().gauges
    assert (gauges["running"], gauges["waiting"], gauges["queued_tokens"]) == (1, 1, 5)
    assert gauges["kv_usage_ratio"] == 2 / 64
    while driven.step():
        pass
    stats = driven.scheduler.stats()
    assert stats.counters["finished_length"] == 2
    assert stats.counters["generation_tokens"] == 10
    assert sum(stats.samples["batch_tokens"]) == 4 + 5 + 4  # since the last picture: all but the first step
    assert driven.scheduler.stats().samples["batch_tokens"] == []


# Pauses


def test_a_paused_request_keeps_its_blocks_while_nobody_needs_them():
    driven = drive()
    driven.add(request("a", max_tokens=20))
    driven.step()
    driven.step()
    held = driven.scheduler.pool.num_free
    driven.pause("a")
    assert not driven.step()
    assert driven.scheduler.pool.num_free == held
    assert driven.scheduler.stats().gauges["paused"] == 1
    driven.resume("a")
    to_end(driven)
    assert driven.scheduler.stats().counters["preemptions"] == 0


def test_a_paused_request_makes_way_for_one_that_waits():
    driven = drive(max_seqs=1)
    driven.add(request("a", max_tokens=20))
    driven.step()
    driven.pause("a")
    driven.add(request("b"))
    while driven.step():
        pass
    assert (driven.seen["b"].finish, driven.seen["a"].finish) == (Finish.LENGTH, None)
    driven.resume("a")
    to_end(driven)


def test_a_paused_request_gives_its_blocks_to_one_that_grows():
    driven = drive(num_blocks=6, max_seqs=2, max_positions=20)  # of 4 tokens each
    driven.add(request("first", 4, max_tokens=2))
    driven.add(request("grows", 4, max_tokens=16))
    driven.add(request("idle", 4, max_tokens=16))
    while driven.seen["first"].finish is None or len(driven.seen["idle"].tokens) < 3:
        driven.step()
    driven.pause("idle")
    while driven.step():
        pass
    assert driven.seen["grows"].finish is Finish.LENGTH
    assert driven.scheduler.stats().counters["preemptions"] == 1
    driven.resume("idle")
    to_end(driven)


def test_pauses_of_nobody_and_ends_of_the_paused():
    driven = drive(max_seqs=1)
    driven.scheduler.pause("nobody")
    driven.scheduler.resume("nobody")
    for name in "ab":
        driven.add(request(name, max_tokens=9))
    driven.step()
    for name in "ab":  # one runs, one waits
        driven.pause(name)
        driven.pause(name)
    assert not driven.step()
    driven.abort("a")
    driven.resume("b")
    to_end(driven)


def test_a_request_goes_on_behind_what_it_gave_elsewhere():
    driven = drive()
    whole = request("a", max_tokens=9)
    tokens, _ = expected(whole, 200)
    driven.add(request("b", max_tokens=2))
    driven.scheduler.add(whole, tokens[:4])
    driven.seen["a"], driven.requests["a"] = Seen(tokens=tokens[:4]), whole
    while driven.step():
        pass
    assert driven.seen["a"].tokens == tokens


@pytest.mark.parametrize("is_async", [False, True])
def test_a_request_waits_after_so_many_new_tokens_until_it_is_told_how_it_goes_on(is_async):
    driven = drive(is_async=is_async)
    for name, turn_every in (("turns", 3), ("other", None)):
        driven.add(replace(request(name, 6, max_tokens=9), turn_every=turn_every))

    def go_to(count):
        """It has so many tokens, is held at once as an engine's loop does it, and gets none beyond."""
        while len(driven.seen["turns"].tokens) < count:
            driven.step()
        driven.scheduler.pause("turns", TURN)
        while driven.step():
            pass
        assert len(driven.seen["turns"].tokens) == count
        assert driven.seen["turns"].finish is None

    go_to(3)
    assert driven.seen["other"].finish is Finish.LENGTH
    # Also for its reader: both have to let it go on.
    driven.pause("turns")
    driven.scheduler.go_on("turns", None)
    assert not driven.step()
    driven.resume("turns")
    go_to(6)
    # Other vectors: all of it is computed again, and nothing of before is found.
    other = replace(driven.requests["turns"], options=(("routing", "other"),))
    driven.runner.requests["turns"] = other
    driven.runner.truth["turns"].clear()
    driven.scheduler.go_on("turns", other)
    driven.form()
    [chunk] = driven.formed[0].chunks
    assert (chunk.start, len(chunk.tokens)) == (0, 12)
    while driven.step():
        pass
    assert driven.seen["turns"].finish is Finish.LENGTH
    assert len(driven.seen["turns"].tokens) == 9
    driven.scheduler.go_on("nobody", None)
