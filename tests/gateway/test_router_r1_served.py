"""`auto/router-r1` of a whole gateway: what a sender is told where the answer is not what the router would give."""

import asyncio
import json
import time

import pytest

from anabranch.gateway.config import load_config
from anabranch.gateway.gateway import Gateway
from anabranch.web.api_error import ApiError
from gateway_scripted import scripted, whole

QUESTION = [{"role": "user", "content": "How much is safe?"}]
PRICE = "price = {{ input_usd = {0}, output_usd = {0} }}\n"


class Endpoint:
    """Models that say their names, and a router that writes these turns; a turn is a text, and why it ended.

    Attributes:
        asked: names, in order.

    Args:
        down: models that fail.
        toolless: those that refuse tools.
        wait_s: seconds that an answer takes.
    """

    def __init__(self, *turns, down=(), toolless=(), wait_s=0.0):
        self.turns, self.down, self.asked = list(turns), down, []
        self.toolless, self.wait_s = toolless, wait_s

    def of(self, name):
        def says(body):
            self.asked.append(name)
            time.sleep(self.wait_s)
            if name in self.toolless and body.get("tools"):
                return whole({"error": {"message": "this model has no tools", "type": "invalid_request_error"}}, 400)
            if name in self.down:
                return whole({"error": {"message": "down"}}, 500)
            text, reason = f"{name} knows", "stop"
            if "</answer>" in body.get("stop", ()):
                text, reason = self.turns.pop(0)
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "finish_reason": reason, "message": message}
            usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
            head = {"id": "c", "object": "chat.completion", "created": 1, "model": name}
            return whole({**head, "choices": [choice], "usage": usage})

        return says


def served(tmp_path, endpoint, work, *, models=None, fields="", top="", of=None):
    """What ``work(gateway)`` gives.

    Args:
        tmp_path: of the test.
        endpoint: that answers.
        work: what to do.
        models: dollars of a million tokens by name; None for what has no price.
        fields: further lines of the strategy.
        top: further lines of the config, in front of the models.
        of: further lines of models, by name.
    """
    models = models or {"router": 1, "small": 2, "large": 20}
    with scripted({name: endpoint.of(name) for name in models}) as url:
        lines = [f"require_key = false\n{top}\n[retries]\nattempts = 1\n[lost]\nread_on_s = 0\n"]
        for name, price in models.items():
            provider = f'{{ kind = "openai", model = "m", base_url = "{url}/{name}", key_env = "" }}'
            lines.append(f'[[models]]\nname = "{name}"\n' + ("" if price is None else PRICE.format(price)))
            lines.append(f"{(of or {}).get(name, '')}\ndeployments = [{{ provider = {provider} }}]\n")
        lines.append(f'[strategies.router-r1]\nkind = "router_r1"\n{fields}\n')
        path = tmp_path / "gateway.toml"
        path.write_text("".join(lines))

        async def main():
            async with Gateway(load_config(path)) as gateway:
                return await work(gateway)

        return asyncio.run(main())


def sent(knobs="", **body):
    return {"model": f"auto/router-r1{knobs}", "messages": QUESTION, **body}


def asked(tmp_path, endpoint, *, knobs="", key=None, models=None, fields="", top="", of=None, **body):
    """The answer to a request, and its headers.

    Args:
        tmp_path, endpoint, models, fields, top, of: as in `served`.
        knobs: of the name of the model.
        key: models that the key of the request may use; None for no key.
        body: further fields of the request.
    """

    async def work(gateway):
        secret = None if key is None else (await gateway.store.create_key("k", models=key))[0]
        return await gateway.handle("chat", sent(knobs, **body), key=secret)

    reply = served(tmp_path, endpoint, work, models=models, fields=fields, top=top, of=of)
    return json.loads(reply.body), reply.headers


RAW = ("<think> need r0 </search> </search>", "stop")
TAUGHT = 'policy = "router"\nmax_turns = 1'
POOL = {"router": 0, "small": 2, "large": 20}


@pytest.mark.parametrize(
    ("knobs", "down"), [("?usd=0", ()), ("", ("small", "large")), ("?seconds=0", ("small", "large"))]
)
def test_a_router_that_was_taught_answers_no_question_of_a_chat(tmp_path, knobs, down):
    endpoint = Endpoint(*[RAW] * 9, down=down)
    with pytest.raises(ApiError) as raised:
        asked(tmp_path, endpoint, models=POOL, fields=TAUGHT, knobs=knobs, max_tokens=60)
    assert raised.value.status in (402, 429, 502, 503)
    assert endpoint.asked.count("router") == 9 - len(endpoint.turns)


