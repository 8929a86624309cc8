"""Engines seen from an event loop: in a thread, and in a process that may be killed."""

import asyncio
import errno
import functools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from anabranch.data.tokenizer import ByteTokenizer
from anabranch.errors import BackendError, CheckpointError, InputError
from anabranch.lm import SamplingConfig, generate, save_model
from anabranch.serving import Finish, LocalEngine, ProcessEngine, Request, Sampling, ServingConfig
from anabranch.serving.core import stream
from anabranch.serving.core.client import NotBegunError
from anabranch.serving.engine import Engine, ModelRunner
from anabranch.serving.engine.messages import Begun, Reply
from anabranch.serving.engine.recorders import Told
from anabranch.serving.engine.streams import StreamsClient
from paced_time import run_paced
from waiting import until, until_async

COUNT = 12
GREEDY = Sampling(temperature=0.0, max_tokens=COUNT, ignore_eos=True)
ENDLESS = Sampling(temperature=0.0, max_tokens=10_000, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(vocab_size=257, max_positions=1024)


@pytest.fixture(scope="module")
def config(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder, model, ByteTokenizer.Config().build())
    return ServingConfig(model=str(folder), dtype="float32", num_blocks=80, threads=1)


@pytest.fixture(scope="module")
def prompts():
    draw = random.Random(0)
    return [tuple(draw.randrange(256) for _ in range(length)) for length in (5, 1, 23, 40)]


@pytest.fixture(scope="module")
def expected(model, prompts):
    sampling = SamplingConfig(temperature=0.0, max_tokens=COUNT)
    return [tuple(generate(model, [prompt], sampling)[0]) for prompt in prompts]


class NotedSampler:
    """A sampler that notes for whom it chooses."""

    def __init__(self, sampler, sampled):
        self.sampler, self.sampled = sampler, sampled
        self.add, self.forget = sampler.add, sampler.forget

    def __call__(self, logits_RV, ids):
        self.sampled.append(list(ids))
        return self.sampler(logits_RV, ids)


class WatchedRunner(ModelRunner):
    """Notes its steps, as (first position, tokens) of each chunk, and whom the sampler answers; ``is_ready`` is asked at each."""

    is_ready = staticmethod(lambda: False)

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.steps, self.sampled = [], []
        self.sampler = NotedSampler(self.sampler, self.sampled)

    def _step(self, chunks, tokens):
        self.steps.append(([(chunk.start, len(chunk.tokens)) for chunk in chunks], self.is_ready()))
        return super()._step(chunks, tokens)


@pytest.mark.parametrize(
    ("changes", "length"),
    [({}, 256), ({"max_batched_tokens": 64}, 64), ({"num_blocks": 3}, 48), ({"num_blocks": 70}, 256)],
)
def test_a_whole_request_of_nobodys_has_run_before_an_engine_is_ready(model, config, changes, length):
    made = []

    def make():
        engine = Engine.of(model, config.replace(**changes), make_runner=WatchedRunner)
        made.append(engine.runner)
        engine.runner.is_ready = lambda: client.is_ready
        return engine

    async def steps_when_ready():
        await client.start()
        assert client.is_ready
        found = list(made[0].steps), list(made[0].sampled)
        await client.close()
        return found

    client = LocalEngine(make)
    steps, sampled = asyncio.run(steps_when_ready())
    assert steps == [([(0, length - 1)], False), ([(length - 1, 1)], False)]
    # A token is chosen from both, as for a request.
    assert [len(ids) for ids in sampled] == [1, 1]
    assert vars(made[0].requests.told) == vars(Told())


async def collect(engine, request):
    outputs = [output async for output in engine.submit(request)]
    assert [output.finish is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return functools.reduce(stream.joined, outputs)


async def all_of(engine, prompts, sampling=GREEDY):
    requests = [Request(id=f"r{number}", prompt=prompt, sampling=sampling) for number, prompt in enumerate(prompts)]
    return await asyncio.gather(*(collect(engine, request) for request in requests))


def running(config, body):
    """Run ``body(engine)`` on a started engine, and close it."""

    async def run():
        engine = config.build()
        assert not engine.is_ready
        await engine.start()
        try:
            return await body(engine)
        finally:
            await engine.close()
            assert not engine.is_ready

    return asyncio.run(run())


def in_thread(config):
    return config.replace(process=False)


# -- in a thread


def test_streams_of_many_requests(config, prompts, expected):
    async def body(engine):
        assert isinstance(engine, LocalEngine)
        assert engine.info.model == "tiny"
        assert engine.info.stop_tokens == (256,)
        assert (engine.info.max_positions, engine.info.num_blocks) == (1024, 80)
        results = await all_of(engine, prompts)
        assert [result.tokens for result in results] == expected
        assert all(result.cached_tokens == 0 and result.queue_s >= 0 for result in results)
        stats = engine.stats()
        assert stats.counters["prompt_tokens"] == sum(map(len, prompts))
        assert stats.counters["generation_tokens"] == COUNT * len(prompts)
        assert stats.gauges["streams"] == 0
        assert stats.samples["step_time"]
        assert not engine.stats().samples["step_time"]

    running(in_thread(config), body)


def test_what_can_never_run_raises_where_it_is_read(config, prompts, expected):
    async def body(engine):
        for request, message in (
            (Request(id="a", prompt=(300,)), "the prompt has the token 300; use 0 to 256"),
            (Request(id="a", prompt=()), "the prompt has no tokens"),
            (Request(id="a", prompt=(1,) * 2000), "2000 tokens"),
            (Request(id="a", prompt=(1,), sampling=Sampling(logit_bias=((400, 1.0),))), "logit_bias names token 400"),
        ):
            with pytest.raises(InputError, match=message):
                await collect(engine, request)
        assert (await collect(engine, Request(id="a", prompt=prompts[0], sampling=GREEDY))).tokens == expected[0]

    running(in_thread(config), body)


def test_closing_an_iterator_frees_its_blocks(config, prompts):
    async def body(engine):
        iterator = engine.submit(Request(id="a", prompt=prompts[0], sampling=ENDLESS))
        await anext(iterator)
        with pytest.raises(InputError, match="under way"):
            await collect(engine, Request(id="a", prompt=prompts[0]))
        await iterator.aclose()
        aborted = engine.submit(Request(id="b", prompt=prompts[0], sampling=ENDLESS))
        await anext(aborted)
        await engine.abort("b")
        await engine.abort("unknown")
        assert [output.finish async for output in aborted][-1] is Finish.ABORT
        await until_async(lambda: engine.stats().gauges["running"] == engine.stats().gauges["kv_usage_ratio"] == 0)

    running(in_thread(config), body)


def test_controls(config, prompts):
    async def body(engine):
        await all_of(engine, prompts)
        assert await engine.control("reset_prefix_cache") > 0
        with pytest.raises(InputError, match=r"no control 'scale'; known: adapters, .*, reset_prefix_cache"):
            await engine.control("scale", devices=2)

    running(in_thread(config), body)


def test_closing_drains_or_aborts(config, prompts, expected):
    async def body():
        for drain_s, finish in ((30.0, Finish.LENGTH), (0.0, Finish.ABORT)):
            engine = in_thread(config).build()
            await engine.start()
            sampling = GREEDY if drain_s else ENDLESS
            task = asyncio.create_task(collect(engine, Request(id="a", prompt=prompts[0], sampling=sampling)))
            await asyncio.sleep(0.01)
            closing = asyncio.create_task(engine.close(drain_s))
            await asyncio.sleep(0)
            with pytest.raises(NotBegunError, match="the engine is not ready"):
                await collect(engine, Request(id="late", prompt=prompts[0]))
            result = await task
            assert result.finish is finish
            if drain_s:
                assert result.tokens == expected[0]
            await closing

    asyncio.run(body())


def test_a_crash_in_a_thread_ends_its_requests_and_it_is_started_again(config, prompts, expected, monkeypatch, caplog):
    run = ModelRunner.run

    async def body(engine):
        monkeypatch.setattr(ModelRunner, "run", lambda self, batch: 1 // 0)
        lost = await collect(engine, Request(id="a", prompt=prompts[0], sampling=GREEDY))
        assert (lost.finish, lost.error) == (Finish.ERROR, "ZeroDivisionError: integer division or modulo by zero")
        while engine.is_ready:  # the end of the loop is told after those of its requests
            await asyncio.sleep(0.01)
        monkeypatch.setattr(ModelRunner, "run", run)
        await engine.restart()
        assert [result.tokens for result in await all_of(engine, prompts)] == expected

    running(in_thread(config), body)
    assert "the engine failed" in caplog.text


def test_a_start_that_fails_says_why(config):
    async def body(config):
        with pytest.raises(CheckpointError) as caught:
            await config.build().start()
        return str(caught.value)

    assert "no model at /nowhere" in asyncio.run(body(in_thread(config).replace(model="/nowhere")))


def test_a_slow_reader_pauses_its_request_and_a_stalled_one_ends_it(config, prompts, monkeypatch, caplog):
    monkeypatch.setattr(stream, "BUFFER", 4)

    async def body(engine):
        sampling = Sampling(temperature=0.0, max_tokens=60, ignore_eos=True)
        whole = (await collect(engine, Request(id="quick", prompt=prompts[0], sampling=sampling))).tokens
        slow = engine.submit(Request(id="slow", prompt=prompts[0], sampling=sampling))
        first = await anext(slow)
        await until_async(lambda: engine.stats().gauges.get("paused") == 1)
        given = engine.stats().counters["generation_tokens"]
        await asyncio.sleep(0.1)
        assert engine.stats().counters["generation_tokens"] == given < 60 + 60
        again = await collect(engine, Request(id="other", prompt=prompts[0], sampling=sampling))
        assert again.tokens == whole  # others go on
        rest = [output async for output in slow]
        assert first.tokens + tuple(token for output in rest for token in output.tokens) == whole
        assert rest[-1].finish is Finish.LENGTH
        monkeypatch.setattr(stream, "STALL_S", 0.05)
        stalled = engine.submit(Request(id="stalled", prompt=prompts[0], sampling=ENDLESS))
        await anext(stalled)
        await until_async(lambda: "request stalled is ended: nobody has read its output" in caplog.text)
        assert [output async for output in stalled][-1].finish is Finish.ABORT

    running(in_thread(config), body)


# -- in a process


def test_a_process_that_is_killed_loses_its_requests_and_no_more(config, prompts, expected, caplog):
    async def body(engine):
        assert isinstance(engine, ProcessEngine)
        assert [result.tokens for result in await all_of(engine, prompts)] == expected
        iterator = engine.submit(Request(id="lost", prompt=prompts[0], sampling=ENDLESS))
        await anext(iterator)
        os.kill(engine.process.pid, signal.SIGKILL)
        last = [output async for output in iterator][-1]
        assert (last.finish, last.error) == (Finish.ERROR, "the engine's process ended with code -9")
        assert not engine.is_ready

    running(config, body)
    assert "ended with code -9" in caplog.text


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_an_engine_that_hangs_is_given_up_and_tells_whom_it_had_begun_with(model, prompts, scheduling, caplog):
    hangs, may_go = threading.Event(), threading.Event()
    config = ServingConfig(num_blocks=80, max_seqs=1, scheduling=scheduling)

    def make():
        engine = Engine.of(model, config, tokenizer=ByteTokenizer())
        run = engine.runner.run

        def hanging(batch):
            if any(request.id == "bad" for request in batch.new):
                hangs.set()
                may_go.wait(60)
            return run(batch)

        engine.runner.run = hanging
        return engine

    async def body():
        engine, loop = LocalEngine(make, watchdog_s=120.0), asyncio.get_running_loop()
        await engine.start()
        for _ in range(8):
            # An idle one is alive: asked again, it answers.
            loop.passed(20.0)
            await until_async(lambda: engine._heard > loop.time() - 45.0)
        assert engine.is_ready
        bad = asyncio.create_task(collect(engine, Request(id="bad", prompt=prompts[0])))
        await asyncio.to_thread(hangs.wait)
        waits = asyncio.create_task(collect(engine, Request(id="good", prompt=prompts[0])))
        while not bad.done():
            loop.passed(1.0)
            await asyncio.sleep(0)
        ended = await bad
        assert (ended.finish, ended.engine_failed) == (Finish.ERROR, True)
        assert ended.error == "the engine has made no progress for 120 s"
        with pytest.raises(NotBegunError, match="no progress"):
            await waits
        assert not engine.is_ready
        await asyncio.wait_for(engine.close(), 60)
        may_go.set()

    run_paced(body())
    assert "no progress for 120 s; it is given up" in caplog.text


def deep(levels):
    found = {}
    for _ in range(levels):
        found = {"items": found}
    return found


@pytest.mark.slow
def test_what_cannot_be_sent_to_a_process_refuses_its_request_alone(config, prompts, expected, caplog):
    async def body(engine):
        for levels in (300, 700, 5000):
            sampling = Sampling(max_tokens=1, grammar=deep(levels))
            with pytest.raises(InputError, match=r"nested too deeply|sent to the engine: RecursionError"):
                await collect(engine, Request(id="a", prompt=prompts[0], sampling=sampling))
        with pytest.raises(InputError, match="cannot be sent to the engine"):
            await engine.control("reset_prefix_cache", unknown=lambda: None)
        assert (await collect(engine, Request(id="a", prompt=prompts[0], sampling=GREEDY))).tokens == expected[0]

    running(config, body)
    assert "Add cannot be sent to the engine" in caplog.text


@pytest.mark.slow
def test_a_process_that_is_stopped_is_ended(config, prompts, caplog):
    async def body(engine):
        iterator = engine.submit(Request(id="a", prompt=prompts[0], sampling=ENDLESS))
        await anext(iterator)
        os.kill(engine.process.pid, signal.SIGSTOP)
        last = [output async for output in iterator][-1]
        assert (last.finish, last.error) == (Finish.ERROR, "the engine has made no progress for 1 s")
        assert engine.process.wait(60) == -signal.SIGKILL

    running(config.replace(watchdog_s=1.0), body)


class Mute(StreamsClient):
    """A client of a loop that never says anything."""

    def __init__(self, watchdog_s=None):
        super().__init__(watchdog_s=watchdog_s)
        self.sent, self.is_abandoned, self.has_ended = [], False, False

    async def start(self):
        return self._opened(None)

    def _send(self, command):
        self.sent.append(command)

    def _abandon(self):
        self.is_abandoned = True

    async def _ended(self):
        self.has_ended = True


@pytest.mark.parametrize("last", ["reply", "output"])
def test_a_loop_is_given_up_so_long_after_its_last_sign_of_life_and_not_a_quarter_later(last):
    patience_s = 0.4

    async def body():
        client = Mute(watchdog_s=patience_s)
        await client.start()
        await asyncio.sleep(0.01)
        clock = asyncio.get_running_loop().time
        for _ in range(3):
            # Each ping is answered after most of the time that it has.
            await asyncio.sleep(0.6 * patience_s)
            command = client.sent[-1]
            client._deliver([Reply(command.number) if last == "reply" else Begun(())])
            heard = clock()
        while not client.is_abandoned:
            await asyncio.sleep(0.001)
        assert patience_s - 0.001 <= clock() - heard < 1.2 * patience_s
        await client.close()

    run_paced(body())


def test_who_stood_still_itself_takes_no_loop_for_dead():
    """As with a machine that was asleep, or too busy for this process: the engine was given up without having been asked."""
    patience_s = 0.4

    async def body():
        client = Mute(watchdog_s=patience_s)
        await client.start()
        loop = asyncio.get_running_loop()
        for _ in range(3):
            # Both while it is asked and between.
            for wait_s in (0.1 * patience_s, 0.3 * patience_s):
                await asyncio.sleep(wait_s)
                loop.passed(50 * patience_s)
                await asyncio.sleep(0.1 * patience_s)
                assert not client.is_abandoned
            client._deliver([Reply(client.sent[-1].number)])
        await client.close()

    run_paced(body())


def test_who_stood_still_between_two_questions_waits_for_the_answer_to_the_next():
    """It was no later than a quarter of the patience behind the last sign of life, but nobody had been asked meanwhile."""
    patience_s = 0.4

    async def body():
        client = Mute(watchdog_s=patience_s)
        await client.start()
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0.01 * patience_s)
        client._deliver([Reply(client.sent[-1].number)])
        await asyncio.sleep(0.05 * patience_s)
        loop.passed(0.9 * patience_s)
        for _ in range(4):
            await asyncio.sleep(0.1 * patience_s)
            assert not client.is_abandoned
        await client.close()

    run_paced(body())


@pytest.mark.parametrize("drain_s", [0.0, 0.2])
def test_a_loop_that_does_not_end_is_given_up_with_the_patience_of_the_watchdog(drain_s, caplog):
    async def body():
        client = Mute(watchdog_s=0.1)
        await client.start()
        waits = asyncio.create_task(collect(client, Request(id="a", prompt=(1,))))
        await asyncio.sleep(0)
        before = time.monotonic()
        await asyncio.wait_for(client.close(drain_s), 60)
        assert time.monotonic() - before >= drain_s + 0.1
        assert client.is_abandoned
        assert client.has_ended
        with pytest.raises(NotBegunError, match="did not end when it was closed"):
            await waits

    asyncio.run(body())
    assert "the engine did not end when it was closed; it is given up" in caplog.text


def test_a_loop_whose_end_nobody_waits_for_any_longer_is_given_up():
    async def body():
        client = Mute()
        await client.start()
        waits = asyncio.create_task(collect(client, Request(id="a", prompt=(1,))))
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.close(), 0.05)
        assert client.is_abandoned
        with pytest.raises(NotBegunError, match="did not end when it was closed"):
            await waits

    asyncio.run(body())


@pytest.mark.slow
@pytest.mark.parametrize("watchdog_s", [None, 1.0])
def test_a_process_that_is_stopped_is_ended_when_it_is_closed(config, prompts, watchdog_s):
    async def body():
        engine = config.replace(watchdog_s=watchdog_s).build()
        await engine.start()
        iterator = engine.submit(Request(id="a", prompt=prompts[0], sampling=ENDLESS))
        await anext(iterator)
        os.kill(engine.process.pid, signal.SIGSTOP)
        if watchdog_s is None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.close(), 0.5)
        else:
            await asyncio.wait_for(engine.close(), 60)
        assert [output async for output in iterator][-1].finish is Finish.ERROR
        assert engine.process.wait(60) == -signal.SIGKILL

    asyncio.run(body())


