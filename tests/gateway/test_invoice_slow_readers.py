"""The ledger against the invoice of a provider, for readers that are slower than the model writes and leave in the middle.

What was made and not read lies in buffers, of this process and of the system, however large the request was; all of it is on the invoice.
"""

import asyncio
import random

import pytest

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LostConfig, ModelConfig
from anabranch.gateway.dispatch.upstream_beside import BESIDE_BYTES
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.store import LedgerQuery
from anabranch.routers.money import Price
from billing_provider import BillingProvider, OpenAIForm

PRICE = Price.of_dollars("0", "10")
SMALL, LARGE = 100, BESIDE_BYTES + 1000
MOST, STALL_S, TOKEN_S = 100_000, 0.4, 0.0002


def config(url, tmp_path):
    provider = OpenAI.Config(model="m", base_url=f"{url}/v1", key_env=None)
    return GatewayConfig(
        models=(ModelConfig(name="m", price=PRICE, deployments=(DeploymentConfig(provider=provider),)),),
        require_key=False,
        store=str(tmp_path / "g.db"),
        lost=LostConfig(margin_s=0.05, output_speed=1 / TOKEN_S),
    )


async def read(gateway, number, size, most, leave_after=None):
    """One request; ``leave_after`` are the pauses before each further block, until the reader leaves."""
    text = f"#{number} " + "x" * size
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "user": str(number), "max_tokens": most}
    reply = await gateway.handle("chat", {**body, "stream": True})
    pauses = None if leave_after is None else iter(leave_after)
    try:
        async for _ in reply.stream:
            pause = 0.0 if pauses is None else next(pauses, None)
            if pause is None:
                break
            if pause:
                await asyncio.sleep(pause)
    finally:
        await reply.stream.aclose()


async def charged(tmp_path, seed, size, readers, warm):
    """Bills and what was charged, by reader: each a list of pauses."""
    provider = BillingProvider({"m": PRICE}, seed, token_s=TOKEN_S, habits=(0, 0, 0, 0, 1))
    async with provider.running(), Gateway(config(provider.url, tmp_path)) as gateway:
        for number in range(warm):
            await read(gateway, 1000 + number, SMALL, 500)
        await asyncio.gather(*(read(gateway, number, size, MOST, one) for number, one in enumerate(readers)))
        await gateway.settled()
        await provider.idle()
        rows = {int(row.user): row for row in await gateway.store.ledger(LedgerQuery(limit=100))}
    return [(provider.bills[number], rows[number].cost_nano) for number in range(len(readers))]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Chunks that say much beside their tokens, as those of some providers do: buffers are full soon."""
    monkeypatch.setattr(OpenAIForm, "head", {**OpenAIForm.head, "system_fingerprint": "f" * 4000})


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("more", [1, 3])
def test_who_stalls_and_takes_a_little_more_is_charged_what_lies_unread(tmp_path, size, warm, more):
    ((bill, cost),) = asyncio.run(charged(tmp_path, 1, size, [[STALL_S] + [0.0] * (more - 1)], warm))
    assert bill > 0
    assert cost >= bill


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_however_slowly_they_read(tmp_path, size):
    draw = random.Random(str(size))
    readers = [[draw.choice((0.0, 0.0, 0.01, 0.1, 0.2)) for _ in range(draw.randint(1, 10))] for _ in range(5)]
    pairs = asyncio.run(charged(tmp_path, 1, size, readers, draw.choice((0, 2))))
    assert all(bill > 0 for bill, _ in pairs)
    below = [(reader, *pair) for reader, pair in zip(readers, pairs, strict=True) if pair[1] < pair[0]]
    assert not below
