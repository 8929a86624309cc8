"""Whatever a strategy of others raises, wherever it is called: the gateway goes on, others are served, and no round ends.

Walks all methods of the contract, so that a new one cannot be forgotten, and looks in the source for calls past the shared part.
"""

import ast
import asyncio
import inspect
import itertools
import logging
import sqlite3
from pathlib import Path

import pytest

import anabranch.gateway
import anabranch.web
from anabranch.errors import AnabranchError, ConfigError
from anabranch.gateway import upkeep
from anabranch.gateway.config import (
    CacheConfig,
    DeploymentConfig,
    GatewayConfig,
    LogConfig,
    ModelConfig,
    StrategyConfig,
)
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.learning import errands, kept, kept_bytes
from anabranch.gateway.learning.erasures import NotForgottenError
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import learned
from anabranch.gateway.store.learned import LearnedRow
from anabranch.routers.contract.query import Outcome, Query
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.strategies.fixed import Static
from odd_errors import UNUSUAL
from waiting import until_async

# Of the contract, what no gateway calls of a strategy that it was given, or another part sees to (`join`, `with_knob`: `_set_up`).
NOT_SERVED = {"fit", "join", "knobs", "with_knob", "play", "load_state", "told"}
METHODS = sorted(name for name, what in vars(Strategy).items() if inspect.isroutine(what) and not name.startswith("_"))
SERVED = sorted(set(METHODS) - NOT_SERVED)
ASYNC = {"aroute", "aaccept", "errands"}
ADDING = {"vector_dim", "part", "hear", "joined", "published", "disown"}
# There Ctrl-C cannot be told from what a strategy raises.
ON_LOOP = {*ASYNC, "connect"}
ERRORS = (ValueError, *UNUSUAL)


class Keeper(Static):
    """Learns, and keeps what it was asked."""

    learns = reads_answers = True

    def __init__(self):
        super().__init__(Static.Config())
        self.texts, self.num_expired, self.num_upkeeps = [], 0, 0

    def observe(self, outcome):
        self.texts.append(outcome.query.text)

    def forget(self, *, tenant, user=None, decision=None):
        count = len(self.texts)
        self.texts.clear()
        return count

    def expire(self, before_s):
        self.num_expired += 1
        return 0

    def upkeep(self, pool):
        self.num_upkeeps += 1


def hostile(where, error, is_fast):
    """A strategy that raises in one method as soon as it is told to."""
    state = {"is_armed": False, "count": 0}

    def fail():
        state["count"] += 1
        raise error("by the strategy")

    def of(name):
        def work(*arguments, **named):
            if state["is_armed"] and name == where:
                fail()
            return GIVEN[name]() if name in GIVEN else getattr(Keeper, name)(*arguments, **named)

        if name not in ASYNC:
            return work

        async def awaited(self, *arguments, **named):
            asked = {"aroute": "route", "aaccept": "accept"}.get(name)
            if state["is_armed"] and name == where:
                fail()
            return None if asked is None else getattr(self, asked)(*arguments[: 2 if asked == "route" else 4])

        return awaited

    methods = {name: of(name) for name in SERVED}
    methods["joined"] = staticmethod(methods["joined"])
    flags = {"is_fast": is_fast, "is_async": where in ("aroute", "aaccept")}
    flags |= {"adds_up": where in ADDING, "keeps_examples": where not in ADDING}
    return type("Hostile", (Keeper,), {**methods, **flags})(), state


GIVEN = {
    "part": lambda: ({}, {"n": 1}),
    "joined": lambda: ({}, {"n": 1}),
    "hear": lambda: None,
    "published": lambda: None,
    "disown": lambda: None,
    "kept_state": lambda: ({}, {"n": 1}),
    "load_kept": lambda: None,
    "changed_examples": lambda: [],
    "take_examples": lambda: None,
    "prefer": lambda: None,
    "headers": dict,
}


def config(tmp_path, **fields):
    deployment = DeploymentConfig(provider=Mock.Config(model="m", tokens=4))
    return GatewayConfig(
        models=tuple(ModelConfig(name=name, max_tokens=10, deployments=(deployment,)) for name in "mn"),
        require_key=False,
        store=str(tmp_path / "g.db"),
        log=LogConfig(keep_days=1),
        **fields,
    )


