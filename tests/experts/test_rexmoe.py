"""ReXMoE: exact identities, the schedule by hand, masks, sharing, warm start, export, edges and errors."""

import copy
import pickle
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from anabranch.config import from_dict, to_dict
from anabranch.errors import CheckpointError, ConfigError
from anabranch.experts.rexmoe import (
    GROWING,
    ProgressiveScaling,
    ReXMoE,
    export_expanded,
    from_vanilla,
)
from anabranch.lm import Decoder, SamplingConfig, generate
from anabranch.nn import ForwardContext, MoE, SelfAttention, SwiGLU
from anabranch.routing import BiasBalancer, CosineScore, LinearScore, Router, RoutingContext, SwitchLoss, TopK

PSR = ProgressiveScaling.Config
FP32_TOLERANCE = 1e-5  # a few roundings of sums over tens of terms of size 1


def model_of(feed_forward, *, num_layers=4, seed=0, **changes):
    config = Decoder.Config(
        vocab_size=31,
        dim=16,
        num_layers=num_layers,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=feed_forward,
    )
    return config.replace(**changes).build(seed=seed)


def rexmoe(reuse=2, **changes):
    return ReXMoE.Config(**{"num_experts": 4, "hidden_dim": 8, "reuse": reuse, "psr": PSR(), **changes})


def tokens(batch=2, length=9, seed=0):
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


def layer_context(training=False):
    return ForwardContext(position_BL=torch.zeros(1, 1), rotary=(torch.ones(1), torch.ones(1)), training=training)


# ---- identities ---------------------------------------------------------------------------------------------------------------


def test_reuse_1_is_the_plain_layer_to_the_bit():
    plain = model_of(MoE.Config(num_experts=4, hidden_dim=8))
    single = model_of(rexmoe(reuse=1))
    assert list(plain.state_dict()) == list(single.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, single.state_dict()[name]), name
    token_BL = tokens()
    ours, theirs = single(token_BL, token_BL), plain(token_BL, token_BL)
    assert ours.loss == theirs.loss
    ours.loss.backward()
    theirs.loss.backward()
    for (name, left), right in zip(single.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad), name


def test_layer_output_equals_a_sum_over_the_whole_pool_by_hand():
    """eqs. 2 and 3 written as a loop over slots."""
    model = model_of(rexmoe(psr=None)).eval()
    layer, x_ND = model.blocks[1].feed_forward, torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    score_NS = F.linear(x_ND, layer.router.score.weight).softmax(-1)
    top = score_NS.topk(2)
    expected = torch.zeros_like(x_ND)
    for item in range(5):
        for slot, gate in zip(top.indices[item].tolist(), top.values[item], strict=True):
            gate_F, up_F = (layer.experts.w13[slot] @ x_ND[item]).chunk(2)
            expected[item] += gate * (layer.experts.w2[slot] @ (F.silu(gate_F) * up_F))
    torch.testing.assert_close(
        layer(x_ND[None], layer_context())[0], expected, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE
    )


def test_equal_experts_give_one_expert_times_the_sum_of_gates():
    model = model_of(rexmoe(psr=None)).eval()
    layer = model.blocks[0].feed_forward
    with torch.no_grad():
        layer.experts.w13.copy_(layer.experts.w13[:1].expand_as(layer.experts.w13))
        layer.experts.w2.copy_(layer.experts.w2[:1].expand_as(layer.experts.w2))
    x_ND = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    routing = layer.router(x_ND, RoutingContext())
    gate, up = F.linear(x_ND, layer.experts.w13[0]).chunk(2, dim=-1)
    dense_ND = F.linear(F.silu(gate) * up, layer.experts.w2[0])
    torch.testing.assert_close(
        layer(x_ND[None], layer_context())[0],
        dense_ND * routing.weight_NK.sum(-1, keepdim=True),
        atol=FP32_TOLERANCE,
        rtol=FP32_TOLERANCE,
    )


