"""Whether names may be of one base: the same words, words that any model may have, other ones, and folders that are here."""

import itertools
import os

import pytest

from adapter_models import CONFIGS
from anabranch.adapters.base_name import how_vague, is_one_base, warn_of_base
from anabranch.data import ByteTokenizer
from anabranch.lm import save_model

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
    "other",
    [
        ".",
        "..",
        "step-00000010",
        "/runs/one/base",
        "model",
        "final_model",
        "main",
        "a" * 40,
        "v1",
        "fp16",
        "7b",
        "hf",
        "1.5B",
    ],
)
def test_words_that_any_model_may_have_say_nothing(other):
    assert is_one_base([NAME, other]) is None
    assert is_one_base([f"{other}/../{other}", other]) is not False


@pytest.mark.parametrize(
    "names",
    [
        ("org/llama-7b", "/m/llama/hf"),
        ("org/Qwen3-8B", "other/qwen3-8b-GPTQ"),
        ("meta-llama/Llama-3.1-8B", "unsloth/Meta-Llama-3.1-8B-bnb-4bit"),
        ("/data/llama/v1", "/data/qwen/v1"),
        ("/a/llama-7b/fp16", "/a/qwen-7b/fp16"),
        ("org/7b", "other/7b"),
        ("/runs/one/base", "/runs/two/base"),
        # These are others, and so may be what is called so.
        (NAME, "HuggingFaceTB/SmolLM2-360M"),
        ("org/t5-base", "org/bert-base"),
        (NAME, "model", "gpt2"),
    ],
)
def test_names_alone_are_neither_one_model_nor_several(names):
    assert is_one_base(names) is None


def test_what_is_no_name_says_nothing():
    assert is_one_base([]) is is_one_base([None, NAME, 3, ""]) is True


@pytest.mark.parametrize("first", ["0", "one"])
def test_models_that_are_here_are_told_by_what_they_hold(tmp_path, first):
    for name, seed in ((first, 0), ("copy", 0), ("other", 1)):
        save_model(tmp_path / name, CONFIGS["llama"]().build(seed=seed), ByteTokenizer.Config().build())
    one, copied, other = (str(tmp_path / name) for name in (first, "copy", "other"))
    assert is_one_base([one, other]) is is_one_base([NAME, one, other]) is False
    # As is what was merged into it, or trained with vectors that stayed.
    assert is_one_base([one, copied]) is None
    # Whatever is named before, all are compared with one that is here.
    assert sorted([NAME, "model", one], key=how_vague) == [one, NAME, "model"]


def test_a_folder_without_a_model_hides_nothing(tmp_path):
    (tmp_path / "aempty").mkdir()
    for seed, name in enumerate(("one", "two")):
        save_model(tmp_path / name, CONFIGS["llama"]().build(seed=seed), ByteTokenizer.Config().build())
    names = [str(tmp_path / name) for name in ("aempty", "one", "two")]
    assert [is_one_base(order) for order in itertools.permutations(names)] == [False] * 6


def test_a_model_by_other_words_is_asked_about(tmp_path, caplog):
    for told, base, is_asked in (
        (NAME, "gpt2", True),
        (NAME, "/m/SmolLM2-135M", False),
        (NAME, "model", False),
        (None, NAME, False),
    ):
        caplog.clear()
        warn_of_base("the pool x", told, base)
        assert [f"and the model is '{base}'; is it another one?" in one.getMessage() for one in caplog.records] == [
            True
        ] * is_asked


def test_one_place_by_two_paths(tmp_path):
    (tmp_path / "one").mkdir()
    os.symlink(tmp_path / "one", tmp_path / "two")
    assert is_one_base([str(tmp_path / "one"), str(tmp_path / "two")]) is True
