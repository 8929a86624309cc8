"""What stays as it is beneath an adapter, and what may move again once that is off; in the ways that put adapters on."""

import pytest

from anabranch.adapters import catalogue
from anabranch.adapters.low_rank import LowRank
from anabranch.adapters.put_on import put_on, take_off
from anabranch.lm import Decoder
from anabranch.nn import MoE, SelfAttention
from anabranch.routing.fixed import fix, is_fixed, release


def model_of():
    return Decoder.Config(
        vocab_size=32,
        dim=16,
        num_layers=1,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=MoE.Config(num_experts=2, hidden_dim=8),
        max_positions=16,
    ).build(seed=0)


def routers(model):
    return [module for name, module in model.named_modules() if name.endswith("router")]


def test_what_is_put_on_later_is_not_fixed():
    model = model_of()
    assert not any(map(is_fixed, model.modules()))
    fix(model)
    assert all(map(is_fixed, model.modules()))
    model.later = model_of()
    assert not any(map(is_fixed, model.later.modules()))
    release(model)
    assert not any(map(is_fixed, model.modules()))
    # Nothing of it is in the state.
    assert not [name for name in model.state_dict() if "fixed" in name]


@pytest.mark.parametrize("way", ["put_on", "dora", "prompt-tuning", "lst", "full"])
def test_a_base_is_fixed_from_when_an_adapter_is_put_on_until_it_is_off(way):
    model = model_of()
    if way == "put_on":
        put_on(model, {"*.attention.q": LowRank.Config(rank=2)})
    else:
        options = {"dora": {"rank": 2}, "prompt-tuning": {"tokens": 2}, "lst": {"reduction": 2}, "full": {}}[way]
        applied = catalogue.apply(model, way, seed=0, **options)
    assert [is_fixed(router) for router in routers(model)] == [way != "full"]
    if way == "full":
        return
    if way == "put_on":
        take_off(model)
    else:
        applied.remove()
    assert not any(map(is_fixed, model.modules()))
