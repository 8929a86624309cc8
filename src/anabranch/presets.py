"""Ready configurations of whole training runs: plain functions with one dial, the size, that return a `RunConfig`.

    config = rexmoe("tiny")
    Trainer(config, "runs/rexmoe").fit()

All designs of one size have the same experts' parameters and the same work per token, so they can be compared. Gates are
renormalised (the sum of a token's weights is 1; not in ``chain``), which is worth more than most designs at these sizes; the raw
gates of the ReXMoE paper are ``--set model.feed_forward.router.select.normalize=none``. A third-party package adds a preset with an
entry point in the group ``anabranch.presets`` whose value is ``module:function``; the first line of its docstring describes it.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

from anabranch.adapters import DynMoLE, MixedLowRank
from anabranch.data import BpeTokenizer, ByteTokenizer, DataConfig, Tokenizer
from anabranch.depth.duo_llm import DuoFFN
from anabranch.errors import ConfigError
from anabranch.experts.chain import Chain
from anabranch.experts.parscale import ParScale
from anabranch.experts.rexmoe import ProgressiveScaling, ReXMoE
from anabranch.experts.rmoe import RecurrentScore
from anabranch.experts.versatile import VersatileFFN
from anabranch.lm import Decoder
from anabranch.nn.attention import SelfAttention
from anabranch.nn.feed_forward import FeedForward, SwiGLU
from anabranch.nn.moe import MoE
from anabranch.routing import BiasBalancer, LinearScore, Router, TopK
from anabranch.routing.relax import Temperature
from anabranch.train import Cosine, RunConfig, TrainConfig

Preset = Callable[[str], RunConfig]


@dataclass(frozen=True)
class Budget:
    """What all designs of one size share.

    Attributes:
        dim: D.
        num_layers: blocks.
        num_heads: of attention.
        num_experts: N, of a plain mixture-of-experts layer.
        top_k: K.
        hidden_dim: width of an expert; a dense layer is K times as wide, so that work per token is the same.
        vocab_size: of a byte-pair tokenizer trained on the corpus; None reads bytes.
        sequence_length: tokens.
        batch_size: sequences a step.
        steps: optimizer steps.
        learning_rate: the peak.
    """

    dim: int
    num_layers: int
    num_heads: int
    num_experts: int
    top_k: int
    hidden_dim: int
    vocab_size: int | None
    sequence_length: int
    batch_size: int
    steps: int
    learning_rate: float


BUDGETS: dict[str, Budget] = {
    "tiny": Budget(128, 4, 4, 8, 2, 128, None, 256, 8, 800, 2e-3),  # 1.9 M parameters; minutes on two cores
    "small": Budget(256, 8, 4, 16, 2, 256, 4096, 512, 32, 3000, 1e-3),  # 30 M parameters; hours on a few cores
    "base": Budget(768, 16, 12, 32, 4, 384, 16384, 1024, 256, 20000, 6e-4),  # 0.5 B parameters; a GPU
}


def demo(size: str = "tiny") -> RunConfig:
    """A small ReXMoE that learns to write Python in a few minutes on two cores, from text every machine has."""
    return _run(size, _rexmoe(_budget(size), 2, ProgressiveScaling.Config(mask="local_first")))


def dense(size: str = "tiny") -> RunConfig:
    """No experts: one SwiGLU per layer that does the work of K experts."""
    budget = _budget(size)
    return _run(size, SwiGLU.Config(hidden_dim=budget.hidden_dim * budget.top_k))


def moe(size: str = "tiny") -> RunConfig:
    """Plain mixture of experts: top K of N per layer, softmax scores, Switch loss and z-loss."""
    return _run(size, _moe(_budget(size)))


def moe_fine(size: str = "tiny") -> RunConfig:
    """Fine-grained experts (DeepSeekMoE): four times as many, a quarter as wide, four times as many active."""
    return _run(size, _moe(_budget(size), split=4))


def moe_shared(size: str = "tiny") -> RunConfig:
    """One always-on shared expert per layer, and top K - 1 of N - 1 routed ones (DeepSeekMoE)."""
    budget = _budget(size)
    router = _router(budget.top_k - 1)
    return _run(size, _moe(budget).replace(num_experts=budget.num_experts - 1, router=router, shared_experts=1))


def moe_lossfree(size: str = "tiny") -> RunConfig:
    """Sigmoid scores balanced by a bias instead of a loss (DeepSeek-V3)."""
    budget = _budget(size)
    score = LinearScore.Config(activation="sigmoid")
    router = _router(budget.top_k).replace(score=score, balance=(BiasBalancer.Config(),))
    return _run(size, _moe(budget).replace(router=router))


def duo(size: str = "tiny") -> RunConfig:
    """Duo-LLM: a big and a small module per layer, taken at random in training; the big one does the work of K experts."""
    budget = _budget(size)
    big = budget.hidden_dim * budget.top_k
    return _run(size, DuoFFN.Config(big=big, small=big // 16))


def rexmoe(size: str = "tiny") -> RunConfig:
    """ReXMoE: two neighbouring layers share their experts, all open from the start."""
    return _run(size, _rexmoe(_budget(size), 2, None))


def rexmoe_psr(size: str = "tiny") -> RunConfig:
    """ReXMoE with progressive scaling of the candidates, the paper's whole method; at small sizes worse than without."""
    return _run(size, _rexmoe(_budget(size), 2, ProgressiveScaling.Config()))


