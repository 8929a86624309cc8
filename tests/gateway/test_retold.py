"""A kept answer that is read as a stream is in memory once, for however many read it."""

import gc

from anabranch.gateway.cache import Retold
from anabranch.gateway.core.relay import Replayed
from gateway_states import run


def test_all_who_read_an_answer_at_a_time_read_the_same_chunks():
    """Each had its own: 60 who read slowly took 800 MiB, and paid nothing."""

    async def main():
        retold, answer, same = Retold(), b"an answer", bytes(bytearray(b"an answer"))
        asked = (answer, "chat", True)
        assert retold.known(*asked) is None
        told = retold.keep(*asked, [b"an ", b"answer"])
        assert retold.known(*asked) is told
        # Who made them at the same time has those of the first, and so has who found the same in a store that processes share.
        assert retold.keep(*asked, [b"an ", b"answer"]) is told
        assert same is not answer
        assert retold.keep(same, "chat", True, [b"an ", b"answer"]) is retold.known(same, "chat", True) is told
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