def ask(name, text="hello"):
    return {"model": name, "messages": [{"role": "user", "content": text}]}


async def _all_of_it(gateway, strategy, good, settings, where):
    """Each thing that a gateway does with a strategy; what went wrong elsewhere than in what the operator asked of that very strategy."""
    lane = gateway.runtime.decider.lanes["odd"]
    answered = await gateway.handle("chat", ask("auto/odd"))
    assert (await gateway.handle("chat", ask("auto/good"))).body
    outcome = Outcome(query=Query(text="x"), model="m", latency_s=0.1, succeeded=True)
    lane.prefer(outcome, "m", "n")
    lane.touch()
    await gateway.store.change(lambda connection: learned.put_learned(connection, _dead_row(gateway, lane), None))
    if where == "disown":
        # Another process took this one for dead.
        await gateway.kept.save([lane], at_once=True)
        await gateway.store.change(lambda connection: learned.delete_before(connection, "odd", 2**62))
    if where == "take_examples":
        rows = [("k", "{}", b"")]
        await gateway.store.change(
            lambda connection: learned.put_examples(
                connection, "odd", lane.made, "dead.2", rows, gateway.store.now_us()
            )
        )
    if where == "load_kept":
        await gateway.kept.load([lane])
    await gateway.errands.once()
    await gateway.kept.save(gateway.runtime.decider.lanes.values(), at_once=True)
    try:
        await gateway.erasures.order(tenant=None)
        has_forgotten = True
    except NotForgottenError:
        has_forgotten = False
    assert has_forgotten == (where != "forget")
    assert good.texts == []
    try:
        await lane.explain(Query(text="x"), gateway.runtime.dispatcher.pool())
    except Exception:
        assert where in ("explain", "route")
    try:
        await gateway.reload(settings)
    except ConfigError:
        assert where in ("connect", "report_to")
    return answered


def _dead_row(gateway, lane):
    body = kept_bytes.packed_part(({}, {"n": 1}), "odd")
    now_us = gateway.store.now_us()
    return LearnedRow(
        strategy="odd", made=lane.made, writer="dead.1", kind="static", version=1, ts_us=now_us, body=body
    )


def _cases():
    for at, (where, is_fast) in enumerate(itertools.product(SERVED, (False, True))):
        for number, error in enumerate(ERRORS):
            if error is KeyboardInterrupt and (is_fast or where in ON_LOOP):
                continue
            # Of each method some at once, of the family all among the slow ones.
            is_quick = number == at % len(ERRORS)
            marks = () if is_quick else pytest.mark.slow
            yield pytest.param(where, error, is_fast, marks=marks, id=f"{where}-{error.__name__}-{is_fast}")


@pytest.mark.parametrize(("where", "error", "is_fast"), list(_cases()))
def test_whatever_a_strategy_raises_is_its_own_affair(tmp_path, monkeypatch, where, error, is_fast):
    for module, name in ((upkeep, "EVERY_S"), (upkeep, "PRUNE_S"), (errands, "EVERY_S"), (kept, "EVERY_S")):
        monkeypatch.setattr(module, name, 0.05)
    strategy, state = hostile(where, error, is_fast)
    good = Keeper()
    settings = config(tmp_path)

    async def main():
        async with asyncio.timeout(60), Gateway(settings, strategies={"odd": strategy, "good": good}) as gateway:
            spawned = {task.get_coro().__name__ for task in gateway._tasks._tasks}
            state["is_armed"] = True
            await _all_of_it(gateway, strategy, good, settings, where)
            # Retention and upkeep go on, round after round.
            before = good.num_expired, good.num_upkeeps
            await until_async(lambda: good.num_expired > before[0] + 1 and good.num_upkeeps > before[1] + 1)
            assert (await gateway.handle("chat", ask("auto/good"))).body
            await gateway.settled()
            assert {task.get_coro().__name__ for task in gateway._tasks._tasks} >= spawned
            state["is_armed"] = False
            assert (await gateway.handle("chat", ask("auto/odd"))).headers.get("x-route-bypassed") is None
            await gateway.reload(settings)

    asyncio.run(main())
    assert state["count"] or where == "state", "the method was never called: the test would not see it fail"


