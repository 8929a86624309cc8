"""How much sooner is a long prompt read when blocks pass over tokens (FTP), and what does deciding cost?

A model of the shape of SmolLM2-135M with weights that were drawn (times do not depend on them), one prompt of 2,048 tokens, S = 0.3 and
0.4 with a uniform schedule and exact budgets. Ours is `TokenSkipper.prefill`; the peer is the prefill of the same model that passes over
nothing. Bar: a ratio of at least 0.8 times that of multiply-adds in blocks. Who decides: places alone; the router of 450 parameters with
new attention scores in each block, in every fourth, or once behind the first block. The share of the time that is the router's alone is
timed apart; its bar is 2% of a block.

    python benchmarks/token_skipping.py --json benchmarks/results/token_skipping.json
"""

from typing import Any

import torch

from _harness import arguments, compare, finish, start
from anabranch.depth.ftp import FactorConfig, TokenRouter, TokenSkipper, factors_of, uniform_schedule
from anabranch.depth.ftp.router import decide
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU

SPARSITIES = (0.3, 0.4)
LENGTH, QUICK_LENGTH = 2048, 256
DECIDERS: dict[str, dict[str, Any]] = {
    "places": {"router": "static"},
    "each block": {},
    "every 4th": {"factors": FactorConfig(refresh=4)},
    "one pass": {"one_pass": True},
}
BAR, MOST_OF_BLOCK = 0.8, 0.02


def model_of(layers: int) -> Decoder:
    """SmolLM2-135M, but for its vocabulary, which is not timed."""
    config = Decoder.Config(
        vocab_size=1024,
        dim=576,
        num_layers=layers,
        attention=SelfAttention.Config(num_heads=9, num_kv_heads=3),
        feed_forward=SwiGLU.Config(hidden_dim=1536),
        max_positions=8192,
    )
    return config.build(seed=0).eval()


def row(
    model: Decoder, case: str, sparsity: float, options: dict[str, Any], ids: torch.Tensor, rounds: int
) -> dict[str, Any]:
    """One decider at one sparsity."""
    layers = len(model.blocks)
    router = options.get("router") or TokenRouter(seed=0)
    more = {name: value for name, value in options.items() if name != "router"}
    ours = TokenSkipper(model, uniform_schedule(sparsity, layers), router, **more)
    dense = TokenSkipper(model, [0.0] * layers)
    report = ours.prefill(ids).report
    flop_ratio = 1 / (1 - report.saved)
    found = compare(case, lambda: ours.prefill(ids), {"dense": lambda: dense.prefill(ids)}, rounds=rounds)
    return {
        **found,
        "flop_ratio": round(flop_ratio, 3),
        "sparsity": round(report.sparsity, 4),
        "bar": round(BAR * flop_ratio, 3),
    }


def router_row(model: Decoder, ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    """The router on all tokens once, against one dense block. Its bar is a ratio, too: 50 times as quick."""
    router, real = TokenRouter(seed=0), torch.ones_like(ids, dtype=torch.bool)
    score = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) / ids.shape[1]

    @torch.no_grad()
    def decides() -> None:
        decide(router(factors_of(score, real, 0.3, FactorConfig())), real, 0.3, "topk")

    context = model.context(ids)
    x = model.embed(ids).detach()

    @torch.no_grad()
    def block() -> None:
        model.blocks[1](x, context)

    found = compare(f"router N={ids.shape[1]}", decides, {"a block": block}, rounds=rounds)
    return {**found, "bar": 1 / MOST_OF_BLOCK}


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    start(options)
    model = model_of(4 if options.quick else 30)
    length = QUICK_LENGTH if options.quick else LENGTH
    ids = torch.randint(0, 1024, (1, length), generator=torch.Generator().manual_seed(1))
    rows = []
    for sparsity in SPARSITIES:
        for name, settings in DECIDERS.items():
            case = f"prefill N={length} S={sparsity} {name}"
            if options.only in case:
                rows.append(row(model, case, sparsity, settings, ids, options.rounds))
    if options.only in "router":
        rows.append(router_row(model, ids, options.rounds))
    finish("token_skipping", rows, options, ("torch", "anabranch"))


if __name__ == "__main__":
    main()
