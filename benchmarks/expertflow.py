"""How fast does a mixture of experts decode with a quarter of its experts in memory and the rest on disk?

A small Switch-like model is trained (or given with --model), its routes on other text are recorded, and a route predictor is fitted on
them. Then prompts are continued, greedily, in batches of 4 and of 16, with experts in a file whose pages the system is told to forget:

    ours             PLEC, the encoder-decoder predictor, batches in pairs with the Token Scheduler (`DualBatch`)
    LRU per layer    the same slots, threads and file, LRU with a fixed number of slots per layer (what mixtral-offloading does)
    all resident     every expert in memory
    transformers     the same weights, plain disk offload of accelerate within the same bytes (its pages stay in the page cache)

Every contestant's tokens must be equal, or the benchmark stops. Rows give milliseconds per decoded token. Disks vary from minute to
minute: with --tiers throttled the file is replaced by memory behind a wire of --bandwidth MB/s, and with int8 by quantised experts.
Bars: 1.5 times LRU per layer and the best peer at 25%.

    python benchmarks/expertflow.py --threads 1 --json benchmarks/results/expertflow.json
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _harness import arguments, compare, finish, start
from anabranch.data import BpeTokenizer, DataConfig, Tokenizer
from anabranch.lm import Decoder, SamplingConfig, export_huggingface, generate, load_model, save_model
from anabranch.nn import MoE
from anabranch.presets import language_model
from anabranch.routing import Router, SwitchLoss, TopK, ZLoss, record_routing
from anabranch.serving.expertflow import OffloadEngine, Routes, find_pools, load_offloaded, offload
from anabranch.serving.expertflow.dual_batch import DualBatch
from anabranch.serving.expertflow.expertflow import tokenizer_fingerprint
from anabranch.serving.expertflow.predictors import EncoderDecoder, RoutePredictor, load_predictor
from anabranch.serving.expertflow.predictors.encdec import Settings
from anabranch.serving.expertflow.tiers import MemoryTier, ThrottledTier
from anabranch.train import Trainer

PROMPT, WINDOW = 8, 96  # tokens that are continued; of a recorded sequence


def trained(folder: Path, options: Any) -> None:
    """Train a model whose experts are most of it, and save it.

    With the balance loss of Switch Transformers, as the models of the paper: else a few experts take all tokens, which any cache holds.
    """
    experts, hidden_dim, steps = (16, 64, 20) if options.quick else (options.experts, options.hidden_dim, options.steps)
    router = Router.Config(
        select=TopK.Config(top_k=options.top_k), balance=(SwitchLoss.Config(alpha=0.01), ZLoss.Config())
    )
    moe = MoE.Config(num_experts=experts, hidden_dim=hidden_dim, router=router)
    config = language_model(moe, dim=64 if options.quick else 192, num_layers=2 if options.quick else 6, steps=steps)
    vocab_size = 512 if options.quick else 2048
    config = config.replace(
        data=config.data.replace(tokenizer=BpeTokenizer.Config(vocab_size=vocab_size)),
        model=config.model.replace(vocab_size=vocab_size),
    )
    with tempfile.TemporaryDirectory() as run:
        trainer = Trainer(config, Path(run) / "run")
        trainer.fit()
        save_model(folder, trainer.model, trainer.data.tokenizer)


def pieces(tokenizer: Tokenizer, number: int, length: int, seed: int) -> torch.Tensor:
    """Pieces of the standard library, ``[number, length]`` token ids."""
    return DataConfig(sequence_length=length).build(tokenizer).train(seed=seed).next_batch(number).token_BL


def fitted(model: Decoder, tokenizer: Tokenizer, options: Any) -> EncoderDecoder:
    """A predictor of the model's routes, fitted on those of text."""
    parts = []
    for token_BL in pieces(tokenizer, 32 if options.quick else 4000, WINDOW, seed=1).split(16):
        with torch.inference_mode(), record_routing(model) as recorder:
            model(token_BL, last_only=True)
        parts.append(Routes.from_trace(recorder.trace()))
    found = find_pools(model)
    vocab_size = model.config.vocab_size
    # Wider than the paper's network with a smaller feed-forward: 9 steps in the time of 8, and .81 of routes right instead of .78.
    settings = Settings(dim=128, feed_forward=512, steps=9000, seconds=5 if options.quick else options.fit_s)
    begin = time.perf_counter()
    predictor = EncoderDecoder(found.fingerprint(tokenizer_fingerprint(tokenizer, model)), vocab_size, settings).fit(
        Routes.concatenate(parts)
    )
    print(
        f"predictor fitted in {time.perf_counter() - begin:.0f} s, loss {np.mean(predictor.losses[-50:]):.4f}",
        file=sys.stderr,
    )
    return predictor