def test_an_order_that_a_strategy_failed_at_is_obeyed_later_and_nothing_of_it_is_stored_before(tmp_path, monkeypatch):
    monkeypatch.setattr(upkeep, "EVERY_S", 0.05)
    strategy, state = hostile("forget", ValueError, True)

    async def main():
        async with asyncio.timeout(60), Gateway(config(tmp_path), strategies={"odd": strategy}) as gateway:
            await gateway.handle("chat", ask("auto/odd", "secret"))
            await until_async(lambda: strategy.texts == ["secret"])
            state["is_armed"] = True
            with pytest.raises(NotForgottenError, match="odd"):
                await gateway.erasures.order(tenant="")
            lane = gateway.runtime.decider.lanes["odd"]
            await gateway.kept.save([lane], at_once=True)
            rows = await gateway.store.look(lambda connection: learned.read_learned(connection, "odd", lane.made))
            assert rows == []
            state["is_armed"] = False
            await until_async(lambda: not strategy.texts and not lane.owed)
            await gateway.kept.save([lane], at_once=True)
            assert await gateway.store.look(lambda connection: learned.read_learned(connection, "odd", lane.made))

    asyncio.run(main())


class Damaged(Keeper):
    """Keeps texts by tenant, and fails at orders of one."""

    keeps_answers = False

    def __init__(self, error=ValueError):
        super().__init__()
        self.texts, self.failing, self.error = ["t1", "t2", "t3"], {"t1"}, error

    def observe(self, outcome):
        pass

    def forget(self, *, tenant, user=None, decision=None):
        if tenant in self.failing:
            raise self.error
        count = len(self.texts)
        self.texts = [text for text in self.texts if text != tenant]
        return count - len(self.texts)


class Ignorant(Damaged):
    """As that, and learns nothing."""

    learns = False


async def _ordered(gateway, *tenants):
    """What came of an order for each."""
    found = []
    for tenant in tenants:
        try:
            found.append((await gateway.erasures.order(tenant=tenant))[0])
        except NotForgottenError:
            found.append("owed")
    return found


def test_an_order_that_a_strategy_fails_at_keeps_no_other_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(upkeep, "EVERY_S", 0.05)
    strategy = Damaged()

    async def main():
        async with asyncio.timeout(60), Gateway(config(tmp_path), strategies={"odd": strategy}) as gateway:
            assert await _ordered(gateway, "t1", "t2", "none", "t1") == ["owed", 1, 0, "owed"]
            # So it is with what comes from another process.
            await gateway.store.change(
                lambda connection: learned.put_erasure(
                    connection, '{"tenant": "t3", "user": null, "decision": null}', gateway.store.now_us(), 0
                )
            )
            await until_async(lambda: strategy.texts == ["t1"])
            strategy.failing = set()
            await until_async(lambda: not strategy.texts and not gateway.runtime.decider.lanes["odd"].owed)
            assert await _ordered(gateway, "t1") == [0]

    asyncio.run(main())


def test_an_order_of_another_process_just_before_an_own_one_is_obeyed(tmp_path, monkeypatch):
    monkeypatch.setattr(upkeep, "EVERY_S", 1000)
    strategy = Damaged()

    async def main():
        async with asyncio.timeout(60), Gateway(config(tmp_path), strategies={"odd": strategy}) as gateway:
            await gateway.store.change(
                lambda connection: learned.put_erasure(
                    connection, '{"tenant": "t2", "user": null, "decision": null}', gateway.store.now_us(), 0
                )
            )
            assert await _ordered(gateway, "t3") == [1]
            await gateway.erasures.catch_up()
            assert strategy.texts == ["t1"]
            assert gateway.erasures._own == set()

    asyncio.run(main())


