"""``anabranch serve --expert-budget`` with settings of experts: the official client gets the same tokens, and counters say how."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, SamplingConfig, generate, save_model
from anabranch.nn import MoE
from anabranch.routing import Router, TopK, record_routing
from anabranch.serving.expertflow import Routes, find_pools
from anabranch.serving.expertflow.expertflow import tokenizer_fingerprint
from anabranch.serving.expertflow.predictors import EncoderDecoder
from anabranch.serving.expertflow.predictors.encdec import Settings
from anabranch.serving.expertflow.predictors.files import place_of
from serving_models import serve_process

PROMPTS = ["hello", "def add(a, b):", "import os\n", "x", "The quick brown fox", "0123456789", "naïve façade"]
TOKENS = 24
EVERY = [
    {},
    {"dual_batch": 2},
    {"dual_batch": 3, "regroup": "false", "drop_cache": "true"},
    {"dual_batch": 2, "predictor": "tlp"},
    {"predictor": "slp", "extra": 0},
    {"policy": "lfu", "workers": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture of experts, with a route predictor beside it."""
    experts = MoE.Config(num_experts=16, hidden_dim=32, router=Router.Config(select=TopK.Config(top_k=2)))
    config = Decoder.Config(vocab_size=257, dim=32, num_layers=3, feed_forward=experts, init_std=0.3, max_positions=256)
    model, place, tokenizer = config.build(seed=0).eval(), tmp_path_factory.mktemp("m") / "moe", ByteTokenizer()
    save_model(place, model, tokenizer)
    with record_routing(model) as recorder:
        generate(model, [tokenizer.encode(text) for text in PROMPTS[:3]], SamplingConfig(max_tokens=8))
    fingerprint = find_pools(model).fingerprint(tokenizer_fingerprint(tokenizer, model))
    settings = Settings(steps=3, dim=16, feed_forward=32, heads=2)
    EncoderDecoder(fingerprint, 257, settings).fit(Routes.from_trace(recorder.trace())).save(place_of(place))
    return place


@pytest.fixture(scope="module")
def expected(folder):
    """Of all experts in memory."""
    with serve_process("--set", "engine.dtype=float32", model=str(folder)) as server:
        return answers(server)


def answers(server):
    """Greedy tokens of all prompts, asked at once."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    extra = {"ignore_eos": True, "return_token_ids": None}

    def ask(prompt):
        answer = client.completions.create(
            model="moe", prompt=prompt, temperature=0, max_tokens=TOKENS, extra_body=extra, logprobs=1
        )
        return answer.choices[0].logprobs.tokens

    with ThreadPoolExecutor(len(PROMPTS)) as pool, client:
        return list(pool.map(ask, PROMPTS))


def metric(server, name):
    with openai.OpenAI(base_url=server.url, api_key="none") as client:
        text = client.get("/metrics", cast_to=str)
    return float(re.search(rf"^anabranch_serving_{name} (\S+)$", text, re.MULTILINE)[1])


def options(experts):
    said = ["--expert-budget", "150KB", "--set", "engine.dtype=float32", "--set", "engine.num_blocks=256"]
    for name, value in experts.items():
        said += ["--set", f"engine.experts.{name}={value}"]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("experts", EVERY, ids=lambda experts: json.dumps(experts))
def test_greedy_tokens_are_the_same_with_every_setting(experts, folder, expected):
    with serve_process(*options(experts), model=str(folder)) as server:
        assert answers(server) == expected
        accesses = [metric(server, f"expert_{name}_total") for name in ("hits", "late", "misses")]
        assert min(sum(accesses), metric(server, "expert_bytes_moved_total")) > 0
        assert 0 < metric(server, "expert_resident_bytes") <= 150_000
        if experts.get("dual_batch") and "regroup" not in experts:
            regrouped = metric(server, "expert_unit_loads_regrouped_total")
            assert 0 < regrouped <= metric(server, "expert_unit_loads_given_total")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["--set", "engine.experts.dual_batch=2"], "engine.experts.dual_batch is 2, but no expert_budget is set"),
        (["--set", "engine.experts.policy=mru", "--expert-budget", "1MB"], "engine.experts.policy is 'mru'"),
        (["--set", "engine.experts.predictor=frequency", "--expert-budget", "1MB"], "has to be fitted"),
        (["--set", "engine.experts.predictor=no.safetensors", "--expert-budget", "1MB"], "no such file"),
    ],
)
def test_contradictions_are_refused_at_start(said, message, folder, capsys):
    code = main(["serve", str(folder), "--port", "0", "--set", "engine.process=false", *said])
    err = capsys.readouterr().err.strip().splitlines()
    assert (code, err[-1].startswith("error: ")) == (2, True)
    assert message in err[-1]


def test_a_predictor_of_another_model_is_refused_at_start(folder, tmp_path, capsys):
    experts = MoE.Config(num_experts=8, hidden_dim=32, router=Router.Config(select=TopK.Config(top_k=2)))
    config = Decoder.Config(vocab_size=257, dim=32, num_layers=3, feed_forward=experts)
    save_model(tmp_path / "other", config.build(), ByteTokenizer())
    said = ["--expert-budget", "1MB", "--set", f"engine.experts.predictor={place_of(folder)}"]
    code = main(["serve", str(tmp_path / "other"), "--port", "0", "--set", "engine.process=false", *said])
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert "route-predictor.safetensors was made for a model of another experts by layer" in err


@pytest.mark.slow
def test_the_record_at_the_start_says_what_predicts(folder):
    command = [sys.executable, "-m", "anabranch", "serve", str(folder), "--port", "0", *options({"dual_batch": 2})]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = process.stdout.readline()
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert line == (
        "experts 146 KiB of 576 KiB in memory, policy plec, predictor encdec, dual batches of 2, regrouped\n"
    )
