"""Does a router that is a language model learn by reinforcement to ask the right models, over several rounds, under a price of cost?

"Router-R1: Teaching LLMs Multi-Round Routing and Aggregation via Reinforcement Learning", NeurIPS 2025, arXiv 2506.09033. The paper: on
seven question sets a router of 3 billion parameters has .416 exact match on average, where the largest model of the pool alone has .338
and the best router that asks once .314; it asks more often where questions have more hops; with a larger weight of the cost it costs less
(150.6 at 0, 5.5 at .9, NQ); models that it was not trained with are used by their descriptions; without the reward of the form training
collapses.

Scaled down: the two-hop world (`anabranch.routers.router_r1.two_hop`) instead of NQ and HotpotQA, seven experts and a generalist that know
facts by script instead of models, a decoder of about 2 million parameters over words instead of one of 3 billion. No score of a question
set can be compared with; that several rounds are learned, and what they are worth beside one, can.

One run: a warm start on traces that ask models drawn by chance, which teach the language and nothing of whom to ask, a quarter of them to
read the descriptions (the paper's model can read before it is trained); then PPO as the paper has it, 256 episodes a rollout, two
mini-batches. Names and order of the models are drawn anew for every question. Then all questions of the test, which begin at entities that
no question of the training began at, by the likeliest tokens. Baselines play the same questions.

Arms:

    alpha-0, alpha-0.6, alpha-0.8, alpha-0.95    by the weight of the cost
    no-format      alpha-0 without the reward of the form
    no-mask        alpha-0, learning information too
    hidden         alpha-0 with expert 2 out of the pool in training; tested with it
    warm           the warm start alone

The rule, fixed before any run. PRIMARY: on two-hop questions the exact match of alpha-0 is more than 10 points above that of an oracle that
asks one model, the right one if any is. A claim is about a paired difference over seeds, ours - baseline - margin; it holds where that is
above 0 by a two-sided paired t-test at 5% after Holm's correction over all claims that have run, does not hold where it is below 0 by the
same test, and is not resolved otherwise or with fewer than five seeds.

A router that is hardly ever right is not cheap. In claims that one costs less, its cost counts as that of the dearest model for every hop
(`judged_cost`) where it is right less than half as often as the informed baseline, or on two hops less than two fifths as often: who asks
the cheapest model whatever is asked does not fulfil them, nor who gives up the second round. What the warm start has taught already is
told apart by claims against the arm `warm`.

What is reported and judged by nobody: the informed baseline, which is what there is to be learned at alpha 0, the entropy of the policy at
the end, and that of whom it asks (`routing_entropy`, 1 by chance) before the first step and at the end.

What was changed on 2026-12-01, before any run. Computed from the world alone (`tests/studies/test_router_r1_reach.py`, all five seeds):

- the informed baseline was .058 to .121 above the oracle on two hops, with a margin of .1: the primary claim could not hold even for a
  perfect router, since of seven models that know 15% of everything one is often right by luck. Experts are now right about 2% of what they
  are not good at, and 97% of what they are; the difference is .21 to .25, and the claim needs about .85 of a router on two hops;
- the best policy was the same at .6, .8 and .95, and the other claims of costs were fulfilled by a collapse to the cheapest model. Experts
  are now pairs, a better and a lesser one, each pair with another rate of right answers to money, so that the best policy is another
  at every weight (costs about 67, 52, 26, 18; exact match .96, .95, .75, .62), and a collapse counts as dear. For that there are eight
  relations in place of six, and seven experts in place of six;
- expert 1 was the only one that was good at its relations, so that nothing in training spoke of them; the hidden expert is now the
  better of a pair whose other one stays;
- half of the questions have one hop, so a router that was never right on two hops was right .484 to .491 of all times, just above half of
  what the informed baseline is, and fulfilled all claims of costs. On two hops the best policy at .95 is right .525 to .55 as often as
  that baseline, who asks one expert the whole question .30 to .36, who asks the cheapest model .14 to .17;
- two claims against `warm` and the entropy of routing were added. Calls on two hops are 1.0 more than on one in the traces of the warm
  start: that claim says that training keeps it.

What it costs, in CPU hours of one thread, computed from steps that were measured on 2026-12-01: 1.3 of a warm start (1.6 seconds a step),
which arms of one pool and seed share, and at most 4.4 of PPO (53 seconds a rollout with its two steps, by a policy that writes every turn
to its end, 103 tokens an episode; who answers writes about 40). So warm takes 1.3 a seed, the other arms at most 4.4 more, and the
study at most 170: 35 trainings, and 10 warm starts where all run in one process.

Not run yet. It is planned for 5 seeds.
"""

