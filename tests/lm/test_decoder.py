import math

import pytest
import torch
import torch.nn.functional as F

from anabranch.config import configclass, from_dict, to_dict
from anabranch.errors import ConfigError
from anabranch.lm import Decoder
from anabranch.nn import FeedForward, MoE, Rotary, SelfAttention, SwiGLU
from anabranch.nn.context import Count
from anabranch.routing import BiasBalancer, ExpertChoice, LinearScore, Router, SwitchLoss, TopK, ZLoss
from anabranch.routing.balance import LoadCounter

ROUTER = Router.Config(
    score=LinearScore.Config(init_std=0.5),
    select=TopK.Config(top_k=2, normalize="sum"),
    balance=(SwitchLoss.Config(), ZLoss.Config(), BiasBalancer.Config()),
)


def config(**fields):
    return Decoder.Config(
        **{
            "vocab_size": 31,
            "dim": 16,
            "num_layers": 3,
            "attention": SelfAttention.Config(num_heads=4, num_kv_heads=2),
            "feed_forward": MoE.Config(num_experts=4, hidden_dim=8, router=ROUTER),
            "dense_layers": (0,),
            "dense_feed_forward": SwiGLU.Config(hidden_dim=24),
            "init_std": 0.2,
            "max_positions": 32,
            **fields,
        }
    )


def build(seed=0, **fields):
    return config(**fields).build(seed=seed)


def tokens(batch=3, length=9, seed=1):
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


# -- what it computes


def test_it_is_norm_attention_norm_feed_forward_in_fp64():
    model, token_BL = build().double().eval(), tokens()
    context = model.context(token_BL)
    x_BLD = model.embedding.weight[token_BL]

    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight

    for block in model.blocks:
        x_BLD = x_BLD + block.attention(norm(x_BLD, block.attention_norm), context)
        x_BLD = x_BLD + block.feed_forward(norm(x_BLD, block.feed_forward_norm), context)
    expected_BLV = norm(x_BLD, model.norm) @ model.head.weight.T
    torch.testing.assert_close(model(token_BL).logits_BLV, expected_BLV, rtol=1e-12, atol=1e-12)


def test_the_loss_is_the_mean_over_real_targets_plus_the_auxiliary_losses():
    model, token_BL = build(), tokens()
    target_BL = tokens(seed=2)
    target_BL[0, :4] = -100
    output = model(token_BL, target_BL)
    logits_BLV = model(token_BL).logits_BLV
    expected = F.cross_entropy(logits_BLV[target_BL != -100], target_BL[target_BL != -100])
    torch.testing.assert_close(output.cross_entropy, expected.detach())
    assert set(output.auxiliary) == {"load_balancing", "z_loss"}
    torch.testing.assert_close(output.loss.detach(), output.cross_entropy + sum(output.auxiliary.values()))
    assert output.logits_BLV is None
    assert output.loss.requires_grad
    assert not any(loss.requires_grad for loss in (output.cross_entropy, *output.auxiliary.values()))


def test_auxiliary_losses_are_means_over_layers():
    model, token_BL = build(), tokens()
    context = model.context(token_BL)
    model.hidden(token_BL, context)
    assert {name: len(losses) for name, losses in context.losses.items()} == {"load_balancing": 2, "z_loss": 2}
    output = model(token_BL, token_BL)
    torch.testing.assert_close(output.auxiliary["z_loss"], (sum(context.losses["z_loss"]) / 2).detach())


def test_evaluation_has_no_auxiliary_losses_and_counts_nothing():
    model = build().eval()
    output = model(tokens(), tokens())
    assert output.auxiliary == {}
    assert torch.equal(output.loss, output.cross_entropy)
    assert not any(module.load_E.any() for module in model.modules() if isinstance(module, LoadCounter))


