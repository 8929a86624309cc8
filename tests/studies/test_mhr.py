"""The study of MHR: its bench by hand, its rule, and that its arms have as many numbers."""

import pytest

from anabranch.adapters.tasks import task_names
from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.studies.adapter_bench import FEW, LEARNED, STEPS, BenchSize, _tensors, accuracy, bench_words, pair_rows
from anabranch.studies.harness import Results
from anabranch.studies.mhr import ArmConfig, Size, judge, make


def test_steps_by_hand():
    expected = {
        "reverse": "ananab",
        "rot1": "cbobob",
        "drop vowels": "bnn",
        "swap ends": "aananb",
        "repeat last": "bananaa",
        "sort": "aaabnn",
        "cut last": "banan",
        "rotate left": "ananab",
    }
    assert {name: step("banana") for name, step in STEPS.items()} == expected


def test_new_tasks_have_each_step_once_in_each_place():
    assert (len(LEARNED), len(FEW)) == (48, 8)
    assert not set(LEARNED) & set(FEW)
    assert {first for first, _ in FEW} == {second for _, second in FEW} == set(STEPS)


def test_words_are_real_and_apart():
    learned, measured = bench_words(BenchSize())
    assert (len(learned), len(measured)) == (1200, 100)
    assert not set(learned) & set(measured)
    rows = pair_rows(LEARNED[:2], learned, per_task=3, seed=0)
    assert rows == pair_rows(LEARNED[:2], learned, per_task=3, seed=0)
    assert len(rows) == 6
    assert rows[0]["input"].startswith(f"{rows[0]['task']}: ")


def test_targets_are_answers_one_place_early():
    tokenizer = ByteTokenizer.Config().build()
    token_NL, target_NL = _tensors([{"input": "ab", "output": "c"}, {"input": "a", "output": "cd"}], tokenizer)
    assert token_NL.tolist() == [[97, 98, 10, 99], [97, 10, 99, 100]]
    assert target_NL.tolist() == [[-100, -100, 99, tokenizer.eos_id], [-100, 99, 100, tokenizer.eos_id]]


def test_arms_have_as_many_numbers():
    config = Decoder.Config(
        dim=64, num_layers=1, attention=SelfAttention.Config(num_heads=4), feed_forward=SwiGLU.Config(hidden_dim=64)
    )
    learned = {}
    for name in ("lora", "poly", "mhr"):
        model = (
            ArmConfig(method=name, learning_rate=1e-3, size=Size())
            .of()
            .build()
            .begin(config.build(), ["a", "b"], seed=0)
        )
        numbers = {key: p.numel() for key, p in model.named_parameters() if p.requires_grad}
        learned[name] = sum(number for key, number in numbers.items() if not key.endswith("table.z"))
    assert len(set(learned.values())) == 1
    assert task_names(model) == ("a", "b")
    size = BenchSize(words_measured=2)
    assert accuracy(config.build(), FEW[:1], size, routed=False) == 0.0


def runs(values, **others):
    return {
        seed: {"accuracy": value, **{key: each[seed] for key, each in others.items()}}
        for seed, value in enumerate(values)
    }


def test_the_margin_is_part_of_the_claim():
    lora = [0.50, 0.52, 0.48, 0.51, 0.49]
    far, near = ([value + more for value in lora] for more in (0.12, 0.03))
    far[0], near[0] = far[0] + 0.001, near[0] + 0.001
    found = {claim.claim: claim for claim in judge(Results({"lora": runs(lora), "poly": runs(far), "mhr": runs(near)}))}
    primary = found["PRIMARY: Poly beats one LoRA by 5 points on 48 tasks"]
    assert primary.verdict == "holds"
    assert primary.difference == pytest.approx(0.1202)
    assert primary.limit == pytest.approx(0.55)
    assert found["MHR beats one LoRA by 5 points on 48 tasks"].verdict == "does not hold"
    assert found["MHR beats Poly on 48 tasks"].verdict == "does not hold"
    assert found["MHR-mu learns new tasks better than Poly-mu"].verdict == "not run"


def test_both_sizes_are_made():
    assert make().seeds == (0, 1)
    assert make(full=True).seeds == (0, 1, 2, 3, 4)
    bench, real = ["lora", "poly", "mhr"], ["superni-lora", "superni-poly", "superni-mhr"]
    assert [arm.name for arm in make(full=True).arms] == [*bench, *real]
    # Weights and rows that a quick run is not to fail for.
    assert list(make().default_arms) == bench
    assert make(full=True).default_arms is None
