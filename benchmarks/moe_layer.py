"""How fast is one mixture-of-experts layer, router included, against transformers' own blocks?

Ours is `anabranch.nn.moe.MoE`; the peer is the best of the OLMoE block (64 experts) or Mixtral block (8 experts) with its experts
eager, by grouped_mm and, where its copies of weights fit (`_transformers.MOST_COPIED`), by batched_mm, the first two also under
torch.compile. Same weights, results and gradients compared first, and the element type of the peer's products; then forward alone, and
forward plus backward into fresh gradients. Bars: training 1.3 at 64 experts and 1.0 at 8; one token forward 1.2; 16 tokens training 3.

    python benchmarks/moe_layer.py --json benchmarks/results/moe_layer.avx512_bf16.json  # or of what instructions yours are
"""
# Shapes: T tokens, E experts, K per token, d width, h hidden width of an expert

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import _transformers as peer
from _harness import arguments, compare, finish, start
from anabranch.nn.context import BuildContext, ForwardContext
from anabranch.nn.moe import MoE
from anabranch.routing import Router
from anabranch.routing.select import TopK

SHAPES = [
    (2048, 8, 2, 256, 512),
    (2048, 64, 8, 256, 128),
    (2048, 64, 8, 512, 256),
    (1, 64, 8, 512, 256),
    (16, 64, 8, 512, 256),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative error of the median item (y, dx) and of the median expert's gradient. In bf16 our router scores in fp32 and theirs
# does not, so a few items near a tie go to another expert, whose gradient sums over all its items.
TOLERANCE = {"fp32": {"item": 1e-4, "expert": 1e-4}, "bf16": {"item": 5e-2, "expert": 0.15}}


def our_layer(experts: int, top_k: int, dim: int, hidden: int, normalize: str) -> nn.Module:
    select = TopK.Config(top_k=top_k, normalize=normalize)  # type: ignore[arg-type]
    router = Router.Config(select=select, balance=())
    return MoE.Config(num_experts=experts, hidden_dim=hidden, router=router).build(BuildContext(dim=dim))


def their_layer(experts: int, top_k: int, dim: int, hidden: int, implementation: str) -> nn.Module:
    if experts == 8:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Block

        sizes: Any = {"num_local_experts": experts}
        config: Any = MixtralConfig(hidden_size=dim, intermediate_size=hidden, num_experts_per_tok=top_k, **sizes)
    else:
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock as Block  # type: ignore[assignment]

        config = OlmoeConfig(hidden_size=dim, intermediate_size=hidden, num_experts_per_tok=top_k, num_experts=experts)
    config._experts_implementation = implementation
    return Block(config)


def copy_weights(ours: Any, theirs: Any) -> None:
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.score.weight)
        theirs.experts.gate_up_proj.copy_(ours.experts.w13)
        theirs.experts.down_proj.copy_(ours.experts.w2)


def step(layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward and backward into fresh gradients, as after ``zero_grad(set_to_none=True)``."""

    def work() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        call(x).backward(dy)

    return work


def infer(call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def work() -> None:
        with torch.no_grad():
            call(x)

    return work


def check(name: str, ours: list[Tensor], theirs: list[Tensor], tolerance: dict[str, float]) -> None:
    """All contestants compute the same: the relative error of the median item and of the median expert is small."""
    for what, a, b in zip(("y", "dx", "dw13", "dw2"), ours, theirs, strict=True):
        a, b = a.float().flatten(0, -3).flatten(1), b.float().flatten(0, -3).flatten(1)
        if what in ("y", "dx"):
            a, b = a.view(-1, ours[0].shape[-1]), b.view(-1, ours[0].shape[-1])
        error = ((a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-12)).median().item()
        allowed = tolerance["item" if what in ("y", "dx") else "expert"]
        if not error <= allowed:
            raise SystemExit(f"{name}: {what} differs by {error:.1e}, more than {allowed:.0e}")


def results(layer: Any, call: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> list[Tensor]:
    y = call(x)
    weights = (layer.experts.w13, layer.experts.w2) if isinstance(layer, MoE) else tuple(layer.experts.parameters())
    return [y.detach(), *torch.autograd.grad(y, [x, *weights], dy)]


def time_shape(shape: tuple[int, ...], label: str, modes: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each of ``modes``, of one shape in one precision."""
    tokens, experts, top_k, dim, hidden = shape
    case, dtype = case_name(shape, label), DTYPES[label]
    peer.forget_compiled()
    torch.manual_seed(0)
    ours = our_layer(experts, top_k, dim, hidden, "sum" if experts == 8 else "none").to(dtype)
    kinds = peer.implementations(tokens * top_k, dim, hidden, bytes_each=dtype.itemsize)
    theirs = {kind: their_layer(experts, top_k, dim, hidden, kind) for kind in kinds}
    x = torch.randn(1, tokens, dim).to(dtype).requires_grad_()
    dy = torch.randn(1, tokens, dim).to(dtype)
    position_BL = torch.arange(tokens).unsqueeze(0)
    context = ForwardContext(position_BL=position_BL, rotary=(position_BL, position_BL))  # of no use to a layer

    def ours_call(x: Tensor) -> Tensor:
        return ours(x, context)

    family = "Mixtral" if experts == 8 else "OLMoE"
    calls: dict[str, tuple[nn.Module, Any]] = {f"{family} {peer.label(kind)}": (at, at) for kind, at in theirs.items()}
    for kind in ("eager", peer.CAST):
        calls[f"{family} {peer.label(kind)}, compiled"] = (theirs[kind], peer.compiled(theirs[kind], kind))
    expected = results(ours, ours_call, x, dy)
    for layer in theirs.values():
        copy_weights(ours, layer.to(dtype))
    for name, (layer, call) in calls.items():
        check(f"{case} {name}", expected, results(layer, call, x, dy), TOLERANCE[label])
        peer.check_products(f"{case} {name}", step(layer, call, x, dy), str(dtype).removeprefix("torch."))
    rows = []
    for mode in modes:
        if mode == "forward":
            mine, others = infer(ours_call, x), {name: infer(call, x) for name, (_, call) in calls.items()}
        else:
            mine = step(ours, ours_call, x, dy)
            others = {name: step(layer, call, x, dy) for name, (layer, call) in calls.items()}
        row = compare(f"{case} {mode}", mine, others, rounds=rounds)
        rows.append({**row, "shape": shape})
    return rows


def case_name(shape: tuple[int, ...], label: str) -> str:
    return "T={} E={} K={} d={} h={} {}".format(*shape, label)


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    start(options)
    peer.register()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        tokens, _, _, dim, _ = shape
        for label in DTYPES:
            modes = [mode for mode in ("forward", "training") if options.only in f"{case_name(shape, label)} {mode}"]
            if modes and not (options.quick and (dim > 256 and tokens > 16)):
                rows += time_shape(shape, label, modes, options.rounds)
    finish("moe_layer", rows, options, ("torch", "transformers", "anabranch"))


if __name__ == "__main__":
    main()