def test_nothing_to_predict_costs_nothing():
    model = build(feed_forward=SwiGLU.Config(hidden_dim=8), dense_layers=())
    output = model(tokens(), torch.full((3, 9), -100))
    assert output.loss.item() == 0.0
    output.loss.backward()
    assert not model.head.weight.grad.any()
    assert model(tokens(batch=0), tokens(batch=0)).loss.item() == 0.0


def test_last_only_is_the_last_position():
    model, token_BL = build().eval(), tokens()
    last = model(token_BL, last_only=True).logits_BLV
    torch.testing.assert_close(last, model(token_BL).logits_BLV[:, -1:])


def test_a_new_model_is_about_as_unsure_as_a_uniform_guess():
    model = build(init_std=0.02)
    assert model(tokens(), tokens(seed=2)).cross_entropy.item() == pytest.approx(math.log(31), rel=0.02)


# -- caching, padding, positions


@pytest.mark.parametrize("steps", [[9], [1] * 9, [4, 1, 1, 3], [1, 8]])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_equals_uncached(steps, padded):
    model, token_BL = build().eval(), tokens()
    mask_BL = torch.ones(3, 9, dtype=torch.bool)
    if padded:
        mask_BL[0, : min(3, steps[0])] = mask_BL[1, :1] = False
        mask_BL[:, -1] = True
    expected_BLV = model(token_BL, token_mask_BL=mask_BL if padded else None).logits_BLV
    cache, start, parts = model.new_cache(9), 0, []
    for step in steps:
        # only the first call needs a mask: what follows a left-padded prompt is real
        mask = mask_BL[:, :step] if padded and start == 0 else None
        parts.append(model(token_BL[:, start : start + step], cache=cache, token_mask_BL=mask).logits_BLV)
        start += step
    assert cache.length == 9
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask_BL], expected_BLV[mask_BL], rtol=1e-4, atol=1e-5)


def test_left_padding_changes_nothing_for_the_real_tokens():
    model, token_BL = build().eval(), tokens(batch=1, length=5)
    padded_BL = torch.cat((torch.tensor([[7, 8, 9]]), token_BL), dim=1)
    mask_BL = torch.arange(8).ge(3)[None]
    padded = model(padded_BL, token_mask_BL=mask_BL).logits_BLV[:, 3:]
    torch.testing.assert_close(padded, model(token_BL).logits_BLV, rtol=1e-4, atol=1e-5)


def test_positions_count_real_tokens():
    model = build()
    mask_BL = torch.tensor([[False, False, True, True], [True, True, True, True]])
    assert model.context(tokens(2, 4), token_mask_BL=mask_BL).position_BL.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    cache = model.new_cache(8)
    model(tokens(2, 4), cache=cache, token_mask_BL=mask_BL)
    assert model.context(tokens(2, 1), cache=cache).position_BL.tolist() == [[2], [4]]
    plain = model.new_cache(8)
    model(tokens(2, 4), cache=plain)
    assert model.context(tokens(2, 2), cache=plain).position_BL.tolist() == [[4, 5]] * 2


def test_padding_is_not_counted_by_balancers():
    model, mask_BL = build(), torch.ones(3, 9, dtype=torch.bool)
    mask_BL[0, :5] = False
    model(tokens(), tokens(), token_mask_BL=mask_BL)
    loads = [module.load_E.sum().item() for module in model.modules() if isinstance(module, BiasBalancer)]
    assert loads == [2 * (27 - 5)] * 2


# -- training


def gradients(model, token_BL, run=None):
    model.zero_grad()
    (model if run is None else run)(token_BL, token_BL.roll(-1, 1)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_recompute_gives_the_same_gradients_and_counts_once():
    plain, again = build(), build()
    again.recompute = True
    expected = gradients(plain, tokens())
    for name, gradient in gradients(again, tokens()).items():
        torch.testing.assert_close(gradient, expected[name])
    for ours, wanted in zip(again.modules(), plain.modules(), strict=True):
        if isinstance(wanted, BiasBalancer):
            assert torch.equal(ours.load_E, wanted.load_E)
            assert ours.load_E.sum() == 2 * 27


def test_recompute_with_global_batch_balance_and_accumulation():
    """The second micro-batch is recomputed after its load was committed: the loss must still be the one of the forward pass."""
    router = ROUTER.replace(balance=(SwitchLoss.Config(alpha=1.0, scope="global_batch"),))
    feed_forward = MoE.Config(num_experts=4, hidden_dim=8, router=router)
    plain, again = build(feed_forward=feed_forward), build(feed_forward=feed_forward)
    again.recompute = True
    for seed in range(3):
        expected, ours = gradients(plain, tokens(seed=seed)), gradients(again, tokens(seed=seed))
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, expected[name])


