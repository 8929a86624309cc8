"""RMoE: the cell against torch's own, the state by hand, gradients through depth, sharing, counts, edges and errors."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anabranch.config import to_dict
from anabranch.data import DataConfig, Files
from anabranch.errors import AnabranchError, CheckpointError, ConfigError
from anabranch.experts.chain import Chain
from anabranch.experts.rmoe import RecurrentScore, to_recurrent
from anabranch.experts.rmoe_measure import expert_similarity, gate_facts, measure_gates
from anabranch.lm import Decoder, SamplingConfig, generate, load_model, load_weights, save_model, upcycle
from anabranch.nn import ExpertPool, MoE, SelfAttention, SwiGLU
from anabranch.routing import (
    BiasBalancer,
    Override,
    Router,
    Routing,
    RoutingContext,
    SwitchLoss,
    TopK,
    override_routing,
    record_routing,
    replay_routing,
)
from anabranch.routing.discovery import find_routers
from anabranch.train import RunConfig, TrainConfig, Trainer, read_metrics
from ranks import run_ranks

SCORE = RecurrentScore.Config
FP32_TOLERANCE = 1e-6


def model_of(score=None, *, num_layers=3, seed=0, feed_forward=None, **changes):
    feed_forward = feed_forward or MoE.Config(
        num_experts=4, hidden_dim=8, router=Router.Config(score=score or SCORE(state_dim=6))
    )
    config = Decoder.Config(
        vocab_size=31,
        dim=16,
        num_layers=num_layers,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=feed_forward,
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


def test_the_gated_cell_is_the_papers_equations():
    score = SCORE(state_dim=6).build(16, 4, generator=torch.Generator().manual_seed(0))
    cell, x_NP, h_NP = score.recurrence, items(7, 6, 1), items(7, 6, 2)
    (w_r, w_z, w_n), (u_r, u_z, u_n) = cell.weight_ih.chunk(3), cell.weight_hh.chunk(3)
    (b_r, b_z, b_n), (c_r, c_z, c_n) = cell.bias_ih.chunk(3), cell.bias_hh.chunk(3)
    reset = torch.sigmoid(x_NP @ w_r.T + b_r + h_NP @ u_r.T + c_r)
    update = torch.sigmoid(x_NP @ w_z.T + b_z + h_NP @ u_z.T + c_z)
    new = torch.tanh(x_NP @ w_n.T + b_n + reset * (h_NP @ u_n.T + c_n))
    torch.testing.assert_close(cell(x_NP, (h_NP,))[0], (1 - update) * new + update * h_NP, atol=1e-6, rtol=1e-5)


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


def test_what_else_is_handed_on_stays_when_the_state_is():
    """With both a state and logits handed on, each layer's logits are its own by the state plus a share of those before."""
    plain = model_of(SCORE(state_dim=6))
    added = model_of(SCORE(state_dim=6, logit_residual=0.5))
    total_NE = 0.0
    quiet, context = RoutingContext(), RoutingContext()
    context.carry["of another part"] = items()
    for number, (left, right) in enumerate(zip(scores_of(plain), scores_of(added), strict=True)):
        total_NE = left.project(items(seed=number), quiet) + 0.5 * total_NE
        torch.testing.assert_close(right.project(items(seed=number), context), total_NE)
    assert torch.equal(context.carry["of another part"], items())


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
            dim=1280, num_layers=layers, attention=SelfAttention.Config(num_heads=20), feed_forward=moe
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


@pytest.mark.parametrize("dtype", ["float32", "autocast"])
def test_the_cell_stays_in_fp32_under_autocast_unless_told(dtype):
    score = SCORE(state_dim=6, cell_dtype=dtype).build(16, 4, generator=torch.Generator().manual_seed(0))
    x_ND = items()
    plain_NE = score.project(x_ND, RoutingContext())
    with torch.autocast("cpu", torch.bfloat16):
        mixed_NE = score.project(x_ND, RoutingContext())
    assert mixed_NE.dtype == torch.float32
    assert torch.equal(mixed_NE, plain_NE) == (dtype == "float32")
    torch.testing.assert_close(mixed_NE, plain_NE, atol=2e-2 * plain_NE.abs().max().item(), rtol=0)


