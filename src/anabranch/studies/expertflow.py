"""Can routes be predicted before a model runs, and what are predictions worth to a small cache of experts?

"ExpertFlow: Efficient Mixture-of-Experts Inference via Predictive Expert Caching and Token Scheduling", He et al., arXiv 2410.17954 (v2).

Arms are small models, Switch-like: E experts in each layer, top 1 or 2. Each is trained on Python sources and C headers, its routes are
recorded, a Routing Path Predictor is fitted on those of the Python part, and everything is measured on held-out text, decoded in
lock-step: BS sequences a batch, the first ``prompt`` tokens given. Two batches take turns (the paper's dual-batch pipeline), so that the
next batch's routes are known. A cache of CS experts per layer (L CS slots in all) is replayed in simulated time, see
`anabranch.serving.expertflow.simulate`: a layer computes for one unit, in which the channel moves ``rate`` experts (4, or any number).

- B_acc, batch-level accuracy: mean over layers and batches of the share of a batch's experts that were predicted. Ours names k + 1
  experts of each token; ``bacc_rpp_k`` names k, as TLP and SLP do.
- hit ratio: the share of accesses (distinct experts of a batch and layer) whose bytes are there when the router has spoken.

Paper: B_acc over 90% in most in-domain cases, 5 to 10 points less cross-domain, TLP and SLP mostly under 20 to 30%; hits of PLEC 15 to 36
points above LRU's (Switch-32), more for larger batches; regrouping of tokens 1.03, 1.15, 1.17 times the tokens a second for 32, 64, 128.

The rule, fixed before any run, per seed and in every arm, and to hold in every seed: B_acc at BS 4 at least 85%, and (with k experts) at
least TLP + 20 points; hits at rate 4 at least those of the better LRU (one for all layers, or fixed slots per layer) + 15 points at
CS of E/4 and E/2 and BS 4 and 16, and at least 90% of Belady's on demand; the gap at BS 16 above that at BS 4 (mean over CS); with
regrouping more tokens a second, and the gain larger at 128 experts than at 32 (top 1). Tiny models route mostly by token id, which
makes prediction easier than on a large one.
"""
# Shapes: S sequences, T tokens, L routed layers, E experts, B tokens of a batch

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from anabranch.config import Config, Field, configclass
from anabranch.data import BpeTokenizer
from anabranch.data.corpus import Domain, Files, Mixture, Stdlib
from anabranch.errors import DataError
from anabranch.files import atomic_file, atomic_write_text
from anabranch.nn.moe import MoE
from anabranch.report.style import GRID, INK, MARKERS, SERIES, figure, to_png, to_svg
from anabranch.routing import Router, SwitchLoss, TopK, ZLoss, record_routing
from anabranch.serving.expertflow import Expert, Layout, Routes
from anabranch.serving.expertflow.cache import ExpertCache
from anabranch.serving.expertflow.policy import CacheMoe, make_policy
from anabranch.serving.expertflow.predictors import EncoderDecoder, Fingerprint, Frequency
from anabranch.serving.expertflow.predictors.base import Naming, Row, choose
from anabranch.serving.expertflow.predictors.encdec import Settings
from anabranch.serving.expertflow.routes import union_accuracy
from anabranch.serving.expertflow.simulate import replay
from anabranch.serving.expertflow.token_scheduler import TokenScheduler
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import every_seed
from anabranch.studies.size import RunSize
from anabranch.studies.training import train_and_measure
from anabranch.train import RunConfig, Trainer

# Experts that the channel moves while a layer computes, in what is judged.
RATE = 4.0
POINTS = 0.15
SIZES, BATCHES = ("4", "2"), (4, 16)  # CS = E / size

COLUMNS = (
    Column("bacc_rpp_4", "B_acc\nRPP", ".3f"),
    Column("bacc_rpp_k_4", "RPP,\nk only", ".3f"),
    Column("bacc_tlp_4", "TLP", ".3f"),
    Column("bacc_cross_4", "cross-\ndomain", ".3f"),
    Column("hit_lru_4_16", "LRU\nE/4, BS 16", ".3f"),
    Column("hit_plec_4_16", "PLEC", ".3f"),
    Column("hit_belady_4_16", "Belady", ".3f"),
    Column("ts_gain", "TS\ntokens/s", ".3f"),
    Column("bits_per_byte", "bits/byte", ".3f"),
)


