"""What is known of prices, and what is refused where nothing is: the list that ships, the config, requests, budgets."""

import asyncio
import dataclasses
import json
import logging
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.config import from_dict, to_dict
from anabranch.errors import BudgetError, ConfigError
from anabranch.gateway.asked import Asked, asked_of
from anabranch.gateway.config import (
    DeploymentConfig,
    GatewayConfig,
    LimitsConfig,
    ModelConfig,
    StrategyConfig,
    load_config,
)
from anabranch.gateway.config.price_table import FILE, list_price, table
from anabranch.gateway.config.prices import deployment_price, model_price, unpriced
from anabranch.gateway.core.bounds import Bounds
from anabranch.gateway.core.purse import Purse
from anabranch.gateway.dispatch.bill import bill
from anabranch.gateway.dispatch.billed import broken_off
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.prompt_tokens import PromptCount, count_prompt
from anabranch.gateway.providers.anthropic import Anthropic
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.usage import Usage
from anabranch.gateway.store import LedgerQuery
from anabranch.gateway.store.records import GLOBAL
from anabranch.routers.money import NANO, Price, in_full
from anabranch.web.api_error import ApiError
from billing_provider import BillingProvider, Call

USUAL = Price.of_dollars("1", "10")
HELLO = [{"role": "user", "content": "hello"}]

# The list that ships


def test_the_list_names_its_source_its_licence_and_its_day():
    assert table()["source"].startswith("genai-prices ")
    assert "MIT" in table()["licence"]
    assert "MIT License" in FILE.with_name("prices.LICENSE.txt").read_text()
    assert len(table()["date"]) == 10


def test_every_price_of_the_list_can_be_read():
    for provider in table()["providers"]:
        for model in provider["models"]:
            for _, fields in model["prices"]:
                price = from_dict(Price, fields)
                assert price.cost(10**6, 10**6) >= price.input // 2


def test_models_are_found_where_they_are_served():
    openai, anthropic = "https://api.openai.com/v1", "https://api.anthropic.com"
    priced = list_price(openai, "gpt-4o-2024-11-20")
    assert (priced.input, priced.output, priced.cached_input) == (2_500_000_000, 10_000_000_000, 1_250_000_000)
    assert priced.of_tier("priority").output == 17 * NANO
    assert list_price(openai, "GPT-4o") == priced
    assert list_price("https://me.openai.azure.com/openai/v1", "gpt-4o").input == priced.input
    claude = list_price(anthropic, "claude-sonnet-4-5")
    assert (claude.cache_write, claude.cache_write_1h) == (3_750_000_000, 6_000_000_000)
    assert claude.web_search == 10 * NANO
    assert list_price("https://generativelanguage.googleapis.com/v1beta/openai", "gemini-2.5-flash").audio_input == NANO
    assert list_price("https://openrouter.ai/api/v1", "openai/gpt-4o") is not None
    for url, name in ((openai, "gpt-none"), (openai, ""), ("http://127.0.0.1:8000/v1", "gpt-4o"), ("", "gpt-4o")):
        assert list_price(url, name) is None


def test_prices_that_change_on_a_day_change_on_it():
    before, since = (
        list_price("https://api.anthropic.com", "claude-opus-4-6", day) for day in ("2026-03-12", "2026-03-13")
    )
    assert (before.long_context, since.long_context) == (200_000, None)
    assert before.cost(200_001, 0) == 2 * since.cost(200_001, 0)


# Of the config


def place(price=None, **fields):
    return DeploymentConfig(provider=OpenAI.Config(**{"key_env": None, "model": "m", **fields}), price=price)


def test_a_price_is_the_deployments_else_the_models_else_that_of_the_list():
    model = ModelConfig(name="m", price=USUAL, deployments=(place(Price(input=1)), place(model="gpt-4o")))
    assert [deployment_price(model, one) for one in model.deployments] == [Price(input=1), USUAL]
    assert model_price(model) == USUAL
    listed = ModelConfig(name="m", deployments=(place(model="gpt-4o-mini"), place(model="gpt-4o")))
    assert model_price(listed).output == 10 * NANO
    unknown = ModelConfig(name="u", deployments=(place(base_url="http://10.0.0.1/v1"),))
    assert deployment_price(unknown, unknown.deployments[0]) is None
    free = ModelConfig(name="f", deployments=(DeploymentConfig(provider=Mock.Config(model="m")),))
    assert model_price(free) == Price()
    said = unpriced([model, listed, unknown, free])
    assert len(said) == 1
    assert "deployment u of model u has no price" in said[0]


