"""LoRA-Mixer: layers and losses against the equations, adapters in, stages of training, mixtures out."""
# Shapes: N items, E experts

import copy
import math

import pytest
import torch

from adapter_models import ATTENTION, CONFIGS, TOKENS, linear_layers, logits, make_adapter, make_base
from anabranch.adapters import (
    Labelled,
    LowRankPool,
    MixedLowRank,
    MixtureTask,
    SoftThenTopK,
    SpecialisationLoss,
    fit_joint,
    fit_router,
    labelled_rows,
    load_mixture,
    load_peft,
    merge,
    mixture_report,
    rows_for,
    static_mixture,
    unload,
    write_peft,
)
from anabranch.adapters.lora_mixer import mixed_layers, preservation
from anabranch.errors import CheckpointError, ConfigError, DataError, InputError
from anabranch.lm import load_model, save_model
from anabranch.nn import BuildContext
from anabranch.nn.linear import Projection
from anabranch.routing import Router, RoutingContext, record_routing
from anabranch.train import Constant, TaskRunConfig, TrainConfig, Trainer, read_metrics

NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(base folder, adapter folders by name): of other ranks, scales and layers."""
    root = tmp_path_factory.mktemp("mixer")
    base = make_base(root / "base", "llama")
    layers = linear_layers(base, ATTENTION)
    make_adapter(root / "a", layers, seed="a")
    make_adapter(root / "b", layers, rank=7, seed="b", use_rslora=True)
    make_adapter(root / "c", linear_layers(base, ["q_proj", "v_proj"]), rank=2, lora_alpha=3, seed="c")
    make_adapter(root / "d", linear_layers(base, ["o_proj"]), rank=3, seed="d")
    return root / "base", {name: root / name for name in NAMES}


def opened(place):
    return load_model(place[0])[0].eval()


def mixed(place, names=NAMES, **options):
    """A mixture whose routers are decided."""
    model = load_mixture({name: place[1][name] for name in names}, opened(place), **options)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("router.score.weight"):
            parameter.data.normal_(std=0.4, generator=generator)
    return model.eval()


def run(model, state=None, token_BL=TOKENS):
    with torch.no_grad():
        return model(token_BL, state=state).logits_BLV


def hard(expert, rows=2, length=6, **options):
    return labelled_rows(torch.full((rows,), expert), length, **options)


# The loss


def observed(config, logit_NE, mask_N=None, training=True):
    """(losses, gradient of the logits), of a loss that sees softmax scores."""
    from anabranch.routing import TopK
    from anabranch.routing.balance import Observation

    logit_NE = logit_NE.clone().requires_grad_()
    routing = TopK.Config(top_k=logit_NE.shape[1]).build(logit_NE.shape[1])(logit_NE.softmax(-1))
    context = RoutingContext(training=training, item_mask_N=mask_N)
    config.build(logit_NE.shape[1])(Observation(logit_NE, routing), context)
    loss = context.mean_losses()["specialisation"]
    return float(loss.detach()), torch.autograd.grad(loss, logit_NE)[0]


def test_the_loss_by_hand():
    logit_NE = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = logit_NE.softmax(-1)
    count = torch.zeros(4, dtype=torch.float64)
    for row in p:
        for e in row.argsort(descending=True)[:2].tolist():
            count[e] += 1
    balance = float((p.mean(0) * count / count.sum()).sum())
    entropy = float(-(p * p.log()).sum(-1).mean())
    for fields, expected in (
        ({}, 0.7 * 4 * balance + 0.3 * entropy),
        ({"entropy": "maximise"}, 0.7 * 4 * balance - 0.3 * entropy),
        ({"scale_by_experts": False}, 0.7 * balance + 0.3 * entropy),
    ):
        config = SpecialisationLoss.Config(a=0.7, lam=0.3, top_k=2, **fields)
        assert observed(config, logit_NE)[0] == pytest.approx(expected)
    # Tokens of padding are in no mean.
    mask_N = torch.tensor([True, True, True, False, False])
    config = SpecialisationLoss.Config(a=0.7, lam=0.3, top_k=2)
    assert observed(config, logit_NE, mask_N)[0] == pytest.approx(observed(config, logit_NE[:3])[0])


@pytest.mark.parametrize("entropy", ["minimise", "maximise"])
def test_the_gradient_of_the_entropy_is_as_derived(entropy):
    """dH/dz_i = -p_i (ln p_i + H), over the number of tokens; the printed sign raises it."""
    logit_NE = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = logit_NE.softmax(-1)
    entropy_N1 = -(p * p.log()).sum(-1, keepdim=True)
    sign = 1 if entropy == "minimise" else -1
    _, gradient = observed(SpecialisationLoss.Config(a=0.0, lam=0.1, entropy=entropy), logit_NE)
    torch.testing.assert_close(gradient, sign * 0.1 * -p * (p.log() + entropy_N1) / 6)
    step = logit_NE - gradient
    after = -(step.softmax(-1) * step.log_softmax(-1)).sum(-1).mean()
    assert bool(after < entropy_N1.mean()) == (entropy == "minimise")


def test_the_ends_of_the_loss():
    config = SpecialisationLoss.Config(a=1.0, lam=0.0, top_k=4)
    assert observed(config, torch.zeros(8, 4, dtype=torch.float64))[0] == pytest.approx(1)
    config = SpecialisationLoss.Config(a=0.0, lam=1.0)
    assert observed(config, torch.zeros(8, 4, dtype=torch.float64))[0] == pytest.approx(math.log(4))
    # Each expert has two tokens to itself.
    one_hot = 1e3 * torch.eye(4, dtype=torch.float64).repeat(2, 1)
    config = SpecialisationLoss.Config(a=1.0, lam=1.0, top_k=1)
    assert observed(config, one_hot)[0] == pytest.approx(1)


def test_lambda_rises_over_the_first_third():
    loss = SpecialisationLoss.Config(lam=0.6, schedule="rising").build(4)
    found = []
    for step in (0, 1, 2, 3, 9):
        loss.on_step(step, step / 9)
        found.append(round(loss.lam, 6))
    assert found == [0, 0.2, 0.4, 0.6, 0.6]
    still = SpecialisationLoss.Config(lam=0.6).build(4)
    still.on_step(0, 0.0)
    assert still.lam == 0.6


def test_soft_in_training_and_the_best_afterwards():
    score_NE = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    select = SoftThenTopK.Config(top_k=2).build(4)
    soft, best = (select.of_pass(training)(score_NE) for training in (True, False))
    assert soft.index_NK.tolist() == [[0, 2, 1, 3]]
    assert soft.weight_NK.tolist() == [pytest.approx([0.5, 0.3, 0.1, 0.1])]
    assert best.index_NK.tolist() == [[0, 2]]
    assert best.weight_NK.tolist() == [pytest.approx([0.625, 0.375])]
    assert (SoftThenTopK.Config().kept(2), select.num_choices) == (2, None)


# The layer


def layer_of(in_dim=8, out_dim=5, ranks=(2, 3, 1, 2), dtype=torch.float64, **fields):
    generator = torch.Generator().manual_seed(0)
    config = MixedLowRank.Config(ranks=ranks, **fields)
    layer = config.build(Projection("blocks.0.attention.o", in_dim, out_dim), BuildContext(in_dim, generator=generator))
    with torch.no_grad():
        for number, rank in enumerate(ranks):
            layer.pool.b[number, :, :rank].normal_(generator=generator)
        layer.router.score.weight.normal_(generator=generator)
    return layer.to(dtype)


def every(layer, x):
    """[N, E, O], what each expert makes of each item."""
    scales = torch.tensor(layer.pool.scales, dtype=x.dtype)
    return torch.einsum("eor,erc,nc->neo", layer.pool.b, layer.pool.a, x) * scales[:, None]


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_sparse_is_dense_with_masked_weights(top_k):
    layer = layer_of(router=MixedLowRank.Config().router.replace(select=SoftThenTopK.Config(top_k=top_k)))
    x = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = (x @ layer.router.score.weight.T).softmax(-1)
    kept = torch.zeros_like(p).scatter(1, p.topk(top_k).indices, 1.0)
    weight = p * kept / (p * kept).sum(-1, keepdim=True)
    for backend in ("auto", "torch"):
        layer.pool.backend = backend
        found = layer(x, RoutingContext())
        torch.testing.assert_close(found, torch.einsum("ne,neo->no", weight, every(layer, x)), rtol=1e-6, atol=1e-6)
    # In training all experts, by the softmax.
    found = layer(x, RoutingContext(training=True))
    torch.testing.assert_close(found, torch.einsum("ne,neo->no", p, every(layer, x)), rtol=1e-6, atol=1e-6)


def test_labels_choose_one_expert_and_teach_no_other():
    layer = layer_of()
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expert_B = torch.tensor([2, -1])
    context = RoutingContext(training=True, sequence_length=3, state=labelled_rows(expert_B, 3))
    found = layer(x.view(2, 3, 8), context)
    torch.testing.assert_close(found[0], every(layer, x)[:3, 2], rtol=1e-6, atol=1e-6)
    assert not found[1].any()
    found.sum().backward()
    for expert in (0, 1, 3):
        assert not layer.pool.a.grad[expert].any()
        assert not layer.pool.b.grad[expert].any()
    assert layer.pool.a.grad[2].any()
    assert layer.router.score.weight.grad is None
    assert context.mean_losses() == {}


@pytest.mark.parametrize("soft", [0.25, 1.0])
def test_annealed_between_labels_and_router(soft):
    layer = layer_of()
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expert_B = torch.tensor([2, -1])
    state = labelled_rows(expert_B, 3, soft=soft)
    found = layer(x.view(2, 3, 8), RoutingContext(training=True, sequence_length=3, state=state))
    p = (x @ layer.router.score.weight.T).softmax(-1)
    weight = p.clone()
    weight[:3] *= soft
    weight[:3, 2] += 1 - soft
    torch.testing.assert_close(
        found.view(6, 5), torch.einsum("ne,neo->no", weight, every(layer, x)), rtol=1e-6, atol=1e-6
    )
    # Measured, the router decides.
    measured = layer(x.view(2, 3, 8), RoutingContext(sequence_length=3, state=state))
    torch.testing.assert_close(measured, layer(x.view(2, 3, 8), RoutingContext()))


@pytest.mark.parametrize("soft", [0.0, 0.5, 1.0])
def test_alignment_is_the_cross_entropy_of_mean_scores(soft):
    layer = layer_of()
    x = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask_BL = torch.tensor([[False, True, True, True], [True] * 4, [True] * 4])
    state = labelled_rows(torch.tensor([2, 0, -1]), 4, soft=soft, alignment=0.1)
    context = RoutingContext(training=True, sequence_length=4, item_mask_N=mask_BL.flatten(), state=state)
    layer(x, context)
    p = (x @ layer.router.score.weight.T).softmax(-1)
    expected = -0.1 * (p[0, 1:].mean(0)[2].log() + p[1].mean(0)[0].log()) / 2
    found = context.mean_losses()["task_alignment"]
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(found, layer.router.score.weight)[0].any()


def test_experts_that_a_matrix_lacks_are_not_chosen():
    layer = layer_of(closed=(1, 3))
    x = torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = (x @ layer.router.score.weight.T)[:, [0, 2]].softmax(-1)
    expected = torch.einsum("ne,neo->no", p, every(layer, x)[:, [0, 2]])
    torch.testing.assert_close(layer(x, RoutingContext()), expected)
    torch.testing.assert_close(layer(x, RoutingContext(training=True)), expected)
    context = RoutingContext(sequence_length=9, state=labelled_rows(torch.tensor([1]), 9))
    assert not layer(x.unsqueeze(0), context).any()


def test_preservation_is_what_experts_moved():
    layer = layer_of(preserved=True)
    layer.keep()
    assert float(preservation(layer, 2.0).detach()) == 0
    with torch.no_grad():
        layer.pool.a[1, 0, 0] += 3
        layer.pool.b[2, 0, 0] += 1
    assert float(preservation(layer, 2.0).detach()) == pytest.approx(20)
    assert float(preservation(layer, 2.0, torch.tensor([False, False, True, False])).detach()) == pytest.approx(2)
    with pytest.raises(ConfigError, match="keeps nothing of its experts; build it with preserved=True"):
        preservation(layer_of())
    with pytest.raises(ConfigError, match="has no mixed layers"):
        preservation(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: labelled_rows(torch.zeros(2, 2, dtype=torch.int64), 3), InputError, r"labels have shape \[2, 2\]"),
        (lambda: labelled_rows(torch.zeros(2), 3), InputError, r"must be int64 \[rows\]"),
        (
            lambda: labelled_rows(torch.zeros(2, dtype=torch.int64), 3, soft=1.5),
            ConfigError,
            "soft is 1.5; it must be 0 to 1",
        ),
        (lambda: labelled_rows(torch.zeros(2, dtype=torch.int64), 3, alignment=-1), ConfigError, "alignment is -1"),
        (lambda: MixedLowRank.Config(ranks=(1, 2), closed=(2,)), ConfigError, "closed has 2, but experts are 0 to 1"),
        (lambda: MixedLowRank.Config(ranks=(1, 2), closed=(0, 1)), ConfigError, "closed has all 2 experts"),
        (lambda: SpecialisationLoss.Config(a=-1.0), ConfigError, "a"),
        (lambda: SpecialisationLoss.Config(entropy="none"), ConfigError, "entropy"),
        (
            lambda: layer_of()(torch.zeros(2, 3, 8).double(), RoutingContext(state=hard(4, 2, 3))),
            InputError,
            "label 4 names no expert; there are 0 to 3",
        ),
        (
            lambda: layer_of()(torch.zeros(2, 3, 8).double(), RoutingContext(state=hard(1, 2, 2))),
            InputError,
            "given for 4 tokens of a pass of 6",
        ),
    ],
)
def test_what_cannot_be(make, error, message):
    with pytest.raises(error, match=message):
        make()


# A model of ours


def test_a_mixture_of_adapters_of_any_make(place):
    model = mixed(place)
    layers = mixed_layers(model)
    assert sorted({name.split(".")[-1] for name in layers}) == ["k", "o", "q", "v"]
    # One router for q, k and v, and one for o.
    assert len([module for module in model.modules() if isinstance(module, Router)]) == 4
    closed = {name.split(".")[-1]: layer.config.closed for name, layer in layers.items()}
    assert closed == {"q": (3,), "k": (3,), "v": (3,), "o": (2,)}
    assert {layer.pool.ranks for layer in layers.values()} == {(4, 7, 2, 1), (4, 7, 1, 1), (4, 7, 1, 3)}
    assert model.config.count().parameters == sum(parameter.numel() for parameter in model.parameters())
    assert not any(layer.pool.a.requires_grad for layer in layers.values())


def test_a_router_counts_once_for_all_that_share_it():
    """In parameters, in those that a token uses, and in operations: 3 routers less in each of two blocks of 4 matrices."""
    own = CONFIGS["llama"]()
    counts = []
    for group in (None, "all"):
        config = MixedLowRank.Config(ranks=(2,) * 5, router_group=group)
        linears = {f"*.attention.{part}": config for part in "qkv"}
        counts.append(own.replace(linears=linears).count())
    alone, shared = counts
    router = own.dim * 5
    assert alone.parameters - shared.parameters == 2 * 2 * router
    assert alone.active - shared.active == 2 * 2 * router
    assert alone.flops - shared.flops == 2 * 2 * 2 * router


def test_hard_rows_are_their_expert_alone(place):
    model = mixed(place)
    for number, name in enumerate(NAMES):
        alone = logits(load_peft(place[1][name], opened(place)))
        torch.testing.assert_close(run(model, hard(number)), alone, rtol=1e-5, atol=1e-5)
    # And rows may be told by name still.
    told = run(model, rows_for(model, ["b", None], 6))
    torch.testing.assert_close(told[0], logits(load_peft(place[1]["b"], opened(place)))[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(told[1], logits(opened(place))[1])


def test_with_all_b_zero_it_is_the_base_to_the_bit(place):
    model = mixed(place)
    for layer in mixed_layers(model).values():
        layer.pool.b.data.zero_()
    assert torch.equal(logits(model), logits(opened(place)))


def test_what_one_matrix_of_a_group_lacks_is_zero_there_and_takes_nothing_from_the_others(place):
    """c adapts q and v, which have one router with k."""
    layers = mixed_layers(mixed(place))
    q, k = (layers[f"blocks.0.attention.{part}"] for part in "qk")
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    routing = k.route(x, RoutingContext())
    weight_NE = torch.zeros(7, 4).scatter(1, routing.index_NK, routing.weight_NK)
    torch.testing.assert_close(weight_NE.sum(1), torch.ones(7))
    assert (weight_NE[:, 2] > 0).any()
    for layer, own in ((q, [0, 1, 2]), (k, [0, 1])):
        wanted = sum(weight_NE[:, e : e + 1] * (x @ layer.pool.pair(e).delta().T) for e in own)
        torch.testing.assert_close(layer(x, RoutingContext()), wanted, rtol=1e-5, atol=1e-5)
    assert (q.lacking, k.lacking) == ((3,), (2, 3))


def test_a_group_decides_once_and_as_each_would(place):
    model, apart = mixed(place), mixed(place, groups={})
    calls = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda router, given, routing: calls.append(router))
    logits(model)
    assert len(calls) == len(set(calls)) == 4
    ours, theirs = mixed_layers(model), mixed_layers(apart)
    for name, layer in theirs.items():
        layer.router.score.weight.data.copy_(ours[name].router.score.weight)
        # Alone, a layer closes what it lacks itself.
        layer.router.candidates = ours[name].router.candidates
    torch.testing.assert_close(logits(model), logits(apart), rtol=1e-5, atol=1e-5)
    # Nothing is held beyond a pass.
    context = model.context(TOKENS)
    model.hidden(TOKENS, context)
    assert not [name for name in context.carry if name.startswith("lora_mixer")]


def test_recomputed_it_is_the_same(place):
    model = mixed(place).train()
    state = labelled_rows(torch.tensor([0, 1]), 6, soft=0.5, alignment=0.2)
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        for layer in mixed_layers(model).values():
            layer.router.requires_grad_(True)
        model.zero_grad()
        output = model(TOKENS, TOKENS.roll(-1, 1), state=dict(state))
        output.loss.backward()
        grads = [layer.router.score.weight.grad.clone() for layer in mixed_layers(model).values()]
        found.append((output, grads))
    (plain, plain_grads), (again, again_grads) = found
    assert plain.auxiliary.keys() == {"specialisation", "task_alignment"}
    for name in plain.auxiliary:
        torch.testing.assert_close(again.auxiliary[name], plain.auxiliary[name])
    for one, other in zip(again_grads, plain_grads, strict=True):
        torch.testing.assert_close(one, other)


def test_it_decodes_records_and_is_saved(place, tmp_path):
    model = mixed(place)
    whole = logits(model)
    cache = model.new_cache(6)
    with torch.no_grad():
        parts = [model(TOKENS[:, i : i + 2], cache=cache).logits_BLV for i in range(0, 6, 2)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    with record_routing(model) as recorder:
        logits(model)
    assert [layer.top_k for layer in recorder.trace().layers] == [3] * 4
    save_model(tmp_path / "saved", model)
    assert torch.equal(logits(load_model(tmp_path / "saved")[0]), whole)
    assert torch.equal(logits(copy.deepcopy(model)), whole)
    assert torch.equal(logits(unload(model)), logits(opened(place)))


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a"], {}, "a router needs at least 2 experts to choose from, and there are 1"),
        (["a", "b"], {"top_k": 3}, "top_k is 3, but there are 2 experts; use 1 to 2"),
    ],
)
def test_mixtures_that_cannot_be(place, names, options, message):
    model = opened(place)
    with pytest.raises(ConfigError, match=message):
        load_mixture({name: place[1][name] for name in names}, model, **options)
    assert torch.equal(logits(model), logits(opened(place)))


def test_adapters_of_other_models(place, tmp_path):
    make_adapter(tmp_path / "wide", {"model.layers.0.self_attn.q_proj": (48, 32)}, layers_to_transform=[0])
    with pytest.raises(
        CheckpointError, match=r"wide adapts model\.layers\.0\.self_attn\.q_proj with 48 inputs and 32 outputs"
    ):
        load_mixture({"a": place[1]["a"], "w": tmp_path / "wide"}, opened(place))
    base = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.self_attn.q_proj": (32, 32)}
    make_adapter(tmp_path / "other", base, base_model_name_or_path="another/model")
    with pytest.warns(
        UserWarning, match=r"different things of base_model_name_or_path \(a: 'base', o: 'another/model'\)"
    ):
        load_mixture({"a": place[1]["a"], "o": tmp_path / "other"}, opened(place))


def test_routed_experts_are_not_merged(place):
    with pytest.raises(ConfigError, match=r"which experts a token has depends on the token"):
        merge(mixed(place))


def test_a_mixture_that_all_tokens_have_is_one_adapter(place, tmp_path):
    """Weights of experts, exactly, as a plain LoRA: against rows that are told the same mixture."""
    model = mixed(place)
    weights = (0.5, -0.25, 0.125, 2.0)
    write_peft(tmp_path / "mixture", static_mixture(model, weights))
    found = logits(load_peft(tmp_path / "mixture", opened(place)))
    told = rows_for(model, [dict(zip(NAMES, weights, strict=True))] * 2, 6)
    torch.testing.assert_close(found, run(model, told), rtol=1e-5, atol=1e-5)
    report = mixture_report(model, [(TOKENS, None, torch.tensor([0, 1]))])
    by_layer = report.weights_of(1)
    assert by_layer.keys() == mixed_layers(model).keys()
    made = static_mixture(model, by_layer, at_most=1)
    assert {pair.rank for pair in made.pairs.values()} <= {2, 3, 4, 7}
    for wrong, message in (
        ((1.0, 2.0), r"weights of blocks\.0\.attention\.q are \[1.0, 2.0\]; they must be 4 finite numbers"),
        ((0.0,) * 4, "all weights are 0"),
        ({}, r"there are no weights for blocks\.0\.attention\.q"),
    ):
        with pytest.raises(ConfigError, match=message):
            static_mixture(model, wrong)
    with pytest.raises(InputError, match="task 7 has no tokens in the report; there are 0, 1"):
        report.weights_of(7)


def test_information_of_the_task():
    """A router that sends two tasks to an expert each knows ln 2 nats of the task; one that sends all alike knows nothing."""
    from anabranch.adapters.mixture_report import _information

    apart = [(3.0, torch.tensor([3.0, 0.0])), (3.0, torch.tensor([0.0, 3.0]))]
    assert _information(apart) == pytest.approx(math.log(2))
    assert _information([(3.0, torch.tensor([1.5, 1.5]))] * 2) == pytest.approx(0)
    assert _information([]) is None


# Training


def rows_of(number=16, seed=0, experts=2):
    """Rows of two tasks: after an even token comes one number, after an odd one another; the first token tells the task."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(number):
        task = row % experts
        prompt = [50 + task, *torch.randint(0, 40, (3,), generator=generator).tolist()]
        made.append((prompt, [42 + task, 44 + task], "ab"[task]))
    return Labelled.of(made, ("a", "b"))


