"""Every registered part keeps the contract of its family, with its defaults and with the options that change most.

Defaults are in defaults.json. A change there changes what every config that does not name the field means: say so in the changelog.
To write it anew: ``PYTHONPATH=tests python -c "import test_contract; test_contract.write_defaults()"``.
"""

import json
from pathlib import Path

import pytest

from anabranch.config import to_dict
from anabranch.errors import ConfigError
from anabranch.heads import HeadRouting
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.registry import BUILTIN, kinds, resolve
from anabranch.routing import (
    BiasBalancer,
    CosineScore,
    GroupTopK,
    HashScore,
    LinearScore,
    Positive,
    RateBalance,
    ReluScore,
    Router,
    SwitchLoss,
    Threshold,
    TopK,
    TopP,
)
from anabranch.testing import (
    DEVICES,
    check_attention,
    check_balancer,
    check_block,
    check_feed_forward,
    check_linear,
    check_parallel,
    check_score,
    check_select,
    check_streams,
)

DEFAULTS = Path(__file__).with_name("defaults.json")


def every_default():
    """{family.kind: its fields} of every part that is built in and can be made of nothing but defaults."""
    found = {}
    for family in BUILTIN:
        for kind in sorted(BUILTIN[family]):
            config_class = getattr(resolve(family, kind), "Config", None)
            try:
                found[f"{family}.{kind}"] = to_dict(config_class())
            except (ConfigError, TypeError):
                continue  # something must be given, or it has no settings
    return json.loads(json.dumps(found))


def write_defaults():
    DEFAULTS.write_text(json.dumps(every_default(), indent=1, sort_keys=True) + "\n", "utf-8")


def test_defaults_stay_what_they_are():
    found, expected = every_default(), json.loads(DEFAULTS.read_text("utf-8"))
    assert found.keys() == expected.keys()
    for name, fields in expected.items():
        assert found[name] == fields, name


def defaults(family):
    return [pytest.param(resolve(family, kind).Config(), id=kind) for kind in kinds(family)]


@pytest.mark.parametrize("config", defaults("score"))
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "sqrt_softplus"])
def test_score(config, activation):
    check_score(config.replace(activation=activation))


@pytest.mark.parametrize("config", defaults("select"))
@pytest.mark.parametrize("normalize", ["none", "sum", "softmax"])
def test_select(config, normalize):
    check_select(config.replace(normalize=normalize))


@pytest.mark.parametrize("config", defaults("balance"))
def test_balancer(config):
    check_balancer(config)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", defaults("feed_forward"))
def test_feed_forward(config, device):
    check_feed_forward(config, device=device)


@pytest.mark.slow  # check_feed_forward asks the same of decoders with it
@pytest.mark.parametrize("config", defaults("attention"))
def test_attention(config):
    check_attention(config)


@pytest.mark.parametrize("config", defaults("block"))
def test_block(config):
    check_block(config)


def linear_of(kind):
    """The default of a kind, and of one that is told tasks what fits a decoder that nobody tells any."""
    config = resolve("linear", kind).Config()
    return config.replace(heads=1, unknown="average") if kind == "multi_head_routed" else config


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(linear_of(kind), id=kind, marks=[] if kind == "dense" else [pytest.mark.slow])
        for kind in kinds("linear")  # adapters have quick tests of their own
    ],
)
def test_linear(config):
    check_linear(config)


