"""Large requests are put into the form of their deployment beside the loop, where senders take turns."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from anabranch.gateway.dispatch.own_time import OwnTime
from anabranch.gateway.dispatch.run import Run
from anabranch.web.large_json import LARGE
from anabranch.web.turns import Turns


def test_a_sender_of_many_large_requests_waits_for_itself_and_another_for_one_piece():
    done, gate = [], threading.Event()

    def build(request):
        gate.wait()
        done.append((request.whose, threading.current_thread() is threading.main_thread()))
        return SimpleNamespace()

    live = SimpleNamespace(name="m", provider=SimpleNamespace(build=build))

    def built(turns, sender, request):
        of = SimpleNamespace(dispatcher=SimpleNamespace(turns=turns), plan=SimpleNamespace(sender=sender, trace=None))
        return Run.built(of, live, request, SimpleNamespace(time=OwnTime()))

    async def main():
        with ThreadPoolExecutor(1) as executor:
            turns = Turns(executor)
            tasks = []
            for whose in ["hostile"] * 4 + ["other"]:
                request = SimpleNamespace(whose=whose, num_bytes=LARGE + 1)
                tasks.append(asyncio.create_task(built(turns, whose, request)))
                await asyncio.sleep(0)
            gate.set()
            await asyncio.gather(*tasks)
            call = await built(turns, "other", SimpleNamespace(whose="small", num_bytes=LARGE))
            # For an engine in this process, in which senders take turns too.
            assert call.sender == "other"

    asyncio.run(main())
    assert done == [
        *((whose, False) for whose in ("hostile", "hostile", "other", "hostile", "hostile")),
        ("small", True),
    ]
