"""What strategies learn outlives reloads and processes, and is shared by processes on one store."""

import asyncio
import json
import logging
import signal
import time
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CapacityError, InputError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.lane import made_from
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import learned, open_store, schema
from anabranch.routers.contract.query import Outcome, Query
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.fitted import VERSION, FittedRouter, packed
from anabranch.routers.made_outcomes import made_outcomes, made_pool
from anabranch.routers.money import Price
from anabranch.routers.strategies import make
from anabranch.routers.strategies.bandit import LinUCB
from anabranch.routers.strategies.regression_sums import SEEDED, Sums
from gateway_process import served

KINDS = ("linucb", "thompson", "eps_greedy")
NAMES = ("small", "large")


def outcomes(count, dim, seed=0):
    rng = np.random.default_rng(seed)
    vector_ND = rng.standard_normal((count, dim)).astype(np.float32)
    return [
        Outcome(
            query=Query(text=str(number), vector_D=vector_D),
            model=NAMES[number % 3 % 2],
            cost=float(rng.random()) / 100,
            quality=None if number % 7 == 6 else float(rng.random()),
        )
        for number, vector_D in enumerate(vector_ND)
    ]


def told(strategy, some):
    for outcome in some:
        strategy.observe(outcome)
    return strategy


def same(one, other, tolerance=1e-9):
    """Two bandits know the same of every model, whatever the order in which they met them."""
    assert set(one.models) == set(other.models)
    assert one.steps == other.steps
    places = [other.models.index(name) for name in one.models]
    for name in ("inverse_MDD", "b_MD", "theta_MD", "calls_M", "cost_M"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name)[places], rtol=tolerance, atol=tolerance)


# Parts that add up


