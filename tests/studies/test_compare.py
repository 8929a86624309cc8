import functools
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch import presets
from anabranch.config import from_dict, to_dict
from anabranch.data import BpeTokenizer, DataConfig, Domain, Files, Mixture, Stdlib, Table
from anabranch.errors import AnabranchError, ConfigError, DataError
from anabranch.studies import compare as comparing
from anabranch.studies import training
from anabranch.studies.compare import compare, comparison, make_rows
from anabranch.studies.harness import Results
from anabranch.studies.records import changes
from anabranch.train import RunConfig, TrainConfig
from anabranch.train.config import Parallel, Start


@pytest.fixture
def designs(tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n\n\n" * 20)
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ANABRANCH_NO_KERNELS", "1")
    monkeypatch.setattr(training, "FINAL_TOKENS", 512)
    monkeypatch.setattr(training, "CURVE_TOKENS", 128)

    def small(name):
        config = presets.find(name)("tiny")
        data = config.data.replace(corpus=Files.Config(paths=(str(text),)), sequence_length=32, validation_fraction=0.2)
        return config.replace(
            model=config.model.replace(dim=16, num_layers=2),
            data=data,
            train=config.train.replace(steps=3, batch_size=2),
        )

    return {name: small(name) for name in ("moe", "rexmoe-open", "dense")}


def test_trains_measures_and_writes(designs, tmp_path):
    rows, outcome = compare(designs, tmp_path / "out", seeds=(0, 1))
    assert [row.design for row in rows] == ["moe", "rexmoe-open", "dense"]
    assert all(row.seeds == [0, 1] for row in rows)
    assert rows[0].difference is None
    assert rows[1].difference.count == 2
    first = (
        outcome.results.values("rexmoe-open", "bits_per_byte")[0] - outcome.results.values("moe", "bits_per_byte")[0]
    )
    second = (
        outcome.results.values("rexmoe-open", "bits_per_byte")[1] - outcome.results.values("moe", "bits_per_byte")[1]
    )
    assert rows[1].difference.mean == pytest.approx((first + second) / 2)
    count = designs["moe"].model.count(32)
    assert rows[0].metrics["parameters"] == count.parameters
    assert rows[0].metrics["flops_per_token"] == count.flops
    assert rows[0].metrics["peak_memory_bytes"] > 1e6
    assert "max_violation_layer" not in rows[2].metrics
    assert json.dumps([row.to_dict() for row in rows])
    assert (tmp_path / "out" / "compare.png").is_file()
    assert len(list((tmp_path / "out" / "compare").glob("*-seed*.json"))) == 6


def test_designs_must_share_one_budget(designs):
    other = designs["dense"].replace(train=designs["dense"].train.replace(steps=4))
    with pytest.raises(ConfigError, match=r"^train\.steps of dense is 4, of moe 3; designs are compared at one budget"):
        comparison({"moe": designs["moe"], "dense": other}, (0,))
    with pytest.raises(ConfigError, match="two or more"):
        comparison({"moe": designs["moe"]}, (0,))


def test_without_held_out_text_nothing_is_trained(designs, tmp_path):
    def none(config):
        return config.replace(data=config.data.replace(validation_fraction=0.0))

    with pytest.raises(ConfigError, match=r"data\.validation_fraction is 0, so there would be no held-out text"):
        compare({name: none(config) for name, config in designs.items()}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"data\.validation_fraction is 0"):
        training.train_and_measure(none(designs["dense"]), 0, print)


@pytest.mark.slow
def test_other_files_behind_the_same_path_are_trained_on_anew(designs, tmp_path):
    two = {name: designs[name] for name in ("moe", "dense")}
    first, _ = compare(two, tmp_path / "out", seeds=(0,))
    for number in range(30):
        (tmp_path / "text" / f"{number}.py").write_text(f"lorem {number} ipsum\n" * 40)
    told = []
    second, _ = compare(two, tmp_path / "out", seeds=(0,), progress=told.append)
    fresh, _ = compare(two, tmp_path / "fresh", seeds=(0,))
    assert second[0].bits_per_byte == fresh[0].bits_per_byte != first[0].bits_per_byte
    assert second[1].difference == fresh[1].difference
    assert sum("read other text" in text for text in told) == 2


def test_finished_runs_count_for_their_text_and_their_whole_config(designs, tmp_path, monkeypatch):
    trained = []

    def fake(config, seed, progress):
        trained.append(config.data.build().fingerprint())
        return {"bits_per_byte": len(trained) / 8}

    monkeypatch.setattr(comparing, "train_and_measure", fake)
    monkeypatch.setattr(comparing, "draw_arms", lambda *args, **options: None)
    monkeypatch.setattr(comparing, "draw_costs", lambda *args, **options: None)

    def counted(two):
        rows, _ = compare(two, tmp_path / "out", seeds=(0,))
        return len(trained), [row.bits_per_byte.mean for row in rows]

    two = {name: designs[name] for name in ("moe", "dense")}
    assert counted(two) == counted(two) == (2, [1 / 8, 2 / 8])
    (tmp_path / "text" / "0.py").write_text("another\n" * 99)
    assert counted(two) == counted(two) == (4, [3 / 8, 4 / 8])

    def with_data(**changes):
        return {name: config.replace(data=config.data.replace(**changes)) for name, config in two.items()}

    code = Domain(corpus=two["moe"].data.corpus)
    assert counted(with_data(corpus=Mixture.Config(domains={"code": code})))[0] == 6
    assert counted(with_data(corpus=Mixture.Config(domains={"code": code, "more": code})))[0] == 8
    assert counted(with_data(validation_fraction=0.3))[0] == 10
    assert len(set(trained)) == 5


def test_the_same_text_elsewhere_is_the_same_text(designs, tmp_path):
    moved = tmp_path / "moved" / "text"
    shutil.copytree(tmp_path / "text", moved)
    config = designs["dense"].data
    other = config.replace(corpus=Files.Config(paths=(str(moved),)))
    assert config.build().fingerprint() == other.build().fingerprint()
    (moved / "3.py").write_text("x = 1\n")
    assert config.build().fingerprint() != other.build().fingerprint()
    # The cut between the splits counts as well as the text.
    assert config.replace(validation_fraction=0.4).build().fingerprint() != config.build().fingerprint()


@pytest.mark.slow
def test_text_that_changes_while_designs_are_trained(designs, tmp_path):
    two = {name: designs[name] for name in ("moe", "dense")}

    def change(text):
        if text.startswith("moe seed 0") and "finished" in text:
            (tmp_path / "text" / "0.py").write_text("another\n" * 99)

    with pytest.raises(DataError, match="has changed since the first of these runs was started"):
        compare(two, tmp_path / "out", seeds=(0,), progress=change)
    _, outcome = compare(two, tmp_path / "out", seeds=(0,))
    assert outcome.outdated == []
    assert {arm: list(runs) for arm, runs in outcome.results.runs.items()} == {"moe": [0], "dense": [0]}


def mixed(**weights):
    domains = {name: Domain(corpus=Stdlib.Config(max_bytes=1000), weight=weight) for name, weight in weights.items()}
    return Mixture.Config(domains=domains)


CORPORA = [Stdlib.Config(), Files.Config(paths=("a", "b")), mixed(code=1.0, docs=2.0), Table.Config(paths=("t",))]


def walk(value, path=()):
    """(path, value) of all that can be set in a JSON form: scalars, lists, parts with a kind, tables whose keys somebody wrote."""
    if not isinstance(value, dict) or "kind" in value or (value and all(isinstance(v, dict) for v in value.values())):
        yield path, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        if name != "kind":
            yield from walk(item, (*path, name))


def changed(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def candidates(value):
    """Other values for a place that holds ``value``; which of them are valid is for the config to say."""
    if isinstance(value, dict) and "kind" not in value:
        first, *rest = value.items()
        return [{**value, "another": first[1]}, dict(rest), dict([(f"{first[0]}2", first[1]), *rest])]
    if isinstance(value, dict):
        return [{"kind": "files", "paths": ["else"]}, *({"kind": kind} for kind in ("constant", "wsd", "bytes"))]
    if isinstance(value, list):
        return [[*value, *value], value[::-1], value[:-1], [0.5, 0.75]]
    numbers = [value + 1, value * 2, value / 2, value + 0.25] if isinstance(value, int | float) else [1, 512, 0.5]
    words = ("text", "latin-1", "file", "bfloat16", "ddp", "cpu", "sqrt", "linear", "min_max", "mezo", "ring", "1f1b")
    return [not value, *numbers, None, *words, "simulated"]


SECTIONS = {"data": DataConfig, "train": TrainConfig, "parallel": Parallel}


def parsed(section, form):
    try:
        return from_dict(SECTIONS[section], form)
    except AnabranchError:
        return None


@functools.cache
def alternatives(place):
    """(config, place's path, [configs with another valid value there]) of a place outside the design."""
    config, section, path, value = PLACES[place]
    form = to_dict(getattr(config, section))
    found = [parsed(section, changed(form, path, other)) for other in candidates(value)]
    valid = [other for other in found if other is not None and to_dict(other) != form]
    return config, ".".join(map(str, (section, *path))), [config.replace(**{section: other}) for other in valid]


def places():
    """All places outside the design, found by walking whole configs: fields that come later are among them."""
    for number, corpus in enumerate(CORPORA):
        config = RunConfig(data=DataConfig(corpus=corpus, tokenizer=BpeTokenizer.Config()))
        for section in SECTIONS:
            for path, value in walk(json.loads(json.dumps(to_dict(getattr(config, section))))):
                of_mixture = path == ("corpus", "max_bytes") and isinstance(
                    corpus, Mixture.Config
                )  # only None is valid
                # Of the schedule that is the default there is one visit.
                of_schedule = path == ("visits",)
                if path and (number == 0 or path[0] == "corpus") and not (of_mixture or of_schedule):
                    yield config, section, path, value


PLACES = list(places())


def test_every_place_outside_the_design_has_another_value():
    """So the property below says something of each of them."""
    assert {section for _, section, _, _ in PLACES} == {*vars(RunConfig())} - {"model", "start"} == {*SECTIONS}
    assert [path for _, path, others in map(alternatives, range(len(PLACES))) if not others] == []


@given(st.sampled_from(range(len(PLACES))), st.integers(0), st.booleans())
@settings(max_examples=150, deadline=None)
def test_whatever_changes_outside_the_design_makes_runs_incomparable(place, choice, swap):
    config, path, others = alternatives(place)
    other = others[choice % len(others)]
    one, two = (other, config) if swap else (config, other)
    with pytest.raises(ConfigError, match="all but the model must be equal") as raised:
        comparison({"one": one, "two": two}, (0,))
    assert path.split(".")[1] in str(raised.value)
    # A run of one is none of the other.
    assert changes(json.loads(json.dumps(to_dict(one))), two)
    assert not changes(json.loads(json.dumps(to_dict(one))), one)


def test_runs_that_start_from_other_weights_are_not_compared_with_those_that_do_not():
    fresh = RunConfig()
    started = fresh.replace(start=Start(model="elsewhere"))
    with pytest.raises(ConfigError, match="all but the model must be equal") as raised:
        comparison({"one": fresh, "two": started}, (0,))
    assert "start" in str(raised.value)
    assert changes(json.loads(json.dumps(to_dict(fresh))), started)
    assert changes(json.loads(json.dumps(to_dict(started))), started.replace(start=Start(model="elsewhere still")))


def test_rows_of_made_up_numbers():
    results = Results(
        {
            "a": {0: {"bits_per_byte": 2.0, "parameters": 10}, 1: {"bits_per_byte": 3.0, "parameters": 10}},
            "b": {0: {"bits_per_byte": 1.9, "parameters": 12}, 1: {"bits_per_byte": 2.7, "parameters": 12}},
        }
    )
    first, second = make_rows(results, ["a", "b", "absent"])
    assert first.bits_per_byte.mean == 2.5
    assert second.difference.mean == pytest.approx(-0.2)
    # Two seeds: t_0.975(1) = 12.706, deviation 0.1414, half width 12.706 * 0.1414 / sqrt(2) = 1.2706.
    assert second.difference.interval == pytest.approx([-1.4706, 1.0706], abs=1e-3)
    assert second.to_dict()["parameters"] == 12
    assert first.to_dict()["difference"] is None
