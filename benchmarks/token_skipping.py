"""How much sooner is a long prompt read when blocks pass over tokens (FTP), and what does deciding cost?

A model of the shape of SmolLM2-135M with weights that were drawn (times do not depend on them), one prompt of 2,048 tokens, S = 0.3 and
0.4 with a uniform schedule and exact budgets. Ours is `TokenSkipper.prefill`; the peer is the prefill of the same model that passes over
nothing. Bar: a ratio of at least 0.8 times that of multiply-adds in blocks. Who decides: places alone, also where keys and values of what
is passed over are made all the same; the router of 450 parameters with new attention scores in each block, in every fourth, or once behind
the first block. The share of the time that is the router's alone is timed apart; its bar is 2% of a block.

Served, the same by the engine: a prompt that is pruned against one that is not, in one step, with the same bar, and a token behind either
(bar: at most 1.05 times as long). What the engine computes and the token that it gives are first held against the skipper's own.

    python benchmarks/token_skipping.py --json benchmarks/results/token_skipping.json
"""

from collections.abc import Callable
from typing import Any

import torch

from _harness import arguments, compare, finish, start
from anabranch.depth.ftp import FactorConfig, TokenRouter, TokenSkipper, factors_of, uniform_schedule
from anabranch.depth.ftp.router import decide
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.batch import Batch, Chunk, Sampled
from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.engine.engine import Engine

SPARSITIES = (0.3, 0.4)
LENGTH, QUICK_LENGTH = 2048, 256
DECIDERS: dict[str, dict[str, Any]] = {
    "places": {"router": "static"},
    "places, keys kept": {"router": "static", "kv": "keep"},
    "each block": {},
    "every 4th": {"factors": FactorConfig(refresh=4)},
    "one pass": {"one_pass": True},
}
SERVED = ("places", "places, keys kept", "each block")
BAR, MOST_OF_BLOCK = 0.8, 0.02
BLOCK = 16


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


class Served:
    """An engine with a skipper, and one prompt.

    Args:
        model: the model.
        skipper: of it.
        ids: the prompt.
    """

    def __init__(self, model: Decoder, skipper: TokenSkipper, ids: list[int]) -> None:
        blocks = -(-(len(ids) + 2) // BLOCK)
        config = ServingConfig(num_blocks=3 * blocks, block_tokens=BLOCK, max_batched_tokens=len(ids))
        self._runner = Engine.of(model, config, skipper=skipper).runner
        self._ids, self._step = tuple(ids), 0
        self._tables = {skips: tuple(range(skips * blocks, (skips + 1) * blocks)) for skips in (False, True)}
        for skips in (False, True):
            self.prefill(f"kept {skips}", skips=skips)

    def prefill(self, name: str, *, skips: bool) -> Sampled:
        """Read the prompt."""
        sampling = Sampling(temperature=0.0, max_tokens=10**6, ignore_eos=True)
        request = Request(id=name, prompt=self._ids, sampling=sampling, skips_tokens=skips)
        return self._run(
            Chunk(id=name, tokens=self._ids, start=0, blocks=self._tables[skips], samples=True), (request,)
        )

    def reading(self, *, skips: bool) -> Callable[[], None]:
        """What reads it again and again."""

        def work() -> None:
            self.prefill("again", skips=skips)
            self._runner.run(Batch(step=self._step, chunks=(), gone=("again",)))

        return work

    def decoding(self, *, skips: bool) -> Callable[[], None]:
        """What makes the same token behind it again and again."""
        chunk = Chunk(id=f"kept {skips}", tokens=(7,), start=len(self._ids), blocks=self._tables[skips], samples=True)
        return lambda: self._run(chunk) and None

    def _run(self, chunk: Chunk, new: tuple[Request, ...] = ()) -> Sampled:
        self._step += 1
        [made] = self._runner.run(Batch(step=self._step, chunks=(chunk,), new=new))
        return made


def served_rows(
    model: Decoder, case: str, sparsity: float, options: dict[str, Any], ids: torch.Tensor, rounds: int
) -> list[dict[str, Any]]:
    """One decider at one sparsity, in an engine."""
    router = options.get("router") or TokenRouter(seed=0)
    more = {name: value for name, value in options.items() if name != "router"}
    skipper = TokenSkipper(model, uniform_schedule(sparsity, len(model.blocks)), router, **more)
    alone = skipper.prefill(ids)
    served = Served(model, skipper, ids[0].tolist())
    made = served.prefill("checked", skips=True)
    wanted = tuple(alone.keep_IBL[:, 0].sum(1).tolist()), int(alone.logits_BV.argmax())
    if (made.computed, made.token) != wanted:
        raise SystemExit(f"{case}: the engine computed and gave {made.computed, made.token}, the skipper {wanted}")
    bar = round(BAR / (1 - alone.report.saved), 3)
    reading = compare(
        f"served, {case}", served.reading(skips=True), {"whole": served.reading(skips=False)}, rounds=rounds
    )
    decoding = compare(
        f"served, a token behind {case}",
        served.decoding(skips=True),
        {"whole": served.decoding(skips=False)},
        rounds=rounds,
    )
    return [{**reading, "bar": bar}, {**decoding, "bar": 0.95}]


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
            if options.only in f"served, {case}" and name in SERVED:
                rows += served_rows(model, case, sparsity, settings, ids, options.rounds)
    if options.only in "router":
        rows.append(router_row(model, ids, options.rounds))
    finish("token_skipping", rows, options, ("torch", "anabranch"))


if __name__ == "__main__":
    main()
