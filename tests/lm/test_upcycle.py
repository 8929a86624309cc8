import re

import pytest
import torch

from anabranch.config import configclass
from anabranch.errors import ConfigError
from anabranch.experts.rexmoe import ReXMoE
from anabranch.lm import Decoder, average, upcycle
from anabranch.lm.recipes import start_from
from anabranch.nn import Dense, MoE, SelfAttention, SwiGLU
from anabranch.nn.quantize import quantize
from anabranch.routing import BiasBalancer, CosineScore, GroupTopK, LinearScore, Router, SwitchLoss, TopK, TopP

TOLERANCE = 1e-5  # fp32, sums in another order
HIDDEN = 24


def dense(**changes):
    fields = {
        "vocab_size": 31,
        "dim": 16,
        "num_layers": 3,
        "attention": SelfAttention.Config(num_heads=2),
        "feed_forward": SwiGLU.Config(hidden_dim=HIDDEN),
        "init_std": 0.3,
    }
    return Decoder.Config(**{**fields, **changes}).build(seed=7).eval()


def moe(num_experts=4, hidden_dim=HIDDEN, select=None, score=None, **changes):
    select = select or TopK.Config(top_k=2, normalize="sum")
    router = Router.Config(select=select, score=score or LinearScore.Config(init_std=0.5))
    return MoE.Config(num_experts=num_experts, hidden_dim=hidden_dim, **{"router": router, **changes})


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(30).view(2, 15)).logits_BLV


def assert_same(first, second, atol=TOLERANCE):
    expected = logits(second)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(first), expected, rtol=0, atol=atol)


