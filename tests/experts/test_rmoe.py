"""RMoE: the cell against torch's own, the state by hand, gradients through depth, sharing, counts, edges and errors."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from anabranch.errors import AnabranchError, ConfigError
from anabranch.experts.rmoe import RecurrentScore
from anabranch.lm import Decoder
from anabranch.nn import Attention, MoE
from anabranch.routing import Router, RoutingContext, TopK

SCORE = RecurrentScore.Config
FP32_TOLERANCE = 1e-6


def model_of(score=None, *, num_layers=3, seed=0, feed_forward=None, **changes):
    feed_forward = feed_forward or MoE.Config(
        num_experts=4, hidden_dim=8, router=Router.Config(score=score or SCORE(state_dim=6))
    )
    config = Decoder.Config(
        vocab_size=31, dim=16, num_layers=num_layers, attention=Attention.Config(num_heads=2), feed_forward=feed_forward
    )
    return config.replace(**changes).build(seed=seed)


def tokens(batch=2, length=9, seed=0):
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


def items(count=5, dim=16, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def scores_of(model):
    return [module.score for module in model.modules() if isinstance(module, Router)]


# ---- the cell -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "theirs"), [("gru", torch.nn.GRUCell), ("rnn", torch.nn.RNNCell), ("lstm", torch.nn.LSTMCell)]
)
def test_the_cell_equals_torchs(cell, theirs):
    score = SCORE(state_dim=6, cell=cell).build(16, 4, generator=torch.Generator().manual_seed(0))
    reference = theirs(6, 6)
    with torch.no_grad():
        for name, value in reference.named_parameters():
            value.copy_(getattr(score.recurrence, name))
    x_NP, h_NP, c_NP = items(7, 6, 1), items(7, 6, 2), items(7, 6, 3)
    if cell == "lstm":
        ours, expected = score.recurrence(x_NP, (h_NP, c_NP)), reference(x_NP, (h_NP, c_NP))
    else:
        ours, expected = score.recurrence(x_NP, (h_NP,)), (reference(x_NP, h_NP),)
    for value, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, other, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


def test_logits_of_three_layers_written_out():
    """Steps 1 to 3 of the method with torch's cell, layer by layer."""
    model = model_of()
    shared = model.shared["recurrent_router"]
    cell = torch.nn.GRUCell(6, 6)
    cell.load_state_dict(shared.state_dict())
    context, h_NP = RoutingContext(), torch.zeros(5, 6)
    for number, score in enumerate(scores_of(model)):
        x_ND = items(seed=number)
        h_NP = cell(x_ND @ score.projector.T, h_NP)
        torch.testing.assert_close(score.project(x_ND, context), h_NP @ score.weight.T, atol=1e-6, rtol=1e-5)


def test_without_passing_it_is_a_router_of_two_layers():
    """NP with the rnn cell: logits = G tanh(W P x + b), whatever the layer before saw."""
    model = model_of(SCORE(state_dim=6, cell="rnn", passing=False))
    cell = model.shared["recurrent_router"]
    context = RoutingContext()
    for number, score in enumerate(scores_of(model)):
        x_ND = items(seed=number)
        hidden_NP = torch.tanh(F.linear(x_ND @ score.projector.T, cell.weight_ih, cell.bias_ih + cell.bias_hh))
        torch.testing.assert_close(score.project(x_ND, context), hidden_NP @ score.weight.T, atol=1e-6, rtol=1e-5)
    assert not context.carry


def gradient_of_the_first_projector(**options):
    """Of a sum of the last layer's logits, at fixed hidden states."""
    model = model_of(SCORE(state_dim=6, **options))
    context = RoutingContext()
    for number, score in enumerate(scores_of(model)):
        logit_NE = score.project(items(seed=number), context)
    logit_NE.square().sum().backward()
    gradient = scores_of(model)[0].projector.grad
    return 0.0 if gradient is None else gradient.abs().sum().item()


def test_gradients_reach_the_first_layers_through_the_state_alone():
    assert gradient_of_the_first_projector() > 1e-6
    assert gradient_of_the_first_projector(passing=False) == 0
    assert gradient_of_the_first_projector(detach_state=True) == 0
    assert gradient_of_the_first_projector(passing=False, logit_residual=0.5) > 1e-6
    assert gradient_of_the_first_projector(passing=False, logit_residual=0.5, detach_state=True) == 0


def test_logit_residual_adds_the_logits_before():
    plain, added = (
        model_of(SCORE(state_dim=6, passing=False)),
        model_of(SCORE(state_dim=6, passing=False, logit_residual=0.5)),
    )
    total_NE = 0.0
    quiet, context = RoutingContext(), RoutingContext()
    for number, (left, right) in enumerate(zip(scores_of(plain), scores_of(added), strict=True)):
        total_NE = left.project(items(seed=number), quiet) + 0.5 * total_NE
        torch.testing.assert_close(right.project(items(seed=number), context), total_NE)


