"""Prompts: those that ship are whole, a file of one's own is checked, and families of models may have their own words."""

import asyncio

import pytest

from anabranch.errors import ConfigError, DataError
from anabranch.routers.contract.program import ProgramRequest
from anabranch.routers.contract.query import Model, Pool, Query
from anabranch.routers.scale.prompts import FOLDER, NAMES, Prompts, bar_for
from anabranch.routers.strategies import make
from scale_scripted import Models, usual

FILE = (FOLDER / "en.toml").read_text("utf-8")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_language_that_ships_is_whole(path):
    prompts = Prompts.read(path.stem)
    assert prompts.texts.keys() == NAMES.keys()
    assert r"\boxed{}" in prompts.texts["solve"]


def test_a_family_has_its_own_words_and_what_is_filled_in_is_not_read_again(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(FILE + '\n[families.Qwen3]\nplanned = "$number: $step /no_think"\n')
    prompts = Prompts.read(str(path))
    assert prompts.fill("planned", "Qwen/Qwen3-8B", number=1, step="a $bar") == "1: a $bar /no_think"
    assert prompts.fill("planned", "llama", number=1, step="a") == "Step 1, not done yet: a"


def test_a_file_is_read_anew_and_a_program_keeps_what_it_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(FILE)
    program = make("scale", language=str(path))
    path.write_text(FILE.replace("Split it into", "Part it into"))
    assert "Part it into" in Prompts.read(str(path)).texts["outline"]
    path.unlink()
    # Requests that come later do not need the file.
    query = Query(text="why?")
    pool = Pool((Model(name="small"),))
    request = ProgramRequest(query=query, pool=pool, decision=program.route(query, pool))
    models = Models(usual())

    async def main():
        return [event async for event in program.run(request, models)]

    asyncio.run(main())
    assert "Split it into" in models.asked[0][2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version = 1", "lack outline, select"),
        (FILE.replace("version = 1", "version = 2"), "have version 2; this program reads 1"),
        (
            FILE.replace("$problem", "the problem"),
            r"outline of prompts .* fills in \$bar, \$most; it must fill in \$bar, \$most, \$problem",
        ),
        (FILE.replace("$most", "$nothing"), r"fills in \$bar, \$nothing, \$problem"),
        (FILE.replace("$most", "$ most"), "is no text with"),
        (FILE + '\nfamilies = "x"', "families of prompts"),
        (FILE + '\n[families.x]\nsolv = "x"', "families.x.solv, which is none"),
        (FILE + '\n[families.x]\nsolve = "x"', "families.x.solve of prompts"),
        ("= 5", "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        Prompts.read(str(path))


def test_what_is_not_there():
    with pytest.raises(ConfigError, match="there are en"):
        Prompts.read("../../secret")
    with pytest.raises(DataError, match="cannot be read"):
        Prompts.read("nowhere.toml")


def test_a_line_is_longer_than_any_in_the_texts():
    assert bar_for([]) == bar_for(["a = b"]) == "====="
    assert bar_for(["=" * 8, "x=====y"]) == "=" * 9
