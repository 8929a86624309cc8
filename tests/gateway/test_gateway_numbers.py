"""Numbers that are none, that have no end, or that are something else: a clear 400 wherever one comes in, and valid JSON afterwards."""

import asyncio
import http.client
import json
import math
from decimal import Decimal
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.bounds import finite, whole
from anabranch.errors import ConfigError, InputError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig, load_config
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import open_store
from anabranch.routers.money import MOST_NANO, NANO, nano_dollars
from anabranch.web.answers import json_response
from anabranch.web.api_error import ApiError
from gateway_process import served

CONFIG = """
require_key = false
store = "numbers.db"
[admin]
key = "env:NUMBERS_ADMIN_KEY"
[strategies.cheapest]
kind = "cheapest"
[[models]]
name = "small"
max_tokens = 20
deployments = [{ provider = { kind = "mock", tokens = 4 } }]
"""
KEY = "an-admin-key-of-this-test"

# What is no number, whichever field it is for.
NEVER = ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e999999", "1" + "0" * 5000)
ODD = (
    "1" + "0" * 400,
    "-1" + "0" * 4000,
    "9007199254740993",
    "1e300",
    "-1",
    "0",
    "-0.0",
    "1.5",
    "1e-400",
    "true",
    "false",
    "null",
    '"5"',
    '"1e999999"',
    '"NaN"',
    '"-1"',
    '"1e99999999999999999999"',
    "[]",
    "[1]",
    "{}",
)
CHAT = '"model": "small", "messages": [{"role": "user", "content": "hello"}]'
COMPLETION = '"model": "small", "prompt": "hello"'
SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "n",
    "best_of",
    "seed",
    "logprobs",
    "stream",
)
FIELDS = [
    *(("POST", "/admin/keys", f'{{"{name}": %s}}') for name in ("rpm", "tpm", "expires_s", "is_admin")),
    ("PUT", "/admin/budgets", '{"subject": "team:t", "limit_usd": %s}'),
    ("POST", "/admin/explain", f'{{{CHAT}, "max_tokens": %s}}'),
    ("POST", "/v1/feedback", '{"request_id": "req_x", "score": %s}'),
    *(
        ("POST", "/v1/chat/completions", f'{{{CHAT}, "{name}": %s}}')
        for name in (*SAMPLING, "max_completion_tokens", "top_logprobs", "a_field_of_tomorrow")
    ),
    ("POST", "/v1/chat/completions", f'{{{CHAT}, "logit_bias": {{"50256": %s}}}}'),
    ("POST", "/v1/chat/completions", f'{{{CHAT}, "tools": [{{"type": "function", "minimum": %s}}]}}'),
    *(("POST", "/v1/completions", f'{{{COMPLETION}, "{name}": %s}}') for name in SAMPLING),
    ("POST", "/v1/completions", '{"model": "small", "prompt": [%s]}'),
    ("POST", "/v1/embeddings", '{"model": "small", "input": "hello", "dimensions": %s}'),
    ("POST", "/v1/embeddings", '{"model": "small", "input": [[1, %s]]}'),
    *(
        ("POST", "/v1/responses", f'{{"model": "small", "input": "hello", "{name}": %s}}')
        for name in ("max_output_tokens", "temperature", "top_p")
    ),
]
QUERIES = [
    "/admin/ledger?limit={}",
    "/admin/ledger?before_seq={}",
    "/admin/decisions?limit={}",
    "/admin/feedback?limit={}",
    "/admin/spend?days={}",
]
LISTS = ("keys", "budgets", "ledger", "decisions", "feedback", "spend", "strategies", "config")


