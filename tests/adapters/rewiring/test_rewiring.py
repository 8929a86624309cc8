"""Rewiring: what a phase 1 does, against finite differences, alone and in batches, and what it must never change."""
# Shapes: E destinations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import duo
from adapter_models import make_base
from anabranch.adapters.rewiring import Rerouter, Rewiring, phase
from anabranch.adapters.rewiring.measure import confidence, difference, row_means, token_losses
from anabranch.adapters.rewiring.step import Optimizer
from anabranch.adapters.rewiring.vectors import Seen, Vectors, run
from anabranch.depth.duo_llm import with_router
from anabranch.errors import ConfigError
from anabranch.experts.chain import Chain
from anabranch.experts.rexmoe import ReXMoE
from anabranch.lm import Decoder, load_model
from anabranch.nn import MoE
from anabranch.routing import BiasBalancer, LinearScore, Router, Routing, TopK
from foreign_models import build_theirs

BODY = {"vocab_size": 61, "dim": 16, "num_layers": 3, "init_std": 0.4, "depth_scaled_init": False}
PLAIN = Rewiring(guard=False, select="all", scale_step=False)


def layer(activation="softmax", normalize="sum", top_k=2, experts=4, balance=()):
    router = Router.Config(
        score=LinearScore.Config(activation=activation, init_std=0.5),
        select=TopK.Config(top_k=top_k, normalize=normalize),
        balance=balance,
    )
    return MoE.Config(num_experts=experts, hidden_dim=16, router=router)


KINDS = {
    "softmax then top-k": layer(normalize="none"),
    "top-k, over their sum": layer(),
    "top-k then softmax": layer(normalize="softmax"),
    "sigmoid with a bias": layer("sigmoid", balance=(BiasBalancer.Config(),)),
    "pools that layers share": ReXMoE.Config(num_experts=4, hidden_dim=16, router=layer(normalize="none").router),
}


def model_of(feed_forward=KINDS["softmax then top-k"], dtype=torch.float32, **changes):
    return Decoder.Config(**{**BODY, **changes}, feed_forward=feed_forward).build(seed=0).to(dtype).eval()