@given(
    st.sampled_from(KINDS),
    st.integers(0, 60),
    st.integers(1, 4),
    st.sampled_from([3, 9]),
    st.booleans(),
    st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_several_that_hear_of_one_another_know_what_one_that_was_told_all_does(kind, count, num, dim, is_fitted, seed):
    def new():
        one = make(kind, dim=4, settle=1000)
        return one.fit(made_outcomes(30)) if is_fitted else one

    some = outcomes(count, 12 if is_fitted else dim, seed)
    alone = told(new(), some)
    several = [new() for _ in range(num)]
    for one in several:
        one.hear({}, {})
    owner = np.random.default_rng(seed).integers(0, num, count)
    for half in (slice(0, count // 2), slice(count // 2, count)):
        for at, one in enumerate(several):
            told(one, [outcome for outcome, whose in zip(some[half], owner[half], strict=True) if whose == at])
        parts = [one.part() for one in several]
        for at, one in enumerate(several):
            one.hear(*one.joined([part for other, part in enumerate(parts) if other != at]))
    for one in several:
        same(one, alone)
        if alone.models:
            query = Query(text="x", vector_D=np.ones(12 if is_fitted else dim, np.float32))
            ours, theirs = (learner.route(query, made_pool(NAMES)) for learner in (one, alone))
            assert [item.model for item in ours.candidates] == [item.model for item in theirs.candidates]


def test_steps_before_the_start_are_steps():
    """Of a strategy that had observed before it was kept, exploration goes on from where it was."""
    some = outcomes(40, 9)
    alone, before = (told(make("eps_greedy", dim=4, settle=1000), some[:20]) for _ in range(2))
    one, other = (make("eps_greedy", dim=4, settle=1000) for _ in range(2))
    for learner in (one, other):
        learner.load_state(*before.state())
        learner.hear({}, {})
    told(one, some[20:30])
    told(other, some[30:])
    one.hear(*one.joined([other.part()]))
    assert one.steps == told(alone, some[20:]).steps > 30


def test_directions_are_not_chosen_anew_from_a_part_of_what_was_seen():
    """What was observed before others were heard of is not kept as it came, and cannot be seen along other directions."""
    some = outcomes(60, 9)
    one = make("linucb", dim=4, settle=20)
    one.load_state(*told(make("linucb", dim=4, settle=20), some[:5]).state())
    told(one, some[5:9])
    one.hear({}, {})
    before = one.steps
    told(one, some[9:])
    assert one.steps == before + sum(outcome.quality is not None for outcome in some[9:])
    assert one.basis == SEEDED


def test_hearing_nothing_changes_nothing():
    some = outcomes(20, 9)
    plain, shared = told(make("linucb", dim=4), some), make("linucb", dim=4)
    shared.hear({}, {})
    told(shared, some)
    shared.hear(*shared.joined([]))
    same(shared, plain)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_directions_that_were_chosen_first_become_those_of_all(order):
    """Both choose, neither knowing of the other; who publishes second gives its choice up."""
    some = outcomes(120, 9)
    one, other = (make("linucb", dim=4, settle=20) for _ in range(2))
    for learner, half in ((one, some[:60]), (other, some[60:])):
        learner.hear({}, {})
        told(learner, half)
    assert len({one.basis, other.basis, SEEDED}) == 3
    first, second = (one, other)[order[0]], (one, other)[order[1]]
    part = first.part()
    first.published()
    second.hear(*second.joined([part]))
    assert second.basis == first.basis
    part = second.part()
    second.published()
    first.hear(*first.joined([part]))
    same(first, second)
    assert not len(second.own.seen_SV)
    # And it is what one would know that looks along these directions.
    alone = make("linucb", dim=4, settle=1000)
    alone.features(np.zeros((0, 9)))
    alone._start(first.centre_V, first.direction_DV)
    same(told(alone, some), first)


def test_what_others_saw_counts_for_the_choice_of_directions():
    some = outcomes(30, 9)
    one, other = (make("linucb", dim=4, settle=20) for _ in range(2))
    for learner, part in ((one, some[:15]), (other, some[15:30])):
        learner.hear({}, {})
        told(learner, part)
    assert (one.basis, other.basis) == (SEEDED, SEEDED)
    one.hear(*one.joined([other.part()]))
    assert one.basis not in (SEEDED, other.basis)
    assert one.steps == sum(outcome.quality is not None for outcome in some)


def test_parts_that_do_not_fit_are_refused_and_change_nothing():
    one = told(make("linucb", dim=4), outcomes(9, 9))
    one.hear({}, {})
    before = {name: value.copy() for name, value in one.state()[0].items()}
    arrays, facts = told(make("linucb", dim=4), outcomes(9, 5)).part()
    good, about = one.part()
    for bad in (
        (arrays, facts),
        ({}, {"models": ["x"]}),
        ({**good, "gram_MDD": good["gram_MDD"][:1]}, about),
        ({**good, "moment_MD": good["moment_MD"] * np.nan}, about),
        (good, {**about, "models": ["small", "small"]}),
        (good, {**about, "basis": "none that is there"}),
        ({**good, "more": np.zeros(1)}, about),
    ):
        with pytest.raises(InputError):
            one.hear(*bad)
    assert all(np.array_equal(value, before[name]) for name, value in one.state()[0].items())
    with pytest.raises(InputError, match="only known along other directions"):
        Sums(2, ["a"], np.zeros((1, 2, 2)), np.zeros((1, 2)), np.ones(1), np.zeros(1), np.zeros(1)).along(
            np.zeros(1), np.eye(1), "x"
        )


def test_what_forgets_does_not_add_up():
    assert make("linucb").adds_up
    assert not make("linucb", discount=0.9).adds_up
    assert not Strategy(None).adds_up


# A gateway


def model(name):
    deployment = DeploymentConfig(provider=Mock.Config(model=name, reply=f"{name}!"))
    return ModelConfig(name=name, price=Price.of_dollars(1, 1), max_tokens=50, deployments=(deployment,))


def config(store, use="linucb", *, router=None, **fields):
    strategies = {"ucb": StrategyConfig(use=None if router else use, router=router, fields=fields, timeout_s=5.0)}
    return GatewayConfig(
        models=tuple(map(model, NAMES)),
        store=str(store),
        embedder=Hashed.Config(dim=64),
        require_key=False,
        strategies=strategies,
    )


async def use(gateway, numbers):
    for number in numbers:
        body = {"model": "auto/ucb", "messages": [{"role": "user", "content": f"question {number}"}]}
        reply = await gateway.handle("chat", body)
        score = {"request_id": reply.headers["x-request-id"], "score": number % 5 / 4}
        assert (await gateway.feedback(score))["learned"]
    return await steps(gateway)


async def steps(gateway):
    lane = gateway.runtime.decider.lanes["ucb"]
    return await lane.alone(lambda: lane.strategy.steps)


def run(work):
    return asyncio.run(work())


@pytest.mark.parametrize("kind", KINDS)
def test_a_reload_and_a_restart_lose_nothing(url, kind):
    async def first():
        async with Gateway(config(url, kind)) as gateway:
            assert await use(gateway, range(5)) == 5
            strategy = gateway.runtime.decider.lanes["ucb"].strategy
            await gateway.reload(config(url, kind).replace(deadline_s=60.0))
            lane = gateway.runtime.decider.lanes["ucb"]
            assert (lane.strategy is strategy, await steps(gateway)) == (True, 5)
            await use(gateway, range(5, 7))
            await gateway.reload(config(url, kind, alpha=0.5) if kind == "linucb" else config(url, kind, ridge=0.5))
            assert await steps(gateway) == 0
            await gateway.reload(config(url, kind))  # found again
            assert await steps(gateway) == 7
            await use(gateway, range(7, 8))
            lane = gateway.runtime.decider.lanes["ucb"]
            return await lane.alone(lambda: lane.strategy._copied())

    async def second():
        async with Gateway(config(url, kind)) as gateway:
            lane = gateway.runtime.decider.lanes["ucb"]
            assert await steps(gateway) == 8
            rows = await rows_of(gateway.store, lane.made)
            return await lane.alone(lambda: lane.strategy._copied()), rows

    before, (after, rows) = run(first), run(second)
    assert before[1]["steps"] == after[1]["steps"] == 8
    order = [after[1]["models"].index(name) for name in before[1]["models"]]
    for name in ("inverse_MDD", "b_MD", "theta_MD", "cost_M"):
        np.testing.assert_allclose(before[0][name], after[0][name][order], atol=1e-9)
    assert learned.NOBODY in {row.writer for row in rows}


async def rows_of(store, made):
    return await store.look(lambda connection: learned.read_learned(connection, "ucb", made))


def test_replicas_learn_as_one(url):
    async def several():
        async with Gateway(config(url)) as one, Gateway(config(url)) as other:
            for number in range(12):
                await use((one, other)[number % 2], [number])
                if number in (5, 11):
                    for gateway in (one, other, one):
                        await gateway.kept.save(gateway.runtime.decider.lanes.values(), at_once=True)
            lanes = [gateway.runtime.decider.lanes["ucb"] for gateway in (one, other)]
            return [await lane.alone(lambda: told_all(lane)) for lane in lanes]  # noqa: B023

    def told_all(lane):
        return make_like(lane.strategy)

    def make_like(strategy):
        made = make("linucb")
        made.load_state(*strategy._copied())
        return made

    one, other = run(several)
    same(one, other)
    assert one.steps == 12
    # Whoever comes later knows it all.

    async def later():
        async with Gateway(config(url)) as gateway:
            return make_like(gateway.runtime.decider.lanes["ucb"].strategy)

    same(run(later), one)


def test_a_fitted_router_goes_on_from_its_file_and_from_another_file_anew(tmp_path):
    embedder = Hashed.Config(dim=64).build()

    def fitted(seed):
        data = made_outcomes(40, seed=seed)
        data = data.with_vectors(embedder.embed(data.query))
        router = FittedRouter(strategy=make("linucb").fit(data), models=made_pool(NAMES).models, embedder=embedder)
        router.save(tmp_path / "ucb.safetensors")

    async def once(count):
        async with Gateway(config(tmp_path / "g.db", router=str(tmp_path / "ucb.safetensors"))) as gateway:
            return await use(gateway, range(count))

    fitted(0)
    assert run(lambda: once(3)) == 3
    assert run(lambda: once(2)) == 5
    fitted(1)
    assert run(lambda: once(1)) == 1


class Counts(Strategy):
    """Learns what does not add up."""

    def __init__(self):
        super().__init__(None)
        self.heard = np.zeros(1)

    def route(self, query, pool):
        return make("static", model="small").route(query, pool)

    def observe(self, outcome):
        self.heard += 1

    def state(self):
        return {"heard": self.heard}, {"so": "far"}

    def load_state(self, arrays, facts):
        if arrays["heard"][0] == 13:
            raise ValueError("thirteen")
        self.heard = arrays["heard"].copy()


def counted(store, number, spoil=lambda rows: rows):
    async def work():
        made = Counts()
        async with Gateway(config(store), strategies={"ucb": made}) as gateway:
            begun = made.heard[0]
            for _ in range(number):
                await gateway.handle("chat", {"model": "auto/ucb", "messages": [{"role": "user", "content": "x"}]})
        return begun, made.heard[0]

    return run(work)


def test_of_what_does_not_add_up_the_newest_is_gone_on_with(url):
    assert counted(url, 3) == (0, 3)
    assert counted(url, 2) == (3, 5)
    assert counted(url, 8) == (5, 13)
    assert counted(url, 1) == (5, 6)  # 13 cannot be taken in, and what was written before it is


def test_what_is_still_being_learned_when_it_stops_is_kept(url):
    """On a busy machine the last outcomes waited for the strategy's thread, and were dropped with it."""

    async def work(slow_s):
        made = Counts()
        async with Gateway(config(url), strategies={"ucb": made}) as gateway:
            lane, decide = gateway.runtime.decider.lanes["ucb"], made.route

            def route(query, pool):
                # The next that its thread does: what came of the decision waits behind it.
                lane._threads.submit(time.sleep, slow_s)
                return decide(query, pool)

            made.route = route
            await gateway.handle("chat", {"model": "auto/ucb", "messages": [{"role": "user", "content": "x"}]})
        return made.heard[0]

    assert run(lambda: work(0.3)) == 1
    assert run(lambda: work(0.0)) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "odd"])
@pytest.mark.parametrize("kind", ["linucb", "counts"])
def test_a_damaged_row_is_left_out_and_said(tmp_path, caplog, kind, damage):
    path = tmp_path / "g.db"

    async def learn():
        async with Gateway(config(path), strategies={"ucb": Counts()} if kind == "counts" else None) as gateway:
            for number in range(3):
                body = {"model": "auto/ucb", "messages": [{"role": "user", "content": f"x {number}"}]}
                id = (await gateway.handle("chat", body)).headers["x-request-id"]
                await gateway.feedback({"request_id": id, "score": 1})
            lane = gateway.runtime.decider.lanes["ucb"]
            return await lane.alone(lambda: lane.strategy.heard[0] if kind == "counts" else lane.strategy.steps)

    async def spoil():
        async with open_store(str(path), serves=False) as store:
            [(body,)] = await store.look(lambda connection: connection.rows("SELECT body FROM learned"))
            middle = len(body) // 2
            new = {
                "cut": body[:middle],
                "empty": b"",
                "odd": b"\xff" * 20,
                "flipped": body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :],
            }[damage]
            await store.change(lambda connection: connection.run("UPDATE learned SET body = :body", body=new))

    known = run(learn)
    run(spoil)
    with caplog.at_level(logging.WARNING):
        again = run(learn)
    assert again == known  # of this life alone
    assert "left out" in caplog.text