CONFIG = """
models:
- name: m
  price:
    input_usd: 1
    output_usd: "10"
    cache_write_1h_usd: 3
    web_search_usd: 10
    tiers: {priority: {output_usd: 20}}
    long_context: 100
    long: {input_usd: 2}
  deployments:
  - provider: {kind: openai, model: m, key_env: ""}
  - provider: {kind: openai, model: m, key_env: ""}
    price: {input_usd: 0.5, output_usd: 5}
"""


def test_a_file_writes_dollars_and_a_tier_costs_what_it_does_not_name_as_usual(tmp_path):
    file = tmp_path / "g.yaml"
    file.write_text(CONFIG)
    model = load_config(file).models[0]
    price = model.price
    assert (price.input, price.output, price.cache_write_1h, price.web_search) == (NANO, 10 * NANO, 3 * NANO, 10 * NANO)
    assert (price.tiers["priority"].input, price.tiers["priority"].output) == (NANO, 20 * NANO)
    assert (price.long.input, price.long.output) == (2 * NANO, 10 * NANO)
    assert model.deployments[1].price == Price.of_dollars("0.5", "5")
    assert from_dict(GatewayConfig, to_dict(load_config(file))) == load_config(file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("web_search_usd: 10", "web_serch_usd: 10", "g.yaml:8: models.0.price: Price has no field 'web_serch_usd'"),
        ("output_usd: 20", "output_usd: -1", "models.0.price.tiers.priority.output_usd is -1; it must be dollars"),
        ("{output_usd: 20}", "5", "models.0.price.tiers.priority is 5"),
        ("long: {input_usd: 2}", "long: 5", "models.0.price.long is 5"),
        ("input_usd: 0.5", "input_usd: x", "models.0.deployments.1.price.input_usd is 'x'"),
        ("    long_context: 100\n", "", "long_context and long go together"),
    ],
)
def test_a_price_that_is_wrong_is_told_with_its_place(tmp_path, old, new, message):
    file = tmp_path / "g.yaml"
    assert old in CONFIG
    file.write_text(CONFIG.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert message in str(caught.value)


# What requests ask for


SEARCH = {"type": "web_search_20250305", "name": "web_search"}
FETCH = {"type": "web_fetch_20250910", "name": "web_fetch"}
FINDER = {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}
BM25, TOOLSET, TWICE = {"type": "tool_search_tool_bm25"}, {"type": "mcp_toolset"}, {**SEARCH, "max_uses": 2}
ACCENTED = {"type": "custom", "name": "naïf"}


def size_of(*tools):
    """Bytes of definitions: tokens are no more."""
    return sum(len(str(tool).encode()) for tool in tools)


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({}, Asked()),
        (
            {"service_tier": None, "modalities": ["text"], "tools": [{"type": "function"}, {"type": "bash_20250124"}]},
            Asked(),
        ),
        ({"service_tier": "auto", "speed": "standard", "web_search_options": None, "models": None}, Asked(tier="auto")),
        ({"service_tier": "Priority"}, Asked(tier="priority")),
        ({"service_tier": 5}, Asked(tier="5")),
        ({"service_tier": "x" * 99}, Asked(tier="x" * 40)),
        ({"speed": "fast"}, Asked(tier="fast")),
        ({"speed": "fast", "service_tier": "priority"}, Asked(tier="priority fast")),
        ({"web_search_options": {}}, Asked(searches=1)),
        ({"tools": [{**SEARCH, "max_uses": 5}]}, Asked(searches=5, uses=5, page=30_000)),
        # Claude knows no such field: it counts where it is made the tool's own.
        ({"tools": [SEARCH], "max_tool_calls": 3}, Asked(held=("tools[0].max_uses",), searches=3, uses=3, page=30_000)),
        (
            {"tools": [{"type": "function"}, FETCH], "max_tool_calls": 3},
            Asked(held=("tools[1].max_uses",), uses=3, page=125_000),
        ),
        ({"tools": [{**SEARCH, "max_uses": 2}], "max_tool_calls": 3}, Asked(searches=2, uses=2, page=30_000)),
        ({"tools": [{**SEARCH, "max_uses": 4}], "max_tool_calls": 3}, Asked(searches=4, uses=4, page=30_000)),
        (
            {"tools": [{**SEARCH, "max_uses": 0}], "max_tool_calls": -1},
            Asked(others=("tools[0].max_uses",), page=30_000),
        ),
        ({"tools": [{"type": "code_execution_20250825"}], "max_tool_calls": 3}, Asked(others=("tools[0]",))),
        ({"tools": [{"type": "web_search"}], "max_tool_calls": 3}, Asked(searches=3, uses=3, page=30_000)),
        ({"tools": [{"type": "web_search_2025_08_26"}], "max_tool_calls": 3}, Asked(searches=3, uses=3, page=30_000)),
        # And others know nothing of Claude's.
        ({"tools": [{"type": "web_search", "max_uses": 3}]}, Asked(others=("max_tool_calls",), page=30_000)),
        (
            {"tools": [{"type": "mcp", "max_uses": 3}]},
            Asked(others=("max_tool_calls",), page=2_000_000, listed=2_000_000),
        ),
        (
            {"tools": [{"type": "mcp", "max_uses": 3}], "max_tool_calls": 5},
            Asked(uses=5, page=2_000_000, listed=2_000_000),
        ),
        ({"tools": [SEARCH]}, Asked(others=("tools[0].max_uses",), page=30_000)),
        ({"tools": [{**FETCH, "max_uses": 2}]}, Asked(uses=2, page=125_000)),
        ({"tools": [{**FETCH, "max_uses": 2, "max_content_tokens": 9_000}]}, Asked(uses=2, page=9_000)),
        ({"tools": [{**FETCH, "max_uses": 1}, {**SEARCH, "max_uses": 2}]}, Asked(searches=2, uses=3, page=125_000)),
        ({"tools": [{"type": "mcp_toolset"}]}, Asked(uses=10, page=2_000_000, listed=2_000_000)),
        (
            {"tools": [{"type": "mcp_toolset"}] * 2, "mcp_servers": [{"type": "url"}]},
            Asked(uses=10, page=2_000_000, listed=2_000_000),
        ),
        ({"mcp_servers": [{"type": "url"}]}, Asked(uses=10, page=2_000_000, listed=2_000_000)),
        ({"mcp_servers": []}, Asked()),
        ({"tools": [{"type": "mcp"}], "max_tool_calls": 3}, Asked(uses=3, page=2_000_000, listed=2_000_000)),
        ({"tools": [{"type": "mcp"}]}, Asked(others=("max_tool_calls",), page=2_000_000, listed=2_000_000)),
        # They look among the request's own tools, in as many rounds; servers are asked in the same.
        ({"tools": [FINDER]}, Asked(uses=10, found=size_of(FINDER))),
        ({"tools": [BM25, ACCENTED]}, Asked(uses=10, found=size_of(BM25, ACCENTED))),
        (
            {"tools": [FINDER, TOOLSET]},
            Asked(uses=10, page=2_000_000, listed=2_000_000, found=size_of(FINDER, TOOLSET)),
        ),
        ({"tools": [FINDER, TWICE]}, Asked(searches=2, uses=12, page=30_000, found=size_of(FINDER, TWICE))),
        ({"tools": [{"type": "tool_search"}]}, Asked(uses=10, found=23)),
        ({"tools": [{"type": "tool_search"}], "max_tool_calls": 3}, Asked(uses=3, found=23)),
        ({"tools": [{"type": "tool_search", "execution": "server"}], "max_tool_calls": 30}, Asked(uses=30, found=46)),
        ({"tools": [{"type": "tool_search", "execution": "client"}]}, Asked()),
        ({"tools": [{"type": "shell"}, {"type": "shell", "environment": {"type": "local"}}]}, Asked()),
        ({"tools": [{"type": "shell", "environment": {"type": "container_auto"}}]}, Asked(others=("tools[0]",))),
        ({"tools": [FETCH]}, Asked(others=("tools[0].max_uses",), page=125_000)),
        ({"tools": [{"type": "function"}, {"type": "code_interpreter"}]}, Asked(others=("tools[1]",))),
        ({"models": ["x"], "plugins": []}, Asked(others=("models", "plugins"))),
        ({"search_parameters": {"mode": "off"}, "enable_search": False}, Asked()),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, Asked(others=("context_management",))),
        (
            {"context_management": {"edits": [{"type": "clear_thinking_20251015"}, {"type": "compact_20260112"}]}},
            Asked(others=("context_management",)),
        ),
        (
            {"context_management": [{"type": "compaction", "compact_threshold": 9}]},
            Asked(others=("context_management",)),
        ),
        ({"context_management": {"edits": 5}}, Asked(others=("context_management",))),
        ({"context_management": 5}, Asked(others=("context_management",))),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, Asked()),
        ({"context_management": {"edits": []}}, Asked()),
        ({"context_management": {}}, Asked()),
        ({"context_management": []}, Asked()),
        ({"context_management": None}, Asked()),
        ({"modalities": ["text", "audio"], "audio": {"voice": "x"}}, Asked(audio_output=True)),
        ({"audio": {"voice": "x"}}, Asked(audio_output=True)),
        ({"modalities": ["image", "text"]}, Asked(image_output=True)),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            Asked(audio_input=True),
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            Asked(audio_input=True),
        ),
        ({"input": [{"type": "function_call_output", "output": [{"type": "input_audio"}]}]}, Asked(audio_input=True)),
        ({"input": [{"content": [{"type": "input_text", "cache_control": {"ttl": "1h"}}]}]}, Asked(ttl="1h")),
        ({"input": ["a text", "to be embedded"]}, Asked()),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "cache_control": {"type": "ephemeral"}}]}]},
            Asked(ttl="5m"),
        ),
        ({"cache_control": {"type": "ephemeral", "ttl": "1h"}}, Asked(ttl="1h")),
        ({"messages": [{"role": "assistant", "tool_calls": [{"cache_control": {}}]}]}, Asked(ttl="5m")),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"cache_control": {}}]}]}]},
            Asked(ttl="5m"),
        ),
        ({"tools": [{"type": "function", "function": {"cache_control": {"ttl": "1h"}}}]}, Asked(ttl="1h")),
        (
            {
                "system": [{"cache_control": {"ttl": "5m"}}],
                "tools": [{"type": "custom", "cache_control": {"ttl": "1d"}}],
            },
            Asked(ttl="1h"),
        ),
    ],
)
def test_what_a_request_asks_for(body, asked):
    assert asked_of(body) == asked