def predicting(model: Decoder, tokenizer: Tokenizer, options: Any) -> RoutePredictor:
    """The predictor of ``--predictor``, or a new one."""
    if options.predictor is not None and options.predictor.exists():
        return load_predictor(options.predictor)
    made = fitted(model, tokenizer, options)
    if options.predictor is not None:
        made.save(options.predictor)
    return made


def offloaded(folder: Path, share: float, options: Any, **how: Any) -> OffloadEngine:
    """The model of ``folder`` with this share of its experts in slots."""
    whole, tokenizer = load_model(folder)
    budget = int(find_pools(whole).layout.total_bytes * share)
    if options.tier == "file":
        _, _, engine = load_offloaded(folder, budget, drop_cache=True, workers=options.workers, **how)
        return engine
    if options.tier == "throttled":
        weights = [(pool.w13, pool.w2) for pool in find_pools(whole).pools]
        tier = ThrottledTier(MemoryTier(weights), 1e-6 / options.bandwidth)
        return offload(whole.eval(), budget, tier=tier, tokenizer=tokenizer, workers=options.workers, **how)
    return offload(whole.eval(), budget, tier=options.tier, tokenizer=tokenizer, workers=options.workers, **how)


class Transformers:
    """The same weights by transformers, with accelerate's disk offload."""

    def __init__(self, folder: Path, budget_bytes: int, tokens: int, work: Path) -> None:
        from transformers import AutoModelForCausalLM, logging

        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": budget_bytes}, offload_folder=str(work), dtype=torch.float32
        ).eval()
        self.tokens = tokens

    @torch.inference_mode()
    def __call__(self, given: list[list[int]]) -> list[list[int]]:
        token_BL = torch.tensor(given)
        options = {"do_sample": False, "max_new_tokens": self.tokens, "min_new_tokens": self.tokens, "pad_token_id": 0}
        made = self.model.generate(token_BL, attention_mask=torch.ones_like(token_BL), **options)
        return made[:, token_BL.shape[1] :].tolist()


