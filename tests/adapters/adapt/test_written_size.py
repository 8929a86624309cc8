"""The size that the catalogue foretells of a file, held to the file that `anabranch adapt` writes, of every method of ours."""

import pytest

from anabranch.adapters import catalogue
from anabranch.adapters.adapt import method_names
from anabranch.lm import load_config
from anabranch.train import Trainer
from every_method import TASKS, make_place, method_of, run_of

# What methods call what their cards call otherwise.
NAMES = {"number": "skills"}
# Sizes of what peft writes are rough.
METHODS = [name for name in method_names() if name in catalogue.CARDS and catalogue.find(name).backend == "own"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("size"))


def options_of(card, config):
    """The options of a card by which a method adapts a model."""
    found = {name: getattr(config, name, getattr(config, NAMES.get(name, name), None)) for name in card.options}
    found |= {"tasks": len(TASKS)} if "tasks" in found else {}
    return {name: value for name, value in found.items() if value not in (None, ())}


@pytest.mark.parametrize("id", METHODS)
def test_a_file_is_as_long_as_was_foretold(id, place, tmp_path):
    card, config = catalogue.find(id), load_config(place / "base")
    trainer = Trainer(run_of(id, place, steps=1), tmp_path / "run")
    trainer.fit()
    written = trainer.task.write(tmp_path / "written")
    (path,) = written.folder.glob("*.safetensors")
    found = catalogue.estimate(card, catalogue.Shape.of(config), options_of(card, method_of(id, place)))
    assert found.file_bytes == path.stat().st_size
    assert found.to_dict()["bytes"]["file"] == found.file_bytes


def test_all_of_ours_are_looked_at():
    assert {id for id, card in catalogue.CARDS.items() if card.backend == "own" and not card.not_by_rows} == set(
        METHODS
    )
