"""The study of LoRA-Mixer: what its arms are, and its rule."""

import json
import signal
from pathlib import Path

import pytest
import torch

from anabranch.adapters import load_peft, read_peft
from anabranch.adapters.adapt import Row
from anabranch.adapters.lorahub import Found
from anabranch.lm import load_model
from anabranch.studies import adapter_bench, frozen, lora_mixer_controls, lora_mixer_experts
from anabranch.studies.adapter_bench import Bench, BenchSize
from anabranch.studies.harness import Results, outcome_of
from anabranch.studies.lora_mixer import ARMS, ArmConfig, Size, judge, make, run
from anabranch.studies.lora_mixer_controls import run_hub, run_one
from anabranch.studies.lora_mixer_experts import FEED_FORWARD, experts, mixed_rows, own_rows

RECORDED = Path(__file__).parents[2] / "studies" / "results"
SMALL = BenchSize(dim=16, num_layers=1, num_heads=1, base_steps=1, words_learned=8, words_measured=2)


def test_arms_differ_in_their_loss_alone():
    methods = {name: ArmConfig(arm=name).method(("a", "b", "c")) for name in ("none", "balance", "ours", "printed")}
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
    # In feed-forwards nothing else is other than in attention.
    assert ArmConfig(arm="ffn").method(("a", "b", "c")) == methods["ours"]


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
    size = Size(bench=SMALL, tasks=3, expert_rows=4, expert_steps=1, router_steps=1, rows=(3,), rank=2, batch_size=2)
    said = []

    def found(size, seed=0, **told):
        return experts(size, seed, Bench.kept(size.bench), said.append, **told)

    first, right = found(size)
    assert said == ["expert 1", "expert 2", "expert 3"]
    assert len({(Path(folder) / "adapter_model.safetensors").read_bytes() for folder in first}) == 3
    assert 0 <= right <= 1
    assert found(size.replace(rows=(6, 9), router_steps=2)) == (first, right)
    assert len(said) == 3
    assert found(size, seed=1)[0] != first
    assert found(size.replace(rank=3))[0] != first
    assert len(said) == 9
    beside = read_peft(found(size, targets=FEED_FORWARD)[0][0]).pairs
    assert {name.rpartition(".")[2] for name in beside} == {"gate_proj", "up_proj", "down_proj"}
    assert len(said) == 12


def test_experts_that_were_interrupted_are_kept_for_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_bench, "cache_folder", lambda: tmp_path)
    size = Size(bench=SMALL, tasks=3, expert_rows=4, expert_steps=3, rank=2, batch_size=2)
    base, whole = Bench.kept(SMALL), lora_mixer_experts.Trainer

    def signalled(event):
        if event.kind == "step" and event.step == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(lora_mixer_experts, "Trainer", lambda *told: whole(*told, on_event=signalled))
    with pytest.raises(KeyboardInterrupt):
        experts(size, 0, base, lambda said: None)
    assert not list(tmp_path.rglob("oracle.json"))
    monkeypatch.setattr(lora_mixer_experts, "Trainer", whole)
    assert len(experts(size, 0, base, lambda said: None)[0]) == 3


@pytest.fixture
def size(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_bench, "cache_folder", lambda: tmp_path)
    return Size(
        bench=SMALL,
        tasks=3,
        expert_rows=4,
        expert_steps=2,
        router_steps=5,
        rows=(3, 6),
        rank=2,
        alpha=4.0,
        batch_size=2,
    )


def numbers(adapter):
    return sum(pair.a_RC.numel() + pair.b_OR.numel() for pair in adapter.pairs.values())


def test_one_adapter_has_the_numbers_rows_and_steps_of_experts(size, tmp_path, monkeypatch):
    """Rank, scale, rows and steps of the control are those of all experts together, and of the routers."""
    folders, _ = experts(size, 0, Bench.kept(size.bench), lambda said: None)
    runs, here = [], lora_mixer_experts.trained

    def noted(method, bench, rows, out, steps, *told):
        task = here(method, bench, rows, out, steps, *told)
        task.write(tmp_path / f"one-{len(runs)}")
        runs.append((method, [json.loads(line) for line in rows.read_text().splitlines()], steps))
        return task

    monkeypatch.setattr(lora_mixer_controls, "trained", noted)
    assert set(run_one(size, 0, lambda said: None)) == {"accuracy_6", "whole"}
    mixed, own = mixed_rows(size, 0, 6), [row for number in range(3) for row in own_rows(size, 0, number)]
    assert [rows for _, rows, _ in runs] == [mixed, own + mixed]
    assert [steps for *_, steps in runs] == [5, 3 * 2 + 5]
    for number, (method, *_) in enumerate(runs):
        assert method.alpha / method.rank == size.alpha / size.rank
        assert numbers(read_peft(tmp_path / f"one-{number}")) == sum(numbers(read_peft(each)) for each in folders)


def test_static_weights_are_found_on_the_rows_of_routers_and_measured(size, monkeypatch):
    folders, right = experts(size, 0, Bench.kept(size.bench), lambda said: None)
    asked, measured = [], []

    def found(adapters, base, tokenizer, rows, **told):
        asked.append((len(adapters), rows, told))
        return Found((0.0, 1.0, 0.0), 2.0, 2.5, 40)

    def accuracy(model, pairs, bench, *, routed):
        measured.append((model, len(pairs)))
        return 0.25

    monkeypatch.setattr(lora_mixer_controls, "lorahub_weights", found)
    monkeypatch.setattr(lora_mixer_controls, "accuracy", accuracy)
    told = run_hub(size, 0, lambda said: None)
    assert told == {"oracle": right, "accuracy_6": 0.25, "weights": [0.0, 1.0, 0.0], "gained_nats": 0.5}
    [(count, rows, options)] = asked
    assert (count, options["search_seed"], "steps" in options) == (3, 0, False)
    wanted = [Row(row["task"], row["input"], row["output"]) for row in mixed_rows(size, 0, 6)]
    assert rows == wanted
    # Weights of one expert alone are that expert.
    [(model, pairs)] = measured
    alone = load_peft(folders[1], load_model(Bench.kept(size.bench).folder)[0])
    tokens = torch.arange(1, 9)[None]
    torch.testing.assert_close(model.eval()(tokens).logits_BLV, alone.eval()(tokens).logits_BLV)
    assert pairs == 3


@pytest.mark.parametrize("arm", ["hub", "ffn"])
def test_controls_are_whole(size, arm):
    found = run(ArmConfig(arm=arm, size=size), 0, lambda said: None)
    assert {name for name in found if name.startswith("accuracy")} == {"accuracy_6"}
    assert 0 <= found["accuracy_6"] <= 1
    if arm == "hub":
        assert len(found["weights"]) == 3
        assert found["gained_nats"] >= 0


def test_controls_void_nothing_of_before():
    """They came after the first arms had run, of which nothing changed."""
    entry = frozen.read(RECORDED, "lora_mixer").history[4]
    assert entry["voids"] == []
    assert {what for what in entry["changed"] if what.startswith("arm")} == {
        "arm one is new",
        "arm hub is new",
        "arm ffn is new",
    }
    outcome = outcome_of(make(full=True), RECORDED)
    assert not [claim.claim for claim in outcome.claims if claim.verdict == "void"]
    assert not outcome.outdated
