"""Several answers to a hard step: how many are drawn, which is taken, what they cost to the token, and that a run goes on without them."""

import asyncio
import json
from dataclasses import replace

import pytest

from anabranch.errors import BackendError, InputError
from anabranch.routers.contract.ask import Answered, Arm
from anabranch.routers.scale import Budget, Given, Oracle, Score, SelectiveReasoner, Settings, System, Trace
from anabranch.routers.scale.several import UNKNOWN, Room, rules_of, vote
from scale_scripted import STEPS, Models

FIVE = Settings(samples2=5, batch2=2)


class Left:
    """Calls of a run, as far as room is looked for."""

    def __init__(self, left=float("inf"), room=float("inf"), exhausted=""):
        self.left, self.room, self.exhausted = left, room, exhausted


def voted(says, settings=FIVE, score=None, calls=None, short=(), most=None, later=0, expected=16):
    """What came of a vote of answers that say so, and the numbers and limits that they were asked with."""
    asked, script, ends = [], list(says), list(short)

    async def ask(number, limit):
        asked.append((number, limit))
        said = script[number % len(script)]
        if isinstance(said, Exception):
            raise said
        return said if isinstance(said, Answered) else Answered.saying(said)

    is_short = lambda: ends.pop(0) if ends else False  # noqa: E731
    room = Room(calls or Left(), most=most, later=later, is_short=is_short, expected=lambda: expected)
    found = asyncio.run(vote(ask, rules_of(settings, score), room))
    return found, asked, room


def test_the_commonest_answer_is_taken_and_of_equally_common_ones_the_first():
    found, asked, _ = voted([r"so \boxed{4}", "it is \n\\boxed{5}", r"\boxed{5}", r"\boxed{6}", r"\boxed{7}"])
    assert (found.taken.text, found.samples, found.agreed) == ("it is \n\\boxed{5}", 5, 2)
    # Two at a time, each by its number.
    assert [number for number, _ in asked] == [0, 1, 2, 3, 4]
    assert found.reason == "budget"
    found, _, _ = voted([r"\boxed{1}", r"\boxed{2}"], replace(FIVE, samples2=2))
    assert (found.taken.text, found.agreed) == (r"\boxed{1}", 1)


def test_it_ends_where_the_vote_is_decided():
    """Four to nothing: P(Beta(5, 1) > 1/2) = 1 - 1/32, above 0.95; three are 1 - 1/16, below."""
    found, asked, room = voted([r"\boxed{4}"], replace(FIVE, samples2=20, batch2=1))
    assert (found.samples, found.agreed, found.reason) == (4, 4, "agreement")
    assert len(asked) == 4
    assert not room.is_cut


def test_answers_that_say_nothing_have_no_vote():
    found, _, _ = voted(["<think>hm", r"<think>a</think>\boxed{5}", "", "", ""])
    assert found.taken.text == r"<think>a</think>\boxed{5}"
    assert (found.samples, found.agreed) == (5, 1)
    found, _, _ = voted(["<think>hm"])
    assert (found.taken.text, found.agreed) == ("<think>hm", 0)


def test_how_many_pay_hangs_on_what_a_probe_knows_of_the_step():
    assert rules_of(FIVE, None).curve is rules_of(FIVE, Score(0.7, 0.3, 0.95)).curve is UNKNOWN
    curve = rules_of(FIVE, Score(0.7, 0.3, 0.8, knows2=True)).curve
    # Of what one answer leaves, further ones solve as much as of steps that nobody knows: 0.45 of 0.55.
    assert (curve.value(1), curve.f_max, curve.a + curve.b) == pytest.approx((0.8, 0.8 + 0.2 * 9 / 11, 2.0))
    # Sure to be right, one more is worth nothing: gain(1) is below 0.001.
    found, _, _ = voted(["1", "2", "3"], replace(FIVE, batch2=1), Score(0.7, 0.3, 1.0, knows2=True))
    assert (found.samples, found.reason) == (1, "saturated")


