"""Vectors of texts through a server and the official client, compared with the model run plainly; and beside streams."""

import asyncio
import base64
import functools
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError, InputError
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.admission import Admission, AdmissionConfig
from anabranch.serving.core.request import Finish, Output, Request, Sampling
from anabranch.serving.engine.engine import Engine, pooling_of
from anabranch.serving.engine.local import LocalEngine
from anabranch.serving.engine.runner import ModelRunner
from anabranch.serving.http.asked import LONG_CHARACTERS
from anabranch.serving.http.embeddings import AT_ONCE, Vectors, read_inputs
from anabranch.web.api_error import ApiError
from fake_engine import Script
from serving_models import serve_process, small_moe
from serving_thread import serving, streamed
from waiting import until, until_async

openai = pytest.importorskip("openai")
TEXTS = ["hello", "a", "a text of more than two blocks of sixteen tokens, so that it takes several steps", "hello"]


@pytest.fixture(scope="module")
def model():
    return small_moe()


@functools.cache
def own_model():
    """The same, which no engine runs, and what its last norm has given."""
    model, given = small_moe(), []
    model.norm.register_forward_hook(lambda module, inputs, output: given.append(output))
    return model, given


def plain(text, pooling="last", size=None):
    """The vector of a text by the whole model at once, without a cache."""
    model, given = own_model()
    with torch.inference_mode():
        model(torch.tensor([list(text.encode())]))
    x_LD = given.pop()[0].numpy()
    vector = (x_LD[-1] if pooling == "last" else x_LD.mean(0))[:size]
    return vector / np.linalg.norm(vector)


def engine_of(model, **changes):
    config = ServingConfig(
        **{"num_blocks": 64, "name": "small", "dtype": "float32", "max_seqs": 4, "max_batched_tokens": 24, **changes}
    )
    return lambda: LocalEngine(lambda: Engine.of(model, config, tokenizer=ByteTokenizer()))


@pytest.fixture(scope="module")
def server(model):
    with serving(engine_of(model)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as made:
        yield made


def vectors(answer):
    assert [row.index for row in answer.data] == list(range(len(answer.data)))
    return np.array([row.embedding for row in answer.data])


def test_vectors_are_the_last_states_of_length_one(client, model):
    answer = client.embeddings.create(model="small", input=TEXTS, encoding_format="float")
    wanted = np.array([plain(text) for text in TEXTS])
    assert np.allclose(vectors(answer), wanted, atol=1e-5)
    assert np.allclose(np.linalg.norm(vectors(answer), axis=1), 1, atol=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, TEXTS))
    assert answer.model == "small"
    # The client's own default is base64.
    packed = client.embeddings.create(model="small", input=TEXTS)
    assert np.allclose(vectors(packed), wanted, atol=1e-5)


def test_texts_and_tokens_alone(client, model):
    for given in ("hello", list(b"hello"), [list(b"hello")], ["hello"]):
        [row] = client.embeddings.create(model="small", input=given).data
        assert np.allclose(row.embedding, plain("hello"), atol=1e-5)


@pytest.mark.parametrize("use_kernel", [True, False])
@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_the_mean_of_states_over_several_steps(model, scheduling, use_kernel):
    def make():
        config = ServingConfig(
            num_blocks=32,
            name="small",
            dtype="float32",
            max_seqs=4,
            max_batched_tokens=24,
            scheduling=scheduling,
            pooling="mean",
        )
        make_runner = functools.partial(ModelRunner, use_kernel=use_kernel)
        return Engine.of(model, config, tokenizer=ByteTokenizer(), make_runner=make_runner)

    with serving(lambda: LocalEngine(make)) as running:
        # The second time all but one token is in the prefix cache, and none of it is of use.
        for _ in range(2):
            body = running.ask("/v1/embeddings", {"model": "small", "input": TEXTS})[2]
            made = np.array([row["embedding"] for row in body["data"]])
            assert np.allclose(made, [plain(text, "mean") for text in TEXTS], atol=1e-5)


def test_fewer_dimensions_are_of_length_one_again(client, model):
    answer = client.embeddings.create(model="small", input=TEXTS, dimensions=5)
    assert np.allclose(vectors(answer), [plain(text, size=5) for text in TEXTS], atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="this model's vectors have 16") as raised:
        client.embeddings.create(model="small", input="x", dimensions=17)
    assert raised.value.param == "dimensions"