def test_a_field_of_chats_bounds_nothing_in_other_forms():
    """A message goes to Claude as it came, with a field that nobody there knows."""
    body = {"tools": [SEARCH], "max_tool_calls": 3}
    assert asked_of(body, is_chat=False) == Asked(others=("tools[0].max_uses",), page=30_000)
    plain = {"tools": [{"type": "web_search"}], "max_tool_calls": 3}
    assert asked_of(plain, is_chat=False) == asked_of(plain)


def test_what_is_found_among_the_tools_of_a_request_is_read_again_after_each_search():
    """Nothing was reserved for it: a key with many tools spent ten times what it had."""
    tools = [
        FINDER,
        *({"name": f"tool{number}", "defer_loading": True, "description": "x" * 99} for number in range(9)),
    ]
    body = {"messages": HELLO, "tools": tools}
    count = count_prompt(body)
    found = size_of(*tools)
    prompt, again = count.at_most, range(1, 11)
    assert asked_of(body, count).most(count, 100).prompt == prompt + sum(prompt + 100 + use * found for use in again)
    # No more than the model has room for.
    assert asked_of(body, count).most(count, 100, context=2_000).prompt == prompt + 10 * 2_000
    # Nor does a search find more than there is in the prompt.
    few = PromptCount(50, 60, False)
    assert asked_of(body).most(few, 100).prompt == 60 + sum(60 + 100 + use * 60 for use in again)
    # Pages beside them are longer.
    both = asked_of({**body, "tools": [*tools, {**SEARCH, "max_uses": 1}]})
    assert both.most(count, 100).pages == sum(prompt + 100 + use * 30_000 for use in range(1, 12))


