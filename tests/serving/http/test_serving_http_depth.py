"""``depth`` in requests to a server, what usage tells of it, and ``anabranch serve --depth``."""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.depth import DepthRouter, path_of, routed_pass, stack_of
from anabranch.lm import SamplingConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.depth import DepthConfig
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from depth_banks import ByControl, ByState, saved_bank
from serving_models import LAYERS, posted, saved_moe, serve_process, small_moe, small_streams
from serving_thread import serving, streamed

BODY = {"model": "small", "prompt": "hello", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
TOKEN = "operator-secret"
PATHS = {"full": (0, 1), "one": (1,), "twice": (0, 0, 1), "back": (1, 0)}


def make_engine(model, bank=None, **config):
    config = ServingConfig(num_blocks=64, name="small", dtype="float32", **config)
    return lambda: LocalEngine(lambda: Engine.of(model, config, tokenizer=ByteTokenizer(), depth_bank=bank))


@pytest.fixture(scope="module")
def model():
    return small_moe()


@pytest.fixture(scope="module")
def server(model):
    with serving(make_engine(model, ByState())) as running:
        yield running


@torch.no_grad()
def chosen(model, text):
    made = routed_pass(stack_of(model), ByState(), torch.tensor([ByteTokenizer().encode(text)]))
    return path_of(made.decision_BN[0].tolist())


def test_each_request_runs_its_blocks(server, model):
    router = DepthRouter.attach(model, ByState())
    config = SamplingConfig(temperature=0, max_tokens=12)
    depths = {**{name: list(path) for name, path in PATHS.items()}, "routed": "routed", "unsaid": None, "word": "full"}
    paths = {**PATHS, "routed": chosen(model, "hello"), "unsaid": chosen(model, "hello"), "word": (0, 1)}
    wanted = {
        name: ByteTokenizer().decode(router.generate(ByteTokenizer().encode("hello"), config, depth=path))
        for name, path in paths.items()
    }
    assert wanted["routed"] == ByteTokenizer().decode(router.generate(ByteTokenizer().encode("hello"), config))
    assert len(set(wanted.values())) >= 4
    asked = list(depths) * 2

    def ask(name):
        return server.ask("/v1/completions", BODY if depths[name] is None else {**BODY, "depth": depths[name]})

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    for name, (status, _, body) in zip(asked, answers, strict=True):
        assert status == 200, body
        assert body["choices"][0]["text"] == wanted[name], name
        assert body["usage"]["depth"] == {
            "layers_per_token": len(paths[name]),
            "num_layers": LAYERS,
            "layers": [list(paths[name])],
        }


def test_usage_tells_each_prompt_and_the_mean(server, model):
    prompts = ["hello", "something longer"]
    status, _, body = server.ask(
        "/v1/completions", {**BODY, "prompt": prompts, "n": 2, "depth": "routed", "max_tokens": 3}
    )
    assert status == 200
    paths = [chosen(model, prompt) for prompt in prompts]
    counts = [len(ByteTokenizer().encode(prompt)) + 2 for prompt in prompts]
    mean = sum(len(path) * count for path, count in zip(paths, counts, strict=True)) / sum(counts)
    assert body["usage"]["depth"]["layers"] == [list(path) for path in paths]
    assert body["usage"]["depth"]["layers_per_token"] == pytest.approx(mean, abs=1e-3)


def test_chats_and_streams_tell_it_too(server):
    chat = {
        "model": "small",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0,
        "max_tokens": 4,
        "depth": [1, 1],
    }
    status, _, body = server.ask("/v1/chat/completions", chat)
    assert status == 200
    assert body["usage"]["depth"]["layers"] == [[1, 1]]
    status, _, text = server.ask(
        "/v1/completions", {**BODY, "stream": True, "stream_options": {"include_usage": True}, "depth": [1]}
    )
    assert streamed(text) == server.ask("/v1/completions", {**BODY, "depth": [1]})[2]["choices"][0]["text"]
    [usage] = [
        event["usage"]
        for line in text.decode().splitlines()
        if line.startswith("data: {") and (event := json.loads(line[6:])).get("usage")
    ]
    assert usage["depth"] == {"layers_per_token": 1.0, "num_layers": LAYERS, "layers": [[1]]}


def test_responses_tell_it_whole_and_in_events(server):
    body = {"model": "small", "input": "hello", "temperature": 0, "max_output_tokens": 4, "depth": [1, 1]}
    # Once before: what a prompt begins with is stored from then on, and told in the usage.
    server.ask("/v1/responses", body)
    whole = server.ask("/v1/responses", body)[2]["usage"]
    assert whole["depth"] == {"layers_per_token": 2.0, "num_layers": LAYERS, "layers": [[1, 1]]}
    _, _, text = server.ask("/v1/responses", {**body, "stream": True})
    ends = [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: {")]
    assert ends[-1]["response"]["usage"] == whole


def test_each_request_has_its_own_control(model):
    """Beside others, in each form of the API, and no more than a number can do."""
    wanted = {-1: [], 0.5: [0, 1], 1: [0, 0, 1, 1], None: list(chosen(model, "hello"))}
    chat = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    with serving(make_engine(model, ByControl())) as server:

        def ask(control):
            return server.ask("/v1/completions", {**BODY, "depth": "routed", "depth_control": control})

        asked = list(wanted) * 3
        with ThreadPoolExecutor(len(asked)) as pool:
            for control, (status, _, answer) in zip(asked, pool.map(ask, asked), strict=True):
                assert status == 200, answer
                assert answer["usage"]["depth"]["layers"] == [wanted[control]]
        # Requests are routed here that say nothing of their depth.
        for path, body in (("/v1/chat/completions", chat), ("/v1/responses", {"model": "small", "input": "hello"})):
            answer = server.ask(path, {**body, "depth_control": -1})[2]
            assert answer["usage"]["depth"]["layers"] == [[]]
        for control in (1.01, -2, "0", True, [0], {}):
            status, _, answer = server.ask("/v1/completions", {**BODY, "depth": "routed", "depth_control": control})
            assert (status, answer["error"]["param"]) == (400, "depth_control")
            assert "it must be a number from -1 to 1" in answer["error"]["message"]
        for depth, named in (("full", "'full'"), ([1], "a list of blocks")):
            status, _, answer = server.ask("/v1/completions", {**BODY, "depth": depth, "depth_control": 0})
            assert (status, answer["error"]["param"]) == (400, "depth_control")
            assert answer["error"]["message"].startswith(
                f"depth_control goes with depth 'routed', and depth is {named}"
            )
        assert server.ask("/v1/completions", {**BODY, "depth_control": -1})[2]["usage"]["depth"]["layers"] == [[]]


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        ("deep", 'depth is \'deep\'; it must be "full", "routed", "pruned" or a list of 1 to 8192 blocks'),
        ([], 'depth is []; it must be "full", "routed", "pruned" or a list of 1 to 8192 blocks'),
        (3, "depth is 3; it must be"),
        (True, "depth is True; it must be"),
        ([0, "1"], "depth is a list; it must be"),
        ([0, True], "depth is a list; it must be"),
        ([0.0], "depth is a list; it must be"),
        ({"layers": [0]}, "depth is an object; it must be"),
        ([0, 2], "depth has block 2; the model has blocks 0 to 1"),
        ([-1], "depth has block -1; the model has blocks 0 to 1"),
        ([0, 1, 1, 1], "depth has block 1 3 times; a block may run at most 2 times"),
        ([0] * 9000, "depth is a list; it must be"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_depth_that_cannot_be_is_a_mistake_of_the_request(server, depth, message, stream):
    status, _, answer = server.ask("/v1/completions", {**BODY, "depth": depth, "stream": stream})
    assert status == 400
    assert answer["error"]["param"] == "depth"
    assert answer["error"]["message"].startswith(message)


@pytest.mark.parametrize("name", ["path", "routes_depth", "skips_tokens"])
def test_names_of_the_library_are_refused(server, name):
    status, _, answer = server.ask("/v1/completions", {**BODY, name: [0]})
    assert (status, answer["error"]["param"]) == (400, name)


def test_a_server_without_routers(model):
    with serving(make_engine(model)) as plain:
        status, _, body = plain.ask("/v1/completions", {**BODY, "depth": "full"})
        assert status == 200
        assert "depth" not in body["usage"]
        for depth, says in (
            ("routed", "the server has no depth routers (--depth)"),
            ("pruned", "the server has no skipper of tokens (--skipper)"),
            ([0], "a list of blocks, which this server does not take"),
        ):
            status, _, answer = plain.ask("/v1/completions", {**BODY, "depth": depth})
            assert status == 400
            assert says in answer["error"]["message"]
        status, _, answer = plain.ask("/v1/completions", {**BODY, "depth_control": 0})
        assert (status, answer["error"]["param"]) == (400, "depth_control")
        assert "the server has no depth routers (--depth)" in answer["error"]["message"]
    with serving(make_engine(model, max_depth=3)) as deep:
        assert deep.ask("/v1/completions", {**BODY, "depth": [0, 0, 1]})[2]["usage"]["depth"]["layers_per_token"] == 3
        assert deep.ask("/v1/completions", BODY)[2]["usage"]["depth"]["layers"] == [[0, 1]]
        answer = deep.ask("/v1/completions", {**BODY, "depth": [0, 0, 1, 1]})[2]
        assert answer["error"]["message"] == "depth has 4 blocks; this server runs at most 3 (engine.max_depth)"


def test_it_is_described(server):
    schemas = server.ask("/openapi.json")[2]["components"]["schemas"]
    for kind in ("Chat", "Completion"):
        assert schemas[kind]["properties"]["depth"]["anyOf"][0]["enum"] == ["full", "routed", "pruned", None]
        control = schemas[kind]["properties"]["depth_control"]
        assert (control["minimum"], control["maximum"]) == (-1, 1)


@pytest.mark.slow
def test_a_server_process_runs_the_routers_of_a_folder(tmp_path, model):
    folder = saved_bank(tmp_path / "routers", model)
    router, control, depths = DepthRouter.attach(model, folder), -0.25, ("routed", "full", [1, 1])
    prompts = ["hello", "hello there", "x"]
    ids = [ByteTokenizer().encode(prompt) for prompt in prompts]
    config = SamplingConfig(temperature=0, max_tokens=12)
    wanted = [router.generate(ids, config, depth=depth, control=control) for depth in depths]
    options = ("--depth", folder, "--depth-control", str(control), "--set", "engine.dtype=float32")
    with serve_process(*options) as server:
        for depth, tokens in zip(depths, wanted, strict=True):
            for prompt, own in zip(prompts, tokens, strict=True):
                answer = posted(server.url, {**BODY, "model": "small-moe", "prompt": prompt, "depth": depth})
                assert answer["choices"][0]["text"] == ByteTokenizer().decode(own)


def asked_of(url, body):
    """(status, answer) of a server process."""
    try:
        return 200, posted(url, body)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def scaled(url, devices):
    raw = json.dumps({"devices": devices}).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {TOKEN}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/admin/scale", raw, headers), timeout=60) as answer:
        return json.loads(answer.read())["result"]["new"]


ASKED = [
    {},
    *({"depth": depth} for depth in ("full", "routed", [0], [1, 0], [0, 0, 1], [1, 1], [], [0, 0, 1, 1])),
    *({"depth": "routed", "depth_control": control} for control in (-1, -0.25, 0.5, 1)),
    {"depth_control": -1},
    {"depth": "routed", "n": 2, "seed": 5},
    {"depth": [0, 1, 1], "prompt": ["hello", "x"], "echo": True, "logprobs": 1},
    {"depth": "routed", "echo": True, "logprobs": 1, "prompt": "hello there, how are you"},
    # What cannot be.
    *({"depth": depth} for depth in ("deep", "pruned", [2], [0, 0, 0], [0, True], 3)),
    *({"depth": "routed", "depth_control": control} for control in (1.5, "0")),
    {"depth": "full", "depth_control": 0},
]


def told(found):
    """What an answer says that does not depend on which device has seen a prompt before, and likelihoods."""
    status, answer = found
    if status != 200:
        return status, answer, []
    choices = [{name: value for name, value in one.items() if name != "logprobs"} for one in answer["choices"]]
    scores = [
        score for one in answer["choices"] for score in (one.get("logprobs") or {}).get("token_logprobs", ()) if score
    ]
    counts = {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens", "depth")}
    return status, (choices, counts), scores


@pytest.mark.slow
def test_a_server_of_several_devices_answers_as_one_engine(tmp_path, model):
    """And tells the same of what was run and of what cannot be, with more devices and with fewer."""
    options = ["--depth", saved_bank(tmp_path / "routers", model, seed=8, scale=4.0), "--depth-control", "-0.4"]
    bodies = [{**BODY, "model": "small-moe", **more} for more in ASKED]
    with serve_process(*options, "--set", "engine.dtype=float32") as server:
        alone = [told(asked_of(server.url, body)) for body in bodies]
    assert [status for status, *_ in alone] == [200] * 17 + [400] * 9
    assert len({str(answer[0]) for status, answer, _ in alone if status == 200}) > 8
    several = [*options, "--devices", "2", "--set", f"http.admin_token={TOKEN}", "--set", "engine.long_prefill_chunk=4"]
    with serve_process(*several) as server, ThreadPoolExecutor(8) as pool:
        for devices in (2, 3, 1):
            if devices != 2:
                assert len(scaled(server.url, devices)) == devices
            found = [told(one) for one in pool.map(lambda body: asked_of(server.url, body), bodies)]
            for body, one, other in zip(bodies, alone, found, strict=True):
                assert one[:2] == other[:2], (devices, body)
                assert one[2] == pytest.approx(other[2], abs=1e-3), (devices, body)


@pytest.mark.slow
def test_lists_of_blocks_alone_on_several_devices():
    """Without routers they are taken where the server says how deep they may go."""
    lists = {"depth": [0, 0, 1]}, {"depth": [1]}, {"depth": [0, 0, 1, 1]}, {"depth": "routed"}, {}
    bodies = [{**BODY, "model": "small-moe", **more} for more in lists]
    depth = ("--set", "engine.max_depth=3")
    with serve_process(*depth, "--set", "engine.dtype=float32") as server:
        alone = [told(asked_of(server.url, body)) for body in bodies]
    with serve_process(*depth, "--devices", "2") as server:
        assert [told(asked_of(server.url, body)) for body in bodies] == alone
    assert [status for status, *_ in alone] == [200, 200, 400, 400, 200]


def test_wrong_lines(tmp_path, model, capsys):
    folder = saved_bank(tmp_path / "routers", model)
    deeper = saved_bank(tmp_path / "deeper", model.config.replace(num_layers=3).build(seed=0))
    for line, says in (
        (["--depth", str(tmp_path / "none")], f"no routers in {tmp_path / 'none'}"),
        (["--depth", deeper], "3"),
        (["--depth", folder, "--depth-control", "2"], "control"),
        (["--depth-control", "0.1"], "depth.control is 0.1, but depth.routers is not set"),
        (["--depth", deeper, "--devices", "2"], "blocks 3, and"),
        (["--depth", str(tmp_path / "none"), "--devices", "2"], f"no routers in {tmp_path / 'none'}"),
    ):
        assert main(["serve", saved_moe(), *line, "--check"]) == 2, line
        assert says in capsys.readouterr().err, line
    for line in (["--depth-control", "-0.6"], ["--devices", "2", "--set", "engine.max_depth=3"]):
        assert main(["serve", saved_moe(), "--depth", folder, *line, "--check"]) == 0


def test_routers_of_another_model_and_streams_are_refused_when_it_loads(tmp_path, model):
    folder = saved_bank(tmp_path / "routers", model.config.build(seed=5))
    with pytest.raises(Exception, match="of another model"):
        Engine.of(model, ServingConfig(num_blocks=8, depth=DepthConfig(routers=folder)))
    with pytest.raises(Exception, match="parallel streams"):
        Engine.of(small_streams(), ServingConfig(num_blocks=8, depth=DepthConfig(routers=folder)))