def test_nothing_is_written_while_nothing_is_learned_and_a_store_that_cannot_write_is_tried_again(
    tmp_path, monkeypatch
):
    async def work():
        async with Gateway(config(tmp_path / "g.db")) as gateway:
            lanes = gateway.runtime.decider.lanes
            await gateway.kept.save(lanes.values(), at_once=True)
            assert await rows_of(gateway.store, lanes["ucb"].made) == []
            await use(gateway, range(2))
            with monkeypatch.context() as patch:
                patch.setattr(learned, "put_learned", busy)
                await gateway.kept.save(lanes.values(), at_once=True)
            assert await rows_of(gateway.store, lanes["ucb"].made) == []
            await gateway.kept.save(lanes.values(), at_once=True)
            [row] = await rows_of(gateway.store, lanes["ucb"].made)
            await gateway.kept.save(lanes.values(), at_once=True)
            await use(gateway, range(1))
            await gateway.kept.save(lanes.values())  # it was written a moment ago
            assert await rows_of(gateway.store, lanes["ucb"].made) == [row]
            assert (row.version, row.kind) == (1, "linucb")

    def busy(*arguments):
        raise CapacityError("the store cannot write")

    run(work)


def test_a_row_is_written_only_by_who_has_read_those_of_others(url):
    def row(writer, version=1, body=b"x"):
        return learned.LearnedRow(strategy="s", made="m", writer=writer, kind="k", version=version, ts_us=1, body=body)

    async def work():
        async with open_store(url) as store:

            async def put(one, seen):
                return await store.change(lambda connection: learned.put_learned(connection, one, seen))

            assert await put(row("a"), {})
            assert not await put(row("b"), {})
            assert await put(row("b"), {"a": 1})
            assert await put(row("a", body=b"y"), {"b": 1})
            assert not await put(row("b"), {"a": 1})
            assert await put(row("b"), None)
            found = await store.look(lambda connection: learned.read_learned(connection, "s", "m"))
            assert [(one.writer, one.version, one.body) for one in found] == [("a", 2, b"y"), ("b", 2, b"x")]
            for writer in ("a", "b", "b"):
                leaving = await store.look(lambda connection: learned.read_leaving(connection, "s", "m", writer))  # noqa: B023
                if all(one.writer != writer for one in leaving):
                    # Gone already.
                    continue
                body = b"+".join(one.body for one in leaving)
                stale = [replace(one, version=one.version + 1) for one in leaving]
                for rows, is_left in ((stale, False), (leaving, True), (leaving, True)):
                    assert is_left == await store.change(
                        lambda connection: learned.leave_learned(connection, rows, writer, body, 9)  # noqa: B023
                    )
            [left] = await store.look(lambda connection: learned.read_learned(connection, "s", "m"))
            assert (left.writer, left.version, left.body, left.ts_us) == ("", 4, b"x+y", 9)
            await store.change(lambda connection: learned.delete_before(connection, "s", 10))
            assert await store.look(lambda connection: learned.read_learned(connection, "s", "m")) == []

    run(work)