@pytest.mark.parametrize(
    "config",
    [pytest.param(resolve("streams", kind).Config(), id=kind) for kind in kinds("streams") if kind != "front"],
)
@pytest.mark.parametrize("num_streams", [1, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_streams(config, num_streams, device):
    check_streams(config.replace(num_streams=num_streams), device=device)


@pytest.mark.slow  # tests/adapters has quick ones
@pytest.mark.parametrize("of", ["embeddings", "keys"])
def test_virtual_tokens(of):
    check_streams(resolve("streams", "front").Config(of=of))


def variants():
    moe = resolve("feed_forward", "moe").Config
    small = {"num_experts": 8, "hidden_dim": 16}
    bias = (BiasBalancer.Config(rate=0.01), SwitchLoss.Config(scope="sequence"))
    yield "hash", moe(router=Router.Config(score=HashScore.Config(), select=TopK.Config(top_k=2)), **small)
    yield (
        "deepseek_v3",
        moe(
            router=Router.Config(
                score=LinearScore.Config(activation="sigmoid"),
                select=GroupTopK.Config(top_k=3, num_groups=4, top_groups=2, normalize="sum", scale=2.5),
                balance=bias,
            ),
            shared_experts=1,
            **small,
        ),
    )
    yield "qwen2", moe(shared_experts=2, shared_hidden_dim=24, shared_gate=True, **small)
    yield "global_batch", moe(router=Router.Config(balance=(SwitchLoss.Config(scope="global_batch"),)), **small)
    yield "cosine_top_p", moe(router=Router.Config(score=CosineScore.Config(), select=TopP.Config(top_p=0.5)), **small)
    yield "threshold", moe(router=Router.Config(select=Threshold.Config(threshold=0.13)), weight_on="input", **small)
    yield "capacity", moe(capacity_factor=0.8, capacity_order="score", capacity_renormalize=True, **small)
    yield "recompute", moe(recompute=True, **small)
    yield "all_experts", moe(router=Router.Config(select=TopK.Config(top_k=8, normalize="softmax")), **small)
    yield "gelu_experts", moe(activation="gelu", recompute=True, **small)
    yield "jitter", moe(router=Router.Config(score=LinearScore.Config(jitter=0.1)), **small)
    relu = Router.Config(
        score=ReluScore.Config(start=0.3, init_std=1.0), select=Positive.Config(), balance=(RateBalance.Config(),)
    )
    yield "relu", moe(router=relu, **small)
    yield "one_expert", moe(num_experts=1, hidden_dim=16, router=Router.Config(select=TopK.Config(top_k=1)))
    rexmoe = resolve("feed_forward", "rexmoe").Config
    yield (
        "rexmoe_pool",
        rexmoe(
            reuse=2,
            depth_embedding=True,
            pool_balance=0.01,
            pool_bias=True,
            router=Router.Config(balance=bias),
            **small,
        ),
    )
    yield "rexmoe_shared", rexmoe(reuse=3, shared_experts=1, **small)
    versatile = resolve("feed_forward", "versatile").Config
    yield "versatile_soft", versatile(hidden_dim=48, relaxation="soft", gate="soft", norm="separate", expert_dim=5)
    yield (
        "versatile_grouped",
        versatile(hidden_dim=64, width_compute="grouped", recompute=True, router=Router.Config(balance=bias)),
    )
    yield "versatile_fixed", versatile(hidden_dim=64, fusion="average", gate="none", max_loops=2)
    recurrent = Router.Config(score=resolve("score", "recurrent").Config(state_dim=16), balance=bias)
    yield "recurrent", moe(router=recurrent, **small)
    chain = resolve("feed_forward", "chain").Config
    yield "chain_pool_recurrent", chain(reuse=2, router=recurrent, **small)
    yield "chain_tied_recompute", chain(independent_gates=False, recompute_passes=True, router=recurrent, **small)
    yield "chain_gated", chain(iterations=3, residual="gated", norm="once", shared_experts=1, **small)


@pytest.mark.parametrize(
    "config",
    [pytest.param(config, id=name, marks=[pytest.mark.slow] if name == "relu" else []) for name, config in variants()],
)
def test_feed_forward_variants(config):
    layers = getattr(config, "reuse", 1) + 1  # with reuse, a last group that is short
    check_feed_forward(config, num_layers=layers, compile_backend="eager")


def test_expert_choice_in_a_layer():
    """Not causal, so cached decoding is not asked of it; all the rest is."""
    moe = resolve("feed_forward", "moe").Config
    select = resolve("select", "expert_choice").Config(capacity_factor=2.0)
    config = moe(num_experts=8, hidden_dim=16, router=Router.Config(select=select))
    check_feed_forward(config, num_layers=2, compile_backend="eager")


DENSE = SwiGLU.Config(hidden_dim=16)


def small(feed_forward=DENSE, streams=None):
    return Decoder.Config(
        vocab_size=61,
        dim=16,
        num_layers=getattr(feed_forward, "reuse", 1) + 1,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=feed_forward,
        streams=streams,
        init_std=0.2,  # far from even scores, so rounding does not decide who is chosen
    )


def parallel_streams(**changes):
    config = resolve("streams", "parscale").Config
    return config(**{"num_streams": 3, "prefix_len": 4, "embedding_dim": 8, "mlp_dim": 8, **changes})


def routed_heads(**settings):
    config = resolve("attention", "routed_heads").Config
    heads = HeadRouting(num_shared=1, top_k=1, control=RateBalance.Config(beta0=0.1), **settings)
    return config(attention=SelfAttention.Config(num_heads=2), heads=heads)


def test_two_processes():
    """A pool that layers share, parameters without a part in every step, random draws, and a parameter that is a single number."""
    chosen = dict(variants())
    models = {name: small(chosen[name]) for name in ("rexmoe_pool", "cosine_top_p", "jitter")}
    models["routed_heads"] = small().replace(attention=routed_heads())
    check_parallel({**models, "switchable": small(streams=parallel_streams(switchable=(2,)))})


@pytest.mark.slow
def test_two_processes_of_every_design():
    configs = {kind: resolve("feed_forward", kind).Config() for kind in kinds("feed_forward")}
    models = {name: small(config) for name, config in {**configs, **dict(variants())}.items()}
    scores = {kind: resolve("score", kind).Config() for kind in kinds("score")}
    scores["recurrent_cosine"] = resolve("score", "recurrent").Config(gate="cosine", state_dim=8)
    routers = {
        **{f"score_{kind}": Router.Config(score=config) for kind, config in scores.items()},
        **{f"select_{kind}": Router.Config(select=resolve("select", kind).Config()) for kind in kinds("select")},
        **{f"balance_{kind}": Router.Config(balance=(resolve("balance", kind).Config(),)) for kind in kinds("balance")},
    }
    moe = resolve("feed_forward", "moe").Config
    models |= {name: small(moe(num_experts=16, hidden_dim=16, router=router)) for name, router in routers.items()}
    models["topk_heads"] = small().replace(attention=routed_heads(routing="topk"))
    models["streams"] = small(streams=parallel_streams())
    models["streams_switchable"] = small(streams=parallel_streams(switchable=(2,), prefix="direct"))
    models["streams_adapter"] = small(streams=parallel_streams(train="adapter"))
    check_parallel(models)