@configclass
class Size(RunSize):
    """What is the same for all arms.

    Attributes:
        hidden_dim: width of an expert.
        vocab_size: of the byte-pair tokenizer.
        fit_sequences: recorded for the predictor.
        test_sequences: of held-out text.
        prompt: tokens that are given.
        decoded: tokens that are decoded of each sequence.
        fit_steps: of the predictor's training.
        fit_s: seconds after which it ends all the same; never reached in a recorded run, which must not depend on what else runs.
    """

    num_layers: int = Field(default=4, ge=1)
    hidden_dim: int = 64
    vocab_size: int = 2048
    steps: int = Field(default=500, ge=1)
    fit_sequences: int = 1500
    test_sequences: int = 64
    prompt: int = 64
    decoded: int = 64
    fit_steps: int = 1500
    fit_s: float = 7200.0


@configclass
class Case(Config):
    """An arm: a run of training, and what is done with the model."""

    run: RunConfig
    size: Size


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    smoke = {
        "num_layers": 2,
        "dim": 64,
        "hidden_dim": 32,
        "steps": 40,
        "sequence_length": 64,
        "vocab_size": 512,
        "fit_sequences": 48,
        "test_sequences": 32,
        "prompt": 16,
        "decoded": 8,
        "fit_steps": 60,
    }
    size = Size(**(changes if full else {**smoke, **changes}))
    shapes = [(32, 1), (64, 1), (128, 1), (64, 2)] if full else [(16, 1), (32, 1)]
    return Study(
        name="expertflow",
        title="routes predicted before a model runs, and caches of experts that use them",
        settings=size.settings(full),
        arms=[_arm(size, experts, top_k, full) for experts, top_k in shapes],
        seeds=(0, 1, 2, 3, 4) if full else (0,),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
    )


def _arm(size: Size, experts: int, top_k: int, full: bool) -> Arm:
    router = Router.Config(select=TopK.Config(top_k=top_k), balance=(SwitchLoss.Config(alpha=0.01), ZLoss.Config()))
    config = size.run_of(MoE.Config(num_experts=experts, hidden_dim=size.hidden_dim, router=router))
    data = config.data.replace(tokenizer=BpeTokenizer.Config(vocab_size=size.vocab_size))
    if full:
        data = data.replace(corpus=corpus())
    model = config.model.replace(vocab_size=size.vocab_size)
    return Arm(
        f"e{experts}k{top_k}",
        f"{experts} experts, top {top_k}",
        Case(run=config.replace(data=data, model=model), size=size),
    )


def corpus() -> Mixture.Config:
    """Python, in which the predictor is at home, and C headers, in which it is not."""
    headers = Files.Config(paths=("/usr/include",), pattern="*.h", max_bytes=8_000_000)
    return Mixture.Config(
        domains={"python": Domain(corpus=Stdlib.Config(include_docs=False)), "headers": Domain(corpus=headers)}
    )


def run(case: Case, seed: int, progress: Progress) -> Metrics:
    """Train one model, then predict and replay its routes."""
    return train_and_measure(case.run, seed, progress, also=lambda trainer: measure(trainer, case.size, seed, progress))


def measure(trainer: Trainer, size: Size, seed: int, progress: Progress) -> Metrics:
    """All numbers of a trained model."""
    fit, _ = recorded(trainer, size.fit_sequences, "train")
    test, cross = recorded(trainer, size.test_sequences, "validation")
    fingerprint = Fingerprint(test.num_experts, test.top_k, "study")
    settings = Settings(seconds=size.fit_s, steps=size.fit_steps, seed=seed)
    begin = time.process_time()
    predictor = EncoderDecoder(fingerprint, size.vocab_size, settings).fit(fit, progress)
    found: Metrics = {
        "fit_cpu_s": time.process_time() - begin,
        "fit_steps": len(predictor.losses),
        "predictor_parameters": predictor.num_parameters,
    }
    frequency = Frequency(fingerprint, size.vocab_size).fit(fit)
    progress("measuring predictions")
    decoded = Decoded(test, size, {"rpp": probabilities(predictor, size), "freq": probabilities(frequency, size)})
    found |= accuracies(decoded)
    if cross is not None:
        other = Decoded(cross, size, {"rpp": probabilities(predictor, size)})
        found["bacc_cross_4"] = other.accuracy("rpp", 4).recall
    progress("replaying caches")
    return {**found, **cache_hits(decoded, size, progress), **regrouping(decoded, size)}


