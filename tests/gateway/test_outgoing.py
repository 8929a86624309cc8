"""Large requests are put into the form of their deployment beside the loop, where senders take turns, and hold no place there meanwhile."""

import asyncio
import contextlib
import threading

import pytest

from anabranch.gateway.dispatch import Deployment, Dispatcher, DispatchRules, Group, Plan
from anabranch.gateway.dispatch.shared_rooms import Full
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.provider import UpstreamError, UpstreamRequest
from anabranch.web.large_json import LARGE
from paced_time import run_paced
from waiting import until_async

RULES = DispatchRules(retries=1, backoff_s=0.01, min_extra=100)


def group(name, *, shared=None, **mock):
    deployment = Deployment(name=f"{name}-0", provider=Mock.Config(model=name, **mock), **(shared or {}))
    return Group(name=name, deployments=(deployment,))


def chat(num_bytes=LARGE + 1, **fields):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return UpstreamRequest("chat", body, num_bytes=num_bytes, prompt_tokens=1)


class Asked:
    """A dispatcher on the running loop, and its requests.

    Attributes:
        writing: how many requests wait to be put into their form, while `held`.
    """

    def __init__(self, *groups, **rules):
        self.now = asyncio.get_running_loop().time
        self.dispatcher = Dispatcher(groups, RULES if not rules else DispatchRules(**rules), clock=self.now)
        self.lives = self.dispatcher.lives()

    @property
    def writing(self):
        return sum(map(len, self.dispatcher.turns._waiting.values()))

    def ask(self, request, *candidates, sender="key:a", seconds=1000.0, **fields):
        plan = Plan(candidates=candidates or ("m",), deadline=self.now() + seconds, sender=sender, **fields)
        return asyncio.ensure_future(self._asked(plan, request))

    async def _asked(self, plan, request):
        if not request.stream:
            return (await self.dispatcher.complete(plan, request)).report
        stream = await self.dispatcher.stream(plan, request)
        assert b"".join([block async for block in stream]).endswith(b"data: [DONE]\n\n")
        return stream.report

    @contextlib.asynccontextmanager
    async def held(self):
        """As long as the block lasts the thread that writes is busy."""
        gate = threading.Event()
        busy = self.dispatcher.turns.put("somebody", gate.wait)
        try:
            yield
        finally:
            gate.set()
            await busy


def test_a_sender_of_many_large_requests_waits_for_itself_and_another_for_one_piece():
    async def main():
        asked = Asked(group("m"))
        done, [live] = [], asked.lives
        build = live.provider.build

        def noted(request):
            done.append((request.request_id, threading.current_thread() is threading.main_thread()))
            return build(request)

        live.provider.build = noted
        tasks = []
        async with asked.held():
            for whose in ["hostile"] * 4 + ["other"]:
                request = chat()
                request.request_id = whose
                tasks.append(asked.ask(request, sender=whose))
                await until_async(lambda: asked.writing == len(tasks))
        await asyncio.gather(*tasks)
        small = chat(LARGE)
        small.request_id = "small"
        await asked.ask(small)
        return done

    assert run_paced(main()) == [
        *((whose, False) for whose in ("hostile", "other", "hostile", "hostile", "hostile")),
        ("small", True),
    ]


class Rooms:
    """Of all processes: says what was taken, and that there is room for it."""

    def __init__(self):
        self.taken = []

    async def take(self, deployment, id, tokens):
        self.taken.append(id)

    def leave(self, whose, id):
        self.taken.remove(id)

    def spent(self, deployment, tokens):
        pass


@pytest.mark.parametrize("stream", [False, True])
def test_what_waits_to_be_written_holds_no_place_that_others_need(stream):
    """Senders of large requests held all places of deployments that had nothing to do."""

    async def main():
        asked = Asked(group("m", shared={"max_in_flight": 2}))
        [live], rooms = asked.lives, Rooms()
        asked.dispatcher.rooms = rooms
        async with asked.held():
            large = [asked.ask(chat(stream=stream), sender=whose) for whose in ("key:a", "key:b", "key:c")]
            await until_async(lambda: asked.writing == 3)
            # Nor does it look as if the deployment did not answer.
            await until_async(lambda: (live.in_flight, live.waiting, rooms.taken) == (0, 0, []))
            report = await asked.ask(chat(9, stream=stream), sender="key:d")
            assert report.deployment == "m-0"
        done = await asyncio.gather(*large, return_exceptions=True)
        assert (live.in_flight, live._parts._counts, rooms.taken) == (0, {}, [])
        return [one.deployment for one in done if not isinstance(one, UpstreamError)]

    assert "m-0" in run_paced(main())


