"""The loop between a scheduler and a runner, without a model: a runner that counts."""

import threading
import weakref
from concurrent.futures import Future

import pytest

from anabranch.errors import AnabranchError, BackendError, InputError
from anabranch.serving.core.batch import PENDING, Sampled
from anabranch.serving.core.client import BusyError, EngineStats
from anabranch.serving.core.request import Finish, Output, Request, Sampling
from anabranch.serving.core.scheduler import SchedulerConfig
from anabranch.serving.engine.loop import EngineLoop
from anabranch.serving.engine.messages import Abort, Add, Close, Closed, Control, Refused, Reply
from waiting import until


class Counting:
    """Each new token is the one before plus one."""

    def __init__(self):
        self.last, self.batches, self.is_closed = {}, [], False

    def run(self, batch):
        self.batches.append(batch)
        sampled = []
        for chunk in batch.chunks:
            token = self.last[chunk.id] if chunk.tokens[-1] == PENDING else chunk.tokens[-1]
            if chunk.samples:
                self.last[chunk.id] = token + 1
                sampled.append(Sampled(id=chunk.id, token=token + 1))
        return sampled

    def close(self):
        self.is_closed = True


class Watch:
    """A loop and what came out of it."""

    def __init__(self, runner=None, is_async=False, **options):
        self.events = []
        self.scheduler = SchedulerConfig(num_blocks=64, max_positions=64, block_tokens=4, is_async=is_async).build()
        self.runner = runner or Counting()
        self.loop = EngineLoop(self.scheduler, self.runner, self.take, is_async=is_async, **options)

    def take(self, events):
        self.events.extend(events)

    def tokens(self, id):
        return [
            token for event in self.events if isinstance(event, Output) and event.id == id for token in event.tokens
        ]

    def ends(self, id):
        return [event for event in self.events if isinstance(event, Output) and event.id == id and event.finish]

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


def request(id, first=10, count=5, **options):
    return Request(id=id, prompt=(first,), sampling=Sampling(max_tokens=count, temperature=0), **options)


BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@BOTH
def test_requests_run_to_their_ends(is_async):
    watch = Watch(is_async=is_async)
    for id, first in (("a", 10), ("b", 20)):
        watch.loop.put(Add(request(id, first)))
    watch.loop.run(until_idle=True)
    assert watch.tokens("a") == [11, 12, 13, 14, 15]
    assert watch.tokens("b") == [21, 22, 23, 24, 25]
    assert [end.finish for end in watch.ends("a") + watch.ends("b")] == [Finish.LENGTH] * 2
    watch.loop.put(Close())
    watch.loop.run()
    assert watch.runner.is_closed
    assert watch.events[-1] == Closed(None)
    stats = watch.of(EngineStats)[-1]
    assert stats.counters["generation_tokens"] == 10
    steps = sum(len(each.samples["step_time"]) for each in watch.of(EngineStats))
    assert steps == stats.counters["steps"] == len(watch.runner.batches)


def test_the_next_step_is_scheduled_while_one_runs():
    second_is_formed = threading.Event()

    class Waiting(Counting):
        def run(self, batch):
            if batch.step == 0:
                assert second_is_formed.wait(60), "step 1 was not formed while step 0 ran"
            return super().run(batch)

    watch = Watch(Waiting(), is_async=True)
    schedule = watch.scheduler.schedule

    def watched():
        batch = schedule()
        if batch is not None and batch.step == 1:
            second_is_formed.set()
        return batch

    watch.scheduler.schedule = watched
    watch.loop.put(Add(request("a")))
    watch.loop.run(until_idle=True)
    assert watch.tokens("a") == [11, 12, 13, 14, 15]
    assert [batch.chunks[0].tokens[-1] for batch in watch.runner.batches] == [10] + [PENDING] * 4


@BOTH
def test_an_abort_ends_one_request(is_async):
    watch = Watch(is_async=is_async)

    def take(events):
        watch.events.extend(events)
        if len(watch.tokens("a")) == 2:
            watch.loop.put(Abort("a"))

    watch.loop._emit = take
    watch.loop.put(Add(request("a")))
    watch.loop.put(Add(request("b", 20)))
    watch.loop.put(Abort("unknown"))
    watch.loop.run(until_idle=True)
    assert watch.tokens("a") == [11, 12, 13, 14, 15][: len(watch.tokens("a"))]
    assert len(watch.tokens("a")) <= 3
    assert [end.finish for end in watch.ends("a")] == [Finish.ABORT]
    assert watch.tokens("b") == [21, 22, 23, 24, 25]