def test_whoever_gets_another_answer_is_told_why(tmp_path):
    late, headers = asked(tmp_path, Endpoint(), fields=TAUGHT, knobs="?seconds=0")
    assert late["choices"][0]["message"]["content"] == "large knows"
    assert headers["x-route-spare"] == "time"
    _, headers = asked(tmp_path, Endpoint(RAW, RAW), fields=TAUGHT)
    assert headers["x-route-spare"] == "the router gave no answer"
    _, headers = asked(tmp_path, Endpoint(("<answer>Ann", "stop")), fields=TAUGHT)
    assert "x-route-spare" not in headers


def test_a_model_without_a_price_does_not_route_as_the_cheapest(tmp_path):
    endpoint = Endpoint(("<answer>Ann", "stop"))
    found, _ = asked(tmp_path, endpoint, models={"big": None, "small": 1})
    assert (endpoint.asked, found["choices"][0]["message"]["content"]) == (["small"], "Ann")


CUT = ("<think>dose</think><answer>It is not safe to take more than 3", "length")


def test_an_answer_that_was_cut_says_so(tmp_path):
    found, _ = asked(tmp_path, Endpoint(CUT), fields='policy = "router"', max_tokens=8)
    [choice] = found["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It is not safe to take more than 3", "length")


NAMED = 'policy = "router"'
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
LONG = [{"role": "user", "content": "word " * 2000}]
SMALL = dict.fromkeys(("small", "large"), "context = 500")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"tools": TOOLS}, ["large", "small", "router"]),
        ({"tools": TOOLS, "messages": LONG, "of": SMALL}, ["router"]),
        ({"key": ["router", "auto/router-r1"], "tools": TOOLS}, ["router"]),
        # It had its rounds.
        ({"key": ["router", "auto/router-r1"]}, ["router"] * 3),
        ({"messages": LONG, "of": SMALL}, ["router"] * 3),
    ],
)
def test_what_only_the_router_s_model_may_answer_or_can_it_does(tmp_path, fields, names):
    endpoint = Endpoint(("x", "stop"), ("x", "stop"), toolless=("small", "large"))
    found, headers = asked(tmp_path, endpoint, fields=TAUGHT, **fields)
    assert (found["choices"][0]["message"]["content"], headers["x-route-model"]) == ("router knows", "router")
    assert endpoint.asked == names


def test_a_slow_router_has_its_own_time(tmp_path):
    endpoint = Endpoint(("<think>a</think><search>small: q", "stop"), ("<answer>Ann", "stop"), wait_s=0.2)
    # Of the router's time three fifths are for rounds; of the gateway's own less than one turn.
    config = {"fields": NAMED, "top": "deadline_s = 0.3", "of": {"router": "deadline_s = 60"}}
    found, headers = asked(tmp_path, endpoint, **config)
    assert found["choices"][0]["message"]["content"] == "Ann"
    assert "x-route-spare" not in headers


def test_it_is_told_which_limit_was_used_up(tmp_path):
    turns = [("<think>t</think><search>small: q", "stop")] * 9
    _, headers = asked(tmp_path, Endpoint(*turns), fields=NAMED, top="[limits]\nstrategy_calls = 4")
    assert headers["x-route-spare"] == "calls"
    # Rounds that there is no money for, and money for a direct answer of a cheap model.
    models = {"router": 900, "small": 0, "large": 20}
    _, headers = asked(tmp_path, Endpoint(*turns), fields=NAMED, models=models, knobs="?usd=0.001", max_tokens=60)
    assert (headers["x-route-spare"], headers["x-route-model"]) == ("money", "small")


def test_whoever_gets_a_direct_answer_again_is_told_why_again(tmp_path):
    """By the same request side by side, by its name, and from the cache."""

    async def work(gateway):
        async def told(headers=None, temperature=0):
            body = sent(temperature=temperature, max_tokens=60)
            reply = await gateway.handle("chat", body, headers=headers)
            return reply.headers.get("x-cache"), reply.headers.get("x-route-spare")

        found = list(await asyncio.gather(told(), told()))
        found += [await told(), await told({"idempotency-key": "a"}, 1), await told({"idempotency-key": "a"}, 1)]
        endpoint.turns = [("<answer>Ann", "stop")]
        return [*found, await told({"cache-control": "no-cache"})]

    endpoint = Endpoint(*[RAW] * 4, wait_s=0.05)
    why = "the router gave no answer"
    *found, without = served(tmp_path, endpoint, work, fields=TAUGHT, top="[cache]\nexact = true")
    assert [one for one, _ in found] == ["miss", "shared", "exact", "miss", "exact"]
    assert {one for _, one in found} == {why}
    assert without[1] is None
