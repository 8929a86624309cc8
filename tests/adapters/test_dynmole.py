"""DynMoLE: a layer against its equations, sparse against dense, losses under accumulation and recompute, whole trainings."""
# Shapes: N items, E experts, C inputs, O outputs

import math

import pytest
import torch

from adapter_models import CONFIGS, TOKENS, make_base
from anabranch.adapters import (
    DynMoLE,
    RoutedLowRank,
    load_peft,
    lora_moe,
    merge,
    mixture_report,
    mola,
    mu,
    read_peft,
    write_peft,
)
from anabranch.adapters.mixture_report import _Sums, routed_layers
from anabranch.adapters.put_on import put_on
from anabranch.config import from_dict, to_dict
from anabranch.data import DataConfig, Files
from anabranch.errors import ConfigError
from anabranch.lm import Decoder, load_model, save_model
from anabranch.nn import BuildContext, SelfAttention, SwiGLU
from anabranch.nn.linear import Projection
from anabranch.routing import HybridEntropy, Routing, RoutingContext, SoftLoss, TopK, UncertaintyLoss, uncertainty
from anabranch.train import Constant, RunConfig, TrainConfig, Trainer, read_metrics

SMALL = DynMoLE(num_experts=4, rank=3, alpha=6.0, dropout=0.0)


def layer_of(config, in_dim=10, out_dim=7, seed=0):
    """A layer whose B is drawn too, and whose router is far from even."""
    generator = torch.Generator().manual_seed(seed)
    layer = config.build(
        Projection("blocks.0.feed_forward.up", in_dim, out_dim), BuildContext(in_dim, generator=generator)
    )
    with torch.no_grad():
        layer.pool.b.normal_(generator=generator)
        layer.router.score.weight.mul_(4)
    return layer


def inputs(num_items=40, in_dim=10, seed=1):
    return torch.randn(num_items, in_dim, generator=torch.Generator().manual_seed(seed))