def test_what_fails_is_no_answer_and_all_that_fail_are_the_error():
    found, asked, _ = voted([BackendError("a"), r"\boxed{5}", BackendError("b"), r"\boxed{5}", r"\boxed{6}"])
    assert (found.taken.text, found.samples, len(asked)) == (r"\boxed{5}", 3, 5)
    with pytest.raises(BackendError, match="down"):
        voted([BackendError("down")])


def test_room_is_shared_by_those_beside_one_another():
    # 100 tokens for three beside one another; an end of answers that is nearer holds.
    _, asked, _ = voted(["1", "2", "3"], replace(FIVE, samples2=3, batch2=3), calls=Left(room=100))
    assert asked == [(0, 33), (1, 33), (2, 33)]
    _, asked, _ = voted(["1", "2", "3"], replace(FIVE, samples2=3, batch2=3), calls=Left(room=100), most=20)
    assert [limit for _, limit in asked] == [20] * 3
    # 40 tokens are no room for three, of 16 at least.
    _, asked, room = voted(["1", "2", "3"], replace(FIVE, samples2=3, batch2=3), calls=Left(room=40))
    assert asked[:2] == [(0, 20), (1, 20)]
    assert room.is_cut
    # Steps that come have a call each.
    room = Room(Left(left=4), most=None, later=2, is_short=lambda: False, expected=lambda: 16)
    assert room.next(4) == (2, None, "budget")
    assert room.is_cut


def test_no_more_are_drawn_beside_one_another_than_there_is_room_for_whole_ones():
    three = replace(FIVE, samples2=3, batch2=3)
    _, asked, room = voted(["1", "2", "3"], three, calls=Left(room=1000), expected=450)
    assert asked == [(0, 500), (1, 500), (2, 1000)]
    assert room.is_cut
    # One that would hardly fit is drawn, with all the room; an end of answers that is nearer says what they need.
    assert voted(["1", "2", "3"], three, calls=Left(room=1000), expected=2048)[1][0] == (0, 1000)
    assert voted(["1", "2", "3"], three, calls=Left(room=1000), expected=2048, most=300)[1] == [
        (0, 300),
        (1, 300),
        (2, 300),
    ]


def cut(text):
    return Answered(model="m", choices=({"message": {"content": text}, "finish_reason": "length"},))


@pytest.mark.parametrize("batch", [1, 2, 4, 10])
def test_answers_that_were_cut_off_decide_nothing(batch):
    says = [cut("First, 12 apples")] * 4 + [r"so it is \boxed{36}"] * 6
    found, asked, _ = voted(says, replace(FIVE, samples2=10, batch2=batch))
    assert found.taken.text == r"so it is \boxed{36}"
    assert len(asked) >= 8


def test_answers_that_were_cut_off_have_no_vote_beside_others():
    found, _, _ = voted([cut("maybe 5"), cut("maybe 5"), r"\boxed{4}"], replace(FIVE, samples2=3))
    assert (found.taken.text, found.samples, found.agreed) == (r"\boxed{4}", 3, 1)
    found, _, _ = voted([cut("5"), cut("6"), cut("6")], replace(FIVE, samples2=3))
    assert (found.taken.text, found.agreed) == ("6", 2)


def long_answers(limit_of):
    """An `Ask` whose answers need 600 tokens."""

    class Long(Models):
        async def __call__(self, arm, messages, **how):
            most = how["max_tokens"]
            limit_of.append(most)
            if most is None or most >= 600:
                return Answered.saying(r"so \boxed{4}", model="m", completion_tokens=600)
            return replace(cut("maybe 5, let"), completion_tokens=most)

    return Long()


