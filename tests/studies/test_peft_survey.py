"""The study of the PEFT survey: what its arms have in parameters, its rule, its table, and its quick form."""

import json
import math

import pytest

from anabranch.adapters.catalogue import CARDS, MEASURED, Limits, Shape, estimate, find, read_measurements, recommend
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.studies.adapter_bench import BenchSize
from anabranch.studies.harness import Results
from anabranch.studies.peft_survey import METHODS, REAL, SHARE, ArmConfig, draw, judge, make, run, write_measurements


def shape_of_bench():
    size = BenchSize()
    hidden = size.dim * 8 // 3 // 8 * 8
    return Shape.of(
        Decoder.Config(
            dim=size.dim,
            num_layers=size.num_layers,
            attention=SelfAttention.Config(num_heads=size.num_heads),
            feed_forward=SwiGLU.Config(hidden_dim=hidden),
        )
    )


@pytest.mark.parametrize("id", [id for id in METHODS if id != "full"])
def test_a_method_has_at_most_a_twentieth_of_the_parameters(id):
    options = {name: value for name, value in METHODS[id].items() if name in find(id).options}
    assert 0 < estimate(find(id), shape_of_bench(), options).share <= SHARE


def test_arms():
    assert set(REAL) <= set(METHODS)
    assert len(METHODS) >= 12 + 1
    for id in METHODS:
        # What cannot be is refused when it is made.
        assert ArmConfig(method=id).of().build().name == id
    assert [arm.name for arm in make(full=True).arms][-1] == f"superni-{REAL[-1]}"
    assert (make().seeds, make(full=True).seeds) == ((0, 1), (0, 1, 2, 3, 4))


def runs(values, **others):
    return {
        seed: {"accuracy": value, "zero": 0.0, "share": 0.03, "formula_is_right": 1.0, **others}
        for seed, value in enumerate(values)
    }


FULL = [0.80, 0.82, 0.79, 0.81, 0.80]


def test_the_rule():
    near, far = [value - 0.001 * (seed % 3) for seed, value in enumerate(FULL)], [value - 0.2 for value in FULL]
    far[0] += 0.001
    made = {id: runs(near if number < 7 else far) for number, id in enumerate(METHODS)} | {"full": runs(FULL)}
    found = {claim.claim: claim for claim in judge(Results(made))}
    assert found["PRIMARY: bench: LoRA is at most 2 points below full fine-tuning"].verdict == "holds"
    assert found["bench: Ladder side-tuning is at most 2 points below full fine-tuning"].verdict == "does not hold"
    enough = next(claim for name, claim in found.items() if name.startswith("bench: at least six methods"))
    assert (enough.verdict, enough.ours, enough.limit) == ("holds", 6.0, 6.0)
    assert found["what learns is what the catalogue's formula says, in every run"].verdict == "holds"
    # One that has more than its share does not count, and without all methods nothing is counted.
    made["lora"] = runs(near) | {2: {**runs(near)[2], "share": 0.2}}
    assert judge(Results(made))[-2].verdict == "not resolved"
    del made["lst"]
    assert judge(Results(made))[-2].verdict == "not run"


def test_close_to_what_has_learned_nothing_says_nothing():
    """All methods never right, full fine-tuning among them."""
    made = {id: runs([0.0, 0.001, 0.0, 0.001, 0.0]) for id in METHODS}
    for id in REAL:
        made[f"superni-{id}"] = {
            seed: {"better": -3.0, "better_base": -3.0, "gained": 0.001 * seed, "formula_is_right": 1.0}
            for seed in range(5)
        }
    verdicts = {claim.claim: claim.verdict for claim in judge(Results(made))}
    close = [claim for claim in verdicts if "full fine-tuning" in claim]
    assert len(close) == len(METHODS) - 1 + 1 + 1
    assert {verdicts[claim] for claim in close} == {"not resolved"}
    # Once full fine-tuning has learned, they are decided.
    made |= {id: runs(FULL) for id in METHODS}
    made["superni-full"] = {seed: {**run, "gained": 0.1} for seed, run in made["superni-full"].items()}
    verdicts = {claim.claim: claim.verdict for claim in judge(Results(made))}
    assert {verdicts[claim] for claim in close} == {"holds"}


def test_the_picture_has_what_ran_and_lies_where_the_command_says(tmp_path):
    costs = {"parameters": 100, "training_kib": 9.0, "file_kib": 3.0}
    results = Results({"ia3": runs([0.9] * 5, **costs), "superni-lora": {0: {"gained": 1.0, "parameters": 9}}})
    draw(results, tmp_path / "peft_survey")
    assert (tmp_path / "peft_survey.png").is_file()
    told = (tmp_path / "peft_survey.svg").read_text()
    assert "ia3" in told
    assert "superni-lora" not in told
    assert (tmp_path / "peft_survey" / "measurements.json").is_file()
    # Of SuperNI alone there is nothing to draw, but a table.
    draw(Results({"superni-lora": {0: {"gained": 1.0, "parameters": 9}}}), tmp_path / "other")
    assert [path.name for path in tmp_path.rglob("other*")] == ["other"]
    draw(Results({}), tmp_path / "none")
    assert not list(tmp_path.glob("none*"))


def test_the_tables_are_what_recommend_reads(tmp_path):
    """That of the bench, and that of SuperNI, whose order is another."""
    made = {"ia3": runs([0.9] * 5, parameters=100), "lora": runs([0.7] * 5, parameters=900)}
    made["superni-lora"] = {seed: {"gained": 0.5 + 0.1 * seed, "nats": 2.0, "parameters": 800} for seed in range(2)}
    made["superni-ia3"] = {0: {"gained": 0.2, "nats": 1.0, "parameters": 80}}
    write_measurements(Results(made), tmp_path)
    rows = read_measurements(tmp_path / "measurements.json", list(CARDS))
    assert [(row.method, row.score, row.seeds, row.table) for row in rows] == [
        ("lora", 0.7, 5, "bench"),
        ("ia3", 0.9, 5, "bench"),
        ("lora", 0.55, 2, "superni"),
        ("ia3", 0.2, 1, "superni"),
    ]
    found = recommend(shape_of_bench(), Limits(), measurements=rows)
    assert [choice.estimate.card.id for choice in found.choices[:2]] == ["ia3", "lora"]
    assert found.sources == ("anabranch study peft_survey, adapter bench",)
    real = recommend(shape_of_bench(), Limits(), measurements=rows, table="superni")
    assert [choice.estimate.card.id for choice in real.choices[:2]] == ["lora", "ia3"]
    assert real.sources == ("anabranch study peft_survey, SmolLM2-135M-Instruct on Super-NaturalInstructions",)
    assert (
        found.choices[0].estimate.card.id
        != recommend(shape_of_bench(), Limits(), measurements=MEASURED).choices[0].estimate.card.id
    )
    assert json.loads((tmp_path / "measurements.json").read_text())[0]["parameters"] == 900


@pytest.mark.slow
@pytest.mark.parametrize("id", ["full", "prefix-tuning", "lst", "dora"])
def test_the_quick_form(id, tmp_path, monkeypatch):
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    config = next(arm.config for arm in make().arms if arm.name == id)
    found = run(config, 0, lambda text: None)
    assert found["formula_is_right"] == 1.0
    assert 0 <= found["accuracy"] <= 1
    # Of two rates both are ends.
    assert found["at_an_end"] == 1.0
    assert found["rate"] in config.size.rates
    assert all(math.isfinite(value) for value in found.values())
