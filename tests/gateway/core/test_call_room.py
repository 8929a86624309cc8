"""Room for the bodies that the calls of one request send at once."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.core.call_room import MOST_BYTES, CallRoom
from anabranch.web.large_json import LARGE
from gateway_states import begun, config, run, services, state_of


async def sends(room, size, under_way, seen, ends=1):
    async with room.taken(size):
        under_way.append(size)
        seen.append(list(under_way))
        try:
            for _ in range(ends):
                await asyncio.sleep(0)
        finally:
            under_way.remove(size)


def test_many_small_ones_are_sent_at_once_and_a_large_one_alone():
    async def work(sizes):
        room, under_way, seen = CallRoom(), [], []
        await asyncio.gather(*(sends(room, size, under_way, seen) for size in sizes))
        return [len(one) for one in seen]

    assert asyncio.run(work([0] * 5)) == [1, 2, 3, 4, 5]
    assert asyncio.run(work([3 * MOST_BYTES] * 3)) == [1, 1, 1]
    assert asyncio.run(work([MOST_BYTES // 2] * 4))[:2] == [1, 2]


@given(st.lists(st.tuples(st.integers(0, 2 * MOST_BYTES), st.integers(1, 4)), max_size=12), st.sets(st.integers(0, 11)))
def test_never_more_than_there_is_room_for_and_all_are_sent(calls, cancelled):
    async def work():
        room, under_way, seen = CallRoom(), [], []
        tasks = [asyncio.ensure_future(sends(room, size, under_way, seen, ends)) for size, ends in calls]
        await asyncio.sleep(0)
        for at in cancelled:
            if at < len(tasks):
                tasks[at].cancel()
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        for one in seen:
            assert sum(one) <= MOST_BYTES or sum(bool(size) for size in one) == 1
        assert sum(one is None for one in done) >= len(calls) - len(cancelled)
        # Nothing is left behind.
        await asyncio.wait_for(sends(room, MOST_BYTES, [], seen), 60)

    asyncio.run(work())


@pytest.mark.parametrize(("size", "at_once"), [(10, 4), (LARGE * 2, 4), (MOST_BYTES + 1, 1)])
def test_calls_of_a_request_send_large_bodies_few_at_a_time(size, at_once, monkeypatch):
    async def work():
        state = state_of(lent=services()[0], of=config())
        begun(state)
        under_way, most, inner = [], [], state.calls._runtime.dispatcher.complete

        async def complete(plan, request):
            under_way.append(request)
            most.append(len(under_way))
            await asyncio.sleep(0.01)
            under_way.remove(request)
            return await inner(plan, request)

        monkeypatch.setattr(state.calls._runtime.dispatcher, "complete", complete)
        text = "x" * size
        answers = await asyncio.gather(*(state.calls("small", text, seed=seed) for seed in range(4)))
        assert len(answers) == 4
        assert max(most) == at_once
        return max(most)

    assert run(work) == at_once