def test_cosine_logits_are_cosines_of_the_state():
    score = SCORE(state_dim=6, gate="cosine", temperature=0.5).build(16, 4, generator=torch.Generator().manual_seed(0))
    context = RoutingContext()
    logit_NE = score.project(items(), context)
    expected = F.cosine_similarity(context.carry["routing_state"].unsqueeze(1), score.weight.unsqueeze(0), dim=-1)
    torch.testing.assert_close(logit_NE, expected / 0.5)


def test_initial_weights_as_asked():
    drawn = {
        init: SCORE(state_dim=64, init=init).build(256, 512, generator=torch.Generator().manual_seed(0))
        for init in ("normal", "scaled")
    }
    assert drawn["normal"].projector.std().item() == pytest.approx(0.02, rel=0.05)
    assert drawn["normal"].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert drawn["scaled"].projector.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert drawn["scaled"].weight.std().item() == pytest.approx(1 / 8, rel=0.05)


def test_decoding_token_by_token_equals_the_whole():
    """The state runs over depth: a cache of keys and values is all that decoding needs."""
    model = model_of(init_std=0.3).eval()
    token_BL = tokens()
    with torch.no_grad():
        expected_BLV = model(token_BL).logits_BLV
        cache = model.new_cache(9)
        parts = [model(token_BL[:, place : place + 1], cache=cache).logits_BLV for place in range(9)]
    torch.testing.assert_close(torch.cat(parts, 1), expected_BLV, atol=1e-5, rtol=1e-5)


def test_recompute_hands_the_state_on_and_its_gradient_back():
    model, again = model_of(init_std=0.3), model_of(init_std=0.3)
    again.recompute = True
    token_BL = tokens()
    for twin in (model, again):
        twin(token_BL, token_BL).loss.backward()
    for (name, left), right in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, atol=1e-6, rtol=1e-4, msg=name)


def layers():
    router = Router.Config(score=SCORE(state_dim=6), balance=(BiasBalancer.Config(rate=0.01), SwitchLoss.Config()))
    yield pytest.param(MoE.Config(num_experts=4, hidden_dim=8, router=router), id="moe")
    yield pytest.param(Chain.Config(num_experts=4, hidden_dim=8, reuse=2, router=router), id="chain of a pool")


def run_of(feed_forward, tmp_path, monkeypatch):
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n\n" * 20)
    return RunConfig(
        model=model_of(num_layers=2, vocab_size=257, feed_forward=feed_forward).config,
        data=DataConfig(corpus=Files.Config(paths=(str(tmp_path / "text"),)), sequence_length=16),
        train=TrainConfig(steps=3, batch_size=2, checkpoint_every=1, eval_tokens=64),
    )


@pytest.mark.parametrize("feed_forward", list(layers()))
def test_trains_resumes_saves_and_generates(feed_forward, tmp_path, monkeypatch):
    config = run_of(feed_forward, tmp_path, monkeypatch)

    def crash(event):
        if event.kind == "step" and event.step == 2:
            raise InterruptedError

    straight = Trainer(config, tmp_path / "straight")
    straight.fit()
    with pytest.raises(InterruptedError):
        Trainer(config, tmp_path / "resumed", on_event=crash).fit()
    Trainer(config, tmp_path / "resumed", resume=True).fit()
    save_model(tmp_path / "saved", straight.model)
    for folder in ("resumed", "saved"):
        loaded, _ = load_model(tmp_path / folder)
        for name, value in straight.model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), (folder, name)
    prompt = [5, 6, 7]
    made = generate(loaded, [prompt], SamplingConfig(max_tokens=4, temperature=0.0))[0]
    for token in made:
        assert int(loaded.eval()(torch.tensor([prompt])).logits_BLV[0, -1].argmax()) == token
        prompt = [*prompt, token]


