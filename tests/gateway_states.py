"""A request of the gateway without a gateway: its state on a mock pool, and a store that notes what it is told."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from anabranch.errors import BudgetError
from anabranch.gateway.caches import Caches
from anabranch.gateway.config import CacheConfig, DeploymentConfig, GatewayConfig, ModelConfig, StrategyConfig
from anabranch.gateway.core import beginning
from anabranch.gateway.core.admission import Admission
from anabranch.gateway.core.incoming import Incoming
from anabranch.gateway.core.relay import Ahead
from anabranch.gateway.core.request_state import RequestState
from anabranch.gateway.core.services import Services
from anabranch.gateway.core.unsettled import Unsettled
from anabranch.gateway.in_flight import InFlight
from anabranch.gateway.metrics import Metrics
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.runtime import Runtime
from anabranch.gateway.store import RateLimits, Reservation
from anabranch.routers.money import Price
from anabranch.web.turns import Turns
from paced_time import run_paced


class FakeStore:
    """Takes all that is reserved up to a limit, and notes what is written."""

    def __init__(self, limit=10**15, has_budget=False):
        self.limit, self.is_limited = limit, has_budget
        self.reserved, self.settled, self.appended, self.decisions, self.texts = [], [], [], [], []

    async def reserve(self, id, subjects, nano, **named):
        if nano > self.limit:
            raise BudgetError(
                "full",
                subject="global",
                period="total",
                limit_nano=self.limit,
                remaining_nano=self.limit,
                resets_s=None,
                retry_after_s=None,
            )
        self.reserved.append((id, nano, named))
        return Reservation(id, tuple(subjects), nano)

    async def grow(self, held, nano):
        return await self.reserve(held.request_id, held.subjects, nano)

    async def has_keys(self):
        return False

    async def has_budget(self, subjects):
        return self.is_limited

    def settle(self, held, row, collected=None, calls=()):
        self.settled.append((held, row, collected, tuple(calls)))
        return _done()

    def append(self, row):
        self.appended.append(row)
        return _done()

    def append_decision(self, *given):
        self.decisions.append(given)

    def append_texts(self, *given):
        self.texts.append(given)


def _done():
    done = asyncio.get_running_loop().create_future()
    done.set_result(None)
    return done


def model(name, dollars=1.0, provider=None, **fields):
    """One that answers at once, unless it has another ``provider``; its tokens cost so many dollars a million."""
    provider = provider or Mock.Config(model=name, tokens=4)
    given = {"price": Price.of_dollars(dollars, 2 * dollars), "max_tokens": 50, **fields}
    return ModelConfig(name=name, deployments=(DeploymentConfig(provider=provider),), **given)


def config(*models, **fields):
    """A config of such models, small and large if none are given."""
    given = {
        "models": models or (model("small"), model("large", 10.0)),
        "require_key": False,
        "strategies": {"cheapest": StrategyConfig(use="cheapest")},
        "default_strategy": "cheapest",
        **fields,
    }
    return GatewayConfig(**given)


def services(store=None, cache=None):
    """What a request is lent; ``told`` has what was told of it."""
    told = SimpleNamespace(finished=[], priced=[], kept=[])
    lent = Services(
        store=store or FakeStore(),
        authenticate=None,
        admission=Admission(RateLimits(), InFlight()),
        turns=Turns(ThreadPoolExecutor(1)),
        caches=Caches(cache or CacheConfig(), None),
        metrics=Metrics(),
        unsettled=Unsettled(),
        keep_task=told.kept.append,
        ahead=Ahead(),
        begin_trace=lambda headers: None,
        on_finished=told.finished.append,
        on_priced=told.priced.append,
    )
    return lent, told


def state_of(body=None, *, lent=None, of=None, endpoint="chat", headers=None, **fields):
    """The state of a request to model small, unless the body says otherwise."""
    given = {"model": "small", "messages": [{"role": "user", "content": "hello there"}], **(body or {})}
    incoming = Incoming(endpoint=endpoint, body=given, headers=headers or {}, **fields)
    return RequestState(lent or services()[0], Runtime(of or config()), incoming)


def run(work, *given, **named):
    """What a coroutine function gives, on a loop of its own, whose time passes as `paced_time` says."""
    return run_paced(work(*given, **named))


def at_once(work):
    """What a coroutine gives that has nothing to wait for."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits for something")


def begun(state):
    """Read, let in, and with a purse: ready to be decided on."""
    beginning.take_place(state)
    beginning.read(state)
    at_once(beginning.name(state))
    at_once(beginning.admit(state))
    beginning.take_purse(state)