def test_jitter_is_the_same_when_recomputed():
    router = ROUTER.replace(score=LinearScore.Config(init_std=0.5, jitter=0.3))
    fields = {"feed_forward": MoE.Config(num_experts=4, hidden_dim=8, router=router)}
    plain, again = build(**fields), build(**fields)
    again.recompute = True
    torch.manual_seed(3)
    expected = gradients(plain, tokens())
    torch.manual_seed(3)
    for name, gradient in gradients(again, tokens()).items():
        torch.testing.assert_close(gradient, expected[name])


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Cross-entropy alone: a balance loss of a micro-batch is not a part of the batch's."""
    fields = {"feed_forward": MoE.Config(num_experts=4, hidden_dim=8, router=ROUTER.replace(balance=()))}
    whole, parts, token_BL = build(**fields), build(**fields), tokens(batch=4)
    expected = gradients(whole, token_BL)
    for half_BL in token_BL.split(2):
        (parts(half_BL, half_BL.roll(-1, 1)).loss / 2).backward()
    for name, parameter in parts.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_forward_and_loss_compile_into_one_graph():
    torch.compiler.reset()
    plain, compiled = build(), build()
    expected = gradients(plain, tokens())
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for name, gradient in gradients(compiled, tokens(), run).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")  # torch warns of itself
def test_inductor_agrees_with_eager():
    torch.compiler.reset()
    plain, compiled = build(num_layers=2), build(num_layers=2)
    expected = gradients(plain, tokens())
    run = torch.compile(compiled, fullgraph=True)
    for name, gradient in gradients(compiled, tokens(), run).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_bf16_autocast_is_close_and_keeps_fp32_where_it_matters():
    model, token_BL = build(), tokens()
    loss = model(token_BL, token_BL).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = model(token_BL, token_BL)
        assert model(token_BL).logits_BLV.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(loss.item(), rel=2e-2)
    output.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


# -- building


def test_the_seed_fixes_the_weights():
    first, same, other = build(0).state_dict(), build(0).state_dict(), build(1).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
    torch.manual_seed(99)
    assert all(torch.equal(first[name], value) for name, value in build(0).state_dict().items())


@pytest.mark.parametrize(
    "fields", [{}, {"tie_embeddings": True}, {"dense_layers": (), "num_layers": 1}, {"dense_layers": (0, 1, 2)}]
)
def test_the_count_is_the_number_of_parameters(fields):
    count = config(**fields).count()
    assert count.parameters == sum(parameter.numel() for parameter in build(**fields).parameters())
    assert count.active < count.parameters


def test_active_parameters_by_hand():
    # one dense layer: norms 2 * 16, attention 16 * (16 + 2 * 8) + 16 * 16, SwiGLU 3 * 16 * 8; last norm 16; head 31 * 16
    count = config(num_layers=1, dense_layers=(), feed_forward=SwiGLU.Config(hidden_dim=8)).count(sequence_length=10)
    layer = 32 + 768 + 384
    assert count.active == layer + 16 + 496
    assert count.parameters == count.active + 496  # the embedding
    # attention: scores and mixing, 2 FLOPs each, 4 heads of 4, over 5 positions on average
    assert count.flops == 2 * (768 + 384 + 496) + 2 * 2 * 16 * 5