def test_what_servers_of_a_sender_tell_is_bounded_by_what_the_model_has_room_for():
    """They were taken for tools that cost nothing: a key with 5 cents spent $2.70 by a server of its own that told 900,000 tokens."""
    count = PromptCount(100, 200, True)
    asked = asked_of({"mcp_servers": [{"type": "url", "url": "https://mine.example"}]})
    # What the server lists, and ten rounds, each of which may read all that the model has room for; nobody knows better where its room
    # is not known.
    assert asked.most(count, 50, 200_000).prompt == 11 * 200_000
    assert asked.most(count, 50).prompt >= 11 * 2_000_000
    assert asked_of({"tools": [{"type": "function"}]}).most(count, 50, 200_000).prompt == 200


@given(
    st.integers(1, 900),
    st.integers(0, 300),
    st.integers(0, 4),
    st.integers(0, 400),
    st.sampled_from((0, 700)),
    st.none() | st.integers(1, 1_500),
)
def test_what_is_read_again_and_again_is_never_more_than_the_most(prompt, completion, uses, page, listed, context):
    """What a server lists was left out: of one use of two that each filled the model half was reserved."""
    asked = Asked(uses=uses, page=page, listed=listed)
    # Nobody reads more than there is room for.
    first, room = (float("inf"),) * 2 if context is None else (max(context, prompt), max(context, prompt + completion))
    again = [min(prompt + listed + completion + use * page, room) for use in range(1, uses + 1)]
    read = [min(prompt + listed, first), *again]
    most = asked.most(PromptCount(prompt, prompt, True), completion, context)
    assert sum(read) <= most.prompt
    assert most.pages == most.prompt - prompt
    assert context is not None or sum(read) == most.prompt