def test_gradient_of_a_pooled_expert_is_the_sum_over_layers_of_untied_copies():
    tied = model_of(rexmoe(psr=None))
    untied = export_expanded(tied)
    token_BL = tokens()
    tied(token_BL, token_BL).loss.backward()
    untied(token_BL, token_BL).loss.backward()
    for group in range(2):
        for weight in ("w13", "w2"):
            pooled = getattr(tied.shared[f"experts_{group}"], weight).grad
            copies = [getattr(untied.blocks[2 * group + m].feed_forward.experts, weight).grad for m in range(2)]
            torch.testing.assert_close(pooled, copies[0] + copies[1], atol=1e-6, rtol=FP32_TOLERANCE)


# ---- schedule -----------------------------------------------------------------------------------------------------------------


def test_linear_schedule_by_hand():
    """N = 64, r = 4, t_s = 10, t_e = 30 thousand steps: at 15k, (1 + 3 * 5 / 20) * 64 = 112; at 20k, (1 + 1.5) * 64 = 160."""
    config = PSR(start=10_000, end=30_000, unit="step")
    table = {0: 64, 10_000: 64, 15_000: 112, 20_000: 160, 25_000: 208, 30_000: 256, 47_700: 256}
    assert {t: config.candidates(t, 64, 4) for t in table} == table
    # one third of the way: (1 + 3 / 3) * 64 = 128 exactly, whatever the rounding of 1 / 3
    assert PSR(start=0.0, end=0.3).candidates(0.1, 64, 4) == 128
    assert PSR(start=0.0, end=0.7).candidates(0.1, 7, 2) == 8  # floor((1 + 1 / 7) * 7)


def test_stepwise_schedule_is_the_papers():
    """2N, 3N, 4N from 10k, 20k, 30k steps."""
    config = PSR(start=10_000, end=30_000, unit="step", mode="stepwise")
    table = {0: 64, 10_000: 64, 10_001: 128, 19_999: 128, 20_000: 192, 29_999: 192, 30_000: 256, 40_000: 256}
    assert {t: config.candidates(t, 64, 4) for t in table} == table


@given(
    num_own=st.integers(1, 32),
    reuse=st.integers(2, 6),
    mode=st.sampled_from(["linear", "stepwise"]),
    start=st.floats(0, 0.5),
    length=st.floats(0.05, 0.5),
)
def test_schedule_is_monotone_from_n_to_rn(num_own, reuse, mode, start, length):
    config = PSR(start=start, end=start + length, mode=mode)
    counts = [config.candidates(t / 50, num_own, reuse) for t in range(51)]
    assert counts == sorted(counts)
    assert config.candidates(start, num_own, reuse) == num_own
    assert config.candidates(start + length, num_own, reuse) == reuse * num_own


def test_a_short_group_grows_to_its_own_size():
    """7 routed layers at r = 3: groups of 3, 3 and 1; the last one has nothing to open, 5 layers at r = 3 end in a group of 2."""
    model = model_of(rexmoe(reuse=3, psr=PSR(start=0.0, end=0.5)), num_layers=5)
    sizes = [block.feed_forward.router.num_destinations for block in model.blocks]
    assert sizes == [12, 12, 12, 8, 8]
    schedule = model.blocks[4].feed_forward.router.candidates
    assert [schedule.num_open(0, fraction) for fraction in (0.0, 0.25, 0.5, 1.0)] == [4, 6, 8, 8]
    alone = model_of(rexmoe(reuse=3), num_layers=7)
    assert alone.blocks[6].feed_forward.router.candidates is None


def test_never_fewer_open_slots_than_top_k():
    control = PSR(as_reuse=4, start=0.2, end=0.6)
    config = rexmoe(reuse=1, psr=control, router=Router.Config(select=TopK.Config(top_k=3)))
    schedule = model_of(config).blocks[0].feed_forward.router.candidates
    # of 4 slots a quarter is open at first, which is fewer than the 3 a token needs
    assert [schedule.num_open(0, fraction) for fraction in (0.0, 0.4, 0.6)] == [3, 3, 4]


# ---- masks --------------------------------------------------------------------------------------------------------------------


