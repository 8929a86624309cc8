"""``anabranch adapters list``, ``card METHOD``, ``estimate`` and ``recommend``, from the command line to figures."""

import json

import pytest

from anabranch.cli.options import read_assignments
from anabranch.config import override
from anabranch.train import TrainConfig


def told(here, *line):
    code, out, err = here("adapters", *line, "--json")
    assert code == 0, err
    return json.loads(out)


def test_methods_are_listed(here):
    every = told(here, "list")["methods"]
    assert len(every) > 60
    assert {"lora", "ia3", "prefix-tuning", "mhr"} <= {one["id"] for one in every}
    prompts = told(here, "list", "--family", "prompt")["methods"]
    assert {one["family"] for one in prompts} == {"additive/prompt"}
    assert all(one["merges"] in ("no", "per task") for one in told(here, "list", "--stays")["methods"])
    code, out, err = here("adapters", "list", "--backend", "own", "--mixed", "--merges")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("lora ")]
    assert "adapters card METHOD" in err
    little = {one["id"] for one in told(here, "list", "--on", "dense", "--max-parameters", 2000)["methods"]}
    assert "ln-tuning" in little
    assert "full" not in little
    assert {one["id"] for one in told(here, "list", "--biases")["methods"]} >= {"bitfit"}
    assert "bitfit" not in {one["id"] for one in told(here, "list", "--no-biases")["methods"]}
    for line in (["--on", "dense"], ["--max-parameters", 9]):
        code, _, err = here("adapters", "list", *line)
        assert (code, "give both --on MODEL and --max-parameters N" in err) == (2, True)


def test_a_card_of_a_method(here):
    card = told(here, "card", "vera")
    assert (card["name"], card["backend"], card["peft_type"]) == ("VeRA", "peft", "VERA")
    assert card["papers"][0]["arxiv"] == "2310.11454"
    code, out, _ = here("adapters", "card", "qlora")
    assert code == 0
    for part in (
        "rule    LoRA beside matrices of 4 bits",
        "run by  Anabranch, in training with any method: --set task.quantize=nf4",
        "arXiv 2305.14314",
        "memory ",
        "limits ",
    ):
        assert part in out


@pytest.mark.parametrize(
    ("id", "setting"), [("mezo", "train.optimizer=mezo"), ("gradient-checkpointing", "train.recompute=true")]
)
def test_what_is_a_setting_of_training_is_said_to_be(here, id, setting):
    """And it is one: `adapt` takes it."""
    code, out, _ = here("adapters", "card", id)
    assert code == 0
    assert f"run by  Anabranch, in training with any method: --set {setting}" in " ".join(out.splitlines())
    assert "nobody" not in out
    assert told(here, "card", id)["setting"] == setting
    [(name, value)] = read_assignments([setting]).items()
    assert override(TrainConfig(), {name.removeprefix("train."): value}) != TrainConfig()


@pytest.mark.parametrize(
    ("id", "line"),
    [
        ("adapter-soup", ["adapters", "merge", "--method", "mean"]),
        ("lorahub", ["adapters", "merge", "--method", "linear", "--model", "--data"]),
        ("arrow", ["serve", "--adapter"]),
        ("arrow", ["adapters", "route", "--model", "--local", "arrow"]),
    ],
)
def test_what_another_command_runs_names_it(here, id, line):
    """And there is such a command, with these options."""
    out = " ".join(here("adapters", "card", id)[1].split())
    command = " ".join(word for word in line if word[:2] != "--" and word not in ("mean", "linear", "arrow"))
    assert "run by Anabranch: " in out
    assert "nobody" not in out
    assert command in told(here, "card", id)["way"]
    code, text, _ = here(*command.split(), "--help")
    assert code == 0
    assert all(word in told(here, "card", id)["way"] and word in text for word in line)


def test_what_is_called_in_python_names_it(here):
    import anabranch.adapters

    name, package = told(here, "card", "mola")["way"].split(",")[0].split(" of ")
    assert package == anabranch.adapters.__name__
    assert callable(getattr(anabranch.adapters, name))