CASES = {
    "top-2 of 4": moe(),
    "top-1": moe(select=TopK.Config(top_k=1, normalize="sum")),
    "all": moe(select=TopK.Config(top_k=4, normalize="softmax")),
    "sigmoid, scaled": moe(
        select=TopK.Config(top_k=3, normalize="sum", scale=2.5),
        score=LinearScore.Config(activation="sigmoid", init_std=0.5),
    ),
    "cosine": moe(score=CosineScore.Config()),
    "top-p": moe(select=TopP.Config(normalize="sum")),
    "groups": moe(num_experts=8, select=GroupTopK.Config(top_k=2, num_groups=4, top_groups=2, normalize="sum")),
    "weights on the input of one": moe(select=TopK.Config(top_k=1, normalize="sum"), weight_on="input"),
    "loss-free bias": moe(router=Router.Config(select=TopK.Config(normalize="sum"), balance=(BiasBalancer.Config(),))),
    "silent shared experts": moe(shared_experts=2, shared_gate=True),
    "weighed shared experts": moe(shared_experts=2, shared_weight=0.3),
    "halves": moe(num_experts=8, hidden_dim=12, select=TopK.Config(top_k=4, normalize="sum")),
    "thirds, one copy": moe(num_experts=12, hidden_dim=8, select=TopK.Config(top_k=3, normalize="sum")),
    "quarters, softmax over the chosen": moe(
        num_experts=8, hidden_dim=6, select=TopK.Config(top_k=4, normalize="softmax")
    ),
    "halves, cosine": moe(
        num_experts=8, hidden_dim=12, select=TopK.Config(top_k=4, normalize="sum"), score=CosineScore.Config()
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_start_has_the_logits_of_the_dense_model(case):
    model = dense()
    assert_same(upcycle(model, CASES[case]), model)


RAW = {
    "softmax": moe(select=TopK.Config(top_k=2)),
    "sigmoid": moe(select=TopK.Config(top_k=2), score=LinearScore.Config(activation="sigmoid")),
    "sqrt softplus, halves": moe(
        num_experts=8,
        hidden_dim=12,
        select=TopK.Config(top_k=4, scale=0.5),
        score=LinearScore.Config(activation="sqrt_softplus"),
    ),
}


@pytest.mark.parametrize("case", RAW)
def test_raw_weights_are_made_up_for_as_long_as_the_router_knows_nothing(case):
    model, config = dense(), RAW[case]
    small = config.replace(router=config.router.replace(score=config.router.score.replace(init_std=1e-3)))
    assert_same(upcycle(model, small), model, atol=0.05)
    blank = upcycle(model, config)
    for block in blank.blocks:
        block.feed_forward.router.score.weight.data.zero_()
    assert_same(blank, model)


def test_slices_by_hand():
    # Hidden units 0 1 2 3 of the dense layer, G = 2: expert 0 and 2 have units 0 1, expert 1 and 3 units 2 3. Weights of the four
    # chosen sum to 1, so each copy gets 1/2 in two halves of 1/4: w2 is doubled.
    model = dense(feed_forward=SwiGLU.Config(hidden_dim=4), num_layers=1)
    made = upcycle(model, moe(num_experts=4, hidden_dim=2, select=TopK.Config(top_k=4, normalize="sum")))
    w13, w2 = (
        parameter.detach()
        for parameter in (made.blocks[0].feed_forward.experts.w13, made.blocks[0].feed_forward.experts.w2)
    )
    from_w13, from_w2 = model.blocks[0].feed_forward.w13.weight, model.blocks[0].feed_forward.w2.weight
    for expert, units in enumerate([[0, 1], [2, 3], [0, 1], [2, 3]]):
        gate_and_up = [*units, *(4 + unit for unit in units)]
        torch.testing.assert_close(w13[expert], from_w13[gate_and_up], rtol=0, atol=0)
        torch.testing.assert_close(w2[expert], 2 * from_w2[:, units], rtol=0, atol=0)
    router = made.blocks[0].feed_forward.router.score.weight
    assert torch.equal(router[0], router[1])
    assert torch.equal(router[2], router[3])
    assert not torch.equal(router[0], router[2])


def test_layers_may_stay_dense():
    model = dense()
    made = upcycle(model, moe(), dense_layers=(0, 2))
    assert [type(block.feed_forward) for block in made.blocks] == [SwiGLU, MoE, SwiGLU]
    assert_same(made, model)


def test_the_dense_model_is_not_touched_and_nothing_is_shared_with_it():
    model = dense()
    before = logits(model)
    made = upcycle(model, moe())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_noise_makes_experts_differ_by_as_much_as_asked():
    model = dense(feed_forward=SwiGLU.Config(hidden_dim=512))
    made = upcycle(model, moe(hidden_dim=512), noise=0.1, seed=1)
    original = model.blocks[0].feed_forward.w13.weight
    first, second = made.blocks[0].feed_forward.experts.w13[:2]
    assert not torch.equal(first, second)
    assert ((first - original).std() / original.std()).item() == pytest.approx(0.1, rel=0.05)
    again = upcycle(model, moe(hidden_dim=512), noise=0.1, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


def test_reinitialised_units_are_as_many_as_asked_and_look_like_the_others():
    model = dense(feed_forward=SwiGLU.Config(hidden_dim=512))
    made = upcycle(model, moe(hidden_dim=512, select=TopK.Config(top_k=1, normalize="sum")), reinit=0.25)
    layer, experts = model.blocks[1].feed_forward, made.blocks[1].feed_forward.experts
    chosen = []
    for expert in range(4):
        changed_w13 = (experts.w13[expert] != layer.w13.weight).any(1)
        changed_w2 = (experts.w2[expert] != layer.w2.weight).any(0)
        assert torch.equal(changed_w13[:512], changed_w2)
        assert torch.equal(changed_w13[512:], changed_w2)
        assert changed_w2.sum() == 128
        new = experts.w13[expert][changed_w13]
        assert new.std().item() == pytest.approx(layer.w13.weight.std().item(), rel=0.05)
        chosen.append(changed_w2)
    assert not torch.equal(chosen[0], chosen[1])


def test_it_trains():
    made = upcycle(dense(), moe(shared_experts=1), seed=3).train()
    token_BL = torch.arange(30).view(2, 15)
    made(token_BL, token_BL).loss.backward()
    layer = made.blocks[0].feed_forward
    assert layer.router.score.weight.grad.abs().sum() > 0
    assert layer.shared.w2.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_dtype_and_mode_are_kept():
    made = upcycle(dense().bfloat16(), moe())
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert not made.training


@pytest.mark.parametrize("case", [*CASES, *RAW])
def test_the_average_undoes_it(case):
    config = (CASES | RAW)[case]
    if config.shared_gate:
        config = config.replace(shared_gate=False)
    model = dense()
    back = average(upcycle(model, config, dense_layers=(1,)), slices=HIDDEN // config.hidden_dim)
    assert [type(block.feed_forward) for block in back.blocks] == [SwiGLU] * 3
    assert back.blocks[0].feed_forward.config.hidden_dim == HIDDEN + config.shared_width
    assert_same(back, model)


@pytest.mark.parametrize("weight", [None, 0.3])
def test_the_average_is_the_mean_of_the_experts_with_the_shared_ones_beside_it(weight):
    model = Decoder.Config(
        vocab_size=31,
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=moe(num_experts=3, hidden_dim=5, shared_experts=2, shared_weight=weight),
        init_std=0.3,
    ).build()
    made = average(model)
    old, new = model.blocks[1].feed_forward, made.blocks[1].feed_forward
    torch.testing.assert_close(new.w13.weight[:5], old.experts.w13.mean(0)[:5])
    torch.testing.assert_close(new.w13.weight[5:15], old.shared.w13.weight[:10])
    torch.testing.assert_close(new.w13.weight[15:20], old.experts.w13.mean(0)[5:])
    routed, shared = (1, 1) if weight is None else (1 - weight, weight)
    parts = [routed * old.experts.w2.mean(0), shared * old.shared.w2.weight]
    torch.testing.assert_close(new.w2.weight, torch.cat(parts, dim=1))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (moe(hidden_dim=25), {}, "hidden_dim is 25, the dense model's 24; use 24, or it divided by"),
        (moe(hidden_dim=48), {}, "hidden_dim is 48"),
        (
            moe(num_experts=5, hidden_dim=12),
            {},
            "num_experts is 5; with experts of 1/2 of the width it must be a multiple of 2",
        ),
        (moe(hidden_dim=12, select=TopK.Config(top_k=3)), {}, r"router.select takes is 3; .*multiple of 2"),
        (moe(hidden_dim=12, select=TopP.Config(normalize="sum")), {}, "router.select takes is None"),
        (moe(select=TopP.Config()), {}, "router.select is 'top_p' with normalize 'none'"),
        (ReXMoE.Config(num_experts=4, hidden_dim=24), {}, "feed_forward is of kind 'rexmoe'; it must be a plain 'moe'"),
        (moe(), {"noise": -1.0}, "noise is -1.0"),
        (moe(), {"reinit": 1.5}, "reinit 1.5"),
        (moe(), {"dense_layers": (3,)}, "dense_layers has 3, but layers are 0 to 2"),
    ],
)
def test_what_does_not_fit(config, options, message):
    with pytest.raises(ConfigError, match=message):
        upcycle(dense(), config, **options)


def test_what_cannot_be_averaged():
    with pytest.raises(ConfigError, match="upcycle needs a dense model, this one has 'moe' layers"):
        upcycle(upcycle(dense(), moe()), moe())
    with pytest.raises(ConfigError, match="feed_forward is of kind 'swiglu'"):
        average(dense())
    with pytest.raises(ConfigError, match="shared_gate is True"):
        average(upcycle(dense(), moe(shared_experts=1, shared_gate=True)))
    with pytest.raises(ConfigError, match="slices is 3, which does not divide num_experts=4"):
        average(upcycle(dense(), moe()), slices=3)


def test_balance_of_an_upcycled_model_counts():
    made = upcycle(dense(), moe()).train()
    assert isinstance(made.blocks[0].feed_forward.router.balance[0].config, SwitchLoss.Config)
    token_BL = torch.arange(30).view(2, 15)
    assert made(token_BL, token_BL).auxiliary["load_balancing"] > 0


class Beside(Dense):
    """A matrix beside the one that stays."""

    @configclass
    class Config(Dense.Config):
        is_added = True


@pytest.mark.parametrize("kind", [Dense, Beside])
@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        ("*.down", "0.feed_forward.down"),
        ("*.up", "0.feed_forward.up"),
        ("*", "0.feed_forward.gate"),
        ("blocks.2.*", "2.feed_forward.gate"),
    ],
)
def test_replaced_matrices_do_not_become_experts(kind, pattern, part):
    model = dense(linears={pattern: kind.Config()})
    message = re.escape(f"linears has {pattern!r}, which replaces or adds to blocks.{part}")
    with pytest.raises(ConfigError, match=message):
        upcycle(model, moe())
    with pytest.raises(ConfigError, match=message):
        start_from(model, model.config.replace(feed_forward=moe(), linears={}), seed=0, sample=lambda: None)