def test_what_a_price_lacks():
    for asked, field in (
        (Asked(tier="priority"), "service_tier"),
        (Asked(tier="fast"), "speed"),
        (Asked(searches=1), "web_search_options"),
        (Asked(audio_input=True), "messages"),
        (Asked(audio_output=True), "modalities"),
        (Asked(image_output=True), "modalities"),
        (Asked(others=("models",)), "models"),
        (Asked(others=("tools[3]",)), "tools[3]"),
    ):
        assert asked.lacks(USUAL)[0] == field
        assert asked.lacks(Price()) is None
    # What has to be said is no price.
    for asked in (
        Asked(others=("max_tool_calls",)),
        Asked(others=("tools[3].max_uses",)),
        Asked(held=("tools[3].max_uses",)),
    ):
        assert asked.lacks(USUAL) == ((asked.others or asked.held)[0], None)
    assert Asked(held=("tools[3].max_uses",)).lacks(USUAL, holds=True) is None
    assert Asked(others=("tools[3].max_uses",)).lacks(USUAL, holds=True) == ("tools[3].max_uses", None)
    whole = USUAL.replace(tiers={"priority": USUAL}, web_search=1, audio_input=1, audio_output=1, image_output=1)
    assert Asked("priority", "1h", 3, True, True, True).lacks(whole) is None
    assert Asked(tier="auto").lacks(USUAL) is None


def test_what_tools_bring_into_the_prompt_is_part_of_the_most():
    count = count_prompt({"messages": [{"role": "user", "content": "x" * 993}]})
    assert count.at_most == 1000
    asked = asked_of({"tools": [{**SEARCH, "max_uses": 2}]})
    # It is read three times: 1,000; with an answer so far and 30,000 of the first search; with both and another 30,000.
    most = asked.most(count, 100)
    assert (most.prompt, most.pages) == (1000 + 1100 + 30_000 + 1100 + 60_000, 92_200)
    assert most.searches == 2
    # No more than the model has room for.
    assert asked.most(count, 100, context=20_000).prompt == 1000 + 2 * 20_000
    assert asked.most(count, 50_000, context=20_000).prompt == 1000 + 2 * 51_000
    assert Asked(searches=1).most(count, 100).pages == 0


def test_pages_are_reserved_within_the_context_of_the_model():
    body = {
        "messages": [{"role": "user", "content": "x" * 993}],
        "max_tokens": 100,
        "tools": [{**SEARCH, "max_uses": 2}],
    }
    count = count_prompt({"messages": body["messages"]})
    given = SimpleNamespace(context=20_000, max_tokens=None)
    runtime = SimpleNamespace(
        models={"m": given},
        config=SimpleNamespace(limits=SimpleNamespace(max_tokens=9)),
        dispatcher=SimpleNamespace(groups={"m": SimpleNamespace(lives=())}),
    )
    bounds = Bounds("chat", body, runtime, count, asked_of(body))
    assert bounds.most("m", None).prompt == 1000 + 2 * 20_000
    given.context = None
    assert bounds.most("m", None).prompt == 1000 + 92_200


