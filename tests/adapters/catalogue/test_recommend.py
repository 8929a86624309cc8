"""What is recommended: hard limits first, then what was measured, and which measurements those were."""

import json

import pytest

from anabranch.adapters import catalogue
from anabranch.adapters.catalogue import CARDS, MEASURED, Limits, Measurement, read_measurements, recommend, table
from anabranch.errors import ConfigError, DataError
from anabranch.extras import Extra
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU

SHAPE = catalogue.Shape.of(
    Decoder.Config(
        vocab_size=512,
        dim=256,
        num_layers=4,
        attention=SelfAttention.Config(num_heads=4),
        feed_forward=SwiGLU.Config(hidden_dim=640),
    )
)


BOTH = ("own", "peft")


def ids(found):
    return [choice.estimate.card.id for choice in found.choices]


def test_measured_ones_come_first_best_first():
    found = recommend(SHAPE, Limits(backends=("own", "peft")))
    measured = [choice.measurement for choice in found.choices]
    accuracies = [row.accuracy for row in measured if row is not None]
    assert accuracies == sorted(accuracies, reverse=True)
    assert found.used == len(accuracies) > 10
    assert measured[: found.used] == [row for row in measured if row is not None]
    assert ids(found)[0] == "rslora"
    assert found.sources == (MEASURED[0].source,)
    # The best of a method's runs ranks it.
    ia3 = next(choice for choice in found.choices if choice.estimate.card.id == "ia3")
    assert (ia3.measurement.accuracy, ia3.measurement.variant) == (0.455, "all attention, learning rate 5e-3")
    rest = [choice.estimate.trainable for choice in found.choices[found.used :]]
    assert rest == sorted(rest)


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "why"),
    [
        (Limits(merges=True), "lora", "adapter-parallel", "cannot be merged"),
        (Limits(merges=True), "full", "mhr", "one task of it can be merged (adapters export --task), not all"),
        (Limits(mixed=True), "lora", "ssf", "rows of a batch cannot"),
        (Limits(starts_as_base=True), "lora", "prefix-tuning", "a new adapter changes"),
        (Limits(max_parameters=3000, backends=BOTH), "road", "lora", "learns 3.277e+04 numbers, above 3000"),
        (Limits(max_share=0.001, backends=BOTH), "road", "lora", "of the model's parameters, above 0.001"),
        (Limits(max_file_bytes=23_000), "ia3", "lora", "bytes in a file, above"),
        # A model that is written whole.
        (Limits(max_file_bytes=23_000), "ia3", "ln-tuning", "bytes in a file, above"),
        (Limits(max_training_bytes=20_000_000), "lora", "full", "bytes in training, above"),
        (Limits(max_added_flops=0.0), "lora", "adapter-parallel", "of the model's FLOPs, above 0"),
        (Limits(backends=("own",)), "lora", "vera", "run by peft"),
        (
            Limits(backends=BOTH),
            "road",
            "lily",
            "peft alone trains it, on models of transformers: the weights are means",
        ),
        (Limits(backends=BOTH), "road", "loftq", "nobody runs it here"),
        (Limits(), "lora", "side-tuning", "nobody runs it here"),
        (Limits(), "lora", "lorahub", "not put on by its name: anabranch adapters merge --method linear"),
        (Limits(), "lora", "mezo", "a setting of training: train.optimizer=mezo"),
        (Limits(), "ln-tuning", "bitfit", "this model has no biases"),
    ],
)
def test_limits_are_hard(limits, inside, outside, why):
    found = recommend(SHAPE, limits)
    assert inside in ids(found)
    assert outside not in ids(found)
    assert why in found.rejected[outside]
    assert set(ids(found)) | set(found.rejected) == set(CARDS)
    json.dumps(found.to_dict())


@pytest.mark.parametrize("missing", [(), ("peft",)])
def test_what_this_installation_cannot_run_is_not_recommended(monkeypatch, missing):
    """Nor is what peft alone trains, of all that it brings."""
    monkeypatch.setattr(table, "extras", lambda: {"peft": Extra("peft", missing)})
    monkeypatch.setattr("anabranch.extras.is_installed", lambda module: module not in missing)
    found = recommend(SHAPE)
    backends = {choice.estimate.card.backend for choice in found.choices}
    assert backends == ({"own"} if missing else {"own", "peft"})
    assert all(choice.estimate.card.only_peft is None for choice in found.choices)
    if missing:
        assert found.rejected["vera"] == "run by peft, which is not installed: pip install 'anabranch[peft]'"


