"""The caches of the gateway: same request, same meaning, same moment; and never another tenant's answer."""

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.gateway.cache import (
    Entry,
    ExactCache,
    SemanticCache,
    SingleFlight,
    Ticket,
    context_key,
    exact_key,
)
from anabranch.routers.retrieve import Exact, Hnsw
from paced_time import run_paced


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def entry(text: str = "answer", size: int = 0) -> Entry:
    return Entry(body=text.encode() + b" " * size, model="m")


def chat(text="hello", **fields):
    return {"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


# The exact cache


def test_the_key_ignores_what_does_not_change_the_answer_and_nothing_else():
    key = exact_key("chat", "m", chat())
    assert key == exact_key("chat", "m", {**chat(), "stream": True, "stream_options": {}, "user": "u", "metadata": {}})
    assert key == exact_key("chat", "m", dict(reversed(chat().items())))  # order of keys
    assert key == exact_key("chat", "m", {**chat(), "model": "an alias of m"})
    others = [
        exact_key("completions", "m", chat()),
        exact_key("chat", "auto/cheapest", chat()),
        exact_key("chat", "m", chat("hello ")),
        exact_key("chat", "m", chat(top_p=0.5)),
        exact_key("chat", "m", chat(some_field_of_tomorrow=1)),
        exact_key("chat", "m", {**chat(), "temperature": 0.0001}),
    ]
    assert len({key, *others}) == 7


def test_lone_surrogates_can_be_keyed():
    assert len(exact_key("chat", "m", chat(json.loads('"\\ud800"')))) == 32


def test_answers_expire_and_the_longest_unused_leaves():
    clock = Clock()
    cache = ExactCache(ttl_s=10, size_bytes=3 * entry(size=100).size_bytes, clock=clock)
    for name in (b"a", b"b", b"c"):
        cache.put("t", name, entry(size=100))
    assert cache.get("t", b"a") is not None  # used: b is the longest unused now
    cache.put("t", b"d", entry(size=100))
    assert [cache.get("t", name) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    clock.now = 10
    assert cache.get("t", b"a") is None
    assert len(cache) == 2
    assert cache.size_bytes == 2 * entry(size=100).size_bytes
    cache.put("t", b"huge", entry(size=10_000))
    assert cache.get("t", b"huge") is None
    assert len(cache) == 2


def test_one_answer_or_a_whole_namespace_is_deleted():
    cache = ExactCache(ttl_s=10, size_bytes=10_000)
    for space, key in (("t", b"a"), ("t", b"b"), ("u", b"a")):
        cache.put(space, key, entry())
    assert cache.delete("t", b"a") == 1
    assert cache.delete("t") == 1
    assert cache.get("u", b"a") is not None
    cache.clear()
    assert (len(cache), cache.size_bytes) == (0, 0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("gpdt"), st.sampled_from(["", "a", "b", "ab"]), st.sampled_from([b"1", b"2", b"11"])),
        max_size=60,
    )
)
def test_an_exact_answer_never_crosses_namespaces(steps):
    clock = Clock()
    cache = ExactCache(ttl_s=5, size_bytes=5 * entry("ab11").size_bytes, clock=clock)
    truth: dict[tuple[str, bytes], str] = {}
    for number, (step, space, key) in enumerate(steps):
        if step == "p":
            truth[space, key] = text = f"{space}{number}"
            cache.put(space, key, entry(text))
        elif step == "d":
            cache.delete(space)
            truth = {at: text for at, text in truth.items() if at[0] != space}
        elif step == "t":
            clock.now += 1
        elif (found := cache.get(space, key)) is not None:
            assert found.body.decode() == truth[space, key]
        held = [cache._held.get(space, key)[0] for space in ("", "a", "b", "ab") for key in cache._held.keys(space)]
        assert cache.size_bytes == sum(one.size_bytes for one in held) <= cache.most_bytes
        assert len(cache) == len(held)


# The semantic cache


def unit(*values: float) -> np.ndarray:
    vector = np.array(values, np.float32)
    return vector / np.linalg.norm(vector)


