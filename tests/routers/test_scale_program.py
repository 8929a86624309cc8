"""`auto/scale` as a program: which models it takes, what it makes of a request, and what it gives where not all can be done."""

import asyncio

import pytest

from anabranch.errors import BackendError, ConfigError, DataError, InputError, LimitError
from anabranch.routers.contract.program import Done, ProgramRequest, Said, Step
from anabranch.routers.contract.query import Model, Pool, Query
from anabranch.routers.money import Price
from anabranch.routers.scale import Budgeted, Constant, Identity, Prompted, Threshold, TopFraction
from anabranch.routers.strategies import make
from scale_scripted import Models, down, outline_of, step_of, usual

POOL = Pool(
    (
        Model(name="middle", price=Price.of_dollars(2, 4)),
        Model(name="small", price=Price.of_dollars(1, 2), context=4000),
        Model(name="large", price=Price.of_dollars(10, 20)),
    )
)
QUESTION = [{"role": "user", "content": "What is a + b?"}]
TWO = Prompted.Config(k=2)


def request_of(program, messages=QUESTION, pool=POOL, *, knobs=None, left_s=float("inf"), streams=False, **settings):
    last = messages[-1]["content"]
    query = Query(text=last if isinstance(last, str) else "", messages=messages, knobs=knobs or {})
    decision = program.route(query, pool)
    return ProgramRequest(
        query=query, pool=pool, decision=decision, settings=settings, left_s=left_s, is_streamed=streams
    )


def run(models, *, program=None, **request):
    """Pieces, steps by name, and the end."""
    program = program or make("scale", decomposer=TWO)

    async def main():
        return [event async for event in program.run(request_of(program, **request), models)]

    *events, done = asyncio.run(main())
    assert isinstance(done, Done)
    said = [event.text for event in events if isinstance(event, Said)]
    steps = [event for event in events if isinstance(event, Step)]
    return said, steps, done


def facts(steps, name):
    return [step.facts for step in steps if step.name == name]


def test_a_request_in_steps():
    models = Models(usual())
    said, steps, done = run(models)
    assert [step.name for step in steps] == ["outline", "step", "step", "step", "totals"]
    assert facts(steps, "outline") == [{"steps": 3, "chosen": 0, "candidates": 2}]
    assert [(one["system"], one["score"], one["is_forced"]) for one in facts(steps, "step")] == [
        (1, 0.3, False),
        (1, 0.3, False),
        (2, None, True),
    ]
    [totals] = facts(steps, "totals")
    told = [totals[part] for part in ("overhead", "solving", "lost")]
    assert sum(one["completion"] for one in told) == models.spent.completion_tokens
    assert sum(one["prompt"] for one in told) == models.spent.prompt_tokens
    assert sum(one["calls"] for one in told) == len(models.asked)
    assert (totals["is_degraded"], totals["notes"]) == (False, [])
    assert (said, done.model, done.is_spare, done.finish_reason) == ([], "large", False, "stop")
    assert done.message["content"].endswith(r"\boxed{large}")
    # The cheapest and the dearest of the pool, and no text of anybody in the trace.
    assert {arm.model for _, arm, *_ in models.asked} == {"small", "large"}
    assert not any("Find" in str(step.facts) or "What is" in str(step.facts) for step in steps)


def test_the_last_answer_is_given_as_it_comes():
    said, _, done = run(Models(usual()), streams=True)
    assert len(said) > 2
    assert "".join(said) == done.message["content"]


def test_what_the_sender_wants():
    """Sampling is every step's, the form is the last one's; what is longer than the sender wants nobody writes."""
    wanted = {
        "temperature": 0.1,
        "response_format": {"type": "json_object"},
        "logprobs": True,
        "max_tokens": 70,
        "seed": 3,
        "user": "ann",
    }
    models = Models(usual())
    run(models, **wanted)
    for stage, arm, _, how in models.asked:
        assert arm.settings["top_p"] == 0.95
        assert "seed" not in arm.settings
        assert how["seed"] != 3
        is_answer, is_last = stage in ("solve", "last"), stage == "last"
        assert arm.settings["temperature"] == (0.1 if is_answer else 0.6)
        assert (arm.settings.get("response_format"), arm.settings.get("logprobs")) == (
            (wanted["response_format"], True) if is_last else (None, None)
        )
        assert ("user" in arm.settings) == is_answer
        assert how["max_tokens"] == {"outline": None, "score": 64}.get(stage, 70)
    # Another seed of the sender's is another run; the same is the same.
    seeds = {}
    for seed in (3, 4, 3):
        models = Models(usual())
        run(models, seed=seed)
        seeds.setdefault(seed, []).append([how["seed"] for *_, how in models.asked])
    assert seeds[3][0] == seeds[3][1] != seeds[4][0]


