"""The ledger against the invoice where senders choose tiers, caching and searches: never below it, whatever happens."""

import asyncio
import random

import pytest

from anabranch.gateway.config import (
    BreakerConfig,
    DeploymentConfig,
    GatewayConfig,
    LostConfig,
    ModelConfig,
    RetryConfig,
)
from anabranch.gateway.dispatch.bill import bill
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.anthropic import Anthropic
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.usage import Usage
from anabranch.gateway.store import LedgerQuery
from anabranch.routers.money import Price
from anabranch.web.api_error import ApiError
from billing_extras import SEARCH_NANO, RichCall
from billing_provider import BillingProvider
from paced_time import pace, run_paced

PRICES = {
    "small": Price.of_dollars("0.15", "0.6"),
    "large": Price.of_dollars("2.5", "10"),
    "other": Price.of_dollars("3", "15"),
}
TIERS = {
    "small": Price.of_dollars("0.3", "1.2"),
    "large": Price.of_dollars("4.25", "17"),
    "other": Price.of_dollars("9", "45"),
}
TIMEOUT_S, SLOW_S = 0.6, 0.9


def config(url, tmp_path, prices):
    """A model for each price; all times a twentieth of real ones."""

    def provider(name):
        if name == "other":
            return Anthropic.Config(model=name, base_url=url, key_env=None)
        return OpenAI.Config(model=name, base_url=f"{url}/v1", key_env=None)

    def model(name):
        place = DeploymentConfig(provider=provider(name), timeout_s=TIMEOUT_S, first_token_timeout_s=TIMEOUT_S)
        return ModelConfig(name=name, price=prices[name], deployments=(place,))

    return GatewayConfig(
        models=tuple(model(name) for name in prices),
        require_key=False,
        deadline_s=3.0,
        breaker=BreakerConfig(open_s=0.05, max_open_s=0.1),
        retries=RetryConfig(attempts=3, base_s=0.002, cap_s=0.01, budget=1.0),
        lost=LostConfig(margin_s=0.02, output_speed=2000),
        store=str(tmp_path / "g.db"),
    )


def check(provider, rows, most_above):
    """Not one row below its bill or above what was set aside, and the whole at most so much above."""
    charged = {int(row.user): row.cost_nano for row in rows}
    below = {number: nano for number, nano in provider.bills.items() if charged.get(number, 0) < nano}
    assert not below, {number: (nano, charged.get(number)) for number, nano in below.items()}
    assert not [row for row in rows if row.cost_nano > row.reserved_nano]
    assert sum(charged.values()) <= (1 + most_above) * provider.total_nano


def price(name):
    """Of the same list as `billing_extras`, as an operator writes it."""
    dear, own = TIERS[name], PRICES[name]
    tenth = {"cached_input": own.input // 10} if name != "small" else {}
    dear = dear.replace(cached_input=dear.input // 10 if tenth else None)
    if name == "large":
        # It caches by itself.
        dear, tenth = dear.replace(cache_write=dear.input * 5 // 4), tenth | {"cache_write": own.input * 5 // 4}
    searches = {"web_search": 1000 * SEARCH_NANO} if name != "other" else {}
    return own.replace(tiers={"priority": dear}, **tenth, **searches)


def body(draw, number):
    """Of a request whose prompt and user are its number."""
    name = draw.choice(("small", "large", "other"))
    text = f"#{number} " + "some words of a question " * draw.randrange(1, 8)
    asked = {
        "model": name,
        "messages": [{"role": "user", "content": text}],
        "user": str(number),
        "stream": draw.random() < 0.5,
        "max_tokens": draw.choice((40, 80, 160)),
    }
    if name == "other":
        mark = draw.choice((None, {"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}))
        if mark is not None:
            asked["messages"][0]["content"] = [{"type": "text", "text": text, "cache_control": mark}]
    else:
        asked |= draw.choice(({}, {"service_tier": "priority"}, {"service_tier": "auto"}))
        asked |= draw.choice(({}, {}, {"web_search_options": {}}))
    return asked


async def day(tmp_path, requests, seed, weights, leaving):
    provider = BillingProvider(PRICES, seed, weights, slow_s=SLOW_S, after_s=0.001)
    provider.call_kind = RichCall

    async with provider.running():
        made = config(provider.url, tmp_path, {name: price(name) for name in PRICES})
        async with Gateway(made) as gateway:
            pace(gateway)
            numbers = iter(range(requests))

            async def one(number, draw):
                reply = await gateway.handle("chat", body(draw, number))
                if reply.stream is not None:
                    async for _ in reply.stream:
                        pass

            async def sender():
                for number in numbers:
                    draw = random.Random(f"{seed} {number}")
                    patience_s = draw.random() * 0.05 if draw.random() < leaving else None
                    try:
                        await asyncio.wait_for(one(number, draw), patience_s)
                    except (TimeoutError, ApiError):
                        continue

            await asyncio.gather(*(sender() for _ in range(12)))
            await gateway.settled()
            await provider.idle()
            return provider, await gateway.store.ledger(LedgerQuery(limit=100_000))


def test_the_price_list_of_the_provider_is_that_of_the_config():
    draw = random.Random(1)
    for number in range(200):
        asked = body(draw, number)
        call = RichCall(asked, draw)
        own = price(call.model)
        for_hour = call.written if call.ttl == "1h" else 0
        usage = Usage(
            call.prompt,
            call.length,
            call.read,
            cache_write=call.written - for_hour,
            cache_write_1h=for_hour,
            searches=call.searches,
            tier="priority" if call.is_priority else "default",
            tells_ttl=True,
        )
        assert bill(own, usage) - call.nano(own, call.length) in (0, 1)


def test_the_ledger_covers_the_invoice_where_nothing_goes_wrong(tmp_path):
    provider, rows = run_paced(day(tmp_path, 150, 1, (1, 0, 0, 0, 0), 0))
    assert {row.status for row in rows} == {"ok"}
    # Above it only where the provider did not say that it gave less than was asked for.
    check(provider, rows, 0.1)


@pytest.mark.parametrize("seed", [2, 3])
def test_never_below_the_bill_on_a_bad_day(tmp_path, seed):
    provider, rows = run_paced(day(tmp_path, 120, seed, (80, 5, 5, 5, 5), 0.1))
    assert min(provider.calls[fate] for fate in ("slow", "lost", "cut")) > 0
    check(provider, rows, 20.0)


def test_dollars_that_the_provider_tells_are_the_bill(tmp_path):
    class Told(RichCall):
        """Of a provider that takes a fee, and says so."""

        def nano(self, price, made):
            return 3 * super().nano(price, made)

        def openai_usage(self):
            return {**super().openai_usage(), "cost": self.nano(None, self.length) / 10**9}

    async def run():
        provider = BillingProvider(PRICES, 4)
        provider.call_kind = Told
        async with provider.running():
            async with Gateway(config(provider.url, tmp_path, PRICES)) as gateway:
                for number in range(12):
                    asked = {
                        "model": "small",
                        "messages": [{"role": "user", "content": f"#{number} x"}],
                        "user": str(number),
                        "max_tokens": 9,
                    }
                    reply = await gateway.handle("chat", {**asked, "stream": number % 2 == 0})
                    if reply.stream is not None:
                        async for _ in reply.stream:
                            pass
                await gateway.settled()
                rows = await gateway.store.ledger(LedgerQuery(limit=100))
        assert {int(row.user): row.cost_nano for row in rows} == dict(provider.bills)

    asyncio.run(run())