def recorded(trainer: Trainer, sequences: int, part: str) -> tuple[Routes, Routes | None]:
    """Routes of Python's sequences, and of the headers' where the corpus has them."""
    data, parts = trainer.data, 2 if isinstance(trainer.config.data.corpus, Mixture.Config) else 1
    made: list[list[Routes]] = [[] for _ in range(parts)]
    left = [sequences] * parts
    trainer.model.eval()
    with torch.inference_mode():
        for batch in _batches(data, sequences, part):
            place_B = batch.domain_B if parts > 1 else torch.zeros_like(batch.domain_B)
            for number in range(parts):
                token_BL = batch.token_BL[place_B == number][: left[number]]
                left[number] -= len(token_BL)
                if len(token_BL):
                    with record_routing(trainer.model) as recorder:
                        trainer.model(token_BL, last_only=True)
                    made[number].append(Routes.from_trace(recorder.trace()))
            if not any(left):
                break
    joined = [Routes.concatenate(found) for found in made]
    return joined[0], joined[1] if parts > 1 else None


def _batches(data: Any, sequences: int, part: str) -> Iterator[Any]:
    """Of held-out text, or of the text trained on, in another order."""
    if part == "validation":
        yield from data.validation(batch_size=8, num_windows=64 * sequences)
        return
    stream = data.train(seed=1)
    for _ in range(sequences):
        yield stream.next_batch(8)


Predict = Callable[[np.ndarray], np.ndarray]


def probabilities(predictor: EncoderDecoder | Frequency, size: Size) -> Predict:
    """prob_TLE of the decoded tokens of a sequence; one pass gives what decoding token by token does."""

    def predict(token_S: np.ndarray) -> np.ndarray:
        ids = token_S[: size.prompt + size.decoded]
        found = predictor.predict(ids[size.prompt :], [Row("sequence", ids, len(ids) - size.prompt, size.prompt)])
        predictor.forget("sequence")
        assert found is not None
        return found

    return predict


class Decoded:
    """Held-out sequences, decoded in lock-step, and what was predicted of them."""

    def __init__(self, routes: Routes, size: Size, predictors: dict[str, Predict]) -> None:
        self.layout = Layout.plain(routes.num_experts, routes.top_k)
        self.size, rows = (
            size,
            [rows for rows in routes.sequences() if rows.stop - rows.start >= size.prompt + size.decoded],
        )
        if not rows:
            raise DataError(
                f"0 held-out sequences have the {size.prompt + size.decoded} tokens that are prompt and decoded"
            )
        part = slice(size.prompt, size.prompt + size.decoded)
        before = slice(part.start - 1, part.stop - 1)
        self.chosen_STLE = np.stack([routes.chosen(one)[part] for one in rows])
        self.prob = {
            name: np.stack([predict(routes.token_N[one]) for one in rows]) for name, predict in predictors.items()
        }
        slp = np.zeros_like(self.chosen_STLE)
        slp[:, :, 1:] = self.chosen_STLE[:, :, :-1]
        self.prob |= {
            "tlp": np.stack([routes.chosen(one)[before] for one in rows]).astype(np.float32),
            "slp": slp.astype(np.float32),
        }

    def groups(self, batch: int) -> list[np.ndarray]:
        """Sequences of each batch, an even number of batches. Raises DataError if there are not enough for two."""
        whole = len(self.chosen_STLE) // (2 * batch) * 2
        if not whole:
            raise DataError(
                f"{len(self.chosen_STLE)} held-out sequences are too few for two batches of {batch}; {2 * batch} are needed"
            )
        return [np.arange(number * batch, (number + 1) * batch) for number in range(min(whole, 4))]

    def expected(self, sequences: np.ndarray, token: int) -> list[list[Expert]]:
        """Experts that an engine loads for a batch, by layer."""
        return Naming().step(self.prob["rpp"][sequences, token], self.layout, EncoderDecoder.is_calibrated)

    def named(self, name: str, sequences: np.ndarray, token: int, extra: int) -> list[list[Expert]]:
        """The k + extra likeliest experts of each token of a batch, together, by layer."""
        prob_BLE = self.prob[name][sequences, token]
        return [choose(prob_BLE[:, layer], self.layout, layer, extra) for layer in range(self.layout.num_layers)]

    def wanted(self, sequences: np.ndarray, token: int) -> list[list[Expert]]:
        """Experts that a batch goes to, by layer."""
        union_LE = self.chosen_STLE[sequences, token].any(0)
        return [[Expert(layer, int(one)) for one in np.flatnonzero(row_E)] for layer, row_E in enumerate(union_LE)]

    def accuracy(self, name: str, batch: int, extra: int = 1):
        """Of all batches of this size."""
        shape = self.chosen_STLE.shape[2:]
        wanted, predicted = [], []
        for sequences in self.groups(batch):
            for token in range(self.size.decoded):
                wanted.append(self.chosen_STLE[sequences, token].any(0))
                union_LE = np.zeros(shape, bool)
                for layer, experts in enumerate(self.named(name, sequences, token, extra)):
                    union_LE[layer, [expert.number for expert in experts]] = True
                predicted.append(union_LE)
        return union_accuracy(np.stack(wanted), np.stack(predicted))

    def steps(self, batch: int) -> list[tuple[np.ndarray, int]]:
        """(sequences, token) of every forward pass: two batches take turns."""
        groups = self.groups(batch)
        return [
            (sequences, token)
            for first in range(0, len(groups), 2)
            for token in range(self.size.decoded)
            for sequences in groups[first : first + 2]
        ]


