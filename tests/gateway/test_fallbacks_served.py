"""Fallbacks for what is a request's own, through HTTP: however many need one, and whatever outages have used up."""

import asyncio
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig, RetryConfig
from anabranch.gateway.dispatch.own_fallbacks import FURTHER
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import LedgerQuery, open_store
from anabranch.web.api_error import ApiError
from gateway_process import ask, call
from gateway_scripted import fronted, model, scripted, whole
from gateway_upstream import ANSWER

# More than the extra attempts of a quiet window.
MANY, SOME = 40, 12
UNPAID = "(asked: down (server 500); not asked: big (the budget of extra attempts is used up))"
TOO_LONG = {"message": "This model's maximum context length is 8192 tokens.", "code": "context_length_exceeded"}
UPSTREAM = {
    "long": whole({"error": TOO_LONG}, 400),
    # As some say it in words alone.
    "words": whole({"error": {"message": "prompt is too long: 9000 tokens > 8192 maximum"}}, 400),
    "wordy": whole({"error": {"message": "prompt is too long: 9000 tokens > 8192 maximum"}}, 400),
    "strict": whole({"error": {"message": "filtered", "code": "content_filter"}}, 400),
    "deep": (200, "application/json", b'{"choices":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "claude": whole({"error": {"message": "nothing is sent to it"}}, 500),
    "down": whole({"error": {"message": "down"}}, 500),
    "dead": whole({"error": {"message": "down"}}, 500),
    "longer": whole({"error": TOO_LONG}, 400),
    "alone": whole({"error": TOO_LONG}, 400),
    "big": whole(ANSWER),
}
# What is asked of each that it cannot do, and what else its chain holds.
OWN = {"long": {}, "words": {}, "strict": {}, "deep": {}, "claude": {"n": 2}}
PRICE = {"input_usd": 1000, "output_usd": 2000}


def front(folder, url, **retries):
    """A gateway before such an upstream; `big` is the fallback of all that have one, but for `longer` and `wordy`."""
    kinds = {name: "anthropic" if name == "claude" else "openai" for name in UPSTREAM}
    models = [{**model(name, kind, url, key_env=""), "price": PRICE} for name, kind in kinds.items()]
    chains = {
        "fallbacks": {name: ["big"] for name in ("claude", "deep", "down", "dead")},
        "context_fallbacks": {"long": ["big"], "words": ["big"], "longer": ["long"], "wordy": ["words", "big"]},
        "filter_fallbacks": {"strict": ["big"]},
    }
    return fronted(folder, models, {}, retries={"attempts": 1, **retries}, cache={"exact": False}, **chains)


async def rows(store):
    """Of the ledger."""
    async with open_store(store) as opened:
        return await opened.ledger(LedgerQuery(limit=1000))


def test_what_is_the_request_s_own_is_asked_of_the_next_model_without_any_budget(tmp_path):
    with scripted(UPSTREAM) as url, front(tmp_path, url, budget=0.0) as running:
        for name, more in OWN.items():
            body = {"model": name, "messages": [{"role": "user", "content": "x"}], **more}
            found = [call(running.url, "POST", "/v1/chat/completions", body) for _ in range(SOME)]
            assert Counter((status, headers["x-route-model"]) for status, _, headers in found) == {(200, "big"): SOME}
            assert {headers["x-route-attempts"] for _, _, headers in found} == {"2"}
        # After an outage nobody is.
        status, told, _ = ask(running.url, model="down")
        assert (status, told["error"]["message"]) == (502, f"down {UNPAID}")
        # Who was asked is told where all refuse; of one its own words say all.
        status, told, headers = ask(running.url, model="longer")
        assert (status, told["error"]["code"], headers["x-route-attempts"]) == (400, "context_length_exceeded", "2")
        assert told["error"]["message"] == f"{TOO_LONG['message']} (asked: longer (context 400), long (context 400))"
        # What is known by its words is called what it was taken for, and one further model is asked.
        status, told, headers = ask(running.url, model="wordy")
        assert (status, told["error"]["code"], headers["x-route-attempts"]) == (400, "context_length_exceeded", "2")
        assert "(asked: wordy (context 400), words (context 400); not asked: big (" in told["error"]["message"]
        assert ask(running.url, model="alone")[1]["error"]["message"] == TOO_LONG["message"]
    told = Counter((row.requested, row.status, row.model, row.attempts) for row in asyncio.run(rows(running.store)))
    assert {name: told[name, "ok", "big", 2] for name in OWN} == dict.fromkeys(OWN, SOME)


def test_an_outage_that_has_used_up_the_budget_takes_no_such_fallback_from_anybody(tmp_path):
    with scripted(UPSTREAM) as url, front(tmp_path, url, budget=0.001, least=1) as running:
        assert ask(running.url, model="down")[0] == 200
        assert ask(running.url, model="dead")[0] == 502
        found = [ask(running.url, model="long") for _ in range(MANY)]
        assert Counter((status, headers["x-route-model"]) for status, _, headers in found) == {(200, "big"): MANY}
        # 3 tokens at a thousandth of a dollar and 2 at two: a refusal costs nothing.
        assert {headers["x-cost-usd"] for _, _, headers in found} == {"0.007000000"}
    told = Counter((row.requested, row.status, row.cost_nano) for row in asyncio.run(rows(running.store)))
    assert told["long", "ok", 7_000_000] == MANY == sum(row[0] == "long" for row in told.elements())


NAMES = ("a", "b", "c", "d", "e")
STEPS = st.sampled_from(["context", "filter", "500", "ok"])


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[STEPS] * len(NAMES)), st.sampled_from([0.0, 1.0]))
def test_each_model_of_a_chain_is_asked_once_and_only_outages_are_charged(tmp_path_factory, steps, budget):
    """Without a budget the chain ends at the first outage, or `FURTHER` models on; whatever is met, no model has a second turn."""
    models = tuple(
        ModelConfig(
            name=name, deployments=(DeploymentConfig(provider=Mock.Config(model=name, script=(step,), loops=True)),)
        )
        for name, step in zip(NAMES, steps, strict=True)
    )
    config = GatewayConfig(
        models=models,
        require_key=False,
        store=str(tmp_path_factory.mktemp("store") / "g.db"),
        retries=RetryConfig(attempts=1, base_s=0.0, budget=budget),
        fallbacks={NAMES[0]: NAMES[1:]},
    )

    async def main():
        async with Gateway(config) as gateway:
            try:
                reply = await gateway.handle(
                    "chat", {"model": NAMES[0], "messages": [{"role": "user", "content": "x"}]}
                )
                ended = reply.headers["x-route-model"], int(reply.headers["x-route-attempts"])
            except ApiError as error:
                ended = "", int(error.headers["x-route-attempts"])
            dispatcher = gateway.runtime.dispatcher
            return *ended, dispatcher.budget.state(dispatcher.now())

    answered, attempts, state = asyncio.run(main())
    # Behind each model that failed: whether the next one is paid for, of the extra attempts.
    own = [step in ("context", "filter") for step in steps]
    paid = [not own[at] or sum(own[:at]) >= FURTHER for at in range(len(NAMES))]
    ends = [at for at, step in enumerate(steps) if step == "ok" or (paid[at] and not budget)]
    last = ends[0] if ends else len(NAMES) - 1
    assert attempts == last + 1
    assert answered == (NAMES[last] if steps[last] == "ok" else "")
    assert (state["extra"], state["held"]) == (sum(paid[:last]), 0)
