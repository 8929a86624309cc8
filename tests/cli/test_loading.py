"""``generate``, ``chat``, ``eval`` and ``report`` load as ``serve`` does: in few bits, with a budget for experts; and sample as it does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from anabranch.adapters import LowRank, load_peft, save_peft
from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, SamplingConfig, convert, generate, load_model, save_model
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.nn.nf4 import quantize_nf4
from anabranch.serving import LLM, Sampling, ServingConfig
from anabranch.serving.adapters import AdaptersConfig
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
    "more",
    [(), BUDGET, ("--quantize", "int8"), ("--quantize", "nf4"), ("--quantize", "int4", "--expert-budget", "30KB")],
    ids=str,
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


def rounded(folder):
    """The model and its tokenizer, as `adapt --quantize nf4` has the base."""
    model, tokenizer = load_model(folder)
    assert quantize_nf4(model)
    return model, tokenizer


def test_the_base_of_qlora_is_what_runs(folder, said):
    """From the command to tokens and nats, against the plain loop on the base that adapters learn beside."""
    model, tokenizer = rounded(folder)
    [expected] = generate(model, [tokenizer.encode_prompt("def ")], SamplingConfig(max_tokens=30, temperature=0))
    command = ["generate", folder, *GENERATE, "--dtype", "float32", "--quantize"]
    assert said(*command, "nf4")["token_ids"] == expected
    nats = {
        bits: said(
            "eval", folder, "--data", folder.parent / "text.txt", "--dtype", "float32", "--quantize", bits, "--json"
        )
        for bits in ("none", "nf4")
    }
    weights = {bits: told.pop("weights") for bits, told in nats.items()}
    assert nats["none"] != nats["nf4"]
    assert (weights["none"]["quantize"], weights["nf4"]["quantize"]) == ("none", "nf4")


def test_an_adapter_is_served_on_the_base_that_it_learned_beside(folder, tmp_path):
    plain, _ = load_model(folder)
    adapted = plain.config.replace(linears={"*.attention.*": LowRank.Config(rank=2)}).build(seed=3)
    for name, parameter in adapted.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    save_peft(tmp_path / "adapter", adapted)
    model, tokenizer = rounded(folder)
    load_peft(tmp_path / "adapter", model)
    sampling = SamplingConfig(max_tokens=12, temperature=0)
    [wanted] = generate(model, [tokenizer.encode_prompt("def ")], sampling)
    adapters = AdaptersConfig(load=(f"own={tmp_path / 'adapter'}",))
    llm = LLM(folder, dtype="float32", num_blocks=50, quantize="nf4", adapters=adapters)
    asked = Sampling(max_tokens=12, temperature=0)
    [base], [own] = (llm.generate(["def "], asked, adapters=who) for who in ((), (("own", 1.0),)))
    llm.close()
    assert list(own.tokens) == wanted
    assert base.tokens != own.tokens


@pytest.mark.parametrize("more", [BUDGET, ["--memory", "1GiB"]], ids=str)
def test_what_nf4_does_not_go_with_is_told(more, folder, capsys):
    assert main([*map(str, ["generate", folder, *GENERATE, "--quantize", "nf4", *more])]) == 2
    told = capsys.readouterr().err
    assert "quantize is 'nf4', which keeps experts whole and in memory" in told
    assert "int4" in told


def test_a_folder_in_few_bits_is_not_rounded_again(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "few"), "--to", "native", "--quantize", "int8"]) == 0
    assert main([*map(str, ["generate", tmp_path / "few", *GENERATE, "--quantize", "nf4"])]) == 2
    assert "is saved in few bits already; leave it out" in capsys.readouterr().err


def test_a_plan_of_memory_is_what_is_loaded(folder, said, capsys, monkeypatch):
    asked = []

    def planned(config, beside=0):
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


@pytest.mark.parametrize(
    ("more", "quantize", "kinds"),
    [
        ((), "none", ["float32"]),
        (BUDGET, "none", ["float32"]),
        (("--dtype", "bfloat16"), "none", ["bfloat16"]),
        (("--quantize", "int8"), "int8", ["int8", "float32"]),
        (("--quantize", "int4", "--expert-budget", "30KB"), "int4", ["int4", "int8", "float32"]),
    ],
    ids=str,
)
def test_eval_says_which_bits_it_measured(more, quantize, kinds, folder, said, capsys):
    line = ["eval", folder, "--data", folder.parent / "text.txt", "--sequence-length", 64, *more]
    found = said(*line, "--json")["weights"]
    assert (found["quantize"], set(found["kinds"])) == (quantize, set(kinds))
    assert sum(found["kinds"].values()) == pytest.approx(1)
    floats = [kind for kind in kinds if "float" in kind]
    assert found["floating_point"] == pytest.approx(sum(found["kinds"][kind] for kind in floats))
    assert main([*map(str, line)]) == 0
    [told] = [told for told in capsys.readouterr().out.splitlines() if told.startswith("weights ")]
    for kind in kinds:
        assert kind in told
    assert (f"{found['floating_point']:.1%} in floating point" in told) == (quantize != "none")
    assert ("none in fewer bits" in told) == (quantize == "none")


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_eval_with_memory_says_which_type_it_took(kind, folder, said, monkeypatch):
    """That which the processor multiplies, as an engine does: other numbers than in the type of the file."""
    monkeypatch.setattr("anabranch.serving.load._multiplies_halves", lambda: kind == "bfloat16")
    monkeypatch.setattr("anabranch.serving.memory.plan.program_bytes", lambda model, processes: 0)
    line = ["eval", folder, "--data", folder.parent / "text.txt", "--sequence-length", 64, "--json", "--quiet"]
    found = said(*line, "--memory", "1GiB")
    assert list(found["weights"]["kinds"]) == [kind]
    assert found == said(*line, "--dtype", kind)


def test_a_folder_that_is_saved_in_few_bits_is_measured_as_stored(folder, said, tmp_path):
    convert(folder, tmp_path / "few", quantize="int4")
    text = ["--data", folder.parent / "text.txt", "--sequence-length", 64, "--json"]
    plain = said("eval", tmp_path / "few", *text)["weights"]
    assert plain["quantize"] == "stored"
    assert plain["kinds"]["int4"] > 0.5
    # Of the experts of the layers (two matrices of 64, one of 32), attention, head, and what is left: table, norms, routers.
    experts, attention, table = 2 * 8 * 3 * 64 * 32, 2 * 4 * 64 * 64, 257 * 64
    rest = 2 * 8 * 64 + 5 * 64 + table
    assert plain["floating_point"] == pytest.approx(rest / (experts + attention + table + rest))


def test_eval_plans_for_memory_as_serve_does(folder, said, monkeypatch):
    asked = []

    def planned(config, beside=0):
        asked.append((config.memory, config.max_seqs, config.max_batched_tokens, beside))
        return config.replace(memory=None, quantize="int8", expert_budget="30KB", kv_memory="40KB")

    monkeypatch.setattr(ServingConfig, "planned", planned)
    text = ["--data", folder.parent / "text.txt", "--sequence-length", 96, "--json", "--quiet", "--dtype", "float32"]
    by_hand = said("eval", folder, *text, "--quantize", "int8", "--expert-budget", "30KB")
    assert asked == []
    assert said("eval", folder, *text, "--memory", "1GiB") == by_hand
    # As many windows of 96 as 4,096 tokens hold; 257 logits of each, and what their softmax takes.
    assert asked == [("1GiB", 1, 42 * 96, 42 * 96 * 257 * 16)]


def test_memory_that_the_logits_of_a_text_take_is_not_the_weights(folder, capsys, monkeypatch):
    monkeypatch.setattr("anabranch.serving.memory.plan.program_bytes", lambda model, processes: 0)
    line = [
        "eval",
        str(folder),
        "--data",
        str(folder.parent / "text.txt"),
        "--sequence-length",
        "96",
        "--dtype",
        "float32",
    ]
    assert main([*line, "--memory", "8MB"]) == 2
    err = capsys.readouterr().err
    assert "memory is 8,000,000 bytes" in err
    assert "takes at least" in err
    assert main([*line, "--memory", "1GiB", "--quiet"]) == 0


@pytest.mark.slow
def test_a_report_of_a_model_with_a_budget_is_that_of_the_model(folder, said, tmp_path):
    pytest.importorskip("matplotlib")
    made, bits = [], []
    for number, more in enumerate(((), BUDGET, ("--memory", "4GiB", "--dtype", "float32"))):
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
        bits.append(made[-1].pop("weights"))
        assert "none in fewer bits" in (tmp_path / str(number) / "report.html").read_text()
    assert made[0] == made[1] == made[2]
    assert bits == [{"quantize": "none", "floating_point": 1.0, "kinds": {"float32": 1.0}}] * 3


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
            "--expert-budget is for models, and trace.parquet is a trace",
        ),
        ("report trace.parquet --out o --quantize int4", "--quantize is for models"),
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