@pytest.mark.slow
def test_a_process_that_cannot_start_says_why(config):
    async def body():
        with pytest.raises(CheckpointError, match="no model at /nowhere"):
            await config.replace(model="/nowhere").build().start()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("socket.socketpair", OSError(errno.EMFILE, "Too many open files")),
        ("subprocess.Popen", OSError(errno.EAGAIN, "Resource temporarily unavailable")),
    ],
)
def test_a_process_that_the_machine_does_not_give_is_a_clear_error(config, what, error, monkeypatch):
    def failing(*args, **more):
        raise error

    async def body():
        engine, before = config.build(), len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(f"anabranch.serving.engine.process.{what}", failing)
        with pytest.raises(BackendError, match=f"the engine's process cannot be started: {error.strerror}"):
            await engine.start()
        assert not engine.is_ready
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(body())


@pytest.mark.parametrize("in_process", [False, True])
def test_a_thread_that_the_machine_does_not_give_is_a_clear_error(config, in_process, monkeypatch):
    start = threading.Thread.start

    def failing(thread):
        if thread.daemon:
            raise RuntimeError("can't start new thread")
        start(thread)

    async def body():
        engine = config.replace(process=in_process).build()
        monkeypatch.setattr(engine, "_greet", lambda connection: None, raising=False)
        monkeypatch.setattr(threading.Thread, "start", failing)
        with pytest.raises(BackendError, match="can't start new thread"):
            await engine.start()
        assert not engine.is_ready
        if in_process:
            assert engine.process.returncode == -signal.SIGKILL
        await engine.close()

    asyncio.run(body())


