"""A kept answer is in memory once, and once as a stream, for however many read it."""

import gc
import weakref
from types import SimpleNamespace

from aiohttp.test_utils import make_mocked_request

from anabranch.gateway.cache import Entry, Retold
from anabranch.gateway.core.relay import Replayed
from anabranch.gateway.core.reply import Reply
from anabranch.gateway.http.exchange import KEPT, Exchange
from gateway_states import config, run


def test_all_who_read_an_answer_at_a_time_read_the_same_chunks():
    """Each had its own: 60 who read slowly took 800 MiB, and paid nothing."""

    async def main():
        retold, answer, same = Retold(), b"an answer", bytes(bytearray(b"an answer"))
        asked, made = (answer, "chat", True), []

        def make(*given):
            made.append(given)
            if len(made) == 1:
                # Another makes them at the same time, and is first.
                made.append(retold.told(*asked, make))
            return [b"an ", b"answer"]

        assert retold.known(*asked) is None
        told = retold.told(*asked, make)
        assert retold.known(*asked) is told is made.pop(2)
        # They are not made again, nor for who found the same in a store that processes share.
        assert same is not answer
        assert retold.told(same, "chat", True, make) is retold.known(same, "chat", True) is retold.told(*asked, make)
        assert (retold.known(*asked), made) == (told, [asked] * 2)
        # Another answer, or form of it, is another.
        assert retold.known(b"another", "chat", True) is retold.known(answer, "chat", False) is None
        readers = [Replayed(retold.known(*asked)) for _ in range(3)]
        del told
        assert [piece async for piece in readers[0]] == [b"an ", b"answer"]
        assert await anext(readers[1]) == b"an "
        gc.collect()
        assert retold.known(*asked) is not None
        # When the last has read it, or gone, it is gone.
        await readers[1].aclose()
        assert [piece async for piece in readers[1]] == []
        await readers[2].aclose()
        gc.collect()
        assert retold.known(*asked) is None
        assert len(retold._told) == 0

    run(main)


def test_an_answer_that_came_from_elsewhere_is_in_memory_once_as_long_as_somebody_reads_it():
    """Each reader of one that another process keeps had a body of his own: 1 MiB each, beyond every bound."""

    def come(body=b"an answer", **fields):
        return Entry(body=bytes(bytearray(body)), **{"model": "small", "nano": 5, **fields})

    retold = Retold()
    first = come()
    assert retold.one(first) is first
    again = come()
    assert again.body is not first.body
    assert retold.one(again) is first
    # What says something else is another.
    others = [
        come(b"another"),
        come(model="large"),
        come(nano=6),
        come(prompt_tokens=1),
        come(completion_tokens=1),
        come(spare="time"),
    ]
    assert [retold.one(one) for one in others] == others
    assert len({id(retold.one(one)) for one in others}) == 6
    body = weakref.ref(first)
    del first
    gc.collect()
    assert body() is None
    assert retold.one(again) is again
    del again, others
    gc.collect()
    assert len(retold._read) == 0


def test_a_whole_answer_is_held_until_it_has_been_written():
    async def main():
        kept = Entry(body=b"{}", model="small")
        exchange = Exchange(SimpleNamespace(config=config(), rates_left=lambda record: {}))
        request = make_mocked_request("POST", "/v1/chat/completions")
        response = await exchange.send(request, Reply(body=kept.body, kept=kept), None)
        assert (response.body is kept.body, response[KEPT] is kept) == (True, True)
        # One that was made for its reader alone is of nothing that others read.
        own = await exchange.send(request, Reply(body=b"{}"), None)
        assert own.get(KEPT) is None

    run(main)