# Processes that are gone


async def put_dead(store, made, numbers, name="ucb"):
    """The row of a process that was killed after it had learned."""
    one = told(make("linucb"), outcomes(numbers, 64, seed=numbers))
    body = packed(one.part()[0], {"version": VERSION, "facts": json.dumps(one.part()[1])}, name)
    row = learned.LearnedRow(
        strategy=name, made=made, writer=f"dead{numbers}.1", kind="linucb", version=3, ts_us=store.now_us(), body=body
    )
    await store.change(lambda connection: learned.put_learned(connection, row, None))
    return one.steps


async def writers_of(gateway):
    return {row.writer for row in await rows_of(gateway.store, gateway.runtime.decider.lanes["ucb"].made)}


def test_rows_of_processes_that_are_gone_become_nobodys_once(url):
    async def work():
        async with Gateway(config(url)) as one:
            made = one.runtime.decider.lanes["ucb"].made
            count = await put_dead(one.store, made, 20) + await put_dead(one.store, made, 30)
            async with Gateway(config(url)) as other:
                assert await writers_of(other) == {learned.NOBODY}
                assert await steps(other) == count
                await use(other, range(3))
                await other.kept.save(other.runtime.decider.lanes.values(), at_once=True)
                # One that is alive keeps its row.
                await one.kept.save(one.runtime.decider.lanes.values(), at_once=True)
                assert len(await writers_of(one)) == 2
                assert await steps(one) == await steps(other) == count + 3

    run(work)


