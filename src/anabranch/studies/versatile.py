"""Does a dense model that goes on training as a VersatileFFN beat one that goes on as it is, and does difficulty pay?

"VersatileFFN: Achieving Parameter Efficiency in LLMs via Adaptive Wide-and-Deep Reuse", 2025, arXiv 2512.14531. The paper, 354M parameters
trained on 40B tokens and then on 40B more with the module in place: loss 2.617, against 2.625 for four loops of every token, 2.585 for a
mixture with eight real small experts, 2.633 for the width path alone, 2.629 for the depth path alone, 2.618 for their plain average;
1.24 GFLOPs of feed-forward per token against 1.50 for four loops. Its base row (2.779) had one epoch less, so the gain of
training on alone is not known from the paper; here it is the first baseline.

Scaled down: 0.9M parameters, bytes of Python source, 1.6M tokens for the dense model (once per seed, shared by all arms) and
0.8M tokens for each arm, optimizer and schedule started anew. The temperature reaches its floor at 55% of training, as in the paper
(24,450 of about 44,500 steps). Read a verdict here as one on this size.

Arms, all from the same dense weights, with the same tokens in the same order for one seed:

    dense      goes on as it is: the control that the paper lacks
    loop2/4    every token takes 2 or 4 loops
    moe        the feed-forward, and eight real experts of an eighth of its width beside it, two active, silent at first
    versatile  the paper's: 8 virtual experts, 2 active, up to 4 loops, mixed by difficulty
    width      its width path alone         depth   its depth path alone         average   both, averaged

and of dense, loop4 and versatile also ``-slow`` and ``-fast`` (half and twice the learning rate: is the shared one fair to each?).

The rule, fixed before any run. Every claim is a paired difference over the seeds that both arms have, with its 95% t-interval.
"Beats" holds if the whole interval of ours - baseline in bits per byte lies below 0, does not hold if it lies above 0, and is not
resolved otherwise or with fewer than two seeds. "Within 0.3%" holds if the interval of the difference in nats per token lies below
0.3% of the baseline's mean and ours spends fewer feed-forward FLOPs in evaluation on average; it does not hold if either is
contradicted. The correlation of a token's loops with the loss of the dense model at that token holds if its whole interval over
seeds lies above 0. Each claim is judged alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.experts.versatile import LoopGate, VersatileFFN, record_difficulty
from anabranch.lm import Decoder
from anabranch.nn import BuildContext, FeedForward, MoE, SwiGLU
from anabranch.presets import language_model
from anabranch.routing import Router, TopK
from anabranch.routing.relax import Temperature
from anabranch.studies.continued import Continued, base_model
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import Estimate, Verdict, verdict_below
from anabranch.studies.picture import draw_arms
from anabranch.studies.training import train_and_measure
from anabranch.train import RunConfig, Trainer

# Of the loss of four loops, what may be lost for fewer FLOPs.
NEAR = 0.003
MAIN = ("dense", "loop2", "loop4", "moe", "versatile", "width", "depth", "average")
TUNED = ("dense", "loop4", "versatile")
SMOKE = ("dense", "loop4", "versatile", "width", "depth")
DIFFICULTY_TOKENS = 16_384

COLUMNS = (
    Column("bits_per_byte", "bits/byte", ".4f"),
    Column("parameters", "parameters", ",.0f"),
    Column("ffn_flops", "FFN FLOPs\n/token", ",.0f"),
    Column("mean_loops", "mean\nloops", ".2f"),
    Column("mean_lambda", "mean\nlambda", ".2f"),
    Column("loops_vs_loss", "loops ~ loss\n(Spearman)", ".2f"),
    Column("tokens_per_cpu_second", "tokens\n/CPU s", ",.0f"),
)


@configclass
class Size(Config):
    """What is the same for all arms."""

    num_layers: int = Field(default=4, ge=1)
    dim: int = 128
    hidden_dim: int = 384
    num_experts: int = 8
    top_k: int = 2
    max_loops: int = 4
    sequence_length: int = 256
    batch_size: int = 8  # sequences a step
    base_steps: int = Field(default=800, ge=1)
    steps: int = Field(default=400, ge=1)
    learning_rate: float = 2e-3
    warmup: float = 0.1


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`, for part of the work or another machine."""
    small = {"num_layers": 2, "dim": 64, "hidden_dim": 128, "base_steps": 32, "steps": 16}
    size = Size().replace(**changes) if full else Size().replace(**{**small, **changes})
    return Study(
        name="versatile",
        title="a dense model that goes on training as a VersatileFFN, against one that goes on as it is",
        settings={"size": "full" if full else "smoke", **size_settings(size)},
        arms=list(arms(size).values()),
        default_arms=MAIN if full else SMOKE,
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
    )