@BOTH
def test_what_can_never_run_is_refused_alone(is_async):
    def check(asked):
        if asked.prompt[0] > 99:
            raise InputError("the prompt has the token 100")

    watch = Watch(is_async=is_async, check=check)
    for one in (request("a"), request("a"), request("big", 100), Request(id="long", prompt=(1,) * 64)):
        watch.loop.put(Add(one))
    watch.loop.run(until_idle=True)
    assert watch.tokens("a") == [11, 12, 13, 14, 15]
    refused = {event.id: event.error for event in watch.of(Refused)}
    assert refused["big"] == "the prompt has the token 100"
    assert "64 tokens" in refused["long"]
    assert "under way" in refused["a"]


@BOTH
def test_a_crash_ends_every_request_with_an_error(is_async, caplog):
    class Failing(Counting):
        def run(self, batch):
            if batch.step == 2:
                raise RuntimeError("out of luck")
            return super().run(batch)

    watch = Watch(Failing(), is_async=is_async)
    watch.loop.put(Add(request("a")))
    watch.loop.put(Add(request("b", 20)))
    watch.loop.run()
    for id in "ab":
        assert [(end.finish, end.error) for end in watch.ends(id)] == [(Finish.ERROR, "RuntimeError: out of luck")]
    assert watch.events[-1] == Closed("RuntimeError: out of luck")
    assert watch.runner.is_closed
    assert "out of luck" in caplog.text


@BOTH
def test_a_crash_is_raised_to_whoever_runs_the_loop_until_idle(is_async):
    class Failing(Counting):
        def run(self, batch):
            raise BackendError("no device")

    watch = Watch(Failing(), is_async=is_async)
    watch.loop.put(Add(request("a")))
    with pytest.raises(BackendError, match="no device"):
        watch.loop.run(until_idle=True)


@BOTH
@pytest.mark.timeout(60)
def test_an_engine_that_failed_says_so_to_all_who_come_later(is_async):
    class Failing(Counting):
        def run(self, batch):
            raise BackendError("no device")

        def close(self):
            assert not self.is_closed
            super().close()

    watch = Watch(Failing(), is_async=is_async)
    watch.loop.put(Add(request("a")))
    with pytest.raises(BackendError, match="no device"):
        watch.loop.run(until_idle=True)
    for id in "ab":
        watch.loop.put(Add(request(id)))
        with pytest.raises(AnabranchError, match="the engine has ended: BackendError: no device; make a new one"):
            watch.loop.run(until_idle=True)
    watch.loop.put(Close())
    watch.loop.run()
    assert len(watch.of(Closed)) == 1


@BOTH
def test_draining_ends_what_runs_and_takes_nothing_new(is_async):
    watch = Watch(is_async=is_async)
    for command in (Add(request("a")), Close(30.0), Add(request("late"))):
        watch.loop.put(command)
    watch.loop.run()
    assert watch.tokens("a") == [11, 12, 13, 14, 15]
    assert [(end.finish, end.error) for end in watch.ends("late")] == [
        (Finish.ABORT, "the engine takes no more requests")
    ]
    assert watch.events[-1] == Closed(None)


@BOTH
def test_closing_at_once_aborts_what_runs(is_async):
    watch = Watch(is_async=is_async)
    watch.loop.put(Add(request("a", count=60)))
    watch.loop.put(Close())
    watch.loop.run()
    assert [end.finish for end in watch.ends("a")] == [Finish.ABORT]


def test_controls_are_answered_and_unknown_ones_refused():
    def scale(devices):
        if devices < 1:
            raise InputError("devices is 0")
        return devices + 1

    watch = Watch(controls={"scale": scale})
    arguments = [("scale", {"devices": 2}), ("scale", {"devices": 0}), ("scale", {"gpus": 1}), ("shrink", {})]
    for number, (name, values) in enumerate(arguments):
        watch.loop.put(Control(number, name, values))
    watch.loop.run(until_idle=True)
    replies = watch.of(Reply)
    assert replies[0] == Reply(0, 3)
    assert str(replies[1].error) == "devices is 0"
    assert str(replies[2].error).startswith("control 'scale': ")
    assert str(replies[3].error) == "no control 'shrink'; known: scale"
    assert all(isinstance(reply.error, InputError) for reply in replies[1:])


def test_an_idle_loop_says_how_it_is_once_and_waits():
    watch = Watch(sources=[lambda: EngineStats(gauges={"expert_resident_bytes": 7})])
    thread = threading.Thread(target=watch.loop.run)
    thread.start()
    until(lambda: watch.of(EngineStats))
    thread.join(0.05)
    assert thread.is_alive()
    assert len(watch.of(EngineStats)) == 1
    assert watch.of(EngineStats)[0].gauges["expert_resident_bytes"] == 7
    watch.loop.put(Close())
    thread.join(60)
    assert not thread.is_alive()


# -- what has to be prepared


def prepared_by(futures):
    return lambda request: futures.get(request.id)


