"""How long does a layer of routed LoRA experts take, against peft's Arrow, a loop over experts and two products of all of them?

    arrow      what 8 or 32 adapters add beside a matrix, each token to the two whose prototypes it is nearest to: peft's own layer in its
               evaluation mode, eager as peft runs it and compiled by torch (a row each), against a `RoutedLowRank`, eager, that computes
               the same, to 1e-5, which is checked first. bars, of both rows: 8 times at 8 experts, 30 times at 32
    base and arrow    the same with the product of the matrix itself on both sides: no bar
    hybrid     DynMoLE's layer on tokens whose routers are decided (at most 2.5 experts each), against the dense loop of its reference:
               every expert on every token, one after the other in Python, then weighed. bars: 2 times at 8 experts, 5 times at 32
    soft       the same layer where all tokens are undecided, so that all experts run: no bar

All but ``base and arrow`` have a second row, against the best dense way of a few lines of torch: every expert on every token too, but
in two products, of all A and of all B one above the other, weighed in between; eager and compiled, of which the faster counts. No bar
was asked against it.

One layer of 576 inputs and 1,536 outputs (SmolLM2-135M), rank 16, 512 tokens, float32, forward alone; with one thread in the processor's
time.

    python benchmarks/adapter_dispatch.py --threads 1 --json benchmarks/results/adapter_dispatch.json

peft and transformers must be installed for the rows of Arrow; without them these are left out, and said to be.
"""
# Shapes: N tokens, E experts, K choices per token, C inputs, O outputs, R rank

import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _harness import arguments, compare, finish, start
from anabranch.adapters import DynMoLE, RoutedLowRank
from anabranch.nn import BuildContext
from anabranch.nn.linear import Projection
from anabranch.routing import LinearScore, Router, RoutingContext, Score, TopK

TOKENS, IN_DIM, OUT_DIM, RANK, TOP_K = 512, 576, 1536, 16, 2
EXPERTS = (8, 32)
MOST_ACTIVE = 2.5
TOLERANCE = 1e-5


