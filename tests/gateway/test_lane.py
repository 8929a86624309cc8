"""`Lane`: what strategies of others raise, and how long they take, is theirs alone."""

import asyncio
import threading

import pytest

from anabranch.errors import InputError
from anabranch.gateway import lane
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.learning import errands
from anabranch.gateway.providers.mock import Mock
from anabranch.routers.contract.program import Program
from anabranch.routers.contract.query import Candidate, Decision
from anabranch.routers.contract.strategy import Strategy
from anabranch.web.api_error import ApiError
from odd_errors import LEFT_CANCELLED, UNUSUAL, PanicError
from waiting import until_async


class Odd(Strategy):
    """Raises once, or waits, where its test says."""

    learns = reads_answers = True

    def __init__(self, where="", error=None, *, is_fast=False, waits=None):
        super().__init__(None)
        self.where, self.error, self.is_fast, self.waits = where, error, is_fast, waits
        self.upkept = 0

    def _at(self, where):
        if where != self.where:
            return
        if self.waits is not None:
            self.waits.wait(60)
        error, self.error = self.error, None
        if error is not None:
            raise error

    def route(self, query, pool):
        self._at("route")
        return Decision(candidates=(Candidate(model="m", score=0.0),), strategy="odd", reason="so")

    def headers(self, decision):
        self._at("headers")
        return {}

    def accept(self, query, model, answer, details):
        self._at("accept")
        return True

    def observe(self, outcome):
        self._at("observe")

    def upkeep(self, pool):
        self.upkept += 1
        self._at("upkeep")

    async def errands(self, errands):
        self._at("errands")


def config(tmp_path, timeout_s=30.0):
    deployment = DeploymentConfig(provider=Mock.Config(model="m", tokens=4))
    return GatewayConfig(
        models=(ModelConfig(name="m", max_tokens=10, deployments=(deployment,)),),
        strategies={
            "odd": StrategyConfig(use="static", timeout_s=timeout_s),
            "cheapest": StrategyConfig(use="cheapest"),
        },
        default_strategy="cheapest",
        require_key=False,
        store=str(tmp_path / "g.db"),
    )


ASK = {"model": "auto/odd", "messages": [{"role": "user", "content": "hello"}]}


def run(tmp_path, strategy, work, **fields):
    async def main():
        async with asyncio.timeout(100), Gateway(config(tmp_path, **fields), strategies={"odd": strategy}) as gateway:
            return await work(gateway)

    return asyncio.run(main())


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("error", [one for one in UNUSUAL if one is not KeyboardInterrupt])
@pytest.mark.parametrize("where", ["route", "headers", "accept", "observe", "upkeep", "errands"])
def test_what_a_strategy_raises_ends_neither_its_thread_nor_rounds_nor_the_gateway(tmp_path, where, error, is_fast):
    """One StopIteration hung all requests to it, all rounds and each reload; SystemExit ended the gateway; CancelledError the rounds."""
    strategy = Odd(where, error("by the strategy"), is_fast=is_fast)

    async def work(gateway):
        first = await gateway.handle("chat", ASK)
        await gateway.errands.once()
        await gateway.errands.once()
        second = await gateway.handle("chat", ASK)
        await gateway.reload(config(tmp_path))
        return [answer.headers.get("x-route-bypassed") for answer in (first, second)]

    said = run(tmp_path, strategy, work)
    assert said == [f"{error.__name__} in the strategy" if where == "route" else None, None]
    assert strategy.upkept >= 2


@pytest.mark.parametrize("where", ["observe", "upkeep"])
def test_a_request_waits_for_what_is_learned_no_longer_than_for_its_strategy(tmp_path, where):
    """It waited for as long as that took."""
    released = threading.Event()
    strategy = Odd(where, waits=released)

    async def work(gateway):
        first = await gateway.handle("chat", ASK)
        round_ = asyncio.ensure_future(gateway.errands.once())
        try:
            await until_async(lambda: gateway.runtime.decider.lanes["odd"]._thread.began is not None)
            second = await gateway.handle("chat", ASK)
        finally:
            released.set()
        await round_
        return [answer.headers.get("x-route-bypassed") for answer in (first, second)]

    [first, second] = run(tmp_path, strategy, work, timeout_s=0.2)
    assert first is None
    assert "longer than 200 ms" in second


class Eager(Odd):
    """Is called where others are awaited."""

    is_async = True
    is_fast = False

    def aroute(self, query, pool, ask):
        self._at("aroute")

        async def decided():
            return self.route(query, pool)

        return decided()

    async def aaccept(self, query, model, answer, details, ask):
        self._at("aaccept")
        return Unclear() if self.where == "bool" else True

    def errands(self, errands):
        self._at("eager errands")
        return asyncio.sleep(0)


class Unclear:
    """As an array of several numbers."""

    def __bool__(self):
        raise ValueError


@pytest.mark.parametrize("error", [ValueError, SystemExit, asyncio.CancelledError, PanicError])
@pytest.mark.parametrize("where", ["aroute", "aaccept", "bool", "eager errands"])
def test_what_is_called_before_it_is_awaited_is_a_strategys_too(tmp_path, where, error):
    async def work(gateway):
        first = await gateway.handle("chat", ASK)
        await gateway.errands.once()
        return first, await gateway.handle("chat", ASK)

    first, second = run(tmp_path, Eager(where, error()), work)
    assert second.headers.get("x-route-bypassed") is None
    assert first.headers.get("x-route-bypassed") == (f"{error.__name__} in the strategy" if where == "aroute" else None)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("left", LEFT_CANCELLED)