def test_a_stream_that_broke_off_is_charged_the_pages_that_it_may_have_read():
    price = Price.of_dollars("3", "15").replace(web_search=10 * NANO)
    count = count_prompt({"messages": [{"role": "user", "content": "hi"}]})
    most = asked_of({"tools": [{**SEARCH, "max_uses": 1}]}).most(count, 100)
    # What is told at the beginning is the sender's prompt alone, and no search yet.
    usage = broken_off(most, Usage(7, 1, searches=0), 5, 8)
    assert usage.prompt == most.prompt > 30_000
    assert bill(price, usage, most) == most.prompt * 3000 + usage.completion * 15_000 + 10 * NANO // 1000
    # Told at the end it counts as told.
    assert bill(price, Usage(900, 10, searches=1), most) == 900 * 3000 + 10 * 15_000 + 10 * NANO // 1000


def test_the_most_that_may_be_asked_for_is_as_dear_as_it_may_be():
    parts = [
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
        {"type": "image_url", "image_url": {"url": "http://x"}},
    ]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "cache_control": {},
        "modalities": ["audio"],
        "service_tier": "priority",
    }
    count = count_prompt(body)
    most = asked_of(body).most(count, 100)
    assert 0 < most.audio_input < count.at_most
    assert most.image_input > 1000
    assert (most.audio_output, most.cache_write, most.tier, most.completion) == (100, count.at_most, "priority", 100)


PLAIN = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
FIELDS = st.sampled_from(("content", "type", "cache_control", "ttl", "max_uses", "mode"))
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=3), max_leaves=8
)
NAMES = st.sampled_from(
    (
        "messages",
        "tools",
        "system",
        "service_tier",
        "speed",
        "modalities",
        "audio",
        "web_search_options",
        "plugins",
        "context_management",
    )
)


@given(st.dictionaries(NAMES, JSON))
def test_whatever_a_body_holds_is_read(body):
    asked = asked_of(body)
    assert asked.lacks(Price()) is None
    assert asked.lacks(USUAL) is None or isinstance(asked.lacks(USUAL)[0], str)


# Requests


def config(url, tmp_path, **changes):
    rich = USUAL.replace(tiers={"priority": Price.of_dollars("2", "20")}, web_search=25 * NANO)

    def model(name, price, kind=OpenAI):
        base = f"{url}/v1" if kind is OpenAI else url
        provider = kind.Config(model=name, base_url=base, key_env=None)
        return ModelConfig(name=name, price=price, deployments=(DeploymentConfig(provider=provider),))

    made = GatewayConfig(
        models=(
            model("plain", USUAL),
            model("rich", rich),
            model("none", None),
            model("free", Price()),
            model("claude", USUAL, Anthropic),
        ),
        strategies={"cheapest": StrategyConfig(use="cheapest", models=("none", "rich"))},
        fallbacks={"plain": ("rich",)},
        require_key=False,
        store=str(tmp_path / "g.db"),
    )
    return made.replace(**changes)


def served(tmp_path, work, **changes):
    async def run():
        provider = BillingProvider({"plain": USUAL, "rich": USUAL, "none": USUAL, "free": USUAL, "claude": USUAL}, 1)
        async with provider.running(), Gateway(config(provider.url, tmp_path, **changes)) as gateway:
            return await work(gateway, provider)

    return asyncio.run(run())


async def refused(gateway, **body):
    with pytest.raises(ApiError) as caught:
        await gateway.achat({"messages": HELLO, "max_tokens": 5, **body})
    return caught.value


