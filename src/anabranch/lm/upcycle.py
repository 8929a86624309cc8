"""Dense to mixture of experts and back: sparse upcycling, its fine-grained form, and the average.

    moe = MoE.Config(num_experts=8, hidden_dim=1536, router=Router.Config(select=TopK.Config(top_k=2, normalize="sum")))
    sparse = upcycle(dense, moe)             # 8 copies of each feed-forward; the same logits as dense, until trained

Every expert starts as a copy of the dense feed-forward (Komatsuzaki et al. 2022, "Sparse Upcycling", arXiv 2212.05055). Where the
experts are G times narrower than it, each is a copy of one of its G slices (He et al. 2024, arXiv 2410.07524, "virtual groups"): expert
e is slice e mod G of copy e div G, the router rows of one copy are equal, so the best K experts are the whole of the best K / G copies.

    sum_k w_k E_k(x) = (sum of the weights / G) dense(x)        so w2 is scaled by  G / (sum of the weights)

The sum is 1 for renormalised weights, and the logits then equal the dense model's. For raw weights it is K times the score of a
router that knows nothing (softmax: K / E), and the logits are near to the dense model's as long as the router's are near zero.
All of this takes weights on the experts' output; on their input (`MoE.Config.weight_on`) only a weight of 1 leaves them alone.
"""
# Shapes: E experts, G slices of a feed-forward, C = E / G copies of it, K experts per token, D width, F hidden of an expert

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty
from anabranch.nn import BuildContext, FeedForward, MoE, SwiGLU
from anabranch.nn.linear import Added, Split
from anabranch.nn.pool import check_stacked
from anabranch.nn.quantize import FewBitLinear, QuantizedPool
from anabranch.routing.score import activate
from anabranch.routing.shared import shared_parameters

__all__ = ["average", "upcycle"]