def test_one_model_with_a_switch():
    program = make(
        "scale",
        system1="small",
        system2="small",
        settings1={"reasoning_effort": "none"},
        settings2={"reasoning_effort": "high"},
        tokens1=100,
        tokens2=1000,
        decomposer=TWO,
    )
    models = Models(usual())
    run(models, program=program)
    assert [arm.settings["reasoning_effort"] for stage, arm, *_ in models.asked] == ["none"] * 6 + ["high"]
    assert [how["max_tokens"] for stage, _, _, how in models.asked if stage in ("solve", "last")] == [100, 100, 1000]
    assert "one and the same" not in program.route(Query(text="x"), POOL).reason
    assert "one and the same" in make("scale").route(Query(text="x"), Pool((Model(name="a"),))).reason


def test_tau_in_the_name_of_the_model():
    for knobs, system in (({}, 1), ({"threshold": "0.2"}, 2), ({"threshold": "0.3"}, 1)):
        _, steps, _ = run(Models(usual()), knobs=knobs)
        assert facts(steps, "step")[0]["system"] == system
    for odd in ("-1", "2", "x"):
        with pytest.raises(InputError, match="threshold is"):
            make("scale").route(Query(text="x", knobs={"threshold": odd}), POOL)
    assert make("scale", rule=TopFraction.Config()).sender_knobs == ()


@pytest.mark.parametrize(
    "settings", [{"tools": [{"type": "function", "function": {"name": "f"}}]}, {"modalities": ["audio"]}]
)
def test_what_no_plan_helps_is_one_step_and_asked_as_it_came(settings):
    models = Models(usual(score="0.9"))
    _, steps, done = run(models, **settings)
    assert models.stages == ["score", "plain"]
    assert models.asked[-1][2] == QUESTION[0]["content"]
    assert done.model == "large"
    assert facts(steps, "outline") == [{"steps": 1, "chosen": None, "candidates": 0}]
    assert all(name in models.asked[-1][1].settings for name in settings)


@pytest.mark.parametrize("settings", [{"response_format": {"type": "text"}}, {"modalities": ["text"]}, {"tools": []}])
def test_who_asks_for_plain_words_has_a_plan_too(settings):
    """What asks for words by name turned decomposition off."""
    _, steps, _ = run(Models(usual()), **settings)
    assert facts(steps, "outline") == [{"steps": 3, "chosen": 0, "candidates": 2}]


def test_an_answer_to_a_tool_call_goes_on_as_it_came():
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None},
        {"role": "tool", "tool_call_id": "c", "content": "7"},
    ]
    models = Models(usual(score="0.1"))
    seen = []

    class Seeing(Models):
        async def __call__(self, arm, messages, **how):
            seen.append(messages)
            return await models(arm, [{"role": "user", "content": str(messages[-1]["content"])}], **how)

    _, _, done = run(Seeing({}), messages=messages)
    assert (seen[-1], done.model) == (messages, "small")


def test_a_model_that_may_not_be_asked_is_stood_in_for():
    closed = Pool(
        (POOL.models[0], POOL.models[1], Model(name="large", price=Price.of_dollars(10, 20), is_available=False))
    )
    models = Models(usual())
    _, _, done = run(models, pool=closed)
    assert done.model == "middle"
    _, _, done = run(models, pool=closed, program=make("scale", system2="large", decomposer=TWO))
    assert done.model == "small"
    with pytest.raises(InputError, match=r"scale asks huge and large; the pool has middle, small, large"):
        make("scale", system1="huge").route(Query(text="x"), POOL)


def test_fallbacks_of_a_failed_run_begin_with_system_2():
    decision = make("scale").route(Query(text="x"), POOL)
    assert [one.model for one in decision.candidates] == ["large", "small", "middle"]
    assert decision.details == {"system1": "small", "system2": "large", "tau": 0.5}


