"""``anabranch oracle``: routes of a duo model tried for every token, as a table, labels and a picture."""

import json

import pytest
import torch

from anabranch.data import ByteTokenizer
from anabranch.depth.duo_llm import DuoFFN, RouteLabels, oracle, take
from anabranch.lm import Decoder, load_model, save_model
from anabranch.nn import SelfAttention, SwiGLU

TEXT = "def total(values):\n    return sum(values)\n" * 20
FILES = {"labels.jsonl", "oracle.json", "oracle.png", "oracle.svg"}


def save(folder, feed_forward):
    config = Decoder.Config(
        dim=16,
        num_layers=3,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=feed_forward,
        max_positions=64,
        init_std=0.3,
    )
    save_model(folder, config.build(seed=0), ByteTokenizer())
    return folder


@pytest.fixture(scope="module")
def duo(work):
    return save(work / "duo-model", DuoFFN.Config(big=32, small=4))


@pytest.fixture(scope="module")
def text(work):
    path = work / "routed.txt"
    path.write_text(TEXT)
    return path


def test_the_table_is_the_oracle_of_the_library_and_labels_are_its_routes(here, work, duo, text):
    options = ("--data", text, "--sequence-length", 16, "--tokens", 64, "--seed", 3, "--quiet")
    code, out, err = here("oracle", duo, "--out", "routes", *options, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {path.name for path in (work / "routes").iterdir()} == FILES  # what is unfinished is gone
    model, _ = load_model(duo)
    ids = torch.tensor(list(TEXT.encode()))[: 4 * 16 + 1]
    labels = RouteLabels.read(work / "routes" / "labels.jsonl")
    assert labels.ids_BL.shape == (4, 17)
    assert labels.budget == found["labels_budget"] == 1
    ours = oracle(model, labels.ids_BL, range(4), shuffle_seed=3, seed=3)
    assert found["rows"] == ours.to_dict()["rows"]
    assert [row["oracle"] for row in found["shuffled"]] == [row["oracle"] for row in ours.control.to_dict()["rows"]]
    assert torch.equal(labels.route_BLY, ours.route_BLY(1))
    assert (labels.route_BLY.sum(-1) == 1).all()
    assert set(ids.tolist()) >= set(labels.ids_BL.flatten().tolist())
    assert len(found["heat"]["1"]) == 3
    assert found["difficult"][0]["token"]
    assert (work / "routes" / "oracle.png").read_bytes()[:4] == b"\x89PNG"
    with torch.no_grad():
        model.eval()(labels.ids_BL[:, :-1], state=take(labels.route_BLY))


def test_what_it_says_to_a_reader(here, work, duo, text):
    options = ("--data", text, "--sequence-length", 16, "--tokens", 32, "--mode", "self_consistent")
    code, out, _ = here("oracle", duo, "--out", "read", *options)
    assert code == 0
    assert "3 duo layers" in out
    assert "best fixed route" in out
    assert "the gain is exact" in out
    assert "shuffled" not in out
    assert "open read/oracle.png" in out
    assert {path.name for path in (work / "read").iterdir()} == FILES


def test_mistakes_are_told_in_a_line(here, work, duo, text):
    dense = save(work / "dense-model", SwiGLU.Config(hidden_dim=16))
    (work / "short.txt").write_text("abc")
    (work / "some-run/checkpoints/step-00000001").mkdir(parents=True)
    for arguments, message in {
        (
            dense,
            "--out",
            "a",
            "--data",
            text,
        ): "has no 'duo' layers, so there are no routes to try; anabranch train duo",
        (duo, "--out", "a", "--data", text, "--budget", 4): "--budget is 4, but",
        (duo, "--out", "some-run", "--data", text): "some-run is the folder of a training run, so no routes",
        (duo, "--out", "a", "--data", "short.txt", "--sequence-length", 16): "has no 16 tokens in a row",
    }.items():
        code, _, err = here("oracle", *arguments, "--quiet")
        assert code == 2
        assert message in err
        assert "Traceback" not in err
    assert not (work / "a").exists()