def drawn(model, seed=3):
    """With every expert's B drawn, as if it had learned."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("pool.b"):
            parameter.data.normal_(std=0.2, generator=generator)
        if name.endswith("router.score.weight"):
            parameter.data.normal_(std=0.5, generator=generator)
    return model


# The layer


def test_a_layer_is_its_equations():
    layer = layer_of(SMALL.layer(4))
    x = inputs() * torch.linspace(0.05, 1, 40)[:, None]
    p = (x @ layer.router.score.weight.T).softmax(-1).detach()
    entropy = uncertainty(p)
    expected = torch.zeros(len(x), 7)
    for n in range(len(x)):
        order, through = p[n].argsort(descending=True).tolist(), 0.0
        for rank, e in enumerate(order):
            through += float(p[n, e])
            if through <= 0.75 or rank < 2 or entropy[n] > 0.9:
                expected[n] += p[n, e] * (6.0 / 3) * (layer.pool.b[e] @ (layer.pool.a[e] @ x[n])).detach()
    assert 0 < int((entropy > 0.9).sum()) < len(x)
    torch.testing.assert_close(layer(x, RoutingContext()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_experts", [2, 8, 32])
@pytest.mark.parametrize("backend", ["auto", "torch", "grouped_mm"])
def test_sparse_is_dense_with_masked_weights(num_experts, backend):
    layer = layer_of(SMALL.replace(num_experts=num_experts, rank=4).layer(num_experts), 16, 24)
    layer.pool.backend = backend
    x = inputs(60, 16)
    routing = layer.router(x, RoutingContext())
    weight = torch.zeros(60, num_experts).scatter_add(1, routing.index_NK.clamp_min(0), routing.weight_NK)
    every = torch.einsum("eor,erc,nc->neo", layer.pool.b, layer.pool.a, x)
    torch.testing.assert_close(
        layer(x, RoutingContext()), torch.einsum("ne,neo->no", weight, every) * 1.5, rtol=1e-5, atol=1e-5
    )


def test_what_sparse_tokens_do_not_use_learns_nothing():
    layer = layer_of(SMALL.replace(entropy_threshold=1.0, top_p=1e-6, keep_top_k=1).layer(4))
    x = inputs(3)
    chosen = set(layer.router(x, RoutingContext()).index_NK.flatten().tolist()) - {-1}
    layer(x, RoutingContext()).sum().backward()
    for expert in set(range(4)) - chosen:
        assert not layer.pool.a.grad[expert].any()
        assert not layer.pool.b.grad[expert].any()
    assert chosen
    assert layer.router.score.weight.grad.any()


def test_dropout_is_before_the_experts_and_not_before_the_router():
    layer = layer_of(SMALL.replace(dropout=0.5).layer(4)).train()
    x = inputs()
    routings = []
    layer.router.register_forward_hook(lambda module, given, routing: routings.append(routing))
    torch.manual_seed(0)
    first = layer(x, RoutingContext())
    second = layer(x, RoutingContext())
    assert not torch.allclose(first, second)
    assert torch.equal(routings[0].score_NE, routings[1].score_NE)
    layer.eval()
    assert torch.equal(layer(x, RoutingContext()), layer(x, RoutingContext()))


def test_scores_that_are_not_numbers_are_told_by_name():
    from anabranch.errors import NotFiniteError

    layer = layer_of(SMALL.layer(4))
    with pytest.raises(NotFiniteError, match=r"blocks\.0\.feed_forward\.up has NaN scores"):
        layer(torch.full((2, 10), torch.nan), RoutingContext())


# The config


def test_defaults_are_the_papers():
    config = DynMoLE()
    layer = config.layer(6)
    assert layer.ranks == (24,) * 6
    assert layer.alphas == (48.0,) * 6
    assert layer.dropout == 0.05
    select, (balance, entropy) = layer.router.select, layer.router.balance
    assert (select.top_p, select.keep_top_k, select.entropy_threshold) == (0.75, 2, 0.9)
    assert (select.entropy, select.entropy_index, select.nucleus, select.normalize) == (
        "tsallis",
        1.1,
        "exclusive",
        "none",
    )
    assert (balance, entropy) == (SoftLoss.Config(alpha=1e-3), UncertaintyLoss.Config(coefficient=1e-2))
    assert layer.router.score.init == "kaiming_uniform"
    assert not getattr(layer.router.score, "bias", False)
    assert list(config.linears(3)) == [f"blocks.*.feed_forward.{part}" for part in ("gate", "up", "down")]
    assert from_dict(DynMoLE, to_dict(config)) == config


def test_baselines():
    assert mola().select(6) == TopK.Config(top_k=2, normalize="sum")
    assert lora_moe().select(6) == TopK.Config(top_k=6)
    assert mola().router(6).balance == lora_moe().router(6).balance == ()
    by_mass = DynMoLE(policy="top_p").select(6)
    assert isinstance(by_mass, HybridEntropy.Config)
    assert (by_mass.keep_top_k, by_mass.entropy_threshold) == (1, 1.0)


def test_more_experts_in_higher_layers():
    config = SMALL.replace(experts_per_layer=(2, 3)).on(CONFIGS["llama"]())
    model = config.build()
    found = [module.pool.num_experts for module in model.modules() if isinstance(module, RoutedLowRank)]
    assert found == [2, 2, 2, 3, 3, 3]
    model.train()(TOKENS, TOKENS.roll(-1, 1)).loss.backward()
    with pytest.raises(ConfigError, match="experts_per_layer has 3 values for 2 blocks; give one for each"):
        SMALL.replace(experts_per_layer=(2, 3, 2)).on(CONFIGS["llama"]())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entropy_index": 0.0}, "entropy_index"),
        ({"entropy_threshold": -1.0}, "entropy_threshold"),
        ({"top_p": 1.5}, "top_p"),
        ({"keep_top_k": 7}, "keep_top_k is 7, but there are 6 destinations"),
        ({"num_experts": 0}, "num_experts"),
        ({"experts_per_layer": (2, 0)}, "experts_per_layer has 0; each must be at least 1"),
        ({"entropy_loss": -0.1}, "entropy_loss"),
        ({"balance_loss": -0.1}, "balance_loss"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": ()}, "targets"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        DynMoLE(**fields)


# In a model


def test_a_model_counts_records_saves_and_decodes(tmp_path):
    model = drawn(SMALL.on(CONFIGS["llama"]()).build()).eval()
    assert model.config.count().parameters == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        whole = model(TOKENS).logits_BLV
        cache = model.new_cache(6)
        parts = [model(TOKENS[:, i : i + 3], cache=cache).logits_BLV for i in (0, 3)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
        save_model(tmp_path / "saved", model)
        assert torch.equal(load_model(tmp_path / "saved")[0].eval()(TOKENS).logits_BLV, whole)


def test_a_report():
    model = drawn(SMALL.on(CONFIGS["llama"]()).build())
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[0, :2] = False
    report = mixture_report(model, [(TOKENS, mask, None)])
    assert len(report.routers) == 6
    for facts in report.routers:
        assert facts.tokens == 10
        assert 2 <= facts.active <= 4
        assert 0 <= facts.entropy <= 1
        assert sum(facts.load) == pytest.approx(1)
        assert sum(facts.weight) == pytest.approx(1 - facts.dropped)
        assert facts.information is None
    assert "blocks.0.feed_forward.gate: " in str(report)
    assert report.mean("active") == pytest.approx(sum(facts.active for facts in report.routers) / 6)
    assert report.to_dict()["routers"][0]["layers"] == ("blocks.0.feed_forward.gate",)
    assert model.training


def test_a_router_that_knows_no_threshold_is_undecided_above_nine_tenths():
    """Shannon's entropy over log E: of (0.5, 0.5, 0, 0) it is 0.5, and of four that are nearly alike it is nearly 1."""
    model = put_on(CONFIGS["llama"]().build(), {"*.feed_forward.down": mola(4).layer(4)}, seed=0)
    layer = next(iter(routed_layers(model).values()))
    logits = torch.tensor([[0.0, 0.0, -99, -99], [0, 0.1, 0, 0], [0, 0, 0, -1.5], [0, 0, 0, -9], [9, 0, 0, 0]])
    share = logits.softmax(-1)
    entropy = -(share * share.clamp_min(1e-30).log()).sum(-1) / math.log(4)
    assert (entropy > 0.9).tolist() == [False, True, True, False, False]
    assert (entropy > 0.7).tolist() == [False, True, True, True, False]
    sums = _Sums(layer.router)
    sums.add(Routing(torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), share), torch.full((5,), -1))
    assert sums.facts(("x",)).undecided == pytest.approx(2 / 5)
    assert sums.facts(("x",)).entropy == pytest.approx(float(entropy.mean()), rel=1e-5)