def test_costs_are_calculated(here, trained):
    trained, _ = trained
    found = told(here, "estimate", trained, "lora", "--rank", 4, "--targets", "q,v", "--sequence-length", 32)
    assert found["options"]["rank"] == 4
    assert found["trainable"] > 0
    assert found["bytes"]["optimizer"] == 8 * found["trainable"]
    assert found["flops_per_token"]["added_merged"] == 0
    half = told(here, "estimate", trained, "lora", "--dtype", "bfloat16")
    assert half["bytes"]["base"] * 2 == found["bytes"]["base"]
    wide = told(here, "estimate", "dense", "adapter-parallel", "--set", "width=8", "--set", "activation=gelu")
    assert (wide["options"]["width"], wide["options"]["activation"]) == (8, "gelu")
    code, out, _ = here("adapters", "estimate", "dense", "lora")
    assert code == 0
    assert "more (none once merged)" in out
    code, out, _ = here("adapters", "estimate", "dense", "gralora")
    assert code == 0
    assert "what the method adds nobody has counted" in out


def test_methods_are_recommended(here, tmp_path):
    found = told(here, "recommend", "dense", "--merges", "--own", "--max-share", "0.5")
    assert found["choices"][0]["id"] == "rslora"
    assert found["choices"][0]["measurement"]["accuracy"] == 0.513
    assert found["measurements_used"] >= 3
    assert "MetaMathQA" in found["measured_by"][0]
    assert found["rejected"]["adapter-parallel"] == "cannot be merged"
    path = tmp_path / "mine.json"
    path.write_text('[{"method": "lora-fa", "accuracy": 0.7, "source": "last week"}]')
    code, out, err = here("adapters", "recommend", "dense", "--measurements", path, "--rank", 4)
    assert code == 0
    assert out.splitlines()[1].split()[:2] == ["lora-fa", "0.700"]
    assert "by      last week" in out
    assert "methods exceed the limits" in err
    rows = [
        {"method": "dora", "accuracy": 0.9, "source": "first", "seeds": 5, "table": "bench"},
        {"method": "lora-fa", "gained": 0.25, "source": "second", "seeds": 3, "table": "real"},
    ]
    path.write_text(json.dumps(rows))
    code, out, _ = here("adapters", "recommend", "dense", "--measurements", path)
    assert out.splitlines()[1].split()[:3] == ["dora", "0.900", "5"]
    assert "unit    accuracy" in out
    assert "not by  real: other tables of the same file, see --table" in out
    code, out, _ = here("adapters", "recommend", "dense", "--measurements", path, "--table", "real")
    assert out.splitlines()[1].split()[:3] == ["lora-fa", "0.250", "3"]
    assert "unit    nats per token less than the model as it was" in out
    code, out, err = here("adapters", "recommend", "dense", "--measurements", path, "--table", "reel")
    assert (code, out) == (2, "")
    assert "did you mean 'real'" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("list --family cheap", "there is no family 'cheap'; use one of additive"),
        ("list --backend others", "backend is 'others'"),
        ("card lorra", "there is no method 'lorra'; did you mean 'lora'"),
        (
            "card dynmole",
            "'dynmole' has no card and no formula of its cost; anabranch adapt MODEL DATA --method dynmole",
        ),
        ("card lora_mixer", "'lora_mixer' has no card"),
        ("estimate dense gate", "'gate' has no card"),
        ("recommend dense --max-share 5", "--max-share is 5; it is a share of the model's parameters, from 0 to 1"),
        ("card nowhere/at/all", "no adapter at nowhere/at/all"),
        ("estimate dense lorra", "there is no method 'lorra'"),
        ("estimate nomodel lora", "'nomodel' is neither a model nor a preset"),
        ("estimate dense lora --rank 0", "rank"),
        ("estimate dense lora --targets w", "names no linear layer of this model"),
        ("estimate dense lora --set width=3", "lora has no option 'width'"),
        ("estimate dense lora --set rank=many", "rank of lora is 'many'"),
        ("estimate dense side-tuning", "cannot be told beforehand"),
        ("estimate dense bitfit", "bitfit would train nothing: this model has no biases"),
        ("estimate dense lora --dtype float8", "--dtype is 'float8'"),
        ("estimate dense lora --rank 5 --set rank=4", "rank is given by --rank and by --set rank=...; give it once"),
        ("recommend dense --max-share nan", "--max-share is nan; it must be a finite number"),
        ("recommend dense --max-file big", "--max-file"),
        ("recommend dense --max-parameters 1 --own", "no method keeps to these limits"),
        ("recommend dense --measurements none.json", "cannot read none.json"),
        ("recommend dense --table real", "--table is of the measurements of a file"),
        ("recommend dense --targets w", "names no linear layer of this model"),
    ],
)
def test_what_is_wrong_is_one_line(here, line, message):
    code, out, err = here("adapters", *line.split())
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), err
    assert message in err
    assert "fault inside" not in err