class ArrowScore(Score):
    """z = |x . prototype_e| / temperature, whose softmax over the chosen are Arrow's weights."""

    @classmethod
    def of(cls, prototype_EC: Tensor, temperature: float) -> "ArrowScore":
        made = cls(Score.Config())
        made.prototype_EC, made.temperature = prototype_EC, temperature
        return made

    def project(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        """logit_NE."""
        return F.linear(x_ND, self.prototype_EC).abs() / self.temperature


def arrow_layer(experts: int) -> Any:
    """peft's layer with as many adapters, whose B are drawn."""
    import peft
    from peft.tuners.lora.config import LoraConfig

    class Holder(nn.Module):
        """A model of one linear layer."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(IN_DIM, OUT_DIM, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    from peft.tuners.lora import ArrowConfig

    torch.manual_seed(0)
    names = [f"task_{number}" for number in range(experts)]
    settings = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["linear"]}
    model = peft.get_peft_model(Holder(), LoraConfig(**settings), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**settings))
    layer = model.base_model.model.linear
    with torch.no_grad():
        for name in names:
            layer.lora_B[name].weight.normal_(std=0.05)
    arrow = ArrowConfig(top_k=TOP_K, router_temperature=1.0, rng_seed=0)
    arrow.task_adapter_names, arrow.gks_adapter_names = names, []
    model.add_adapter("arrow_router", LoraConfig(**settings, arrow_config=arrow))
    model.set_adapter("arrow_router")
    return model.eval().base_model.model.linear


def our_layer(experts: int, theirs: Any) -> tuple[RoutedLowRank, ArrowScore, Tensor]:
    """(ours with the numbers of peft's layer, its score, the matrix)."""
    arrow = theirs.lora_arrow["arrow_router"]
    arrow.build_prototypes(theirs.lora_A, theirs.lora_B)
    names = arrow.task_adapter_names
    router = Router.Config(select=TopK.Config(top_k=TOP_K, normalize="softmax"), balance=())
    config = RoutedLowRank.Config(ranks=(RANK,) * experts, alphas=(2.0 * RANK,) * experts, router=router)
    layer: RoutedLowRank = config.build(Projection("linear", IN_DIM, OUT_DIM), BuildContext(IN_DIM))
    with torch.no_grad():
        layer.pool.a.copy_(torch.stack([theirs.lora_A[name].weight for name in names]))
        layer.pool.b.copy_(torch.stack([theirs.lora_B[name].weight for name in names]))
    score = ArrowScore.of(arrow.prototypes, arrow.temperature)
    assert layer.router is not None
    layer.router.score = score
    return layer.eval(), score, theirs.base_layer.weight


def inputs() -> Tensor:
    return torch.randn(1, TOKENS, IN_DIM, generator=torch.Generator().manual_seed(1))


def clock() -> Callable[[], float]:
    """The processor's time where one thread works, which other work on the machine does not change as much; else that of the clock."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def quiet(call: Callable[[], Any]) -> Callable[[], None]:
    def work() -> None:
        with torch.no_grad():
            call()

    return work


def dense_weights(layer: RoutedLowRank, x_NC: Tensor) -> Tensor:
    """weight_NE: what each expert counts for each token, 0 where it is not chosen."""
    assert layer.router is not None
    routing = layer.router(x_NC, RoutingContext())
    return torch.zeros_like(routing.score_NE).scatter_add(1, routing.index_NK.clamp_min(0), routing.weight_NK)


def two_products(layer: RoutedLowRank) -> Callable[[Tensor], Tensor]:
    """What computes the layer's y_NO of x_NC as ((x A^T) weights) B, where A and B of all experts were put together beforehand."""
    experts, rank, _ = layer.pool.a.shape
    a_SC = layer.pool.a.detach().flatten(0, 1).contiguous()
    b_SO = layer.pool.b.detach().transpose(1, 2).flatten(0, 1).contiguous()
    scale_E = torch.tensor([float(scale) for scale in layer.pool.scales])

    def run(x_NC: Tensor) -> Tensor:
        weight_NE = dense_weights(layer, x_NC) * scale_E
        middle_NER = (x_NC @ a_SC.T).unflatten(1, (experts, rank)) * weight_NE.unsqueeze(-1)
        return middle_NER.flatten(1) @ b_SO

    return run


def two_products_row(case: str, layer: RoutedLowRank, rounds: int) -> dict[str, Any]:
    """The layer against all experts in two products, eager or compiled, whichever is faster."""
    x_NC, eager = inputs()[0], two_products(layer)
    torch.compiler.reset()
    runs = {"two products": eager, "two products, compiled": torch.compile(eager)}
    with torch.no_grad():
        for run in runs.values():
            check(case, layer(x_NC, RoutingContext()), run(x_NC))
    peers = {name: quiet(lambda run=run: run(x_NC)) for name, run in runs.items()}
    return compare(case, quiet(lambda: layer(x_NC, RoutingContext())), peers, rounds=rounds, clock=clock())


def check(case: str, ours: Tensor, theirs: Tensor) -> None:
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= TOLERANCE:
        raise SystemExit(f"{case}: outputs differ by {error:.1e} of the greatest, more than {TOLERANCE:.0e}")


def arrow_rows(experts: int, rounds: int) -> list[dict[str, Any]]:
    """Against Arrow: what is added alone, and with the base product."""
    sizes = f"{experts} experts, T={TOKENS} k={TOP_K} r={RANK} {IN_DIM} -> {OUT_DIM}"
    theirs = arrow_layer(experts)
    layer, _, weight = our_layer(experts, theirs)
    arrow, x = theirs.lora_arrow["arrow_router"], inputs()

    def added(x: Tensor) -> Tensor:
        dropout = theirs.lora_dropout["arrow_router"]
        return arrow(x, lora_A=theirs.lora_A, lora_B=theirs.lora_B, dropout=dropout, scaling=theirs.scaling)

    def ours(x: Tensor) -> Tensor:
        return layer(x, RoutingContext())

    rows = []
    for case, mine, other in (
        (f"arrow, {sizes}", ours, added),
        (f"base and arrow, {sizes}", lambda x: F.linear(x, weight) + ours(x), theirs),
    ):
        torch.compiler.reset()
        compiled = torch.compile(other)
        with torch.no_grad():
            for peer in (other, compiled):
                check(case, mine(x), peer(x))
        for name, peer in (("peft Arrow", other), ("peft Arrow, compiled", compiled)):
            peers = {name: quiet(lambda peer=peer: peer(x))}
            told = f"{case}{', compiled' * (peer is compiled)}"
            rows.append(compare(told, quiet(lambda mine=mine: mine(x)), peers, rounds=rounds, clock=clock()))
    return [*rows, two_products_row(f"arrow, {sizes}", layer, rounds)]


def hybrid_layer(experts: int, decided: bool) -> RoutedLowRank:
    """DynMoLE's layer, whose router is far from even or even."""
    config = DynMoLE(num_experts=experts, rank=RANK, alpha=2.0 * RANK, dropout=0.0).layer(experts)
    generator = torch.Generator().manual_seed(0)
    layer: RoutedLowRank = config.build(
        Projection("linear", IN_DIM, OUT_DIM), BuildContext(IN_DIM, generator=generator)
    )
    assert layer.router is not None
    assert isinstance(layer.router.score.config, LinearScore.Config)
    with torch.no_grad():
        layer.pool.b.normal_(std=0.05, generator=generator)
        layer.router.score.weight.mul_(20.0 if decided else 1e-3)  # type: ignore[operator]
    return layer.eval()


def dense_loop(layer: RoutedLowRank, x_NC: Tensor) -> Tensor:
    """What the reference does: every expert on every token, weighed by masked scores."""
    weight_NE = dense_weights(layer, x_NC)
    y_NO = x_NC.new_zeros(len(x_NC), OUT_DIM)
    for expert, scale in enumerate(layer.pool.scales):
        made_NO = F.linear(F.linear(x_NC, layer.pool.a[expert]), layer.pool.b[expert])
        y_NO = y_NO + weight_NE[:, expert, None] * (scale * made_NO)
    return y_NO


def hybrid_rows(experts: int, decided: bool, rounds: int) -> list[dict[str, Any]]:
    """DynMoLE, sparse or soft, against the dense loop and against two products."""
    kind = "hybrid" if decided else "soft"
    case = f"{kind}, {experts} experts, T={TOKENS} r={RANK} {IN_DIM} -> {OUT_DIM}"
    layer, x_NC = hybrid_layer(experts, decided), inputs()[0]
    assert layer.router is not None
    with torch.no_grad():
        check(case, layer(x_NC, RoutingContext()), dense_loop(layer, x_NC))
        active = float(layer.router(x_NC, RoutingContext()).used_NK.sum(1).float().mean())
    if decided and active > MOST_ACTIVE:
        raise SystemExit(f"{case}: tokens use {active:.2f} experts, more than {MOST_ACTIVE}")
    peers = {"dense loop": quiet(lambda: dense_loop(layer, x_NC))}
    loop = compare(case, quiet(lambda: layer(x_NC, RoutingContext())), peers, rounds=rounds, clock=clock())
    return [{**row, "active": round(active, 3)} for row in (loop, two_products_row(case, layer, rounds))]


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    start(options)
    rows: list[dict[str, Any]] = []
    has_peft = importlib.util.find_spec("peft") is not None
    if not has_peft:
        print("peft is not installed: the rows of Arrow are left out", file=sys.stderr)
    for experts in EXPERTS[: 1 if options.quick else None]:
        if has_peft and options.only in f"arrow, {experts} experts":
            rows += arrow_rows(experts, options.rounds)
        for decided, kind in ((True, "hybrid"), (False, "soft")):
            if options.only in f"{kind}, {experts} experts":
                rows += hybrid_rows(experts, decided, options.rounds)
    finish("adapter_dispatch", rows, options, ["torch", "anabranch", *(["peft", "transformers"] if has_peft else [])])


if __name__ == "__main__":
    main()
