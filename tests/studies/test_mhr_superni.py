"""The arms of MHR on real tasks: whole from rows to claims, with a tiny model and made-up rows in their place."""

import math

import pytest

from anabranch.adapters.adapt import Row
from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, save_model
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.studies import mhr_superni, superni
from anabranch.studies.harness import Results
from anabranch.studies.mhr import ArmConfig, judge, make

WAYS = {"lora": ("full",), "poly": ("full", "z", "mu", "random"), "mhr": ("full", "z", "mu", "random")}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A model of a few numbers in the place of SmolLM2's, and three tasks of two rows."""
    config = Decoder.Config(
        dim=64,
        num_layers=1,
        attention=SelfAttention.Config(num_heads=8),
        feed_forward=SwiGLU.Config(hidden_dim=32),
        max_positions=64,
    )
    save_model(tmp_path / "tiny", config.build(seed=0), ByteTokenizer.Config().build())
    seen = []

    def rows_of(task, split):
        seen.append((task, split))
        return [Row(task, f"{task} {number}", "yes" if number else "no") for number in range(2)]

    monkeypatch.setattr(mhr_superni, "find_weights", lambda: tmp_path / "tiny")
    monkeypatch.setattr(superni, "some_tasks", lambda pool, others: (("a", "b")[:pool], ("c",)[:others]))
    monkeypatch.setattr(superni, "rows_of", rows_of)
    return seen


@pytest.mark.parametrize("method", ["lora", pytest.param("poly", marks=pytest.mark.slow), "mhr"])
def test_the_quick_form_is_whole(method, tiny):
    size = make().arms[0].config.size
    found = mhr_superni.run(ArmConfig(method=method, learning_rate=3e-3, size=size, is_real=True), 0, lambda text: None)
    names = ["", "_zero", *(f"_few_{way}" for way in WAYS[method])]
    assert set(found) == {f"{what}{name}" for what in ("better", "rouge") for name in names}
    assert all(math.isfinite(value) for value in found.values())
    assert all(value < 0 for name, value in found.items() if name.startswith("better"))
    # A new task is learned from its own rows, and no row that is measured is learned.
    assert {("a", "train"), ("b", "train"), ("a", "test"), ("b", "test"), ("c", "train"), ("c", "test")} == set(tiny)


def test_seeds_judge_other_rows_and_learn_from_other_examples(tiny, monkeypatch):
    monkeypatch.setattr(
        superni, "rows_of", lambda task, split: [Row(task, f"{task} {split} {n}", "yes") for n in range(9)]
    )
    written, judged, size = [], [], make().arms[0].config.size.replace(real_rows=4)
    size = size.replace(bench=size.bench.replace(shots=5))
    write, measure = superni.write_task, mhr_superni.measure_rows

    def writing(path, rows):
        written.append((path.name, {row.prompt for row in rows}))
        return write(path, rows)

    def measuring(model, tokenizer, rows, **options):
        judged.append({row.prompt for row in rows})
        return measure(model, tokenizer, rows, **options)

    monkeypatch.setattr(superni, "write_task", writing)
    monkeypatch.setattr(mhr_superni, "measure_rows", measuring)
    found = []
    for seed in (0, 1):
        written.clear(), judged.clear()
        mhr_superni.run(ArmConfig(method="lora", learning_rate=3e-3, size=size, is_real=True), seed, lambda text: None)
        shots = dict(written)["0.jsonl"]
        assert (len(shots), len(judged[0]), len(judged[1])) == (5, 8, 4)
        # What is new is judged on the same rows without examples and after them.
        assert all(rows == judged[1] for rows in judged[1:])
        found.append((judged[0], judged[1], shots))
    first, second = found
    assert not first[0] & second[0]
    assert not first[1] & second[1]
    assert first[2] != second[2]


def test_the_rule_on_real_tasks():
    def runs(**values):
        return {seed: {name: each[seed] for name, each in values.items()} for seed in range(5)}

    base = [-2.0, -2.1, -1.9, -2.05, -2.0]
    above = [value + 0.1 + 0.001 * seed for seed, value in enumerate(base)]
    near = [value - 0.005 * (seed % 2) for seed, value in enumerate(above)]
    made = Results(
        {
            "superni-lora": runs(better=base, better_few_full=above),
            "superni-mhr": runs(better=above, better_few_full=above, better_few_mu=near),
        }
    )
    found = {claim.claim: claim for claim in judge(made)}
    assert found["SuperNI: MHR beats one LoRA on 32 tasks"].verdict == "holds"
    close = found["SuperNI: MHR-mu is at most 0.02 nats a token behind a router on new tasks"]
    assert close.verdict == "holds"
    assert close.interval is not None
    assert found["SuperNI: MHR learns new tasks better than LoRA (open)"].verdict == "not resolved"
    assert found["SuperNI: Poly beats one LoRA on 32 tasks"].verdict == "not run"
