"""What a call costs, by what its provider said, and by what was asked where it said nothing."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch.bill import bill
from anabranch.gateway.dispatch.billed import broken_off
from anabranch.gateway.providers import conversed, generated_content
from anabranch.gateway.providers.anthropic import Anthropic
from anabranch.gateway.providers.provider import UpstreamRequest
from anabranch.gateway.providers.translation import usage_body
from anabranch.gateway.providers.usage import Usage
from anabranch.routers.money import NANO, PER, Price

LIST = Price.of_dollars("1", "10", "0.1").replace(
    tiers={"priority": Price.of_dollars("2", "20"), "flex": Price.of_dollars("0.5", "5")}, web_search=25 * NANO
)
TOKENS = st.integers(0, 10**6)
USAGES = st.builds(
    Usage,
    prompt=TOKENS,
    completion=TOKENS,
    is_estimated=st.just(False),
    searches=st.none() | st.integers(0, 9),
    tier=st.sampled_from(("", "default", "priority", "flex")),
    nano=st.none() | st.integers(0, 10**12),
)


def of(**usage):
    """From the answer of an upstream of OpenAI's form."""
    tier = usage.pop("service_tier", None)
    return Usage.of({"usage": {"prompt_tokens": 1000, "completion_tokens": 1000, **usage}, "service_tier": tier})


# What the provider says


@pytest.mark.parametrize("told", [10**400, -(10**400), 10**30, -1, float("nan"), float("inf"), True, "1", None, []])
@pytest.mark.parametrize("field", ["cost", "cost_in_usd_ticks", "total_cost", "upstream_inference_cost"])
def test_dollars_that_cannot_be_are_none(field, told):
    tables = {"total_cost": {"cost": {field: told}}, "upstream_inference_cost": {"cost_details": {field: told}}}
    assert of(**tables.get(field, {field: told})).nano is None


def test_dollars_that_it_tells_count_if_they_are_more():
    assert bill(LIST, of(cost=0.05)) == 50_000_000
    assert bill(LIST, of(cost=0.0001)) == bill(LIST, of()) == 11_000_000
    assert bill(LIST, of(cost_in_usd_ticks=37_756_000_000)) == 3_775_600_000
    assert bill(LIST, of(cost={"total_cost": 0.5})) == 500_000_000
    # A key of one's own: OpenRouter's fee, and the provider's bill.
    assert bill(LIST, of(cost=0.95, cost_details={"upstream_inference_cost": 19})) == 19_950_000_000
    assert bill(LIST, of(cost=0.95, is_byok=False, cost_details={"upstream_inference_cost": 19})) == 950_000_000
    assert bill(LIST, of(cost=1e-12)) == 11_000_000
    assert of(cost=1e-12).nano == 1


@pytest.mark.parametrize("cost", [-1, True, "0.05", float("nan"), float("inf"), 1e300, [1], {"total_cost": "x"}])
def test_a_cost_that_makes_no_sense_is_not_believed(cost):
    assert of(cost=cost).nano is None