def report(name: str, engine: OffloadEngine) -> dict[str, float]:
    """What a contestant's cache did, told and kept."""
    total, stats = engine.cache.total(), engine.stats()
    found = {
        "hit_rate": round(total.hit_rate, 4),
        "late": total.late,
        "misses": total.misses,
        "bytes_moved": total.bytes_moved,
        "stall_s": round(total.stall_s, 3),
        "predict_s": round(stats.counters["expert_predict_s"], 3),
        "resident_share": round(engine.arena.bytes / engine.layout.total_bytes, 4),
    }
    print(f"{name:<16} {found}", file=sys.stderr)
    return found


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a model folder of ours; trained and saved there if it is not there")
    parser.add_argument(
        "--predictor", type=Path, help="a fitted predictor's file; fitted and saved there if it is not there"
    )
    parser.add_argument("--tiers", nargs="+", default=["file"], choices=("file", "throttled", "int8", "int4"))
    parser.add_argument("--bandwidth", type=float, default=1000.0, help="MB/s of the throttled tier")
    parser.add_argument("--share", type=float, default=0.25, help="share of the experts' bytes that is resident")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--hidden-dim", type=int, default=384)
    parser.add_argument("--steps", type=int, default=500, help="of training")
    parser.add_argument("--fit-s", type=float, default=300.0, help="seconds that the predictor is fitted")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[4, 16], help="sequences of a batch; four times as many are decoded"
    )
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--workers", type=int, default=3, help="threads that load")
    options = parser.parse_args()
    start(options)
    rounds, options.tokens = min(options.rounds, 7), 8 if options.quick else options.tokens
    with tempfile.TemporaryDirectory() as name:
        folder = options.model or Path(name) / "model"
        if not folder.exists():
            trained(folder, options)
        whole, tokenizer = load_model(folder)
        predictor, rows = predicting(whole.eval(), tokenizer, options), []
        for tier in options.tiers:
            options.tier = tier
            for batch in options.batch:
                given = pieces(tokenizer, 4 * batch, PROMPT, seed=99).tolist()  # two units, which take turns
                rows += run(folder, whole, predictor, given, batch, Path(name) / f"batch-{batch}", options, rounds)
    packages = ("torch", "anabranch", *(("transformers", "accelerate") if "file" in options.tiers else ()))
    finish("expertflow", rows, options, packages)


def run(
    folder: Path,
    whole: Decoder,
    predictor: RoutePredictor,
    given: list[list[int]],
    batch: int,
    work: Path,
    options: Any,
    rounds: int,
) -> list[dict[str, Any]]:
    """All contestants on the same prompts; a row for each but ours."""
    greedy = SamplingConfig(max_tokens=options.tokens, temperature=0.0)
    ours = offloaded(folder, options.share, options, policy="plec", predictor=predictor)
    lru = offloaded(folder, options.share, options, policy="cache_moe", predictor=None)
    pipeline = DualBatch(ours, batch_size=batch)
    others = DualBatch(lru, batch_size=batch, scheduler=None)
    # int tiers change the weights: what is to be equal then is the two that use them
    is_exact = options.tier in ("file", "throttled")
    expected = generate(whole, given, greedy) if is_exact else others.generate(given, greedy)
    contestants = {
        "ours": lambda: pipeline.generate(given, greedy),
        "LRU per layer": lambda: others.generate(given, greedy),
        "all resident": lambda: generate(whole, given, greedy),
    }
    if options.tier == "file":
        contestants["transformers"] = transformers_offload(whole, given, work, options)
    counted = {}
    for name, contestant in contestants.items():
        if contestant() != expected and (is_exact or name != "all resident"):
            raise SystemExit(f"{name} does not decode the tokens of the model")
        if name in ("ours", "LRU per layer"):  # what one pass over the prompts takes
            counted[name] = report(name, ours if name == "ours" else lru)
    rows, number = [], len(given) * options.tokens
    for name in [name for name in contestants if name != "ours"]:
        case = f"{name}, {options.tier}, {options.share:.0%} resident, batches of {batch}"
        if options.only in case:
            row = compare(case, contestants["ours"], {name: contestants[name]}, rounds=rounds)
            row |= {key: round(row[key] / number, 4) for key in ("ours", "peer")}  # a token
            objective = [pipeline.objective_before, pipeline.objective_after]
            rows.append(
                row | {"unit": "ms", "per": "token", "tokens": number, "cache": counted, "objective": objective}
            )
    ours.close()
    lru.close()
    return rows


def transformers_offload(whole: Decoder, given: list[list[int]], work: Path, options: Any) -> Callable[[], Any]:
    """The same weights in transformers, within the same bytes."""
    export_huggingface(work / "hf", whole)
    experts = find_pools(whole).layout.total_bytes
    rest = sum(weight.nbytes for weight in whole.parameters()) - experts
    peer = Transformers(work / "hf", int(rest + options.share * experts), options.tokens, work / "offload")
    return lambda: peer(given)


if __name__ == "__main__":
    main()