def masks_of(schedule, steps=200):
    masks = []
    for step in range(steps):
        schedule.on_step(step, step / steps)
        masks.append(schedule.open_E.clone())
    return torch.stack(masks)


@pytest.mark.parametrize("mask", ["random", "local_first", "nested"])
def test_masks_open_the_scheduled_number(mask):
    schedule = PSR(mask=mask).build(4, 3, own_start=4, layer=1, seed=0)
    drawn = masks_of(schedule)
    assert drawn.sum(-1).tolist() == [schedule.num_open(step, step / 200) for step in range(200)]
    if mask == "local_first":
        assert drawn[:, 4:8].all()
    if mask == "nested":
        assert not (drawn[:-1] & ~drawn[1:]).any()
    if mask == "random":
        assert not drawn[:, 4:8].all()  # local slots may be closed too


def test_masks_depend_on_seed_layer_and_step_alone():
    first = masks_of(PSR().build(8, 2, own_start=0, layer=3, seed=7))
    torch.rand(100)  # other use of the global generator must not matter
    assert torch.equal(first, masks_of(PSR().build(8, 2, own_start=0, layer=3, seed=7)))
    assert not torch.equal(first, masks_of(PSR().build(8, 2, own_start=0, layer=2, seed=7)))
    assert not torch.equal(first, masks_of(PSR().build(8, 2, own_start=0, layer=3, seed=8)))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("stage", ["post_softmax", "pre_softmax"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bias", [False, True])
def test_closed_slots_are_never_selected(stage, activation, bias):
    """A million draws; with a bias a zeroed score could win, were it not kept out of the selection."""
    balance = (BiasBalancer.Config(),) if bias else ()
    router_config = Router.Config(score=LinearScore.Config(activation=activation, init_std=1.0), balance=balance)
    model = model_of(rexmoe(psr=PSR(stage=stage), router=router_config), num_layers=2)
    router = model.blocks[0].feed_forward.router
    closed = ~router.candidates.open_E
    assert closed.sum() == 4
    if bias:
        router.balance[0].expert_bias.copy_(closed * 100.0)
    for seed in range(4):
        x_ND = torch.randn(125_000, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            routing = router(x_ND, RoutingContext(training=True))
        assert not closed[routing.index_NK].any()


def test_stage_decides_whether_closed_slots_stay_in_the_denominator():
    """Post: gates of open slots sum below 1 and closed logits get gradient -s_i s_j; pre: they sum to 1 and get none."""
    for stage in ("post_softmax", "pre_softmax"):
        select = TopK.Config(top_k=4)
        config = rexmoe(psr=PSR(stage=stage), router=Router.Config(select=select, balance=()))
        router = model_of(config, num_layers=2).blocks[0].feed_forward.router
        x_ND = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        total = router(x_ND, RoutingContext(training=True)).weight_NK.sum()
        total.backward()
        closed = ~router.candidates.open_E
        reached = router.score.weight.grad[closed].abs().sum()
        if stage == "post_softmax":
            assert total < 3 * 0.9
            assert reached > 1e-4
        else:
            assert total.item() == pytest.approx(3, abs=FP32_TOLERANCE)
            assert reached == 0


def test_evaluation_uses_the_full_pool_unless_told():
    for evaluate, uses_all in (("full", True), ("current", False)):
        router = model_of(rexmoe(psr=PSR(evaluate=evaluate)), num_layers=2).blocks[0].feed_forward.router
        x_ND = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
        used = router(x_ND, RoutingContext(training=False)).load_E() > 0
        assert bool(used.all()) is uses_all


def test_token_scope_draws_a_mask_per_token():
    torch.manual_seed(0)
    schedule = PSR(scope="token", mask="local_first").build(4, 2, own_start=4, layer=0, seed=0)
    schedule.on_step(42, 0.42)  # halfway: floor(1.5 * 4) = 6 of 8
    open_NS = schedule.open_NE(500, RoutingContext(training=True))
    assert (open_NS.sum(-1) == 6).all()
    assert open_NS[:, 4:].all()
    assert open_NS[:, :4].float().mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.1)


def test_psr_can_mask_a_plain_layer_as_a_control():
    model = model_of(rexmoe(reuse=1, num_experts=8, psr=PSR(as_reuse=4, start=0.2, end=0.6)))
    schedule = model.blocks[0].feed_forward.router.candidates
    assert [schedule.num_open(0, fraction) for fraction in (0.0, 0.2, 0.4, 0.6)] == [2, 2, 5, 8]
    assert "shared.experts_0.w13" not in model.state_dict()


def test_micro_batches_and_recompute_share_the_mask():
    model = model_of(rexmoe())
    token_BL = tokens()
    model(token_BL, token_BL).loss.backward()
    plain = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    model.recompute = True
    model(token_BL, token_BL).loss.backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, plain[name], atol=1e-7, rtol=FP32_TOLERANCE)


# ---- balance over the pool ----------------------------------------------------------------------------------------------------


def test_balance_loss_of_even_routing_over_open_slots_is_alpha():
    """All logits equal: P = 1 / n_open on open slots, f sums to 1 over them, so alpha n_open sum f P = alpha."""
    config = rexmoe(router=Router.Config(balance=(SwitchLoss.Config(alpha=0.5),)))
    model = model_of(config, num_layers=2)
    router = model.blocks[0].feed_forward.router
    with torch.no_grad():
        router.score.weight.zero_()
    context = RoutingContext(training=True)
    router(torch.randn(20, 16, generator=torch.Generator().manual_seed(0)), context)
    assert context.mean_losses()["load_balancing"].item() == pytest.approx(0.5, abs=FP32_TOLERANCE)


def test_pool_loss_by_hand():
    """alpha S sum_u mean_l f_lu mean_l P_lu, once per group."""
    config = rexmoe(psr=None, pool_balance=0.1, router=Router.Config(balance=()))
    model = model_of(config, num_layers=2)
    x_ND = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    context, share, probability = RoutingContext(training=True), [], []
    for block in model.blocks:
        routing = block.feed_forward.router(x_ND, context)
        share.append(routing.load_E() / 60)
        probability.append(routing.score_NE.mean(0))
    expected = 0.1 * 8 * ((share[0] + share[1]) / 2 * (probability[0] + probability[1]) / 2).sum()
    losses = context.mean_losses()
    assert set(losses) == {"pool_balancing"}
    torch.testing.assert_close(losses["pool_balancing"], expected)


def test_pool_bias_is_one_per_group_and_sees_the_loads_of_all_its_layers():
    balance = (BiasBalancer.Config(rule="magnitude", rate=0.1, center=False),)
    model = model_of(rexmoe(psr=None, pool_bias=True, router=Router.Config(balance=balance)))
    names = [name for name in model.state_dict() if "expert_bias" in name]
    assert names == ["shared.bias_0_0.expert_bias", "shared.bias_1_0.expert_bias"]
    token_BL = tokens(batch=2, length=9)
    model(token_BL, token_BL)
    bias = model.shared["bias_0_0"]
    assert bias.load_E.sum() == 2 * 2 * 9 * 2  # two layers, 18 tokens, top 2
    load_E = bias.load_E.clone()
    bias.on_step(1, 0.1)
    torch.testing.assert_close(bias.expert_bias, 0.1 * (load_E.mean() - load_E) / load_E.mean())
    assert model.blocks[0].feed_forward.router.bias_E is not None


# ---- ownership ----------------------------------------------------------------------------------------------------------------


def test_each_expert_is_owned_once():
    model = model_of(rexmoe())
    plain = model_of(MoE.Config(num_experts=4, hidden_dim=8))
    extra = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == 4 * (2 - 1) * 4 * 16  # sum over layers of (r_g - 1) N d
    assert [name for name in model.state_dict() if name.endswith("w13")] == [
        "shared.experts_0.w13",
        "shared.experts_1.w13",
    ]
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.float64)):
        pools = [block.feed_forward.experts for block in other.blocks]
        assert pools[0] is pools[1] is other.shared["experts_0"]
        assert pools[2] is pools[3] is other.shared["experts_1"]
        assert len({id(parameter) for parameter in other.parameters()}) == len(list(other.parameters()))
    assert model.blocks[1].feed_forward.experts.w13.dtype == torch.float64