def test_rows_are_padded_on_the_left():
    rows = Labelled.of([([1, 2], [3], "x"), ([4], [5, 6, 7], None)], ("w", "x"), pad=9)
    assert rows.token_NL.tolist() == [[9, 1, 2], [4, 5, 6]]
    assert rows.target_NL.tolist() == [[-100, -100, 3], [5, 6, 7]]
    assert rows.mask_NL.tolist() == [[False, True, True], [True] * 3]
    assert rows.expert_N.tolist() == [1, -1]
    assert [tuple(part.shape for part in batch) for batch in rows.batches(1)] == [((1, 3), (1, 3), (1,))] * 2


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([([1], [2], "z")], InputError, "row 0 is of task 'z', which has no expert; there are 'a', 'b'"),
        ([([1], [], "a")], DataError, "row 0 has 1 tokens and an answer of 0; nothing can be learned"),
        ([], DataError, "there are no rows"),
    ],
)
def test_rows_that_cannot_be(given, error, message):
    with pytest.raises(error, match=message):
        Labelled.of(given, ("a", "b"))


def settings(**changes):
    usual = {
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 0.05,
        "log_every": 1,
        "eval_every": None,
        "device": "cpu",
        "schedule": Constant.Config(),
    }
    return TrainConfig(**{**usual, **changes})