def test_measurements_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps([{"method": "vera", "accuracy": 0.9}, {"method": "lora", "accuracy": 0.5, "seconds": 3}])
    )
    rows = read_measurements(path, list(CARDS))
    assert rows[1] == Measurement("lora", "", 0.5, None, None, 3, str(path))
    found = recommend(SHAPE, Limits(backends=BOTH), measurements=rows)
    assert ids(found)[:2] == ["vera", "lora"]
    assert found.sources == (str(path),)
    assert found.used == 2


def test_measurements_of_several_tables_are_not_mixed():
    """Accuracies of one task and nats of another rank nothing together."""
    rows = [
        Measurement("vera", "", 0.9, source="a", seeds=5, table="bench"),
        Measurement("lora", "", 0.5, source="a", seeds=1, table="bench"),
        Measurement("lora", "", gained=0.3, source="b", seeds=2, table="real"),
        Measurement("vera", "", gained=-0.1, source="b", seeds=2, table="real"),
        Measurement("ia3", "", gained=0.1, source="b", seeds=2, table="real"),
    ]
    limits = Limits(backends=BOTH)
    first, second = (recommend(SHAPE, limits, measurements=rows, table=name) for name in (None, "real"))
    assert ids(first)[:2] == ["vera", "lora"]
    assert (first.used, first.sources, first.table, first.unit, first.other_tables) == (
        2,
        ("a",),
        "bench",
        "accuracy",
        ("real",),
    )
    assert ids(second)[:3] == ["lora", "ia3", "vera"]
    told = second.to_dict()
    assert (told["table"], told["unit"]) == ("real", "nats per token less than the model as it was")
    assert (told["measured_by"], told["other_tables"]) == (["b"], ["bench"])
    assert told["choices"][0]["measurement"]["seeds"] == 2
    with pytest.raises(ConfigError, match="no table 'rael' of measurements, only 'bench', 'real'; did you mean 'real'"):
        recommend(SHAPE, measurements=rows, table="rael")
    with pytest.raises(ConfigError, match="have accuracy in part and gained in part"):
        recommend(SHAPE, measurements=[rows[0], Measurement("lora", "", gained=1.0, table="bench")])
    assert recommend(SHAPE, measurements=()).used == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"method": "lora", "accuracy": 1, "gained": 1}]', "has both accuracy and gained"),
        (
            '[{"method": "lora", "gained": NaN}]',
            "gained of measurement 1 in .* is nan; it must be a number, in nats per token",
        ),
        ('[{"method": "lora", "gained": 1, "seeds": 0}]', "seeds of measurement 1 in .* is 0"),
        ('[{"method": "lora", "gained": 1, "seeds": true}]', "seeds of measurement 1 in .* is True"),
        ('[{"method": "lora", "gained": 1, "table": 3}]', "table of measurement 1 in .* is 3"),
        ("[", "is not JSON"),
        ("{}", "must hold a list of measurements"),
        ("[]", "must hold a list of measurements"),
        ("[1]", "must hold a list of measurements"),
        ('[{"method": "no", "accuracy": 1}]', "measurement 1 in .* is of method 'no'"),
        ('[{"method": "lora"}]', "accuracy of measurement 1 in .* is None; it must be a number, from 0 to 1"),
        ('[{"method": "lora", "accuracy": 1.5}]', "it must be a number, from 0 to 1"),
        ('[{"method": ["lora"], "accuracy": 1}]', "of which there is no card"),
        ('[{"method": "lora", "accuracy": NaN}]', "accuracy of measurement 1 in .* is nan"),
        ('[{"method": "lora", "accuracy": 1' + "0" * 400 + "}]", "is an integer of about 401 digits"),
        ('[{"method": "lora", "accuracy": 1, "seconds": -1}]', "seconds of measurement 1 in .* is -1"),
    ],
)
def test_measurements_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_measurements(path, list(CARDS))
    with pytest.raises(DataError, match="cannot read"):
        read_measurements(tmp_path / "none.json", list(CARDS))


@pytest.mark.parametrize(
    "limits", [Limits(max_parameters=0), Limits(max_share=float("nan")), Limits(max_file_bytes=-1)]
)
def test_limits_that_are_none(limits):
    with pytest.raises(ConfigError, match="it must be above 0"):
        recommend(SHAPE, limits)