@BOTH
def test_a_request_waits_for_what_is_prepared_and_holds_up_no_other(is_async):
    class Grammar:
        pass

    future, thing = Future(), Grammar()
    held = weakref.ref(thing)
    watch = Watch(is_async=is_async, prepare=prepared_by({"slow": future}))
    watch.loop.put(Add(request("slow")))
    watch.loop.put(Add(request("other", 20)))
    thread = threading.Thread(target=watch.loop.run)
    thread.start()
    until(lambda: watch.ends("other"))
    assert not watch.tokens("slow")
    assert [output for output in watch.of(Output) if output.is_bare] == [Output(id="slow", is_prepared=False)]
    future.set_result(thing)
    until(lambda: watch.ends("slow"))
    assert watch.tokens("slow") == [11, 12, 13, 14, 15]
    told = [output for output in watch.of(Output) if output.id == "slow"]
    assert [output.is_prepared for output in told[:3]] == [False, True, None]
    assert [output.is_bare for output in told[:3]] == [True, True, False]
    watch.loop.put(Close())
    thread.join(60)
    del future, thing
    watch.loop._prepare = None
    assert held() is None  # nothing keeps it for a request that is over


def test_what_is_there_at_once_is_told_of_by_nothing():
    future = Future()
    future.set_result(None)
    watch = Watch(prepare=prepared_by({"a": future}))
    watch.loop.put(Add(request("a", 10)))
    watch.loop.run(until_idle=True)
    assert watch.tokens("a") == [11, 12, 13, 14, 15]
    assert {output.is_prepared for output in watch.of(Output)} == {None}


@pytest.mark.parametrize(
    ("error", "is_busy"), [(InputError("not so"), False), (BusyError("not now"), True), (ValueError("a fault"), False)]
)
def test_what_cannot_be_prepared_refuses_its_request_alone(error, is_busy):
    future = Future()
    watch = Watch(prepare=prepared_by({"bad": future}))
    watch.loop.put(Add(request("bad")))
    watch.loop.put(Add(request("good", 20)))
    threading.Timer(0.05, future.set_exception, (error,)).start()
    watch.loop.run(until_idle=True)
    assert watch.of(Refused) == [Refused("bad", str(error), is_busy=is_busy)]
    assert watch.tokens("good") == [21, 22, 23, 24, 25]


def test_a_request_that_waits_can_be_aborted_and_its_id_come_again():
    first, second = Future(), Future()
    futures = {"a": first}
    watch = Watch(prepare=prepared_by(futures))
    watch.loop.put(Add(request("a")))
    watch.loop.put(Add(request("a", 50)))  # while it is there
    watch.loop.put(Abort("a"))
    watch.loop.run(until_idle=True)
    assert [refused.id for refused in watch.of(Refused)] == ["a"]
    assert [end.finish for end in watch.ends("a")] == [Finish.ABORT]
    futures["a"] = second
    watch.loop.put(Add(request("a", 30, 2)))
    assert first.cancelled()  # what nobody waits for need not be made
    threading.Timer(0.05, second.set_result, (None,)).start()
    watch.loop.run(until_idle=True)
    assert watch.tokens("a") == [31, 32]


@BOTH
@pytest.mark.parametrize("where", ["check", "prepare", "add"])
def test_whatever_a_request_raises_before_it_runs_refuses_it_alone(where, is_async, caplog):
    def fail(request):
        if request.id == "bad":
            raise ZeroDivisionError("a fault")

    watch = Watch(is_async=is_async, **({where: fail} if where != "add" else {}))
    if where == "add":
        add = watch.loop.scheduler.add
        watch.loop.scheduler.add = lambda request: fail(request) or add(request)
    for id, start in (("good", 10), ("bad", 20), ("other", 30)):
        watch.loop.put(Add(request(id, start)))
    watch.loop.run(until_idle=True)
    assert watch.of(Refused) == [Refused("bad", "the request cannot be taken: ZeroDivisionError: a fault")]
    assert watch.tokens("good") == [11, 12, 13, 14, 15]
    assert watch.tokens("other") == [31, 32, 33, 34, 35]


def test_what_the_end_of_the_store_cancels_refuses_its_request():
    future = Future()
    watch = Watch(prepare=prepared_by({"bad": future}))
    watch.loop.put(Add(request("bad")))
    threading.Timer(0.05, future.cancel).start()
    watch.loop.run(until_idle=True)
    assert watch.of(Refused) == [Refused("bad", "the engine ends")]


def test_a_loop_that_ends_waits_for_nothing_that_is_prepared():
    future = Future()
    watch = Watch(prepare=prepared_by({"slow": future}))
    watch.loop.put(Add(request("slow")))
    watch.loop.put(Close())
    watch.loop.run()
    assert future.cancelled()
    assert [end.finish for end in watch.ends("slow")] == [Finish.ABORT]
    assert watch.of(Closed) == [Closed(None)]
