"""Models whose files have few bits are served in these where nothing else is said, and with a budget experts come from the file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers

from anabranch.adapters.low_rank import LowRank
from anabranch.adapters.own_folder import write_own
from anabranch.adapters.put_on import put_on
from anabranch.adapters.scaling import Scaling
from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError
from anabranch.lm import load_model
from anabranch.lm.quantized import load_quantized
from anabranch.nn import kernels
from anabranch.nn.parted import PartedLinear
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import PackedEmbedding, QuantizedLinear, QuantizedPool
from anabranch.serving import LLM, Sampling, ServingConfig
from anabranch.serving.expertflow import load_offloaded
from anabranch.serving.experts import ExpertsConfig
from anabranch.serving.load import check_load, load_weights, quantize_of

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from gguf_files import bpe
from gguf_made import medium, with_blocks

TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [9, 7, 9, 7, 50, 60, 70, 80]])
KINDS = {
    "Q4_0": lambda name: "Q4_0",
    "Q8_0": lambda name: "Q8_0",
    "Q4_K": lambda name: "Q4_K",
    "MXFP4": lambda name: "MXFP4",
    "Q4_K_M": medium,
    "gate beside up": lambda name: "Q6_K" if "ffn_up" in name else "Q5_K" if "ffn_down" in name else "Q4_K",
    "Q5_0 beside Q6_K": lambda name: "Q5_0" if "exps" in name else "Q6_K",
    "float": lambda name: None,
}
needs_kernels = pytest.mark.skipif(kernels.load() is None, reason="no compiler")


def backend():
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))


def with_tokenizer(path, kinds, **sizes):
    reference = backend()
    tokens = reference.get_vocab()

    def extra(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(sorted(tokens, key=tokens.__getitem__))
        writer.add_token_merges([" ".join(pair) for pair in json.loads(reference.to_str())["model"]["merges"]])
        writer.add_eos_token_id(tokens["<|endoftext|>"])

    return with_blocks(path, kinds, extra=extra, vocabulary=len(tokens), **sizes)


def logits(model):
    with torch.inference_mode():
        return model.eval()(TOKENS).logits_BLV


@needs_kernels
def test_what_is_meant_where_nothing_is_said():
    assert quantize_of(ServingConfig()) == "stored"
    # Whoever names the type of weights, or has no kernels for few bits, gets floating point.
    assert quantize_of(ServingConfig(dtype="bfloat16")) == "none"
    assert quantize_of(ServingConfig(device="cuda")) == "none"
    for bits in ("none", "stored", "int8", "int4"):
        assert quantize_of(ServingConfig(quantize=bits, dtype="float32")) == bits


def test_without_kernels_weights_are_in_floating_point(monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda: None)
    assert quantize_of(ServingConfig()) == "none"


def kinds_of(model):
    kept = (QuantizedLinear, PartedLinear, QuantizedPool, PackedEmbedding)
    return {type(module) for module in model.modules() if isinstance(module, (*kept, ExpertPool))}


@needs_kernels
def test_a_file_is_loaded_as_it_is_stored_and_in_floating_point_on_demand(tmp_path):
    path = with_blocks(tmp_path / "m.gguf", medium)
    for quantize in ("auto", "stored"):
        model = load_weights(path, quantize=quantize).model
        assert kinds_of(model) == {QuantizedLinear, PartedLinear, QuantizedPool, PackedEmbedding}
    model = load_weights(path, quantize="none").model
    assert kinds_of(model) == {ExpertPool}
    plain = load_model(path)[0].state_dict()
    assert all(torch.equal(plain[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", KINDS)
def test_experts_come_from_the_file_to_the_bit(name, tmp_path):
    path = with_blocks(tmp_path / "m.gguf", KINDS[name])
    for quantize, whole in (("stored", load_quantized(path, "stored")[0]), (None, load_model(path)[0])):
        wanted = logits(whole)
        pools = [part for part in whole.modules() if isinstance(part, QuantizedPool | ExpertPool)]
        one = sum(t.nbytes for t in (*pools[0].parameters(), *pools[0].buffers())) // 3
        # Room for two of three experts of one layer, of six in all.
        found, _, engine = load_offloaded(path, 2 * one, quantize=quantize)
        with engine:
            assert torch.equal(logits(found), wanted)
            assert engine.cache.total().bytes_moved > 3 * one
            assert engine.cache.num_slots == [2]
        del found, engine


def test_nobody_is_told_of_blocks_who_asked_for_floating_point(tmp_path, caplog):
    path = with_blocks(tmp_path / "m.gguf", medium)
    load_offloaded(path, None)[2].close()
    assert "no kernel computes with" not in caplog.text


def test_the_page_cache_is_not_asked_to_forget_what_experts_are_made_of(tmp_path):
    path = with_blocks(tmp_path / "m.gguf", medium)
    with pytest.raises(ConfigError, match=r"drop_cache is set, but experts of .*m.gguf are read through the page"):
        load_offloaded(path, None, quantize="stored", drop_cache=True)
    config = ServingConfig(model=str(path), expert_budget="1MiB", experts=ExpertsConfig(drop_cache=True))
    with pytest.raises(ConfigError, match=r"drop_cache is set, but experts of .*m.gguf"):
        check_load(config, ByteTokenizer())


@needs_kernels
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_M", "gate beside up"])
def test_an_engine_gives_the_tokens_of_the_same_bits_in_memory(name, tmp_path):
    path = with_tokenizer(tmp_path / "m.gguf", KINDS[name])
    sampling = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
    said = []
    for options in (
        {"dtype": "float32", "quantize": "int4"},
        {"dtype": "float32", "quantize": "stored"},
        {"dtype": "float32", "quantize": "stored", "expert_budget": "1MiB"},
    ):
        llm = LLM(path, num_blocks=20, **options)
        said.append([answer.tokens for answer in llm.generate([[1, 2, 3], [9, 7]], sampling)])
        llm.close()
    assert said[1:] == said[:1] * 2


# -- the commands


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return with_tokenizer(tmp_path_factory.mktemp("stored") / "m.gguf", medium)


@pytest.fixture
def said(capsys):
    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        assert code == 0, found.err
        return json.loads(found.out)

    return run


@needs_kernels
def test_generate_eval_and_chat_keep_the_bits_of_the_file(file, said, tmp_path, monkeypatch):
    loaded = []
    was = load_weights

    def watched(*arguments, **options):
        found = was(*arguments, **options)
        loaded.append(kinds_of(found.model))
        return found

    monkeypatch.setattr("anabranch.serving.load.load_weights", watched)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 8)
    generate = ("generate", file, "--prompt", "the ", "--max-tokens", 6, "--temperature", 0, "--json")
    stored = said(*generate)["token_ids"]
    assert loaded.pop() == {QuantizedLinear, PartedLinear, QuantizedPool, PackedEmbedding}
    # Whose pools are slots.
    assert said(*generate, "--expert-budget", "1MiB")["token_ids"] == stored
    assert loaded.pop() == {QuantizedLinear, PartedLinear, PackedEmbedding}
    said(*generate, "--dtype", "float32")
    assert loaded.pop() == {ExpertPool}
    assert said("chat", file, "-m", "the", "--max-tokens", 2, "--json")["token_ids"]
    score = ("eval", file, "--data", tmp_path / "text.txt", "--sequence-length", 32, "--json")
    whole, few = said(*score, "--dtype", "float32"), said(*score)
    assert whole["weights"] == {"quantize": "none", "floating_point": 1.0, "kinds": {"float32": 1.0}}
    assert few["weights"]["quantize"] == "stored"
    assert set(few["weights"]["kinds"]) > {"q6_k", "float32"}
    # Norms and routers.
    assert 0 < few["weights"]["floating_point"] < 0.01
    budget = said(*score, "--expert-budget", "1MiB")["weights"]
    assert budget == few["weights"]
    exact, kept = whole["nats_per_token"], few["nats_per_token"]
    assert exact != kept
    # Activations are rounded to eight bits.
    assert abs(exact - kept) < 0.02 * exact
    assert said(*score, "--quantize", "none")["nats_per_token"] == exact


@needs_kernels
def test_generate_turns_the_routers_of_the_file_as_it_is_stored(file, said, tmp_path, monkeypatch, capsys):
    loaded = []
    was = load_weights

    def watched(*arguments, **options):
        found = was(*arguments, **options)
        loaded.append(kinds_of(found.model))
        return found

    monkeypatch.setattr("anabranch.serving.load.load_weights", watched)
    settings = [word for name in ("interval=4", "steps=2", "eta=0.5", "guard=false") for word in ("--rewire-set", name)]
    line = (
        "generate",
        file,
        "--prompt",
        "the quick brown fox",
        "--max-tokens",
        6,
        "--temperature",
        0,
        "--rewire",
        *settings,
    )
    turned = said(*line, "--json")
    assert loaded.pop() == {QuantizedLinear, QuantizedPool, PackedEmbedding, PartedLinear}
    assert [phase["steps"] for phase in turned["rewiring"]["phases"]] == [2, 2]
    assert said(*line, "--quantize", "int8", "--json")["rewiring"]["steps"] == 4
    # Where they come when they are wanted, they are in floating point.
    assert said(*line, "--expert-budget", "40MiB", "--json")["rewiring"]["steps"] == 4
    assert loaded.pop() == set()
    assert main([*map(str, line), "--quantize", "int4", "--expert-budget", "1MiB"]) == 2
    err = capsys.readouterr().err
    assert "--quantize is int4" in err
    assert "leave --expert-budget out, or use --quantize none" in err


@needs_kernels
@pytest.mark.parametrize("where", ["*.attention.*", "*.experts.*.down"])
def test_an_adapter_of_the_file_is_evaluated_on_it(where, file, said, tmp_path):
    adapted = put_on(load_model(file)[0], {where: Scaling.Config()})
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value += 0.3
    write_own(tmp_path / "a", adapted, base=str(file))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 8)
    score = ("eval", file, "--data", tmp_path / "text.txt", "--sequence-length", 32, "--json")
    bare, kept, exact = (
        said(*score, *more)["nats_per_token"]
        for more in ((), ("--adapter", tmp_path / "a"), ("--adapter", tmp_path / "a", "--quantize", "none"))
    )
    assert kept != bare
    assert abs(exact - kept) < 0.02 * exact < abs(exact - bare) + 0.02 * exact


@pytest.mark.slow
@needs_kernels
def test_a_server_takes_an_adapter_of_the_file(file, tmp_path):
    openai = pytest.importorskip("openai")
    from server_process import started

    write_own(tmp_path / "a", put_on(load_model(file)[0], {"*.attention.*": LowRank.Config()}), base=str(file))
    where, token = ("--adapter-root", str(tmp_path)), {"ANABRANCH_SERVE_HTTP__ADMIN_TOKEN": "secret-token"}
    with started("serve", str(file), "--adapter", f"a={tmp_path / 'a'}", *where, environment=token) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret-token", max_retries=0, timeout=250)
        with client:
            assert client.post("/adapters", body={"name": "b", "folder": "a"}, cast_to=object)["id"] == "b"
            options = {"prompt": "the ", "max_tokens": 4, "temperature": 0, "extra_body": {"ignore_eos": True}}
            # It has not learned anything.
            texts = [client.completions.create(model=name, **options).choices[0].text for name in (file.name, "a", "b")]
    assert len(set(texts)) == 1


@pytest.mark.slow
@needs_kernels
def test_a_server_keeps_the_bits_of_the_file(file):
    openai = pytest.importorskip("openai")
    from server_process import started

    llm = LLM(file, kv_memory="64MiB")
    [wanted] = llm.generate(["the "], Sampling(max_tokens=8, temperature=0, ignore_eos=True))
    llm.close()
    for more in ((), ("--expert-budget", "1MiB")):
        with started("serve", str(file), *more) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=250)
            with client:
                answer = client.completions.create(
                    model=file.name, prompt="the ", max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
                )
            assert answer.choices[0].text == wanted.text


# Prints bytes of its own (not of files that are mapped) before and after a model is loaded and has said something.
MEASURED = """
import json, re, sys
from pathlib import Path
from anabranch.serving import LLM, Sampling