TRAIN = """
from anabranch.train import Trainer, read_run_config
for name in ("ddp", "fsdp"):
    print(repr(Trainer(read_run_config("{folder}/" + name + ".config"), "{folder}/" + name).fit().bits_per_byte))
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, monkeypatch):
    """The state goes from block to block outside of what FSDP sees of them; its gradients must arrive all the same."""
    config = run_of(list(layers())[1].values[0], tmp_path, monkeypatch)
    Trainer(config, tmp_path / "one").fit()
    for name in ("ddp", "fsdp"):
        (tmp_path / f"{name}.config").mkdir()
        config.replace(train=config.train.replace(parallel=name)).save(tmp_path / f"{name}.config")
    run_ranks(TRAIN.format(folder=tmp_path))
    expected, _ = load_model(tmp_path / "one")
    for name in ("ddp", "fsdp"):
        for ours, theirs in zip(read_metrics(tmp_path / name), read_metrics(tmp_path / "one"), strict=True):
            if ours["kind"] == "train":
                assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
        loaded, _ = load_model(tmp_path / name)
        for key, value in expected.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=2e-3, msg=f"{name} {key}")


@pytest.mark.parametrize(("cell", "gates"), [("gru", 3), ("rnn", 1), ("lstm", 4)])
def test_a_cell_begins_uniform_as_torchs_does(cell, gates):
    score = SCORE(state_dim=64, cell=cell).build(16, 4, generator=torch.Generator().manual_seed(0))
    for weight in (score.recurrence.weight_ih, score.recurrence.weight_hh):
        assert weight.shape == (gates * 64, 64)
        assert 0.98 / 8 < weight.abs().max().item() <= 1 / 8  # 1 / sqrt(64)
        assert weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


# ---- conversion ---------------------------------------------------------------------------------------------------------------


def linear_model(**changes):
    return model_of(Router.Config().score.replace(init_std=0.5), **changes)


@pytest.mark.parametrize("state_dim", [4, 12])
def test_conversion_begins_near_the_linear_routers(state_dim):
    plain = linear_model(init_std=0.3)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    converted = to_recurrent(plain, tokens(8, 32), state_dim=state_dim)
    assert len(converted.agreement) == 3
    assert min(converted.agreement) > 0.97
    other = tokens(4, 16, seed=9)
    with torch.no_grad():
        logits_BLV, expected_BLV = converted.model.eval()(other).logits_BLV, plain.eval()(other).logits_BLV
    assert (logits_BLV - expected_BLV).abs().mean() < 0.02 * expected_BLV.abs().mean()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name]), name
    converted.model.train()(other, other).loss.backward()
    assert converted.model.shared["recurrent_router"].weight_hh.grad.abs().max() > 0


@pytest.mark.parametrize("tied", [False, True])
def test_conversion_takes_chains_and_pools(tied):
    linear = Router.Config(score=Router.Config().score.replace(init_std=0.5))
    chain = Chain.Config(num_experts=4, hidden_dim=8, reuse=2, independent_gates=not tied, router=linear)
    converted = to_recurrent(model_of(feed_forward=chain, init_std=0.3), tokens(8, 32), state_dim=8)
    assert len(converted.agreement) == 6  # three layers of two passes
    assert min(converted.agreement) > 0.95


@pytest.mark.parametrize("std", [0.3, 30.0])
def test_a_conversion_begins_with_closed_gates_and_small_projections(std):
    plain, token_BL = linear_model(), tokens(8, 32)
    with torch.no_grad():
        for block in plain.blocks:
            block.feed_forward_norm.weight.fill_(std)
    converted = to_recurrent(plain, token_BL, state_dim=6)
    cell = converted.model.shared["recurrent_router"]
    _reset, update, new = cell.weight_ih.chunk(3)
    assert torch.equal(new, torch.eye(6))
    assert not any(value.any() for value in (update, cell.weight_hh, cell.bias_hh))
    assert cell.bias_ih.tolist() == [0.0] * 6 + [-6.0] * 6 + [0.0] * 6
    seen = []
    for module in plain.modules():
        if isinstance(module, Router):
            module.register_forward_pre_hook(lambda router, args: seen.append(args[0]))
    plain.eval()(token_BL)
    for score, x_ND in zip(scores_of(converted.model), seen, strict=True):
        roots_P = (x_ND @ score.projector.T).square().mean(0).sqrt()
        assert roots_P[:4].max().item() == pytest.approx(0.05, rel=1e-4)


def test_conversion_of_a_design_that_names_arguments(by_keyword):
    expected = to_recurrent(linear_model(), tokens(8, 32), state_dim=4)
    by_keyword()
    converted = to_recurrent(linear_model(), tokens(8, 32), state_dim=4)
    assert converted.agreement == expected.agreement
    for name, value in expected.model.state_dict().items():
        assert torch.equal(converted.model.state_dict()[name], value), name


def test_conversion_of_a_rank_below_the_experts_is_the_best_of_that_rank(caplog):
    converted = to_recurrent(linear_model(), tokens(8, 32), state_dim=2)
    score = scores_of(converted.model)[0]
    left, value, right = torch.linalg.svd(scores_of(linear_model())[0].weight)
    expected = left[:, :2] * value[:2] @ right[:2]
    torch.testing.assert_close(score.weight @ score.projector, expected, atol=1e-5, rtol=1e-4)
    assert min(converted.agreement) < 0.95
    assert "recurrent routers agree with the linear ones in" in caplog.text


def test_conversion_errors():
    with pytest.raises(ConfigError, match=r"^to_recurrent needs linear routers, this model has 'recurrent'$"):
        to_recurrent(model_of(), tokens())
    with pytest.raises(ConfigError, match=r"^only a gru with a linear gate and a projector per layer can begin near"):
        to_recurrent(linear_model(), tokens(), cell="lstm")
    with pytest.raises(ConfigError, match=r"^to_recurrent needs linear routers, this model has 'swiglu'$"):
        to_recurrent(model_of(feed_forward=SwiGLU.Config(hidden_dim=8)), tokens())


def test_weights_of_linear_routers_do_not_load_unconverted(tmp_path):
    save_model(tmp_path / "linear", linear_model())
    message = r"has router=linear, the model router=recurrent; to go from linear routers to recurrent ones load the checkpoint as it is"
    with pytest.raises(CheckpointError, match=message):
        load_weights(model_of(), tmp_path / "linear")
    table = json.loads((tmp_path / "linear" / "config.json").read_text())
    table["model"]["feed_forward"]["router"]["score"] = to_dict(SCORE(state_dim=6))
    (tmp_path / "linear" / "config.json").write_text(json.dumps(table))
    with pytest.raises(
        CheckpointError, match=r"the config says router.score.kind='recurrent': to go from linear routers"
    ):
        load_model(tmp_path / "linear")


def test_upcycling_wants_a_router_that_stands_alone():
    moe = MoE.Config(num_experts=4, hidden_dim=8, router=Router.Config(score=SCORE()))
    with pytest.raises(
        ConfigError, match=r"^router.score is of kind 'recurrent', whose layers share parts; use 'linear'"
    ):
        upcycle(model_of(feed_forward=SwiGLU.Config(hidden_dim=8)), moe)


# ---- measures -----------------------------------------------------------------------------------------------------------------


def routing_of(score_NE, top_k=2):
    score_NE = torch.as_tensor(score_NE)
    weight_NK, index_NK = score_NE.topk(top_k, dim=-1)
    return Routing(index_NK, weight_NK, score_NE)


def test_measures_by_hand():
    """Shares 1/2, 1/4, 1/8, 1/8: entropy 1/2 + 2/4 + 2 * 3/8 = 1.75 bits, inner balance 2, outer balance 3/4."""
    facts = gate_facts([routing_of([[0.5, 0.25, 0.125, 0.125]] * 3)])
    assert facts.entropy_L[0] == pytest.approx(1.75)
    assert facts.inner_balance == pytest.approx(2.0)
    assert facts.outer_balance == pytest.approx(0.75)
    # Labels of the row: 50, 25, 12, 12, of entropy 2 * 1/4 * 2 + 1/2 * 1 = 1.5 bits; a router tells all of itself.
    assert facts.information_LL[0, 0] == pytest.approx(1.5)


def test_information_between_routers_by_hand():
    """Second router: 0.4, 0.4, 0.1, 0.1. First labels a b c c, second d d e e: joint a-d b-d c-e c-e. I = 1.5 + 1 - 1.5 = 1 bit."""
    first, second = routing_of([[0.5, 0.25, 0.125, 0.125]]), routing_of([[0.4, 0.4, 0.1, 0.1]])
    facts = gate_facts([first, second])
    assert facts.information == pytest.approx(1.0)
    other = gate_facts([first, routing_of([[0.6, 0.4]])]).information_LL
    assert np.isnan([other[0, 1], other[1, 0]]).all()  # routers of different E cannot be compared label by label
    assert other[1, 1] == pytest.approx(1.0)


def test_information_of_choices_is_that_of_the_table():
    """Four tokens: first choices 0 0 1 1. The same again tell 1 bit; 0 1 0 1 tell nothing."""
    eye = torch.eye(3)
    same, apart = routing_of(eye[[0, 0, 1, 1]], 1), routing_of(eye[[0, 1, 0, 1]], 1)
    assert gate_facts([same, same]).choice_information == pytest.approx(1.0)
    assert gate_facts([same, apart]).choice_information == pytest.approx(0.0)


def test_measuring_a_model_leaves_it_as_it_was():
    model = model_of().train()
    facts = measure_gates(model, tokens(2, 16))
    assert model.training
    assert facts.information_LL.shape == (3, 3)
    assert facts.entropy_L == pytest.approx([2.0] * 3, abs=0.01)  # logits near 0: four experts, two bits
    assert facts.inner_balance >= 1
    assert not any(module._forward_hooks for module in model.modules())


def test_similarity_of_experts():
    pool = ExpertPool(3, 4, 2)
    with torch.no_grad():
        pool.w13.copy_(torch.eye(4)[:3].unsqueeze(1).expand(3, 4, 4))  # keys at right angles
        pool.w2.copy_(pool.w2[:1].expand(3, 4, 2))  # values alike
    keys, values = expert_similarity(pool)
    assert keys == pytest.approx(0.0, abs=1e-6)
    assert values == pytest.approx(1.0, abs=1e-6)


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
        (
            torch.zeros(4, 6),
            r"needs routing_state of \[5, 6\] torch.float32 on cpu, but got \[4, 6\] torch.float32 on cpu",
        ),
        (torch.zeros(5, 6, dtype=torch.float64), r"but got \[5, 6\] torch.float64 on cpu"),
        (torch.zeros(5, 6, device="meta"), r"but got \[5, 6\] torch.float32 on meta"),
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


def recorded(model, token_BL, routers=None):
    with torch.no_grad(), record_routing(model, routers=routers) as recorder:
        logits_BLV = model(token_BL).logits_BLV
    return logits_BLV, recorder.trace()


@pytest.mark.parametrize("picked", [[0], [1], [1, 2], [3]])
def test_replay_of_some_routers_leaves_the_state_to_the_others(picked):
    model, token_BL = model_of(num_layers=4).eval(), tokens()
    routers = list(find_routers(model).items())
    some = dict(routers[index] for index in picked)
    expected_BLV, trace = recorded(model, token_BL, some)
    with torch.no_grad(), replay_routing(model, trace, routers=some):
        assert torch.equal(model(token_BL).logits_BLV, expected_BLV)


def test_a_whole_replay_beside_other_overrides_hands_the_state_on():
    model, token_BL = model_of(num_layers=4).eval(), tokens()
    expected_BLV, trace = recorded(model, token_BL)
    same = {layer: Override(index_NK=torch.from_numpy(trace.decisions(layer).index_NK).long()) for layer in (0, 2)}
    with torch.no_grad(), replay_routing(model, trace), override_routing(model, same):
        assert torch.equal(model(token_BL).logits_BLV, expected_BLV)
    # One of the third router alone: the first must know of it.
    name, router = list(find_routers(model).items())[2]
    _, part = recorded(model, token_BL, {name: router})
    with (
        torch.no_grad(),
        replay_routing(model, trace),
        replay_routing(model, part, weights="own", routers={name: router}),
    ):
        assert torch.equal(model(token_BL).logits_BLV, expected_BLV)


def test_a_replay_that_knows_a_part_of_the_model_is_refused_where_a_state_is_missing():
    model, token_BL = model_of(num_layers=4).eval(), tokens()
    part = model.blocks[1]
    with torch.no_grad(), record_routing(part) as recorder:
        model(token_BL)
    with torch.no_grad(), pytest.raises(AnabranchError, match="has not handed on"):
        with replay_routing(part, recorder.trace()):
            model(token_BL)


def test_a_replay_that_knows_a_part_is_enough_where_nothing_is_handed_on():
    model, token_BL = model_of(SCORE(state_dim=6, passing=False), num_layers=4).eval(), tokens()
    part = model.blocks[1]
    with torch.no_grad(), record_routing(part) as recorder:
        expected_BLV = model(token_BL).logits_BLV
    with torch.no_grad(), replay_routing(part, recorder.trace()):
        assert torch.equal(model(token_BL).logits_BLV, expected_BLV)
