"""What stays as it is beneath an adapter, and what may move again once that is off; in the ways that put adapters on."""

import pytest
import torch

from anabranch.adapters import catalogue, load_peft, merge, save_peft, unload, unmerge
from anabranch.adapters.around import put_around, take_around
from anabranch.adapters.front import Front
from anabranch.adapters.ladder import Ladder
from anabranch.adapters.lora_mixer import load_mixture
from anabranch.adapters.low_rank import LowRank
from anabranch.adapters.put_on import put_on, take_off
from anabranch.adapters.routed import RoutedLowRank
from anabranch.errors import ConfigError
from anabranch.lm import Decoder
from anabranch.nn import MoE, SelfAttention
from anabranch.routing import BiasBalancer, LinearScore, Router, SwitchLoss, TopK
from anabranch.routing.fixed import fix, is_fixed, release
from anabranch.train.hooks import StepHooks

TOKENS = torch.randint(0, 257, (4, 24), generator=torch.Generator().manual_seed(0))
LORA = {"*.attention.q": LowRank.Config(rank=2)}


def model_of():
    """Its biases move at each step of a training that balances it."""
    score, select = LinearScore.Config(activation="sigmoid"), TopK.Config(top_k=1, normalize="sum")
    router = Router.Config(score=score, select=select, balance=(BiasBalancer.Config(),))
    return Decoder.Config(
        vocab_size=257,
        dim=16,
        num_layers=1,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=MoE.Config(num_experts=4, hidden_dim=8, router=router, shared_experts=1),
        max_positions=64,
    ).build(seed=0)


def moved(model, steps=3):
    """Whether biases moved in a few steps of a training."""
    (bias,) = (value for name, value in model.named_buffers() if name.endswith("expert_bias"))
    before, hooks = bias.clone(), StepHooks(model.train(), steps)
    hooks.run_after(0)
    for step in range(steps):
        hooks.run_before(step)
        model(TOKENS, TOKENS)
        hooks.run_after(step + 1)
    return not torch.equal(bias, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An adapter in peft's form."""
    root = tmp_path_factory.mktemp("fixed")
    model = model_of()
    catalogue.apply(model, "lora", rank=2)
    save_peft(root / "lora", model, family="glm4_moe")
    return root / "lora"


def routers(model):
    return [module for name, module in model.named_modules() if name.endswith("router")]


def test_what_is_put_on_later_is_not_fixed():
    model = model_of()
    assert not any(map(is_fixed, model.modules()))
    fix(model, "one")
    assert all(map(is_fixed, model.modules()))
    model.later = model_of()
    assert not any(map(is_fixed, model.later.modules()))
    release(model, "one")
    assert not any(map(is_fixed, model.modules()))
    # Nothing of it is in the state.
    assert not [name for name in model.state_dict() if "fixed" in name]


def test_a_base_is_fixed_until_all_have_released_it():
    model = model_of()
    fix(model, "one")
    fix(model, "other")
    fix(model, "one")
    release(model, "nobody")
    release(model, "one")
    assert all(map(is_fixed, model.modules()))
    release(model, "other")
    assert not any(map(is_fixed, model.modules()))


@pytest.mark.parametrize("way", ["put_on", "dora", "prompt-tuning", "lst", "mam", "full"])
def test_a_base_is_fixed_from_when_an_adapter_is_put_on_until_it_is_off(way):
    model = model_of()
    assert moved(model)
    if way == "put_on":
        put_on(model, LORA)
    else:
        options = {
            "dora": {"rank": 2},
            "prompt-tuning": {"tokens": 2},
            "lst": {"reduction": 2},
            "mam": {"tokens": 2, "width": 2},
            "full": {},
        }[way]
        applied = catalogue.apply(model, way, seed=0, **options)
    assert [is_fixed(router) for router in routers(model)] == [way != "full"]
    assert moved(model) == (way == "full")
    if way == "full":
        return
    if way == "put_on":
        take_off(model)
    else:
        applied.remove()
    assert not any(map(is_fixed, model.modules()))
    assert moved(model)


def test_what_is_taken_off_does_not_release_a_base_beneath_another():
    model = model_of()
    ladder = catalogue.apply(model, "lst", reduction=2)
    lora = catalogue.apply(model, "lora", rank=2)
    lora.remove()
    assert not moved(model)
    ladder.remove()
    assert moved(model)
    tokens = catalogue.apply(model, "prompt-tuning", tokens=2)
    put_on(model, LORA)
    tokens._take_off(keeps_base=True)
    assert moved(model)


def test_a_base_stays_fixed_while_an_adapter_is_in_its_matrices(folder):
    model = model_of()
    load_peft(folder, model, trainable=True, family="glm4_moe")
    assert not moved(model)
    merge(model)
    assert not moved(model)
    unmerge(model)
    assert not moved(model)
    unload(model)
    assert moved(model)
    load_peft(folder, model, family="glm4_moe")
    merge(model, keep=False)
    assert moved(model)


def test_a_mixture_of_given_adapters_stands_on_a_fixed_base(folder):
    model = model_of()
    load_mixture({"a": folder, "b": folder}, model, top_k=1, family="glm4_moe")
    assert not moved(model)


def test_what_cannot_be_put_on_fixes_nothing():
    model = model_of()
    with pytest.raises(ConfigError):
        put_on(model, {"*.nothing": LowRank.Config(rank=2)})
    with pytest.raises(ConfigError):
        catalogue.apply(model, "lora", targets=("nothing",))
    assert moved(model)


@pytest.mark.parametrize("is_around_first", [True, False])
def test_routers_of_the_adapter_itself_are_balanced_in_any_order(is_around_first):
    model = model_of()
    router = Router.Config(select=TopK.Config(top_k=1), balance=(SwitchLoss.Config(),))
    routed = {"*.attention.q": RoutedLowRank.Config(ranks=(2, 2), alphas=(2.0, 2.0), router=router)}
    ways = [lambda: put_around(model, front=Front.Config(num_tokens=2)), lambda: put_on(model, routed)]
    for way in ways if is_around_first else ways[::-1]:
        way()
    assert not moved(model)
    assert set(model.train()(TOKENS, TOKENS).auxiliary) == {"load_balancing"}
    own = [module for name, module in model.named_modules() if ".beside." in name and isinstance(module, Router)]
    assert own
    assert not any(map(is_fixed, own))
    take_around(model)
    take_off(model)
    assert moved(model)


@pytest.mark.parametrize("around", [{"front": Front.Config(num_tokens=2)}, {"ladder": Ladder.Config(reduction=2)}])
def test_unloading_takes_off_what_was_put_around_since(folder, around):
    model = model_of()
    config = model.config
    load_peft(folder, model, family="glm4_moe")
    put_around(model, **around)
    unload(model)
    assert model.config == config
    assert not any(isinstance(module, Front | Ladder) for module in model.modules())
    assert moved(model)