def size_settings(size: Size) -> dict[str, Any]:
    """What the result file says about the size."""
    tokens = size.batch_size * size.sequence_length
    return {**to_dict(size), "base_tokens": size.base_steps * tokens, "tokens_per_run": size.steps * tokens}


def arms(size: Size) -> dict[str, Arm]:
    """All arms, built from one budget."""
    made = [
        _arm(size, "dense", "goes on as it is", SwiGLU.Config(hidden_dim=size.hidden_dim)),
        _arm(size, "loop2", "2 loops of every token", _loops(size, 2)),
        _arm(size, "loop4", "4 loops of every token", _loops(size, 4)),
        _arm(size, "moe", f"{size.num_experts} real small experts beside it", _experts(size)),
        _arm(size, "versatile", "both paths by difficulty", _versatile(size)),
        _arm(size, "width", "width path alone", _versatile(size, fusion="width_only")),
        _arm(size, "depth", "depth path alone", _versatile(size, fusion="depth_only")),
        _arm(size, "average", "both paths, averaged", _versatile(size, fusion="average")),
    ]
    slow, fast = (size.replace(learning_rate=size.learning_rate * factor) for factor in (0.5, 2.0))
    for arm in [arm for arm in made if arm.name in TUNED]:
        feed_forward = arm.config.run.model.feed_forward
        # the dense model they start from is the same: only their own training is slower or faster
        made.append(_arm(size, f"{arm.name}-slow", f"{arm.about}, half the learning rate", feed_forward, slow))
        made.append(_arm(size, f"{arm.name}-fast", f"{arm.about}, twice the learning rate", feed_forward, fast))
    return {arm.name: arm for arm in made}


def _versatile(size: Size, **options: Any) -> VersatileFFN.Config:
    router = VersatileFFN.Config().router.replace(select=TopK.Config(top_k=size.top_k, normalize="softmax"))
    return VersatileFFN.Config(
        hidden_dim=size.hidden_dim,
        num_experts=size.num_experts,
        max_loops=size.max_loops,
        router=router,
        temperature=Temperature.Config(until=0.55),
        **options,
    )


def _loops(size: Size, count: int) -> VersatileFFN.Config:
    return VersatileFFN.Config(hidden_dim=size.hidden_dim, max_loops=count, fusion="depth_only", gate="none")


def _experts(size: Size) -> MoE.Config:
    return MoE.Config(
        num_experts=size.num_experts,
        hidden_dim=size.hidden_dim // size.num_experts,
        router=Router.Config(select=TopK.Config(top_k=size.top_k, normalize="sum")),
        shared_experts=1,
        shared_hidden_dim=size.hidden_dim,
    )


def _arm(size: Size, name: str, about: str, feed_forward: FeedForward.Config, own: Size | None = None) -> Arm:
    def training(feed_forward: FeedForward.Config, size: Size, steps: int) -> RunConfig:
        return language_model(
            feed_forward,
            dim=size.dim,
            num_layers=size.num_layers,
            sequence_length=size.sequence_length,
            batch_size=size.batch_size,
            steps=steps,
            learning_rate=size.learning_rate,
            warmup=size.warmup,
        )

    base = training(SwiGLU.Config(hidden_dim=size.hidden_dim), size, size.base_steps)
    return Arm(name, about, Continued(base=base, run=training(feed_forward, own or size, size.steps)))


# One run


def run(config: Continued, seed: int, progress: Progress) -> Metrics:
    """Take the dense model of this seed (train it if no arm has yet), make the arm's model of it, train that on and measure it."""
    base = base_model("versatile", config.base, seed, progress)

    def also(trainer: Trainer) -> Metrics:
        return {**_spent(trainer), "loops_vs_loss": _loops_against_loss(trainer, base)}

    return train_and_measure(config.run, seed, progress, model=converted(base, config.run.model, seed), also=also)


def converted(base: Decoder, config: Decoder.Config, seed: int) -> Decoder:
    """The model of an arm with the weights of the dense one."""
    made: Any = Decoder(config, seed=seed)
    is_mixture = isinstance(config.feed_forward, MoE.Config)
    place = "feed_forward.shared.w" if is_mixture else "feed_forward.w"
    state = {name.replace("feed_forward.w", place): value for name, value in base.state_dict().items()}
    found = made.load_state_dict(state, strict=False)
    assert not found.unexpected_keys, found
    for block in made.blocks if is_mixture else ():
        # Silent at first: the dense model's function.
        torch.nn.init.zeros_(block.feed_forward.experts.w2)
    return made


