"""``anabranch adapt --method`` of methods that peft runs, and the commands that take what it wrote."""

import json

import pytest

from every_method import make_place
from with_peft import HAS_PEFT, needs_peft

QUICK = ["--steps", 4, "--batch-size", 4, "--set", "train.device=cpu"]


@pytest.fixture(scope="module")
def place(work):
    root = work / "by-peft"
    root.mkdir()
    return make_place(root)


@pytest.fixture
def adapted(here, place):
    """A run of VeRA, whose adapter the tests read."""
    out = place / "vera"
    if not out.exists():
        line = [place / "base", place / "rows.jsonl", "--method", "vera", "--rank", 4, *QUICK]
        code, said, err = here("adapt", *line, "--out", out, "--json")
        assert code == 0, err
        told = json.loads(said)
        assert (told["method"], told["status"], told["form"]) == ("vera", "finished", "peft")
    return out / "adapter"


def told(here, *line):
    code, out, err = here(*line, "--json")
    assert code == 0, err
    return json.loads(out)


@needs_peft
def test_what_adapt_wrote_is_measured_written_with_and_described(here, place, adapted):
    (place / "notes.txt").write_text("what a model is measured on, for a moment. " * 8)
    measured = told(here, "eval", place / "base", "--adapter", adapted, "--data", place / "notes.txt")
    assert measured["adapter"] == str(adapted)
    rows = told(here, "adapters", "eval", place / "base", adapted, "--data", place / "rows.jsonl")
    assert set(rows["by_task"]) == {"back", "up"}
    code, out, err = here("generate", place / "base", "--adapter", adapted, "--prompt", "ab", "--max-tokens", 4)
    assert code == 0, err
    card = told(here, "adapters", "card", adapted)
    assert (card["kind"], card["targets"]) == ("VeRA", ["q_proj", "v_proj"])
    assert card["parameters"] > 0
    code, out, _ = here("adapters", "card", adapted)
    assert code == 0
    assert "VeRA for" in out


@needs_peft
def test_it_becomes_part_of_a_model_and_no_lora(here, place, adapted, tmp_path):
    code, _, err = here("adapters", "export", place / "base", adapted, "--out", tmp_path / "lora")
    assert code == 2
    assert "is VeRA, which peft computes around the matrices of a model" in err
    assert "adapters fuse take it" in err
    fused = told(here, "adapters", "fuse", place / "base", adapted, "--out", tmp_path / "fused")
    assert fused["merged"] is True
    (place / "notes.txt").write_text("what a model is measured on, for a moment. " * 8)
    text = ["--data", place / "notes.txt", "--sequence-length", 32]
    ours = told(here, "eval", tmp_path / "fused", *text)
    theirs = told(here, "eval", place / "base", "--adapter", adapted, *text)
    assert ours["nats_per_token"] == pytest.approx(theirs["nats_per_token"], abs=1e-5)
    code, _, err = here("adapters", "fuse", place / "base", adapted, "--beside", "--out", tmp_path / "beside")
    assert code == 2
    assert "VeRA is computed by peft, which no saved model holds beside its matrices; leave out --beside" in err


@needs_peft
def test_what_no_matrix_takes_in_says_so(here, place, tmp_path):
    code, _, err = here(
        "adapt", place / "base", place / "rows.jsonl", "--method", "beft", *QUICK, "--out", tmp_path / "run", "--quiet"
    )
    assert code == 0, err
    code, _, err = here("adapters", "fuse", place / "base", tmp_path / "run" / "adapter", "--out", tmp_path / "fused")
    assert code == 2
    assert "BEFT is computed by peft" in err
    assert "no matrix can take it in; name it with --adapter instead" in err


@pytest.mark.skipif(HAS_PEFT, reason="peft is installed")
@pytest.mark.parametrize("method", ["vera", "p-tuning", "pissa"])
def test_without_peft_one_line_names_the_extra_and_nothing_is_made(here, place, tmp_path, method):
    code, out, err = here("adapt", place / "base", place / "rows.jsonl", "--method", method, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err == f"error: method {method} needs peft; pip install 'anabranch[peft]'\n"
    assert not (tmp_path / "run").exists()