def test_a_run_that_did_less_is_no_answer_to_keep():
    _, steps, done = run(Models(usual(solve=lambda model, text, _: down() if model == "large" else "fine")))
    assert (done.model, done.is_spare) == ("small", True)
    assert facts(steps, "totals")[0]["is_degraded"] is True


def test_where_money_ends_what_was_found_is_given_and_says_that_it_is_not_all():
    def until_last(model, text, _):
        return LimitError("no money") if step_of(text).startswith("Add") else f"fine: {step_of(text)}"

    for streams in (False, True):
        said, steps, done = run(Models(usual(solve=until_last)), streams=streams)
        assert (said, done.finish_reason, done.is_spare, done.model) == ([], "length", True, "small")
        assert done.message["content"] == "Step 1: Find a.\nfine: Find a.\n\nStep 2: Find b.\nfine: Find b."
        assert facts(steps, "totals")[0]["is_whole"] is False


def test_a_stream_that_broke_after_it_began_is_not_begun_anew():
    class Breaking(Models):
        async def stream(self, arm, messages, **how):
            await self(arm, messages, **how)
            yield Said("The ans")
            raise BackendError("broke off")

    with pytest.raises(BackendError, match="broke off"):
        run(Breaking(usual()), streams=True)

    class Poor(Models):
        async def stream(self, arm, messages, **how):
            yield Said("The ans")
            raise LimitError("no money")

    # Nor does it end as if what was found before were the answer that was begun.
    with pytest.raises(LimitError, match="no money"):
        run(Poor(usual()), streams=True)

    class Closed(Models):
        closed = 0

        async def stream(self, arm, messages, **how):
            try:
                async for piece in super().stream(arm, messages, **how):
                    yield piece
            finally:
                Closed.closed += 1

    async def leave():
        program, models = make("scale", decomposer=TWO), Closed(usual())
        events = program.run(request_of(program, streams=True), models)
        async for event in events:
            if isinstance(event, Said):
                break
        await events.aclose()
        # Whoever leaves lets go of the model's stream at once, not when memory is collected.
        return Closed.closed

    assert asyncio.run(leave()) == 1


def test_the_time_of_a_request():
    """Past seven tenths of it nobody thinks, and nothing goes on to its very end."""
    program = make("scale", budget_s=100.0)
    for left_s, soft, hard in ((60.0, 42.0, 58.2), (600.0, 100.0, 582.0), (float("inf"), 100.0, float("inf"))):
        budget = program._begin(request_of(program, left_s=left_s), Models()).work.calls.budget
        assert (budget.seconds, budget.deadline_s) == (pytest.approx(soft), pytest.approx(hard))


def test_a_budget_in_dollars_takes_the_pool_s_prices():
    """20 dollars a million against 2: at 2048 tokens against 256 a step of System 2 costs 4 cents more."""
    for budget, systems in ((0.07, [1, 1, 2]), (0.09, [2, 2, 2])):
        rule = Budgeted.Config(unit="usd", budget=budget)
        _, steps, _ = run(Models(usual(score="0.5")), program=make("scale", rule=rule, decomposer=TWO))
        # Of 9 cents there is room for the last step and one more, and what that really costs leaves room for another.
        assert [one["system"] for one in facts(steps, "step")] == systems


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"settings1": {"model": "x"}}, ConfigError, "settings1 has model, which the program says itself"),
        ({"language": "xx"}, ConfigError, "language is 'xx'"),
        ({"language": "none.toml"}, DataError, "cannot be read"),
        ({"max_steps": 0}, ConfigError, "max_steps is 0"),
        ({"rescore": "never"}, ConfigError, "rescore"),
        ({"budget_usd": 0.0}, ConfigError, "budget_usd is 0"),
        ({"k": 3}, ConfigError, "k"),
    ],
)
def test_what_no_config_may_say(fields, error, message):
    with pytest.raises(error, match=message):
        make("scale", **fields)


def test_other_parts_by_their_configs():
    program = make(
        "scale", decomposer=Identity.Config(), assessor=Constant.Config(difficulty=0.4), rule=Threshold.Config(tau=0.3)
    )
    models = Models(usual())
    _, _, done = run(models, program=program)
    assert (models.stages, done.model) == (["plain"], "large")
    assert outline_of() not in str(models.asked)