def test_what_a_strategy_leaves_cancelled_is_no_request(tmp_path, monkeypatch, left, is_late):
    """Nor does it count as its time that is over; which is over all the same afterwards."""

    class Asks(Odd):
        is_async = True

        async def aroute(self, query, pool, ask):
            await LEFT_CANCELLED[left]()
            if is_late:
                await asyncio.Event().wait()
            return self.route(query, pool)

        async def aaccept(self, query, model, answer, details, ask):
            await LEFT_CANCELLED[left]()
            return True

        async def errands(self, errands):
            await LEFT_CANCELLED[left]()

    async def work(gateway):
        answers = [await gateway.handle("chat", ASK)]
        await gateway.errands.once()
        answers.append(await gateway.handle("chat", ASK))
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()
        return [(bool(answer.body), answer.headers.get("x-route-bypassed")) for answer in answers]

    monkeypatch.setattr(lane, "ASKING_S", 0.2)
    found = run(tmp_path, Asks(), work, timeout_s=0.2 if is_late else 30.0)
    assert found == [(True, "it took longer than 0.2 s" if is_late else None)] * 2


class Ends(Program):
    is_fast = True

    def __init__(self, error):
        super().__init__(None)
        self.error = error

    def route(self, query, pool):
        return Decision(candidates=(Candidate(model="m", score=0.0),), strategy="ends", reason="so")

    async def run(self, request, ask):
        raise self.error
        yield


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("error", [one for one in UNUSUAL if one not in (KeyboardInterrupt, GeneratorExit)])
def test_what_a_program_raises_is_passed_over(tmp_path, error, is_stream):
    """SystemExit ended the gateway; CancelledError left the request without an answer."""

    async def work(gateway):
        return (await gateway.handle("chat", {**ASK, "stream": is_stream})).headers["x-route-bypassed"]

    assert run(tmp_path, Ends(error()), work)


def decision(**fields):
    one = {"candidates": (Candidate(model="m", score=0.0),), "strategy": "odd", "reason": "so"}
    return Decision(**{**one, **fields})


class Unsayable:
    def __str__(self):
        raise SystemExit(3)

    __repr__ = __str__


class UnsayableError(InputError):
    def __str__(self):
        raise OSError


@pytest.mark.parametrize(
    "given",
    [
        decision(candidates=("m",)),
        decision(candidates=(one for one in [Candidate(model="m", score=0.0)])),
        decision(candidates=(Candidate(model=["m"], score=0.0),)),
        decision(candidates=(Candidate(model="m", score=10**5000),)),
        decision(confidence=10**400),
        decision(strategy=Unsayable()),
        decision(details={"a": Unsayable()}),
        UnsayableError("x"),
    ],
)
def test_what_is_no_decision_is_passed_over_and_the_request_is_settled(tmp_path, given):
    class Says(Odd):
        def route(self, query, pool):
            if isinstance(given, Exception):
                raise given
            return given

    async def work(gateway):
        answer = await gateway.handle("chat", ASK)
        await gateway.settled()
        return answer.headers.get("x-route-bypassed")

    assert run(tmp_path, Says(is_fast=True), work)


class Once:
    """Can be written once."""

    def __init__(self):
        self.count = 0

    def __str__(self):
        self.count += 1
        if self.count > 1:
            raise SystemExit(3)
        return "so"


def test_what_cannot_be_kept_of_a_decision_takes_neither_the_answer_nor_the_settlement(tmp_path):
    class Says(Odd):
        def route(self, query, pool):
            return decision(details={"a": Once()})

    async def work(gateway):
        answer = await gateway.handle("chat", ASK)
        await gateway.settled()
        return answer.headers.get("x-route-bypassed")

    assert run(tmp_path, Says(is_fast=True), work) is None


@pytest.mark.parametrize("given", [None, 5, [], [5], [{}], [{"role": "user", "content": Unsayable()}]])
def test_messages_that_are_none_are_not_sent(tmp_path, given):
    class Prepares(Odd):
        def prepare(self, query, model, messages, *, decision):
            return given

    async def work(gateway):
        return (await gateway.handle("chat", ASK)).body

    assert run(tmp_path, Prepares(is_fast=True), work)


class Stubborn(Ends):
    """Does not end when it is told to, until its test is over."""

    def __init__(self):
        super().__init__(None)
        self.released = threading.Event()

    async def run(self, request, ask):
        while not self.released.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        yield


def test_a_program_that_does_not_end_holds_up_no_answer(tmp_path):
    strategy = Stubborn()

    async def work(gateway):
        await gateway.reload(gateway.config.replace(deadline_s=0.3))
        try:
            async with asyncio.timeout(60):
                reply = await gateway.handle("chat", ASK)
        except ApiError as error:
            return error.code
        finally:
            strategy.released.set()
        return reply.headers["x-route-bypassed"]

    assert run(tmp_path, strategy, work)


def test_errands_that_never_end_are_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(errands, "ROUND_S", 0.05)

    class Waits(Odd):
        async def errands(self, errands):
            await asyncio.Event().wait()

    async def work(gateway):
        await gateway.errands.once()
        await gateway.errands.once()

    strategy = Waits()
    run(tmp_path, strategy, work)
    assert strategy.upkept >= 2


def test_errands_that_never_end_keep_no_other_strategy_from_its_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(errands, "EVERY_S", 0.02)

    class Waits(Odd):
        async def errands(self, errands):
            await asyncio.Event().wait()

    good = Odd()

    async def main():
        strategies = {"odd": Waits(), "good": good}
        async with asyncio.timeout(60), Gateway(config(tmp_path), strategies=strategies):
            await until_async(lambda: good.upkept >= 3)

    asyncio.run(main())