def test_two_that_find_the_same_process_dead_count_it_once(url, monkeypatch):
    async def work():
        async with Gateway(config(url)) as one, Gateway(config(url)) as other:
            lanes = [gateway.runtime.decider.lanes["ucb"] for gateway in (one, other)]
            count = await put_dead(one.store, lanes[0].made, 25)
            both = asyncio.Barrier(2)
            real = type(one.store).gone

            async def gone(store, replicas):
                found = await real(store, replicas)
                await both.wait()  # both know before either does anything
                return found

            with monkeypatch.context() as patch:
                patch.setattr(type(one.store), "gone", gone)
                await asyncio.gather(
                    *(gateway.kept.save([lane]) for gateway, lane in zip((one, other), lanes, strict=True))
                )
            for gateway, lane in zip((one, other), lanes, strict=True):
                await gateway.kept.save([lane])
            assert await writers_of(one) == {learned.NOBODY}
            assert await steps(one) == await steps(other) == count

    run(work)


@pytest.mark.parametrize("learns_more", [False, True])
def test_one_that_was_only_taken_for_dead_counts_once(url, learns_more):
    async def work():
        async with Gateway(config(url)) as one, Gateway(config(url)) as other:
            lanes = [gateway.runtime.decider.lanes["ucb"] for gateway in (one, other)]

            async def save():
                for _ in range(2):
                    for gateway, lane in zip((one, other), lanes, strict=True):
                        await gateway.kept.save([lane], at_once=True)

            await use(one, range(5))
            await use(other, range(2))
            await save()
            held = one.kept._held["ucb"]
            await other.kept._leave_to_nobody(lanes[1], other.kept._held["ucb"], held.writer)
            if learns_more:
                await use(one, range(5, 8))
            await save()
            assert await steps(one) == await steps(other) == (10 if learns_more else 7)
            assert len(await writers_of(one)) == (3 if learns_more else 2)
            await use(one, range(8, 9))
            await save()
            assert await steps(one) == await steps(other) == (11 if learns_more else 8)
        async with Gateway(config(url)) as third:
            assert await steps(third) == (11 if learns_more else 8)

    run(work)


