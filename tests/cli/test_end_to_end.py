import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from anabranch.adapters.rewiring import Rerouter, Rewiring
from anabranch.cli.output import fact, say
from anabranch.cli.progress import Progress
from anabranch.data import ByteTokenizer, train_bpe
from anabranch.data.tokenizer import HuggingFaceTokenizer
from anabranch.experts.parscale import ParScale
from anabranch.lm import Decoder, SamplingConfig, export_huggingface, generate, load_config, load_model, save_model
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.report.write import check_place
from anabranch.routing import RoutingTrace, consistency, measure
from anabranch.routing.pool_routes import pool_routes
from anabranch.routing.srp_statistics import srp_interval
from anabranch.serving import LLM, Sampling

TEXT = "def total(values):\n    return sum(values)\n" * 40


@pytest.fixture(scope="module")
def text_file(work):
    path = work / "held_out.txt"
    path.write_text(TEXT)
    return path


def test_train_prints_one_json_object_and_makes_a_run(trained):
    folder, done = trained
    found = json.loads(done.stdout)
    assert found["status"] == "finished"
    assert found["step"] == found["steps"] == 20
    assert found["folder"] == "trained"
    assert 0 < found["bits_per_byte"] < 9
    assert found["trained_tokens"] == 20 * 4 * 32
    assert found["routing"]["max_violation"] >= 0
    assert found["sample"]["text"]
    assert (folder / "config.json").is_file()
    assert (folder / "metrics.jsonl").is_file()
    assert Path(folder.parent / found["checkpoint"] / "model.safetensors").is_file()
    assert "bits/byte" in done.stderr  # progress is there, and not on stdout


def test_eval_is_the_mean_over_consecutive_windows(trained, here, text_file):
    import torch.nn.functional as F

    folder, _ = trained
    code, out, _ = here("eval", folder, "--data", text_file, "--sequence-length", 50, "--dtype", "float32", "--json")
    found = json.loads(out)
    model, tokenizer = load_model(folder)
    ids = tokenizer.encode(TEXT)
    nats, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 50):
            window = torch.tensor([ids[start : start + 51]])
            logits = model.eval()(window[:, :-1]).logits_BLV[0]
            nats += float(F.cross_entropy(logits.float(), window[0, 1:], reduction="sum"))
            count += window.shape[1] - 1
    assert code == 0
    assert found["tokens"] == count == len(ids) - 1
    assert found["bytes"] == len(TEXT) - 1
    assert found["nats_per_token"] == pytest.approx(nats / count, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(TEXT) - 1), rel=1e-5)


def test_the_number_of_streams_is_said_by_command(here, work):
    streams = ParScale.Config(num_streams=2, prefix_len=2, embedding_dim=8, mlp_dim=8)
    model = Decoder.Config(vocab_size=257, dim=16, num_layers=1, streams=streams, init_std=0.3).build()
    save_model(work / "streams", model, ByteTokenizer.Config().build())
    (work / "streams.txt").write_text("some words of text")
    measure = ("eval", "streams", "--data", "streams.txt", "--sequence-length", 8, "--json", "--quiet")
    say = ("generate", "streams", "-p", "ab", "--temperature", 0, "--max-tokens", 6, "--json")
    found = []
    for options in ((), ("--streams", 1), ("--streams", 2)):
        code, out, error = here(*measure, *options)
        assert code == 0, error
        assert json.loads(here(*measure, "--cached", *options)[1])["nats_per_token"] == pytest.approx(
            json.loads(out)["nats_per_token"], abs=1e-5
        )
        found.append((json.loads(out)["nats_per_token"], json.loads(here(*say, *options)[1])["token_ids"]))
    assert found[0] == found[2] != found[1]
    assert "num_streams is 3" in here(*measure, "--streams", 3)[2]
    code, out, err = here(*say[:-1], "--streams", 3)
    assert (code, out) == (2, "")
    assert "num_streams is 3" in err
    for more, used in (((), 2), (("--streams", 1), 1)):
        assert [json.loads(here(*line, *more)[1])["streams"] for line in (measure, say)] == [used, used]
    plain = measure[:-2]
    assert not re.search("^(streams|cached|path) ", here(*plain)[1], re.MULTILINE)
    header = here(*plain, "--streams", 1, "--cached", "--path", "0,0")[1]
    for line in ("streams +1", "cached +pieces of 64 tokens, with a key-value cache", "path +0, 0"):
        assert re.search(f"^{line}$", header, re.MULTILINE), header
    talk = ("chat", "streams", "-m", "ab", "--temperature", 0, "--max-tokens", 6, "--json")
    said = [json.loads(here(*talk, *more)[1])["token_ids"] for more in ((), ("--streams", 1), ("--streams", 2))]
    assert said[0] == said[2] != said[1]
    assert "num_streams is 3" in here(*talk, "--streams", 3)[2]


def test_eval_runs_blocks_in_any_order_cached_or_not(here, trained):
    def nats(*options):
        code, out, error = here(
            "eval", trained[0], "--json", "--quiet", "--sequence-length", 32, "--tokens", 256, *options
        )
        assert code == 0, error
        return json.loads(out)

    plain, twice, without = nats(), nats("--path", "0,1,1"), nats("--path", "0")
    assert (plain["path"], plain["cached"], twice["path"]) == (None, False, [0, 1, 1])
    values = [found["nats_per_token"] for found in (plain, twice, without)]
    assert len(set(values)) == 3
    for options, value in zip(((), ("--path", "0,1,1"), ("--path", "0")), values, strict=True):
        assert nats("--cached", *options)["nats_per_token"] == pytest.approx(value, abs=1e-5)
    assert nats("--path", "0,1")["nats_per_token"] == values[0]
    assert "block 7; the model has blocks 0 to 1" in here("eval", trained[0], "--path", "0,7")[2]
    code, _, err = here("eval", trained[0], "--path", "0,1,0,0")
    assert (code, "the path comes to block 0 3 times; a block may run at most 2 times" in err) == (2, True), err
    for wrong in ("0;1", "", " ", "0,,1", "1_0", "٣", "0,-1", "+1", "1" * 40):
        code, _, err = here("eval", trained[0], "--path", wrong)
        assert (code, f"--path is {wrong!r}; write block numbers with commas" in err) == (2, True), err


