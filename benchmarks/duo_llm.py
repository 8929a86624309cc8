"""What does an oracle over all routes save by sharing prefixes, and what does a token save by taking the small module?

Oracle: ours against one forward pass per route, written as leanly as a loop can be, and against the same loop through the decoder. All
three find the same minima, which is checked first. Bars: at least 4 times fewer layer passes at 12 layers (counted, not timed).
Routed forward: a quarter of the tokens at big, the rest at small, against all tokens at big. Bar: at most 0.6 of the time for
widths of 192 and more (ratio at least 1.67), of the feed-forward and of the whole model.

    python benchmarks/duo_llm.py --json benchmarks/results/duo_llm.avx512_bf16.json  # or of what instructions yours are
"""
# Shapes: B sequences, L tokens, Y layers, D width

import itertools
from typing import Any

import torch
from torch import Tensor

from _harness import arguments, compare, finish, start
from anabranch.depth.duo_llm import BIG, DuoFFN, RouteSpace, duo_layers, oracle, take
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention
from anabranch.nn.context import ForwardContext

VOCAB = 257
ORACLES = [(6, 96, 8, 64), (8, 96, 8, 64), (10, 96, 4, 64)]  # layers, width, sequences, tokens of each
FORWARDS = [(4, 192, 16, 128), (4, 384, 16, 128)]
TOLERANCE = 1e-4  # largest difference of a loss in nats


def duo_model(layers: int, dim: int) -> Decoder:
    return Decoder.Config(
        vocab_size=VOCAB,
        dim=dim,
        num_layers=layers,
        attention=SelfAttention.Config(num_heads=4),
        feed_forward=DuoFFN.Config(big=4 * dim, small=dim // 4),
    ).build(seed=0)


def loss_of(logits_BLV: Tensor, target_BL: Tensor) -> Tensor:
    return -logits_BLV.log_softmax(-1).gather(-1, target_BL.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def lean_loop(model: Decoder, ids_BL: Tensor) -> Tensor:
    """The lowest loss of each token over all routes, every route from the start, without any router."""
    token_BL, target_BL = ids_BL[:, :-1], ids_BL[:, 1:]
    context = model.context(token_BL)
    best_BL = torch.full(target_BL.shape, torch.inf)
    for route in itertools.product((0, 1), repeat=len(model.blocks)):
        x_BLD = model.embedding(token_BL)
        for option, block in zip(route, model.blocks, strict=True):
            x_BLD = x_BLD + block.attention(block.attention_norm(x_BLD), context)
            x_BLD = x_BLD + block.feed_forward.option(block.feed_forward_norm(x_BLD), option)
        torch.minimum(best_BL, loss_of(model.logits(model.norm(x_BLD)), target_BL), out=best_BL)
    return best_BL


@torch.no_grad()
def decoder_loop(model: Decoder, ids_BL: Tensor) -> Tensor:
    """The same through the decoder, each route as a tensor."""
    token_BL, target_BL = ids_BL[:, :-1], ids_BL[:, 1:]
    best_BL = torch.full(target_BL.shape, torch.inf)
    for route in itertools.product((0, 1), repeat=len(model.blocks)):
        route_BLY = torch.tensor(route).expand(*token_BL.shape, len(route))
        logits_BLV = model(token_BL, state=take(route_BLY)).logits_BLV
        torch.minimum(best_BL, loss_of(logits_BLV, target_BL), out=best_BL)
    return best_BL


def oracle_row(case: str, layers: int, dim: int, batch: int, length: int, rounds: int) -> dict[str, Any]:
    model = duo_model(layers, dim).eval()
    ids_BL = torch.randint(0, VOCAB, (batch, length + 1), generator=torch.Generator().manual_seed(1))
    found = oracle(model, ids_BL, chunk=batch)
    for loop in (lean_loop, decoder_loop):
        difference = (found.loss_GBL[0] - loop(model, ids_BL)).abs().max().item()
        if not difference <= TOLERANCE:
            raise SystemExit(f"{case}: {loop.__name__} finds minima that differ by {difference:.1e}")
    peers = {
        "lean loop": lambda: lean_loop(model, ids_BL),
        "loop of decoder": lambda: decoder_loop(model, ids_BL),
    }
    row = compare(case, lambda: oracle(model, ids_BL, chunk=batch), peers, rounds=rounds)
    passes, naive = found.report.layer_passes, found.report.naive_layer_passes
    return {**row, "layer_passes_ours": passes, "layer_passes_peer": naive, "passes_ratio": round(naive / passes, 2)}


def forward_rows(layers: int, dim: int, batch: int, length: int, rounds: int, only: str) -> list[dict[str, Any]]:
    model = duo_model(layers, dim).eval()
    generator = torch.Generator().manual_seed(1)
    token_BL = torch.randint(0, VOCAB, (batch, length), generator=generator)
    count = batch * length
    order_YN = torch.stack([torch.randperm(count, generator=generator) for _ in range(layers)])
    route_BLY = (order_YN < count // 4).T.reshape(
        batch, length, layers
    ).long() * BIG  # exactly a quarter in every layer
    x_BLD = torch.randn(batch, length, dim, generator=generator)
    layer = duo_layers(model)[0]

    def feed_forward(route: Any) -> None:
        with torch.no_grad():
            layer(x_BLD, ForwardContext(position_BL=token_BL, rotary=(x_BLD, x_BLD), state=take(route)))

    def whole(route: Any) -> None:
        with torch.no_grad():
            model(token_BL, state=take(route))

    rows = []
    for what, work in (("feed-forward", feed_forward), ("model", whole)):
        case = f"{what} 25% big d={dim} T={count}"
        if only in case:
            rows.append(
                compare(case, lambda: work(route_BLY), {"all big": lambda: work("big")}, rounds=rounds)  # noqa: B023
            )
    return rows


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    start(options)
    rows = []
    space = RouteSpace(12)
    saved = 12 * space.num_routes / space.tree_passes
    if saved < 4:
        raise SystemExit(f"at 12 layers sharing prefixes saves {saved:.1f} times the layer passes, not 4")
    for layers, dim, batch, length in ORACLES[: 1 if options.quick else None]:
        case = f"oracle L={layers} d={dim} {2**layers} routes"
        if options.only in case:
            rows.append(oracle_row(case, layers, dim, batch, length, options.rounds))
    for shape in FORWARDS[: 1 if options.quick else None]:
        rows += forward_rows(*shape, rounds=options.rounds, only=options.only)
    finish("duo_llm", rows, options, ("torch", "anabranch"))


if __name__ == "__main__":
    main()