def test_an_item_routes_by_itself():
    """At fixed hidden states neither the order of items nor another item's state matters."""
    model = model_of()
    first, second = scores_of(model)[:2]
    x_ND, y_ND = items(seed=0), items(seed=1)

    def logits(x_ND, y_ND):
        context = RoutingContext()
        first.project(x_ND, context)
        return second.project(y_ND, context)

    expected_NE = logits(x_ND, y_ND)
    order_N = torch.tensor([3, 1, 0, 4, 2])
    torch.testing.assert_close(logits(x_ND[order_N], y_ND[order_N]), expected_NE[order_N])
    changed_ND = x_ND.clone()
    changed_ND[2] += 1.0
    moved_N = (logits(changed_ND, y_ND) - expected_NE).abs().amax(-1)
    assert moved_N[2] > 1e-6
    assert moved_N[[0, 1, 3, 4]].max() < FP32_TOLERANCE


# ---- in a model ---------------------------------------------------------------------------------------------------------------


def test_the_cell_is_in_the_model_once():
    model = model_of()
    names = [name for name, _ in model.named_parameters() if "weight_hh" in name]
    assert names == ["shared.recurrent_router.weight_hh"]
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        cells = {id(score.recurrence) for score in scores_of(twin)}
        assert cells == {id(twin.shared["recurrent_router"])}


def test_parameter_count_is_the_papers():
    """L (p h + N p) + 6 p^2 + 6 p, minus the linear router L N h: 3.6M for h = 1280, L = 24, N = 16, p = 128."""

    def count(score, layers=24):
        moe = MoE.Config(num_experts=16, hidden_dim=8, router=Router.Config(score=score))
        return Decoder.Config(
            dim=1280, num_layers=layers, attention=Attention.Config(num_heads=20), feed_forward=moe
        ).count()

    linear, ours = count(Router.Config().score), count(SCORE())
    extra = 24 * (128 * 1280 + 16 * 128) + 6 * 128**2 + 6 * 128 - 24 * 16 * 1280
    assert ours.parameters - linear.parameters == extra == 3_588_864
    assert ours.active - linear.active == extra
    flops = 24 * (2 * 128 * 1280 + 12 * 128**2 + 2 * 16 * 128 - 2 * 16 * 1280)
    assert ours.flops - linear.flops == flops


@pytest.mark.parametrize(
    "options",
    [{}, {"cell": "lstm"}, {"cell": "rnn"}, {"shared_projector": True}, {"gate": "cosine"}, {"passing": False}],
)
def test_counted_parameters_are_there(options):
    model = model_of(SCORE(state_dim=6, **options))
    assert sum(value.numel() for value in model.parameters()) == model.config.count().parameters


def test_a_dense_layer_lets_the_state_pass():
    from anabranch.nn import SwiGLU

    model = model_of(dense_layers=(1,), dense_feed_forward=SwiGLU.Config(hidden_dim=8)).eval()
    token_BL = tokens()
    seen = model(token_BL).logits_BLV
    first = scores_of(model)[0]
    with torch.no_grad():  # the state alone tells the last router what the first projector is
        first.weight.zero_()
        base = model(token_BL).logits_BLV
        first.projector.mul_(-3)
        changed = model(token_BL).logits_BLV
    assert torch.isfinite(seen).all()
    assert (changed - base).abs().max() > 1e-6


# ---- errors -------------------------------------------------------------------------------------------------------------------


def test_a_later_layer_without_a_state_is_an_error():
    second = scores_of(model_of())[1]
    with pytest.raises(
        AnabranchError, match=r"^the recurrent router of layer 1 got no routing_state from the routed layer before"
    ):
        second.project(items(), RoutingContext())


def test_a_state_that_does_not_fit_is_an_error():
    second = scores_of(model_of())[1]
    for state, message in (
        (torch.zeros(4, 6), r"needs routing_state of shape \[5, 6\], but got \[4, 6\]"),
        (torch.zeros(5, 6, dtype=torch.float64), r"needs routing_state of dtype torch.float32, but got torch.float64"),
        (torch.zeros(5, 6, device="meta"), r"needs routing_state of device cpu, but got meta"),
    ):
        with pytest.raises(AnabranchError, match=message):
            second.project(items(), RoutingContext(carry={"routing_state": state}))


def test_errors_of_the_config():
    with pytest.raises(ConfigError, match=r"^state_dim is 0; it must be greater than or equal to 1$"):
        SCORE(state_dim=0)
    with pytest.raises(
        ConfigError, match=r"^detach_state is True, but nothing is handed on; set passing or logit_residual$"
    ):
        SCORE(passing=False, detach_state=True)


def test_routers_of_one_model_share_one_kind_of_cell():
    router = Router.Config(select=TopK.Config(top_k=1))
    mixed = {
        "dense_layers": (1,),
        "dense_feed_forward": MoE.Config(num_experts=4, hidden_dim=8, router=router.replace(score=SCORE(state_dim=5))),
    }
    with pytest.raises(
        ConfigError, match=r"^state_dim is 5 in layer 1, but 6 in a layer before; recurrent routers share one cell$"
    ):
        model_of(**mixed)
