"""Requests with a name (``Idempotency-Key``): asked and paid for once, whoever goes away and comes back."""

import asyncio
from dataclasses import replace

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.gateway.cache import Entry, Named, OtherRequestError, Ticket
from anabranch.gateway.config import CacheConfig, DeploymentConfig, GatewayConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import LedgerQuery
from anabranch.routers.money import Price
from anabranch.web.api_error import ApiError
from paced_time import run_paced
from waiting import until_async

NAMED = {"idempotency-key": "n1", "x-cache": "deny"}


def model(name="small", timeout_s=None, **behaviour):
    provider = Mock.Config(model=name, **{"tokens": 4, **behaviour})
    return ModelConfig(
        name=name,
        price=Price.of_dollars(1, 2),
        max_tokens=100,
        deployments=(DeploymentConfig(provider=provider, timeout_s=timeout_s),),
    )


def config(tmp_path, *models, **fields):
    return GatewayConfig(
        models=models or (model(),),
        **{
            "strategies": {"cheapest": StrategyConfig(use="cheapest")},
            "require_key": False,
            "store": str(tmp_path / "g.db"),
            **fields,
        },
    )


def ask(text="hello", **fields):
    return {"model": "small", "messages": [{"role": "user", "content": text}], **fields}


def run(config, work):
    """What ``work(gateway)`` gives, and all rows of the ledger, oldest first."""

    async def main():
        async with Gateway(config) as gateway:
            found = await work(gateway)
            await gateway.settled()
            assert gateway.in_flight == gateway.runtime.users == 0
            assert len(gateway.caches.named.flights) == len(gateway.caches.named._marks) == 0
            return found, await gateway.store.ledger(LedgerQuery(limit=100, newest_first=False))

    return run_paced(main())


def text_of(answer):
    return answer["choices"][0]["message"]["content"]


async def streamed(gateway, body, **options):
    chunks = [chunk async for chunk in await gateway.achat({**body, "stream": True}, **options)]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk.get("choices"))


@pytest.mark.parametrize("exact", [False, True])
def test_it_is_asked_and_paid_for_once(tmp_path, exact):
    """Whatever its temperature, and whatever else is cached; another name or key is another request."""
    made = config(tmp_path, model(latency_s=0.02), require_key=True, cache=CacheConfig(exact=exact))

    async def work(gateway):
        (one, _), (other, _) = [await gateway.store.create_key(name) for name in ("a", "b")]
        more = {**NAMED, "idempotency-key": "n3"}
        first = await gateway.achat(ask(temperature=1), key=one, headers=NAMED)
        same = [
            await gateway.achat(ask(temperature=1), key=one, headers=NAMED),
            *await asyncio.gather(*(gateway.achat(ask("b"), key=one, headers=more) for _ in range(2))),
        ]
        again = await streamed(gateway, ask(temperature=1), key=one, headers=NAMED)
        others = [
            await gateway.achat(ask(temperature=1), key=other, headers=NAMED),
            await gateway.achat(ask(temperature=1), key=one, headers={"idempotency-key": "n2"}),
            await gateway.achat(ask(temperature=1), key=one),
        ]
        return first, same, again, others

    (first, same, again, others), rows = run(made, work)
    assert same[0] == first
    assert same[1] == same[2]
    assert again == text_of(first)
    assert len({answer["id"] for answer in (first, same[1], *others)}) == 5
    assert sorted(row.cache for row in rows) == [*[""] * 5, "exact", "exact", "shared"]
    assert all((row.cost_nano == 0) == bool(row.cache) for row in rows)


def test_another_request_under_the_same_name_is_refused_before_and_after_the_answer(tmp_path):
    async def work(gateway):
        first = asyncio.create_task(gateway.achat(ask(), headers=NAMED))
        await until_async(lambda: len(gateway.caches.named.flights) == 1)
        refusals = []
        for _ in range(2):
            with pytest.raises(ApiError, match="another request") as caught:
                await gateway.achat(ask("other"), headers=NAMED)
            refusals.append((caught.value.status, caught.value.code))
            await first
        # How it is sent makes no other request of it.
        await gateway.achat(ask(user="me"), headers=NAMED)
        return refusals

    refusals, rows = run(config(tmp_path, model(latency_s=0.05)), work)
    assert refusals == [(422, "idempotency_key_reused")] * 2
    assert sorted((row.status, row.cost_nano > 0) for row in rows) == [
        ("ok", False),
        ("ok", True),
        ("refused", False),
        ("refused", False),
    ]


