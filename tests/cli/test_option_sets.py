"""Options that several commands have, as one parameter: they stand in its place, are read into it, and their help is the command's."""

import inspect
from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from anabranch.cli.option_sets import OptionSet, takes_sets


@dataclass(frozen=True)
class Fruit(OptionSet):
    kind: Annotated[str, typer.Option("--kind", help="Of fruit. Default: {usual}.")] = "apple"
    count: Annotated[int | None, typer.Option("--count", min=1, help="How many.")] = None


@dataclass(frozen=True)
class Place(OptionSet):
    where: Annotated[str | None, typer.Option("--where")] = None


FRUIT, PLACE, SEEN = Fruit(), Place(), []


@takes_sets(usual="an apple")
def pick(
    name: Annotated[str, typer.Argument()],
    fruit: Fruit = FRUIT,
    last: Annotated[bool, typer.Option("--last")] = False,
    place: Place = PLACE,
) -> None:
    """Pick fruit."""
    SEEN.append((name, fruit, last, place))


@takes_sets(usual="a pear")
def keep(fruit: Fruit = FRUIT) -> None:
    """Keep fruit."""


def app_of(command):
    app = typer.Typer()
    app.command()(command)
    return app


def test_options_stand_in_the_place_of_their_set():
    assert list(inspect.signature(pick).parameters) == ["name", "kind", "count", "last", "where"]
    assert (pick.__name__, pick.__doc__) == ("pick", "Pick fruit.")


def test_a_line_is_read_into_the_sets():
    SEEN.clear()
    run = CliRunner().invoke
    assert run(app_of(pick), ["x"]).exit_code == 0
    assert run(app_of(pick), ["y", "--count", "3", "--last", "--where", "here", "--kind", "plum"]).exit_code == 0
    assert SEEN == [("x", Fruit(), False, Place()), ("y", Fruit("plum", 3), True, Place("here"))]
    assert run(app_of(pick), ["y", "--count", "0"]).exit_code == 2
    assert len(SEEN) == 2


def test_each_command_tells_its_own_usual():
    first, second = (CliRunner().invoke(app_of(each), ["--help"]).output for each in (pick, keep))
    assert "Default: an apple." in first
    assert "Default: a pear." in second
    assert "{usual}" not in first + second
