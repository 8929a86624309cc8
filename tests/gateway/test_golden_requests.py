"""Twelve requests, and all that is told of each: answer's headers, ledger rows, the page's line, the decision. Ids and times are masked.

What changes it is told in the change itself: ``PYTHONPATH=src:tests python tests/gateway/test_golden_requests.py`` writes it anew.
"""

import asyncio
import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path

from anabranch.gateway.config import (
    DeploymentConfig,
    GatewayConfig,
    LogConfig,
    LostConfig,
    ModelConfig,
    RetryConfig,
    StrategyConfig,
)
from anabranch.gateway.config.ab import ABConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import LedgerQuery
from anabranch.routers.contract.query import Candidate, Decision
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.money import Price, nano_dollars
from anabranch.web.api_error import ApiError

KEPT = Path(__file__).with_name("golden_requests.json")

# Of a row, a line, a step: what differs from one run to the next.
TIMES = {
    "latency_us",
    "first_token_us",
    "overhead_us",
    "time_s",
    "ts_us",
    "latency_s",
    "overhead_s",
    "seconds",
    "seq",
    "unit",
    "key_id",
}


class Asks(Strategy):
    """Asks small, then takes large."""

    is_async = True

    async def aroute(self, query, pool, ask):
        await ask("small", "which?", max_tokens=2, temperature=0)
        candidates = (Candidate(model="large", score=1, quality=0.5), Candidate(model="small", score=0))
        return Decision(candidates=candidates, strategy="asks", reason="so", confidence=0.25, details={"why": [1]})


def model(name, price, **behaviour):
    provider = Mock.Config(model=name, **{"tokens": 4, **behaviour})
    # Only what never answers is not waited for.
    timeout_s = 0.1 if name == "hangs" else 60.0
    return ModelConfig(
        name=name, price=price, max_tokens=50, deployments=(DeploymentConfig(provider=provider, timeout_s=timeout_s),)
    )


def config(store):
    return GatewayConfig(
        models=(
            model("small", Price.of_dollars(1, 2)),
            model("large", Price.of_dollars(10, 20)),
            model("breaks", Price.of_dollars(3, 4), script=("500", "ok")),
            model("hangs", Price.of_dollars(5, 6), script=("hang",), loops=True),
            model("cuts", Price.of_dollars(7, 8), script=("cut:2",), loops=True),
        ),
        strategies={
            "cheapest": StrategyConfig(use="cheapest"),
            "asks": StrategyConfig(use="static"),
            "says": StrategyConfig(use="consistency", fields={"models": ("small", "large"), "samples": 2}),
        },
        default_strategy="cheapest",
        ab={"test": ABConfig(a="cheapest", b="asks", share=0.999999)},
        store=store,
        require_key=False,
        log=LogConfig(prompts=True),
        lost=LostConfig(read_on_s=0),
        fallbacks={"hangs": ("small",)},
        retries=RetryConfig(attempts=2, base_s=0.0),
    )


REQUESTS = {
    "plain": {"model": "small"},
    "stream": {"model": "small", "stream": True, "stream_options": {"include_usage": True}},
    "kept": {"model": "small", "temperature": 0},
    "cached": {"model": "small", "temperature": 0},
    "cached stream": {"model": "small", "temperature": 0, "stream": True},
    "retried": {"model": "breaks"},
    "fallen back": {"model": "hangs"},
    "cut": {"model": "cuts", "stream": True},
    "chosen": {"model": "auto/cheapest"},
    "asked": {"model": "auto/asks", "max_tokens": 3},
    "program": {"model": "auto/says", "max_tokens": 3},
    "tested": {"model": "auto/test", "user": "ann"},
    "refused": {"model": "large", "max_tokens": 1000},
}


def masked(value):
    """As JSON, without ids and times."""
    if isinstance(value, dict):
        return {name: "*" if name in TIMES and inner else masked(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked(one) for one in value]
    if dataclasses.is_dataclass(value):
        return masked({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, str):
        return re.sub(r"\bk[0-9a-f]{12}\b|\b[A-Za-z0-9_-]{20,}(?=\.\d+$|$)", "ID", value)
    return value if isinstance(value, int | float | bool | None) else str(value)


async def told():
    """All of it, by the name of the request."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        async with Gateway(config(f"{folder}/g.db"), strategies={"asks": Asks(None)}) as gateway:
            secret, record = await gateway.store.create_key(
                "k", user="bob", team="ml", tags=["x"], speaks_for=["tag:y"]
            )
            await gateway.store.set_budget(f"key:{record.id}", nano_dollars("0.01"))
            for name, fields in REQUESTS.items():
                body = {"messages": [{"role": "user", "content": "hello there"}], **fields}
                try:
                    reply = await gateway.handle("chat", body, key=secret, headers={"x-tags": "y"})
                    headers = reply.headers
                    if reply.stream is not None:
                        async for _ in reply.stream:
                            pass
                except ApiError as error:
                    headers = error.headers
                await gateway.settled()
                id = headers["x-request-id"]
                rows = await gateway.store.ledger(LedgerQuery(request_id=id))
                calls = await gateway.store.ledger(LedgerQuery(parent_id=id, newest_first=False))
                decisions, texts = await gateway.store.told_of([id])
                found[name] = {
                    "headers": {
                        one: "*" if one in ("x-request-id", "x-overhead-ms") else value
                        for one, value in sorted(headers.items())
                    },
                    "rows": [masked(row) for row in [*rows, *calls]],
                    "seen": masked(gateway.recent[-1]),
                    "decision": masked(decisions.get(id)),
                    "texts": masked(texts.get(id)),
                }
    return json.loads(json.dumps(found))


def test_what_is_told_of_requests_stays_as_it_is():
    found, kept = asyncio.run(told()), json.loads(KEPT.read_text())
    assert found.keys() == kept.keys()
    for name in found:
        for part in found[name]:
            assert found[name][part] == kept[name][part], f"{name}: {part}"


if __name__ == "__main__":
    sys.stdout.write(f"{KEPT}\n")
    KEPT.write_text(json.dumps(asyncio.run(told()), indent=1) + "\n")
