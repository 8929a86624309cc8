"""A seed of the study of FTP: its rows, what is fitted on them, and what arms measure."""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.depth.ftp import (
    Evaluation,
    RouterConfig,
    ScheduleConfig,
    TokenRouter,
    TokenSkipper,
    TrainingConfig,
    equal_work_path,
    evaluate_items,
    evaluate_path,
    evaluate_truncated,
    finetune_schedule,
    search_schedule,
    train_router,
    uniform_schedule,
)
from anabranch.depth.ftp.memo import FitMemo, digest_of
from anabranch.depth.genetic import GeneticConfig
from anabranch.depth.influence import block_influence
from anabranch.depth.stack import BlockStack, stack_of
from anabranch.errors import ConfigError
from anabranch.lm import Decoder
from anabranch.places import cache_folder
from anabranch.studies.ftp_peers import by_kvpress, by_llmlingua, running
from anabranch.studies.ftp_rows import Counts, Kind, made_rows, rows_of
from anabranch.studies.harness import Metrics, Progress
from anabranch.studies.small_model import find_weights

# Arms of packages that run elsewhere, and the type in which they do.
PEERS, PEERS_DTYPE = ("llmlingua", "kvpress"), "float32"


@configclass
class Size(Config):
    """What all arms share.

    Attributes:
        model: ``smollm2``, or a small ``made`` one that has learned nothing, with made rows.
        sparsity: S.
        calibration, learned, judged: rows.
        context_calibration: contexts instead of ``calibration`` rows.
        population, generations: of each search.
        steps: of a router.
        threads: of the processor.
        dtype: of SmolLM2, in which all of it runs but what is compared with packages that run in float32.
    """

    model: Literal["smollm2", "made"] = "smollm2"
    sparsity: float = 0.3
    calibration: int = Field(default=40, ge=1)
    learned: int = Field(default=200, ge=0)
    judged: int = Field(default=100, ge=1)
    context_calibration: int = Field(default=20, ge=1)
    population: int = Field(default=12, ge=2)
    generations: int = Field(default=8, ge=0)
    steps: int = Field(default=500, ge=1)
    threads: int = Field(default=1, ge=1)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @property
    def schedule(self) -> ScheduleConfig:
        """Of the searches."""
        return ScheduleConfig(genetic=GeneticConfig(population=self.population, generations=self.generations))

    def counts(self, kind: Kind) -> Counts:
        """Of rows."""
        return Counts(self.context_calibration if kind == "contexts" else self.calibration, self.learned, self.judged)


class Bench:
    """A seed's rows, and what is fitted on them; searches and routers are read back where another arm has made them.

    Args:
        size: of the study.
        seed: of the run.
        progress: is told what is done.
        kind: of the rows.
        sparsity: S; None for that of ``size``.
        dtype: of SmolLM2; None for that of ``size``.
    """

    def __init__(
        self,
        size: Size,
        seed: int,
        progress: Progress,
        kind: Kind = "questions",
        sparsity: float | None = None,
        dtype: str | None = None,
    ) -> None:
        self.size, self.seed, self._progress = size, seed, progress
        self.sparsity = size.sparsity if sparsity is None else sparsity
        progress("model")
        counts = size.counts(kind)
        if size.model == "made":
            self.stack, rows = _made(seed), made_rows(counts, seed)
        else:
            self.stack, tokenizer = loaded(dtype or size.dtype)
            rows = rows_of(kind, counts, seed, tokenizer, self.sparsity)
        self.calibration, rest = rows[: counts.calibration], rows[counts.calibration :]
        self.learned, self.judged = rest[: counts.learned], rest[counts.learned :]
        about = [
            self.stack.fingerprint(),
            to_dict(size.replace(dtype=dtype or size.dtype)),
            seed,
            self.sparsity,
            [item.tokens for item in rows],
        ]
        place = cache_folder() / "ftp-study" / f"{digest_of(about)[:24]}.jsonl"
        self._memo = FitMemo(place if size.model == "smollm2" else None, digest_of(about))
        self._uniform = uniform_schedule(self.sparsity, self.stack.num_blocks)

    def measure(self, arm: str) -> Evaluation:
        """An arm on the rows to be judged on."""
        if arm == "truncation":
            return evaluate_truncated(self.stack, self.judged, self.sparsity)
        if arm == "shortgpt":
            return self._shortgpt()
        if arm in PEERS:
            return self._outside(arm)
        return evaluate_items(self.skipper(arm), self.judged)

    def skipper(self, arm: str) -> TokenSkipper:
        """Of an arm that skips tokens."""
        if arm in ("random", "static"):
            return TokenSkipper(self.stack, self._uniform, "random" if arm == "random" else "static", seed=self.seed)
        searched = self._searched()
        if arm == "static_searched":
            return TokenSkipper(self.stack, searched)
        made = TokenSkipper(self.stack, searched, self._router("hidden" if arm == "hidden" else "factors"))
        return made.with_schedule(self._tuned(made)) if arm == "dynamic_tuned" else made

    def _searched(self) -> tuple[float, ...]:
        self._progress("schedule")
        return search_schedule(
            self.stack,
            self.calibration,
            self.sparsity,
            config=self.size.schedule,
            seed=self.seed,
            memo=self._memo.losses("search"),
        ).schedule

    def _router(self, inputs: Literal["factors", "hidden"]) -> TokenRouter:
        width = self.stack.width if inputs == "hidden" else None
        router = TokenRouter(RouterConfig(inputs=inputs, dim=width), seed=self.seed)
        if not self._memo.router(inputs, router):
            self._progress("router")
            items, config = [*self.calibration, *self.learned], TrainingConfig(steps=self.size.steps)
            router, _ = train_router(self.stack, items, self._searched(), router=router, config=config, seed=self.seed)
            self._memo.keep_router(inputs, router)
        return router

    def _tuned(self, skipper: TokenSkipper) -> tuple[float, ...]:
        self._progress("schedule, again")
        memo = self._memo.losses("tune")
        return finetune_schedule(
            skipper, self.calibration, config=self.size.schedule, seed=self.seed, memo=memo
        ).schedule

    def _shortgpt(self) -> Evaluation:
        """With the work that FTP takes on these rows, or just above."""
        work = evaluate_items(self.skipper("dynamic_tuned"), self.judged).work
        influence = block_influence(self.stack, (torch.tensor([item.tokens]) for item in self.calibration))
        lengths = [len(item.tokens) - 1 for item in self.judged]
        return evaluate_path(self.stack, self.judged, equal_work_path(self.stack, influence, lengths, work))

    def _outside(self, arm: str) -> Evaluation:
        """What runs elsewhere, held to the work or the keys of FTP on these rows."""
        if self.size.model == "made":
            raise ConfigError(f"the arm {arm} reads text, and the made model's rows are none; run it with --full")
        ours, tokenizer = self.skipper("dynamic_tuned"), loaded(PEERS_DTYPE)[1]
        self._progress(f"{arm} starts")
        if arm == "llmlingua":
            work = evaluate_items(ours, self.judged).work
            with running("llmlingua", self.stack, tokenizer) as peer:
                return by_llmlingua(peer, self.stack, tokenizer, self.judged, work)
        with running("kvpress", self.stack, tokenizer) as peer:
            return by_kvpress(peer, self.stack, self.judged, ours.sparsity)


