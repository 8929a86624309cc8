"""What does skipping tokens cost, beside cutting prompts, leaving out blocks, and skipping at random?

"FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing", 2024, arXiv 2412.11494. The paper, on accuracy
retained: Qwen1.5-7B at 22% 99.21% against 60.57% of BlockPruner; LLaMA2-7B at 30% 98.03% with a schedule searched and tuned against
72.80% with a uniform one, and static router 97.63% against random tokens 68.96%; routers of four factors 98.03%, of hidden states 86.02%.

Scaled down: SmolLM2-135M-Instruct on GSM8K (``qa/gsm8k_test.jsonl.gz`` of the folder that ANABRANCH_DATA names). A prompt is a question,
its continuation the worked solution. S = 0.3 of the prompt's tokens. Each seed draws 40 rows to measure schedules on, 200 more for the
router to learn from, and 100 others to be judged on, all different. Searches have 12 members and 8 generations, the router 500 steps.

Arms:

    dense              the model as it is
    random             random tokens, uniform schedule; the first token is kept
    static             static router, uniform schedule
    static_searched    static router, searched schedule
    dynamic_searched   router that learned, the same schedule
    dynamic_tuned      the same with the schedule searched on (FTP whole)
    hidden             a router of hidden states instead, as many steps, the same schedule
    truncation         the static router's tokens cut out before the model
    shortgpt           whole blocks left out, with at least as many multiply-adds over prompt and continuation as dynamic_tuned
    llmlingua          LLMLingua leaves tokens out before the model, with at least as many multiply-adds
    kvpress            kvpress drops as many keys as dynamic_tuned does not make, behind a dense prefill: its work is more

The last two run where their packages are named, see `anabranch.studies.ftp_peers`, and only if they are asked for.

The rule, fixed before any run. A gap is nats per token of the continuations less those of the dense model on the same rows; closeness is
minus the gap. PRIMARY: the gap of dynamic_tuned is at most half of that of shortgpt. A claim is about a paired difference over seeds,
ours - baseline - margin. It holds where that is above 0 by a two-sided paired t-test at 5% after Holm's correction over all claims of
this study that have run; it does not hold where it is below 0 by the same test; else, and with fewer than five seeds, it is not resolved.

Not run yet. The two outside arms, and the claims on them, were added before any run. It is planned for 5 seeds, about three hours of two
cores each; what one arm has searched others of its seed read back. The smaller size runs on a made model and made rows, and only shows that
all of it works. Agreement on 500 contexts (E2), content anywhere in the prompt (E1b) and times (E3) are studies of their own, not written.
"""

import gzip
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
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
from anabranch.depth.ftp.items import Item
from anabranch.depth.ftp.memo import FitMemo, digest_of
from anabranch.depth.genetic import GeneticConfig
from anabranch.depth.influence import block_influence
from anabranch.depth.stack import BlockStack, stack_of
from anabranch.errors import ConfigError, DataError
from anabranch.files import parse_json, sha256_of
from anabranch.lm import Decoder
from anabranch.places import cache_folder, data_file
from anabranch.studies.asked import Asked, judged
from anabranch.studies.ftp_peers import by_kvpress, by_llmlingua, running
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.small_model import find_weights

FILE, SOURCE = "qa/gsm8k_test.jsonl.gz", "openai/grade-school-math"
SHA256 = "bb13a52c31b1fa4805ebab294dce067e337ccd4b61c3e6461c85c92965282c62"
ArmName = Literal[
    "dense",
    "random",
    "static",
    "static_searched",
    "dynamic_searched",
    "dynamic_tuned",
    "hidden",
    "truncation",
    "shortgpt",
    "llmlingua",
    "kvpress",
]
# Those that run in environments of their own.
OUTSIDE: tuple[ArmName, ...] = ("llmlingua", "kvpress")
ARMS: dict[ArmName, str] = {
    "dense": "the model as it is",
    "random": "random tokens, uniform schedule",
    "static": "static router, uniform schedule",
    "static_searched": "static router, searched schedule",
    "dynamic_searched": "router that learned, searched schedule",
    "dynamic_tuned": "the same, schedule searched on (FTP)",
    "hidden": "a router of hidden states, searched schedule",
    "truncation": "prompts cut before the model",
    "shortgpt": "blocks left out, at least as much work",
    "llmlingua": "LLMLingua's prompts, at least as much work",
    "kvpress": "kvpress's keys, as many; more work",
}
COLUMNS = (
    Column("nats", "nats/token", ".4f"),
    Column("gap", "gap", "+.4f"),
    Column("agreement", "next token\nas dense", ".3f"),
    Column("saved", "work\nsaved", ".3f"),
    Column("skipped", "tokens\nskipped", ".3f"),
)


