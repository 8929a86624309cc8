"""``"depth": "pruned"`` in requests to a server, what usage tells of it, and ``anabranch serve --skipper``."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.depth import DepthRouter
from anabranch.depth.ftp import TokenSkipper
from anabranch.lm import SamplingConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from depth_banks import ByState
from serving_models import LAYERS, posted, saved_moe, serve_process, small_moe
from serving_thread import serving, streamed

BODY = {"model": "small", "prompt": "hello there", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
# Tokens behind the prompt go through the first block alone.
SCHEDULE = (0.0, 0.6)


@pytest.fixture(scope="module")
def model():
    return small_moe()


@pytest.fixture(scope="module", params=["drop", pytest.param("keep", marks=pytest.mark.slow)])
def skipper(request, model):
    return TokenSkipper(model, SCHEDULE, kv=request.param)


@pytest.fixture(scope="module")
def server(model, skipper):
    config = ServingConfig(num_blocks=64, name="small", dtype="float32")

    def make():
        return Engine.of(model, config, tokenizer=ByteTokenizer(), depth_bank=ByState(), skipper=skipper)

    with serving(lambda: LocalEngine(make)) as running:
        yield running


def alone(skipper, text):
    """(text of the answer, tokens of the prompt that each block computed)."""
    ids = ByteTokenizer().encode(text)
    computed = skipper.prefill(ids).keep_IBL[:, 0].sum(1).tolist()
    return ByteTokenizer().decode(skipper.generate(ids, 12)), computed


def test_pruned_prompts_beside_whole_and_routed_ones(server, model, skipper):
    prompts = ["hello there", "hello there, you", "x", "hello"]
    router = DepthRouter.attach(model, ByState())
    config = SamplingConfig(temperature=0, max_tokens=12)
    asked = [(prompt, depth) for prompt in prompts for depth in ("pruned", "full", [0, 0, 1])] * 2

    def ask(one):
        return server.ask("/v1/completions", {**BODY, "prompt": one[0], "depth": one[1]})

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    for (prompt, depth), (status, _, body) in zip(asked, answers, strict=True):
        assert status == 200, body
        usage, count = body["usage"]["depth"], len(ByteTokenizer().encode(prompt))
        if depth == "pruned":
            text, computed = alone(skipper, prompt)
            assert body["choices"][0]["text"] == text
            mean = (sum(computed) + 11) / (count + 11)
            assert usage == {
                "layers_per_token": pytest.approx(mean, abs=1e-3),
                "num_layers": LAYERS,
                "layers": [[0]],
                "computed": [computed],
            }
        else:
            made = router.generate(ByteTokenizer().encode(prompt), config, depth=depth)
            assert body["choices"][0]["text"] == ByteTokenizer().decode(made)
            assert "computed" not in usage


def test_chats_streams_and_several_prompts_tell_it(server, skipper):
    chat = {
        "model": "small",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0,
        "max_tokens": 4,
        "depth": "pruned",
    }
    status, _, body = server.ask("/v1/chat/completions", chat)
    assert status == 200
    assert body["usage"]["depth"]["computed"][0][0] == body["usage"]["prompt_tokens"]
    _, _, text = server.ask("/v1/completions", {**BODY, "stream": True, "depth": "pruned"})
    assert streamed(text) == alone(skipper, BODY["prompt"])[0]
    both = {**BODY, "prompt": ["hello there", "abc"], "n": 2, "depth": "pruned"}
    usage = server.ask("/v1/completions", both)[2]["usage"]["depth"]
    assert usage["computed"] == [alone(skipper, prompt)[1] for prompt in both["prompt"]]


def test_what_is_said_of_whole_prompts_is_not_asked_of_pruned_ones(model, skipper):
    """A request that says so is refused; one that says nothing of depth runs whole."""
    config = ServingConfig(num_blocks=64, name="small", dtype="float32")
    with serving(
        lambda: LocalEngine(lambda: Engine.of(model, config, tokenizer=ByteTokenizer(), skipper=skipper))
    ) as server:
        usage = server.ask("/v1/completions", BODY)[2]["usage"]["depth"]
        assert usage["computed"] == [alone(skipper, BODY["prompt"])[1]]
        for more in ({"routing": True}, {"echo": True, "logprobs": 1}):
            status, _, answer = server.ask("/v1/completions", {**BODY, **more, "depth": "pruned"})
            assert (status, answer["error"]["param"]) == (400, "depth"), more
            status, _, answer = server.ask("/v1/completions", {**BODY, **more})
            assert status == 200, answer
            assert "computed" not in answer["usage"]["depth"]
        status, _, answer = server.ask("/v1/completions", {**BODY, "echo": True, "depth": "pruned"})
        assert status == 200
        assert answer["choices"][0]["text"] == BODY["prompt"] + alone(skipper, BODY["prompt"])[0]


@pytest.mark.slow
def test_a_server_process_prunes_by_a_file(tmp_path, model, skipper):
    skipper.save(tmp_path / "skipper")
    with serve_process("--skipper", str(tmp_path / "skipper"), "--set", "engine.dtype=float32") as server:
        for prompt in ("hello there", "x", "hello, you there"):
            answer = posted(server.url, {**BODY, "model": "small-moe", "prompt": prompt})
            assert answer["choices"][0]["text"] == alone(skipper, prompt)[0]
            assert answer["usage"]["depth"]["computed"] == [alone(skipper, prompt)[1]]


def test_wrong_lines(tmp_path, model, skipper, capsys):
    skipper.save(tmp_path / "skipper")
    deeper = TokenSkipper(model.config.replace(num_layers=3).build(seed=0), (0.0, 0.5, 0.5))
    deeper.save(tmp_path / "deeper")
    (tmp_path / "text").write_text("no skipper")
    for line, says in (
        (["--skipper", str(tmp_path / "none")], "none is not there; anabranch depth prune makes one"),
        (["--skipper", str(tmp_path / "deeper")], "is of another model: blocks 3"),
        (["--skipper", str(tmp_path / "text")], "is damaged or no skipper of tokens"),
        (["--set", "engine.depth.usual=pruned"], "depth.usual is 'pruned', but depth.skipper is not set"),
        (["--skipper", str(tmp_path / "deeper"), "--devices", "2"], "is of another model: blocks 3"),
    ):
        assert main(["serve", saved_moe(), *line, "--check"]) == 2, line
        assert says in capsys.readouterr().err, line
    for more in ([], ["--devices", "2"]):
        assert main(["serve", saved_moe(), "--skipper", str(tmp_path / "skipper"), *more, "--check"]) == 0
