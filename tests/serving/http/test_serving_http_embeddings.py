"""Vectors of texts through a server and the official client, compared with the model run plainly; and beside streams."""

import base64
import functools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError, InputError
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.engine.engine import Engine, pooling_of
from anabranch.serving.engine.local import LocalEngine
from serving_models import serve_process, small_moe
from serving_thread import serving, streamed

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
        engine = Engine.of(model, config, tokenizer=ByteTokenizer())
        if not use_kernel:
            engine.runner.fast = None
        return engine

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
        ({"input": []}, "input"), ({"input": None}, "input"), ({"input": [[]]}, "input[0]"), ({"input": ["a", 5]}, "input[1]"),
        ({"input": [257]}, "input[0]"), ({"input": [[1, -1]]}, "input[0]"), ({"input": ["x"] * 2049}, "input"),
        ({"input": "x" * 2000}, "input[0]"), ({"encoding_format": "int8"}, "encoding_format"), ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "5"}, "dimensions"),
    ],
)  # fmt: skip
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
    assert server.frontend.admission.in_flight == 0


def test_one_who_leaves_ends_what_was_asked(model):
    begun, may_go = threading.Event(), threading.Event()

    def make():
        engine = Engine.of(model, ServingConfig(num_blocks=64, name="small", dtype="float32", scheduling="sync"))
        run = engine.runner.run

        def slow(batch):
            begun.set()
            assert may_go.wait(10)
            return run(batch)

        engine.runner.run = slow
        return engine

    with serving(lambda: LocalEngine(make)) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0, timeout=0.3) as hasty:
            with pytest.raises(openai.APITimeoutError):
                hasty.embeddings.create(model="small", input=TEXTS)
        assert begun.is_set()
        status, _, body = running.ask("/v1/embeddings", {"model": "small", "input": "x"}, x_deadline_ms="50")
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        may_go.set()
        assert running.ask("/v1/embeddings", {"model": "small", "input": "x"})[0] == 200
        assert running.frontend.admission.in_flight == 0


def test_a_vector_that_is_none_is_an_error_of_its_request(model):
    broken = small_moe()
    with torch.no_grad():
        broken.embedding.weight[ord("x")] = float("nan")
    with serving(engine_of(broken)) as running:
        status, _, body = running.ask("/v1/embeddings", {"model": "small", "input": "ax"})
        assert (status, body["error"]["code"]) == (500, "request_failed")
        assert running.ask("/v1/embeddings", {"model": "small", "input": "a"})[0] == 200


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