@pytest.mark.parametrize("kind", [Dense, Beside])
@pytest.mark.parametrize("pattern", ["*.q", "head", "blocks.1.*"])
def test_replaced_matrices_elsewhere_stay(kind, pattern):
    model = dense(linears={pattern: kind.Config()})
    sparse = upcycle(model, moe(), dense_layers=(1,))
    assert_same(sparse, model)
    assert_same(average(sparse), model)


@pytest.mark.parametrize("kind", [Dense, Beside])
def test_replaced_matrices_are_not_averaged_nor_averages_put_where_they_belong(kind):
    shared = {"feed_forward": moe(shared_experts=1)}
    with pytest.raises(ConfigError, match=r"linears has '\*\.up', .* blocks\.0\.feed_forward\.shared\.up, and"):
        average(dense(linears={"*.up": kind.Config()}, **shared))
    left = {"feed_forward": moe(), "dense_layers": (1,), "dense_feed_forward": SwiGLU.Config(hidden_dim=HIDDEN)}
    with pytest.raises(
        ConfigError, match=r"linears has 'blocks\.\*\.feed_forward\.up', .* blocks\.0\.feed_forward\.up, and"
    ):
        average(dense(linears={"blocks.*.feed_forward.up": kind.Config()}, **left))
    with pytest.raises(ConfigError, match=r"experts of blocks\.0\.feed_forward\.experts have layers of their own"):
        average(dense(linears={"*.up": kind.Config()}, **left))


@pytest.mark.parametrize(
    ("convert", "fields"), [(lambda model: upcycle(model, moe(32, 64)), {}), (average, {"feed_forward": moe()})]
)
def test_quantised_weights_are_not_converted(convert, fields):
    model = dense(**{"dim": 64, "feed_forward": SwiGLU.Config(hidden_dim=64), **fields})
    quantize(model, "int8")
    with pytest.raises(ConfigError, match="is quantised, and only plain matrices become others; dequantize"):
        convert(model)
