"""docs/formats.md has the families, architectures and stored forms that there are."""

import re
from pathlib import Path

import pytest

from anabranch.lm.formats import FAMILIES
from anabranch.lm.formats.few_bits import METHODS
from anabranch.lm.gguf_tokenizer import _SPLITS

pytest.importorskip("gguf")

from anabranch.lm import gguf_architectures as made
from anabranch.lm.gguf_blocks import BLOCKS

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
NAMES = re.compile(r"`([^`]+)`")


def rows(heading):
    """Cells of the table under a heading."""
    lines = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]


def test_families_and_architectures():
    read = dict.fromkeys(FAMILIES, ())
    others = {"mixtral": ("llama",), "ministral3": ("mistral3",), "deepseek_v3": ("deepseek2",)}
    others_made = (made._LLAMA_WITH_EXPERTS, made._MINISTRAL3, made._DEEPSEEK_V3)
    assert [one.model_type for one in others_made] == list(others)
    for name, architecture in made.ARCHITECTURES.items():
        read[architecture.model_type] += (name,)
    told = {NAMES.findall(row[0])[0]: tuple(NAMES.findall(row[1])) for row in rows("Families")}
    assert told == {**read, **others}
    written = {row[0].strip("`") for row in rows("Families") if row[2] == "yes"}
    assert written == {name for name in FAMILIES if hasattr(FAMILIES[name], "write")}


def test_stored_forms():
    told = {row[0].strip("`"): row[1:] for row in rows("Weights in few bits")}
    assert told.keys() == {*METHODS, "mxfp4", *BLOCKS}
    for name, form in BLOCKS.items():
        assert told[name] == ["GGUF", "kept", "kept" if form == "int8" else "rounded", "kept"]


def test_cuts_of_tokenizers():
    told = set(NAMES.findall(PAGE.split("with the cuts ")[1].split(".\n")[0]))
    assert told == set(_SPLITS)
