"""What do routing by the query as a whole, and routers that adapt while a text is generated, add to all that a model does?

    global     a forward pass of 512 tokens with a pool of 32 adapters, two for each token, whose router also weighs the query's
               instruction (GLIDER; a text that the pool has not seen, its embedding and cosines included), against the same pool by
               tokens alone. The weight of cosines is 1e-6, so that both choose and compute the same, to 1e-3 of the greatest logit,
               which is checked first. bar: at most 3% more (0.97)
    generate   256 tokens with Rewiring, phase 1 of 5 steps, again each 128 tokens, against generation by the same model without, both
               greedy and with a cache; prompts of 128 and 512 tokens, with the guard and without. bar: at most 1.9 times as long (0.526)

The model of ``global`` has four of SmolLM2-135M's layers (width 576) and adapters of rank 16 on q, k, v and o; that of ``generate`` 4
layers of width 256 with 8 experts, 2 for each token. With one thread all is in the processor's time.

    python benchmarks/adapter_passes.py --threads 1 --json benchmarks/results/adapter_passes.json
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _harness import arguments, compare, finish, start
from anabranch.adapters import LowRank, save_peft
from anabranch.adapters.glider import GliderConfig, GliderPool
from anabranch.adapters.rewiring import Rerouter, Rewiring
from anabranch.lm import Decoder, SamplingConfig, generate
from anabranch.nn import MoE, SelfAttention, SwiGLU

TOKENS, EXPERTS, RANK = 512, 32, 16
TOLERANCE = 1e-3
STEPS, INTERVAL, NEW, PROMPTS = 5, 128, 256, (128, 512)
PLAIN = Decoder.Config(
    vocab_size=256,
    dim=576,
    num_layers=4,
    attention=SelfAttention.Config(num_heads=9, num_kv_heads=3),
    feed_forward=SwiGLU.Config(hidden_dim=1536),
    max_positions=TOKENS,
)
MIXTURE = Decoder.Config(
    num_layers=4, dim=256, feed_forward=MoE.Config(num_experts=8, hidden_dim=256), max_positions=PROMPTS[-1] + NEW
)


def clock() -> Callable[[], float]:
    """The processor's time where one thread works."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


# ---- the query as a whole ----


def pools(plain: Decoder.Config = PLAIN) -> tuple[tuple[GliderPool, Decoder], tuple[GliderPool, Decoder]]:
    """(with instructions, by tokens alone), each with its model: the same adapters."""
    made = []
    with tempfile.TemporaryDirectory(prefix="anabranch-bench-") as folder:
        for seed in range(EXPERTS):
            adapted = plain.replace(linears={"*.attention.*": LowRank.Config(rank=RANK)}).build(seed=seed)
            generator = torch.Generator().manual_seed(1000 + seed)
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    # New ones add nothing.
                    if name.endswith(".b"):
                        parameter.normal_(std=0.05, generator=generator)
            save_peft(Path(folder) / f"expert{seed}", adapted)
        for config in (GliderConfig(weight=1e-6), GliderConfig(instruction=False)):
            pool = GliderPool(config)
            for seed in range(EXPERTS):
                pool.add(Path(folder) / f"expert{seed}", instruction=f"Answer question {seed} about subject{seed}.")
            made.append((pool, pool.onto(plain.build(seed=0)).eval()))
    with_query, without = made
    return with_query, without


def by_query(pool: GliderPool, model: Decoder, query: str, token_BL: Tensor) -> Tensor:
    """Logits where the query counts."""
    with torch.no_grad():
        return model(token_BL, state=pool.rows([query], token_BL.shape[1])).logits_BLV


def global_row(rounds: int, plain: Decoder.Config = PLAIN) -> dict[str, Any]:
    """What the query's weighing adds to a pass."""
    (pool, model), (_, without) = pools(plain)
    token_BL = torch.randint(0, plain.vocab_size, (1, plain.max_positions), generator=torch.Generator().manual_seed(3))
    case, numbers = (
        f"global, {EXPERTS} adapters, 2 of a token, T={plain.max_positions} d={plain.dim}",
        itertools.count(),
    )

    def weighed() -> Tensor:
        number = next(numbers)
        return by_query(pool, model, f"Please answer number {number} about subject{number % EXPERTS}", token_BL)

    def by_token() -> Tensor:
        with torch.no_grad():
            return without(token_BL).logits_BLV

    ours, theirs = weighed(), by_token()
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= TOLERANCE:
        raise SystemExit(f"{case}: outputs differ by {error:.1e} of the greatest, more than {TOLERANCE:.0e}")
    return compare(case, weighed, {"by tokens alone": by_token}, rounds=rounds, clock=clock())


# ---- routers that adapt while a text is generated ----


def generation_row(length: int, *, guard: bool, rounds: int) -> dict[str, Any]:
    """A whole answer, all phases included."""
    model = MIXTURE.build(seed=0).eval()
    prompt = torch.randint(32, 127, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    config = SamplingConfig(max_tokens=NEW, temperature=0.0, stop=())
    case = f"generate, {NEW} tokens after {length}, {STEPS} steps each {INTERVAL}, {'guard' if guard else 'no guard'}"

    def rewired() -> int:
        rerouter = Rerouter(model, Rewiring(guard=guard, steps=STEPS, interval=INTERVAL))
        return sum(1 for _ in rerouter.stream([prompt], config))

    def plain() -> int:
        return len(generate(model, [prompt], config)[0])

    found, expected = rewired(), plain()
    if not found == expected == NEW:
        raise SystemExit(f"{case}: {found} tokens came rewired and {expected} without, not {NEW}")
    return compare(case, rewired, {"without": plain}, rounds=rounds, clock=clock())


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    start(options)
    rows: list[dict[str, Any]] = []
    if options.only in "global":
        rows.append(global_row(options.rounds))
    if options.only in "generate":
        rows += [
            generation_row(length, guard=guard, rounds=options.rounds)
            for length in PROMPTS[: 1 if options.quick else None]
            for guard in (True, False)
        ]
    finish("adapter_passes", rows, options, ["torch", "anabranch"])


if __name__ == "__main__":
    main()