from __future__ import annotations

import json
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.lm.decoder import Decoder
from anabranch.rl.router_r1 import Router, Training, TwoHopWorld, judge_router, router_training
from anabranch.rl.tokens import TokenPolicy
from anabranch.routers.router_r1.two_hop import BASELINES
from anabranch.studies.asked import Asked, judged
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.train import Event, Trainer

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha-0": ("PPO, cost counts nothing", {}),
    "alpha-0.6": ("cost weighs .6", {"task.world.alpha": 0.6}),
    "alpha-0.8": (".8", {"task.world.alpha": 0.8}),
    "alpha-0.95": (".95", {"task.world.alpha": 0.95}),
    "no-format": ("without the reward of the form", {"task.world.format_reward": False}),
    "no-mask": ("information is learned from too", {"task.learns_information": True}),
    "hidden": ("expert 2 joins after training", {"task.world.hidden": 2}),
    "warm": ("the warm start alone", {}),
}
_HIDDEN = 2
# Shares of exact matches of the informed baseline: with less of one no router counts as cheap.
FLOORS = (("exact_match", "informed_exact_match", 0.5), ("exact_match_two_hop", "informed_two_hop", 0.4))
MARGINS = {"oracle": 0.10, "random": 0.20, "calls": 0.5, "at .6": -0.03, "warm": 0.10, "to experts": 0.20}
_TOLD_EVERY_S = 15.0
COLUMNS = (
    Column("exact_match_one_hop", "EM\n1 hop", ".3f"),
    Column("exact_match_two_hop", "EM\n2 hops", ".3f"),
    Column("single_oracle_two_hop", "one model,\noracle", ".3f"),
    Column("informed_two_hop", "informed", ".3f"),
    Column("calls_two_hop", "calls\n2 hops", ".2f"),
    Column("raw_cost", "cost", ".1f"),
    Column("to_experts", "to\nexperts", ".2f"),
    Column("invalid_turns", "invalid", ".3f"),
)


@configclass
class Size(Config):
    """What all arms share.

    Attributes:
        samples: episodes of each run.
        questions: of a rollout.
        entities, relations, experts: of the world.
        warm_steps, traces: of the warm start.
        dim, layers, heads: of the decoder.
        episodes: of the test, at most.
    """

    samples: int = Field(default=76_800, ge=1)
    questions: int = Field(default=256, ge=2)
    entities: int = Field(default=400, ge=5)
    relations: int = Field(default=8, ge=1)
    experts: int = Field(default=7, ge=2)
    warm_steps: int = Field(default=3000, ge=1)
    traces: int = Field(default=20_000, ge=1)
    dim: int = Field(default=192, ge=16)
    layers: int = Field(default=3, ge=1)
    heads: int = Field(default=6, ge=1)
    episodes: int = Field(default=960, ge=1)


@configclass
class ArmConfig(Config):
    """One arm, and the size."""

    arm: str
    size: Size = Size()


def training_of(config: ArmConfig, seed: int) -> Training:
    """The warm start and the training of an arm."""
    size = config.size
    return router_training(
        "router-r1",
        samples=size.samples,
        seed=seed,
        settings={
            "task.world.entities": size.entities,
            "task.world.relations": size.relations,
            "task.world.experts": size.experts,
            "task.world.seed": seed,
            "task.model.dim": size.dim,
            "task.model.num_layers": size.layers,
            "task.model.attention.num_heads": size.heads,
            "task.model.feed_forward.hidden_dim": 8 * size.dim // 3 // 16 * 16,
            "task.questions": size.questions,
            "task.eval_episodes": 1,
            "train.checkpoint_every": 10**9,
            "warm.steps": size.warm_steps,
            "warm.traces": size.traces,
            **ARMS[config.arm][1],
        },
    )


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    tiny = Size(
        samples=16,
        questions=8,
        entities=10,
        relations=2,
        experts=4,
        warm_steps=4,
        traces=32,
        dim=32,
        layers=1,
        heads=2,
        episodes=8,
    )
    size = (Size() if full else tiny).replace(**changes)
    return Study(
        name="router_r1",
        title="A router that learns by reinforcement which models to ask, over several rounds",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=[Arm(name, about, ArmConfig(arm=name, size=size)) for name, (about, _) in ARMS.items()],
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        # 2: its world has other experts and relations, and runs measure what the dearest model costs.
        revision=2,
    )


