"""``anabranch eval --rewire``: the numbers of the library, of what follows each phase, told and as JSON."""

import json
from types import SimpleNamespace

import pytest
import torch

from anabranch.adapters.rewiring import Rerouter, Rewiring
from anabranch.adapters.rewiring.scored import Comparison
from anabranch.cli.corpora import windows_of
from anabranch.cli.rewired_eval import compare, show
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError
from anabranch.lm import Decoder, load_model, save_model
from anabranch.nn import MoE, SelfAttention

SETTINGS = ["--rewire", *(f"--rewire-set={one}" for one in ("interval=16", "steps=2", "eta=0.5", "least_tail=4"))]
CONFIG = Rewiring(interval=16, steps=2, eta=0.5, least_tail=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("rewired_eval")
    body = {"dim": 16, "num_layers": 2, "attention": SelfAttention.Config(num_heads=2), "init_std": 0.4}
    layer = MoE.Config(num_experts=4, hidden_dim=16)
    save_model(place / "moe", Decoder.Config(**body, feed_forward=layer).build(seed=0), ByteTokenizer())
    save_model(place / "dense", Decoder.Config(**body).build(seed=0), ByteTokenizer())
    (place / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 20 + "It was the best of times. " * 20)
    return place


def without_time(told):
    return {name: value for name, value in told.items() if name != "seconds"}


def test_it_is_what_the_library_measures(folder, here):
    line = ["eval", folder / "moe", "--data", folder / "text.txt", "--sequence-length", 64, *SETTINGS, "--quiet"]
    code, out, err = here(*line, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)["rewiring"]
    model, tokenizer = load_model(folder / "moe")
    rerouter, found = Rerouter(model, CONFIG), Comparison()
    windows, _ = windows_of(str(folder / "text.txt"), None, tokenizer, 64)
    for batch in windows:
        if batch.token_BL.shape[1] > 16:
            found.add(rerouter.score(batch.token_BL, first=16))
    assert {name: told[name] for name in found.to_dict() if name != "seconds"} == without_time(
        json.loads(json.dumps(found.to_dict()))
    )
    assert told["after"] == 16
    assert told["settings"]["steps"] == 2
    # The text ends with a window of seven tokens.
    assert told["tokens"] == told["texts"] * 48
    assert told["too_short"] == 1
    assert [phase["read"] for phase in told["phases"]] == [16, 32, 48]
    assert told["standard_error"] > 0
    assert sum(told["phases"][0]["kept"].values()) == told["texts"]
    code, out, err = here(*line)
    assert (code, err) == (0, "")
    row = next(text.split() for text in out.splitlines() if text.startswith("all "))
    assert row[1:4] == [f"{told['plain']:.4f}", f"{told['rewired']:.4f}", f"{told['difference']:+.4f}"]
    assert "behind 16 tokens of each window, and again after each 16: 2 steps of 0.5" in out


def test_where_it_begins_and_what_was_left_out(folder, here):
    line = ["eval", folder / "moe", "--data", folder / "text.txt", "--sequence-length", 64, "--quiet", *SETTINGS]
    code, out, _ = here(*line, "--rewire-set=interval=none", "--json")
    told = json.loads(out)["rewiring"]
    assert (code, told["after"], told["tokens"]) == (0, 32, told["texts"] * 32)
    (folder / "short.txt").write_text("so short a text")
    code, _, err = here("eval", folder / "moe", "--data", folder / "short.txt", "--sequence-length", 64, *SETTINGS)
    assert (code, "the longest text has 14 tokens, of which 16 are read" in err) == (2, True)
    code, out, _ = here(*line, "--rewire-set=interval=none", "--rewire-after", 60, "--json")
    told = json.loads(out)["rewiring"]
    assert (code, [phase["read"] for phase in told["phases"]]) == (0, [60])
    code, out, _ = here(*line, "--rewire-set=most_steps=2")
    assert code == 0
    assert "times: the request has taken its 2 steps (most_steps)" in out
    # A budget of experts, of which five fit.
    code, out, err = here(*line, "--expert-budget", "16KiB", "--tokens", 200, "--json")
    assert (code, err) == (0, "")
    few = json.loads(out)["rewiring"]
    code, out, _ = here(*line, "--tokens", 200, "--json")
    assert json.loads(out)["rewiring"]["rewired"] == pytest.approx(few["rewired"], abs=1e-5)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rewire-after", 3], "--rewire-after is given, but --rewire is not; give both"),
        (["--rewire-set", "steps=3"], "--rewire-set is given, but --rewire is not"),
        (
            ["--rewire"],
            "windows have 64 tokens, of which 128 are read before routers are turned (the interval of --rewire",
        ),
        (["--rewire", "--rewire-after", 64], "of which 64 are read before routers are turned (--rewire-after)"),
        (["--rewire", "--cached"], "--cached cannot be combined with --rewire"),
        (["--rewire", "--path", "0,1"], "--path cannot be combined with --rewire"),
        (["--rewire", "--streams", 1], "--streams cannot be combined with --rewire"),
        (["--rewire", "--task", "x"], "--task cannot be combined with --rewire"),
        (["--rewire", "--memory", "1GB"], "--memory cannot be combined with --rewire"),
        (["--rewire", "--rewire-set", "steps=0"], "steps is 0"),
        (["--rewire", "--expert-budget", "1MB", "--quantize", "int8"], "no gradient, which --rewire needs"),
    ],
)
def test_what_does_not_go_together(folder, here, more, says):
    line = ["eval", folder / "moe", "--data", folder / "text.txt", "--sequence-length", 64, "--quiet", *more]
    code, out, err = here(*line)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_a_model_without_routers(folder, here):
    line = ["--data", folder / "text.txt", "--sequence-length", 64, "--quiet", *SETTINGS]
    code, _, err = here("eval", folder / "dense", *line)
    assert (code, "has no router that chooses experts" in err) == (2, True)


