"""The ledger against the invoice of a provider that bills what it made, under faults, hedges, retries, cut streams, clients that leave,
and kills of the gateway.

Never below the bill, request by request; and, as a call whose end is not known is charged the most it can have cost, not far above it.
Provider and gateway share a loop whose time is that in which both could work: what is charged by time is so on any machine.
"""

import asyncio
import contextlib
import http.client
import json
import random
import signal
import threading
import time
from collections import Counter

import pytest

from anabranch.errors import CapacityError
from anabranch.gateway.config import (
    BreakerConfig,
    DeploymentConfig,
    GatewayConfig,
    HedgeConfig,
    LostConfig,
    ModelConfig,
    RetryConfig,
    StrategyConfig,
)
from anabranch.gateway.dispatch.hedge import HedgeDelay
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.anthropic import Anthropic
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.store import LedgerQuery, open_store
from anabranch.routers.money import Price
from anabranch.web.api_error import ApiError
from billing_provider import FATES, HABITS, BillingProvider
from gateway_process import served
from paced_time import pace, run_paced

PRICES = {
    "small": Price.of_dollars("0.15", "0.6"),
    "large": Price.of_dollars("2.5", "10"),
    "other": Price.of_dollars("3", "15"),
}
FALLBACKS = {"small": ("large", "other"), "large": ("other",), "other": ("small",)}
NAMES = ("small", "small", "large", "other", "auto/cheapest")

# Of FATES: three calls in a hundred meet something, as on a bad day.
FAULTS = (97, 0.6, 2, 0.2, 0.2)
# Of HABITS.
TALK = (60, 15, 10, 0.2, 14.8)
HEDGE_S, TIMEOUT_S, SLOW_S = 0.2, 0.6, 0.9
# A second, of the provider: it takes half a millisecond for one, at least.
TOKENS_S = 2000


def config(url, tmp_path):
    """Two models of OpenAI's form, one with two deployments, and one of Anthropic's behind them; all times a twentieth of real ones."""

    def openai(name, model):
        provider = OpenAI.Config(model=model, base_url=f"{url}/v1", key_env=None)
        return DeploymentConfig(name=name, provider=provider, timeout_s=TIMEOUT_S, first_token_timeout_s=TIMEOUT_S)

    anthropic = DeploymentConfig(
        name="o",
        provider=Anthropic.Config(model="other", base_url=url, key_env=None),
        timeout_s=TIMEOUT_S,
        first_token_timeout_s=TIMEOUT_S,
    )
    deployments = {
        "small": (openai("s1", "small"), openai("s2", "small")),
        "large": (openai("l", "large"),),
        "other": (anthropic,),
    }
    return GatewayConfig(
        models=tuple(ModelConfig(name=name, price=PRICES[name], deployments=deployments[name]) for name in PRICES),
        strategies={"cheapest": StrategyConfig(use="cheapest")},
        fallbacks=FALLBACKS,
        require_key=False,
        deadline_s=3.0,
        hedge=HedgeConfig(quantile=0.99),
        breaker=BreakerConfig(open_s=0.05, max_open_s=0.1),
        retries=RetryConfig(attempts=3, base_s=0.002, cap_s=0.01, budget=1.0),
        lost=LostConfig(margin_s=0.02, output_speed=TOKENS_S),
        store=str(tmp_path / "g.db"),
    )


def body(draw, number):
    """Of a request whose prompt and user are its number."""
    text = f"#{number} " + "some words of a question " * draw.randrange(1, 8)
    return {
        "model": draw.choice(NAMES),
        "messages": [{"role": "user", "content": text}],
        "user": str(number),
        "stream": draw.random() < 0.5,
        "max_tokens": draw.choice((40, 80, 160)),
    }


async def one(gateway, draw, number, leaves, stopping):
    """Send a request and read its answer, or leave at some moment; some read no further than to the end of it. Returns how it ended."""
    stops = draw.random() < stopping

    async def whole():
        reply = await gateway.handle("chat", body(draw, number))
        if reply.stream is not None:
            try:
                async for block in reply.stream:
                    if stops and b'"stop"' in block:
                        break
            finally:
                await reply.stream.aclose()

    try:
        await asyncio.wait_for(whole(), draw.random() * 0.05 if leaves else None)
    except TimeoutError:
        return "left"
    except ApiError:
        return "failed"
    return "answered"