@pytest.mark.parametrize("reuse", [1, 2, 3, 5])
@pytest.mark.parametrize("shared_experts", [0, 1])
@pytest.mark.parametrize("depth_embedding", [False, True])
def test_counts_are_known_before_building(reuse, shared_experts, depth_embedding):
    config = rexmoe(reuse=reuse, shared_experts=shared_experts, depth_embedding=depth_embedding)
    model = model_of(config, num_layers=5)
    assert model.config.count().parameters == sum(parameter.numel() for parameter in model.parameters())
    plain = model_of(MoE.Config(num_experts=4, hidden_dim=8, shared_experts=shared_experts), num_layers=5)
    router_rows = sum(block.feed_forward.router.num_destinations for block in model.blocks) - 20
    assert model.config.count().active - plain.config.count().active == 16 * (router_rows + 5 * depth_embedding)


def test_state_resumes_with_the_same_masks():
    model = model_of(rexmoe())
    for block in model.blocks:
        block.feed_forward.router.candidates.on_step(37, 0.37)
    other = model_of(rexmoe(), seed=0)
    other.load_state_dict(model.state_dict())
    for left, right in zip(model.blocks, other.blocks, strict=True):
        assert torch.equal(left.feed_forward.router.candidates.open_E, right.feed_forward.router.candidates.open_E)
        assert right.feed_forward.router.candidates.step == 37