@torch.no_grad()
def upcycle(
    model: Decoder,
    moe: MoE.Config,
    *,
    dense_layers: Sequence[int] = (),
    noise: float = 0.0,
    reinit: float = 0.0,
    seed: int = 0,
) -> Decoder:
    """A mixture-of-experts model that begins where the dense ``model`` is; ``model`` stays as it is.

    Args:
        model: a decoder whose feed-forwards are all SwiGLU.
        moe: the layer to make of them. Its ``hidden_dim`` is theirs, or theirs divided by a number of slices G that divides
            ``num_experts`` and ``top_k``. Shared experts are added silent: their second matrix is zero.
        dense_layers: layers to leave dense (the paper makes every second one sparse).
        noise: standard deviation of Gaussian noise on each expert, as a multiple of that of the matrix (the paper: 0 is best).
        reinit: share of each expert's hidden units to draw afresh with the mean and deviation of what they replace
            (Nakamura et al. 2025, "Drop-Upcycling", arXiv 2502.19261, which takes 0.5); it gives up the equal start for diversity.
        seed: of the router, of ``noise`` and of ``reinit``.

    Raises:
        ConfigError: the model is not dense, ``moe`` does not fit it, or a matrix that must become experts is replaced or quantised.
    """
    slices = _check(model, moe, noise, reinit)
    dense = (
        {"dense_feed_forward": model.config.feed_forward, "dense_layers": tuple(dense_layers)} if dense_layers else {}
    )
    config = model.config.replace(feed_forward=moe, **dense)
    layers = [layer for layer in range(config.num_layers) if layer not in config.dense_layers]
    _check_matrices(model, layers)
    made = build_empty(config)
    _check_matrices(made, layers)
    generator = torch.Generator().manual_seed(seed)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    scale = slices / _total_weight(moe)
    for layer in layers:
        prefix = f"blocks.{layer}.feed_forward."
        w13_FD, w2_DF = state.pop(f"{prefix}w13.weight"), state.pop(f"{prefix}w2.weight")
        w13_EFD, w2_EDF = _slice(w13_FD, w2_DF, slices)
        w13_EFD = w13_EFD.repeat(moe.num_experts // slices, 1, 1)
        w2_EDF = w2_EDF.repeat(moe.num_experts // slices, 1, 1)
        _diversify(w13_EFD, w2_EDF, noise, reinit, generator)
        state[f"{prefix}experts.w13"], state[f"{prefix}experts.w2"] = w13_EFD, w2_EDF.mul_(scale)
        state |= {
            f"{prefix}{name}": value.to(w13_FD) for name, value in _fresh(config, layer, slices, generator).items()
        }
    return _filled(made, state, model)


@torch.no_grad()
def average(model: Decoder, *, slices: int = 1) -> Decoder:
    """A dense model whose feed-forwards are the mean of the experts (and the shared ones beside it); `upcycle` undone.

    Args:
        model: a decoder with plain `MoE` layers.
        slices: G, if experts are slices of copies, as `upcycle` arranges them; 1 if each is whole.

    Raises:
        ConfigError: the layers are not plain, or replaced or quantised in part, their shared experts have a gate, or ``slices`` does
            not divide the experts.
    """
    moe = _plain(model.config.feed_forward)
    if moe.shared_gate:
        raise ConfigError("shared_gate is True: a gate that depends on the token has no dense equal")
    if slices < 1 or moe.num_experts % slices:
        raise ConfigError(f"slices is {slices}, which does not divide num_experts={moe.num_experts}")
    config = model.config.replace(feed_forward=SwiGLU.Config(hidden_dim=slices * moe.hidden_dim + moe.shared_width))
    layers = [layer for layer in range(config.num_layers) if layer not in config.dense_layers]
    _check_matrices(model, layers)
    made = build_empty(config)
    _check_matrices(made, layers)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    scale = _total_weight(moe) / slices
    for layer in layers:
        prefix = f"blocks.{layer}.feed_forward."
        parts = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
        w13_GFD = parts[f"{prefix}experts.w13"].unflatten(0, (-1, slices)).mean(0)
        w2_GDF = parts[f"{prefix}experts.w2"].unflatten(0, (-1, slices)).mean(0) * scale
        gates, ups = (list(half_GFD) for half_GFD in w13_GFD.chunk(2, dim=1))
        downs = list(w2_GDF)
        if moe.shared_experts:
            gate, up = parts[f"{prefix}shared.w13.weight"].chunk(2)
            down = parts[f"{prefix}shared.w2.weight"] * (moe.shared_weight or 1.0)
            gates, ups, downs = [*gates, gate], [*ups, up], [*downs, down]
        state[f"{prefix}w13.weight"] = torch.cat([*gates, *ups])
        state[f"{prefix}w2.weight"] = torch.cat(downs, dim=1)
    return _filled(made, state, model)


def _check(model: Decoder, moe: MoE.Config, noise: float, reinit: float) -> int:
    """G, the slices of a feed-forward. Raises ConfigError if ``moe`` does not fit."""
    dense = model.config.feed_forward
    if not isinstance(dense, SwiGLU.Config) or model.config.dense_layers:
        raise ConfigError(f"upcycle needs a dense model, this one has {dense.owner.kind!r} layers")
    _plain(moe)
    if noise < 0 or not 0 <= reinit <= 1:
        raise ConfigError(f"noise is {noise} and reinit {reinit}; noise must be at least 0, reinit between 0 and 1")
    slices, rest = divmod(dense.hidden_dim, moe.hidden_dim)
    if rest or slices < 1:
        raise ConfigError(
            f"hidden_dim is {moe.hidden_dim}, the dense model's {dense.hidden_dim}; use {dense.hidden_dim}, or it divided by the "
            "number of slices"
        )
    choices = moe.router.select.exact_choices
    for name, value in (("num_experts", moe.num_experts), ("the number of experts that router.select takes", choices)):
        if slices > 1 and (value is None or value % slices):
            raise ConfigError(
                f"{name} is {value}; with experts of 1/{slices} of the width it must be a multiple of {slices}"
            )
    return slices


def _plain(moe: FeedForward.Config) -> MoE.Config:
    """``moe``, a mixture that dense layers can become. Raises ConfigError if it is of another kind, or its experts and scores are."""
    if not isinstance(moe, MoE.Config) or type(moe) is not MoE.Config:
        raise ConfigError(
            f"feed_forward is of kind {moe.owner.kind!r}; it must be a plain 'moe' (from which others can be made)"
        )
    if moe.activation != "swiglu":
        raise ConfigError(
            f"feed_forward.activation is {moe.activation!r}; experts and dense layers that become each other are swiglu"
        )
    if shared_parameters(moe.router.score, 1):
        raise ConfigError(
            f"router.score is of kind {moe.router.score.owner.kind!r}, whose layers share parts; use 'linear' and convert the result"
        )
    return moe


def _check_matrices(model: Decoder, layers: Iterable[int]) -> None:
    """Raise ConfigError unless weights are plain and the feed-forwards of ``layers`` whole matrices; with the pattern that replaces one."""
    for name, module in model.named_modules():
        if isinstance(module, (FewBitLinear, QuantizedPool)):
            raise ConfigError(f"{name} is quantised, and only plain matrices become others; dequantize(model) first")
    for layer in layers:
        prefix = f"blocks.{layer}.feed_forward"
        for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
            if isinstance(module, (Split, Added)) and f"{prefix}.experts." not in name:
                raise ConfigError(
                    f"{_replaced(model, name, module)}, and only plain matrices become others; start from a model whose linears leave "
                    f"{prefix} as it is"
                )
    check_stacked(model)


def _replaced(model: Decoder, name: str, module: Split | Added) -> str:
    """Which pattern made ``module`` what it is."""
    above = name.rpartition(".")[0]
    for part in module.beside if isinstance(module, Added) else module.parts:
        for pattern in model.config.linears:
            if fnmatchcase(f"{above}.{part}", pattern):
                return f"linears has {pattern!r}, which replaces or adds to {above}.{part}"
    return f"{name} is not one matrix"


def _total_weight(moe: MoE.Config) -> float:
    """What a token's routed experts weigh together in the layer's output, for a router that scores all experts alike."""
    select, routed = moe.router.select, 1 - (moe.shared_weight or 0.0)
    if select.normalize != "none":
        return routed * select.scale
    choices = select.exact_choices
    if choices is None:
        raise ConfigError(
            f"router.select is {select.owner.kind!r} with normalize 'none', so what its weights sum to is open; set normalize"
        )
    score = activate(torch.zeros(moe.num_experts), moe.router.score.activation)[0].item()
    return routed * choices * score * select.scale


def _slice(w13_FD: Tensor, w2_DF: Tensor, slices: int) -> tuple[Tensor, Tensor]:
    """The slices of a dense feed-forward as stacked experts: w13 ``[G, 2F, D]``, w2 ``[G, D, F]``."""
    gate_GFD, up_GFD = (half_FD.unflatten(0, (slices, -1)) for half_FD in w13_FD.chunk(2))
    return torch.cat((gate_GFD, up_GFD), dim=1), w2_DF.unflatten(1, (slices, -1)).transpose(0, 1).contiguous()


def _diversify(w13_EFD: Tensor, w2_EDF: Tensor, noise: float, reinit: float, generator: torch.Generator) -> None:
    """Make experts differ, in place."""
    hidden_dim = w2_EDF.shape[2]
    for w13_FD, w2_DF in zip(w13_EFD, w2_EDF, strict=True):
        gate_FD, up_FD = w13_FD.chunk(2)
        chosen = torch.randperm(hidden_dim, generator=generator)[: round(reinit * hidden_dim)].to(w13_FD.device)
        # Hidden units are rows of these.
        for weight_FD in (gate_FD, up_FD, w2_DF.T):
            if noise:
                weight_FD += _normal(weight_FD, generator) * (noise * weight_FD.std())
            if len(chosen):
                old = weight_FD[chosen]
                weight_FD[chosen] = _normal(old, generator) * old.std() + old.mean()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _fresh(config: Decoder.Config, layer: int, slices: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What a mixture has and a dense layer has not, under its names in the layer: router and shared experts."""
    moe = _plain(config.feed_forward)
    router = moe.router.build(config.dim, moe.num_experts, layer=layer, generator=generator)
    weight_ED = router.score.weight
    weight_ED.copy_(weight_ED[::slices].repeat_interleave(slices, dim=0))
    state = {f"router.{name}": value for name, value in router.state_dict().items()}
    if moe.shared_experts:
        context = BuildContext(config.dim, init_std=config.init_std, generator=generator)
        shared = SwiGLU.Config(hidden_dim=moe.shared_width).build(context)
        state |= {"shared.w13.weight": shared.w13.weight, "shared.w2.weight": torch.zeros_like(shared.w2.weight)}
        if moe.shared_gate:
            state["shared_gate.weight"] = context.linear(config.dim, 1).weight
    return state


def _filled(made: Decoder, state: dict[str, Tensor], like: Decoder) -> Decoder:
    made.load_state_dict(state, assign=True)
    return made.to(like.embedding.weight.device).train(like.training)