@pytest.mark.parametrize("samples2", [1, 3])
@pytest.mark.parametrize(("tokens", "answer"), [(1000, "4"), (500, None), (10_000, "4")])
def test_a_budget_that_solves_a_step_with_one_answer_solves_it_with_several(samples2, tokens, answer):
    limits = []
    one = SelectiveReasoner(
        system1="small",
        system2="large",
        decomposer=Given.Config(steps=("It.",)).build(),
        assessor=Oracle(lambda index, _: 0.9),
        settings=Settings(samples2=samples2),
        budget=Budget(tokens=tokens),
    )
    trace = asyncio.run(one.solve("What?", long_answers(limits)))
    assert trace.answer == answer
    # What is cut off, or has fewer answers than were wanted, is told, so that no cache keeps it.
    assert trace.is_degraded is (answer is None or (samples2 == 3 and tokens == 1000))
    assert any("cut its answer off" in note for note in trace.notes) is (answer is None)


def test_short_answers_of_system_1_tell_nothing_of_those_of_system_2():
    class Short(Models):
        async def __call__(self, arm, messages, **how):
            if arm.model == "small":
                return Answered.saying(r"so \boxed{1}", model="small", completion_tokens=5)
            return await long_answers([])(arm, messages, **how)

    one = SelectiveReasoner(
        system1="small",
        system2=System(arm=Arm("large"), expected_tokens=600),
        decomposer=Given.Config(steps=("A.", "B.", "C.")).build(),
        assessor=Oracle(lambda index, _: 0.9 if index == 2 else 0.1),
        settings=Settings(samples2=3),
        budget=Budget(tokens=1000),
    )
    trace = asyncio.run(one.solve("What?", Short()))
    assert [step.system for step in trace.steps] == [1, 1, 2]
    assert (trace.answer, trace.is_degraded) == ("4", True)


def test_an_answer_that_the_systems_own_limit_ends_is_not_the_budgets():
    one = SelectiveReasoner(
        system1="small",
        system2=System(arm=Arm("large"), max_tokens=100),
        decomposer=Given.Config(steps=("It.",)).build(),
        assessor=Oracle(lambda index, _: 0.9),
        budget=Budget(tokens=1000),
    )
    assert not asyncio.run(one.solve("What?", long_answers([]))).is_degraded


def test_the_first_is_drawn_in_any_case_and_time_ends_it():
    found, asked, room = voted(["1", "2", "3"], replace(FIVE, batch2=1), calls=Left(left=0, room=0, exhausted="tokens"))
    assert (found.samples, found.reason, len(asked), room.is_cut) == (1, "budget", 1, True)
    found, _, room = voted(["1", "2", "3"], replace(FIVE, batch2=1), short=[False, True])
    assert (found.samples, found.reason, room.is_cut) == (2, "deadline", True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples2": 0}, "samples2 is 0; it must be a whole number of at least 1"),
        ({"batch2": 1.5}, r"batch2 is 1\.5"),
        ({"least_gain2": 1.0}, r"least_gain2 is 1\.0; it must be above 0 and below 1"),
    ],
)
def test_settings_that_are_none(fields, message):
    with pytest.raises(InputError, match=message):
        Settings(**fields)


# In a run


def reasoner(settings=FIVE, **fields):
    return SelectiveReasoner(
        system1="small",
        system2="large",
        decomposer=Given.Config(steps=STEPS).build(),
        assessor=Oracle(lambda index, _: (0.1, 0.9, 0.9)[index]),
        settings=settings,
        **fields,
    )


def turns(model, text, count):
    """System 2 says 1, 2, 3 in turn; System 1 says 0."""
    return rf"\boxed{{{count % 3 if model == 'large' else 0}}}"


def solve(models, *, journal=None, **fields):
    return asyncio.run(reasoner(**fields).solve("What is a + b?", models, journal=journal))