def test_config_reads_back_equal():
    config = model_of(rexmoe(psr=PSR(mode="stepwise", mask="nested"), pool_balance=0.1)).config
    assert from_dict(Decoder.Config, to_dict(config)) == config


# ---- warm start and export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [4, 5])
@pytest.mark.parametrize("foreign_rows", ["home", "zero", "noise"])
def test_restricted_to_own_experts_it_is_the_vanilla_model(num_layers, foreign_rows):
    """What a grown model begins with, in training and out of it: "restricting to local experts reduces to vanilla" (the paper)."""
    plain = model_of(MoE.Config(num_experts=4, hidden_dim=8, shared_experts=1), num_layers=num_layers, init_std=0.1)
    grown = from_vanilla(plain, reuse=2, foreign_rows=foreign_rows)
    token_BL = tokens()
    for training in (True, False):
        torch.testing.assert_close(
            grown.train(training)(token_BL).logits_BLV,
            plain(token_BL).logits_BLV,
            atol=FP32_TOLERANCE,
            rtol=FP32_TOLERANCE,
        )
    step_to(grown, GROWING.start)
    assert grown(token_BL).logits_BLV.allclose(plain(token_BL).logits_BLV, atol=FP32_TOLERANCE)
    step_to(grown, 0.5)
    assert not grown(token_BL).logits_BLV.allclose(plain(token_BL).logits_BLV, atol=10 * FP32_TOLERANCE)


def step_to(model, fraction):
    for block in model.blocks:
        candidates = block.feed_forward.router.candidates
        # The last group of an odd number of layers has no pool to grow.
        if candidates is not None:
            candidates.on_step(round(1000 * fraction), fraction)


def test_the_paper_s_masks_change_a_trained_model_at_once():
    """So they are asked for by name."""
    plain = model_of(MoE.Config(num_experts=4, hidden_dim=8)).train()
    token_BL = tokens()
    for psr in (PSR(), None):
        grown = from_vanilla(plain, reuse=2, psr=psr).train()
        assert not grown(token_BL).logits_BLV.allclose(plain(token_BL).logits_BLV, atol=10 * FP32_TOLERANCE)
    assert ReXMoE.Config().psr is None


