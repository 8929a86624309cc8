"""What does each design cost against a plain mixture of experts of equal FLOPs?

Ours is a preset's model; the peer is the plain `moe` preset whose experts are made wider or narrower until a token's forward FLOPs are
the same (within 1%; the row says what is left). Training is forward, backward and fresh gradients of 2048 tokens; decoding is one more
token after 64 cached ones, by the model itself, and by the compiled step that `anabranch serve` and `LLM` run where it knows both models.
Bars: training at most 1.15 times the peer's time (ratio at least 0.87), decoding at most 1.1 times (0.91).

    python benchmarks/designs.py --json benchmarks/results/designs.avx512_bf16.json  # or of what instructions yours are
"""
# Shapes: B sequences, L tokens

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from _harness import arguments, compare, finish, start
from anabranch import presets
from anabranch.lm import Decoder
from anabranch.nn.kernels.memory import keep_freed_memory
from anabranch.serving.fast import FastDecoder

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


BLOCK_TOKENS = 16


class Served:
    """The compiled step with a store of keys and values of its own."""

    def __init__(self, model: Decoder) -> None:
        attention: Any = model.eval().blocks[0].attention
        slots = (PAST // BLOCK_TOKENS + 1) * BLOCK_TOKENS
        shape = len(model.blocks), slots, attention.num_kv_heads, attention.head_dim
        self.fast = FastDecoder(model, torch.zeros(shape), torch.zeros(shape), block_tokens=BLOCK_TOKENS)
        self.table_U = np.arange(slots // BLOCK_TOKENS, dtype=np.int32)

    @torch.inference_mode()
    def step(self, token_L: Tensor, past: int) -> Tensor:
        """logits_LV of tokens behind ``past`` others."""
        position_L = torch.arange(past, past + len(token_L))
        sequence_N4 = np.array([[0, len(token_L), past, 0]], dtype=np.int64)
        return self.fast.logits(self.fast.hidden(token_L, position_L, sequence_N4, self.table_U)[0])


def served(model: Decoder, token_BL: Tensor) -> Callable[[], None]:
    """`decode` by the compiled step, after a look at whether it computes the same."""
    step, token_L = Served(model), token_BL[0]
    found_LV = torch.cat([step.step(token_L[:PAST], 0), step.step(token_L[PAST : PAST + 1], PAST)])
    with torch.inference_mode():
        error = (found_LV - model(token_BL[:1, : PAST + 1]).logits_BLV[0]).abs().max().item()
    if not error <= 1e-3:
        raise SystemExit(f"logits of the compiled step differ by {error:.1e}")

    def work() -> None:
        step.step(token_L[PAST : PAST + 1], PAST)

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
    keep_freed_memory()  # as the trainer does
    token_BL = torch.randint(0, 256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    for name in presets.group("family"):
        if name == "moe" or options.only not in name:
            continue
        config = model_config(name)
        peer = plain_peer(config)
        flops = config.count(LENGTH).flops / peer.count(LENGTH).flops
        cases = [("training 2048 tokens", training), ("decoding", decode)]
        if FastDecoder.supports(config.build().eval()) is None:
            cases.append(("decoding, compiled step", served))
        for case, work in cases:
            models = [made.build(seed=0).train() for made in (config, peer)]
            check_decoding(models[0], token_BL)
            ours, theirs = (work(model.train(), token_BL) for model in models)
            row = compare(f"{name}, {case}", ours, {"moe of equal FLOPs": theirs}, rounds=options.rounds)
            rows.append({**row, "flops_ratio": round(flops, 4)})
    finish("designs", rows, options, ["torch"])


if __name__ == "__main__":
    main()