@configclass
class Size(Config):
    """What all arms share.

    Attributes:
        model: ``smollm2``, or a small ``made`` one that has learned nothing, with made rows.
        sparsity: S.
        calibration, learned, judged: rows.
        population, generations: of each search.
        steps: of a router.
        threads: of the processor.
    """

    model: Literal["smollm2", "made"] = "smollm2"
    sparsity: float = 0.3
    calibration: int = Field(default=40, ge=1)
    learned: int = Field(default=200, ge=0)
    judged: int = Field(default=100, ge=1)
    population: int = Field(default=12, ge=2)
    generations: int = Field(default=8, ge=0)
    steps: int = Field(default=500, ge=1)
    threads: int = Field(default=2, ge=1)

    @property
    def schedule(self) -> ScheduleConfig:
        """Of the searches."""
        return ScheduleConfig(genetic=GeneticConfig(population=self.population, generations=self.generations))


@configclass
class ArmConfig(Config):
    """One arm, and the size."""

    arm: ArmName
    size: Size = Size()


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    tiny = Size(model="made", calibration=3, learned=3, judged=4, population=4, generations=1, steps=5, threads=1)
    size = (Size() if full else tiny).replace(**changes)
    return Study(
        name="ftp",
        title="tokens of a prompt that blocks pass over, against cut prompts and left-out blocks",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=[Arm(name, about, ArmConfig(arm=name, size=size)) for name, about in ARMS.items()],
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        default_arms=tuple(name for name in ARMS if name not in OUTSIDE),
        run=run,
        judge=judge,
        columns=COLUMNS,
    )


def run(config: ArmConfig, seed: int, progress: Progress) -> Metrics:
    """Fit what the arm needs, and measure it and the dense model on the rows to be judged on."""
    torch.set_num_threads(config.size.threads)
    bench = Bench(config.size, seed, progress)
    progress("dense")
    dense = evaluate_path(bench.stack, bench.judged)
    progress(f"{config.arm} on {len(bench.judged)} rows")
    found = dense if config.arm == "dense" else bench.measure(config.arm)
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


class Bench:
    """A seed's rows, and what is fitted on them; searches and routers are read back where another arm has made them."""

    def __init__(self, size: Size, seed: int, progress: Progress) -> None:
        self.size, self.seed, self._progress = size, seed, progress
        progress("model")
        self.stack, rows = _made(size, seed) if size.model == "made" else _smollm2(size, seed)
        self.calibration, rest = rows[: size.calibration], rows[size.calibration :]
        self.learned, self.judged = rest[: size.learned], rest[size.learned :]
        about = [self.stack.fingerprint(), to_dict(size), seed, [item.tokens for item in rows]]
        place = cache_folder() / "ftp-study" / f"{digest_of(about)[:24]}.jsonl"
        self._memo = FitMemo(place if size.model == "smollm2" else None, digest_of(about))
        self._uniform = uniform_schedule(size.sparsity, self.stack.num_blocks)

    def measure(self, arm: ArmName) -> Evaluation:
        """An arm on the rows to be judged on."""
        if arm == "truncation":
            return evaluate_truncated(self.stack, self.judged, self.size.sparsity)
        if arm == "shortgpt":
            return self._shortgpt()
        if arm in OUTSIDE:
            return self._outside(arm)
        return evaluate_items(self.skipper(arm), self.judged)

    def skipper(self, arm: ArmName) -> TokenSkipper:
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
            self.size.sparsity,
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

    def _outside(self, arm: ArmName) -> Evaluation:
        """What runs elsewhere, held to the work or the keys of FTP on these rows."""
        if self.size.model == "made":
            raise ConfigError(f"the arm {arm} reads text, and the made model's rows are none; run it with --full")
        ours, tokenizer = self.skipper("dynamic_tuned"), _loaded()[1]
        self._progress(f"{arm} starts")
        if arm == "llmlingua":
            work = evaluate_items(ours, self.judged).work
            with running("llmlingua", self.stack, tokenizer) as peer:
                return by_llmlingua(peer, self.stack, tokenizer, self.judged, work)
        with running("kvpress", self.stack, tokenizer) as peer:
            return by_kvpress(peer, self.stack, self.judged, ours.sparsity)