def test_a_grown_model_is_exported_and_served_fast_once_its_pool_is_open():
    router = Router.Config(select=TopK.Config(top_k=2))
    grown = from_vanilla(model_of(MoE.Config(num_experts=4, hidden_dim=8, router=router)), reuse=2).eval()
    for fraction, opened in ((0.0, 4), (0.5, 6)):
        step_to(grown, fraction)
        with pytest.raises(CheckpointError, match=rf"^layer 0 has {opened} of 8 experts open, .*train until psr\.end"):
            export_expanded(grown)
        assert not grown.blocks[0].feed_forward.router.candidates.only_in_training
    step_to(grown, GROWING.end)
    assert all(block.feed_forward.router.candidates.only_in_training for block in grown.blocks)
    token_BL = tokens()
    torch.testing.assert_close(
        export_expanded(grown)(token_BL).logits_BLV,
        grown(token_BL).logits_BLV,
        atol=FP32_TOLERANCE,
        rtol=FP32_TOLERANCE,
    )


def test_foreign_rows():
    plain = model_of(MoE.Config(num_experts=4, hidden_dim=8))
    own = [block.feed_forward.router.score.weight for block in plain.blocks]
    for foreign_rows in ("home", "zero", "noise"):
        grown = from_vanilla(plain, reuse=2, foreign_rows=foreign_rows)
        rows = grown.blocks[0].feed_forward.router.score.weight
        assert torch.equal(rows[:4], own[0])
        assert torch.equal(rows[4:], own[1]) is (foreign_rows == "home")
        assert bool((rows[4:] == 0).all()) is (foreign_rows == "zero")
    assert torch.equal(from_vanilla(plain, reuse=1).blocks[2].feed_forward.router.score.weight, own[2])


@pytest.mark.parametrize("projected_dim", [None, 3])
@pytest.mark.parametrize("foreign_rows", ["home", "zero", "noise"])
def test_cosine_routers_grow_by_rows_of_experts_alone(foreign_rows, projected_dim):
    """Projection and temperature belong to the layer, also where their size would follow from the number of experts."""
    router = Router.Config(score=CosineScore.Config(projected_dim=projected_dim))
    plain = model_of(MoE.Config(num_experts=4, hidden_dim=8, router=router))
    scores = [block.feed_forward.router.score for block in plain.blocks]
    with torch.no_grad():
        for layer, score in enumerate(scores):
            score.log_temperature.fill_(layer)
    grown = from_vanilla(plain, reuse=2, foreign_rows=foreign_rows)
    for layer, block in enumerate(grown.blocks):
        ours, own, other = block.feed_forward.router.score, scores[layer], scores[layer ^ 1]
        assert ours.log_temperature.item() == layer
        assert torch.equal(ours.projection, own.projection)
        rows = ours.weight.split(4)
        assert torch.equal(rows[layer % 2], own.weight)
        assert torch.equal(rows[1 - layer % 2], other.weight) is (foreign_rows == "home")


@pytest.mark.parametrize("training", [False, True])
def test_a_grown_model_is_in_the_mode_of_the_plain_one(training):
    plain = model_of(MoE.Config(num_experts=4, hidden_dim=8)).train(training)
    grown = from_vanilla(plain, reuse=2)
    assert {module.training for module in grown.modules()} == {training}


def test_warm_start_carries_the_selection_bias():
    balance = (BiasBalancer.Config(),)
    plain = model_of(MoE.Config(num_experts=4, hidden_dim=8, router=Router.Config(balance=balance)))
    plain.blocks[1].feed_forward.router.balance[0].expert_bias.fill_(0.25)
    grown = from_vanilla(plain, reuse=2)
    assert grown.blocks[1].feed_forward.router.balance[0].expert_bias.tolist() == [0.0] * 4 + [0.25] * 4


@pytest.mark.parametrize("pool_bias", [False, True])
@pytest.mark.parametrize("reuse", [1, 2, 4])
def test_expanded_export_has_equal_logits(reuse, pool_bias):
    balance = (BiasBalancer.Config(),)
    model = model_of(rexmoe(reuse=reuse, pool_bias=pool_bias, router=Router.Config(balance=balance))).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    expanded = export_expanded(model)
    assert type(expanded.config.feed_forward) is MoE.Config
    assert expanded.config.feed_forward.num_experts == 4 * reuse
    token_BL = tokens()
    torch.testing.assert_close(
        expanded(token_BL).logits_BLV, model(token_BL).logits_BLV, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE
    )