def test_base64_is_of_float32(server, model):
    body = server.ask("/v1/embeddings", {"model": "small", "input": "hello", "encoding_format": "base64"})[2]
    made = np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), "<f4")
    assert np.allclose(made, plain("hello"), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": ["a", 5]}, "input[1]"),
        ({"input": [257]}, "input[0]"),
        ({"input": [[1, -1]]}, "input[0]"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x" * 2000}, "input[0]"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "5"}, "dimensions"),
    ],
)
def test_what_no_vector_can_be_made_of_is_refused(server, fields, param):
    status, _, body = server.ask("/v1/embeddings", {"model": "small", "input": "x", **fields})
    assert (status, body["error"]["param"]) == (400, param)


def test_many_texts_wait_for_each_other_and_streams_for_none(server, client, model):
    ask = {"model": "small", "prompt": "hello", "temperature": 0, "max_tokens": 60, "ignore_eos": True, "stream": True}
    alone = streamed(server.ask("/v1/completions", ask)[2])
    texts = [f"text {n} of many" for n in range(200)]
    with ThreadPoolExecutor(3) as pool:
        made = pool.submit(client.embeddings.create, model="small", input=texts)
        beside = [pool.submit(server.ask, "/v1/completions", ask) for _ in range(2)]
        assert {streamed(stream.result()[2]) for stream in beside} == {alone}
        got = vectors(made.result())
    assert np.allclose(got, [plain(text) for text in texts], atol=1e-5)
    until(lambda: server.frontend.admission.in_flight == 0)


def test_one_who_leaves_ends_what_was_asked(model):
    begun, may_go = threading.Event(), threading.Event()

    def make():
        engine = Engine.of(model, ServingConfig(num_blocks=64, name="small", dtype="float32", scheduling="sync"))
        run = engine.runner.run

        def slow(batch):
            begun.set()
            assert may_go.wait(60)
            return run(batch)

        engine.runner.run = slow
        return engine

    with serving(lambda: LocalEngine(make)) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0, timeout=0.3) as hasty:
            with pytest.raises(openai.APITimeoutError):
                hasty.embeddings.create(model="small", input=TEXTS)
        assert begun.wait(60)
        status, _, body = running.ask("/v1/embeddings", {"model": "small", "input": "x"}, x_deadline_ms="50")
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        may_go.set()
        assert running.ask("/v1/embeddings", {"model": "small", "input": "x"})[0] == 200
        until(lambda: running.frontend.admission.in_flight == 0)


class Gated:
    """An engine that takes one step for each ``step()``, and all there are after ``go()``."""

    def __init__(self, model, **config):
        self._steps, self._is_open, self._model, self._config = threading.Semaphore(0), False, model, config

    def step(self):
        self._steps.release()

    def go(self):
        self._is_open = True
        self.step()

    def __call__(self):
        return LocalEngine(self._make)

    def _make(self):
        config = ServingConfig(num_blocks=400, name="small", dtype="float32", scheduling="sync", **self._config)
        engine = Engine.of(self._model, config, tokenizer=ByteTokenizer())
        run = engine.runner.run

        def slow(batch):
            if not self._is_open:
                assert self._steps.acquire(timeout=60)
            return run(batch)

        engine.runner.run = slow
        return engine


def test_the_texts_of_one_key_keep_no_other_key_out(model):
    gated = Gated(model)
    limits = AdmissionConfig(max_in_flight=40, max_queued=40, max_queued_tokens=1000)
    with serving(gated, admission=limits, api_keys=("a=aa", "b=bb")) as running, ThreadPoolExecutor(3) as pool:
        body = {"model": "small", "input": [f"{n:03} " + "x" * 96 for n in range(60)]}
        made = [pool.submit(running.ask, "/v1/embeddings", body, authorization="Bearer aa") for _ in range(2)]
        admission = running.frontend.admission
        until(lambda: admission.queued > 2)
        # They wait for the step that nobody has let it take.
        queued_tokens = admission.queued_tokens
        assert queued_tokens <= 500
        # Nor do texts that wait hold the room that bodies are read in.
        until(lambda: running.app.room.num_bytes == 0)
        chat = {"model": "small", "prompt": "hi", "max_tokens": 1}
        asked = pool.submit(running.ask, "/v1/completions", chat, authorization="Bearer bb")
        until(lambda: "b" in admission._of_key or asked.done())
        gated.go()
        assert asked.result()[0] == 200
        answers = [each.result() for each in made]
        # What has a place is answered in full, and what has none is told so at once.
        assert {answer[0] for answer in answers} <= {200, 429}
        for _, _, answer in (each for each in answers if each[0] == 200):
            got = np.array([row["embedding"] for row in answer["data"]])
            assert np.allclose(got[[0, 30, 59]], [plain(body["input"][at]) for at in (0, 30, 59)], atol=1e-5)
        assert 200 in {answer[0] for answer in answers}
        until(lambda: admission.in_flight == admission.queued_tokens == 0)
        # The pace is that of texts, not of whole requests.
        until(lambda: admission._token_rate._amount / admission._line.rate._amount < 120)