@pytest.mark.parametrize(
    ("told", "completion"),
    [
        # Of xAI: 10,120 + 1,499 + 2,809; and of OpenAI.
        ({"prompt_tokens": 10120, "completion_tokens": 1499, "total_tokens": 14428, "thoughts": 2809}, 4308),
        ({"prompt_tokens": 20, "completion_tokens": 500, "total_tokens": 520, "thoughts": 200}, 500),
        ({"prompt_tokens": 21, "completion_tokens": 0, "total_tokens": 81, "thoughts": 60}, 60),
        # Of a converter before Gemini: in the sum alone.
        ({"prompt_tokens": 20, "completion_tokens": 198, "total_tokens": 623, "thoughts": 405}, 603),
        ({"prompt_tokens": 20, "completion_tokens": 198, "total_tokens": 623, "thoughts": 0}, 603),
        ({"prompt_tokens": 20, "completion_tokens": 198, "total_tokens": 623, "thoughts": 7}, 603),
        ({"prompt_tokens": 20, "completion_tokens": 0, "total_tokens": 623, "thoughts": 0}, 603),
        ({"prompt_tokens": 20, "completion_tokens": 1, "total_tokens": 623, "thoughts": 0}, 603),
        # Without one the form is OpenAI's.
        ({"prompt_tokens": 20, "completion_tokens": 5, "thoughts": 7}, 5),
        ({"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 1, "thoughts": 7}, 5),
    ],
)
def test_thoughts_that_are_told_beside_the_completion_are_part_of_it(told, completion):
    thoughts = {"completion_tokens_details": {"reasoning_tokens": told["thoughts"]}}
    assert Usage.of({"usage": {**told, **thoughts}}).completion == completion


def test_a_cache_that_is_told_beside_the_prompt_is_no_completion():
    told = {"prompt_tokens": 20, "completion_tokens": 30, "total_tokens": 50_050}
    assert Usage.of({"usage": {**told, "prompt_tokens_details": {"cached_tokens": 50_000}}}).completion == 30


def test_the_tier_that_it_says_counts_and_else_the_one_that_was_asked_for():
    asked = Usage(9, 9, 0, True, tier="priority")
    assert bill(LIST, of(), asked) == 22_000_000
    assert bill(LIST, of(service_tier="default"), asked) == 11_000_000
    assert bill(LIST, of(service_tier="priority")) == 22_000_000
    assert bill(LIST, of(service_tier="flex"), Usage(tier="flex")) == 5_500_000
    # Who asks for the cheap one, and is not told that it was, pays the usual price.
    assert bill(LIST, of(), Usage(tier="flex")) == 11_000_000
    # One without a price: as the dearest that has one.
    assert bill(LIST, of(service_tier="scale")) == 22_000_000


def test_searches_count_as_told_and_else_as_asked():
    asked = Usage(9, 9, 0, True, searches=1)
    assert bill(LIST, of(), asked) == 11_000_000 + 25_000_000
    assert bill(LIST, of(num_search_queries=3), asked) == 11_000_000 + 75_000_000
    assert bill(LIST, of(server_tool_use={"web_search_requests": 0}), asked) == 11_000_000


def test_cache_writes_of_anthropic():
    provider = Anthropic.Config(model="m", key_env=None).build()

    def cost(asked=None, **usage):
        body = {"type": "message", "content": [], "usage": {"input_tokens": 10, "output_tokens": 5, **usage}}
        answer = provider.parse(UpstreamRequest("chat", {"messages": []}), json.dumps(body).encode())
        # What is passed on in OpenAI's form tells the same.
        assert Usage.of(answer.body) == answer.usage
        return bill(LIST, answer.usage, asked)

    rest = 10 * 1000 + 5 * 10_000
    assert cost(cache_creation_input_tokens=100_000, cache_read_input_tokens=0) == rest + 100_000 * 1250
    by_ttl = {"ephemeral_5m_input_tokens": 40_000, "ephemeral_1h_input_tokens": 60_000}
    both = rest + 40_000 * 1250 + 60_000 * 2000
    assert cost(cache_creation_input_tokens=100_000, cache_creation=by_ttl) == both
    for_hour = Usage(9, 9, 0, True, cache_write_1h=9)
    assert cost(for_hour, cache_creation_input_tokens=100_000, cache_creation=by_ttl) == both
    # It does not say for how long, and was asked for an hour.
    assert cost(for_hour, cache_creation_input_tokens=100_000) == rest + 100_000 * 2000
    assert cost(cache_read_input_tokens=1000) == rest + 1000 * 100
    assert cost(service_tier="priority") == 2 * rest
    assert cost(speed="fast") == 2 * rest  # of no price of its own here
    assert cost(server_tool_use={"web_search_requests": 2}) == rest + 2 * 25_000_000


def test_cache_writes_of_bedrock_and_sound_of_gemini():
    told = conversed.usage_of(
        {
            "inputTokens": 10,
            "outputTokens": 5,
            "cacheWriteInputTokens": 1000,
            "cacheReadInputTokens": 7,
            "cacheDetails": [{"ttl": "1h", "inputTokens": 600}, {"ttl": "5m", "inputTokens": 400}],
        }
    )
    assert bill(LIST, told) == 10 * 1000 + 5 * 10_000 + 400 * 1250 + 600 * 2000 + 7 * 100
    assert Usage.of({"usage": usage_body(told)}) == told
    heard, _ = generated_content.usage_of(
        {
            "promptTokenCount": 100,
            "candidatesTokenCount": 50,
            "promptTokensDetails": [{"modality": "AUDIO", "tokenCount": 60}],
            "candidatesTokensDetails": [{"modality": "AUDIO", "tokenCount": 50}, None],
        }
    )
    price = LIST.replace(audio_input=40 * NANO, audio_output=80 * NANO)
    assert bill(price, heard) == 60 * 40_000 + 40 * 1000 + 50 * 80_000
    assert Usage.of({"usage": usage_body(heard, 3)}) == heard


def test_sound_and_pictures():
    price = LIST.replace(audio_input=40 * NANO, audio_output=80 * NANO)
    told = of(prompt_tokens_details={"audio_tokens": 600}, completion_tokens_details={"audio_tokens": 100})
    assert bill(price, told) == 600 * 40_000 + 400 * 1000 + 100 * 80_000 + 900 * 10_000


# What it does not say


def test_what_is_estimated_is_as_dear_as_what_was_asked():
    guess = Usage(1000, 1000, 0, True)
    assert bill(LIST, guess, Usage(5000, 5000, 0, True, cache_write=5000)) == 1000 * 1250 + 10_000_000
    assert bill(LIST, guess, Usage(5000, 5000, 0, True, cache_write_1h=5000)) == 1000 * 2000 + 10_000_000
    assert bill(LIST, guess, Usage(5000, 5000, 0, True, tier="priority", searches=2)) == 22_000_000 + 50_000_000
    dear = LIST.replace(audio_input=40 * NANO, audio_output=80 * NANO)
    assert (
        bill(dear, guess, Usage(5000, 5000, 0, True, audio_input=300, audio_output=5000))
        == 300 * 40_000 + 700_000 + 1000 * 80_000
    )
    # Some cache every prompt, and bill it.
    assert bill(LIST.replace(cache_write=3 * NANO), guess, writes=True) == 3_000_000 + 10_000_000
    assert bill(LIST.replace(cache_write=3 * NANO), guess, Usage(), writes=True) == 3_000_000 + 10_000_000


def test_a_stream_that_broke_keeps_what_was_told_of_its_prompt():
    most = Usage(10**6, 50, 0, True)
    told = Usage(1000, 1, 100, cache_write=700, tier="priority", tells_ttl=True)
    lost = broken_off(most, told, 3, None)
    assert (lost.prompt, lost.completion, lost.cached, lost.cache_write, lost.tier) == (1000, 50, 100, 700, "priority")
    assert lost.is_estimated
    assert broken_off(most, None, 3, None) == most


@given(USAGES, USAGES, st.integers(0, 10**6), st.sampled_from(("", "5m", "1h")))
def test_what_is_set_aside_covers_whatever_the_provider_says_of_less(usage, most, written, ttl):
    """A call within what was asked for, of the tier that was asked for or a standard one, costs no more than the most."""
    prompt, completion = min(usage.prompt, most.prompt), min(usage.completion, most.completion)
    written = min(written, prompt) if ttl else 0
    call = Usage(
        prompt,
        completion,
        prompt - written,
        searches=min(usage.searches or 0, most.searches or 0),
        tier=usage.tier if usage.tier in ("", "default", "flex", most.tier) else "default",
        cache_write=written if ttl == "5m" else 0,
        cache_write_1h=written if ttl == "1h" else 0,
        tells_ttl=True,
    )
    asked = Usage(
        most.prompt,
        most.completion,
        0,
        True,
        searches=most.searches,
        tier=most.tier,
        cache_write=most.prompt if ttl == "5m" else 0,
        cache_write_1h=most.prompt if ttl == "1h" else 0,
    )
    assert bill(LIST, call, asked) <= bill(LIST, asked, asked)


@given(USAGES, USAGES)
def test_never_below_the_list_price_nor_what_was_told(usage, asked):
    cost = bill(LIST, usage, asked)
    assert cost >= (usage.nano or 0)
    assert cost >= Price(input=LIST.input // 2, output=LIST.output // 2).cost(usage.prompt, usage.completion)
    if usage.tier == "":
        assert cost >= LIST.cost(usage.prompt, usage.completion)


@given(USAGES)
def test_openais_form_tells_the_same(usage):
    told = Usage.of({"usage": json.loads(json.dumps(usage.to_openai()))})
    assert told == usage
    assert bill(LIST, told) == bill(LIST, usage)


FIELDS = (
    "prompt_tokens",
    "completion_tokens",
    "prompt_tokens_details",
    "completion_tokens_details",
    "cached_tokens",
    "cache_write_tokens",
    "audio_tokens",
    "cost",
    "total_cost",
    "cost_details",
    "upstream_inference_cost",
    "server_tool_use",
    "web_search_requests",
    "service_tier",
    "cost_in_usd_ticks",
    "is_byok",
    "speed",
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(FIELDS), inner)))
def test_whatever_an_upstream_says_is_read_or_left(usage):
    found = Usage.of({"usage": usage})
    if found is not None:
        assert 0 <= bill(LIST, found) <= 2**53 + 10**9 * (20 * NANO + 2 * NANO) // PER + 25_000_000 * 10**9