def anonymous():
    return 1024 * int(re.search(r"^RssAnon:\\s+(\\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1])

def most():
    return 1024 * int(re.search(r"^VmHWM:\\s+(\\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1])

def said(path, options):
    llm = LLM(path, num_blocks=20, process=False, **options)
    llm.generate([[1, 2, 3]], Sampling(max_tokens=4, temperature=0))
    return llm

small, large, options = json.loads(sys.argv[1])
kept = said(small, options)
before, peak = anonymous(), most()
llm = said(large, options)
print(json.dumps([anonymous() - before, most() - peak]))
"""


@pytest.mark.slow
@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure by")
def test_memory_is_that_of_the_blocks_and_of_the_budget(tmp_path):
    small = with_blocks(tmp_path / "small.gguf", KINDS["Q4_K"])
    # 57 MB of experts in Q4_K, in float32 403.
    large = with_blocks(tmp_path / "large.gguf", KINDS["Q4_K"], experts=32, layers=4, hidden=1024)
    size, mib = large.stat().st_size, 1 << 20
    assert size > 55e6
    taken = {}
    for name, options in (("whole", {}), ("budget", {"expert_budget": "12MiB"}), ("plain", {"quantize": "none"})):
        given = json.dumps([str(small), str(large), options])
        done = subprocess.run([sys.executable, "-c", MEASURED, given], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        taken[name] = json.loads(done.stdout.splitlines()[-1])
    print({name: [f"{value / mib:.0f} MiB" for value in both] for name, both in taken.items()})
    assert taken["whole"][0] < 1.1 * size + 16 * mib
    # A pool is there twice while all are put into one place, and 64 MiB of the file are mapped at most.
    assert taken["whole"][1] < 1.4 * size + 80 * mib
    assert taken["budget"][0] < 12 * mib + 32 * mib
    assert taken["budget"][1] < 12 * mib + 32 * mib + 80 * mib
    assert taken["plain"][0] > 3 * taken["whole"][0]
