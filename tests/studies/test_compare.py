import json

import pytest

from anabranch import presets
from anabranch.data import Files
from anabranch.errors import ConfigError
from anabranch.studies import training
from anabranch.studies.compare import compare, comparison, make_rows
from anabranch.studies.harness import Results


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
    with pytest.raises(ConfigError, match=r"^steps of dense is 4, of moe 3; designs are compared at one budget$"):
        comparison({"moe": designs["moe"], "dense": other}, (0,))
    with pytest.raises(ConfigError, match="two or more"):
        comparison({"moe": designs["moe"]}, (0,))


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