# ---- composition and edges ----------------------------------------------------------------------------------------------------


def test_dense_layers_do_not_count_in_groups():
    model = model_of(rexmoe(), num_layers=5, dense_layers=(0, 2), dense_feed_forward=SwiGLU.Config(hidden_dim=8))
    pools = [getattr(block.feed_forward, "experts", None) for block in model.blocks]
    assert pools[0] is None
    assert pools[2] is None
    assert pools[1] is pools[3] is model.shared["experts_0"]
    assert pools[4] is model.shared["experts_1"]
    assert [model.blocks[layer].feed_forward.router.destinations.own_start for layer in (1, 3, 4)] == [0, 4, 0]


def test_one_layer_model():
    model = model_of(rexmoe(reuse=1), num_layers=1)
    assert model(tokens()).logits_BLV.shape == (2, 9, 31)


def test_generation_with_a_cache_equals_full_passes():
    model = model_of(rexmoe(depth_embedding=True)).eval()
    token_BL = tokens(batch=2, length=12)
    cache = model.new_cache(12)
    pieces = [model(token_BL[:, :5], cache=cache).logits_BLV]
    pieces += [model(token_BL[:, at : at + 1], cache=cache).logits_BLV for at in range(5, 12)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(token_BL).logits_BLV, atol=1e-4, rtol=1e-4)
    greedy = SamplingConfig(max_tokens=5, temperature=0.0)
    assert len(generate(model, [[1, 2, 3]], greedy)[0]) == 5


def test_empty_batch():
    layer = model_of(rexmoe()).blocks[0].feed_forward
    assert layer(torch.zeros(0, 3, 16), layer_context(training=True)).shape == (0, 3, 16)


@pytest.mark.slow
def test_compiles_without_graph_breaks_and_without_recompiling_per_step():
    model = model_of(rexmoe(), num_layers=2)
    token_BL = tokens()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(4):
        for block in model.blocks:
            block.feed_forward.router.candidates.on_step(step * 25, step / 4)
        torch.testing.assert_close(compiled(token_BL, token_BL).loss, model(token_BL, token_BL).loss)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_bf16_autocast_keeps_scores_in_fp32():
    model = model_of(rexmoe())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = model.blocks[0].feed_forward.router(torch.randn(4, 16).bfloat16(), RoutingContext())
        loss = model(tokens(), tokens()).loss
    assert routing.score_NE.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# ---- errors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rexmoe(reuse=0), "reuse is 0; it must be greater than or equal to 1"),
        (lambda: model_of(rexmoe(reuse=5)), "reuse is 5, but the model has 4 routed layers; use 1 to 4"),
        (
            lambda: rexmoe(router=Router.Config(select=TopK.Config(top_k=5))),
            "select takes 5 experts of a token, but num_experts is 4",
        ),
        (lambda: PSR(start=0.7), "psr.start is 0.7, psr.end is 0.63; start must be smaller"),
        (lambda: PSR(start=0.5, end=1.5), "psr.end is 1.5; with unit 'fraction' it must be at most 1"),
        (lambda: PSR(scope="token", mask="nested"), "psr.mask 'nested' is one order per layer"),
        (lambda: rexmoe(reuse=1, psr=PSR(mode="stepwise")), "psr.mode 'stepwise' needs reuse of at least 2"),
        (lambda: from_vanilla(model_of(rexmoe()), reuse=2), "from_vanilla needs a model of plain 'moe' layers"),
        (lambda: export_expanded(model_of(rexmoe(depth_embedding=True))), "a depth embedding cannot be expressed"),
        (lambda: export_expanded(model_of(rexmoe(), num_layers=5)), "not a multiple of reuse=2"),
        (lambda: export_expanded(model_of(SwiGLU.Config())), "needs a 'rexmoe' model"),
    ],
)
def test_errors_name_the_field_and_the_value(make, message):
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        make()
    assert message in str(caught.value)


def test_config_has_every_field_of_the_plain_layer():
    assert {field.name for field in fields(MoE.Config)} < {field.name for field in fields(ReXMoE.Config)}
