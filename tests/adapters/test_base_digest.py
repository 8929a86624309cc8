"""What tells the base of an adapter from other models: the same in every type and whatever stands beside it, another for another."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anabranch.adapters.base_digest import base_digest, is_same_base
from anabranch.adapters.beside import Beside
from anabranch.adapters.bottleneck import Bottleneck
from anabranch.adapters.low_rank import LowRank
from anabranch.adapters.put_on import put_on, take_off
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def decoder(seed=0, **changes):
    fields = {
        "vocab_size": 61,
        "dim": 16,
        "num_layers": 2,
        "max_positions": 32,
        "attention": SelfAttention.Config(num_heads=2),
        "feed_forward": SwiGLU.Config(hidden_dim=24),
        "init_std": 0.2,
        **changes,
    }
    return Decoder.Config(**fields).build(seed=seed).eval()


def module(seed=0):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    made[1].running_mean.normal_()
    return made


MODELS = {"ours": decoder, "a module": module}


def is_same(one, other):
    found = is_same_base(base_digest(one), base_digest(other))
    assert found == is_same_base(base_digest(other), base_digest(one))
    return found


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("kind", TYPES)
def test_a_base_is_known_again_in_every_type_and_another_is_not(make, kind):
    assert is_same(make(), make().to(kind))
    assert not is_same(make(), make(1).to(kind))


@given(data=st.data())
def test_one_number_among_those_that_are_looked_at_makes_another_base(data):
    """Of a tensor of up to 512 numbers all are."""
    model, other = decoder(), decoder()
    name = data.draw(st.sampled_from(sorted(dict(other.named_parameters()))))
    flat = dict(other.named_parameters())[name].data.view(-1)
    place = data.draw(st.integers(0, min(len(flat), 512) - 1)) * max(1, len(flat) // 512)
    flat[place] += 1
    assert not is_same(model, other)


def test_names_and_shapes_count():
    one, other = nn.ParameterDict({"a": torch.zeros(6)}), nn.ParameterDict({"b": torch.zeros(6)})
    assert not is_same(one, other)
    assert not is_same(one, nn.ParameterDict({"a": torch.zeros(2, 3)}))
    assert is_same(one, nn.ParameterDict({"a": torch.zeros(6)}))


@pytest.mark.parametrize("linears", [{"*.attention.*": LowRank.Config(rank=2)}, {"*.down": Bottleneck.Config(width=2)}])
def test_what_stands_beside_the_matrices_of_our_model_does_not_count(linears):
    model = put_on(decoder(), linears)
    digest = base_digest(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert base_digest(model) == digest == base_digest(decoder()) == base_digest(take_off(model))


def test_what_stands_beside_the_matrices_of_a_module_does_not_count():
    model = module()
    digest = base_digest(model)
    model[0] = Beside(model[0], nn.Linear(4, 6), "0")
    assert base_digest(model) == digest
    model[0].matrix.weight.data[0, 0] += 1
    assert not is_same_base(base_digest(model), digest)


def test_what_a_module_counts_in_training_does_not_count():
    model = module()
    digest = base_digest(model)
    model.train()(torch.randn(8, 4))
    assert base_digest(model) == digest


def test_a_parameter_under_two_names_counts_once_and_an_empty_one_is_no_harm():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    assert is_same(model, copy.deepcopy(model))
    assert base_digest(nn.ParameterDict({"a": torch.zeros(0)}))["whole"]


def test_the_embedding_alone_tells_where_one_of_two_is_in_few_bits():
    told, other = base_digest(decoder()), base_digest(decoder())
    other["whole"] = dict.fromkeys(other["whole"], "other")
    assert not is_same_base(told, other)
    other["few_bits"] = {"kinds": "int8"}
    assert is_same_base(told, other)
    assert not is_same_base(told, {**base_digest(decoder(1)), "few_bits": other["few_bits"]})


@pytest.mark.parametrize("told", [{}, {"names": {}}, {"names": "x", "whole": 3}, [], "text", 7])
def test_what_is_no_digest_raises(told):
    with pytest.raises((AttributeError, KeyError, TypeError)):
        is_same_base(told, base_digest(module()))