@pytest.mark.slow
def test_a_process_serves_dies_and_is_restarted(config, prompts, expected, caplog, monkeypatch):
    # Its end takes longer on a busy machine, and who is late is killed.
    monkeypatch.setattr("anabranch.serving.engine.process.END_S", 120.0)

    async def body(engine):
        assert isinstance(engine, ProcessEngine)
        assert [result.tokens for result in await all_of(engine, prompts)] == expected
        with pytest.raises(InputError, match="the prompt has the token 300"):
            await collect(engine, Request(id="a", prompt=(300,)))
        assert await engine.control("reset_prefix_cache") > 0
        iterator = engine.submit(Request(id="lost", prompt=prompts[0], sampling=ENDLESS))
        await anext(iterator)
        os.kill(engine.process.pid, signal.SIGKILL)
        last = [output async for output in iterator][-1]
        assert (last.finish, last.error) == (Finish.ERROR, "the engine's process ended with code -9")
        assert not engine.is_ready
        with pytest.raises(NotBegunError):
            await collect(engine, Request(id="b", prompt=prompts[0]))
        with pytest.raises(BackendError, match="not ready"):
            await engine.control("reset_prefix_cache")
        await engine.restart()
        assert engine.is_ready
        assert [result.tokens for result in await all_of(engine, prompts)] == expected
        assert engine.stats().counters["prompt_tokens"] >= sum(map(len, prompts))
        engine.restarts = engine.max_restarts
        with pytest.raises(BackendError, match="it is not started again"):
            await engine.restart()
        return engine

    engine = running(config, body)
    assert engine.process.returncode == 0
    assert "ended with code -9" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True])