def accuracies(decoded: Decoded) -> Metrics:
    """B_acc, precision and number of predicted experts of each predictor at each batch size."""
    found: Metrics = {}
    for batch in (1, *BATCHES):
        for name, kind, extra in (
            ("rpp", "rpp", 1),
            ("rpp_k", "rpp", 0),
            ("freq", "freq", 1),
            ("tlp", "tlp", 0),
            ("slp", "slp", 0),
        ):
            accuracy = decoded.accuracy(kind, batch, extra)
            found |= {
                f"bacc_{name}_{batch}": accuracy.recall,
                f"precision_{name}_{batch}": accuracy.precision,
                f"predicted_{name}_{batch}": accuracy.predicted,
            }
            found[f"wanted_{batch}"] = accuracy.wanted
    return found


def cache_hits(decoded: Decoded, size: Size, progress: Progress) -> Metrics:
    """``hit_POLICY_SIZE_BATCH`` at rate 4 and, of policies that load ahead, ``..._any`` without a limit; loads per access and stalls."""
    found: Metrics = {}
    experts = decoded.layout.num_experts[0]
    for batch in BATCHES:
        steps = decoded.steps(batch)
        wanted = [decoded.wanted(*step) for step in steps]
        predicted = [decoded.expected(*step) for step in steps]
        for name in SIZES:
            slots = max(decoded.layout.num_layers * (experts // int(name)), decoded.layout.least_bytes(per_layer=True))
            for policy, known, horizon, is_ahead in POLICY_RUNS:
                reference = {"none": None, "rpp": predicted, "true": wanted}[known]
                for rate in (RATE, 0.0) if is_ahead else (RATE,):
                    made = CacheMoe(spares=0) if policy == "lru_layer" else make_policy(policy.removesuffix("_true"))
                    cache = ExpertCache(decoded.layout, slots, made)
                    total, seconds = replay(
                        cache,
                        wanted,
                        reference,
                        seconds_per_byte=1 / rate if rate else 0.0,
                        horizon=len(wanted) if horizon is None else horizon,
                    )
                    label = f"{policy}_{name}_{batch}" + ("" if rate else "_any")
                    found[f"hit_{label}"] = total.hit_rate
                    found[f"loads_{label}"] = total.loads / total.accesses
                    found[f"stall_{label}"] = total.stall_s / seconds
            progress(f"replayed caches of E/{name}, batches of {batch}")
    return found


# (policy, what it knows, batches ahead, whether it loads ahead)
POLICY_RUNS = (
    ("lru", "none", 1, False),
    ("lru_layer", "none", 1, False),
    ("lfu", "none", 1, False),
    ("random", "none", 1, False),
    ("cache_moe", "none", 1, False),
    ("se_moe", "none", 1, True),
    ("belady_true", "true", None, False),
    ("lru_ahead", "rpp", 2, True),
    ("plec", "rpp", 2, True),
    ("plec_true", "true", 2, True),
)


def regrouping(decoded: Decoded, size: Size, batch: int = 16) -> Metrics:
    """The Token Scheduler on predictions: experts of two batches, and tokens per simulated second, regrouped over as they were."""
    while 2 * batch > len(decoded.chosen_STLE):
        batch //= 2
    layout, scheduler = decoded.layout, TokenScheduler()
    slots = layout.num_layers * (layout.num_experts[0] // 4)
    orders: dict[str, list[np.ndarray]] = {"off": [], "on": []}
    before = after = 0
    spent_s = []
    groups = decoded.groups(batch)
    tokens = []
    for first in range(0, len(groups), 2):
        both = np.concatenate(groups[first : first + 2])
        for token in range(size.decoded):
            prob_XLE = decoded.prob["rpp"][both, token]
            begin = time.perf_counter()
            plan = scheduler.regroup(top(prob_XLE, layout))
            spent_s.append(time.perf_counter() - begin)
            for name, order in (("off", both), ("on", both[plan.order_X])):
                orders[name] += [order[:batch], order[batch:]]
                unions = [decoded.chosen_STLE[part, token].any(0).sum() for part in (order[:batch], order[batch:])]
                before, after = (before + sum(unions), after) if name == "off" else (before, after + sum(unions))
            tokens += [token, token]
    rate = {}
    for name, parts in orders.items():
        steps = list(zip(parts, tokens, strict=True))
        wanted = [decoded.wanted(*step) for step in steps]
        predicted = [decoded.expected(*step) for step in steps]
        cache = ExpertCache(layout, max(slots, layout.least_bytes()), make_policy("plec"))
        _, seconds = replay(cache, wanted, predicted, seconds_per_byte=1 / RATE, horizon=2)
        rate[name] = batch * len(steps) / seconds
    return {
        "ts_objective_ratio": float(after / before),
        "ts_gain": rate["on"] / rate["off"],
        "ts_ms": 1e3 * float(np.median(spent_s)),
    }


def top(prob_XLE: np.ndarray, layout: Layout) -> np.ndarray:
    """bool, the k likeliest experts of each token and layer."""
    chosen_XLE = np.zeros(prob_XLE.shape, bool)
    for layer, places in enumerate(layout.top_k):
        index = np.argpartition(prob_XLE[:, layer], -places, axis=-1)[:, -places:]
        np.put_along_axis(chosen_XLE[:, layer], index, True, axis=-1)
    return chosen_XLE


# judging


class Sides(NamedTuple):
    """One arm and seed: what was measured of the baseline (None: nothing is), what ours must reach, and ours."""

    baseline: float | None
    limit: float
    ours: float


def above(baseline: float, by: float, ours: float) -> Sides:
    """Ours must be above the baseline by so much; below it by so much at most where that is negative."""
    return Sides(baseline, baseline + by, ours)


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    arms = list(results.runs)

    def least(claim: str, paper: str, of: Callable[[Metrics], Sides], only: Sequence[str] = ()) -> Claim:
        """Ours must reach the limit in the arm of each seed that is farthest below its own."""
        worst: list[Sides] = []
        for seed in results.seeds:
            sides = [of(results.runs[arm][seed]) for arm in only or arms if seed in results.runs.get(arm, {})]
            if sides:
                worst.append(min(sides, key=lambda side: side.ours - side.limit))
        if not worst:
            return Claim.not_run(claim, paper)
        limit, ours = (float(np.mean([getattr(side, name) for side in worst])) for name in ("limit", "ours"))
        verdict = every_seed([side.limit <= side.ours for side in worst])
        measured = [side.baseline for side in worst if side.baseline is not None]
        if not measured:
            return Claim.against(limit, claim, paper, ours, verdict)
        baseline = float(np.mean(measured))
        return Claim(claim, paper, baseline, ours, ours - baseline, None, verdict, limit=limit)

    def lru(metrics: Metrics, size: str, batch: int) -> float:
        return max(metrics[f"hit_{name}_{size}_{batch}"] for name in ("lru", "lru_layer"))

    def gap(metrics: Metrics, batch: int) -> float:
        return float(np.mean([metrics[f"hit_plec_{size}_{batch}"] - lru(metrics, size, batch) for size in SIZES]))

    claims = [
        least(
            "E1: B_acc of the route predictor at BS 4 is at least 0.85",
            "> 0.90",
            lambda m: Sides(None, 0.85, m["bacc_rpp_4"]),
        ),
        least(
            "E1: B_acc is at least TLP's + 0.20 (k experts each)",
            "TLP mostly < 0.3",
            lambda m: above(m["bacc_tlp_4"], 0.20, m["bacc_rpp_k_4"]),
        ),
    ]
    for size in SIZES:
        for batch in BATCHES:
            name = f"E1: PLEC hits at least LRU + 0.15, CS E/{size}, BS {batch}"
            claims.append(
                least(
                    name,
                    "+0.15 to +0.36",
                    lambda m, s=size, b=batch: above(lru(m, s, b), POINTS, m[f"hit_plec_{s}_{b}"]),  # type: ignore[misc]
                )
            )
    claims += [
        least(
            "E1: PLEC hits at least 90% of Belady, every CS and BS",
            "-",
            lambda m: min(
                (
                    Sides(best := m[f"hit_belady_true_{s}_{b}"], 0.9 * best, m[f"hit_plec_{s}_{b}"])
                    for s in SIZES
                    for b in BATCHES
                ),
                key=lambda side: side.ours - side.limit,
            ),
        ),
        least(
            "E1: the gap to LRU grows with the batch (BS 16 against 4)",
            "15 to 28 (CS 16)",
            lambda m: above(gap(m, 4), 1e-9, gap(m, 16)),
        ),
        least(
            "E3: regrouping gives more tokens a second", "1.03 to 1.17", lambda m: Sides(None, 1 + 1e-9, m["ts_gain"])
        ),
        least(
            "E4: prediction alone hits more than LRU, CS E/4, BS 16",
            "-",
            lambda m: above(lru(m, "4", 16), 1e-9, m["hit_lru_ahead_4_16"]),
        ),
        least(
            "E4: and the plan hits more than that",
            "-",
            lambda m: above(m["hit_lru_ahead_4_16"], 1e-9, m["hit_plec_4_16"]),
        ),
    ]
    crossed = [arm for arm in arms if results.values(arm, "bacc_cross_4")]
    name, paper = "E1: B_acc on another domain is lower by at most 0.10", "0.05 to 0.10 lower"
    cross = least(name, paper, lambda m: above(m["bacc_rpp_4"], -0.10, m["bacc_cross_4"]), only=crossed or ("none",))
    return [*claims, _grows(results), cross]


def _grows(results: Results) -> Claim:
    small, large = (results.values(arm, "ts_gain") for arm in ("e32k1", "e128k1"))
    seeds = sorted(small.keys() & large.keys())
    claim, paper = "E3: the gain is larger with 128 experts than with 32", "1.03, 1.17"
    if not seeds:
        return Claim.not_run(claim, paper)
    few, many = (float(np.mean([values[seed] for seed in seeds])) for values in (small, large))
    return Claim(claim, paper, few, many, many - few, None, every_seed([large[seed] > small[seed] for seed in seeds]))


def draw(results: Results, path: Path) -> None:
    """Left, B_acc of each predictor at BS 4; right, hits of each cache at CS E/4 and BS 16."""
    arms = list(results.runs)
    left_of = {"bacc_rpp_4": "RPP", "bacc_freq_4": "frequency", "bacc_tlp_4": "TLP", "bacc_slp_4": "SLP"}
    right_of = {
        f"hit_{name}_4_16": label
        for name, label in {
            "lru": "LRU",
            "lru_layer": "LRU by layer",
            "lfu": "LFU",
            "se_moe": "SE-MoE",
            "lru_ahead": "LRU + RPP",
            "plec": "PLEC",
            "belady_true": "Belady",
        }.items()
    }
    with figure(10, max(3.4, 1.6 + 0.4 * len(arms)), ncols=2, sharey=True) as (made, panels):
        made.suptitle("ExpertFlow at our scale", x=0.01, ha="left", fontweight="bold", color=INK)
        for axes, shown, title in zip(
            panels, (left_of, right_of), ("B_acc, BS 4", "hit ratio, CS E/4, BS 16"), strict=True
        ):
            for number, (metric, label) in enumerate(shown.items()):
                values = [results.mean(arm, metric).mean for arm in arms]
                axes.plot(
                    values,
                    range(len(arms)),
                    MARKERS[number % len(MARKERS)],
                    color=SERIES[number % len(SERIES)],
                    label=label,
                )
            axes.set_yticks(range(len(arms)), arms)
            axes.set_xlabel(title)
            axes.grid(axis="x", color=GRID)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)
        panels[0].set_ylim(len(arms) - 0.5, -0.5)
        png, svg = to_png(made), to_svg(made)
    with atomic_file(path.with_name(f"{path.name}.png")) as temporary:
        temporary.write_bytes(png)
    atomic_write_text(path.with_name(f"{path.name}.svg"), svg)
