"""What does an attention with routed heads cost while all are on, and what does it spare where they are off?

    all on      a wrapped attention as it starts, which computes what the plain one does, against that: inference, and a step of
                training. bar: at most 1.10 times its time (a ratio of 0.91)
    half off    every second (routed head, stretch of 256 tokens) is off, against the plain attention, which does all: inference. bar: at
                most 0.85 times its time (1.18). Results are compared first with those of the same heads computed and multiplied by 0
    head off    every second routed head is off for all tokens, whose products are spared too. the same bar
    as PVChat   the same with 8 of 12 heads shared, where half of the routed ones are a sixth of all: no bar
    served      a decoder whose heads are all on, or a third of them off (those of one key head), against the same without a gate, both by
                the compiled step: a token behind 512 others, alone in its step, and the prompt. bar: at most 1.10 times its time (0.91)
                while all are on; less than its time (1) with a third off. Logits are compared first with those of the modules

Ours of the shape of SmolLM2-135M (576 wide, 9 heads, each three of which share keys, causal), torch's of 512 and 8 heads, and of
PVChat's Q-former (768, 12 heads; 96 queries on 1,024 keys); the decoder has 8 blocks of SmolLM2's. float32.

    python benchmarks/routed_heads.py --threads 2 --json benchmarks/results/routed_heads.json
"""
# Shapes: B sequences, L queries, S keys, W width, H heads

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from _harness import arguments, compare, finish, start
from anabranch.heads import RoutedHeads, put_heads, routed_heads_of
from anabranch.lm import Decoder
from anabranch.nn import BuildContext, ForwardContext, Rotary, SelfAttention, SwiGLU
from anabranch.serving.fast import FastDecoder

BLOCK, PAST = 256, 512
TOLERANCE = 1e-4
Call = Callable[[nn.Module], Tensor]


def ours(batch: int, length: int) -> tuple[nn.Module, Tensor, Call]:
    """(attention, what its queries are made of, a call of it)."""
    torch.manual_seed(0)
    attention = SelfAttention.Config(num_heads=9, num_kv_heads=3).build(BuildContext(dim=576))
    x_BLW = torch.randn(batch, length, 576)
    position_BL = torch.arange(length).expand(batch, length)
    rotary = Rotary.Config().build(64)(position_BL[:1], torch.float32)

    def call(module: nn.Module) -> Tensor:
        context = ForwardContext(position_BL=position_BL, rotary=rotary, training=module.training)
        return module(x_BLW, context)

    return attention, x_BLW, call