def test_a_router_learns_and_experts_stay_to_the_bit(place, tmp_path):
    model = mixed(place, "ab")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = fit_router(model, rows_of(), tmp_path / "run", train=settings(steps=12), held_out=rows_of(8, seed=9))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".router." in name for name in changed)
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert lines[-1]["cross_entropy"] < lines[0]["cross_entropy"]
    assert lines[0]["auxiliary"].keys() == {"specialisation"}
    (facts, *_) = fitted.report.routers
    assert facts.information >= 0
    assert set(facts.by_task) == {0, 1}
    measured = [line for line in read_metrics(tmp_path / "run") if line["kind"] != "train"][-1]
    assert 0 <= measured["accuracy"] <= 1
    assert measured["task_information"] >= 0


def test_parts_of_a_batch_weigh_what_they_have(place, tmp_path):
    """Answers, rows and labels differ from part to part; what is learned is that of the batch. The balance is no mean, and left out."""
    rows = [([50, *range(number)], [42, 44][: 1 + number % 2], ("a", None, "b")[number % 3]) for number in range(8)]
    found = []
    for parts in (1, 4):
        model = mixed(place, "ab", loss=SpecialisationLoss.Config(a=0.0, lam=0.5))
        task = MixtureTask.Config(stages="soft", alignment=0.3)
        run = TaskRunConfig(task=task, train=settings(batch_size=8, accumulation=parts))
        trainer = Trainer(run, tmp_path / str(parts), model=model, data=Labelled.of(rows, ("a", "b")))
        gradient = trainer._stepper.gradient(trainer.stream, trainer._context)
        slopes = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        trainer.close()
        assert gradient.terms.keys() == {"cross_entropy", "specialisation", "task_alignment"}
        found.append((gradient.total, gradient.terms, gradient.metrics, slopes))
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=1e-6)