def test_hard_steps_have_several_answers_and_their_totals_are_the_ledgers():
    models = Models({"solve": turns})
    trace = solve(models)
    assert [(one.system, one.samples) for one in trace.steps] == [(1, 1), (2, 5), (2, 5)]
    assert [one.stopped for one in trace.steps] == [None, "budget", "budget"]
    assert len(models.asked) == len(trace.calls) == 11
    totals = trace.totals.all
    assert (totals.prompt, totals.completion) == (models.spent.prompt_tokens, models.spent.completion_tokens)
    assert totals.cost == pytest.approx(models.spent.cost)
    assert sum(one.completion_tokens for one in trace.steps) == totals.completion
    # Of 2 0 1 2 0 the first of the two that came twice; the next step sees it and no other.
    assert trace.steps[1].answer == r"\boxed{2}"
    assert (trace.steps[1].agreed, trace.answer) == (2, trace.steps[2].answer.strip("\\boxed{}"))
    assert all(r"\boxed{2}" in text for stage, _, text, _ in models.asked if stage == "last")
    # Each has a seed of its own.
    assert len({how["seed"] for *_, how in models.asked}) == 11
    assert Trace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace
    assert "samples" in trace.steps[1].facts(1)
    assert not trace.is_degraded


def test_one_answer_is_as_it_was_and_temperature_0_has_no_more():
    one, usual = Models({"solve": turns}), Models({"solve": turns})
    solve(one, settings=Settings(samples2=1))
    solve(usual, settings=Settings())
    assert [call[1:] for call in one.asked] == [call[1:] for call in usual.asked]
    cold = Models({"solve": turns})
    trace = solve(cold, settings=replace(FIVE, temperature=0.0))
    assert [step.samples for step in trace.steps] == [1, 1, 1]


def test_a_trace_of_before_reads():
    trace = solve(Models({"solve": turns}), settings=Settings())
    table = trace.to_dict()
    for step in table["steps"]:
        for name in ("samples", "agreed", "stopped"):
            del step[name]
    assert Trace.from_dict(table) == trace


def test_a_run_that_broke_off_asks_for_no_answer_again(tmp_path):
    whole = Models({"solve": turns})
    expected = solve(whole)
    for break_at in (2, 4, 7, 11):
        path = tmp_path / f"{break_at}.jsonl"

        def until(model, text, count, break_at=break_at):
            if count >= break_at:
                raise CrashError
            return turns(model, text, count)

        with pytest.raises(CrashError):
            solve(Models({"solve": until}), journal=path)
        second = Models({"solve": turns})
        trace = solve(second, journal=path)
        # Its script counts from one again, so that what is said differs; how much is asked does not.
        assert len(second.asked) == len(whole.asked) - (break_at - 1)
        assert len(trace.calls) == len(expected.calls)
        assert [step.samples for step in trace.steps] == [1, 5, 5]


class CrashError(Exception):
    """The process ends."""


@pytest.mark.parametrize("tokens", [20, 40, 60, 90])
def test_no_budget_of_tokens_is_passed_by_more_than_the_ends_of_system_1(tokens):
    models = Models({"solve": lambda model, text, count: " ".join(["word"] * 12) + rf" \boxed{{{count}}}"})
    trace = solve(models, budget=Budget(tokens=tokens))
    hard = [one for one in trace.calls if one.system == 2]
    limits = [how["max_tokens"] for _, arm, _, how in models.asked if arm.model == "large"]
    # What is asked of System 2 side by side has no more room than is left.
    assert all(limit is not None and limit <= tokens for limit in limits)
    assert sum(one.completion_tokens for one in hard) <= tokens + 13
    assert trace.is_whole


def test_a_system_whose_answers_all_fail_is_stood_in_for():
    models = Models({"solve": lambda model, text, count: BackendError("no") if model == "large" else r"\boxed{1}"})
    trace = solve(models)
    assert [(one.system, one.wanted, one.samples) for one in trace.steps] == [(1, 1, 1), (1, 2, 1), (1, 2, 1)]
    assert trace.is_degraded


def test_calls_that_are_left_are_kept_for_the_steps_that_come():
    models = Models({"solve": turns}, left=5)
    trace = solve(models)
    assert trace.is_whole
    assert len(models.asked) <= 5
    assert [one.system for one in trace.steps] == [1, 2, 2]
    assert trace.steps[1].samples == 3
    assert any("budget ended it at" in note for note in trace.notes)