@cache
def loaded(dtype: str) -> tuple[BlockStack, Any]:
    """SmolLM2 in one type, and its tokenizer."""
    from anabranch.lm.gguf import load_gguf

    model, tokenizer = load_gguf(find_weights(), dtype=getattr(torch, dtype))
    return stack_of(model.eval()), tokenizer


def _made(seed: int) -> BlockStack:
    """A model that has learned nothing."""
    model = Decoder.Config(vocab_size=64, dim=32, num_layers=4, max_positions=128, init_std=0.2).build(seed=seed)
    return stack_of(model.eval())


def questions_run(arm: str, size: Size, seed: int, progress: Progress) -> Metrics:
    """An arm beside the dense model, on questions and their solutions."""
    bench = Bench(size, seed, progress, dtype=PEERS_DTYPE if arm in PEERS else None)
    progress("dense")
    dense = evaluate_path(bench.stack, bench.judged)
    progress(f"{arm} on {len(bench.judged)} rows")
    found = dense if arm == "dense" else bench.measure(arm)
    gap = found.nats_per_token - dense.nats_per_token
    return {
        "nats": found.nats_per_token,
        "gap": gap,
        "closeness": -gap,
        "half_closeness": -gap / 2,
        "agreement": found.agreement(dense),
        "saved": found.saved,
        "skipped": 0.0 if found.report is None else found.report.sparsity,
        "prompt_tokens": sum(len(item.prompt) for item in bench.judged),
    }


def contexts_run(sparsity: float, size: Size, seed: int, progress: Progress) -> Metrics:
    """How often the next token behind a context is the dense model's: FTP's, and those of baselines."""
    bench = Bench(size, seed, progress, "contexts", sparsity)
    dense = evaluate_path(bench.stack, bench.judged)
    found = _measured(bench, ("dynamic_tuned", "static", "random", "shortgpt"), progress)
    ours, shortgpt = found["dynamic_tuned"], found["shortgpt"]
    return {
        "agreement": ours.agreement(dense),
        **{f"agreement_{name}": found[name].agreement(dense) for name in ("static", "random", "shortgpt")},
        "saved": ours.saved,
        "saved_shortgpt": shortgpt.saved,
        "skipped": 0.0 if ours.report is None else ours.report.sparsity,
        "prompt_tokens": sum(len(item.prompt) for item in bench.judged),
        "zero": 0.0,
    }


def anywhere_run(size: Size, seed: int, progress: Progress) -> Metrics:
    """What FTP and those that go by place alone cost on questions that lose a needed sentence by place."""
    bench = Bench(size, seed, progress, "anywhere")
    dense = evaluate_path(bench.stack, bench.judged)
    others = ("truncation", "static", "static_searched")
    found = _measured(bench, ("dynamic_tuned", *others), progress)
    gaps = {name: one.nats_per_token - dense.nats_per_token for name, one in found.items()}
    ours = found["dynamic_tuned"]
    return {
        "nats": ours.nats_per_token,
        "gap": gaps["dynamic_tuned"],
        "closeness": -gaps["dynamic_tuned"],
        **{f"gap_{name}": gaps[name] for name in others},
        **{f"closeness_{name}": -gaps[name] for name in others},
        "agreement": ours.agreement(dense),
        "saved": ours.saved,
        "skipped": 0.0 if ours.report is None else ours.report.sparsity,
        "prompt_tokens": sum(len(item.prompt) for item in bench.judged),
    }


def _measured(bench: Bench, names: Sequence[str], progress: Progress) -> dict[str, Evaluation]:
    found = {}
    for name in names:
        progress(f"{name} on {len(bench.judged)} rows")
        found[name] = bench.measure(name)
    return found