def strict(raw):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(raw, parse_constant=refuse)


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Sends a request over one connection; gives status and body."""
    config = tmp_path_factory.mktemp("numbers") / "gateway.toml"
    config.write_text(CONFIG)
    with served("--config", str(config), environment={"NUMBERS_ADMIN_KEY": KEY}) as running:
        link = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)

        def asked(method, path, body=None):
            headers = {"content-type": "application/json"}
            if path.startswith("/admin"):
                headers["authorization"] = f"Bearer {KEY}"
            link.request(method, path, body, headers)
            answer = link.getresponse()
            return answer.status, answer.read()

        yield asked
        link.close()
        assert running.process.poll() is None
        assert "a bug" not in running.log.read_text()


@pytest.mark.parametrize(("method", "path", "form"), FIELDS)
def test_every_number_of_every_route(ask, method, path, form):
    for value in (*NEVER, *ODD):
        status, raw = ask(method, path, form % value)
        assert status < 500, (value[:40], raw)
        if value in NEVER:
            assert status == 400, (value[:40], raw)
        if status != 200:
            assert set(strict(raw)["error"]) == {"message", "type", "code", "param"}
        elif not raw.startswith(b"data:") and not raw.startswith(b":"):
            strict(raw)


@pytest.mark.parametrize("query", QUERIES)
def test_every_number_of_every_query(ask, query):
    for value in ("NaN", "1e400", "-1", "0", "1.5", "", "9" * 21, "9" * 5000, "\u0663", "true"):
        status, raw = ask("GET", query.format(quote(value)))
        assert status == 400, (value[:40], raw)
        assert strict(raw)["error"]["code"] == "invalid_value"


def test_what_was_taken_is_shown_as_json(ask):
    for value in ODD:
        ask("POST", "/admin/keys", f'{{"rpm": {value}, "expires_s": 4e9}}')
        ask("PUT", "/admin/budgets", f'{{"subject": "team:t", "limit_usd": {value}}}')
    for name in LISTS:
        status, raw = ask("GET", f"/admin/{name}")
        assert status == 200
        strict(raw)


def test_figures_of_strategies_that_json_has_not_are_null():
    value = {"scores": {"a": math.nan, "b": [1.5, -math.inf]}, "n": 3, "none": None}
    assert strict(json_response(value).body) == {"scores": {"a": None, "b": [1.5, None]}, "n": 3, "none": None}


# The same of Python's numbers, which are more

NUMBERS = st.one_of(
    st.floats(),
    st.integers(),
    st.booleans(),
    st.none(),
    st.text(max_size=5),
    st.decimals(),
    st.sampled_from([10**5000, -(10**5000), math.inf, math.nan, 1e308, 2**53, 2**53 + 1, -0.0]),
)


def refusal(work):
    """What is said in place of a result; None if there is one."""
    try:
        work()
    except InputError as error:
        return str(error)
    return None


@given(value=NUMBERS)
def test_a_number_is_checked_or_refused(value):
    said = refusal(lambda: whole("it", value, 1, 100))
    if said is None:
        assert type(value) is int
        assert 1 <= value <= 100
    else:
        assert said.startswith("it is ")
        assert len(said) < 400
    said = refusal(lambda: finite("it", value, -1.5, 1e6))
    if said is None:
        assert not isinstance(value, bool)
        assert -1.5 <= value <= 1e6
    else:
        assert said.startswith("it is ")


@given(
    value=st.one_of(
        NUMBERS,
        st.sampled_from(["1e999999", "1e99999999999999999999", "-1e999999999", "sNaN", "1e-9999999", "1" * 100_000]),
    )
)
def test_an_amount_is_a_whole_number_of_nano_dollars_or_refused(value):
    said = refusal(lambda: nano_dollars(value))
    if said is not None:
        assert len(said) < 400
        return
    nano = nano_dollars(value)
    assert type(nano) is int
    assert abs(nano) <= MOST_NANO
    assert abs(nano - Decimal(str(value)) * NANO) <= Decimal("0.5")


def test_what_a_store_is_told(tmp_path):
    """All that takes a number says no in words, and has then done nothing."""

    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            for value in (math.nan, math.inf, -math.inf, 1e308, 10**30, 10**5000, -1, 0, 1.5, True, "5", [], {}):
                for field in ("rpm", "tpm", "expires_s"):
                    with pytest.raises(InputError, match=f"{field}|expired"):
                        await store.create_key("k", **{field: value})
                if value != 0:
                    with pytest.raises(InputError, match="a limit is"):
                        await store.set_budget("global", value)
                with pytest.raises(InputError, match="is_admin is"):
                    await store.create_key("k", is_admin=5 if value is True else value)
            for value in (math.nan, math.inf, 10**5000, True, "5", None):
                with pytest.raises(InputError, match="score is"):
                    await store.feedback("r", value)
            assert await store.keys() == []
            assert await store.budgets() == []

    asyncio.run(main())


@pytest.mark.parametrize(
    "value", ["nan", "inf", '"1e999999"', '"1e99999999999999999999"', "1e300", "-1", "true", "[]", '"much"']
)
def test_a_price_in_a_config(tmp_path, value):
    path = tmp_path / "gateway.toml"
    path.write_text(
        CONFIG.replace('key = "env:NUMBERS_ADMIN_KEY"', "") + f"price = {{ input_usd = {value}, output_usd = 1 }}\n"
    )
    with pytest.raises(
        ConfigError,
        match=r"gateway\.toml:\d+: models\.0\.price\.input_usd is .*; it must be dollars per million tokens",
    ):
        load_config(path)


def test_a_number_that_json_has_not_goes_to_no_model(tmp_path):
    model = ModelConfig(name="small", deployments=(DeploymentConfig(provider=Mock.Config(model="small")),))
    config = GatewayConfig(models=(model,), require_key=False, store=str(tmp_path / "g.db"))

    async def main():
        async with Gateway(config) as gateway:
            body = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "of_tomorrow": math.inf}
            with pytest.raises(ApiError, match="a number that JSON cannot carry") as caught:
                await gateway.achat(body)
            assert caught.value.status == 400

    asyncio.run(main())