async def day(tmp_path, requests, seed, at_once=16, weights=FAULTS, leaving=0.02, stopping=0.2, habits=(1, 0, 0, 0, 0)):
    """Requests against the provider: (provider, ledger's rows, how they ended)."""
    ended = Counter()
    provider = BillingProvider(PRICES, seed, weights, slow_s=SLOW_S, habits=habits, after_s=0.001)
    async with provider.running(), Gateway(config(provider.url, tmp_path)) as gateway:
        pace(gateway)
        numbers = iter(range(requests))

        async def sender():
            for number in numbers:
                own = random.Random(f"{seed} {number}")
                ended[await one(gateway, own, number, own.random() < leaving, stopping)] += 1

        await asyncio.gather(*(sender() for _ in range(at_once)))
        await gateway.settled()
        await provider.idle()
        assert gateway.in_flight == len(gateway.unsettled) == len(gateway.runtime.dispatcher.late) == 0
        rows = await gateway.store.ledger(LedgerQuery(limit=100_000))
    assert sum(ended.values()) == requests
    return provider, rows, ended


def check(provider, rows, most_above):
    """A row for each request, not one below its bill, and the whole at most so much above."""
    charged = {int(row.user): row.cost_nano for row in rows}
    assert len(charged) == len(rows)
    below = {
        number: (bill, charged.get(number, 0))
        for number, bill in provider.bills.items()
        if charged.get(number, 0) < bill
    }
    assert not below, f"{len(below)} requests were charged less than their bill: {dict(list(below.items())[:3])}"
    over = [row for row in rows if row.cost_nano > row.reserved_nano]
    assert not over, f"charged more than was set aside: {over[0]}"
    total = sum(charged.values())
    assert provider.total_nano <= total <= (1 + most_above) * provider.total_nano, total / provider.total_nano - 1


def bad_day(tmp_path, requests, seed):
    provider, rows, ended = run_paced(day(tmp_path, requests, seed, habits=TALK))
    assert set(provider.calls) >= {"fine", "slow", "refused"}
    assert ended["left"] > 0
    check(provider, rows, 0.02)


def test_the_ledger_is_the_invoice_where_nothing_goes_wrong(tmp_path):
    provider, rows, ended = run_paced(day(tmp_path, 200, 1, weights=(1, 0, 0, 0, 0), leaving=0, stopping=0))
    assert ended == {"answered": 200}
    assert {row.status for row in rows} == {"ok"}
    check(provider, rows, 0.0)


@pytest.mark.parametrize("fate", FATES[1:])
def test_one_kind_of_fault_alone(tmp_path, fate):
    """However often: never below the bill."""
    weights = tuple(1.0 if name in ("fine", fate) else 0.0 for name in FATES)
    provider, rows, _ = run_paced(day(tmp_path, 60, 2, weights=weights, leaving=0.3, at_once=30))
    assert provider.calls[fate] > 10
    check(provider, rows, 20.0)


@pytest.mark.parametrize("habit", HABITS[1:])
def test_one_habit_alone(tmp_path, habit):
    """However an upstream speaks, and however many leave."""
    habits = tuple(float(name == habit) for name in HABITS)
    provider, rows, ended = asyncio.run(
        day(tmp_path, 60, 2, weights=(1, 0, 0, 0, 0), leaving=0.4, at_once=30, habits=habits)
    )
    assert ended["left"] > 5
    check(provider, rows, 5.0)


@pytest.mark.parametrize("seed", [3, 4])
def test_two_thousand_requests_on_a_bad_day(tmp_path, monkeypatch, seed):
    # From the first request on.
    monkeypatch.setattr(HedgeDelay, "delay_s", HEDGE_S)
    bad_day(tmp_path, 1000, seed)


@pytest.mark.slow
def test_twenty_thousand_requests_on_a_bad_day(tmp_path, monkeypatch):
    monkeypatch.setattr(HedgeDelay, "delay_s", HEDGE_S)
    bad_day(tmp_path, 20_000, 5)


async def errand(gateway, number):
    """One question of a strategy beside requests, whose prompt is its number. Returns how it ended."""
    lane = gateway.errands.of(gateway.runtime.decider.lanes["cheapest"])
    messages = [{"role": "user", "content": f"#{number} some words of a question"}]
    asking = lane.ask(("small", "large", "other")[number % 3], messages, temperature=0)
    try:
        await asyncio.wait_for(asking, 0.05 if number % 7 == 0 else None)
    except TimeoutError:
        return "left"
    except CapacityError:
        return "failed"
    return "answered"


