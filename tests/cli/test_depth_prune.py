"""``anabranch depth prune``, ``prune-eval`` and ``redundancy``: from questions and a model to a skipper and what it costs."""

import io
import itertools
import json

import pytest
import torch

from anabranch.cli.depth.prune import UNFINISHED
from anabranch.cli.output import visible
from anabranch.data import ByteTokenizer
from anabranch.depth.ftp import TokenSkipper, evaluate_items, evaluate_path
from anabranch.depth.stack import stack_of
from anabranch.lm import Decoder, load_model, save_model
from anabranch.nn import SelfAttention, SwiGLU

SMALL = ("--steps", 2, "--generations", 1, "--set", "schedule.genetic.population=3", "--quiet")


@pytest.fixture(scope="module")
def pruned(work):
    """A folder of a model with 4 blocks that matter."""
    config = Decoder.Config(
        dim=16,
        num_layers=4,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=24),
        max_positions=128,
        init_std=0.3,
    )
    save_model(work / "pruned", config.build(seed=0), ByteTokenizer())
    return "pruned"


@pytest.fixture(scope="module")
def rows(work):
    made = [{"prompt": f"{number} plus {number * 7} is", "answer": f" {number * 8}"} for number in range(4)]
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return "prompts.jsonl"


def told(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


_TOLD = {}


@pytest.fixture
def fitted(here, work, pruned, rows):
    """What fitting told; the file is ``skipper``, made once."""
    if not _TOLD:
        _TOLD.update(
            told(here("depth", "prune", pruned, rows, "--sparsity", 0.4, "--out", "skipper", *SMALL, "--json"))
        )
    return _TOLD


def test_a_fit_makes_one_small_file_that_is_measured(here, work, pruned, rows, fitted):
    assert fitted["items"] == 4
    assert fitted["sparsity"] == pytest.approx(0.4, abs=1e-9)
    assert fitted["schedule"][0] == 0
    assert fitted["bytes"] == (work / "skipper").stat().st_size < 10_000
    assert fitted["searched"]["loss"] <= fitted["searched"]["initial"]["uniform"]
    assert fitted["tuned"][0]["loss"] <= fitted["tuned"][0]["before"]
    assert not (work / f"skipper{UNFINISHED}").exists()

    found = told(here("depth", "prune-eval", pruned, "skipper", "--data", rows, "--json"))["contestants"]
    assert list(found) == ["dense", "ours", "searched", "static", "random", "truncation", "shortgpt"]
    model, _ = load_model(work / pruned)
    skipper = TokenSkipper.load(work / "skipper", model.eval())
    items = [(list(f"{n} plus {n * 7} is".encode()), list(f" {n * 8}".encode())) for n in range(4)]
    ours, dense = evaluate_items(skipper, items), evaluate_path(stack_of(model), items)
    assert found["ours"]["nats_per_token"] == pytest.approx(ours.nats_per_token)
    assert found["ours"]["gap"] == pytest.approx(ours.nats_per_token - dense.nats_per_token)
    assert found["ours"]["block_flops_saved"] == pytest.approx(ours.saved)
    assert found["dense"]["agreement"] == 1
    assert found["shortgpt"]["block_flops"] >= found["ours"]["block_flops"]
    alone = told(here("depth", "prune-eval", pruned, "skipper", "--data", rows, "--no-baselines", "--json"))[
        "contestants"
    ]
    assert alone == {name: found[name] for name in ("dense", "ours")}


def test_what_people_read(here, pruned, rows, fitted):
    code, out, err = here("depth", "prune-eval", pruned, "skipper", "--data", rows)
    assert code == 0, err
    assert "nats/token" in out
    assert "shortgpt" in out
    code, out, err = here("depth", "prune", pruned, rows, "--router", "static", "--out", "places", *SMALL)
    assert code == 0, err
    assert "places alone" in out
    assert "anabranch depth prune-eval pruned places" in out
    code, out, err = here("depth", "redundancy", pruned, rows)
    assert code == 0, err
    assert "mean cos" in out
    assert "> 0.95" in out
    found = told(here("depth", "redundancy", pruned, "--data", rows, "--json"))
    assert len(found["share"]) == len(found["mean_cosine"]) == 4


def test_windows_of_a_text_do_as_well(here, work, pruned):
    (work / "pruned.txt").write_text("def total(values):\n    return sum(values)\n" * 20)
    found = told(
        here(
            "depth",
            "prune",
            pruned,
            "pruned.txt",
            "--context",
            20,
            "--limit",
            4,
            "--out",
            "by-text",
            *SMALL,
            "--mode",
            "threshold",
            "--kv",
            "keep",
            "--json",
        )
    )
    assert 1 <= found["items"] <= 4
    model, _ = load_model(work / pruned)
    skipper = TokenSkipper.load(work / "by-text", model)
    assert (skipper.mode, skipper.kv) == ("threshold", "keep")


def test_a_stopped_fit_goes_on_and_finds_the_same(here, work, pruned, rows, fitted, monkeypatch):
    before = (work / "skipper").read_bytes()
    from anabranch.depth.ftp import search

    real, calls = search.calibration_loss, []

    def stops(skipper, items):
        calls.append(skipper)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(skipper, items)

    line = ("depth", "prune", pruned, rows, "--sparsity", 0.4, "--out", "pruned-again", *SMALL)
    monkeypatch.setattr(search, "calibration_loss", stops)
    assert here(*line)[0] == 130
    unfinished = work / f"pruned-again{UNFINISHED}"
    assert len(unfinished.read_text().splitlines()) == 3
    # Half a line, as of a process that was killed.
    with unfinished.open("a") as file:
        file.write('{"stage": "sea')
    other = here(*line, "--seed", 5)
    assert other[0] == 2
    assert "unfinished fit of another model, other data or other settings" in other[2]
    monkeypatch.setattr(search, "calibration_loss", lambda *given: calls.append(given) or real(*given))
    assert here(*line)[0] == 0
    assert len(calls) - 3 == fitted["evaluations"] - 2
    assert (work / "pruned-again").read_bytes() == before
    assert not unfinished.exists()


def test_a_line_that_was_refused_leaves_nothing_behind(here, work, pruned, rows):
    line = ("depth", "prune", pruned, rows, "--out", "refused", *SMALL)
    # Three of four blocks may pass over 0.9 at most.
    code, _, err = here(*line, "--sparsity", 0.89)
    assert (code, "a mean sparsity of 0.89 over 4 blocks cannot be" in err) == (2, True), err
    unfinished = work / f"refused{UNFINISHED}"
    assert not unfinished.exists()
    # A head without a measurement, as earlier versions left it, keeps nothing.
    unfinished.write_text('{"kind": "anabranch fit of a token skipper", "digest": "another"}\n')
    assert here(*line, "--sparsity", 0.3)[0] == 0
    assert not unfinished.exists()


@pytest.mark.parametrize("content", ["my paper", ""])
def test_a_file_of_something_else_is_not_replaced(here, work, pruned, rows, content):
    (work / "paper.pdf").write_text(content)
    code, _, err = here("depth", "prune", pruned, rows, "--out", "paper.pdf", *SMALL)
    assert (code, "paper.pdf is there and holds no skipper of tokens, so it is not replaced" in err) == (2, True), err
    assert (work / "paper.pdf").read_text() == content


def test_a_damaged_unfinished_fit_is_told(here, work, pruned, rows):
    for content in ("", "x", "[]", '{"kind": "other"}\n'):
        (work / f"bad{UNFINISHED}").write_text(content)
        code, _, err = here("depth", "prune", pruned, rows, "--out", "bad", *SMALL)
        assert code == 2
        assert "no unfinished fit" in err
    assert not (work / "bad").exists()


def test_a_skipper_of_another_model_is_told(here, work, pruned, rows, fitted):
    model, tokenizer = load_model(work / pruned)
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    save_model(work / "other-pruned", model, tokenizer)
    code, _, err = here("depth", "prune-eval", "other-pruned", "skipper", "--data", rows)
    assert code == 2
    assert "fit one on this model" in err


def test_generate_passes_over_what_a_skipper_says(here, work, pruned, rows, fitted):
    model, tokenizer = load_model(work / pruned)
    skipper = TokenSkipper.load(work / "skipper", model.eval())
    text = "3 plus 21 is"
    options = ("-p", text, "--max-tokens", 6, "--temperature", 0, "--dtype", "float32", "--json")
    found = told(here("generate", pruned, *options, "--skipper", "skipper"))
    prompt = tokenizer.encode_prompt(text)
    assert found["token_ids"] == skipper.generate(prompt, 6)[: len(found["token_ids"])]
    computed = skipper.prefill(prompt).keep_IBL[:, 0].sum(1).tolist()
    assert found["depth"]["computed"] == computed
    assert sum(computed) < 4 * len(prompt)
    code, out, err = here("generate", pruned, *options, "--skipper", "none")
    assert (code, out) == (2, "")
    assert "none is not there; anabranch depth prune makes one" in err


def test_chat_passes_over_what_a_skipper_says_of_the_conversation(here, work, pruned, rows, fitted, monkeypatch):
    model, tokenizer = load_model(work / pruned)
    skipper = TokenSkipper.load(work / "skipper", model.eval())
    options = ("--max-tokens", 6, "--temperature", 0, "--dtype", "float32", "--skipper", "skipper")

    def prompt_of(*texts):
        names = itertools.cycle(("user", "assistant"))
        messages = [{"role": name, "content": text} for name, text in zip(names, texts, strict=False)]
        return tokenizer.encode_chat(tokenizer.apply_chat_template(messages))

    def answered(*texts):
        """The tokens of the skipper's answer, up to what ends it."""
        made = skipper.generate(prompt_of(*texts), 6)
        return list(itertools.takewhile(lambda token: token not in tokenizer.stop_ids, made))

    asked = next(text for text in map(str, range(50)) if len(answered(text)) > 3)
    text = tokenizer.decode(answered(asked))
    more = next(other for other in map(str, range(50)) if len(answered(asked, text, other)) > 3)
    found = told(here("chat", pruned, "-m", asked, "--json", *options))
    prompt = prompt_of(asked)
    assert (found["token_ids"], found["text"]) == (answered(asked), text)
    assert found["depth"]["computed"] == skipper.prefill(prompt).keep_IBL[:, 0].sum(1).tolist()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{asked}\n{more}\n"))
    code, out, err = here("chat", pruned, *options)
    assert (code, err) == (0, "")
    assert out == f"{visible(text)}\n{visible(tokenizer.decode(answered(asked, text, more)))}\n"
    code, out, err = here("chat", pruned, "-m", "x", *options[:-1], "none")
    assert (code, out) == (2, "")
    assert "none is not there; anabranch depth prune makes one" in err
