"""Whether two names may be of one base: the same words, words that any model may have, and other ones."""

import os

import pytest

from anabranch.adapters.base_name import is_one_base

NAME = "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize(
    "other",
    [
        NAME,
        "/models/SmolLM2-135M/",
        "SmolLM2-135M.gguf",
        "smollm2-135m-Q4_K_M.gguf",
        "hub/models--HuggingFaceTB--SmolLM2-135M",
        "hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
        r"C:\models\SmolLM2-135M",
        "smollm2-135M",
        "unsloth/SmolLM2-135M-bnb-4bit",
        "unsloth/SmolLM2-135M-unsloth-bnb-4bit",
    ],
)
def test_one_base_by_other_words(other):
    assert is_one_base([NAME, other]) is True


@pytest.mark.parametrize(
    "other", [".", "..", "step-00000010", "/runs/one/base", "model", "final_model", "main", "a" * 40]
)
def test_words_that_any_model_may_have_say_nothing(other):
    assert is_one_base([NAME, other]) is None
    assert is_one_base([f"{other}/../{other}", other]) is not False


def test_others():
    assert is_one_base([NAME, "HuggingFaceTB/SmolLM2-360M"]) is False
    assert is_one_base(["org/t5-base", "org/bert-base"]) is False
    assert is_one_base(["/runs/one/base", "/runs/two/base"]) is None
    # One that is none of the first's is told, whatever else cannot be.
    assert is_one_base([NAME, "model", "gpt2"]) is False
    assert is_one_base([]) is is_one_base([None, NAME, 3, ""]) is True


def test_one_place_by_two_paths(tmp_path):
    (tmp_path / "one").mkdir()
    os.symlink(tmp_path / "one", tmp_path / "two")
    assert is_one_base([str(tmp_path / "one"), str(tmp_path / "two")]) is True
