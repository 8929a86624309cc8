"""`auto/router-r1` of a whole gateway: what a sender is told where the answer is not what the router would give."""

import asyncio
import json

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
    """

    def __init__(self, *turns, down=()):
        self.turns, self.down, self.asked = list(turns), down, []

    def of(self, name):
        def says(body):
            self.asked.append(name)
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


def asked(tmp_path, endpoint, *, models=None, fields="", knobs="", **body):
    """The answer to a request, and its headers.

    Args:
        tmp_path: of the test.
        endpoint: that answers.
        models: dollars of a million tokens by name; None for what has no price.
        fields: further lines of the strategy.
        knobs: of the name of the model.
        body: further fields of the request.
    """
    models = models or {"router": 1, "small": 2, "large": 20}
    with scripted({name: endpoint.of(name) for name in models}) as url:
        lines = ["require_key = false\n[retries]\nattempts = 1\n[lost]\nread_on_s = 0\n"]
        for name, price in models.items():
            provider = f'{{ kind = "openai", model = "m", base_url = "{url}/{name}", key_env = "" }}'
            lines.append(f'[[models]]\nname = "{name}"\n' + ("" if price is None else PRICE.format(price)))
            lines.append(f"deployments = [{{ provider = {provider} }}]\n")
        lines.append(f'[strategies.router-r1]\nkind = "router_r1"\n{fields}\n')
        path = tmp_path / "gateway.toml"
        path.write_text("".join(lines))

        async def work():
            async with Gateway(load_config(path)) as gateway:
                sent = {"model": f"auto/router-r1{knobs}", "messages": QUESTION, **body}
                return await gateway.handle("chat", sent)

        reply = asyncio.run(work())
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