def losses_of(model, recompute=False):
    model.recompute = recompute
    model.zero_grad()
    output = model.train()(TOKENS, TOKENS.roll(-1, 1))
    output.loss.backward()
    return output, {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_recomputed_layers_are_counted_once():
    model = drawn(SMALL.on(CONFIGS["llama"]()).build())
    (plain, plain_grad), (again, again_grad) = losses_of(model), losses_of(model, recompute=True)
    assert plain.auxiliary.keys() == {"soft_balancing", "uncertainty"}
    for name, loss in plain.auxiliary.items():
        torch.testing.assert_close(again.auxiliary[name], loss)
    torch.testing.assert_close(again.loss, plain.loss)
    for name, gradient in plain_grad.items():
        torch.testing.assert_close(again_grad[name], gradient, msg=name)


def test_the_loss_of_a_model_is_that_of_all_its_tokens():
    model = drawn(SMALL.on(CONFIGS["llama"]()).build())
    seen = []
    hooks = [
        layer.router.register_forward_hook(lambda module, given, routing: seen.append(routing))
        for layer in model.modules()
        if isinstance(layer, RoutedLowRank)
    ]
    output = model.train()(TOKENS, TOKENS.roll(-1, 1))
    for hook in hooks:
        hook.remove()
    score = torch.cat([each.score_NE for each in seen])
    weight = torch.cat(
        [torch.zeros_like(each.score_NE).scatter_add(1, each.index_NK.clamp_min(0), each.weight_NK) for each in seen]
    )
    torch.testing.assert_close(output.auxiliary["uncertainty"], 1e-2 * uncertainty(score).mean().detach())
    balance = 1e-3 * 4 * (weight.mean(0) * score.mean(0)).sum()
    torch.testing.assert_close(output.auxiliary["soft_balancing"], balance.detach())


# Trained


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("one and two, two and three; " * 400)
    return file


def run_of(text, **train):
    model = Decoder.Config(
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=24),
        linears=SMALL.replace(balance_loss=0.0, entropy_loss=0.5).linears(2),
    )
    usual = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "eval_tokens": 64, "device": "cpu"}
    data = DataConfig(corpus=Files.Config(paths=(str(text),)), sequence_length=12)
    return RunConfig(model=model, data=data, train=TrainConfig(**{**usual, **train}))


