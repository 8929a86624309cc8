"""How fast is VersatileFFN's early exit, against looping the whole batch to the end, and against four loops of every token?

All are one feed-forward with its norm and residual, outside training, on the same weights. Tokens take 1, 2, 3 and 4 loops equally
often, so 2.5 on average; with T=1 four tokens run one after the other. ``all loops`` is what the published code does for a batch (every
token loops to L_max, the width path for all), with our shared first loop in it; ``4 loops`` has neither heads nor width path. The
virtual experts as a stacked pool (``grouped``) are timed too. Bars: 1.3 against all loops, 1.2 against 4 loops.

    python benchmarks/versatile.py --json benchmarks/results/versatile.avx512_bf16.json  # or of what instructions yours are
"""
# Shapes: T tokens, D width, F hidden width

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from _harness import arguments, compare, finish, start
from anabranch.experts.versatile import VersatileFFN
from anabranch.nn import BuildContext, ForwardContext, RMSNorm
from anabranch.routing import RoutingContext

SHAPES = [(512, 1536), (1024, 2816)]
TOKENS = [1, 64, 1024]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {
    "fp32": 1e-4,
    "bf16": 0.1,
}  # relative to the largest change; in bf16 states of four loops are rounded apart


def layers(dim: int, hidden_dim: int, dtype: torch.dtype) -> dict[str, VersatileFFN]:
    """The contestants on one set of weights; heads as far apart as tokens are, so that all loop counts come up."""
    options: dict[str, dict[str, Any]] = {
        "ours": {},
        "all loops": {"early_exit": False},
        "grouped": {"width_compute": "grouped"},
        "4 loops": {"fusion": "depth_only", "gate": "none"},
    }
    made = {}
    for name, changes in options.items():
        context = BuildContext(dim, init_std=0.05, generator=torch.Generator().manual_seed(0))
        made[name] = VersatileFFN.Config(hidden_dim=hidden_dim, **changes).build(context).to(dtype).eval()
        if name != "ours":
            made[name].load_state_dict(made["ours"].state_dict(), strict=False)
    return made


def tokens_of_every_kind(layer: VersatileFFN, count: int, dtype: torch.dtype) -> Tensor:
    """x_TD with equally many tokens of 1, 2, 3 and 4 loops, in random order."""
    assert layer.paths.loops is not None
    x_ND = torch.randn(max(64, 16 * count), layer.w2.out_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    loops_N = layer.paths.loops(x_ND, RoutingContext()).index_NK[:, 0]
    chosen = torch.cat([(loops_N == number).nonzero()[: count // 4, 0] for number in range(4)])
    assert len(chosen) == count
    return x_ND[chosen[torch.randperm(count, generator=torch.Generator().manual_seed(2))]]


def runner(layer: VersatileFFN, norm: RMSNorm, batches: list[Tensor]) -> Callable[[], list[Tensor]]:
    position_BL = torch.zeros(1, 1, dtype=torch.int64)
    context = ForwardContext(position_BL=position_BL, rotary=(position_BL, position_BL))  # of no use to a layer

    def work() -> list[Tensor]:
        context.metrics.clear()
        with torch.no_grad():
            return [layer.add_to(x_BLD, norm, context) for x_BLD in batches]

    return work


def check(case: str, ours: list[Tensor], theirs: list[Tensor], batches: list[Tensor], tolerance: float) -> None:
    """The same output up to rounding."""
    change = max((y - x).abs().max().item() for x, y in zip(batches, theirs, strict=True))
    error = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) / change
    if not error <= tolerance:
        raise SystemExit(f"{case}: outputs differ by {error:.1e}, more than {tolerance:.0e}")


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    start(options)
    rows = []
    for dim, hidden_dim in SHAPES:
        for label, dtype in DTYPES.items():
            if options.quick and (dim > 512 or label == "bf16"):
                continue
            made, norm = layers(dim, hidden_dim, dtype), RMSNorm(dim).to(dtype)
            for count in TOKENS:
                case = f"T={count} d={dim} h={hidden_dim} {label}"
                if options.only not in case:
                    continue
                x_TD = tokens_of_every_kind(made["ours"], max(count, 4), dtype)
                batches = [x_BLD.unsqueeze(0) for x_BLD in (x_TD.split(1) if count == 1 else [x_TD])]
                works = {name: runner(layer, norm, batches) for name, layer in made.items()}
                for name in ("all loops", "grouped"):
                    check(f"{case} {name}", works["ours"](), works[name](), batches, TOLERANCE[label])
                for peer in ("all loops", "4 loops", "grouped"):
                    row = compare(f"{case} against {peer}", works["ours"], {peer: works[peer]}, rounds=options.rounds)
                    rows.append({**row, "shape": (count, dim, hidden_dim)})
    finish("versatile", rows, options, ("torch", "anabranch"))


if __name__ == "__main__":
    main()