def test_a_tied_head_is_the_embedding():
    model = build(tie_embeddings=True)
    assert model.head is None
    assert "head.weight" not in model.state_dict()
    x_BLD = torch.randn(1, 2, 16)
    torch.testing.assert_close(model.logits(x_BLD), x_BLD @ model.embedding.weight.T)


def test_layers_know_their_place():
    made = config(num_layers=4, dense_layers=(0, 2)).contexts()  # one context, moved on: read it as it goes
    places = [(context.layer, context.routed_layer, context.num_routed_layers) for context in made]
    assert places == [(0, 0, 2), (1, 0, 2), (2, 1, 2), (3, 1, 2)]


def test_deep_models_start_with_small_residual_writes():
    model = build(dim=64, num_layers=8, dense_layers=tuple(range(8)), init_std=0.1)
    assert model.blocks[0].feed_forward.w2.weight.std().item() == pytest.approx(0.1 / 4, rel=0.1)
    assert model.blocks[0].attention.out.weight.std().item() == pytest.approx(0.1 / 4, rel=0.1)
    flat = build(dim=64, num_layers=8, dense_layers=tuple(range(8)), init_std=0.1, depth_scaled_init=False)
    assert flat.blocks[0].feed_forward.w2.weight.std().item() == pytest.approx(0.1, rel=0.1)


def test_a_config_reads_back_equal():
    made = config(rotary=Rotary.Config(scaling="llama3", factor=8.0), tie_embeddings=True)
    assert from_dict(Decoder.Config, to_dict(made)) == made


def test_expert_choice_trains_but_cannot_generate():
    router = ROUTER.replace(select=ExpertChoice.Config())
    model = build(feed_forward=MoE.Config(num_experts=4, hidden_dim=8, router=router))
    assert not model.is_causal
    assert torch.isfinite(model(tokens(), tokens()).loss)
    with pytest.raises(ConfigError, match="looking at later tokens"):
        model.new_cache(4)
    assert build().is_causal


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dense_layers": (3,)}, "dense_layers has 3, but layers are 0 to 2"),
        ({"dense_layers": (-1,)}, "dense_layers has -1, but layers are 0 to 2"),
        ({"dense_feed_forward": None}, "dense_layers is set, but dense_feed_forward is not; say what those layers are"),
        ({"dim": 18}, "dim 18 is not a multiple of num_heads=4; set head_dim"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be greater than or equal to 1"),
        ({"num_layers": 0}, "num_layers is 0; it must be greater than or equal to 1"),
        ({"init_std": 0.0}, "init_std is 0.0; it must be greater than 0"),
        ({"tie_embedings": True}, "Decoder has no field 'tie_embedings'; did you mean 'tie_embeddings'"),
    ],
)
def test_messages(fields, message):
    with pytest.raises(ConfigError, match=message):
        config(**fields)


class _Relay(FeedForward, kind="relay"):
    """Hands a tensor to the layer above, as a recurrent router does."""

    @configclass
    class Config(FeedForward.Config):
        def count(self, context):
            return Count.dense(context.dim**2)

    def __init__(self, config, context):
        super().__init__()
        self.config = config
        self.weight = context.linear(context.dim, context.dim)

    def forward(self, x_BLD, context):
        state_BLD = self.weight(x_BLD) + context.carry.get("relay", 0.0)
        context.carry["relay"] = torch.tanh(state_BLD)
        return context.carry["relay"]


def test_what_layers_carry_upwards_survives_activation_recompute():
    model = Decoder.Config(
        vocab_size=11, dim=8, num_layers=3, attention=SelfAttention.Config(num_heads=2), feed_forward=_Relay.Config()
    ).build()
    token_BL = torch.arange(10).view(2, 5)
    plain = model(token_BL, token_BL).loss
    plain.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.recompute = True
    again = model(token_BL, token_BL).loss
    again.backward()
    assert torch.equal(again, plain)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    first = model.blocks[0].feed_forward.weight.weight
    assert first.grad.abs().sum() > 0