def run(config: ArmConfig, seed: int, progress: Progress) -> Metrics:
    """One arm: what its router came to on the questions of the test, and what baselines did."""
    began = time.perf_counter()
    made = training_of(config, seed)
    task: Any = made.run.task
    model = task.model.build(seed=seed)
    # The pool of the warm start is that of the arm: what is hidden is in no trace.
    model.load_state_dict(_warm(json.dumps(to_dict(config.size)), seed, task.world.hidden, progress))
    told: dict[str, float] = {}
    if config.arm == "warm":
        policy = TokenPolicy(model)
    else:
        policy, told = _trained(made, model, progress)
    router = Router(task.build(), policy.eval(), made.run, 0)
    measures = _measured(router, config, seed, hidden=task.world.hidden)
    if task.world.hidden is not None:
        shown = made.run.replace(task=task.replace(world=task.world.replace(hidden=None)))
        before = measures
        measures = _measured(Router(shown.task.build(), router.model, shown, 0), config, seed, hidden=None)
        measures |= {f"before_{name}": before[name] for name in ("exact_match", "exact_match_two_hop")}
    return {
        **measures,
        **_baselines(made, config.size.episodes),
        "policy_entropy": told.get("policy_entropy", float("nan")),
        # Before the first step: of the arm `warm`, what it is tested with.
        "routing_entropy_at_start": told.get("routing_entropy_at_start", measures["routing_entropy"]),
        "samples": 0 if config.arm == "warm" else config.size.samples,
        "seconds": time.perf_counter() - began,
    }


@lru_cache(maxsize=16)
def _warm(size: str, seed: int, hidden: int | None, progress: Progress) -> dict[str, Tensor]:
    """Weights of the warm start, which arms share that have the same pool."""
    arm = "alpha-0" if hidden is None else "hidden"
    made = training_of(ArmConfig(arm=arm, size=Size(**json.loads(size))), seed)
    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
        trainer = Trainer(made.warm, Path(folder) / "warm", on_event=_teller(progress, "warm start, step"))
        trainer.fit()
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def _trained(made: Training, model: Decoder, progress: Progress) -> tuple[TokenPolicy, dict[str, float]]:
    """(the policy; its entropy in the last rollout, and that of whom it asked in the first)."""
    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
        trainer = Trainer(made.run, Path(folder) / "run", model=model, on_event=_teller(progress, "step"))
        try:
            trainer.fit()
        finally:
            trainer.stream.close()
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    told = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    if not told:
        return trainer.model, {}
    return trainer.model, {
        "policy_entropy": float(told[-1]["policy_entropy"]),
        "routing_entropy_at_start": float(told[0]["episode_routing_entropy"]),
    }


def _teller(progress: Progress, what: str) -> Any:
    said = time.monotonic()

    def tell(event: Event) -> None:
        nonlocal said
        if event.kind == "step" and time.monotonic() - said > _TOLD_EVERY_S:
            said = time.monotonic()
            progress(f"{what} {event.step:,} of {event.steps:,}")

    return tell


@torch.no_grad()
def _measured(router: Router, config: ArmConfig, seed: int, *, hidden: int | None) -> dict[str, float]:
    """Of the questions of the test."""
    played, rewards = judge_router(router, episodes=config.size.episodes, seed=seed)
    world: Any = router.task.world
    facts = [each.outcome.facts for each in played if each.outcome is not None]
    told = router.task.measures(played, rewards)
    sent = 0.0 if hidden is not None else world.share_to(facts, _HIDDEN)
    models = world.facts.num_models - (hidden is not None)
    return {**told, "sent_to_hidden": sent, "thrice_by_chance": 3 / models}


