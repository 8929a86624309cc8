"""``anabranch gateway coe`` and ``anabranch routers coe``: what would be hosted, and what prompts are taken for."""

import json

import pytest

from anabranch.cli.main import main
from anabranch.routers.fitted import FittedRouter
from made_outcomes import made_outcomes, write_outcomes

SIZES = {"small": 1.0, "medium": 8.0, "large": 70.0}
SIZED = [word for name, size in SIZES.items() for word in ("--size", f"{name}={size:g}")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coe")
    write_outcomes(folder / "data.jsonl", made_outcomes(240))
    write_outcomes(folder / "new.jsonl", made_outcomes(60, 9))
    command = f"gateway fit {folder}/data.jsonl --out {folder}/routers --strategy coe --strategy knn --quiet --set coe.head=knn"
    assert main(command.split()) == 0
    return folder


def said(capsys, *words, code=0):
    capsys.readouterr()
    assert main([*map(str, words)]) == code
    found = capsys.readouterr()
    return found.out if code == 0 else found.err


@pytest.mark.parametrize("door", ["gateway", "routers"])
def test_the_best_map_of_every_budget(place, capsys, door):
    command = (door, "coe", "frontier", "--router", place / "routers", *SIZED)
    maps = json.loads(said(capsys, *command, "--json"))["maps"]
    predictor = FittedRouter.load(place / "routers/coe.safetensors").strategy.predictor
    assert len(maps) > 2
    assert [one["hosted"] for one in maps] == sorted({sum(SIZES[name] for name in one["models"]) for one in maps})
    assert [one["quality"] for one in maps] == sorted(one["quality"] for one in maps)
    for one in maps:
        assert set(one["map"]) >= set(predictor.router.categories)
        assert set(one["map"].values()) == set(one["models"])
    # The dearest one is what no budget holds back.
    predictor.config = predictor.config.replace(parameters=SIZES)
    assert maps[-1]["map"] == dict(predictor.plan().map.choice)
    shown = said(capsys, *command)
    assert f"{maps[0]['quality']:.4f}" in shown
    active = json.loads(said(capsys, *command, "--by", "trade_off", "--json"))["maps"]
    assert [one["active"] for one in active] == sorted((one["active"] for one in active), reverse=True)


def test_how_well_categories_are_told_apart(place, capsys):
    command = ("routers", "coe", "report", "--router", place / "routers", "--strategy", "coe")
    own, new = (json.loads(said(capsys, *command, *data, "--json")) for data in ([], [place / "new.jsonl"]))
    assert set(own["categories"]) == set(new["categories"]) == {"code", "maths", "poetry"}
    assert sum(map(sum, new["confusion"])) == 60
    # Each topic has words of its own.
    assert min(own["accuracy"], new["accuracy"]) > 0.9
    assert own["map"]["maths"] == "medium"
    assert "medium" in said(capsys, *command)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("frontier --router {place}/routers", "'small' has none"),
        ("frontier --router {place}/routers --size small", "write MODEL=B with one of"),
        ("frontier --router {place}/routers --size small=0", "write MODEL=B with one of"),
        ("frontier --router {place}/routers --size nobody=3", "write MODEL=B with one of"),
        ("frontier --router {place}/routers --by price", "must be one of budget, trade_off"),
        ("frontier --router {place}/routers/knn.safetensors", "must hold one router of kind coe; it holds knn"),
        ("report {place}/bare.jsonl --router {place}/routers", "no question of"),
        ("report {place}/other.jsonl --router {place}/routers", "no category 'law' was learned"),
    ],
)
def test_what_cannot_be_is_said(place, capsys, words, message):
    (place / "bare.jsonl").write_text('{"query": "x", "scores": {"small": 1}}\n')
    (place / "other.jsonl").write_text('{"query": "x", "task": "law", "scores": {"small": 1}}\n')
    assert message in said(capsys, "gateway", "coe", *words.format(place=place).split(), code=2)