def torchs(batch: int, length: int, keys: int, width: int, heads: int) -> tuple[nn.Module, Tensor, Call]:
    """The same of a `torch.nn.MultiheadAttention`; it attends to others where ``keys`` is not 0."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(width, heads, batch_first=True)
    x_BLW = torch.randn(batch, length, width)
    other = torch.randn(batch, keys, width) if keys else x_BLW

    def call(module: nn.Module) -> Tensor:
        return module(x_BLW, other, other, need_weights=False)[0]

    return attention, x_BLW, call


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor, Call]], int]] = {
    "ours, 4 x 512 tokens": (lambda: ours(4, 512), 3),
    "ours, 1 x 2048 tokens": (lambda: ours(1, 2048), 3),
    "torch's, 4 x 512 tokens": (lambda: torchs(4, 512, 0, 512, 8), 2),
}
AS_PVCHAT = {
    "self, 12 heads, 16 x 96 queries": (lambda: torchs(16, 96, 0, 768, 12), 8),
    "cross, 12 heads, 8 x 96 queries on 1,024 keys": (lambda: torchs(8, 96, 1024, 768, 12), 8),
}


def turn_half_off(heads: RoutedHeads, x_BLW: Tensor, stretch: int) -> None:
    """Change what comes in so that every second (routed head, stretch of tokens) is off: its number of the width says so."""
    gate = heads.gate
    assert gate is not None
    routed = gate.router.num_destinations
    batch, length = x_BLW.shape[:2]
    place_J = torch.arange(-(-length // stretch))
    # One stretch is the whole: the same heads in all sequences.
    row_B = torch.arange(batch) * (stretch < length)
    is_on = (row_B[:, None, None] + place_J[:, None] + torch.arange(routed)) % 2 == 0
    x_BLW[..., :routed] = is_on.repeat_interleave(stretch, 1)[:, :length].float() * 2 - 1
    with torch.no_grad():
        gate.router.score.weight.zero_()
        gate.router.score.weight[:, :routed] = torch.eye(routed)
        gate.router.score.bias.zero_()


def inference(module: nn.Module, call: Call) -> Callable[[], None]:
    module.eval()

    def work() -> None:
        with torch.inference_mode():
            call(module)

    return work


def training(module: nn.Module, call: Call) -> Callable[[], None]:
    module.train()

    def work() -> None:
        module.zero_grad(set_to_none=True)
        total = call(module).square().mean()
        if isinstance(module, RoutedHeads):
            total = total + module.losses()
        total.backward()

    return work


def check(case: str, found: Tensor, expected: Tensor) -> None:
    error = ((found - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE:
        raise SystemExit(f"{case}: results differ by {error:.1e}, more than {TOLERANCE:.0e}")


def all_on(name: str, made: tuple[nn.Module, Tensor, Call], shared: int, rounds: int) -> list[dict[str, Any]]:
    attention, _, call = made
    heads = RoutedHeads(copy.deepcopy(attention), shared)
    with torch.inference_mode():
        check(name, call(heads.eval()), call(attention.eval()))
    rows = []
    for mode, work in (("inference", inference), ("training", training)):
        case = f"all on, {name}, {mode}"
        rows.append(compare(case, work(heads, call), {"the plain attention": work(attention, call)}, rounds=rounds))
    return rows


def half_off(name: str, made: tuple[nn.Module, Tensor, Call], shared: int, rounds: int, what: str) -> dict[str, Any]:
    attention, x_BLW, call = made
    heads = RoutedHeads(copy.deepcopy(attention), shared, block=BLOCK).eval()
    turn_half_off(heads, x_BLW, x_BLW.shape[1] if what.startswith("head off") else BLOCK)
    case = f"{what}, {name}"
    with torch.inference_mode():
        heads.forget()
        spared = call(heads)
        told = heads.report()
        heads.skip = False
        check(case, spared, call(heads))
        heads.skip = True
    row = compare(case, inference(heads, call), {"the plain attention": inference(attention, call)}, rounds=rounds)
    return {**row, "computed": round(told["computed"], 3), "multiply_adds_spared": round(told["saved"], 3)}


def served(off: int | None) -> tuple[Decoder, FastDecoder]:
    """A decoder and its compiled step; of its routed heads so many are off, and None has no gates."""
    model: Decoder = Decoder.Config(
        vocab_size=1024,
        dim=576,
        num_layers=8,
        attention=SelfAttention.Config(num_heads=9, num_kv_heads=3),
        feed_forward=SwiGLU.Config(hidden_dim=1536),
        max_positions=1024,
    ).build(seed=0)
    if off is not None:
        model = put_heads(model, 6)
        for heads in routed_heads_of(model).values():
            assert heads.gate is not None
            with torch.no_grad():
                heads.gate.router.score.bias[:off] = -1.0
    shape = (8, 1024, 3, 64)
    return model.eval(), FastDecoder(model.eval(), torch.zeros(shape), torch.zeros(shape), block_tokens=16)


def stepping(fast: FastDecoder, first: int, count: int) -> Callable[[], Tensor]:
    """What computes ``count`` tokens from position ``first`` on; the same ones each time."""
    token_T = torch.arange(first, first + count) * 7 % 1024
    sequence, table = np.array([[0, count, first, 0]], np.int64), np.arange(64, dtype=np.int32)
    return lambda: fast.hidden(token_T, torch.arange(first, first + count), sequence, table)[0]


@torch.inference_mode()
def served_rows(rounds: int, only: str) -> list[dict[str, Any]]:
    rows = []
    _, plain = served(None)
    stepping(plain, 0, PAST)()
    for name, off in (("all on", 0), ("a third off", 3)):
        model, fast = served(off)
        prompt = stepping(fast, 0, PAST)
        wanted = model(torch.arange(PAST)[None] * 7 % 1024).logits_BLV[0]
        check(f"served, {name}", fast.logits(prompt()), wanted)
        for what, first, count in (("a token", PAST, 1), ("a prompt", 0, PAST)):
            case = f"served, {name}, {what}"
            if only in case:
                peers = {"the model without gates": stepping(plain, first, count)}
                rows.append(compare(case, stepping(fast, first, count), peers, rounds=rounds))
    return rows


def main() -> None:
    options = arguments(str(__doc__)).parse_args()
    start(options)
    rows: list[dict[str, Any]] = []
    for name, (make, shared) in list(CASES.items())[: 1 if options.quick else None]:
        if options.only in f"all on, {name}":
            rows += all_on(name, make(), shared, options.rounds)
        if options.only in f"half off, {name}":
            rows.append(half_off(name, make(), shared, options.rounds, "half off"))
        if options.only in f"head off, {name}":
            rows.append(half_off(name, make(), shared, options.rounds, "head off"))
    for name, (make, shared) in list(AS_PVCHAT.items())[: 0 if options.quick else None]:
        if options.only in f"as PVChat, {name}":
            rows.append(half_off(name, make(), shared, options.rounds, "as PVChat"))
    if options.only in "served" or options.only.startswith("served"):
        rows += served_rows(options.rounds, options.only)
    finish("routed_heads", rows, options, ["torch"])


if __name__ == "__main__":
    main()