def test_the_context_is_all_but_the_wording_of_the_last_message():
    context, text = context_key("chat", "m", chat("what is 2+2?"))
    assert text == "what is 2+2?"
    assert context_key("chat", "m", chat("what is two plus two?"))[0] == context
    before = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    longer = {**chat(), "messages": [*before, {"role": "user", "content": "what is 2+2?"}]}
    for other in (longer, chat(tools=[{}]), chat(temperature=1)):
        assert context_key("chat", "m", other)[0] != context
    assert context_key("chat", "m", {**chat(), "messages": before}) is None
    assert context_key("chat", "m", chat([{"type": "image_url"}])) is None
    assert context_key("chat", "m", chat("  ")) is None


def test_vectors_of_another_length_are_a_miss_and_keep_no_other_out():
    cache = SemanticCache(threshold=0.8, ttl_s=10, size=9, clock=Clock())
    cache.put("t", b"c", unit(1, 0, 0), entry("three"))
    assert cache.get("t", b"c", unit(1, 0)) is None
    for vector_D in (unit(1, 0), unit(1, 0, 0), np.zeros(0, np.float32)):
        cache.put("t", b"c", vector_D, entry(str(len(vector_D))))
    assert cache.get("t", b"c", unit(1, 0))[0].body == b"2"
    assert cache.get("t", b"c", unit(1, 0, 0)) is not None
    assert cache.get("t", b"c", np.zeros(0, np.float32)) is None
    assert len(cache) == 3
    assert cache.delete("t") == 3
    assert cache._rooms == {}


def test_the_nearest_text_over_the_threshold_answers():
    clock = Clock()
    cache = SemanticCache(threshold=0.8, ttl_s=10, size=2, clock=clock)
    cache.put("t", b"c", unit(1, 0), entry("east"))
    cache.put("t", b"c", unit(0, 1), entry("north"))
    found, cosine = cache.get("t", b"c", unit(3, 4))  # cosines 0.6 and 0.8
    assert found.body == b"north"
    assert cosine == pytest.approx(0.8)
    assert cache.get("t", b"c", unit(1, 1)) is None  # 0.7071 to both
    assert cache.get("t", b"other", unit(0, 1)) is None
    assert cache.get("u", b"c", unit(0, 1)) is None
    cache.put("t", b"d", unit(1, 0), entry("third"))
    assert cache.get("t", b"c", unit(1, 0)) is None  # the longest unused
    assert len(cache) == 2
    clock.now = 10
    assert cache.get("t", b"c", unit(0, 1)) is None
    assert len(cache) == 1
    assert cache.delete("t") == 1
    assert cache._rooms == {}


def test_a_text_that_means_nothing_is_not_kept():
    cache = SemanticCache(threshold=0.5, ttl_s=1, size=2)
    cache.put("t", b"c", np.zeros(2, np.float32), entry())
    cache.put("t", b"c", np.array([np.nan, 1], np.float32), entry())
    assert len(cache) == 0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("gpd"), st.sampled_from("abc"), st.sampled_from([b"1", b"2"]), st.integers(0, 7)),
        max_size=60,
    )
)
def test_a_semantic_answer_never_crosses_namespaces_or_contexts(steps):
    cache = SemanticCache(threshold=0.7, ttl_s=5, size=8)
    for step, space, context, angle in steps:
        vector = unit(np.cos(angle * np.pi / 4), np.sin(angle * np.pi / 4))
        if step == "p":
            cache.put(space, context, vector, entry(f"{space}{context.decode()}"))
        elif step == "d":
            cache.delete(space)
        elif (found := cache.get(space, context, vector)) is not None:
            assert found[0].body.decode() == f"{space}{context.decode()}"
            assert found[1] >= 0.7
        assert len(cache) == sum(len(room.index) for room in cache._rooms.values()) <= 8