def text(length=60, seed=0):
    return torch.randint(61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def adapted(model, config, contexts):
    """(vectors of each layer ``[B, E]``, reports)."""
    rerouter = Rerouter(model, config)
    states = [rerouter.new_state() for _ in contexts]
    reports = rerouter.adapt(contexts, states)
    return [torch.stack(of_layer) for of_layer in zip(*(state.delta for state in states), strict=True)], reports


@torch.no_grad()
def loss_of(model, tokens, delta):
    """Mean nats of one text with vectors ``[1, E]`` of each layer, on paths that phase 1 does not take."""
    token_BL = torch.tensor([tokens])
    logits_BLV = run(model, token_BL, None, Vectors(Rerouter(model).layers, delta, len(tokens)))
    return F.cross_entropy(logits_BLV[0, :-1], token_BL[0, 1:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_what_finite_differences_say(kind, monkeypatch):
    """In float64, through every layer and the softmax of the chosen; far from ties a small step changes no choice."""
    model, tokens, seen = model_of(KINDS[kind], torch.float64), text(), []
    original = phase._Batch._gradient
    monkeypatch.setattr(
        phase._Batch, "_gradient", lambda self, *a, **k: seen.append(original(self, *a, **k)) or seen[-1]
    )
    adapted(model, PLAIN.replace(steps=1), [tokens])
    [(loss_B, gradient)] = seen
    delta = [torch.zeros_like(each) for each in gradient]
    torch.testing.assert_close(loss_B[0], loss_of(model, tokens, delta))
    for place, gradient_BE in enumerate(gradient):
        for expert in range(gradient_BE.shape[1]):
            sides = []
            for sign in (1, -1):
                moved = [each.clone() for each in delta]
                moved[place][0, expert] = sign * 1e-6
                sides.append(float(loss_of(model, tokens, moved)))
            measured = torch.tensor((sides[0] - sides[1]) / 2e-6, dtype=torch.float64)
            torch.testing.assert_close(gradient_BE[0, expert], measured, rtol=1e-3, atol=1e-8)
    assert all(bool(gradient_BE.any()) for gradient_BE in gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_what_is_fitted_falls(kind):
    _, [report] = adapted(model_of(KINDS[kind]), PLAIN.replace(optimizer="sgd", eta=1e-3), [text()])
    assert report.loss_after < report.loss_before
    assert (report.steps, report.fitted, report.skipped, report.scale) == (5, 60, None, None)


def test_vectors_of_zeros_change_no_bit():
    model, token_BL = model_of(), torch.tensor([text(), text(seed=1)])
    rerouter = Rerouter(model)
    zeros = [torch.stack([delta_E] * 2) for delta_E in rerouter.new_state().delta]
    plain = model(token_BL).logits_BLV
    assert torch.equal(run(model, token_BL, None, Vectors(rerouter.layers, zeros, 60)), plain)
    with rerouter.attached(rerouter.new_state()):
        assert torch.equal(model(token_BL).logits_BLV, plain)


def test_a_constant_changes_nothing_behind_a_softmax_and_vectors_have_mean_zero():
    model, tokens = model_of(), text()
    delta, _ = adapted(model, PLAIN, [tokens])
    assert all(float(delta_BE.mean().abs()) < 1e-7 for delta_BE in delta)
    shifted = [delta_BE + 3.0 for delta_BE in delta]
    torch.testing.assert_close(loss_of(model, tokens, delta), loss_of(model, tokens, shifted), rtol=0, atol=1e-6)


def test_vectors_of_a_sigmoid_are_not_centred():
    delta, _ = adapted(model_of(KINDS["sigmoid with a bias"]), PLAIN, [text()])
    assert any(float(delta_BE.mean().abs()) > 1e-3 for delta_BE in delta)


@pytest.mark.parametrize(
    "feed_forward", [layer(experts=1, top_k=1), layer(experts=1, top_k=1, normalize="none"), layer(top_k=1)]
)
def test_where_weights_are_always_one_nothing_moves(feed_forward):
    """One expert, which is a dense layer; and one that is chosen, whose weight is divided by itself: Adam must not step by rounding."""
    delta, [report] = adapted(model_of(feed_forward), PLAIN, [text()])
    assert not any(bool(delta_BE.any()) for delta_BE in delta)
    assert report.loss_after == pytest.approx(report.loss_before, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guard", [False, True])
def test_a_batch_is_its_requests_alone(kind, guard):
    """Texts of other lengths beside them, padding excluded."""
    model, texts = model_of(KINDS[kind]), [text(), text(40, 1), text(25, 2), text(60, 3)]
    config = Rewiring(guard=guard, scale_step=False)
    together, reports = adapted(model, config, texts)
    for row, tokens in enumerate(texts):
        alone, [report] = adapted(model, config, [tokens])
        for one_BE, all_BE in zip(alone, together, strict=True):
            torch.testing.assert_close(one_BE[0], all_BE[row], rtol=1e-4, atol=1e-5)
        assert reports[row].scale == report.scale
        assert reports[row].loss_after == pytest.approx(report.loss_after, abs=1e-5)
        assert reports[row].overlap == pytest.approx(report.overlap, abs=0.02)
        assert reports[row].length == report.length == len(tokens)


def test_weights_stay_to_the_bit_and_get_no_gradients():
    model, tokens = model_of().train(), text()
    some = model.embedding.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    plain = model.eval()(torch.tensor([tokens])).logits_BLV
    model.train()
    rerouter = Rerouter(model, PLAIN)
    state = rerouter.new_state()
    rerouter.adapt([tokens], [state])
    with rerouter.attached(state):
        assert not torch.equal(model.eval()(torch.tensor([tokens])).logits_BLV, plain)
    assert torch.equal(model(torch.tensor([tokens])).logits_BLV, plain)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad == (parameter is not some) for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_model_is_left_as_it_was_where_a_phase_fails(monkeypatch):
    model = model_of().train()
    monkeypatch.setattr(phase, "token_losses", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapted(model, PLAIN.replace(checkpointing=True), [text()])
    assert model.training
    assert not model.recompute
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("eta", [0.05, 3.0])
def test_with_the_guard_the_loss_of_the_tail_never_rises(eta):
    model, texts = model_of(), [text(40, seed) for seed in range(6)]
    config = Rewiring(eta=eta, scale_step=False)
    rerouter = Rerouter(model, config)
    states = [rerouter.new_state() for _ in texts]
    scales = set()
    for _ in range(3):  # it goes on from what it has
        start = [state.delta for state in states]
        reports = rerouter.adapt(texts, states)
        for tokens, report, state, old in zip(texts, reports, states, start, strict=True):
            tail = config.held_back(len(tokens))
            assert tail == 16
            token_BL = torch.tensor([tokens])
            losses = []
            for delta in (old, state.delta):
                vectors = Vectors(rerouter.layers, [delta_E[None] for delta_E in delta], len(tokens))
                losses.append(token_losses(run(model, token_BL, None, vectors), token_BL)[0, -tail:].mean().detach())
            assert losses[1] <= losses[0] + 1e-6
            assert report.tail_before == pytest.approx(float(losses[0]), abs=1e-5)
            assert report.tail_after == pytest.approx(float(losses[1]), abs=1e-5)
            assert report.fitted == len(tokens) - tail
            scales.add(report.scale)
    # With steps this large some texts take nothing.
    assert 0.0 in scales or eta == 0.05


def test_the_guard_looks_at_no_token_that_was_held_back():
    """Another tail gives the same steps; what is kept of them may differ."""
    model, tokens = model_of(), text()
    seen = []
    for last in (tokens, [*tokens[:-18], *text(18, seed=9)]):
        delta, [report] = adapted(model, Rewiring(tail=0.3), [last])
        seen.append([delta_BE / (report.scale or 1) for delta_BE in delta] if report.scale else None)
    for one, other in zip(*seen, strict=True) if all(seen) else ():
        torch.testing.assert_close(one, other)
    assert any(seen)


@pytest.mark.parametrize(("length", "held"), [(20, 16), (59, 18), (61, 18), (63, 19), (1000, 300)])
def test_how_many_tokens_are_held_back(length, held):
    """0.3 of them to the nearest whole number, 16 at least."""
    assert Rewiring().held_back(length) == held
    assert Rewiring(guard=False).held_back(length) == 0


def test_a_step_is_scaled_by_the_context():
    model = model_of()
    whole, _ = adapted(model, PLAIN.replace(steps=1), [text()])
    short, _ = adapted(model, PLAIN.replace(steps=1, scale_step=True), [text()])
    for whole_BE, short_BE in zip(whole, short, strict=True):
        torch.testing.assert_close(short_BE, whole_BE * 60 / 512)
    assert Rewiring().step_size(2000) == 0.05


@pytest.mark.parametrize("guard", [False, True])
def test_a_window_fits_the_last_tokens_alone(guard):
    config, tokens = Rewiring(guard=guard), text()
    windowed, [report] = adapted(model_of(), config.replace(window=40), [tokens])
    last, _ = adapted(model_of(), config, [tokens[-40:]])
    assert report.length == 40
    assert all(torch.equal(one, other) for one, other in zip(windowed, last, strict=True))


def test_checkpointing_gives_the_same():
    model, texts = model_of(), [text(), text(40, 1)]
    plain, _ = adapted(model, Rewiring(), texts)
    again, _ = adapted(model, Rewiring(checkpointing=True), texts)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def moved(model, **changes):
    delta, _ = adapted(model, PLAIN.replace(**changes), [text()])
    return [bool(delta_BE.any()) for delta_BE in delta], delta


def test_some_layers_are_updated_by_how_sure_they_are():
    """C is large where a router is undecided, as printed; of one choice, where no second one is counted."""
    model = model_of(layer(normalize="none", top_k=1))
    with torch.no_grad():
        for layer_, factor in zip(Rerouter(model).layers, (1.0, 0.0, 20.0), strict=True):
            layer_.router.score.weight.mul_(factor)  # 1 is even, 2 decided
    assert moved(model, select="uncertain", r=0.3)[0] == [False, True, False]
    assert moved(model, select="decisive", r=0.3)[0] == [False, False, True]
    assert moved(model, select="uncertain", r=0.7)[0] == [True, True, False]
    # Half of three, the usual share, are two.
    assert moved(model, select="uncertain")[0] == [True, True, False]
    assert moved(model, select="decisive", r=0.5)[0] == [True, False, True]
    assert moved(model, select="decisive", r=0.01)[0] == [False, False, True]
    assert moved(model, select="all")[0] == [True] * 3
    whole = moved(model, select="all", steps=1)[1]
    soft = moved(model, select="uncertain", choice="soft", steps=1)[1]
    torch.testing.assert_close(soft[1], whole[1])
    share = float(soft[2].norm() / whole[2].norm())
    assert 0 < share < float(soft[0].norm() / whole[0].norm()) < 1
    soft = moved(model, select="decisive", choice="soft", steps=1)[1]
    torch.testing.assert_close(soft[2], whole[2])
    assert float(soft[1].norm() / whole[1].norm()) == pytest.approx(share, rel=1e-4)


def test_a_router_that_runs_twice_a_pass_has_vectors_of_each():
    """Against a router for each of its passes, with the same weights."""
    shared, own = (
        model_of(Chain.Config(num_experts=4, hidden_dim=16, independent_gates=independent), num_layers=2)
        for independent in (False, True)
    )
    same = shared.state_dict()
    own.load_state_dict(
        {name: same[name.replace("more_routers.0", "router")] for name in own.state_dict()}, strict=True
    )
    found = [adapted(model, PLAIN, [text()])[0] for model in (shared, own)]
    assert len(found[0]) == 4
    assert all(delta_BE.any() for delta_BE in found[0])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_which_layers_follows_from_the_guard_unless_it_is_said():
    assert (Rewiring().layers, Rewiring(guard=False).layers) == ("all", "uncertain")
    assert Rewiring(select="decisive").layers == "decisive"


def test_gradient_descent_is_gradient_descent(monkeypatch):
    model, seen = model_of(dtype=torch.float64), []
    original = phase._Batch._gradient
    monkeypatch.setattr(
        phase._Batch, "_gradient", lambda self, *a, **k: seen.append(original(self, *a, **k)) or seen[-1]
    )
    delta, _ = adapted(model, PLAIN.replace(optimizer="sgd", steps=3), [text()])
    for place, delta_BE in enumerate(delta):
        total_BE = sum(gradient[place] for _, gradient in seen)
        torch.testing.assert_close(delta_BE, -0.05 * (total_BE - total_BE.mean(-1, keepdim=True)))


def test_adam_is_torchs(monkeypatch):
    model, seen = model_of(dtype=torch.float64), []
    original = phase._Batch._gradient
    monkeypatch.setattr(
        phase._Batch, "_gradient", lambda self, *a, **k: seen.append(original(self, *a, **k)) or seen[-1]
    )
    delta, _ = adapted(model, PLAIN.replace(steps=4), [text()])
    for place, delta_BE in enumerate(delta):
        theirs = torch.zeros_like(delta_BE, requires_grad=True)
        optimizer = torch.optim.Adam([theirs], lr=0.05)
        for _, gradient in seen:
            theirs.grad = gradient[place].clone()
            optimizer.step()
        torch.testing.assert_close(delta_BE, theirs.detach() - theirs.detach().mean(-1, keepdim=True))


def test_the_report_says_what_changed():
    """Against the decisions of two plain passes, by sets."""
    model, tokens = model_of(), text()
    rerouter = Rerouter(model, PLAIN.replace(eta=0.5))
    state = rerouter.new_state()
    [report] = rerouter.adapt([tokens], [state])
    for place, layer_ in enumerate(rerouter.layers):
        decisions = []
        handle = layer_.router.register_forward_hook(lambda _m, _a, out, to=decisions: to.append(out.index_NK))
        model(torch.tensor([tokens]))
        with rerouter.attached(state):
            model(torch.tensor([tokens]))
        handle.remove()
        before, after = ([set(row) for row in index_NK.tolist()] for index_NK in decisions)
        jaccard = [len(old & new) / len(old | new) for old, new in zip(before, after, strict=True)]
        assert report.overlap[place] == pytest.approx(sum(jaccard) / len(jaccard), abs=1e-6)
        assert report.new_experts[place] == tuple(sorted(set().union(*after) - set().union(*before)))
        share = [sum(expert in row for row in rows) / 120 for rows in (before, after) for expert in range(4)]
        change = sum(abs(old - new) for old, new in zip(share[:4], share[4:], strict=True)) / 2
        assert report.load_change[place] == pytest.approx(change)
        assert report.norms[place] == pytest.approx(float(state.delta[place].norm()))
    assert min(report.overlap) < 1
    assert report.seconds > 0
    assert state.seconds == report.seconds


def seen(*choices):
    index_NK = torch.tensor(choices)
    row_N = torch.tensor([0, 0, 1])
    return Seen(torch.arange(3), row_N, Routing(index_NK, torch.ones(3, 2), torch.full((3, 4), 0.25)))


def test_decisions_before_and_after_by_hand():
    before, after = seen([0, 1], [0, 1], [2, 3]), seen([0, 2], [-1, 0], [3, 2])
    found = difference([before], [after], (0, 0), 2, [4])
    assert found.overlap == (pytest.approx((1 / 3 + 1 / 2) / 2),)
    assert found.load_change == (pytest.approx((abs(2 / 4 - 2 / 3) + 2 / 4 + 1 / 3) / 2),)
    assert found.new_experts == ((2,),)
    other = difference([before], [after], (1, 1), 2, [4])
    assert (other.overlap, other.load_change, other.new_experts) == ((1.0,), (0.0,), ((),))
    moved = difference([before], [after], (0, 1), 2, [4])  # other positions: tokens are not the same
    assert moved.overlap == (None,)


def test_confidence_is_minus_the_mean_log_probability_of_the_chosen():
    index_NK = torch.tensor([[0, 1], [1, -1], [2, 3]])
    score_NE = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.5, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    layer_ = Seen(torch.arange(3), torch.tensor([0, 0, 1]), Routing(index_NK, torch.ones(3, 2), score_NE))
    first = ((math.log(2) + math.log(4)) / 2 + math.log(2)) / 2
    torch.testing.assert_close(confidence([layer_], 2), torch.tensor([[first], [math.log(4)]]))


@pytest.mark.parametrize("guard", [False, True])
def test_a_row_that_is_no_number_keeps_its_last_good_vectors_and_disturbs_no_other(guard):
    model, texts = model_of(), [text(), text(seed=1)]
    texts = [[token % 60 for token in tokens] for tokens in texts]
    config = Rewiring(guard=guard, scale_step=False)
    texts[1][3] = 60
    with torch.no_grad():
        model.embedding.weight[60] = torch.nan
    plain, _ = adapted(model, config, [texts[0]])
    delta, reports = adapted(model, config, texts)
    assert reports[0].skipped is None
    assert "not finite at step 1" in reports[1].skipped
    assert reports[1].steps == 0
    for all_BE, alone_BE in zip(delta, plain, strict=True):
        torch.testing.assert_close(all_BE[0], alone_BE[0], rtol=1e-3, atol=1e-5)
        assert not bool(all_BE[1].any())


def test_an_end_in_no_number_goes_back_to_the_last_that_was_good(monkeypatch):
    """The loss behind the last step is seen too."""
    model, calls = model_of(), []
    original = phase._Batch._losses

    def broken(self, candidates):
        calls.append(candidates)
        read = original(self, candidates)
        return replace(read, loss_CBL=read.loss_CBL * torch.nan) if len(calls) == 1 else read

    monkeypatch.setattr(phase._Batch, "_losses", broken)
    delta, [report] = adapted(model, PLAIN.replace(steps=3), [text()])
    before, _ = adapted(model, PLAIN.replace(steps=2), [text()])
    assert all(torch.equal(one, other) for one, other in zip(delta, before, strict=True))
    assert report.loss_after > 0


def test_a_loss_that_is_no_number_later_goes_back_to_where_it_was_one(monkeypatch):
    """At step 3: the vectors that step 2 looked at, which are those behind step 1."""
    model, calls = model_of(), []
    original = phase._Batch._gradient

    def broken(self, *args, **options):
        loss_B, gradient = original(self, *args, **options)
        calls.append(1)
        return (loss_B * torch.nan if len(calls) == 3 else loss_B), gradient

    before, _ = adapted(model, PLAIN.replace(steps=1), [text()])
    monkeypatch.setattr(phase._Batch, "_gradient", broken)
    delta, [report] = adapted(model, PLAIN, [text()])
    assert all(torch.equal(one, other) for one, other in zip(delta, before, strict=True))
    assert (report.steps, "not finite at step 3" in report.skipped) == (2, True)


def test_what_rounding_leaves_of_a_gradient_is_no_step():
    start = [torch.zeros(1, 4), torch.zeros(1, 4)]
    optimizer = Optimizer(Rewiring(), start, [False, False])
    gradient = [torch.tensor([[1e-3, 1e-9, 0.0, -1e-3]]), torch.tensor([[1e-9, -1e-9, 1e-5, 0.0]])]
    whole_B, rate_B = torch.ones(1, dtype=torch.bool), torch.tensor([0.05])
    first, second = optimizer.step(start, gradient, whole_B, rate_B, torch.ones(1, 2))
    torch.testing.assert_close(first, torch.tensor([[-0.05, 0.0, 0.0, 0.05]]), rtol=1e-3, atol=0)
    torch.testing.assert_close(second, torch.tensor([[0.0, 0.0, -0.05, 0.0]]), rtol=1e-2, atol=0)


def test_limits_of_steps_and_of_time():
    model = model_of()
    rerouter = Rerouter(model, PLAIN.replace(most_steps=7))
    state = rerouter.new_state()
    steps = [rerouter.adapt([text()], [state])[0] for _ in range(3)]
    assert [report.steps for report in steps] == [5, 2, 0]
    assert [report.skipped and "most_steps" in report.skipped for report in steps] == [None, True, True]
    assert state.steps == 7
    config, ticks = PLAIN.replace(most_seconds=2.5), iter(range(100))
    state = rerouter.new_state()
    reports = [phase.fit(model, rerouter.layers, config, [text()], [state], clock=lambda: next(ticks)) for _ in "ab"]
    assert reports[0][0].steps == 2  # at 1 and at 2 seconds there is time
    assert "most_seconds" in reports[0][0].skipped
    assert (reports[1][0].steps, reports[1][0].loss_before) == (0, None)


@pytest.mark.parametrize(
    ("length", "config", "reason"),
    [
        (1, Rewiring(guard=False), "a context of 1 token has nothing to predict"),
        (17, Rewiring(), "a context of 17 tokens is too short for the guard, which holds back 16"),
    ],
)
def test_contexts_that_are_too_short_are_left_alone_and_it_is_said(length, config, reason):
    delta, reports = adapted(model_of(), config, [text(length), text()])
    assert reason in reports[0].skipped
    assert reports[0].steps == 0
    assert not any(bool(delta_BE[0].any()) for delta_BE in delta)
    assert reports[1].skipped is None
    assert adapted(model_of(), config, [text(length + 1)])[1][0].skipped is None


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek_v2"])
def test_models_of_others_that_were_read(family, tmp_path):
    make_base(tmp_path, family)
    model, _ = load_model(tmp_path)
    delta, [report] = adapted(model.eval(), PLAIN.replace(optimizer="sgd", eta=1e-3), [text()])
    assert report.loss_after < report.loss_before
    assert all(bool(delta_BE.any()) for delta_BE in delta)


@pytest.mark.parametrize("family", ["Olmoe", "Mixtral", "Qwen2Moe"])
def test_folders_that_transformers_wrote(family, tmp_path):
    sizes = {"intermediate_size": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    sizes |= {"num_local_experts" if family == "Mixtral" else "num_experts": 4}
    build_theirs(family, **sizes).save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    rerouter = Rerouter(model.eval(), PLAIN.replace(optimizer="sgd", eta=1e-4))
    state = rerouter.new_state()
    [report] = rerouter.adapt([text()], [state])
    assert len(state.delta) == 3
    assert all(bool(delta_E.any()) for delta_E in state.delta)
    assert report.loss_after < report.loss_before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_sixteen_bits_have_vectors_of_float32(dtype):
    delta, [report] = adapted(model_of(dtype=dtype), Rewiring(), [text()])
    assert all(delta_BE.dtype == torch.float32 for delta_BE in delta)
    assert report.skipped is None
    assert report.tail_after <= report.tail_before


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="has no router that chooses experts"):
        Rerouter(Decoder.Config(**BODY).build())
    rerouter = Rerouter(model_of())
    state = rerouter.new_state()
    with pytest.raises(ConfigError, match="there are 2 contexts and 1 states"):
        rerouter.adapt([text(), text()], [state])
    with pytest.raises(ConfigError, match="two requests have one state"):
        rerouter.adapt([text(), text()], [state, state])
    with pytest.raises(ConfigError, match="prompt 0 has a token outside 0 to 60"):
        rerouter.adapt([[61]], [state])
    with pytest.raises(ConfigError, match="prompt 0 is empty"):
        rerouter.adapt([[]], [state])
    with pytest.raises(ConfigError, match=r"state 0 has vectors of shapes \[\(3,\)"):
        rerouter.adapt([text()], [Rerouter(model_of(layer(experts=3))).new_state()])
    assert rerouter.adapt([], []) == []
    for changes, message in (
        ({"interval": 0}, "interval is 0"),
        ({"r": 0.0}, "r is 0"),
        ({"r": 1.5}, "r is 1.5"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"tail": 1.0}, "tail is 1"),
        ({"window": 17}, "window is 17, of which the guard holds back 16"),
        ({"select": "some"}, "select is 'some'"),
        (
            {"choice": "soft"},
            r"choice is 'soft', and all layers are updated alike \(as it is with the guard\): give select=uncertain",
        ),
        ({"r": 0.25}, "r is 0.25, and all layers are updated alike"),
        (
            {"select": "all", "guard": False, "r": 0.25},
            r"r is 0.25, and all layers are updated alike \(as select says\)",
        ),
        ({"select": "decisive", "choice": "soft", "r": 0.25}, "r is 0.25, and choice=soft updates all layers"),
        ({"most_seconds": -1}, "most_seconds is -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            Rewiring(**changes)


def test_choices_without_a_weight_give_no_gradient_and_it_is_said():
    model = with_router(duo.decoder()).eval()
    with pytest.raises(ConfigError, match=r"is taken without a weight \(as Duo-LLM's modules are\)"):
        adapted(model, PLAIN, [list(range(20))])


def test_means_of_rows_leave_out_what_is_not_counted():
    loss_BL = torch.tensor([[1.0, torch.nan, 3.0], [torch.nan] * 3])
    counted_BL = torch.tensor([[True, False, True], [False] * 3])
    assert row_means(loss_BL, counted_BL).tolist() == [2.0, 0.0]