@pytest.mark.parametrize("abroad", [False, True])
def test_whose_place_was_taken_while_it_was_written_goes_on_elsewhere(abroad):
    class Crowded(Rooms):
        async def take(self, deployment, id, tokens):
            return Full(None) if deployment.name == "m-0" else await super().take(deployment, id, tokens)

    async def main():
        shared = {"max_in_flight": 1}
        asked = Asked(group("m", latency_s=50.0, shared=shared), group("n", shared=shared))
        first, other = asked.lives
        asked.dispatcher.rooms = Crowded() if abroad else None
        async with asked.held():
            large = [asked.ask(chat(), *names, sender="key:b") for names in (("m", "n"), ("m",))]
            await until_async(lambda: asked.writing == 2)
            slow = None if abroad else asked.ask(chat(9), sender="key:a")
            await until_async(lambda: abroad or first.in_flight == 1)
        report = await large[0]
        # It was no attempt.
        assert [one.deployment for one in report.attempts] == ["n-0"]
        assert report.skipped == [("m", "no deployment takes requests")]
        with pytest.raises(UpstreamError, match="no deployment takes requests"):
            await large[1]
        assert first.in_flight == (slow is not None)
        assert other._parts._counts == {}
        if slow is not None:
            slow.cancel()
            await asyncio.wait((slow,))

    run_paced(main())


def test_one_that_cannot_be_put_into_the_form_of_a_deployment_is_an_attempt_that_costs_nothing():
    async def main():
        asked = Asked(group("m"), group("n"))

        def broken(request):
            raise KeyError(request.request_id)

        first, _ = asked.lives
        first.provider.build = broken
        report = await asked.ask(chat(), "m", "n")
        assert [(one.deployment, one.status) for one in report.attempts] == [("m-0", "unsupported"), ("n-0", "ok")]
        assert (first.in_flight, first.breaker.phase) == (0, "closed")

    run_paced(main())


def test_the_time_for_a_request_may_be_up_before_its_turn_to_be_written():
    async def main():
        asked = Asked(group("m"))
        async with asked.held():
            task = asked.ask(chat(), seconds=0.1)
            with pytest.raises(UpstreamError, match="time for this request") as caught:
                await task
            assert (caught.value.failure.kind, caught.value.report.attempts, asked.writing) == ("deadline", [], 0)

    run_paced(main())


def test_who_leaves_before_its_turn_to_be_written_leaves_nothing():
    async def main():
        asked = Asked(group("m"))
        async with asked.held():
            task = asked.ask(chat())
            await until_async(lambda: asked.writing == 1)
            task.cancel()
            await asyncio.wait((task,))
            assert (task.cancelled(), asked.writing, asked.lives[0].in_flight) == (True, 0, 0)

    run_paced(main())


@pytest.mark.parametrize("leaves", [False, True])
def test_an_answer_does_not_wait_until_another_attempt_beside_it_is_written(leaves):
    async def main():
        asked = Asked(
            group("m", latency_s=1.0), group("n"), hedge=True, hedge_samples=1, hedge_min_s=0.1, min_extra=100
        )
        asked.dispatcher.groups["m"].hedge_whole.observe(0.1)
        first, other = asked.lives
        task = asked.ask(chat(), "m", "n")
        await until_async(lambda: first.in_flight == 1)
        async with asked.held():
            await until_async(lambda: asked.writing == 1)
            assert (other.in_flight, task.done()) == (0, False)
            if leaves:
                task.cancel()
                await asyncio.wait((task,))
            else:
                report = await task
                assert [one.deployment for one in report.attempts] == ["m-0"]
            await until_async(lambda: not asked.writing)
        # Nor has it cost one of the extra attempts.
        assert asked.dispatcher.budget.state(asked.now())["extra"] == 0
        assert (first.in_flight, other.in_flight) == (0, 0)

    run_paced(main())


def test_another_attempt_beside_the_first_is_not_made_where_its_place_was_taken_while_it_was_written():
    async def main():
        asked = Asked(
            group("m", latency_s=1.0),
            group("n", latency_s=50.0, shared={"max_in_flight": 1}),
            hedge=True,
            hedge_samples=1,
            hedge_min_s=0.1,
            min_extra=100,
        )
        asked.dispatcher.groups["m"].hedge_whole.observe(0.1)
        first, other = asked.lives
        task = asked.ask(chat(), "m", "n")
        await until_async(lambda: first.in_flight == 1)
        async with asked.held():
            await until_async(lambda: asked.writing == 1)
            slow = asked.ask(chat(9), "n", sender="key:b")
            await until_async(lambda: other.in_flight == 1)
        report = await task
        assert [one.deployment for one in report.attempts] == ["m-0"]
        assert (other.in_flight, asked.dispatcher.budget.state(asked.now())["extra"]) == (1, 0)
        slow.cancel()
        await asyncio.wait((slow,))

    run_paced(main())


def test_a_large_request_is_asked_beside_the_first_once_it_is_written():
    async def main():
        asked = Asked(
            group("m", latency_s=9.0), group("n"), hedge=True, hedge_samples=1, hedge_min_s=0.1, min_extra=100
        )
        asked.dispatcher.groups["m"].hedge_whole.observe(0.1)
        report = await asked.ask(chat(), "m", "n")
        assert [(one.deployment, one.is_hedge) for one in report.attempts] == [("m-0", False), ("n-0", True)]

    run_paced(main())
