"""``generate``, ``chat``, ``eval`` and ``report`` load as ``serve`` does: in few bits, with a budget for experts; and sample as it does."""

import json
from pathlib import Path

import numpy as np
import pytest

from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, SamplingConfig, convert, generate, load_model, save_model
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.serving import LLM, Sampling, ServingConfig
from anabranch.serving.expertflow.predictors import Fingerprint, Frequency
from anabranch.serving.http.serve import ServeConfig

BUDGET = ["--expert-budget", "60KB"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide enough for few bits."""
    attention, experts = SelfAttention.Config(num_heads=2), MoE.Config(num_experts=8, hidden_dim=32)
    config = Decoder.Config(
        vocab_size=257, dim=64, num_layers=2, attention=attention, feed_forward=experts, init_std=0.2, max_positions=128
    )
    place = tmp_path_factory.mktemp("loading")
    save_model(place / "m", config.build(seed=0), ByteTokenizer())
    (place / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 20)
    return place / "m"


@pytest.fixture
def said(capsys):
    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        assert code == 0, found.err
        return json.loads(found.out)

    return run


GENERATE = ["--prompt", "def ", "--max-tokens", 30, "--temperature", 0, "--json"]


@pytest.mark.parametrize(
    "more", [(), BUDGET, ("--quantize", "int8"), ("--quantize", "int4", "--expert-budget", "30KB")], ids=str
)
def test_generate_and_chat_run_on_the_engine_that_serves(more, folder, said):
    options = {"dtype": "float32", "num_blocks": 50}
    if "--quantize" in more:
        options["quantize"] = more[1]
    if "--expert-budget" in more:
        options["expert_budget"] = more[-1]
    llm = LLM(folder, **options)
    [expected] = llm.generate(["def "], Sampling(max_tokens=30, temperature=0))
    assert said("generate", folder, *GENERATE, *more)["token_ids"] == list(expected.tokens)
    prompt = llm.tokenizer.encode_chat(llm.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}]))
    [expected] = llm.generate([prompt], Sampling(max_tokens=30, temperature=0))
    llm.close()
    answer = said("chat", folder, "-m", "hello", "--max-tokens", 30, "--temperature", 0, "--json", *more)
    assert answer["token_ids"] == list(expected.tokens)


def test_a_plan_of_memory_is_what_is_loaded(folder, said, capsys, monkeypatch):
    asked = []

    def planned(config):
        asked.append((config.memory, config.max_seqs, config.process))
        return config.replace(memory=None, quantize="int8", expert_budget="30KB", kv_memory="40KB")

    llm = LLM(folder, quantize="int8", expert_budget="30KB", dtype="float32", num_blocks=50)
    [expected] = llm.generate(["def "], Sampling(max_tokens=30, temperature=0))
    llm.close()
    monkeypatch.setattr(ServingConfig, "planned", planned)
    # 1 KiB a position, in blocks of 16.
    room = 40_000 // (16 * 1024) * 16
    code = main([*map(str, ["generate", folder, *GENERATE, "--memory", "1GiB", "--dtype", "float32"])])
    out, err = capsys.readouterr()
    tokens = json.loads(out)["token_ids"]
    assert (code, len(tokens), tokens) == (0, room - 4, list(expected.tokens[: room - 4]))
    assert err == f"note: keys and values have room for {room} tokens, so the text ends there\n"
    assert asked == [("1GiB", 1, False)]
    short = said("chat", folder, "-m", "a", "--max-tokens", 2, "--temperature", 0, "--memory", "1GiB", "--json")
    assert len(short["token_ids"]) == 2


def test_what_is_measured_does_not_depend_on_a_budget_and_is_that_of_the_bits(folder, said, tmp_path, capsys):
    text = ["--data", folder.parent / "text.txt", "--sequence-length", 64, "--json", "--quiet"]
    plain = said("eval", folder, *text)
    assert said("eval", folder, *text, *BUDGET)["nats_per_token"] == plain["nats_per_token"]
    assert said("eval", folder, *text, "--cached", *BUDGET)["nats_per_token"] == pytest.approx(
        plain["nats_per_token"], rel=1e-5
    )
    assert main(["convert", str(folder), str(tmp_path / "q"), "--to", "native", "--quantize", "int4"]) == 0
    capsys.readouterr()
    bits = said("eval", folder, *text, "--quantize", "int4")["nats_per_token"]
    assert bits == said("eval", tmp_path / "q", *text)["nats_per_token"] != plain["nats_per_token"]
    assert said("eval", folder, *text, "--quantize", "int4", "--expert-budget", "30KB")[
        "nats_per_token"
    ] == pytest.approx(bits, rel=1e-5)


@pytest.mark.slow
def test_a_report_of_a_model_with_a_budget_is_that_of_the_model(folder, said, tmp_path):
    pytest.importorskip("matplotlib")
    made = []
    for number, more in enumerate(((), BUDGET)):
        out = [
            "--out",
            tmp_path / str(number),
            "--data",
            folder.parent / "text.txt",
            "--sequence-length",
            32,
            "--json",
            "--quiet",
        ]
        made.append(said("report", folder, *out, *more))
        made[-1].pop("page")
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate DENSE -p x --expert-budget 1MB", "dense has no layers of experts"),
        ("chat MODEL -m x --expert-budget 1KB", "budget"),
        ("eval MODEL --expert-budget little", "--expert-budget is 'little'"),
        ("generate MODEL -p x --memory little", "--memory is 'little'"),
        ("generate MODEL -p x --memory 8GiB --dtype float16", "with --memory it is float32 or bfloat16"),
        ("eval MODEL --quantize int3", "--quantize is 'int3'"),
        (
            "report trace.parquet --out o --expert-budget 1MB",
            "--expert-budget is of models, and trace.parquet is a trace",
        ),
        ("report trace.parquet --out o --quantize int4", "--quantize is of models"),
        ("generate MODEL -p x --min-p 2", "min_p is 2"),
        ("generate MODEL -p x --repetition-penalty 0", "repetition_penalty is 0"),
        ("chat MODEL -m x --min-p nan", "min_p is nan"),
        ("chat MODEL -m x --top-k 0", "--top-k is '0'"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(line, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = Decoder.Config(vocab_size=257, dim=16, num_layers=1, feed_forward=SwiGLU.Config(hidden_dim=8))
    save_model("dense", dense.build(), ByteTokenizer())
    code = main([{"MODEL": str(folder), "DENSE": "dense"}.get(word, word) for word in line.split()])
    out, err = capsys.readouterr()
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), err
    assert message in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("serve DENSE --expert-budget 1MB", "dense has no layers of experts"),
        ("serve MODEL --expert-budget 1KiB", "budget"),
        ("serve MODEL --expert-budget 60KB --quantize int4 --set engine.experts.predictor=other", "other was made for"),
        (
            "serve MODEL --expert-budget 60KB --set engine.experts.predictor=text.txt",
            "text.txt holds no route predictor",
        ),
        ("serve FEW --quantize int8", "is saved in int4, and int8 is asked for"),
        ("serve empty.gguf", "empty.gguf"),
    ],
)
def test_a_server_that_cannot_load_says_so_before_it_says_that_it_loads(
    line, message, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ServeConfig, "serve", lambda *_, **__: pytest.fail("it loads"))
    dense = Decoder.Config(vocab_size=257, dim=16, num_layers=1, feed_forward=SwiGLU.Config(hidden_dim=8))
    save_model("dense", dense.build(), ByteTokenizer())
    convert(folder, "few", quantize="int4")
    Path("empty.gguf").write_bytes(b"")
    Path("text.txt").write_text("text")
    other = Frequency(Fingerprint((4,), (1,), "of another"), 257)
    other.prob_VLE = np.zeros((257, 1, 4), np.float32)
    other.save("other")
    places = {"MODEL": str(folder), "DENSE": "dense", "FEW": "few"}
    code = main([places.get(word, word) for word in line.split()])
    out, err = capsys.readouterr()
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), err
    assert message in err


@pytest.mark.slow
def test_serve_says_that_experts_of_a_gguf_file_would_stay_in_their_blocks(tmp_path, capsys):
    pytest.importorskip("gguf")
    from tokenizers import pre_tokenizers

    from gguf_files import bpe
    from gguf_made import theirs, write

    model, reference = theirs("qwen3moe"), bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    model.resize_token_embeddings(reference.get_vocab_size())
    tokens = reference.get_vocab()

    def extra(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(sorted(tokens, key=tokens.__getitem__))
        writer.add_token_merges([" ".join(pair) for pair in json.loads(reference.to_str())["model"]["merges"]])

    path = write(tmp_path / "m.gguf", model, "qwen3moe", extra=extra)
    advice = "--quantize int4 keeps the file's own blocks"
    budget = ("--expert-budget", "90KB")
    for more, is_said in (
        (budget, True),
        ((*budget, "--quiet"), False),
        ((*budget, "--quantize", "int4"), False),
        ((), False),
    ):
        assert main(["serve", str(path), "--check", *more]) == 0, capsys.readouterr().err
        err = capsys.readouterr().err
        assert sum(advice in line for line in err.splitlines()) == is_said, err


MAKERS = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.7}


@pytest.fixture
def makers(folder):
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, **MAKERS}))
    yield MAKERS
    file.unlink()


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ((), {}),
        (("--min-p", 0.3), {"min_p": 0.3}),
        (("--repetition-penalty", 1), {"repetition_penalty": 1}),
        (("--temperature", 0.5, "--top-k", 5, "--top-p", 0.5), {"temperature": 0.5, "top_k": 5, "top_p": 0.5}),
    ],
)
def test_samples_as_the_makers_say_unless_the_user_says_otherwise(given, changes, folder, makers, said):
    llm = LLM(folder, dtype="float32", num_blocks=20)
    sampling = Sampling(**{**makers, **changes}, max_tokens=40, seed=5)
    [expected] = llm.generate(["def "], sampling)
    more = ("--max-tokens", 40, "--seed", 5, "--json", *given)
    assert said("generate", folder, "-p", "def ", *more)["token_ids"] == list(expected.tokens)
    prompt = llm.tokenizer.encode_chat(llm.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]))
    [expected] = llm.generate([prompt], sampling)
    assert said("chat", folder, "-m", "hi", *more)["token_ids"] == list(expected.tokens)


@pytest.mark.slow
def test_each_of_the_makers_numbers_changes_the_text(folder, said):
    """So that none of them is read and left out."""
    usual = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    texts, file = [], folder / "generation_config.json"
    strong = {"temperature": 3.0, "top_k": 2, "top_p": 0.2, "min_p": 0.9, "repetition_penalty": 5.0}
    try:
        for name in (None, *strong):
            file.write_text(json.dumps({**usual, **({} if name is None else {name: strong[name]})}))
            texts.append(said("generate", folder, "-p", "def ", "--max-tokens", 60, "--seed", 1, "--json")["text"])
    finally:
        file.unlink()
    assert len(set(texts)) == len(texts)


def test_text_goes_on_beyond_what_the_model_is_meant_for(folder, said):
    asked = ["generate", folder, "-p", "def ", "--max-tokens", 200, "--temperature", 0, "--json"]
    model, tokenizer = load_model(folder)
    greedy = SamplingConfig(max_tokens=200, temperature=0, stop=tokenizer.stop_ids)
    assert [said(*asked)["token_ids"]] == generate(model, [tokenizer.encode("def ")], greedy)