class Windows(list):
    """Batches of windows of these shapes."""

    domains = ("text",)

    def __init__(self, *shapes):
        super().__init__(
            SimpleNamespace(
                token_BL=torch.arange(rows * length).view(rows, length) % 90, domain_B=torch.zeros(rows).long()
            )
            for rows, length in shapes
        )


def test_windows_that_end_where_routers_are_turned_have_nothing_to_measure(folder):
    model, _ = load_model(folder / "moe")
    found = compare(model, CONFIG, Windows((2, 17), (3, 16), (4, 5), (1, 20)), 16)
    assert (found["too_short"], found["texts"], found["tokens"]) == (7, 3, 2 * 1 + 4)
    with pytest.raises(ConfigError, match="the longest text has 16 tokens, of which 16 are read before"):
        compare(model, CONFIG, Windows((2, 16), (1, 7)), 16)


def test_shares_that_the_guard_kept_and_why_routers_were_not_turned_by_hand(capsys):
    numbers = {"plain": 2.0, "rewired": 1.5, "difference": -0.5, "standard_error": None, "steps": 2.0, "overlap": 0.25}
    phases = [
        {**numbers, "read": 16, "kept": {"all": 2, "half": 1, "none": 1}, "skipped": {"late": 2, "long": 1}},
        {**numbers, "read": 32, "kept": None, "skipped": {"late": 3}},
    ]
    settings = {"interval": 16, "steps": 2, "eta": 0.5}
    show({**numbers, "settings": settings, "after": 16, "tokens": 40, "texts": 4, "phases": phases})
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["16"] == ["2.0000", "1.5000", "-0.5000", "-", "2.0", "62%", "0.250"]
    assert rows["32"] == ["2.0000", "1.5000", "-0.5000", "-", "2.0", "-", "0.250"]
    notes = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("note")]
    assert notes == ["routers were not turned 5 times: late", "routers were not turned 1 times: long"]