def test_eval_of_a_run_reads_its_own_held_out_text(trained, here):
    folder, _ = trained
    code, out, _ = here("eval", folder)
    assert code == 0
    assert "alpha" in out
    assert "beta" in out
    _, out, _ = here("eval", folder, "--json", "--quiet")
    found = json.loads(out)
    assert found["by_domain"].keys() == {"alpha", "beta"}
    assert found["sequence_length"] == 32


def test_generate_gives_what_the_library_gives(trained, here):
    folder, _ = trained
    options = ["--prompt", "def ", "--max-tokens", 12, "--temperature", 0.8, "--seed", 3, "--json"]
    code, out, _ = here("generate", folder, *options)
    assert code == 0
    found = json.loads(out)
    model, tokenizer = load_model(folder)
    assert isinstance(tokenizer, ByteTokenizer)
    [expected] = LLM(model, tokenizer, num_blocks=8).generate(
        ["def "], Sampling(max_tokens=12, temperature=0.8, seed=3)
    )
    assert found["token_ids"] == list(expected.tokens)
    assert found["text"] == expected.text
    _, out, _ = here("generate", folder, *options, "--temperature", 0, "--max-tokens", 200)
    greedy = SamplingConfig(max_tokens=200, temperature=0, stop=tokenizer.stop_ids)
    assert [json.loads(out)["token_ids"]] == generate(model, [tokenizer.encode("def ")], greedy)


def test_a_prompt_begins_as_the_models_own_tokenizer_begins_it(here, tmp_path):
    backend = tokenizers.Tokenizer.from_str(train_bpe(["def add"], 257)._backend.to_str())
    backend.add_special_tokens(["<s>"])
    begin = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    backend.post_processor = begin
    attention, feed_forward = SelfAttention.Config(num_heads=2), SwiGLU.Config(hidden_dim=8)
    config = Decoder.Config(vocab_size=258, dim=16, num_layers=1, attention=attention, feed_forward=feed_forward)
    tokenizer = HuggingFaceTokenizer(backend, bos_id=257, eos_id=256)
    export_huggingface(tmp_path / "model", config.build(seed=0), tokenizer)
    code, out, _ = here("generate", tmp_path / "model", "--prompt", "def", "--max-tokens", 1, "--json")
    assert code == 0
    made = json.loads(out)
    assert (made["prompt"], made["prompt_token_ids"]) == ("def", [257, *tokenizer.encode("def")])
    [answer] = LLM(tmp_path / "model", num_blocks=8).generate(["def"])
    assert list(answer.prompt) == made["prompt_token_ids"]