def test_a_process_ends_when_its_front_end_does(config, hangs, tmp_path):
    (tmp_path / "hanging.py").write_text(
        "import sys, time\n"
        "def make(config):\n"
        "    engine = config.make_engine()\n"
        "    engine.runner.run = lambda batch: time.sleep(600)\n"
        "    sys.modules['__main__'].LEAVE_S = 0.5\n"
        "    return engine\n"
    )
    start = (
        "    engine = ProcessEngine(functools.partial(hanging.make, config))\n"
        "    await engine.start()\n"
        "    waits = asyncio.create_task(anext(engine.submit(Request(id='a', prompt=(1, 2)))))\n"
        "    await asyncio.sleep(1)\n"
    )
    start = start if hangs else "    engine = config.build()\n    await engine.start()\n"
    script = (
        "import asyncio, functools, sys, os\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import hanging\n"
        "from anabranch.serving import ProcessEngine, Request, ServingConfig\n"
        "async def main():\n"
        f"    config = ServingConfig(model={config.model!r}, dtype='float32', num_blocks=4)\n"
        f"{start}"
        "    print(engine.process.pid, flush=True)\n"
        "    os._exit(1)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    pid = int(done.stdout)
    until(lambda: has_ended(pid))


def has_ended(pid):
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_thread_whose_start_nobody_waits_for_ends_once_it_has_loaded(config):
    loads, goes_on = threading.Event(), threading.Event()
    closed = threading.Event()

    def make():
        engine = config.make_engine()
        loop = engine.loop

        def noted(emit):
            made = loop(emit)
            close = made.runner.close
            made.runner.close = lambda: (close(), closed.set())
            return made

        engine.loop = noted
        loads.set()
        assert goes_on.wait(60)
        return engine

    async def main():
        client = LocalEngine(make)
        starting = asyncio.create_task(client.start())
        await asyncio.to_thread(loads.wait, 20)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        # It does not wait for what cannot be stopped.
        await asyncio.wait_for(client.close(), 60)
        assert not client.is_ready

    asyncio.run(main())
    goes_on.set()
    assert closed.wait(60)