def _windows(trainer: Trainer) -> Any:
    length = trainer.config.data.sequence_length
    return trainer.data.validation(batch_size=8, num_windows=max(DIFFICULTY_TOKENS // length, 1))


@torch.no_grad()
def _spent(trainer: Trainer) -> Metrics:
    """Feed-forward FLOPs per token and layer in evaluation, and what the gates of a versatile model decide."""
    feed_forward: Any = trainer.config.model.feed_forward
    if not isinstance(feed_forward, VersatileFFN.Config):
        return {"ffn_flops": float(feed_forward.count(BuildContext(trainer.config.model.dim)).flops)}
    trainer.model.eval()
    found: list[dict[str, float]] = []
    for batch in _windows(trainer):
        metrics = trainer.model(batch.token_BL).metrics
        found.append({name: float(value) for name, value in metrics.items()})
    return {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}


@torch.no_grad()
def _loops_against_loss(trainer: Trainer, base: Decoder) -> float | None:
    """Spearman correlation of a token's loops (mean over layers) with the dense model's loss there; None without a loop gate."""
    if not any(isinstance(module, LoopGate) for module in trainer.model.modules()):
        return None
    trainer.model.eval()
    base.eval()
    loss_N, loops_N = [], []
    for batch in _windows(trainer):
        logits_BLV = base(batch.token_BL).logits_BLV
        loss_N.append(F.cross_entropy(logits_BLV.flatten(0, 1), batch.target_BL.flatten(), reduction="none").numpy())
        with record_difficulty(trainer.model) as recorder:
            trainer.model(batch.token_BL)
        trace = recorder.trace()
        layers = [trace.decisions(layer.layer).index_NK[:, 0] + 1 for layer in trace.layers]
        loops_N.append(np.mean(layers, axis=0))
    return spearman(np.concatenate(loops_N), np.concatenate(loss_N))


def spearman(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; 0 where one of them does not vary."""
    first, second = (_ranks(values_N) for values_N in (first_N, second_N))
    spread = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / spread) if spread else 0.0


def _ranks(values_N: np.ndarray) -> np.ndarray:
    """Ranks minus their mean."""
    _, number_N, count_U = np.unique(values_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(count_U) - (count_U - 1) / 2)[number_N]
    return rank_N - rank_N.mean()


# Judging


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""

    def better(ours: str, baseline: str, claim: str, paper: str) -> Claim:
        return results.claim(
            "bits_per_byte", ours=ours, baseline=baseline, claim=claim, paper=paper, verdict=verdict_below
        )

    claims = [
        better(
            "versatile",
            "dense",
            "versatile beats training on as it is",
            "no such control; 2.779 -> 2.617 with an epoch more",
        ),
        _near_four_loops(results),
        results.claim(
            "ffn_flops",
            ours="versatile",
            baseline="loop4",
            claim="versatile spends fewer feed-forward FLOPs than four loops",
            paper="1.24 against 1.50 GFLOPs",
            verdict=verdict_below,
        ),
        better("versatile", "width", "versatile beats the width path alone", "loss 2.633 -> 2.617"),
        better("versatile", "depth", "versatile beats the depth path alone", "loss 2.629 -> 2.617"),
        better("versatile", "average", "difficulty beats the plain average", "loss 2.618 -> 2.617"),
        better(
            "loop4",
            "dense",
            "four loops beat training on as it is",
            "no such control; 2.779 -> 2.625 with an epoch more",
        ),
        better(
            "moe",
            "versatile",
            "real small experts beat versatile",
            "loss 2.617 -> 2.585, with 1.5 times the parameters",
        ),
        _correlation(results),
    ]
    return claims


def _near_four_loops(results: Results) -> Claim:
    spent = results.compare("ffn_flops", "versatile", "loop4")

    def verdict(difference: Estimate) -> Verdict:
        if spent.mean >= 0:
            return "does not hold"
        return verdict_below(difference, NEAR * results.mean("loop4", "nats_per_token").mean)

    return results.claim(
        "nats_per_token",
        ours="versatile",
        baseline="loop4",
        claim="versatile is within 0.3% of four loops, at fewer FLOPs",
        paper="loss 2.625 -> 2.617",
        verdict=verdict,
        limit=lambda loops: (1 + NEAR) * loops,
    )


def _correlation(results: Results) -> Claim:
    found = results.mean("versatile", "loops_vs_loss")
    claim, paper = "tokens with more loops are harder for the dense model", "shown by examples, no number"
    if not found.count:
        return Claim.not_run(claim, paper)
    verdict = verdict_below(Estimate(-found.mean, found.half_width, found.count))
    return Claim.against(0.0, claim, paper, found.mean, verdict, found.interval)


def draw(results: Results, path: Path) -> None:
    """Bits per byte against the dense model that trained on, with intervals, and the learning curves."""
    draw_arms(results, path, baseline="dense", title="VersatileFFN at our scale")