def rexmoe_r4(size: str = "tiny") -> RunConfig:
    """ReXMoE with groups of four layers."""
    return _run(size, _rexmoe(_budget(size), 4, None))


def rexmoe_open(size: str = "tiny") -> RunConfig:
    """The same as rexmoe, under the name that recorded comparisons have."""
    return rexmoe(size)


def versatile(size: str = "tiny") -> RunConfig:
    """VersatileFFN: the dense model's feed-forward as 8 virtual experts and up to 4 loops, mixed by difficulty."""
    budget = _budget(size)
    hidden_dim = budget.hidden_dim * budget.top_k
    return _run(size, VersatileFFN.Config(hidden_dim=hidden_dim, temperature=Temperature.Config(until=0.55)))


def parscale(size: str = "tiny") -> RunConfig:
    """ParScale: four parallel streams of the dense model, merged by a learned gate; four times its work per token."""
    run = dense(size)
    streams = ParScale.Config(num_streams=4, prefix_len=16, embedding_dim=32, mlp_dim=16)  # sized for small models
    return run.replace(model=run.model.replace(streams=streams))


def rmoe(size: str = "tiny") -> RunConfig:
    """RMoE: routers hand a recurrent state from layer to layer, an eighth as wide as the model."""
    budget = _budget(size)
    router = _router(budget.top_k).replace(score=RecurrentScore.Config(state_dim=budget.dim // 8, init="scaled"))
    return _run(size, _moe(budget).replace(router=router))


def chain(size: str = "tiny") -> RunConfig:
    """Chain-of-Experts: two passes of K / 2 experts over the pool of a layer, with raw gates."""
    budget = _budget(size)
    router = Router.Config(select=TopK.Config(top_k=budget.top_k // 2))  # the sum of one gate would always be 1
    return _run(
        size, Chain.Config(num_experts=budget.num_experts, hidden_dim=budget.hidden_dim, router=router, iterations=2)
    )


def dynmole(size: str = "tiny") -> RunConfig:
    """DynMoLE, for --from a model: LoRA experts beside feed-forward matrices, all or few by the router's entropy."""
    run = dense(size)
    # A rank that is small beside the matrices, as the paper's 24 is beside 4096.
    settings = DynMoLE(rank=max(2, run.model.dim // 32), alpha=2.0 * max(2, run.model.dim // 32))
    return run.replace(model=settings.on(run.model))


def lora_mixer(size: str = "tiny") -> RunConfig:
    """LoRA-Mixer, for --from a model: LoRA experts beside attention's projections, one router for q, k and v."""
    run = dense(size)
    rank = max(2, run.model.dim // 32)
    experts = MixedLowRank.Config(ranks=(rank,) * 6, alphas=(2.0 * rank,) * 6)
    linears = {"blocks.*.attention.[qkv]": experts.replace(router_group="qkv"), "blocks.*.attention.o": experts}
    return run.replace(model=run.model.replace(linears=linears))


PRESETS: dict[str, Preset] = {
    "demo": demo,
    "dense": dense,
    "moe": moe,
    "moe-fine": moe_fine,
    "moe-shared": moe_shared,
    "moe-lossfree": moe_lossfree,
    "duo": duo,
    "rexmoe": rexmoe,
    "rexmoe-psr": rexmoe_psr,
    "rexmoe-r4": rexmoe_r4,
    "rexmoe-open": rexmoe_open,
    "parscale": parscale,
    "versatile": versatile,
    "rmoe": rmoe,
    "chain": chain,
    "dynmole": dynmole,
    "lora-mixer": lora_mixer,
}


# Ready lists of designs to compare, the baseline first.
GROUPS: dict[str, tuple[str, ...]] = {
    "family": ("moe", "dense", "moe-lossfree", "rexmoe-open", "rmoe", "chain", "versatile", "duo", "parscale"),
}


def group(name: str) -> tuple[str, ...]:
    """The presets of a group. Raises ConfigError if there is none of this name."""
    if name not in GROUPS:
        raise ConfigError(f"no group of presets {name!r}; known: {', '.join(GROUPS)}")
    return GROUPS[name]


def names() -> list[str]:
    """All presets, built in first, then installed ones."""
    installed = sorted(point.name for point in entry_points(group="anabranch.presets"))
    return [*PRESETS, *(name for name in installed if name not in PRESETS)]


def find(name: str) -> Preset:
    """The preset of this name; the name of a size (``tiny``) is the demo of that size.

    Raises ConfigError, with the nearest name, if there is none.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name in BUDGETS:
        return _demo_of(name)
    point = next(iter(entry_points(group="anabranch.presets", name=name)), None)
    if point is not None:
        return point.load()
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names())}"
    raise ConfigError(f"no preset {name!r}; {hint}")


def describe(name: str) -> str:
    """The first line of a preset's docstring."""
    return (inspect.getdoc(find(name)) or "").partition("\n")[0]


def language_model(
    feed_forward: FeedForward.Config,
    *,
    dim: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    tokenizer: Tokenizer.Config | None = None,
    sequence_length: int = 256,
    batch_size: int = 8,
    steps: int = 800,
    learning_rate: float = 2e-3,
    warmup: float = 0.1,
) -> RunConfig:
    """A run that trains a decoder of this feed-forward on the standard library. ``tokenizer`` None reads bytes."""
    tokenizer = tokenizer or ByteTokenizer.Config()
    vocab_size = tokenizer.vocab_size if isinstance(tokenizer, BpeTokenizer.Config) else Decoder.Config().vocab_size
    return RunConfig(
        model=Decoder.Config(
            vocab_size=vocab_size,
            dim=dim,
            num_layers=num_layers,
            attention=SelfAttention.Config(num_heads=num_heads),
            feed_forward=feed_forward,
            max_positions=4 * sequence_length,
        ),
        data=DataConfig(tokenizer=tokenizer, sequence_length=sequence_length),
        train=TrainConfig(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            schedule=Cosine.Config(warmup=warmup),
        ),
    )


def _demo_of(named: str) -> Preset:
    """The demo of the size that its name says; another size beside it is refused, or one of the two would be ignored."""

    def sized(size: str = named) -> RunConfig:
        if size not in (named, "tiny"):
            raise ConfigError(
                f"{named!r} is a size, and --size says {size!r}; use the preset 'demo' with --size {size}"
            )
        return demo(named)

    sized.__doc__ = demo.__doc__
    return sized


def _budget(size: str) -> Budget:
    if size not in BUDGETS:
        raise ConfigError(f"size is {size!r}; use one of {', '.join(BUDGETS)}")
    return BUDGETS[size]


def _run(size: str, feed_forward: FeedForward.Config) -> RunConfig:
    budget = _budget(size)
    return language_model(
        feed_forward,
        dim=budget.dim,
        num_layers=budget.num_layers,
        num_heads=budget.num_heads,
        tokenizer=BpeTokenizer.Config(vocab_size=budget.vocab_size) if budget.vocab_size else None,
        sequence_length=budget.sequence_length,
        batch_size=budget.batch_size,
        steps=budget.steps,
        learning_rate=budget.learning_rate,
    )


def _router(top_k: int) -> Router.Config:
    return Router.Config(select=TopK.Config(top_k=top_k, normalize="sum"))


def _moe(budget: Budget, split: int = 1) -> MoE.Config:
    return MoE.Config(
        num_experts=budget.num_experts * split,
        hidden_dim=budget.hidden_dim // split,
        router=_router(budget.top_k * split),
    )


def _rexmoe(budget: Budget, reuse: int, psr: ProgressiveScaling.Config | None) -> ReXMoE.Config:
    return ReXMoE.Config(
        num_experts=budget.num_experts,
        hidden_dim=budget.hidden_dim,
        router=_router(budget.top_k),
        reuse=reuse,
        psr=psr,
    )