def test_a_stopped_training_goes_on_to_the_bit(place, tmp_path):
    states = []
    for name, parts in (("whole", [6]), ("parts", [3, 6])):
        for number, steps in enumerate(parts):
            model = mixed(place, "ab", preserved=True)
            fit_joint(
                model,
                rows_of(),
                tmp_path / name,
                train=settings(steps=steps),
                stages="hard",
                alignment=0.1,
                resume=number > 0,
            )
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_experts_that_lie_turned_in_memory_learn_without_gradients(place, tmp_path):
    """Theirs is B as products want it, and MeZO goes along memory."""
    model = mixed(place, "ab")
    before = [layer.pool.b.detach().clone() for layer in mixed_layers(model).values()]
    assert not any(layer.pool.b.is_contiguous() for layer in mixed_layers(model).values())
    train = settings(steps=2, optimizer="mezo", weight_decay=0.0)
    fit_joint(model, rows_of(), tmp_path / "run", train=train, stages="hard", alignment=0.0)
    after = [layer.pool.b.detach() for layer in mixed_layers(model).values()]
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("experts", ["frozen", "preserved", "free"])
def test_stages_of_a_joint_training(place, tmp_path, experts, monkeypatch):
    """Hard, experts learn, and the router by alignment alone; soft, the router does, and experts as they are told."""
    model = mixed(place, "ab", preserved=experts == "preserved")
    seen, step_of = [], MixtureTask.step

    def watched(self, called, batch, context):
        losses = step_of(self, called, batch, context)
        pools = [layer.pool.a.detach().clone() for layer in self.layers.values()]
        routers = [layer.router.score.weight.detach().clone() for layer in self.layers.values()]
        seen.append((pools, routers, set(losses.terms)))
        return losses

    monkeypatch.setattr(MixtureTask, "step", watched)
    fit_joint(model, rows_of(), tmp_path / "run", train=settings(steps=6), experts=experts)
    pools = [layer.pool.a.detach() for layer in mixed_layers(model).values()]

    def moved(one, other):
        return any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))

    assert moved(seen[0][0], seen[3][0])
    assert moved(seen[3][0], pools) == (experts != "frozen")
    assert moved(seen[3][1], seen[5][1])
    assert seen[0][2] == {"cross_entropy", "task_alignment"}
    kept = {"preservation"} if experts == "preserved" else set()
    assert seen[5][2] == {"cross_entropy", "task_alignment", "specialisation"} | kept
    if experts == "preserved":
        lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
        assert lines[3]["auxiliary"]["preservation"] == 0
        assert lines[5]["auxiliary"]["preservation"] > 0