def test_a_row_that_is_damaged_stays_and_one_of_before_rows_named_their_process_counts_on(tmp_path, caplog):
    async def work():
        async with Gateway(config(tmp_path / "g.db")) as one:
            made = one.runtime.decider.lanes["ucb"].made
            count = await put_dead(one.store, made, 20)
            rename = "UPDATE learned SET writer = :new WHERE writer = :old"
            await one.store.change(lambda connection: connection.run(rename, old="dead20.1", new="0123abcd"))
            await put_dead(one.store, made, 30)
            await one.store.change(
                lambda connection: connection.run(
                    "UPDATE learned SET body = :x WHERE writer = :w", x=b"x", w="dead30.1"
                )
            )
            await one.kept.save(one.runtime.decider.lanes.values())
            await one.kept.save(one.runtime.decider.lanes.values())
            assert await writers_of(one) == {"0123abcd", "dead30.1"}
            assert await steps(one) == count

    with caplog.at_level(logging.WARNING):
        run(work)
    assert caplog.text.count("left out") == 1


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([3, 9]), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_sums_less_an_earlier_part_are_what_came_since(before, since, dim, seed):
    def new():
        one = make("linucb", dim=4, settle=1000)
        one.hear({}, {})
        return one

    some = outcomes(before + since, dim, seed)
    one = told(new(), some[:before])
    part = one.part()
    told(one, some[before:])
    one.disown(*part)
    later = told(new(), some[before:])
    if since:
        assert one.own.steps == later.own.steps
        assert len(later.own.models) > 0
        places = [one.own.models.index(name) for name in later.own.models]
        for name in ("gram_MDD", "moment_MD", "count_M", "calls_M", "spent_M"):
            np.testing.assert_allclose(getattr(one.own, name)[places], getattr(later.own, name), atol=1e-9)
        np.testing.assert_array_equal(
            one.own.seen_SV, later.own.seen_SV if len(later.own.seen_SV) else one.own.seen_SV[:0]
        )


def test_what_was_never_observed_cannot_be_let_go_of():
    one, other = (told(make("linucb", dim=4), outcomes(number, 9)) for number in (9, 30))
    before = one.own.state()
    for bad in (other.part(), told(make("linucb", dim=4), outcomes(3, 5)).part()):
        with pytest.raises(InputError):
            one.disown(*bad)
    assert one.own.state()[1] == before[1]
    np.testing.assert_array_equal(one.own.gram_MDD, before[0]["gram_MDD"])


CONFIG = """
require_key = false
store = "{folder}/gateway.db"
admin = {{ key = "env:TEST_ADMIN_KEY" }}
embedder = {{ kind = "hashed", dim = 64 }}
{models}
[strategies.ucb]
kind = "linucb"
timeout_s = 5
"""
MODEL = """[[models]]
name = "{name}"
price = {{ input_usd = 1, output_usd = 1 }}
deployments = [{{ provider = {{ kind = "mock", model = "{name}", reply = "so" }} }}]
"""


def call(url, path, body):
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"content-type": "application/json", "authorization": "Bearer operator"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(answer.headers), json.load(answer)


