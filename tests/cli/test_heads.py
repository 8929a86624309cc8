"""``anabranch heads``: from a model's folder to routed heads that are trained, reported, evaluated, served and resumed."""

import json
import shlex

import pyarrow.parquet as pq
import pytest

SETTINGS = (
    "--set train.batch_size=2 --set data.sequence_length=32 --set train.device=cpu "
    "--set data.validation_fraction=0.3 --set train.eval_tokens=512"
)


@pytest.fixture(scope="module")
def routed(cli, work, trained):
    """A run of 4 steps from the trained model, and what it printed."""
    words = f"heads train trained text --shared 1 --target 0.5 --steps 4 --out routed {SETTINGS} --json"
    done = cli(*shlex.split(words))
    assert done.returncode == 0, done.stderr
    return work / "routed", json.loads(done.stdout)


def test_a_trained_model_goes_on_with_routed_heads(routed, here, work):
    folder, told = routed
    assert (told["status"], told["step"]) == ("finished", 4)
    assert len(told["activation_by_layer"]) == 2
    assert all(0 <= rate <= 1 for rate in told["activation_by_layer"])
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["attention"]["kind"] == "routed_heads"
    assert config["model"]["attention"]["heads"]["num_shared"] == 1
    assert config["start"]["recipe"] == ["routed_heads"]


def test_at_the_start_it_is_the_model(trained, here, work):
    words = f"heads train trained text --out same --steps 0 --quiet {SETTINGS} --json"
    code, _, err = here(*shlex.split(words))
    assert (code, err) == (0, "")
    measured = []
    for model in ("trained", "same"):
        code, out, _ = here(
            "eval", model, "--data", "text", "--tokens", 512, "--sequence-length", 32, "--json", "--quiet"
        )
        measured.append(json.loads(out)["nats_per_token"])
    assert measured[0] == pytest.approx(measured[1], abs=1e-5)


def test_the_report_says_which_heads_were_on(routed, here, work):
    words = "heads report routed --data text --tokens 512 --sequence-length 32 --trace heads.parquet --quiet"
    code, out, err = here(*shlex.split(f"{words} --json"))
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert len(told["layers"]) == 2
    layer = told["layers"][0]
    assert layer["by_head"][0] == 1.0
    assert layer["tokens"] == 512
    assert layer["activation"] == pytest.approx(sum(layer["by_head"][1:]) / len(layer["by_head"][1:]))
    assert 0 <= told["saved"] < 1
    assert pq.read_table(work / "heads.parquet").num_rows > 0
    code, out, err = here(*shlex.split(words))
    assert (code, err) == (0, "")
    assert "each routed head" in out
    assert "of the multiply-adds of attention were spared" in out
    assert "anabranch report heads.parquet --out heads" in out


def test_what_is_made_is_a_model_as_any_other(routed, here):
    code, out, _ = here("generate", "routed", "-p", "def ", "--max-tokens", 4, "--temperature", 0, "--json")
    assert (code, len(json.loads(out)["token_ids"])) == (0, 4)
    code, out, _ = here("info", "routed")
    assert code == 0


def test_a_run_that_stopped_goes_on(routed, here, work):
    code, _, err = here(*shlex.split(f"heads train trained text --shared 1 --steps 2 --out part --quiet {SETTINGS}"))
    assert (code, err) == (0, "")
    code, out, err = here(*shlex.split("heads train --out part --resume --steps 4 --quiet --json"))
    assert (code, json.loads(out)["step"]) == (0, 4), err
    code, _, err = here(*shlex.split("heads train trained --out part --resume"))
    assert (code, err.strip()) == (
        2,
        "error: MODEL is given with --resume, which goes on with the run in part as it began; leave it out",
    )
    code, _, err = here(*shlex.split("heads train --out trained --resume"))
    assert (code, "has no routed heads" in err) == (2, True)


def test_the_gates_alone_learn(trained, here, work):
    from anabranch.lm import load_model

    words = f"heads train trained text --learn gates --steps 2 --out gates --quiet {SETTINGS}"
    code, _, err = here(*shlex.split(words))
    assert (code, err) == (0, "")
    before, after = (dict(load_model(work / name)[0].named_parameters()) for name in ("trained", "gates"))
    assert (after["blocks.0.attention.attention.out.weight"] == before["blocks.0.attention.out.weight"]).all()
    assert (after["embedding.weight"] == before["embedding.weight"]).all()
    assert any((value != 0).any() for name, value in after.items() if name.endswith("gate.pair.weight"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("heads train --out z", "MODEL is not given"),
        ("heads train nowhere --out z", "nowhere"),
        ("heads train trained text --shared 99 --out z", "num_shared is 99, but the attention has"),
        ("heads train trained text --target 1 --out z", "target is 1.0"),
        ("heads train trained text --target nan --out z", "target is nan"),
        ("heads train trained text --routing topk --top-k 9 --out z", "top_k is 9"),
        ("heads train trained text --set model.dim=8 --out z", "--set model.dim"),
        ("heads train trained nowhere.txt --out z", "nowhere.txt"),
        ("heads train routed text --out z", "routed has routed heads already; a run of them goes on"),
        ("heads report trained", "trained has no routed heads; anabranch heads train puts some on"),
        ("heads report routed --trace x.csv", "must end with .parquet"),
        ("heads report routed --data nowhere", "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(routed, here, work, line, message):
    code, out, err = here(*shlex.split(line))
    assert (code, out) == (2, "")
    told = [part for part in err.splitlines() if part.startswith("error: ")]
    assert len(told) == 1
    assert message in told[0]
    assert "fault inside" not in err
    assert not (work / "z").exists()