def test_fields_that_change_a_price_go_where_they_have_one_and_are_refused_elsewhere(tmp_path):
    async def work(gateway, provider):
        for field, value in (
            ("service_tier", "priority"),
            ("web_search_options", {}),
            ("speed", "fast"),
            ("models", ["x"]),
            ("plugins", [{"id": "web"}]),
            ("modalities", ["text", "audio"]),
            ("tools", [{"type": "code_interpreter"}]),
            ("context_management", {"edits": [{"type": "compact_20260112"}]}),
        ):
            error = await refused(gateway, model="claude", **{field: value})
            assert (error.status, error.code) == (400, "unpriced")
            assert error.param.partition("[")[0] == field
            assert "claude has no price for" in str(error)
        for model, field, asked in (
            ("claude", "tools[0].max_uses", {"tools": [FETCH]}),
            # It holds no tools of Claude to anything.
            ("rich", "tools[0].max_uses", {"tools": [SEARCH], "max_tool_calls": 1}),
            ("rich", "max_tool_calls", {"tools": [{"type": "web_search"}]}),
            ("rich", "max_tool_calls", {"tools": [{"type": "mcp"}]}),
        ):
            error = await refused(gateway, model=model, **asked)
            assert (error.status, error.code, error.param) == (400, "unpriced", field)
            assert f"{field} must say how often the tool may be used at most" in str(error)
        assert not provider.calls
        # What is not priced at one is sent to the next that prices it.
        answer = await gateway.achat({"model": "plain", "messages": HELLO, "max_tokens": 5, "service_tier": "priority"})
        assert answer["choices"]
        await gateway.achat({"model": "free", "messages": HELLO, "max_tokens": 5, "service_tier": "priority"})
        await gateway.achat({"model": "rich", "messages": HELLO, "max_tokens": 5, "web_search_options": {}})
        await gateway.achat({"model": "plain", "messages": HELLO, "max_tokens": 5, "service_tier": "default"})
        await gateway.settled()
        rows = sorted(await gateway.store.ledger(LedgerQuery()), key=lambda row: row.seq)
        rows = [row for row in rows if row.status == "ok"]
        assert [row.model for row in rows] == ["rich", "free", "rich", "plain"]
        tokens = [USUAL.cost(row.prompt_tokens, row.completion_tokens) for row in rows]
        assert [row.cost_nano for row in rows] == [2 * tokens[0], 0, tokens[2] + 25_000_000, tokens[3]]
        assert rows[0].reserved_nano >= 2 * tokens[0]
        assert rows[2].reserved_nano >= 25_000_000

    served(tmp_path, work)


def test_what_has_no_price_may_be_allowed(tmp_path):
    async def work(gateway, provider):
        await gateway.achat({"model": "plain", "messages": HELLO, "max_tokens": 5, "service_tier": "priority"})
        await gateway.store.set_budget(GLOBAL, NANO)
        await gateway.achat({"model": "none", "messages": HELLO, "max_tokens": 5})

    served(tmp_path, work, limits=LimitsConfig(allow_unpriced=True))


def test_a_model_without_a_price_is_refused_where_money_is_limited(tmp_path, caplog):
    async def work(gateway, provider):
        asked = {"messages": HELLO, "max_tokens": 5}
        await gateway.achat({"model": "none", **asked})
        await gateway.store.set_budget("user:ann", 10 * NANO)
        await gateway.achat({"model": "none", "user": "bob", **asked})
        error = await refused(gateway, model="none", user="ann")
        assert (error.status, error.code, error.param) == (400, "model_not_priced", "model")
        assert "nobody knows what none costs, and a budget applies" in str(error)
        # A strategy goes on to what has one; a model that is free by its config is priced.
        await gateway.achat({"model": "auto/cheapest", "user": "ann", **asked})
        await gateway.achat({"model": "free", "user": "ann", **asked})
        await gateway.settled()
        rows = await gateway.store.ledger(LedgerQuery())
        assert [row.model for row in sorted(rows, key=lambda row: row.seq)] == ["none", "none", "", "rich", "free"]

    with caplog.at_level(logging.WARNING):
        served(tmp_path, work)
    assert sum("deployment none of model none has no price" in one.message for one in caplog.records) == 1


def test_a_limit_of_the_request_itself_is_a_budget(tmp_path):
    async def work(gateway, provider):
        assert (await refused(gateway, model="none")).code == "model_not_priced"

    served(tmp_path, work, limits=LimitsConfig(request_usd=1.0))