def logged(run, out, **options):
    """(trainer, lines of its steps)."""
    trainer = Trainer(run, out, **options)
    trainer.fit()
    return trainer, [line for line in read_metrics(out) if line["kind"] == "train"]


def test_losses_of_parts_of_a_batch_are_those_of_the_batch(text, tmp_path):
    """The balance loss is left out: it is a product of two means, which parts have not in common."""
    _, whole = logged(run_of(text), tmp_path / "whole")
    for name, settings in (("parts", {"accumulation": 2}), ("again", {"accumulation": 4, "recompute": True})):
        _, found = logged(run_of(text, **settings), tmp_path / name)
        for one, other in zip(found, whole, strict=True):
            for key in ("loss", "gradient_norm", "routing_entropy", "active_experts", "dropped_mass"):
                assert one[key] == pytest.approx(other[key], rel=2e-4), (name, key)
            assert one["auxiliary"]["uncertainty"] == pytest.approx(other["auxiliary"]["uncertainty"], rel=1e-4)


def test_a_training_goes_on_to_the_bit(text, tmp_path):
    run = run_of(text, steps=4, checkpoint_every=2, schedule=Constant.Config())
    whole, _ = logged(run, tmp_path / "whole")
    logged(run.replace(train=run.train.replace(steps=2)), tmp_path / "parts")
    parts, _ = logged(run, tmp_path / "parts", resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name


@pytest.mark.slow
def test_the_entropy_loss_makes_routers_decide(text, tmp_path):
    """With it the entropy falls; a run without it ends higher. The base that is frozen stays to the bit."""
    ends = {}
    for coefficient in (0.0, 0.5):
        base = run_of(text).model.replace(linears={}).build(seed=1)
        before = {name: value.clone() for name, value in base.state_dict().items()}
        model = put_on(base, SMALL.replace(entropy_loss=coefficient).linears(2), seed=2)
        run = run_of(text, steps=30).replace(model=model.config)
        trainer, lines = logged(run, tmp_path / str(coefficient), model=model)
        rows = [(batch.token_BL, None, None) for batch in trainer.task.validation_data(trainer._context)]
        ends[coefficient] = mixture_report(trainer.model, rows).mean("entropy")
        if coefficient:
            assert lines[-1]["routing_entropy"] < lines[0]["routing_entropy"]
        state = trainer.model.state_dict()
        changed = [name for name in before if not torch.equal(state[_now(name, state)], before[name])]
        assert changed == []
    assert ends[0.5] < ends[0.0]


def _now(name, state):
    """The name of a matrix that has layers beside it now."""
    owner, _, leaf = name.rpartition(".")
    return name if name in state else f"{owner}.matrix.{leaf}"


# Merged


def test_routed_experts_are_not_merged_and_their_average_is(tmp_path):
    make_base(tmp_path / "base", "llama")
    model = drawn(put_on(load_model(tmp_path / "base")[0], SMALL.linears(2))).eval()
    with pytest.raises(ConfigError, match=r"which experts a token has depends on the token.*mu\(model\)"):
        merge(model)
    write_peft(tmp_path / "mean", mu(model))
    assert {pair.rank for pair in read_peft(tmp_path / "mean").pairs.values()} == {12}
    # Even routers and all experts: the average, token by token.
    for name, parameter in model.named_parameters():
        if name.endswith("router.score.weight"):
            parameter.data.zero_()
    plain = load_peft(tmp_path / "mean", load_model(tmp_path / "base")[0]).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits_BLV, plain(TOKENS).logits_BLV, rtol=1e-5, atol=1e-5)