@pytest.mark.parametrize("kind", [Damaged, Ignorant])
def test_what_a_strategy_owes_it_owes_after_a_reload(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(upkeep, "EVERY_S", 0.05)
    strategy, settings = kind(), config(tmp_path)

    async def main():
        async with asyncio.timeout(60), Gateway(settings, strategies={"odd": strategy}) as gateway:
            assert await _ordered(gateway, "t1") == ["owed"]
            for _ in range(2):
                await gateway.reload(settings)
            assert len(gateway.runtime.decider.lanes["odd"].owed) == 1
            strategy.failing = set()
            await until_async(lambda: strategy.texts == ["t2", "t3"])

    asyncio.run(main())


def test_what_was_ordered_while_something_was_written_is_told_one_by_one_at_the_start(tmp_path):
    """An order that fails keeps neither the others nor what the strategy had learned from it."""

    class Stored(Damaged):
        def kept_state(self):
            return {}, {"texts": self.texts}

        def load_kept(self, arrays, facts):
            self.texts = facts.get("texts", [])

    async def main():
        settings = config(tmp_path)
        async with asyncio.timeout(60), Gateway(settings, strategies={"odd": Stored()}) as gateway:
            gateway.runtime.decider.lanes["odd"].touch()
            now_us = gateway.store.now_us()
            for tenant in ("t1", "t2"):
                text = f'{{"tenant": "{tenant}", "user": null, "decision": null}}'
                await gateway.store.change(
                    lambda connection, text=text: learned.put_erasure(connection, text, now_us, 0)
                )
        later = Stored()
        later.texts = []
        async with asyncio.timeout(60), Gateway(settings, strategies={"odd": later}) as gateway:
            assert later.texts == ["t1", "t3"]
            assert len(gateway.runtime.decider.lanes["odd"].owed) == 1

    asyncio.run(main())


@pytest.mark.parametrize("kind", [ValueError, RecursionError, SystemExit])
def test_an_error_that_cannot_be_written_is_told_by_its_class(tmp_path, monkeypatch, caplog, kind):
    class SilentError(AnabranchError):
        def __str__(self):
            raise kind("in __str__")

    for module in (upkeep, kept):
        monkeypatch.setattr(module, "EVERY_S", 0.05)
    # As in a process: what a handler of the log raises is for whoever logs.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    strategy, good = Damaged(SilentError()), Damaged()
    good.failing = set()

    async def main():
        strategies = {"odd": strategy, "good": good}
        async with asyncio.timeout(60), Gateway(config(tmp_path), strategies=strategies) as gateway:
            assert await _ordered(gateway, "t1", "t2") == ["owed", 2]
            assert (strategy.texts, good.texts) == (["t1", "t3"], ["t3"])
            monkeypatch.setattr(strategy, "upkeep", lambda pool: None)
            strategy.failing = {"t2"}
            lane = gateway.runtime.decider.lanes["odd"]
            await until_async(lambda: strategy.texts == ["t3"] and not lane.owed)
            lane.touch()
            monkeypatch.setattr(Damaged, "kept_state", lambda self: _raise(SilentError()))
            await gateway.kept.save(gateway.runtime.decider.lanes.values(), at_once=True)
            monkeypatch.setattr(Static, "__init__", lambda self, config: _raise(SilentError()))
            static = config(tmp_path, strategies={"one": StrategyConfig(use="static")}, default_strategy="one")
            with pytest.raises(ConfigError, match="SilentError"):
                await gateway.reload(static)

    asyncio.run(main())
    assert "strategy odd could not forget: SilentError" in caplog.text
    assert "strategy odd learned is not in the store yet: SilentError" in caplog.text


def _raise(error):
    raise error


def test_vectors_whose_length_changes_are_a_miss_and_keep_no_other_out(tmp_path, monkeypatch):
    # The first one as odd as any: what the embedder says of its length counts.
    vectors = iter([[1.0, 0.0, 0.0], [1.0, 0.0], [1.0, 0.0, 0.0], [], [1.0, 0.0]])
    monkeypatch.setattr(Hashed, "embed", lambda self, texts: [next(vectors)])
    settings = config(tmp_path, cache=CacheConfig(exact=False, semantic=True), embedder=Hashed.Config(dim=2))

    async def main():
        async with asyncio.timeout(60), Gateway(settings) as gateway:
            return [(await gateway.handle("chat", ask("m", str(at)))).headers.get("x-cache") for at in range(5)]

    assert asyncio.run(main()) == ["miss", "miss", "miss", "miss", "semantic"]


@pytest.mark.parametrize("error", ERRORS)
def test_a_semantic_cache_whose_embedder_raises_is_a_miss(tmp_path, monkeypatch, error):
    def embed(self, texts):
        raise error("by the embedder")

    monkeypatch.setattr(Hashed, "embed", embed)
    settings = config(tmp_path, cache=CacheConfig(exact=True, semantic=True), embedder=Hashed.Config())

    async def main():
        async with asyncio.timeout(60), Gateway(settings) as gateway:
            return [
                (await gateway.handle("chat", {**ask("m"), "temperature": 0})).headers.get("x-cache") for _ in range(2)
            ]

    # The exact one goes on.
    assert asyncio.run(main()) == ["miss", "exact"]


@pytest.mark.parametrize("given", [[["a"]], [[float("nan")]], [[[1.0]]], [], None])
def test_what_is_no_vector_is_a_miss(tmp_path, monkeypatch, given):
    monkeypatch.setattr(Hashed, "embed", lambda self, texts: given)
    settings = config(tmp_path, cache=CacheConfig(exact=False, semantic=True), embedder=Hashed.Config())

    async def main():
        async with asyncio.timeout(60), Gateway(settings) as gateway:
            return [(await gateway.handle("chat", ask("m"))).headers.get("x-cache") for _ in range(2)]

    assert asyncio.run(main()) == ["miss", "miss"]


@pytest.mark.parametrize("where", ["__init__", "connect", "report_to"])
@pytest.mark.parametrize("error", ERRORS)
def test_a_reload_that_a_strategy_fails_leaves_everything_as_it_was_and_the_next_is_taken(
    tmp_path, monkeypatch, where, error
):
    def bad(self, *arguments, **named):
        raise error("by the strategy")

    settings = config(tmp_path, strategies={"one": StrategyConfig(use="static")}, default_strategy="one")

    async def main():
        async with asyncio.timeout(60), Gateway(settings) as gateway:
            old = gateway.runtime
            with monkeypatch.context() as patched:
                patched.setattr(Static, where, bad)
                for _ in range(2):
                    with pytest.raises(ConfigError, match=f"strategies.one cannot be made: {error.__name__}"):
                        await gateway.reload(settings)
            assert gateway.runtime is old
            assert (await gateway.handle("chat", ask("auto/one"))).body
            await gateway.reload(settings)
            assert gateway.runtime is not old

    asyncio.run(main())


@pytest.mark.parametrize("error", ERRORS)
def test_what_is_raised_in_the_stores_thread_fails_alone(tmp_path, error):
    def work(connection):
        connection.run("DELETE FROM learned")
        raise error("by the work")

    async def main():
        async with asyncio.timeout(60), Gateway(config(tmp_path)) as gateway:
            with pytest.raises(ValueError if error is ValueError else RuntimeError):
                await gateway.store.change(work)
            await gateway.handle("chat", ask("m"))
            await gateway.settled()
            # No transaction is left open: other processes can write.
            with sqlite3.connect(tmp_path / "g.db", timeout=60) as other:
                other.execute("BEGIN IMMEDIATE")
            other.close()

    asyncio.run(main())


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("where", ["build", "parse", "translator"])
@pytest.mark.parametrize("error", [one for one in ERRORS if one is not KeyboardInterrupt])
def test_what_a_provider_raises_is_an_error_of_its_deployment(tmp_path, monkeypatch, where, error, is_stream):
    def bad(self, *arguments, **named):
        raise error("by the provider")

    async def main():
        async with asyncio.timeout(60), Gateway(config(tmp_path)) as gateway:
            with monkeypatch.context() as patched:
                patched.setattr(Mock, where, bad)
                try:
                    reply = await gateway.handle("chat", {**ask("m"), "stream": is_stream})
                except Exception:
                    reply = None
                if where == ("parse" if is_stream else "translator"):
                    assert reply is not None
            if reply is not None and reply.stream is not None:
                async for _ in reply.stream:
                    pass
            await gateway.settled()
            assert (await gateway.handle("chat", ask("m"))).body
            assert gateway.runtime.dispatcher.groups["m"].lives[0].in_flight == 0

    asyncio.run(main())


# The source

GATEWAY = Path(anabranch.gateway.__file__).parent

# What has others' code run through `plainly`, `plainly_awaited`, or both.
GUARDS = {
    "plainly",
    "plainly_awaited",
    "in_thread",
    "in_task",
    "alone",
    "run",
    "put",
    "timed",
    "_called",
    "_awaited",
    "_later",
    "_learn",
    "_set_up",
}

# Functions that are only run so by whoever calls them.
GUARDED = {
    "learning/kept.py:_copy",
    "learning/joining.py:_with_model",
    "learning/joining.py:_carry_over",
    "core/program_run.py:_take_all",
    "dispatch/upstream_stream.py:_fed",
    # At the start, or in the thread in which a reload makes all anew.
    "dispatch/deployment_state.py:__init__",
    "decide.py:_at",
    "decide.py:load_router",
}

OWNERS = {"strategy", "program", "_program", "embedder", "_embedder"}
OF_EMBEDDERS = {"unit_vectors", "dim_of"}
PROVIDER = {"build", "parse", "translator", "error", "start", "close", "feed"}


def _direct_calls(tree):
    """(function, line) of calls of others' code that nothing of `GUARDS` defers."""
    found = []

    def visit(node, function, is_deferred):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # A function in a function is given to something.
            is_deferred, function = is_deferred or function is not None, function or node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            method = node.func.attr
            is_others = (name in OWNERS and (method in METHODS or method in ("run", "embed"))) or (
                name in ("provider", "_provider", "translator") and method in PROVIDER
            )
            if is_others and not is_deferred:
                found.append((function, node.lineno))
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in OF_EMBEDDERS
            and not is_deferred
        ):
            found.append((function, node.lineno))
        for child in ast.iter_child_nodes(node):
            deferred = is_deferred
            if isinstance(child, ast.Lambda) and isinstance(node, ast.Call):
                named = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                deferred = is_deferred or named in GUARDS
            visit(child, function, deferred)

    visit(tree, None, False)
    return found


