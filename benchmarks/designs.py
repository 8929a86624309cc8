"""What does each design cost against a plain mixture of experts of equal FLOPs?

Ours is a preset's model; the peer is the plain `moe` preset whose experts are made wider or narrower until a token's forward FLOPs are
the same (within 1%; the row says what is left). Training is forward, backward and fresh gradients of 2048 tokens; decoding is one more
token after 64 cached ones. Bars: training at most 1.15 times the peer's time (ratio at least 0.87), decoding at most 1.1 times (0.91).

    python benchmarks/designs.py --json benchmarks/results/designs.json
"""
# Shapes: B sequences, L tokens

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from _harness import arguments, compare, finish, start
from anabranch import presets
from anabranch.lm import Decoder

DIM, LENGTH, BATCH, PAST = 256, 256, 8, 64
STEP = 16  # widths of experts that the kernels take


def model_config(preset: str) -> Decoder.Config:
    return presets.find(preset)("tiny").model.replace(dim=DIM)


def plain_peer(config: Decoder.Config) -> Decoder.Config:
    """The plain model whose experts are as wide as makes a token's FLOPs those of ``config``."""
    plain = model_config("moe")
    wanted = config.count(LENGTH).flops
    made = [
        plain.replace(feed_forward=plain.feed_forward.replace(hidden_dim=width)) for width in range(STEP, 4096, STEP)
    ]
    return min(made, key=lambda peer: abs(peer.count(LENGTH).flops - wanted))


def training(model: Decoder, token_BL: Tensor) -> Callable[[], None]:
    def work() -> None:
        model.zero_grad(set_to_none=True)
        model(token_BL, token_BL).loss.backward()

    return work


def decode(model: Decoder, token_BL: Tensor) -> Callable[[], None]:
    """One more token after the cached ones; the cache is set back each time."""
    model.eval()
    cache = model.new_cache(PAST + 16)
    with torch.inference_mode():
        model(token_BL[:1, :PAST], cache=cache)

    def work() -> None:
        cache.length = PAST
        with torch.inference_mode():
            model(token_BL[:1, PAST : PAST + 1], cache=cache)

    return work


def check_decoding(model: Decoder, token_BL: Tensor) -> None:
    """Cached and uncached agree, or there is nothing to time."""
    model.eval()
    with torch.inference_mode():
        cache = model.new_cache(PAST)
        cached = [model(part_BL, cache=cache).logits_BLV for part_BL in token_BL[:1, :PAST].split([PAST - 1, 1], dim=1)]
        error = (torch.cat(cached, dim=1) - model(token_BL[:1, :PAST]).logits_BLV).abs().max().item()
    if not error <= 1e-3:
        raise SystemExit(f"cached and uncached logits differ by {error:.1e}")


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    start(options)
    token_BL = torch.randint(0, 256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    for name in presets.group("family"):
        if name == "moe" or options.only not in name:
            continue
        config = model_config(name)
        peer = plain_peer(config)
        flops = config.count(LENGTH).flops / peer.count(LENGTH).flops
        for case, work in (("training 2048 tokens", training), ("decoding", decode)):
            models = [made.build(seed=0).train() for made in (config, peer)]
            check_decoding(models[0], token_BL)
            ours, theirs = (work(model.train(), token_BL) for model in models)
            row = compare(f"{name}, {case}", ours, {"moe of equal FLOPs": theirs}, rounds=options.rounds)
            rows.append({**row, "flops_ratio": round(flops, 4)})
    finish("designs", rows, options, ["torch"])


if __name__ == "__main__":
    main()