def test_the_share_of_the_router():
    shares = {
        stages: [round(MixtureTask.Config(stages=stages).soft_at(step / 12), 3) for step in (0, 3, 5, 6, 8, 11)]
        for stages in ("soft", "hard", "hard_soft", "anneal")
    }
    assert shares == {
        "soft": [1] * 6,
        "hard": [0] * 6,
        "hard_soft": [0, 0, 0, 1, 1, 1],
        "anneal": [0, 0, 0.25, 0.5, 1, 1],
    }
    assert [MixtureTask.Config(stages=name).c_t for name in ("soft", "anneal")] == [0, 0.1]
    assert MixtureTask.Config(alignment=0.3).c_t == 0.3


def test_hard_rows_teach_their_own_expert_alone(place, tmp_path):
    model = mixed(place, "ab")
    rows = rows_of(8)
    only_a = Labelled(*(tensor[::2] for tensor in rows.tensors))
    before = [layer.pool.a.clone() for layer in mixed_layers(model).values()]
    fit_joint(model, only_a, tmp_path / "run", train=settings(weight_decay=0.0), stages="hard", alignment=0.0)
    for old, layer in zip(before, mixed_layers(model).values(), strict=True):
        assert not torch.equal(layer.pool.a[0], old[0])
        assert torch.equal(layer.pool.a[1], old[1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda model, rows: MixtureTask.Config().build(model=torch.nn.Linear(2, 2), data=rows),
            ConfigError,
            "no mixed layers",
        ),
        (
            lambda model, rows: MixtureTask.Config(experts="preserved").build(model=model, data=rows),
            ConfigError,
            r"experts is 'preserved', and the model keeps nothing of them",
        ),
        (
            lambda model, rows: MixtureTask.Config().build(
                model=model, data=Labelled(*rows.tensors[:2], rows.expert_N + 2, rows.mask_NL)
            ),
            InputError,
            "label 3 names no expert; there are 0 to 1",
        ),
        (
            lambda model, rows: MixtureTask.Config(stages="hard").build(
                model=model, data=Labelled(*rows.tensors[:2], rows.expert_N - 1, rows.mask_NL)
            ),
            InputError,
            "row 0 has no label, by which stage 'hard' chooses",
        ),
    ],
)
def test_trainings_that_cannot_be(place, make, error, message):
    with pytest.raises(error, match=message):
        make(mixed(place, "ab"), rows_of())


def test_a_run_of_it_reads_back(place, tmp_path):
    from anabranch.train import read_task_run_config

    config = TaskRunConfig(task=MixtureTask.Config(stages="anneal"), train=settings(steps=1))
    model = mixed(place, "ab")
    Trainer(config, tmp_path / "run", model=model, data=rows_of()).fit()
    assert read_task_run_config(tmp_path / "run") == config
    assert isinstance(load_model(tmp_path / "run")[0].blocks[0].attention.out.beside["o"].pool, LowRankPool)
