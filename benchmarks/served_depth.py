"""Does a request that runs fewer blocks take as much less time, alone and beside others that run other ones?

One decoder, one engine: tokens of requests at full depth against tokens of requests that leave blocks out, each its own, and repeat some.
Peers: all blocks; and requests of different paths one after the other, as they run where they cannot share blocks. Bars: time at most
the share of blocks plus 0.02 of the time of all of them, for one request; sixteen of different paths together in at most half the time
that they take in turns (all blocks are still read, so time does not fall with the share); what routers take of a routed prompt at most
1 %: its time against the same path without them. Before they are timed, requests together are held against each by itself, and a
routed prompt against the same path: the tokens must be the same.

    python benchmarks/served_depth.py --json benchmarks/results/served_depth.avx512_bf16.json  # or of what instructions yours are
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch

from _harness import arguments, compare, finish, start
from anabranch.depth.dr_llm.bank import BankConfig, RouterBank
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.batch import Batch, Chunk
from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.engine.engine import Engine

# 12 M weights a block, 289 M in all: more than caches hold.
LAYERS, DIM, HIDDEN, VOCAB, PAST, PROMPT = 24, 1024, 2816, 4096, 128, 256
BLOCK = 16
LEFT_OUT = (6, 12)

Path = tuple[int, ...]


def model_of(seed: int = 0) -> Decoder:
    config = Decoder.Config(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=LAYERS,
        attention=SelfAttention.Config(num_heads=16, num_kv_heads=4),
        feed_forward=SwiGLU.Config(hidden_dim=HIDDEN),
        max_positions=1024,
    )
    return config.build(seed=seed).eval()


def paths_of(count: int, left_out: int, repeated: int, seed: int = 0) -> list[Path]:
    """Each without so many blocks of its own choice, and with some of the others twice."""
    draw = Random(seed)
    made = []
    for _ in range(count):
        kept = sorted(draw.sample(range(LAYERS), LAYERS - left_out))
        twice = set(draw.sample(kept, repeated))
        made.append(tuple(block for block in kept for _ in range(2 if block in twice else 1)))
    return made


class Decoding:
    """An engine whose requests all have `PAST` tokens stored.

    Args:
        engine: the engine.
        paths: of its requests; None for all blocks.
    """

    def __init__(self, engine: Engine, paths: Sequence[Path | None]) -> None:
        self._runner, self._step = engine.runner, 0
        draw, blocks = Random(1), -(-(PAST + 1) // BLOCK)
        sampling = Sampling(temperature=0.0, max_tokens=10**6, ignore_eos=True)
        prompts = [tuple(draw.randrange(VOCAB) for _ in range(PAST)) for _ in paths]
        ids = [f"{id(self)} {number}" for number in range(len(paths))]
        new = tuple(
            Request(id=name, prompt=prompt, sampling=sampling, path=path)
            for name, prompt, path in zip(ids, prompts, paths, strict=True)
        )
        tables = [tuple(range(number * blocks, (number + 1) * blocks)) for number in range(len(paths))]
        chunks = [
            Chunk(id=name, tokens=prompt, start=0, blocks=table, samples=True)
            for name, prompt, table in zip(ids, prompts, tables, strict=True)
        ]
        for place, chunk in enumerate(chunks):
            self._run([chunk], new if place == 0 else ())
        self._chunks = [
            Chunk(id=name, tokens=(7,), start=PAST, blocks=table, samples=True)
            for name, table in zip(ids, tables, strict=True)
        ]

    def _run(self, chunks: Sequence[Chunk], new: tuple[Request, ...] = ()) -> list[int]:
        self._step += 1
        return [made.token for made in self._runner.run(Batch(step=self._step, chunks=tuple(chunks), new=new))]

    def together(self) -> list[int]:
        """One more token of each, at the same place again."""
        return self._run(self._chunks)

    def in_turns(self) -> list[int]:
        """The same, each by itself."""
        return [token for chunk in self._chunks for token in self._run([chunk])]


def prefilling(engine: Engine, path: Path | None, *, routes: bool) -> Callable[[], int]:
    """A prompt that is routed, or runs along the path that it would have."""
    prompt, blocks = tuple(range(1, PROMPT + 1)), tuple(range(-(-PROMPT // BLOCK)))
    sampling, step = Sampling(temperature=0.0, max_tokens=1), [0]

    def work() -> int:
        step[0] += 1
        name = f"prompt {routes} {step[0]}"
        request = Request(id=name, prompt=prompt, sampling=sampling, path=path, routes_depth=routes)
        chunk = Chunk(id=name, tokens=prompt, start=0, blocks=blocks, samples=True)
        [made] = engine.runner.run(Batch(step=step[0], chunks=(chunk,), new=(request,)))
        engine.runner.run(Batch(step=step[0], chunks=(), gone=(name,)))
        return made.token

    return work


def check(case: str, found: object, wanted: object) -> None:
    """End where results differ."""
    if found != wanted:
        raise SystemExit(f"{case}: the tokens are {found}, and should be {wanted}")


class Asked(RouterBank):
    """Routers that work out their decisions and then say others, so that paths are what the case asks for."""

    path: Path = ()

    def decide(self, layer: int, *given: Any) -> Any:
        """See `RouterBank.decide`."""
        decision_B, probability_B3 = super().decide(layer, *given)
        return torch.full_like(decision_B, self.path.count(layer)), probability_B3


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    options = parser.parse_args()
    start(options)
    model = model_of()
    bank = Asked(BankConfig(num_blocks=LAYERS, width=DIM))
    config = ServingConfig(num_blocks=400, block_tokens=BLOCK, max_batched_tokens=PROMPT, max_depth=LAYERS + 8)
    engine = Engine.of(model, config, depth_bank=bank)
    rows: list[dict[str, Any]] = []

    def add(case: str, ours: Callable[[], Any], peers: dict[str, Callable[[], Any]]) -> None:
        if options.only in case:
            rows.append(compare(case, ours, peers, rounds=options.rounds))

    for count in (1,) if options.quick else (1, 4, 16):
        whole = Decoding(engine, [None] * count)
        for left_out in LEFT_OUT:
            few = Decoding(engine, paths_of(count, left_out, 0))
            share = f"{LAYERS - left_out} of {LAYERS} blocks"
            add(f"decode {count}, {share}", few.together, {"all blocks": whole.together})
            if count > 1:
                check(f"{count} requests, {share}", few.together(), few.in_turns())
                add(f"decode {count}, {share}, together", few.together, {"in turns": few.in_turns})
        mixed = Decoding(engine, [None, *paths_of(count - 1, 6, 2)]) if count > 1 else None
        if mixed is not None:
            check(f"{count} requests, mixed", mixed.together(), mixed.in_turns())
            add(f"decode {count}, one of them full, others of 20 runs", mixed.together, {"in turns": mixed.in_turns})
    bank.path = paths_of(1, 6, 0)[0]
    routed, fixed = prefilling(engine, None, routes=True), prefilling(engine, bank.path, routes=False)
    check("a routed prompt", routed(), fixed())
    add(f"prompt of {PROMPT} tokens, routed", routed, {"the same path, not routed": fixed})
    finish("served_depth", rows, options, ("torch", "anabranch"))


if __name__ == "__main__":
    main()