def test_deployments_have_prices_of_their_own_and_the_cheapest_is_asked(tmp_path):
    async def work(gateway, provider):
        for _ in range(6):
            await gateway.achat({"model": "m", "messages": HELLO, "max_tokens": 5})
        await gateway.settled()
        rows = await gateway.store.ledger(LedgerQuery())
        assert {row.deployment for row in rows} == {"cheap"}
        assert {row.price for row in rows} == {Price.of_dollars("0.5", "5")}
        for row in rows:
            assert row.cost_nano == Price.of_dollars("0.5", "5").cost(row.prompt_tokens, row.completion_tokens)
            # The dearest may be asked too.
            assert row.reserved_nano >= 5 * 20_000

    async def run():
        provider = BillingProvider({"plain": USUAL}, 1)
        async with provider.running():
            where = {"model": "plain", "base_url": f"{provider.url}/v1", "key_env": None}
            dear, cheap, unknown = (
                DeploymentConfig(name=name, provider=OpenAI.Config(**where), price=price)
                for name, price in (
                    ("dear", Price.of_dollars("2", "20")),
                    ("cheap", Price.of_dollars("0.5", "5")),
                    ("usual", None),
                )
            )
            models = (ModelConfig(name="m", price=USUAL, deployments=(dear, cheap, unknown), balance="price"),)
            made = GatewayConfig(models=models, require_key=False, store=str(tmp_path / "g.db"))
            async with Gateway(made) as gateway:
                await work(gateway, provider)

    asyncio.run(run())


def test_a_tier_that_the_provider_chose_and_nobody_priced_is_told_once(tmp_path, caplog):
    class Scaled(Call):
        """Of an account whose calls are all of a tier of its own."""

        def beside(self):
            return {"service_tier": "scale"}

    async def work(gateway, provider):
        provider.call_kind = Scaled
        for _ in range(3):
            await gateway.achat({"model": "rich", "messages": HELLO, "max_tokens": 5})
        await gateway.settled()
        for row in await gateway.store.ledger(LedgerQuery()):
            assert row.cost_nano == 2 * USUAL.cost(row.prompt_tokens, row.completion_tokens)

    with caplog.at_level(logging.WARNING):
        served(tmp_path, work)
    assert sum("deployment rich says that it served the tier 'scale'" in one.message for one in caplog.records) == 1


# Sentences about money


@given(st.integers(1, 10**13), st.integers(0, 10**13), st.integers(1, 10**13))
def test_no_two_amounts_of_a_refusal_look_alike(limit, spent, asked):
    from anabranch.gateway.store.accounts import Account
    from anabranch.gateway.store.batch import _refusal

    fields = {"id": 1, "subject": "key:a", "period": "day", "limit": limit, "spent": min(spent, limit), "reserved": 0}
    names = [field.name for field in dataclasses.fields(Account)]
    account = Account(**{name: fields.get(name) for name in names})
    amounts = {limit, max(0, limit - account.spent), asked}
    text = str(_refusal(account, asked, 0))
    assert {in_full(amount) for amount in amounts} == {
        word.rstrip(";,") for word in text.split() if word.startswith("$")
    }
    assert len({in_full(amount) for amount in amounts}) == len(amounts)

    async def of_purse():
        async def reserve(nano):
            raise AssertionError

        with pytest.raises(BudgetError) as caught:
            await Purse(reserve, reserve, limit).hold(limit + asked)
        return str(caught.value)

    said = {word.rstrip(";,") for word in asyncio.run(of_purse()).split() if word.startswith("$")}
    assert said == {in_full(limit), in_full(limit + asked)}


def test_a_chat_to_claude_is_reserved_as_often_as_its_tools_may_be_used_there(tmp_path):
    """It was refused, whatever it said: what bounds a tool there was made of a field that was not believed."""

    sent = []

    async def work(gateway, provider):
        [claude] = [live for live in gateway.runtime.dispatcher.lives() if live.model == "claude"]
        build = claude.provider.build

        def noted(request):
            call = build(request)
            sent.append(json.loads(call.body))
            return call

        claude.provider.build = noted
        await gateway.achat(
            {"model": "claude", "messages": HELLO, "max_tokens": 5, "tools": [FETCH], "max_tool_calls": 2}
        )
        assert [tool["max_uses"] for tool in sent[0]["tools"]] == [2]
        await gateway.settled()
        [row] = await gateway.store.ledger(LedgerQuery())
        assert row.reserved_nano >= USUAL.cost(2 * 125_000, 5)

    served(tmp_path, work)
