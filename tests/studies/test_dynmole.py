"""The study of DynMoLE: that its arms have as many numbers, what they are, and its rule."""

import pytest

from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.studies.dynmole import ARMS, ArmConfig, Size, judge, make
from anabranch.studies.harness import Results


def test_one_lora_has_at_least_as_many_numbers():
    size = Size()
    config = Decoder.Config(
        dim=size.bench.dim,
        num_layers=1,
        attention=SelfAttention.Config(num_heads=size.bench.num_heads),
        feed_forward=SwiGLU.Config(hidden_dim=size.bench.dim * 8 // 3 // 8 * 8),
    )
    learned = {}
    for name in ARMS:
        model = ArmConfig(arm=name, size=size).method().build().begin(config.build(), ["a"], seed=0)
        learned[name] = sum(each.numel() for each in model.parameters() if each.requires_grad)
    lora = learned.pop("lora")
    assert len(set(learned.values())) == 1
    assert learned["dynmole"] <= lora < 1.04 * learned["dynmole"]


def test_arms_differ_in_their_routing_alone():
    methods = {name: ArmConfig(arm=name).method() for name in ARMS}
    whole = methods["dynmole"]
    assert methods["no_entropy"] == whole.replace(entropy_loss=0.0)
    assert methods["shannon"] == whole.replace(entropy="shannon")
    plain = whole.replace(entropy_loss=0.0, balance_loss=0.0)
    assert methods["soft"] == plain.replace(policy="soft")
    assert methods["top2"] == plain.replace(policy="top_k", renormalize=True)
    assert (whole.entropy_loss, whole.balance_loss, whole.entropy_threshold) == (1e-2, 1e-3, 0.9)


def test_the_rule():
    def runs(accuracy, **others):
        return {
            seed: {"accuracy": value, "none": 0.0, **{name: each[seed] for name, each in others.items()}}
            for seed, value in enumerate(accuracy)
        }

    idle = [0.6, 0.61, 0.59, 0.62, 0.6]
    found = {
        claim.claim: claim
        for claim in judge(
            Results(
                {
                    "lora": runs([0.50, 0.52, 0.48, 0.51, 0.49]),
                    "dynmole": runs([0.61, 0.62, 0.585, 0.60, 0.60], idle_share=idle),
                    "top2": runs([0.61, 0.60, 0.59, 0.62, 0.57]),
                }
            )
        )
    }
    assert found["PRIMARY: above one LoRA of as many numbers"].verdict == "holds"
    assert found["at most 60% of experts are active at the end"].verdict == "holds"
    assert found["at most 60% of experts are active at the end"].limit == pytest.approx(0.4)
    assert found["at most 0.3 points below top-2"].verdict == "not resolved"
    assert found["Tsallis' entropy above Shannon's"].verdict == "not run"


def test_both_sizes_are_made():
    assert make().seeds == (0, 1)
    assert make(full=True).seeds == (0, 1, 2, 3, 4)
    assert [arm.name for arm in make(full=True).arms] == list(ARMS)