def _baselines(made: Training, episodes: int) -> dict[str, float]:
    """Exact matches and costs of those who need not be trained, and the cost of the dearest model for every hop."""
    task: Any = made.run.task
    world = TwoHopWorld(task.world.replace(hidden=None))
    facts = world.facts
    asked = [facts.question(number, "test") for number in range(min(episodes, world.num_tests))]
    found: dict[str, float] = {}
    for name in BASELINES:
        played = [(each, facts.baseline(name, each, seed=place)) for place, each in enumerate(asked)]
        for hops, label in ((0, "exact_match"), (1, "one_hop"), (2, "two_hop")):
            own = [one.answer == each.answer for each, one in played if hops in (0, each.hops)]
            found[f"{name}_{label}"] = sum(own) / len(own)
        found[f"{name}_raw_cost"] = sum(one.cost for _, one in played) / len(played)
    dearest = max(facts.cost(model) for model in range(facts.num_models))
    found["dearest_raw_cost"] = dearest * sum(each.hops for each in asked) / len(asked)
    return found


# Metric and arm of ours, those of the baseline, the margin, the claim, and what the paper says.
_CLAIMS: tuple[Asked, ...] = (
    (
        "exact_match_two_hop",
        "alpha-0",
        "single_oracle_two_hop",
        "alpha-0",
        MARGINS["oracle"],
        "PRIMARY: on two hops the router is right more than 10 points more often than an oracle that asks one model",
        ".416, the largest model alone .338, the best router that asks once .314",
    ),
    (
        "exact_match",
        "alpha-0",
        "random_exact_match",
        "alpha-0",
        MARGINS["random"],
        "it is right more than 20 points more often than who asks models by chance, hop by hop",
        "",
    ),
    (
        "exact_match_two_hop",
        "alpha-0",
        "exact_match_two_hop",
        "warm",
        MARGINS["warm"],
        "on two hops it is right more than 10 points more often than its warm start",
        "",
    ),
    (
        "to_experts",
        "alpha-0",
        "to_experts",
        "warm",
        MARGINS["to experts"],
        "more than 20 points more of its questions than of its warm start's go to models that are said to be good at them",
        "",
    ),
    (
        "calls_two_hop",
        "alpha-0",
        "calls_one_hop",
        "alpha-0",
        MARGINS["calls"],
        "it asks more than half a question more where there are two hops, as its warm start was taught to",
        "1.01 to 1.36 calls, most on multi-hop sets",
    ),
    ("raw_cost", "alpha-0", "judged_cost", "alpha-0.6", 0.0, "at .6 it costs less than at 0", "150.6 and 150.0"),
    ("raw_cost", "alpha-0.6", "judged_cost", "alpha-0.8", 0.0, "at .8 it costs less than at .6", "150.0 and 28.9"),
    (
        "raw_cost",
        "alpha-0.8",
        "judged_cost",
        "alpha-0.95",
        0.0,
        "at .95 it costs less than at .8",
        "28.9, and 5.5 at .9",
    ),
    (
        "half_raw_cost",
        "alpha-0",
        "judged_cost",
        "alpha-0.95",
        0.0,
        "at .95 it costs less than half of what it costs at 0",
        "150.6, and 5.5 at .9",
    ),
    (
        "exact_match",
        "alpha-0.6",
        "exact_match",
        "alpha-0",
        MARGINS["at .6"],
        "at .6 it loses less than 3 points of exact match against 0",
        ".388 and .388",
    ),
    (
        "sent_to_hidden",
        "hidden",
        "thrice_by_chance",
        "hidden",
        0.0,
        "a model that joins after training gets more than three times its share by chance of the questions that it is good at",
        "used by its description",
    ),
    (
        "invalid_turns",
        "no-format",
        "invalid_turns",
        "alpha-0",
        0.0,
        "without the reward of the form more turns are invalid",
        "training collapses",
    ),
    (
        "exact_match",
        "alpha-0",
        "exact_match",
        "no-mask",
        0.0,
        "with information masked it is right more often than without",
        "",
    ),
)


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    runs = results.runs.items()
    return judged(
        Results({arm: {seed: with_costs(run) for seed, run in seeds.items()} for arm, seeds in runs}), _CLAIMS
    )


def with_costs(measures: Metrics) -> Metrics:
    """With the costs that claims go by, see the rule."""
    is_right = all(measures[ours] >= share * measures[informed] for ours, informed, share in FLOORS)
    return {
        **measures,
        "half_raw_cost": measures["raw_cost"] / 2,
        "judged_cost": measures["raw_cost"] if is_right else measures["dearest_raw_cost"],
    }
