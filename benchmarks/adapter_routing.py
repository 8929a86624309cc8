"""How long does a model take with six routed adapters, three for each token, against the same model with one?

    forward    a mixture of LoRA-Mixer, sparse, against one LoRA of the same rank on the same matrices (q, k, v and o). The experts are six
               copies of that one, so both compute the same, to 1e-4 of the greatest logit, which is checked first. Code knows nothing of
               their being alike, and rows say how evenly routers used them. bar: at most 1.3 times as long (0.77), the paper's ratio

A decoder of SmolLM2-135M's layers (width 576, 9 heads of which 3 for keys, feed-forward of 1,536), four of its thirty and with a
vocabulary of bytes, whose head takes no time worth speaking of: 512 tokens, rank 8 and 32, float32, forward alone; with one thread in the
processor's time.

    python benchmarks/adapter_routing.py --threads 1 --json benchmarks/results/adapter_routing.json
"""
# Shapes: B rows, L positions, E experts

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _harness import arguments, compare, finish, start
from anabranch.adapters import LowRank, load_mixture, load_peft, mixture_report, save_peft
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU

TOKENS, EXPERTS, TOP_K, RANKS = 512, 6, 3, (8, 32)
TOLERANCE = 1e-4
PLAIN = Decoder.Config(
    vocab_size=256,
    dim=576,
    num_layers=4,
    attention=SelfAttention.Config(num_heads=9, num_kv_heads=3),
    feed_forward=SwiGLU.Config(hidden_dim=1536),
    max_positions=TOKENS,
)


def contestants(rank: int, plain: Decoder.Config = PLAIN) -> tuple[Decoder, Decoder]:
    """(the mixture, the model with one adapter), with the same numbers in both."""
    adapted = plain.replace(linears={"*.attention.*": LowRank.Config(rank=rank, alpha=2.0 * rank)}).build(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            # New ones add nothing.
            if name.endswith(".b"):
                parameter.normal_(std=0.05, generator=generator)
    with tempfile.TemporaryDirectory(prefix="anabranch-bench-") as folder:
        place = Path(folder) / "adapter"
        save_peft(place, adapted)
        one = load_peft(place, plain.build(seed=0))
        six = load_mixture({str(number): place for number in range(EXPERTS)}, plain.build(seed=0), top_k=TOP_K)
    return six.eval(), one.eval()


def inputs(plain: Decoder.Config = PLAIN) -> Tensor:
    return torch.randint(0, plain.vocab_size, (1, plain.max_positions), generator=torch.Generator().manual_seed(3))


def check(case: str, six: Decoder, one: Decoder, token_BL: Tensor) -> None:
    """Raises SystemExit where the two compute other numbers."""
    with torch.no_grad():
        ours, theirs = six(token_BL).logits_BLV, one(token_BL).logits_BLV
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= TOLERANCE:
        raise SystemExit(f"{case}: outputs differ by {error:.1e} of the greatest, more than {TOLERANCE:.0e}")


def passing(model: Decoder, token_BL: Tensor) -> Callable[[], None]:
    def work() -> None:
        with torch.no_grad():
            model(token_BL)

    return work


def row(rank: int, rounds: int) -> dict[str, Any]:
    """One rank."""
    case, token_BL = f"forward, top {TOP_K} of {EXPERTS}, T={TOKENS} d={PLAIN.dim} r={rank}", inputs()
    six, one = contestants(rank)
    check(case, six, one, token_BL)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    made = compare(case, passing(six, token_BL), {"one LoRA": passing(one, token_BL)}, rounds=rounds, clock=clock)
    loads = [facts.load for facts in mixture_report(six, [(token_BL, None, None)]).routers]
    return {**made, "least_over_most_load": round(min(min(load) / max(load) for load in loads), 3)}


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    start(options)
    ranks = RANKS[: 1 if options.quick else None]
    finish("adapter_routing", [row(rank, options.rounds) for rank in ranks], options, ["torch", "anabranch"])


if __name__ == "__main__":
    main()
