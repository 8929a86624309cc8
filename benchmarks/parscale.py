"""What do parallel streams cost when a model answers one request, and when it trains?

The same decoder with 1, 2, 4 and 8 streams. Decoding one sequence reads every weight once for all streams, so P = 4 should cost little more
than P = 1. Peers: the plain model; the plain model on P sequences (what streams must not be slower than); four passes one after the
other (what sharing the read saves). Bars: decode at batch 1, P = 4 at most twice the plain model (ratio at least 0.5).

    python benchmarks/parscale.py --json benchmarks/results/parscale.avx512_bf16.json  # or of what instructions yours are
"""
# Shapes: B sequences, L tokens

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from _harness import arguments, compare, finish, start
from anabranch.experts.parscale import ParScale, add_streams, fold
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU

LAYERS, DIM, HIDDEN, VOCAB, PAST, ROOM = 8, 1024, 2816, 4096, 128, 160  # 101 M weights in blocks: more than caches hold
TOLERANCE = 1e-3  # largest difference of fp32 logits


def plain_model() -> Decoder:
    return Decoder.Config(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=LAYERS,
        attention=SelfAttention.Config(num_heads=16, num_kv_heads=4),
        feed_forward=SwiGLU.Config(hidden_dim=HIDDEN),
    ).build(seed=0)


def decode(model: Decoder, token_BL: Tensor, passes: int = 1) -> Callable[[], None]:
    """One more token after `PAST` cached ones; the cache is set back each time."""
    cache = model.new_cache(ROOM)
    with torch.inference_mode():
        model(token_BL[:, :PAST], cache=cache)

    def work() -> None:
        with torch.inference_mode():
            for _ in range(passes):
                cache.length = PAST
                model(token_BL[:, PAST : PAST + 1], cache=cache)

    return work


def training(model: Decoder, token_BL: Tensor) -> Callable[[], None]:
    def work() -> None:
        model.zero_grad(set_to_none=True)
        model(token_BL, token_BL).loss.backward()

    return work


def check(model: Decoder, token_BL: Tensor) -> None:
    """Cached decoding gives what a whole pass gives."""
    cache = model.new_cache(ROOM)
    with torch.inference_mode():
        model(token_BL[:, :PAST], cache=cache)
        ours = model(token_BL[:, PAST : PAST + 1], cache=cache).logits_BLV
        error = (ours - model(token_BL[:, : PAST + 1], last_only=True).logits_BLV).abs().max().item()
    if not error <= TOLERANCE:
        raise SystemExit(f"cached logits differ by {error:.1e}, more than {TOLERANCE:.0e}")


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    start(options)
    token_BL = torch.randint(0, VOCAB, (8, PAST + 1), generator=torch.Generator().manual_seed(0))
    plain = plain_model().eval()
    streams = {number: add_streams(plain, number, init="normal") for number in (2, 4, 8)}
    rows: list[dict[str, Any]] = []

    def add(case: str, ours: Callable[[], Any], peers: dict[str, Callable[[], Any]]) -> None:
        if options.only in case:
            rows.append(compare(case, ours, peers, rounds=options.rounds))

    for number, model in streams.items():
        check(model, token_BL[:1])
        one, many = token_BL[:1], token_BL[:1].repeat(number, 1)
        ours = decode(model, one)
        add(f"decode 1 sequence, P = {number} against P = 1", ours, {"P = 1": decode(plain, one)})
        add(f"decode 1 sequence, P = {number} against {number} sequences", ours, {"batch": decode(plain, many)})
        add(f"decode 1 sequence, P = {number} against {number} passes", ours, {"passes": decode(plain, one, number)})
    if not options.quick:
        add("decode 8 sequences, P = 4 against P = 1", decode(streams[4], token_BL), {"P = 1": decode(plain, token_BL)})
    small = plain.config.replace(num_layers=2, dim=256, feed_forward=SwiGLU.Config(hidden_dim=704))
    learned = small.replace(streams=ParScale.Config(num_streams=4, prefix_len=16, embedding_dim=32, mlp_dim=16)).build()
    few = small.build()
    add("training 1032 tokens, P = 4 against P = 1", training(learned, token_BL), {"P = 1": training(few, token_BL)})
    direct = fold(learned)
    add(
        "training 1032 tokens, network of prefixes against none",
        training(learned, token_BL),
        {"direct": training(direct, token_BL)},
    )
    finish("parscale", rows, options, ("torch", "anabranch"))


if __name__ == "__main__":
    main()