def _sources():
    for path in sorted(GATEWAY.rglob("*.py")):
        yield path.relative_to(GATEWAY).as_posix(), path.read_text()


def test_what_others_wrote_is_called_through_the_shared_part_alone():
    bare = [
        f"{place}:{line} ({function})"
        for place, text in _sources()
        # Providers call one another in what is called through it already.
        if not place.startswith("providers/")
        for function, line in _direct_calls(ast.parse(text))
        if f"{place}:{function}" not in GUARDED
    ]
    assert bare == []


def test_transports_of_providers_are_used_as_plain_ones_alone():
    """What carries calls is others' code too: `plain_transport` stands between (see test_transports_of_others.py)."""
    calls = [
        (place, line.strip())
        for place, text in _sources()
        if not place.startswith("providers/")
        for line in text.splitlines()
        if "provider.transport(" in line
    ]
    assert calls
    assert [call for call in calls if "plain_transport(" not in call[1]] == []


def test_what_providers_say_went_wrong_is_looked_at_wherever_it_is_asked_for():
    """What they say may be odd: `provider_fault` alone asks (see test_failures_of_others.py)."""
    asking = [place for place, text in _sources() if not place.startswith("providers/") and "provider.error(" in text]
    assert asking == ["dispatch/provider_fault.py"]