def test_errands_are_charged_what_the_provider_bills_too(tmp_path):
    async def main():
        provider = BillingProvider(PRICES, 6, (60, 10, 10, 10, 10), slow_s=SLOW_S)
        async with provider.running(), Gateway(config(provider.url, tmp_path)) as gateway:
            pace(gateway)
            ended = Counter(await asyncio.gather(*(errand(gateway, number) for number in range(60))))
            await gateway.settled()
            await provider.idle()
            assert len(gateway.unsettled) == gateway.runtime.users == 0
            return provider, await gateway.store.ledger(LedgerQuery(limit=1000)), ended

    provider, rows, ended = run_paced(main())
    assert ended["answered"] > 20
    assert ended["left"] > 0
    assert {row.tags for row in rows} == {("learning",)}
    assert all(row.cost_nano <= row.reserved_nano for row in rows)
    assert 0 < provider.total_nano <= sum(row.cost_nano for row in rows)


# Kills

CONFIG = """
require_key = false
store = "{store}"
deadline_s = 3
lost = {{ output_speed = 2000 }}
hedge = {{ quantile = 0.9, min_s = 0.02 }}
retries = {{ base_s = 0.002 }}
strategies = {{ cheapest = {{ kind = "cheapest" }} }}
fallbacks = {{ small = ["large", "other"], large = ["other"], other = ["small"] }}
[[models]]
name = "small"
price = {{ input_usd = 0.15, output_usd = 0.6 }}
deployments = [
    {{ provider = {{ kind = "openai", model = "small", base_url = "{url}/v1", key_env = "" }}, timeout_s = 0.6 }},
    {{ provider = {{ kind = "openai", model = "small", base_url = "{url}/v1", key_env = "" }}, timeout_s = 0.6 }},
]
[[models]]
name = "large"
price = {{ input_usd = 2.5, output_usd = 10 }}
deployments = [{{ provider = {{ kind = "openai", model = "large", base_url = "{url}/v1", key_env = "" }}, timeout_s = 0.6 }}]
[[models]]
name = "other"
price = {{ input_usd = 3, output_usd = 15 }}
deployments = [{{ provider = {{ kind = "anthropic", model = "other", base_url = "{url}", key_env = "" }}, timeout_s = 0.6 }}]
"""


class Client(threading.Thread):
    """Sends requests one after another, until the gateway is gone."""

    def __init__(self, port, numbers, seed):
        super().__init__(daemon=True)
        self.port, self.numbers, self.draw = port, numbers, random.Random(seed)

    def run(self):
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(link):
            for number in self.numbers:
                asked = json.dumps(body(self.draw, number))
                link.request("POST", "/v1/chat/completions", asked, {"content-type": "application/json"})
                answer = link.getresponse()
                # Some leave in the middle of their answer.
                if self.draw.random() < 0.02:
                    answer.read(1)
                    link.close()
                else:
                    answer.read()


class Numbers:
    """0, 1, 2 ... to many threads."""

    def __init__(self, size):
        self.lock, self.at, self.size = threading.Lock(), 0, size

    def __iter__(self):
        return self

    def __next__(self):
        with self.lock:
            if self.at >= self.size:
                raise StopIteration
            self.at += 1
            return self.at - 1


def killed(tmp_path, requests, kills):
    """Requests to a gateway that is killed again and again: what every one of them is charged covers its bill."""
    store, file, draw = str(tmp_path / "g.db"), tmp_path / "gateway.toml", random.Random(kills)

    def drill(url):
        file.write_text(CONFIG.format(store=store, url=url))
        numbers = Numbers(requests)
        while numbers.at < numbers.size:
            size = min(numbers.size, numbers.at + requests // kills)
            with served("--config", str(file)) as running:
                part = Numbers(size)
                part.at = numbers.at
                clients = [Client(running.port, part, f"{size} {at}") for at in range(12)]
                for client in clients:
                    client.start()
                while part.at < size - draw.randrange(1, 10) and any(client.is_alive() for client in clients):
                    time.sleep(0.005)
                running.process.send_signal(signal.SIGKILL)
                running.process.wait(60)
                for client in clients:
                    client.join(60)
                numbers.at = size

    async def main():
        provider = BillingProvider(PRICES, kills, FAULTS, slow_s=SLOW_S)
        async with provider.running():
            await asyncio.to_thread(drill, provider.url)
            await provider.idle()
        async with open_store(store) as held:
            return provider, await held.ledger(LedgerQuery(limit=100_000))

    provider, rows = asyncio.run(main())
    assert len([row for row in rows if row.status == "crashed"]) >= kills / 2
    assert len([row for row in rows if row.status == "ok"]) > requests / 2
    check(provider, rows, 5.0)


@pytest.mark.slow
def test_what_was_under_way_when_the_gateway_was_killed_is_charged_too(tmp_path):
    killed(tmp_path, 400, 4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_thousand_requests_and_fifty_kills(tmp_path):
    killed(tmp_path, 20_000, 50)