def _smollm2(size: Size, seed: int) -> tuple[BlockStack, list[Item]]:
    """The model, and the rows of a seed."""
    stack, tokenizer = _loaded()
    questions = _questions(data_file(FILE, SOURCE))
    wanted = size.calibration + size.learned + size.judged
    if len(questions) < wanted:
        raise DataError(f"{FILE} has {len(questions)} rows; the study needs {wanted}")
    drawn = random.Random(seed).sample(questions, wanted)
    rows = [Item(tuple(tokenizer.encode(f"{asked}\n")), tuple(tokenizer.encode(answer))) for asked, answer in drawn]
    return stack, rows


@cache
def _loaded() -> tuple[BlockStack, Any]:
    from anabranch.lm.gguf import load_gguf

    model, tokenizer = load_gguf(find_weights(), dtype=torch.float32)
    return stack_of(model.eval()), tokenizer


def _questions(path: Path) -> list[tuple[str, str]]:
    found = sha256_of(path)
    if found != SHA256:
        raise DataError(f"{path} has sha256 {found}; the study is of {SHA256}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [parse_json(line) for line in file if line.strip()]
    return [(row["question"], row["answer"]) for row in rows]


def _made(size: Size, seed: int) -> tuple[BlockStack, list[Item]]:
    """A model that has learned nothing, and rows of noise."""
    model = Decoder.Config(vocab_size=64, dim=32, num_layers=4, max_positions=128, init_std=0.2).build(seed=seed)
    draw = random.Random(seed)
    wanted: Sequence[int] = range(size.calibration + size.learned + size.judged)
    rows = [[draw.randrange(64) for _ in range(30)] for _ in wanted]
    return stack_of(model.eval()), [Item(tuple(row[:22]), tuple(row[22:])) for row in rows]


# Metric and arm of ours, those of the baseline, the margin, the claim, and what the paper says.
_ASKED: tuple[Asked, ...] = (
    (
        "closeness",
        "dynamic_tuned",
        "half_closeness",
        "shortgpt",
        0.0,
        "PRIMARY: FTP's gap is at most half of ShortGPT's at as much work",
        "99.21% against 60.57% (BlockPruner)",
    ),
    (
        "closeness",
        "static",
        "half_closeness",
        "random",
        0.0,
        "the static router's gap is at most half of random tokens', uniform schedule",
        "97.63% against 68.96%",
    ),
    (
        "closeness",
        "static_searched",
        "closeness",
        "static",
        -0.01,
        "the searched schedule costs at most 0.01 more than the uniform one",
        "98.03% against 72.80%",
    ),
    (
        "closeness",
        "dynamic_searched",
        "closeness",
        "static_searched",
        -0.02,
        "the router that learned costs at most 0.02 more than the static one",
        "98.03% against 97.63%",
    ),
    (
        "closeness",
        "static_searched",
        "closeness",
        "static",
        0.0,
        "the searched schedule is better than uniform",
        "98.03% against 72.80%",
    ),
    (
        "closeness",
        "dynamic_tuned",
        "closeness",
        "static_searched",
        0.0,
        "FTP whole is better than the static router",
        "98.03% against 97.63%",
    ),
    (
        "closeness",
        "dynamic_searched",
        "closeness",
        "hidden",
        0.0,
        "four factors are better than hidden states",
        "98.03% against 86.02%",
    ),
    ("closeness", "dynamic_tuned", "closeness", "truncation", 0.0, "FTP is better than cutting the prompt", "-"),
    (
        "agreement",
        "dynamic_tuned",
        "agreement",
        "shortgpt",
        0.0,
        "the next token is the dense one more often than ShortGPT's",
        "-",
    ),
    (
        "closeness",
        "dynamic_tuned",
        "closeness",
        "llmlingua",
        0.0,
        "FTP is better than LLMLingua, which does at least as much work",
        "-",
    ),
    (
        "closeness",
        "dynamic_tuned",
        "closeness",
        "kvpress",
        -0.02,
        "FTP costs at most 0.02 more than kvpress with as many keys, which does more work",
        "-",
    ),
)


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    return judged(results, _ASKED)