def test_a_name_that_is_too_long_is_refused(tmp_path):
    async def work(gateway):
        with pytest.raises(ApiError, match="255 characters"):
            await gateway.achat(ask(), headers={"idempotency-key": "n" * 256})

    run(config(tmp_path), work)


def test_one_that_failed_is_asked_again_whatever_it_asks_then(tmp_path):
    async def work(gateway):
        with pytest.raises(ApiError):
            await gateway.achat(ask(), headers=NAMED)
        return await gateway.achat(ask("other"), headers=NAMED)

    _, rows = run(config(tmp_path, model(script=("422",))), work)
    assert [row.status for row in rows] == ["error", "ok"]


def test_list_prompts_and_embeddings_have_names_too(tmp_path):
    async def work(gateway):
        for endpoint, body in (
            ("completions", {"model": "small", "prompt": ["pay"]}),
            ("embeddings", {"model": "small", "input": ["pay"]}),
        ):
            headers = {"idempotency-key": endpoint}
            one, two = [await gateway.handle(endpoint, body, headers=headers) for _ in range(2)]
            assert one.body == two.body
            assert (one.headers["x-cache"], two.headers["x-cache"]) == ("miss", "exact")

    _, rows = run(config(tmp_path), work)
    assert [row.cache for row in rows] == ["", "exact"] * 2


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_a_client_that_gives_up_and_comes_back_gets_what_was_paid_for(tmp_path, streams, waits):
    """Whether it comes back before the answer is there or after that."""

    async def work(gateway):
        task = asyncio.create_task(gateway.achat(ask(stream=streams), headers=NAMED))
        await until_async(lambda: gateway.runtime.dispatcher.states()[0]["in_flight"] == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if waits:
            await until_async(lambda: not gateway.caches.named.flights)
        return await gateway.achat(ask(), headers=NAMED)

    answer, rows = run(config(tmp_path, model(latency_s=0.05)), work)
    assert text_of(answer)
    assert sorted((row.status, row.cost_nano > 0) for row in rows) == [("ok", False), ("ok", True)]


def test_a_stream_whose_reader_leaves_is_read_to_its_end_for_who_comes_back(tmp_path):
    async def work(gateway):
        stream = await gateway.achat(ask(stream=True), headers=NAMED)
        await anext(stream)
        await stream.aclose()
        return await gateway.achat(ask(), headers=NAMED)

    answer, rows = run(config(tmp_path, model(tokens=6, tokens_per_s=100)), work)
    assert len(text_of(answer).split()) == 6
    assert sorted(row.cache for row in rows) == ["", "shared"]


def test_one_without_a_name_is_still_dropped_with_its_reader(tmp_path):
    async def work(gateway):
        stream = await gateway.achat(ask(stream=True))
        await anext(stream)
        await stream.aclose()

    _, rows = run(config(tmp_path, model(tokens=6, tokens_per_s=100)), work)
    assert [row.status for row in rows] == ["cancelled"]


def test_an_answer_that_comes_after_the_gateways_own_time_is_kept_for_the_retry(tmp_path):
    made = config(tmp_path, model(latency_s=1.2), deadline_s=0.4)

    async def work(gateway):
        with pytest.raises(ApiError) as late:
            await gateway.achat(ask(), headers=NAMED)
        # It is read on: who asks meanwhile is not charged, and is told to come again.
        with pytest.raises(ApiError) as busy:
            await gateway.achat(ask(), headers=NAMED)
        await until_async(lambda: not gateway.caches.named.flights)
        return late.value, busy.value, await gateway.achat(ask(), headers=NAMED)

    (late, busy, answer), rows = run(made, work)
    assert (late.status, busy.status, busy.code) == (504, 409, "idempotency_key_in_use")
    assert text_of(answer)
    assert sum(row.cost_nano > 0 for row in rows) == 1


def test_names_outlive_a_new_config(tmp_path):
    made = config(tmp_path, model(latency_s=0.05))

    async def work(gateway):
        first = asyncio.create_task(gateway.achat(ask(), headers=NAMED))
        await until_async(lambda: len(gateway.caches.named.flights) == 1)
        await gateway.reload(made)
        under_way = await gateway.achat(ask(), headers=NAMED)
        await gateway.reload(replace(made, deadline_s=9.0))
        return [await first, under_way, await gateway.achat(ask(), headers=NAMED)]

    answers, rows = run(made, work)
    assert answers[0] == answers[1] == answers[2]
    assert sum(row.cost_nano > 0 for row in rows) == 1


@pytest.mark.parametrize("headers", [NAMED, {}])
def test_a_kept_answer_of_a_model_that_a_key_has_lost_is_not_given(tmp_path, headers):
    async def work(gateway):
        secret, key = await gateway.store.create_key("k")
        asked = ask(temperature=0)
        await gateway.achat(asked, key=secret, headers=headers)
        await gateway.store.edit_key(key.id, models=["other"])
        with pytest.raises(ApiError) as caught:
            await gateway.achat(asked, key=secret, headers=headers)
        return caught.value

    error, _ = run(config(tmp_path, model(), model("other"), require_key=True), work)
    assert (error.status, error.code) == (403, "model_not_allowed")


# `Named` alone


def entry(size=0):
    return Entry(body=b"x" * size, model="m")


def test_the_oldest_name_of_whoever_holds_most_goes_first():
    async def main():
        named = Named(ttl_s=10, size=4, size_bytes=10**6)
        named.put("quiet", ("q", b"1"), entry())
        for at in range(9):
            named.put("loud", (f"n{at}", b"1"), entry())
        assert len(named) == 4
        assert named.get("quiet", "q", b"1") is not None
        assert [at for at in range(9) if named.get("loud", f"n{at}", b"1")] == [6, 7, 8]
        # Also where the newest is of somebody who holds little.
        named.put("other", ("o", b"1"), entry())
        assert named.get("other", "o", b"1") is not None
        assert named.get("loud", "n6", b"1") is None
        named.put("loud", ("huge", b"1"), entry(10**6 + 1))
        assert named.get("loud", "huge", b"1") is None

    asyncio.run(main())


def test_who_waits_for_a_name_that_another_request_has_taken_meanwhile_is_refused():
    async def main():
        named = Named(ttl_s=10, size=4, size_bytes=10**6)
        first = await named.claim("t", "n", b"1")
        waits = asyncio.create_task(named.claim("t", "n", b"1"))
        await asyncio.sleep(0)
        first.abandon()
        taken = await named.claim("t", "n", b"2")
        with pytest.raises(OtherRequestError):
            await waits
        taken.land(entry())
        assert len(named.flights) == 0

    asyncio.run(main())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("plfd"), st.sampled_from("tu"), st.sampled_from("nm"), st.sampled_from([b"1", b"2"])),
        max_size=40,
    )
)
def test_a_name_never_gives_the_answer_to_another_request_or_key(steps):
    async def main():
        named = Named(ttl_s=10, size=3, size_bytes=10**6)
        for step, tenant, name, mark in steps:
            if step == "d":
                named.delete(tenant)
                continue
            try:
                got = await named.claim(tenant, name, mark)
            except OtherRequestError:
                continue
            if not isinstance(got, Ticket):
                assert got.model == f"{tenant}{name}{mark}"
                continue
            answer = Entry(body=b"", model=f"{tenant}{name}{mark}")
            if step == "f":
                got.fail(OSError())
            elif step == "l":
                got.abandon()
            else:
                named.put(tenant, (name, mark), answer)
                got.land(answer)
            assert len(named.flights) == len(named._marks) == 0
            assert len(named) <= 3
            kept = [named._held.get(tenant, name)[1] for tenant in "tu" for name in named._held.keys(tenant)]
            assert named.size_bytes == sum(one.size_bytes for one in kept)
            assert len(named) == len(kept)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", ask()),
        ("chat/completions", ask(stream=True)),
        ("completions", {"model": "small", "prompt": ["pay"]}),
        ("responses", {"model": "small", "input": "pay"}),
        ("embeddings", {"model": "small", "input": ["pay"]}),
    ],
)
def test_over_http_a_client_that_gives_up_and_retries_pays_once(tmp_path, path, body):
    async def work(gateway):
        server = App(gateway).server()
        listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1/{path}"
        async with aiohttp.ClientSession(headers={"idempotency-key": "n"}) as client:
            for timeout_s in (0.05, 0.05):
                with pytest.raises(TimeoutError):
                    await client.post(url, json=body, timeout=aiohttp.ClientTimeout(total=timeout_s))
            async with client.post(url, json=body) as answer:
                assert answer.status == 200
                assert await answer.read()
            async with client.post(url, json={**body, "seed": 7}) as answer:
                assert answer.status == 422
        listener.close()
        await server.shutdown(0.1)

    _, rows = run(config(tmp_path, model(latency_s=0.2)), work)
    assert sum(row.cost_nano > 0 for row in rows) == 1