def known(url):
    body = {"model": "auto/ucb", "messages": [{"role": "user", "content": "question 1"}]}
    return call(url, "/admin/explain", body)[1]["details"]["steps"]


def test_a_server_goes_on_where_it_was_after_reload_restart_and_kill(tmp_path):
    path = tmp_path / "gateway.toml"
    path.write_text(CONFIG.format(folder=tmp_path, models="".join(MODEL.format(name=name) for name in NAMES)))

    def served_here():
        return served("--config", str(path), environment={"TEST_ADMIN_KEY": "operator"})

    def ask(url, number):
        body = {"model": "auto/ucb", "messages": [{"role": "user", "content": f"question {number}"}]}
        headers, _ = call(url, "/v1/chat/completions", body)
        assert call(url, "/v1/feedback", {"request_id": headers["x-request-id"], "score": 1})[1]["learned"]

    with served_here() as gateway:
        for number in range(5):
            ask(gateway.url, number)
        assert known(gateway.url) == 5
        call(gateway.url, "/admin/reload", {})
        assert known(gateway.url) == 5
    with served_here() as gateway:
        assert known(gateway.url) == 5
        ask(gateway.url, 5)
        call(gateway.url, "/admin/reload", {})  # writes what was learned
        gateway.process.send_signal(signal.SIGKILL)
        gateway.process.wait()
    with served_here() as gateway:
        assert known(gateway.url) == 6
        ask(gateway.url, 6)
        call(gateway.url, "/admin/reload", {})
        gateway.process.send_signal(signal.SIGKILL)
        gateway.process.wait()
    with served_here() as gateway:
        assert known(gateway.url) == 7

        async def writers():
            async with open_store(str(tmp_path / "gateway.db"), serves=False) as store:
                rows = await store.look(lambda connection: connection.rows("SELECT writer FROM learned"))
                return [writer for (writer,) in rows]

        # Those that were killed are no rows any more.
        assert run(writers) == [learned.NOBODY]


def test_a_strategy_whose_state_is_no_json_learns_all_the_same(tmp_path, caplog):
    class Odd(Counts):
        def state(self):
            return {}, {"odd": object()}

    made = Odd()

    async def work():
        async with Gateway(config(tmp_path / "g.db"), strategies={"ucb": made}) as gateway:
            await gateway.handle("chat", {"model": "auto/ucb", "messages": [{"role": "user", "content": "x"}]})
            await gateway.runtime.decider.lanes["ucb"].alone(lambda: None)

    with caplog.at_level(logging.WARNING):
        run(work)
    assert made.heard[0] == 1
    assert "cannot be kept" in caplog.text


def test_what_it_is_made_from_tells_configs_apart():
    class At:
        name, embedder = "s", None

        def __init__(self, strategy):
            self.strategy = strategy

    makes = [
        make("linucb"),
        make("linucb", alpha=0.5),
        make("thompson"),
        LinUCB.Config().build().fit(made_outcomes(20)),
    ]
    digests = [made_from(At(one)) for one in makes]
    assert len(set(digests)) == 4
    assert made_from(At(make("linucb"))) == digests[0]


def test_a_store_of_the_schema_before_learns_too(url, monkeypatch):
    before = next(at for at, step in enumerate(schema.MIGRATIONS) if any("TABLE learned" in line for line in step))

    async def old():
        async with open_store(url) as store:
            # Today's code writes today's columns.
            columns = "id, hash, name, hint, owner, team, tags, models, is_admin, created_us"
            values = "'k1', 'd', 'k', '', '', '', '', '', 0, 1"
            await store._do(lambda connection: connection.run(f"INSERT INTO keys ({columns}) VALUES ({values})"))

    async def new():
        async with Gateway(config(url)) as gateway:
            assert [key.name for key in await gateway.store.keys()] == ["k"]
            return await use(gateway, range(2))

    with monkeypatch.context() as patch:
        # The schema last: a module that is imported only now takes in what it holds, and would keep the older one.
        older = schema.MIGRATIONS[:before]
        for module in ("sqlite", "postgres"):
            patch.setattr(f"anabranch.gateway.store.{module}.MIGRATIONS", older)
        patch.setattr(schema, "MIGRATIONS", older)
        run(old)
    assert run(new) == 2
