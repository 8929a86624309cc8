"""The study of LoRA-Mixer: what its arms are, and its rule."""

import signal
from pathlib import Path

import pytest

from anabranch.studies import adapter_bench, lora_mixer
from anabranch.studies.adapter_bench import Bench, BenchSize
from anabranch.studies.harness import Results
from anabranch.studies.lora_mixer import ARMS, ArmConfig, Size, experts, judge, make


def test_arms_differ_in_their_loss_alone():
    methods = {name: ArmConfig(arm=name).method(("a", "b", "c")) for name in ARMS if name != "ssm"}
    found = {name: (each.balance_loss, each.entropy_loss, each.entropy) for name, each in methods.items()}
    assert found == {
        "none": (0.0, 0.0, "minimise"),
        "balance": (1.0, 0.0, "minimise"),
        "ours": (1.0, 0.1, "minimise"),
        "printed": (1.0, 0.1, "maximise"),
    }
    assert {each.replace(balance_loss=1.0, entropy_loss=0.1, entropy="minimise") for each in methods.values()} == {
        methods["ours"]
    }


def test_the_rule():
    def runs(**values):
        return {seed: {"zero": 0.0, **{name: each[seed] for name, each in values.items()}} for seed in range(5)}

    half = [0.50, 0.52, 0.48, 0.51, 0.49]
    better = [0.56, 0.575, 0.541, 0.57, 0.55]
    found = {
        claim.claim: claim
        for claim in judge(
            Results(
                {
                    "ours": runs(accuracy_240=better, evenness=[0.5, 0.51, 0.49, 0.5, 0.52]),
                    "balance": runs(accuracy_480=half),
                }
            )
        )
    }
    assert found["PRIMARY: 240 rows do what 480 do without"].verdict == "holds"
    even = found["no expert has more than three times the load of another"]
    assert (even.verdict, even.limit) == ("holds", pytest.approx(1 / 3))
    assert found["the sign of ours is better than the printed one"].verdict == "not run"


def test_both_sizes_are_made():
    assert make().seeds == (0, 1)
    assert make(full=True).seeds == (0, 1, 2, 3, 4)
    assert [arm.name for arm in make(full=True).arms] == list(ARMS)
    # It needs an extra, which a quick run is not to fail for.
    assert set(ARMS) - set(make().default_arms) == {"ssm"}
    assert make(full=True).default_arms is None


def test_the_rule_of_a_state_space():
    def runs(**values):
        return {seed: {name: each[seed] for name, each in values.items()} for seed in range(5)}

    own = [0.90, 0.92, 0.91, 0.93, 0.90]
    near = [value - 0.005 * (seed % 2) for seed, value in enumerate(own)]
    far = [value - 0.3 - 0.01 * seed for seed, value in enumerate(own)]
    found = {claim.claim: claim for claim in judge(Results({"ssm": runs(accuracy=near, oracle=own, uniform=far)}))}
    assert found["state space: routers are better than the average of experts"].verdict == "holds"
    close = found["state space: at most 2 points below each task's own expert"]
    assert (close.verdict, close.limit) == ("holds", pytest.approx(sum(own) / 5 - 0.02))


def test_arms_of_a_seed_share_experts(tmp_path, monkeypatch):
    """They are the same in all arms; each arm trained them anew. Another seed, or another way of training them, has others."""
    monkeypatch.setattr(adapter_bench, "cache_folder", lambda: tmp_path)
    bench = BenchSize(dim=16, num_layers=1, num_heads=1, base_steps=1, words_learned=8, words_measured=2)
    size = Size(bench=bench, tasks=3, expert_rows=4, expert_steps=1, router_steps=1, rows=(3,), rank=2, batch_size=2)
    said = []

    def found(size, seed=0):
        return experts(size, seed, Bench.kept(size.bench), said.append)

    first, right = found(size)
    assert said == ["expert 1", "expert 2", "expert 3"]
    assert len({(Path(folder) / "adapter_model.safetensors").read_bytes() for folder in first}) == 3
    assert 0 <= right <= 1
    assert found(size.replace(rows=(6, 9), router_steps=2)) == (first, right)
    assert len(said) == 3
    assert found(size, seed=1)[0] != first
    assert found(size.replace(rank=3))[0] != first
    assert len(said) == 9


def test_experts_that_were_interrupted_are_kept_for_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_bench, "cache_folder", lambda: tmp_path)
    bench = BenchSize(dim=16, num_layers=1, num_heads=1, base_steps=1, words_learned=8, words_measured=2)
    size = Size(bench=bench, tasks=3, expert_rows=4, expert_steps=3, rank=2, batch_size=2)
    base, whole = Bench.kept(bench), lora_mixer.Trainer

    def signalled(event):
        if event.kind == "step" and event.step == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(lora_mixer, "Trainer", lambda *told: whole(*told, on_event=signalled))
    with pytest.raises(KeyboardInterrupt):
        experts(size, 0, base, lambda said: None)
    assert not list(tmp_path.rglob("oracle.json"))
    monkeypatch.setattr(lora_mixer, "Trainer", whole)
    assert len(experts(size, 0, base, lambda said: None)[0]) == 3