def test_generate_turns_the_routers_of_a_mixture_to_its_text(here, tmp_path):
    """As the library does it, streamed and as JSON; what was not done is said; a dense model is refused."""
    body = {"dim": 16, "num_layers": 2, "attention": SelfAttention.Config(num_heads=2), "init_std": 0.3}
    mixture = Decoder.Config(**body, feed_forward=MoE.Config(num_experts=4, hidden_dim=16)).build(seed=0)
    save_model(tmp_path / "moe", mixture, ByteTokenizer())
    save_model(tmp_path / "dense", Decoder.Config(**body).build(seed=0), ByteTokenizer())
    prompt = "def add(a, b): return a + b\n" * 2
    options = ["--prompt", prompt, "--max-tokens", 12, "--temperature", 0, "--rewire"]
    settings = ["--rewire-set", "interval=8", "--rewire-set", "eta=0.5", "--rewire-set", "steps=2"]
    code, out, err = here("generate", tmp_path / "moe", *options, *settings, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    model, tokenizer = load_model(tmp_path / "moe")
    rerouter = Rerouter(model, Rewiring(interval=8, eta=0.5, steps=2))
    state = rerouter.new_state()
    greedy = SamplingConfig(max_tokens=12, temperature=0, stop=tokenizer.stop_ids)
    assert rerouter.generate([tokenizer.encode(prompt)], greedy, states=[state]) == [found["token_ids"]]
    told = found["rewiring"]
    assert told["routers"] == ["blocks.0.feed_forward.router", "blocks.1.feed_forward.router"]
    assert (told["steps"], len(told["phases"])) == (state.steps, len(state.phases)) == (4, 2)
    assert told["settings"]["eta"] == 0.5
    assert told["phases"][0]["loss_after"] == pytest.approx(state.phases[0].loss_after)
    code, text, _ = here("generate", tmp_path / "moe", *options, *settings)
    assert (code, text) == (0, prompt + found["text"] + "\n")
    # Of experts that come when they are wanted, five in memory at a time.
    code, out, err = here("generate", tmp_path / "moe", *options, *settings, "--expert-budget", "16KiB", "--json")
    assert code == 0, err
    assert json.loads(out)["token_ids"] == found["token_ids"]
    code, _, err = here("generate", tmp_path / "moe", "-p", "def", "--max-tokens", 1, "--rewire")
    assert code == 0
    assert "note: routers were not turned: a context of 3 tokens is too short for the guard" in err
    code, _, err = here("generate", tmp_path / "dense", *options)
    assert code == 2
    assert "has no router that chooses experts, so there is nothing to rewire" in err
    with open(tmp_path / "moe/generation_config.json", "w") as file:
        json.dump({"repetition_penalty": 1.5, "min_p": 0.0}, file)
    code, _, err = here("generate", tmp_path / "moe", *options, *settings, "--json")
    assert code == 0
    assert "generation_config.json has repetition_penalty, which --rewire leaves out" in err


def test_generate_streams_the_prompt_and_its_continuation(trained, here):
    folder, _ = trained
    _, out, _ = here("generate", folder, "--prompt", "def ", "--max-tokens", 5, "--temperature", 0, "--json")
    code, text, _ = here("generate", folder, "--prompt", "def ", "--max-tokens", 5, "--temperature", 0)
    assert code == 0
    assert text == "def " + json.loads(out)["text"] + "\n"


def test_info_counts_what_is_there(trained, here):
    folder, done = trained
    _, out, _ = here("info", folder, "--json")
    found = json.loads(out)
    model, _ = load_model(folder)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["parameters"] == json.loads(done.stdout)["parameters"]
    assert found["active_parameters"] < found["parameters"]
    assert found["flops_per_token"] == model.config.count(32).flops
    assert found["memory"]["weights_bytes"] == 4 * found["parameters"]
    code, text, _ = here("info", folder)
    assert code == 0
    assert f"{found['parameters']:,} parameters" in text


def test_info_of_a_preset_and_of_all(here):
    code, out, _ = here("info", "rexmoe-r4", "--json")
    assert code == 0
    assert json.loads(out)["config"]["feed_forward"]["reuse"] == 4
    _, out, _ = here("info", "--json")
    assert {"demo", "dense", "moe", "rexmoe"} <= json.loads(out)["presets"].keys()


def test_convert_there_and_back_evaluates_the_same(trained, here, work, text_file):
    folder, _ = trained
    measure = ["--data", text_file, "--sequence-length", 32, "--json", "--quiet"]
    assert here("convert", folder, work / "hf", "--to", "huggingface")[0] == 0
    code, out, _ = here("convert", work / "hf", work / "native", "--to", "native", "--json")
    assert code == 0
    assert json.loads(out)["folder"] == str(work / "native")
    losses = [
        json.loads(here("eval", place, *measure)[1])["nats_per_token"]
        for place in (folder, work / "hf", work / "native")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == losses[1]


@pytest.mark.slow
def test_the_same_report_is_made_again_where_its_text_lies(trained, here, work):
    place = work / "project"
    shutil.copytree(trained[0], place / "run")
    shutil.copytree(work / "text", place / "text")
    (place / "one.py").write_text(TEXT)
    config = json.loads((place / "run/config.json").read_text())
    config["data"]["corpus"] = {"kind": "files", "paths": [str(place)], "pattern": "*.py"}
    (place / "run/config.json").write_text(json.dumps(config))
    line = ["report", place / "run", "--tokens", 256, "--quiet", "--json"]
    for out, data in (("rep", []), ("all", ["--data", place])):
        for _ in range(2):
            code, _, err = here(*line, "--out", place / out, *data)
            assert code == 0, err
    (place / "rep/load.png").unlink()
    (place / "rep/load.png").hardlink_to(place / "one.py")
    named = place / "all/summary.json"
    for out, data in (("rep", []), ("rep", ["--data", place]), ("all", ["--data", named])):
        code, _, err = here(*line, "--out", place / out, *data)
        assert (code, "would be lost" in err) == (2, True), err
    assert (place / "one.py").read_text() == TEXT


@pytest.mark.slow
def test_report_of_a_chain_says_how_passes_follow_each_other(here, work):
    trace = Path(__file__).parents[1] / "experts/saved/chain-tied.parquet"
    code, text, _ = here("report", trace, "--out", work / "chain")
    assert code == 0
    assert re.search(r"passes +again +by chance +combinations", text)
    assert re.search(r"\n *3 to 4 +100\.0% +100\.0%", text)
    code, out, _ = here("report", trace, "--out", work / "chain", "--json")
    found = json.loads(out)["passes"]
    assert code == 0
    assert [(facts["first_layer"], facts["second_layer"]) for facts in found] == [(0, 1), (1, 2), (3, 4), (4, 5)]
    assert found[0]["coactivation_EE"] == [[10, 10], [10, 10]]
    assert (work / "chain/passes.png").is_file()


def test_a_report_is_a_page_its_trace_and_numbers(trained, here, work):
    code, out, _ = here("report", trained[0], "--out", work / "small", "--tokens", 256, "--quiet", "--json")
    assert code == 0
    assert json.loads(out)["domains"] == ["alpha", "beta"]
    assert {"report.html", "trace.parquet", "summary.json"} <= {file.name for file in (work / "small").iterdir()}
    assert json.loads((work / "small/summary.json").read_text())["layers"]
    assert "MaxVio" in (work / "small/report.html").read_text()


def test_report_of_a_model_and_of_its_trace(trained, here, work):
    folder, _ = trained
    code, out, _ = here("report", folder, "--out", work / "report", "--tokens", 2048, "--json", "--quiet")
    found = json.loads(out)
    assert code == 0
    assert found["domains"] == ["alpha", "beta"]
    assert found["weights"] == {"quantize": "none", "floating_point": 1.0, "kinds": {"float32": 1.0}}
    for name in ("report.html", "trace.parquet", "load.png", "summary.json"):
        assert (work / "report" / name).stat().st_size > 0
    code, text, said = here("report", work / "report" / "trace.parquet", "--out", work / "again")
    assert code == 0, said
    assert "MaxVio" in text
    # Whoever made the trace knew its bits.
    assert "weights" not in text
    assert (work / "again" / "report.html").is_file()
    asked = [
        "report",
        work / "report/trace.parquet",
        "--out",
        work / "again",
        "--window",
        4,
        "--window",
        16,
        "--cache",
        1,
    ]
    code, out, _ = here(*asked, "--json")
    assert code == 0
    assert [(facts["window"], facts["caches"]) for facts in json.loads(out)["windows"]] == [(4, [1]), (16, [1])]
    code, text, _ = here(*asked)
    assert code == 0
    assert re.search(r"window +SRP +95% +cache +access +SCH +PLEC +LRU +LFU +fixed +Belady", text)
    code, _, err = here(*asked[:4], "--window", 99999)
    assert code == 2
    assert "a window is 99999 tokens, but the longest sequence has" in err
    # A model is not run for nothing.
    code, _, err = here("report", trained[0], "--out", work / "too-long", "--window", 99999)
    assert code == 2
    assert "a window is 99999 tokens, but the longest sequence has" in err
    assert not (work / "too-long").exists()
    for cache in (0, -1, "nan"):
        code, _, err = here("report", trained[0], "--out", work / "too-long", "--rho", cache)
        assert code == 2
        assert f"a cache is {float(cache)} times the active experts; it must be above 0" in err
    (work / "a.toml").write_text("")
    code, _, err = here("report", work / "a.toml", "--out", work / "too-long")
    assert code == 2
    assert "a.toml is a file that is neither a model (.gguf) nor a routing trace (.parquet)" in err
    assert not (work / "too-long").exists()
    # What an earlier report wrote is replaced, a trace too whose report was not finished.
    for left in ("*", "trace.parquet"):
        for file in set((work / "report").iterdir()) - set((work / "report").glob(left)):
            file.unlink()
        check_place(work / "report", trace=work / "report/trace.parquet")


def test_chat_answers_one_message(trained, here):
    folder, _ = trained
    code, out, _ = here("chat", folder, "-m", "hello", "--max-tokens", 4, "--json")
    found = json.loads(out)
    assert code == 0
    assert len(found["token_ids"]) <= 4
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"]


def test_chat_reads_lines_until_quit(trained, here, monkeypatch):
    folder, _ = trained
    lines = io.StringIO("hello\n/reset\n\nagain\n/quit\nnever\n")
    monkeypatch.setattr("sys.stdin", lines)
    code, out, err = here("chat", folder, "--max-tokens", 3, "--temperature", 0)
    assert (code, err) == (0, "")
    assert lines.read() == "never\n"
    assert out  # two answers, of bytes that may be anything


@pytest.mark.parametrize(("last", "expected"), [("/reset\nhi\n", 0), ("hi\n", 0), ("/reset\n", 0), ("", 2)])
def test_a_message_that_is_too_long_does_not_end_the_chat(trained, here, monkeypatch, last, expected):
    folder, _ = trained
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hello\n{'long ' * 2000}\n{last}"))
    code, _, err = here("chat", folder, "--max-tokens", 2)
    assert code == expected
    assert re.fullmatch(
        r"error: the conversation has \d+ tokens, and the model reads 1024; begin again with /reset, or .*\n", err
    )


def test_one_message_that_is_too_long(trained, here):
    code, out, err = here("chat", trained[0], "-m", "long " * 2000)
    assert (code, out) == (2, "")
    assert err.endswith("tokens, and the model reads 1024; shorten the message\n")


def test_converting_onto_what_is_there(trained, here, work):
    folder, _ = trained
    checkpoint = max((folder / "checkpoints").glob("step-*"))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    (work / "settings").mkdir()
    (work / "settings/config.json").write_text('{"theme": "dark"}')
    for target in (folder, checkpoint, work / "settings"):
        code, out, err = here("convert", folder, target, "--to", "native")
        assert (code, out, err.count("\n")) == (2, "", 1)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    (work / "settings/thesis.txt").write_text("years of work")
    (work / "settings/gone").symlink_to("nowhere")
    code, _, _ = here("convert", folder, work / "settings", "--to", "huggingface", "--force")
    assert code == 0
    assert (work / "settings/thesis.txt").read_text() == "years of work"
    assert json.loads((work / "settings/config.json").read_text())["hidden_size"] == 32


def test_convert_says_what_it_quantised(trained, here, work):
    folder, _ = trained
    code, out, _ = here("convert", folder, work / "few", "--to", "native", "--quantize", "int4")
    assert code == 0
    assert re.search(r"parameters as native, \d+ matrices in int4 and 1 matrix in int8\n", out)
    code, out, _ = here("convert", work / "few", work / "few-again", "--to", "native", "--json")
    assert json.loads(out)["quantized_layers"]["int8"] == 1


def test_resume_ends_where_an_uninterrupted_run_does(trained, cli, work, tiny, data):
    whole, done = trained
    shutil.copytree(whole, work / "half")
    shutil.rmtree(max((work / "half" / "checkpoints").glob("step-*")))  # as if killed between step 10 and 20
    resumed = cli("train", "--out", "half", "--resume", "--quiet", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr == ""
    found, expected = json.loads(resumed.stdout), json.loads(done.stdout)
    assert found["bits_per_byte"] == expected["bits_per_byte"]
    assert found["sample"] == expected["sample"]


@pytest.fixture
def train(here, tiny, data):
    """Run ``train`` with arguments and what ``--json`` printed, or the error."""

    def run(*arguments):
        code, out, err = here("train", *arguments, "--steps", 12, "--json", "--quiet", *tiny, *data)
        return json.loads(out) if code == 0 else err

    return run


def test_one_line_starts_a_run_and_goes_on_with_it(train, work):
    line = ["--out", "queued", "--seed", 3]
    first = train("demo", "--resume", "auto", *line)
    assert first["step"] == 12
    kept, last = (work / "queued/checkpoints" / name for name in ("step-00000010", "step-00000012"))
    before = kept.stat().st_ino
    shutil.rmtree(last)  # as if the machine went away behind step 10
    again = train("demo", "--resume=auto", *line)
    assert (again["step"], again["bits_per_byte"]) == (12, first["bits_per_byte"])
    assert kept.stat().st_ino == before
    assert "train.seed was 3 and is now 4" in train("demo", "--resume", "auto", *line, "--seed", 4)
    assert "cannot resume queued with another config" in train("--resume=auto", *line, "--size", "small")
    assert "holds a run whose layers are 'rexmoe'" in train("dense", "--resume=auto", *line)


@pytest.mark.slow
def test_a_restart_by_torchrun_goes_on_with_its_own_run_and_no_other(train, work, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    line = ["demo", "--out", "elastic"]
    assert train(*line)["step"] == 12
    refused = "elastic already holds a run (config.json); resume it with --resume"
    assert refused in (told := train(*line))
    assert "--resume auto" in told
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(*line)["step"] == 12
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another job")
    assert refused in train(*line)


def test_every_node_of_a_torchrun_without_a_name_knows_its_run(tmp_path, monkeypatch):
    from anabranch.train import run

    def started(restart, node, agent, port):
        at = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "first", "MASTER_PORT": port}
        for name, value in {**at, "TORCHELASTIC_RESTART_COUNT": restart, "GROUP_RANK": node}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(run.os, "getppid", lambda: agent)

    started(0, 0, 7, 29500)
    run.prepare(tmp_path, run.RunConfig())
    # By hand: restarts, node, agent, port. The first node's agent lives through restarts; another's has another number.
    for case, known in {
        (1, 0, 7, 29500): True,
        (1, 1, 9, 29500): True,
        (1, 0, 8, 29500): False,
        (1, 1, 9, 29501): False,
        (0, 0, 7, 29500): False,
        (0, 1, 9, 29500): False,
    }.items():
        started(*case)
        assert run.is_restart(tmp_path) is known, case
    started(1, 1, 9, "")
    assert not run.is_restart(tmp_path)
    # As a version before wrote it.
    (tmp_path / ".run.torchrun").write_text((tmp_path / ".run.torchrun").read_text().partition("\n")[0])
    assert not run.is_restart(tmp_path)
    started(1, 0, 7, 29500)
    assert run.is_restart(tmp_path)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process(cli, work, environment, tiny, data):
    psutil = pytest.importorskip("psutil")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--max-restarts", "1", "-m"]
    line = ["anabranch", "train", "demo", "--out", "killed", "--steps", "400", "--json", "--quiet", *tiny, *data]
    with open(work / "killed.json", "w") as out:
        process = subprocess.Popen(
            [*start, *line], cwd=work, env=environment, stdout=out, stderr=subprocess.PIPE, text=True
        )
    while not list((work / "killed").glob("checkpoints/step-*/trainer.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    [worker] = psutil.Process(process.pid).children()
    worker.kill()
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert json.loads((work / "killed.json").read_text())["step"] == 400


def test_interrupt_saves_and_resume_finishes(cli, work, environment, tiny, data):
    command = [sys.executable, "-m", "anabranch.cli.main", "train", "demo", "--out", "stopped", "--steps", "4000"]
    process = subprocess.Popen(
        [*command, *tiny, *data], cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list((work / "stopped").glob("checkpoints/step-*/trainer.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "anabranch train --out stopped --resume" in out
    stopped = int(max((work / "stopped" / "checkpoints").glob("step-*")).name.removeprefix("step-"))
    done = cli("train", "--out", "stopped", "--resume", "--steps", stopped + 3, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == stopped + 3


def test_output_may_be_cut_off(work, environment):
    command = f"{sys.executable} -m anabranch.cli.main info | head -n 1"
    done = subprocess.run(command, shell=True, cwd=work, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("preset")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("text", "settings", "problem"),
    [
        pytest.param(
            TEXT,
            ["--set=model.feed_forward.router.select.kind=expert_choice"],
            "this model routes by looking at later tokens (expert_choice), so it cannot generate",
            id="expert_choice",
        ),
        pytest.param(
            "a",
            ["--set=data.validation_fraction=0", "--set=data.sequence_length=1"],
            "nothing to predict: there are fewer than two tokens; give more text, or a larger validation_fraction",
            id="one_byte",
        ),
    ],
)
def test_a_sample_that_cannot_be_drawn_does_not_fail_the_run(here, tmp_path, tiny, text, settings, problem):
    (tmp_path / "text.txt").write_text(text)
    corpus = ["--set=data.corpus.kind=files", f'--set=data.corpus.paths=["{tmp_path}/text.txt"]']
    arguments = ["train", "moe", "--steps", 2, "--quiet", *tiny, *corpus, *settings]
    code, out, err = here(*arguments, "--out", tmp_path / "json", "--json")
    assert (code, err) == (0, f"sample  none: {problem}\n")
    found = json.loads(out)
    assert (found["status"], found["sample"]["text"]) == ("finished", "")
    assert Path(found["checkpoint"]).is_dir()
    code, out, err = here(*arguments, "--out", tmp_path / "said")
    assert (code, err) == (0, f"sample  none: {problem}\n")
    assert out.splitlines()[-1] == f"next    anabranch eval {tmp_path / 'said'}"


def test_weights_that_are_no_numbers_do_not_fail_the_run(here, tmp_path, tiny, data, monkeypatch):
    """Diverged in the very last step, which no later gradient shows."""
    from anabranch.train import Trainer

    fit = Trainer.fit

    def diverge(trainer):
        result = fit(trainer)
        trainer.model.embedding.weight.data.fill_(math.nan)
        return result

    monkeypatch.setattr(Trainer, "fit", diverge)
    code, out, err = here("train", "moe", "--steps", 1, "--out", tmp_path / "run", "--quiet", "--json", *tiny, *data)
    assert code == 0
    assert json.loads(out)["status"] == "finished"
    assert err.startswith("sample  none: ")
    assert err.count("\n") == 1


def started(work, environment, out, *arguments, **options):
    """A training in a process of its own, at its first checkpoint."""
    command = [sys.executable, "-m", "anabranch.cli.main", "train", "demo", "--out", out, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process = subprocess.Popen(command, cwd=work, env=environment, text=True, **options)
    while not list((work / out).glob("checkpoints/step-*/trainer.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_a_second_training_in_one_folder_is_refused_until_the_first_is_gone(cli, work, environment, tiny, data):
    first = started(work, environment, "shared", "--steps", 100_000, *tiny, *data)
    try:
        first.send_signal(signal.SIGSTOP)  # it holds what it holds, and leaves the processor to the others
        for more in (["--resume"], [*tiny, *data]):
            second = cli("train", "--out", "shared", *more)
            assert (second.returncode, second.stdout) == (2, "")
            expected = "another process is training in shared; wait for it, stop it, or choose another folder"
            assert second.stderr == f"error: {expected}\n"
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate(timeout=60)
    step = int(max((work / "shared" / "checkpoints").glob("step-*")).name.removeprefix("step-"))
    done = cli("train", "--out", "shared", "--resume", "--steps", step + 12, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == step + 12


@pytest.mark.slow
def test_a_cache_that_is_deleted_under_a_run_is_not_missed(cli, work, environment, tiny, data):
    options = ["--steps", 60, "--seed", 3, "--json", *tiny, *data]
    own = {**environment, "ANABRANCH_CACHE": str(work / "own-cache")}
    process = started(work, own, "no-cache", *options)
    shutil.rmtree(work / "own-cache")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    expected = json.loads(cli("train", "demo", "--out", "with-cache", *options).stdout)
    assert json.loads(out)["bits_per_byte"] == expected["bits_per_byte"]


def test_train_stops_early_and_its_model_is_the_best(here, work, tiny, data, monkeypatch):
    from anabranch.lm.checkpoint import find_model
    from anabranch.train import LanguageModel

    real = LanguageModel.evaluate

    def evaluate(self, model, data, context):
        told = {2: 3.0, 4: 2.5, 6: 2.75, 8: 2.5}
        return real(self, model, data, context) | {"nats_per_token": told[context.step]}

    monkeypatch.setattr(LanguageModel, "evaluate", evaluate)
    line = ["train", "demo", "--out", "early", "--steps", 20, *tiny, *data, "--set=train.eval_every=2"]
    code, out, err = here(*line, "--patience", 2, "--keep-best", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["step"], told["steps"], told["stopped_early"]) == (8, 20, True)
    assert (told["best_step"], told["written_step"], told["nats_per_token"]) == (4, 4, 2.5)
    assert told["checkpoint"].endswith("step-00000008")
    assert "step  4/20" in err
    assert ", the best so far" in err
    assert ", the best was step 4: training ends here" in err
    assert find_model(work / "early").name == "best-00000004"
    code, out, err = here("train", "--out", "early", "--resume")
    assert code == 0, err
    assert "early, at step 8: of its evaluations none since step 4 was better; written is step 4" in out
    assert "best-00000004" in out
    code, _, err = here(*line[:2], "--out", "refused", "--patience", 2, "--set=train.eval_every=none")
    assert code == 2
    assert "train.patience is 2, and eval_every is None" in err
    assert not (work / "refused").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_pipe_does_not_end_a_training(work, environment, tiny, data, stream):
    code = "import anabranch.cli.progress as p; p.PLAIN_EVERY_S = 0; from anabranch.cli.main import main; import sys; sys.exit(main())"
    options = ["--set=train.log_every=1", "--set=train.eval_every=5", *tiny, *data]
    command = [sys.executable, "-c", code, "train", "demo", "--out", f"no-{stream}", "--steps", "30", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=work, env=environment, text=True, **pipes) as process:
        getattr(process, stream).close()
        told = (process.stderr if stream == "stdout" else process.stdout).read()
    assert process.returncode == 0, told
    assert "Traceback" not in told
    assert "Exception ignored" not in told
    assert (work / f"no-{stream}" / "checkpoints" / "step-00000030" / "trainer.json").is_file()
    if stream == "stderr":
        assert "30 of 30 steps" in told


def test_a_display_that_fails_is_let_go(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Gone())
    monkeypatch.setattr("anabranch.cli.output.let_go", lambda stream: None)
    monkeypatch.setattr("anabranch.cli.progress.let_go", lambda stream: None)
    with Progress(10, "step") as progress:
        for step in range(1, 11):
            progress.update(step, "text")
            progress.note("text")
        progress.set_total(11)
    say("text")
    fact("label", "text", to=sys.stderr)


def test_info_tells_a_model_that_is_cut_off(trained, here, work):
    shutil.copytree(max((trained[0] / "checkpoints").glob("step-*")), work / "cut")
    file = work / "cut/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, out, err = here("info", work / "cut")
    assert (code, out) == (2, "")
    assert "cut/model.safetensors" in err
    assert "truncated or corrupt" in err
    file.unlink()  # a config alone is enough for counting
    assert here("info", work / "cut")[0] == 0


def test_what_a_converted_model_is_measured_on_is_said(trained, here, work, text_file):
    here("convert", trained[0], work / "moved", "--to", "native")
    command = ["eval", work / "moved", "--data", text_file]
    length = min(load_config(work / "moved").max_positions, 1024)
    start = f"note: {work / 'moved'} is no training run: windows of {length} tokens of {text_file}; choose"
    assert start in here(*command)[2]
    assert "note" not in here(*command, "--sequence-length", 32)[2]
    assert "note" not in here("eval", trained[0], "--tokens", 256)[2]


def test_a_report_has_no_place_in_a_file(here, text_file):
    code, _, err = here("report", "no model at all", "--out", text_file)
    assert (code, err) == (2, f"error: {text_file} is a file, and a report is a folder; choose another name\n")


@pytest.mark.parametrize("name", ["load.png", "report.html", "summary.json", "trace.parquet"])
def test_a_report_replaces_nothing_that_is_of_no_report(here, work, name):
    (work / f"own-{name}").mkdir()
    mine = work / f"own-{name}" / name
    mine.write_text('{"title": "mine"}')
    code, _, err = here("report", "no model at all", "--out", mine.parent)
    expected = f"error: {mine} is there and of no report, so it is not replaced; choose another folder\n"
    assert (code, err, mine.read_text()) == (2, expected, '{"title": "mine"}')


def test_a_run_starts_from_a_trained_model_and_goes_on_without_naming_it(here, tmp_path, tiny, data):
    sizes = [option for option in tiny if not option.startswith("--set=model.")]
    small = [*tiny, "--steps", 2, "--quiet", "--json", *data]
    assert here("train", "moe", "--out", tmp_path / "plain", *small)[0] == 0
    from_plain = ["--from", tmp_path / "plain", "--steps", 2, *sizes, *data]
    code, out, err = here("train", "rexmoe", "--out", tmp_path / "grown", "--json", *from_plain)
    assert code == 0
    assert re.search(r"^kept +of the model: .*dim 32, not 128; ", err, re.MULTILINE)
    assert json.loads(out)["step"] == 2
    held = json.loads((tmp_path / "grown/config.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", held["start"].pop("digest"))
    assert held["start"] == {"model": str(tmp_path / "plain"), "recipe": ["from_vanilla"], "learns": None}
    assert (held["model"]["dim"], held["model"]["feed_forward"]["kind"]) == (32, "rexmoe")
    code, out, _ = here("train", "--out", tmp_path / "grown", "--resume", "--steps", 3, "--quiet", "--json")
    assert (code, json.loads(out)["step"]) == (0, 3)
    code, _, err = here("train", "--out", tmp_path / "grown", "--resume", "--from", "elsewhere")
    assert code == 2
    assert "--from is 'elsewhere', but the run in" in err
    code, _, err = here("train", "versatile", "--out", tmp_path / "none", *from_plain)
    assert code == 2
    assert "from_dense starts from a dense model of 'swiglu' or 'mlp' layers" in err
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_experts_beside_a_trained_model_learn_and_it_stays(here, tmp_path, tiny, data):
    """`train dynmole --from`: the base to the bit, its experts another; the run goes on, is measured, and generates."""
    sizes = [option for option in tiny if not option.startswith("--set=model.")]
    small = [*tiny, "--steps", 2, "--quiet", "--json", *data]
    assert here("train", "dense", "--out", tmp_path / "plain", *small)[0] == 0
    begun = ["--from", tmp_path / "plain", "--steps", 2, "--quiet", "--json", *sizes, *data]
    assert here("train", "dynmole", "--out", tmp_path / "experts", *begun)[0] == 0
    held = json.loads((tmp_path / "experts/config.json").read_text())
    assert (held["start"]["recipe"], held["start"]["learns"]) == (["added_layers"], ".beside.")
    assert held["model"]["linears"]["blocks.*.feed_forward.up"]["router"]["select"]["kind"] == "hybrid_entropy"
    assert here("train", "--out", tmp_path / "experts", "--resume", "--steps", 3, "--quiet")[0] == 0
    base, made = (load_model(tmp_path / name)[0].state_dict() for name in ("plain", "experts"))
    for name, value in base.items():
        owner, _, leaf = name.rpartition(".")
        assert torch.equal(made.get(name, made.get(f"{owner}.matrix.{leaf}")), value), name
    assert any(value.any() for name, value in made.items() if name.endswith("pool.b"))
    assert here("generate", tmp_path / "experts", "--prompt", "def", "--max-tokens", 4)[0] == 0
    code, _, err = here("train", "lora-mixer", "--out", tmp_path / "none", "--from", tmp_path / "experts", *begun[2:])
    assert code == 2
    assert "already, and not as the design wants it; start from its base" in err
    assert not (tmp_path / "none").exists()


def test_a_report_at_windows_and_caches_is_the_measures_of_its_trace(trained, here, work, text_file, caplog):
    folder, _ = trained
    sizes = ["--m", 4, "--window", 16, "--m", 99, "--rho", 1, "--cache", 1.5]
    asked = ["--data", text_file, "--sequence-length", 32, "--predictions", "--scores", "--quiet"]
    code, out, _ = here("report", folder, "--out", work / "windows", *asked, *sizes, "--json")
    assert code == 0
    assert "a window of 99 tokens is left out: the longest sequence has 32" in caplog.messages
    found, trace = json.loads(out), RoutingTrace.read(work / "windows/trace.parquet")
    assert [facts["window"] for facts in found["windows"]] == [4, 16]
    for facts in found["windows"]:
        window = facts["window"]
        assert facts["srp"] == pytest.approx(float(consistency.srp(trace, window, "model").value))
        assert facts["srp_interval"] == pytest.approx(srp_interval(trace, window, "model").tolist())
        for cold, hits in (("miss", facts["hits"]), ("free", facts["hits_free"])):
            # The layers of the preset share a pool, and a pool has one cache.
            sch = consistency.sch(pool_routes(trace), window, cold=cold)
            assert hits["segment"] == pytest.approx([sch.at_ratio(rho).mean() for rho in (1, 1.5)])
    first, decisions = found["layers"][0], trace.decisions(0)
    for name, token_N in (
        ("vocabulary_specialization", decisions.token_N),
        ("next_token_specialization", measure.next_tokens(decisions)),
        ("predicted_token_specialization", decisions.predicted_N),
    ):
        value_E = measure.vocabulary_specialization(token_N, decisions.index_NK, first["num_destinations"])
        assert first[name] == pytest.approx(np.nanmean(value_E)), name
    assert first["score_entropy_bits"] == pytest.approx(measure.routing_entropy(decisions.score_NE).mean())
    model, _ = load_model(folder)
    token_L = torch.tensor(decisions.token_N[decisions.item_N == 2])
    expected_L = model(token_L[None]).logits_BLV[0].argmax(-1)
    assert decisions.predicted_N[decisions.item_N == 2].tolist() == expected_L.tolist()
    code, again, said = here("report", work / "windows/trace.parquet", "--out", work / "windows-again", *sizes)
    assert code == 0, said
    assert "by the one" in again
    assert re.search(r"window of 16 tokens: consistency of group \d of 4 \(.*16 tokens\); SCH ", again)
    assert "window of 4 tokens: SCH" in again


class Rows(HTMLParser):
    """The cells of each row of a page, without spaces, and its text."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.text, self.is_cell = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.is_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.is_cell = self.is_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.is_cell:
            self.rows[-1][-1] += data.replace(" ", "")


def numbers(value):
    """All numbers that a JSON value holds."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [found for one in value for found in numbers(one)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


@pytest.mark.slow
def test_what_the_terminal_shows_of_a_report_is_in_its_folder(trained, here, work, text_file):
    folder, _ = trained
    asked = ["--window", 4, "--window", 16, "--cache", 1, "--cache", 1.5, "--balance-audit", "--predictions", "--quiet"]
    code, out, _ = here("report", folder, "--out", work / "whole", "--data", text_file, "--sequence-length", 32, *asked)
    assert code == 0
    page = Rows((work / "whole/report.html").read_text(encoding="utf-8"))
    facts = json.loads((work / "whole/summary.json").read_text())
    held = {f"{number:{form}}" for number in numbers(facts) for form in ("g", ",", ".2f", ".3f", ".4f", ".1%")}
    lines = [line.split() for line in out.splitlines()]
    tables = [line for line in lines if line and re.fullmatch(r"[\d.,]+", line[0]) and len(line) > 3]
    assert len(tables) == 2 + 2 + 2 * 2 * 2 + 2  # layers, details, windows x caches x rules, audits
    for line in tables:
        row = "".join(line)
        assert any(is_within(line, cells) for cells in page.rows), line
        assert [word for word in line if re.fullmatch(r"-?[\d.,]+%?", word) and word not in held] == [], row
    sentences = [line[8:] for line in out.splitlines() if line.startswith(" " * 8) and line.endswith(".")]
    assert len(sentences) > 5
    assert sentences == facts["text"]
    assert [sentence for sentence in sentences if sentence not in page.text] == []
    for heading in ("PLEC", "LFU", "prefilled fixed", "by the one predicted", "score over optimum", "95%"):
        assert any(heading.replace(" ", "") in cells for cells in page.rows), heading
    assert [len(facts[name]) for name in ("windows", "balance_audit")] == [2, 2]
    assert (work / "whole/windows.png").read_bytes().startswith(b"\x89PNG")


def is_within(words, cells):
    """Whether a line's words are some of a row's cells, in this order; a cell may take several words."""
    at = 0
    for cell in cells:
        for end in range(at + 1, len(words) + 1):
            if "".join(words[at:end]) == cell:
                at = end
                break
    return at == len(words)


@pytest.mark.slow
def test_a_short_run_balanced_by_signs_is_told_of_what_suits_it(here, tmp_path, tiny, data):
    line = ["train", "moe-lossfree", "--steps", 2, *tiny, *data]
    code, _, err = here(*line, "--out", tmp_path / "signs")
    assert code == 0
    setting = "model.feed_forward.router.balance.0.rule=quantile"
    told = f"2 steps of signs move a bias by 0.002 at most, and it may have to go 0.3: consider --set {setting}"
    assert re.search(rf"^note +{re.escape(told)}$", err, re.MULTILINE)
    code, _, err = here(*line, "--out", tmp_path / "quantiles", "--set", setting)
    assert (code, "note " in err) == (0, False)


@pytest.mark.slow
def test_an_audit_of_balance_on_a_model_and_on_its_trace(here, tmp_path, tiny, data):
    line = ["train", "moe-lossfree", "--out", tmp_path / "run", "--steps", 3, "--quiet", *tiny, *data]
    assert here(*line)[0] == 0
    asked = ["--tokens", 512, "--quiet", "--balance-audit", "--json"]
    code, out, _ = here("report", tmp_path / "run", "--out", tmp_path / "report", *asked)
    assert code == 0
    of_model = json.loads(out)["balance_audit"]
    assert [facts["has_bias"] for facts in of_model] == [True, True]
    assert [facts["preference_violations"] for facts in of_model] == [0, 0]
    trace = tmp_path / "report/trace.parquet"
    code, text, _ = here("report", trace, "--out", tmp_path / "again", "--balance-audit")
    assert code == 0
    assert "optimum" in text
    assert RoutingTrace.read(trace).decisions(0).score_NE is not None