# What an error of a strategy is caught as, and folders where none is: they call nothing of one.
CAUGHT = {"Exception", "BaseException", "AnabranchError", "InputError", "ConfigError", "LimitError", "CheckpointError"}
OTHER_PLACES = ("config/", "store/", "providers/", "shared/", "observe/access_log.py")


def _written_bare(tree):
    """Lines where an error that others may have made is written (in the log, in a text, by str) without `words`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.name:
            kinds = {one.id for one in ast.walk(node.type) if isinstance(one, ast.Name)}
            name, inside = node.name, node.body if kinds & CAUGHT else []
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name, inside = "error", node.body if any(one.arg == "error" for one in node.args.args) else []
        else:
            continue
        for one in itertools.chain.from_iterable(map(ast.walk, inside)):
            if isinstance(one, ast.FormattedValue):
                written = [one.value]
            elif isinstance(one, ast.Call):
                owner = getattr(getattr(one.func, "value", None), "id", "")
                written = one.args if owner == "logger" or getattr(one.func, "id", "") == "str" else []
            else:
                continue
            found += [one.lineno for at in written if isinstance(at, ast.Name) and at.id == name]
    return found


def test_errors_of_others_are_written_by_words_alone():
    web = Path(anabranch.web.__file__).parent
    sources = [*_sources(), ("web/server.py", (web / "server.py").read_text())]
    bare = [
        f"{place}:{line}"
        for place, text in sources
        if not place.startswith(OTHER_PLACES)
        for line in _written_bare(ast.parse(text))
    ]
    assert bare == []


@pytest.mark.parametrize(
    ("text", "is_bare"),
    [
        ("try: f()\nexcept Exception as error: logger.warning('%s', error)", True),
        ("try: f()\nexcept (KeyError, AnabranchError) as error: raise ConfigError(f'{error}')", True),
        ("try: f()\nexcept InputError as error: g(str(error))", True),
        ("def f(error): logger.error('%s', error)", True),
        ("try: f()\nexcept Exception as error: logger.warning('%s', words(error), exc_info=error)", False),
        ("try: f()\nexcept OSError as error: logger.warning('%s', error)", False),
        ("def f(error): logger.error('%s', raised(error))", False),
    ],
)
def test_errors_written_otherwise_are_seen(text, is_bare):
    assert bool(_written_bare(ast.parse(text))) == is_bare


def test_no_work_goes_to_a_thread_past_the_shared_part():
    """`asyncio.to_thread` never ends where StopIteration is raised, and what it raises of others ends the loop."""
    bare = [
        f"{place}: {line}"
        for place, text in _sources()
        for line in text.splitlines()
        if "asyncio.to_thread(" in line or ("run_in_executor(" in line and "plainly" not in line)
    ]
    assert bare == []


# What is ours, is awaited where whoever waits runs, and calls others' code.
OURS_AWAITED = {
    "core/program_run.py: self._run",
    "dispatch/dispatcher.py: lambda: exchanged(live.transport, call, attempt, reader, most_bytes(request))",
    # `plain_transport` stands between.
    "dispatch/stream.py: lambda: live.transport.open(call)",
    # No request waits; and what is opened at the start is closed at the end in one task where the gateway's are, as groups of tasks want.
    "dispatch/dispatcher.py: live.provider.start",
    "dispatch/dispatcher.py: provider.close",
    "runtime.py: provider.start",
    "gateway.py: lambda: self._taken(config)",
}


def test_what_others_wrote_to_be_awaited_has_a_task_of_its_own():
    """It may leave the task that it runs in told to end, or take that it was told for an error."""
    found = {
        f"{place}: {ast.unparse(node.args[0])}"
        for place, text in _sources()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "plainly_awaited"
    }
    assert found == OURS_AWAITED


@pytest.mark.parametrize(
    ("text", "is_bare"),
    [
        ("def f(self): self.strategy.expire(1)", True),
        ("async def f(lane): await lane.strategy.aroute(1)", True),
        ("def f(lane): g(lambda: lane.strategy.expire(1))", True),
        ("def f(live): live.provider.build(1)", True),
        ("def f(embedder): unit_vectors(embedder, [])", True),
        ("def f(embedder): plainly(lambda: unit_vectors(embedder, []))", False),
        ("def f(lane): plainly(lambda: lane.strategy.expire(1))", False),
        ("async def f(lane): await lane.alone(lambda: lane.strategy.expire(1))", False),
    ],
)
def test_calls_past_it_are_seen(text, is_bare):
    assert bool(_direct_calls(ast.parse(text))) == is_bare


def test_no_embedder_is_believed_without_a_look():
    """`unit_vectors` is what calls one: in the gateway, and wherever routers are fitted, judged and served."""
    package = GATEWAY.parent
    bare = [
        f"{path.relative_to(package)}:{node.lineno}"
        for folder in ("gateway", "routers", "cli/gateway")
        for path in sorted((package / folder).rglob("*.py"))
        if path.name != "checked.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "embed" and _owner(node.value) in EMBEDDERS
    ]
    assert bare == []


# What an embedder is called there.
EMBEDDERS = {"embedder", "_embedder", "made", "own"}


def _owner(node):
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