def test_more_than_fits_in_the_queue_waits_for_what_is_in_it(model):
    """Also where there are no keys, and where one text alone is more than may wait."""
    limits = AdmissionConfig(max_in_flight=1, max_queued_tokens=150)
    with serving(engine_of(model), admission=limits) as running:
        texts = ["x" * size for size in (100, 200, 1, 100, 100)]
        status, _, body = running.ask("/v1/embeddings", {"model": "small", "input": texts})
        assert status == 200
        got = np.array([row["embedding"] for row in body["data"]])
        assert np.allclose(got, [plain(text) for text in texts], atol=1e-5)
        until(lambda: running.frontend.admission.in_flight == 0)


def test_a_drain_lets_vectors_under_way_end(model):
    gated = Gated(model)
    with serving(gated) as running, ThreadPoolExecutor(1) as pool:
        texts = [f"text {n} of many" for n in range(40)]
        made = pool.submit(running.ask, "/v1/embeddings", {"model": "small", "input": texts})
        gated.step()
        until(lambda: running.frontend.admission.in_flight)
        running.on_loop(running.frontend.drain)
        assert running.ask("/v1/embeddings", {"model": "small", "input": "x"})[2]["error"]["code"] == "draining"
        gated.go()
        status, _, body = made.result()
        assert (status, len(body["data"])) == (200, 40)
        assert running.frontend.num_cut == 0


def test_vectors_under_way_are_told_when_the_server_stops(model):
    gated = Gated(model)
    with serving(gated) as running, ThreadPoolExecutor(1) as pool:
        made = pool.submit(running.ask, "/v1/embeddings", {"model": "small", "input": ["a", "b"] * 20})
        until(lambda: running.frontend.admission.in_flight)
        stopped = ApiError(503, "shutting_down", "the server was stopped before the answer was complete")
        running.on_loop(running.frontend.cut, stopped)
        status, _, body = made.result()
        assert (status, body["error"]["code"]) == (503, "shutting_down")
        until(lambda: running.frontend.num_cut == 1)
        until(lambda: running.frontend.admission.in_flight == 0)
        gated.go()


def test_a_vector_that_is_none_is_an_error_of_its_request(model):
    broken = small_moe()
    with torch.no_grad():
        broken.embedding.weight[ord("x")] = float("nan")
    with serving(engine_of(broken)) as running:
        status, _, body = running.ask("/v1/embeddings", {"model": "small", "input": "ax"})
        assert (status, body["error"]["code"]) == (500, "request_failed")
        assert running.ask("/v1/embeddings", {"model": "small", "input": "a"})[0] == 200


def test_what_one_key_has_asked_no_other_is_told(model):
    """By how many tokens were there, nor by the time that they save."""
    with serving(engine_of(model), api_keys=("a=aa", "b=bb")) as running:
        body, cached = {"model": "small", "input": "x" * 100}, []
        for secret in ("aa", "aa", "bb", "bb"):
            assert running.ask("/v1/embeddings", body, authorization=f"Bearer {secret}")[0] == 200
            cached.append(running.metrics()["cached_prompt_tokens_total"])
    assert np.diff([0, *cached]).tolist() == [0, 96, 0, 96]


def test_texts_are_sent_to_the_engine_so_that_none_is_given_up_for_a_slow_reader(server):
    engine, sent = server.frontend.engine, []
    submit = engine.submit
    engine.submit = lambda request: (sent.append(request), submit(request))[1]
    try:
        assert server.ask("/v1/embeddings", {"model": "small", "input": ["a", "b"]})[0] == 200
    finally:
        del engine.submit
    assert [request.stall_s for request in sent] == [math.inf] * 2


@pytest.mark.parametrize(
    ("given", "is_long"),
    [
        ("x" * LONG_CHARACTERS, False),
        ("x" * (LONG_CHARACTERS + 1), True),
        (["x" * 15_000] * 2, True),
        ([[1] * 15_000] * 2, True),
        (["hello"] * 100, False),
    ],
)
def test_long_texts_are_read_beside_the_loop(server, given, is_long):
    frontend, called = server.frontend, []
    apart = frontend.apart

    def spy(key, function, *args, **kwargs):
        called.append(function)
        return apart(key, function, *args, **kwargs)

    frontend.apart = spy
    try:
        # Longer than this model reads, most of them.
        assert server.ask("/v1/embeddings", {"model": "small", "input": given})[0] in (200, 400)
    finally:
        del frontend.apart
    assert (read_inputs in called) == is_long