@pytest.mark.parametrize("index", [Exact.Config(), Hnsw.Config()])
def test_the_nearest_text_is_found_as_a_naive_search_does(index):
    random = np.random.default_rng(0)
    vector_ND = random.normal(size=(40, 8)).astype(np.float32)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    cache = SemanticCache(threshold=0.01, ttl_s=1e6, size=37, index=index)
    for number, vector in enumerate(vector_ND):
        cache.put("n", b"c", 3 * vector, entry(str(number)))
    # The first three had to make room.
    for query in vector_ND[3:8] + 0.1:
        best = max(range(3, 40), key=lambda number: float(vector_ND[number] @ query))
        found, cosine = cache.get("n", b"c", query)
        assert found.body.decode() == str(best)
        assert cosine == pytest.approx(float(vector_ND[best] @ query) / np.linalg.norm(query), abs=1e-5)
    # What means nothing is near to nothing.
    assert cache.get("n", b"c", np.full(8, np.nan, np.float32)) is None
    assert cache.get("n", b"c", np.zeros(8, np.float32)) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExactCache(ttl_s=0, size_bytes=1),
        lambda: ExactCache(ttl_s=1, size_bytes=-1),
        lambda: SemanticCache(threshold=0, ttl_s=1, size=1),
        lambda: SemanticCache(threshold=1.1, ttl_s=1, size=1),
        lambda: SemanticCache(threshold=0.5, ttl_s=1, size=0),
    ],
)
def test_bounds_that_cannot_be_are_refused(make):
    with pytest.raises(InputError):
        make()


# Single flight


async def ask(flights: SingleFlight, key: str, calls: list[str], outcome) -> str:
    got = await flights.join(key)
    if not isinstance(got, Ticket):
        return got
    try:
        calls.append(key)
        await asyncio.sleep(0.01)
        value = outcome()
        got.land(value)
        return value
    except Exception as error:
        got.fail(error)
        raise
    finally:
        got.abandon()


def test_a_hundred_identical_misses_make_one_call():
    async def main():
        flights, calls = SingleFlight(), []
        got = await asyncio.gather(*(ask(flights, "ab"[at % 2], calls, lambda: "x") for at in range(100)))
        assert got == ["x"] * 100
        assert sorted(calls) == ["a", "b"]
        assert len(flights) == 0

    run_paced(main())


def test_an_error_reaches_all_who_wait_and_the_next_asks_anew():
    async def main():
        flights, calls = SingleFlight(), []

        def broken():
            raise OSError("down")

        got = await asyncio.gather(*(ask(flights, "a", calls, broken) for _ in range(5)), return_exceptions=True)
        assert [str(error) for error in got] == ["down"] * 5
        assert calls == ["a"]
        assert await ask(flights, "a", calls, lambda: "up") == "up"

    run_paced(main())


def test_when_the_first_goes_away_the_next_takes_over():
    async def main():
        flights, calls = SingleFlight(), []
        tasks = [asyncio.create_task(ask(flights, "a", calls, lambda: "x")) for _ in range(4)]
        await asyncio.sleep(0.002)
        tasks[0].cancel()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(got[0], asyncio.CancelledError)
        assert got[1:] == ["x"] * 3
        assert calls == ["a", "a"]
        assert len(flights) == 0

    run_paced(main())


def test_those_who_are_released_each_fetch_for_themselves_and_wait_for_nobody():
    async def main():
        flights, calls = SingleFlight(), []
        ticket = await flights.join("a")
        tasks = [asyncio.create_task(ask(flights, "a", calls, lambda: "x")) for _ in range(3)]
        await asyncio.sleep(0.002)
        assert ticket.num_waiting == 3
        ticket.release()
        assert await asyncio.gather(*tasks) == ["x"] * 3
        assert calls == ["a"] * 3
        assert (ticket.num_waiting, ticket.is_open, len(flights)) == (0, False, 0)
        ticket.land("late")
        assert len(flights) == 0

    run_paced(main())


def test_one_who_waits_may_leave_without_harm():
    async def main():
        flights, calls = SingleFlight(), []
        tasks = [asyncio.create_task(ask(flights, "a", calls, lambda: "x")) for _ in range(3)]
        await asyncio.sleep(0.002)
        tasks[1].cancel()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        assert (got[0], got[2]) == ("x", "x")
        assert calls == ["a"]

    run_paced(main())