def test_a_text_whose_adapters_are_awaited_holds_up_nobody():
    admission, is_there = Admission(AdmissionConfig()), asyncio.Event()

    async def submit(request):
        yield Output(id=request.id, is_prepared=False)
        await is_there.wait()
        yield Output(id=request.id, is_prepared=True)
        yield Output(id=request.id, finish=Finish.STOP, embedding=(1.0,))

    async def run():
        requests = [Request(id="0", prompt=(1,), sampling=Sampling(max_tokens=0), pooling="last")]
        ticket = admission.admit(1)
        made = asyncio.create_task(Vectors(requests, admission, ticket).run(submit))
        assert ticket in admission._line.waiting
        await until_async(lambda: ticket not in admission._line.waiting and admission.queued == 1)
        is_there.set()
        return await made

    assert asyncio.run(run()) == [(1.0,)]


def most_at_once(limits, count=40):
    """How many of ``count`` texts an engine has at the most, and those of a key are let in at the most."""
    admission, running, peak = Admission(limits), 0, 0

    async def submit(request):
        nonlocal running, peak
        running += 1
        peak = max(peak, running, admission.in_flight)
        await asyncio.sleep(0)
        running -= 1
        yield Output(id=request.id, finish=Finish.STOP, embedding=(1.0,))

    async def run():
        sampling = Sampling(max_tokens=0)
        requests = [Request(id=f"{at}", prompt=(1,), sampling=sampling, pooling="last") for at in range(count)]
        return await Vectors(requests, admission, admission.admit(1)).run(submit)

    assert asyncio.run(run()) == [(1.0,)] * count
    assert admission.in_flight == 0
    return peak


def test_an_engine_has_so_many_texts_of_a_request_at_a_time():
    assert most_at_once(AdmissionConfig(max_in_flight=None, max_queued=None, max_queued_tokens=None)) == AT_ONCE


@pytest.mark.parametrize("name", ["max_in_flight", "max_queued", "max_queued_tokens"])
def test_texts_in_no_hurry_leave_a_part_of_each_limit_to_others(name):
    for limit, share, most in ((2, 0.5, 1), (10, 0.5, 5), (10, 0.3, 3)):
        assert most_at_once(AdmissionConfig(**{name: limit}, key_share=share), count=12) == most


def test_a_folder_says_how(tmp_path):
    config = ServingConfig(model=str(tmp_path))
    assert pooling_of(config) == "last"
    file = tmp_path / "1_Pooling" / "config.json"
    file.parent.mkdir()
    for table, wanted in (({"pooling_mode_mean_tokens": True}, "mean"), ({"pooling_mode_lasttoken": True}, "last")):
        file.write_text(json.dumps(table))
        assert pooling_of(config) == wanted
        assert pooling_of(config.replace(pooling="mean")) == "mean"
    file.write_text("{")
    with pytest.raises(ConfigError, match="1_Pooling"):
        pooling_of(config)


@pytest.mark.parametrize(("pooling", "most"), [("max", 0), ("last", 1), (5, 0)])
def test_a_request_that_cannot_be_pooled_is_refused(pooling, most):
    with pytest.raises(InputError, match="pooling"):
        Request(id="a", prompt=(1,), sampling=Sampling(max_tokens=most), pooling=pooling).check_fields()


@pytest.mark.slow
def test_a_server_process_makes_them(model):
    with serve_process("--set", "engine.pooling=mean", "--set", "engine.dtype=float32") as served:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x") as client:
            answer = client.embeddings.create(model="small-moe", input=TEXTS)
    assert np.allclose(vectors(answer), [plain(text, "mean") for text in TEXTS], atol=1e-4)


def test_the_ids_of_a_vector_and_of_an_answer_are_never_the_same():
    """Another key's stream, if its sender had guessed the id, kept a text from getting its vector."""
    with serving(Script(width=4)) as server:
        server.complete(max_tokens=1)
        for path, id in (("completions", "A-embed"), ("embeddings", "A"), ("embeddings", "A-1"), ("completions", "A")):
            body = {"model": "fake", "prompt": "x"} if path == "completions" else {"model": "fake", "input": "x"}
            assert server.ask(f"/v1/{path}", body, x_request_id=id)[0] == 200
        ids = [request.id for request in server.script.requests]
        assert ids[1:] == ["A-embed-2-0", "A-3-0", "A-1-4-0", "A-5-0"]
