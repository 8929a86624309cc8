"""Does thinking at the hard steps alone keep the accuracy of thinking at all, for fewer tokens?

Xiao et al., "SCALE: Selective Resource Allocation for Overcoming Performance Bottlenecks in Mathematical Test-time Scaling", AAAI 2026,
arXiv 2512.00466. The paper, Qwen3-32B on AIME24: tau .2, .5, .7, .9 give 78.75, 74.58, 50.0, 27.5 at 22.5, 20.3, 12.2, 8.2 thousand tokens;
"33-53% less" tokens are against InftyThink.

Scaled down: a decoder of about 3 M parameters with two modes, in the made world of `scale_world`: chains of three to eight steps of
arithmetic, half of the kinds easy in both modes, where System 2 goes through the digits as well. Each seed trains one, and draws 200
problems to choose tau on and 400 others to be judged on. The probe learns from System 1's answers to 2,000 steps. Outlines are given, but
in "predicted", where the model makes them.

Arms: ``mixed`` (all kinds), and ``equal``, the negative control: every step is a sum of like numbers, as hard as any other. One run of
an arm measures all ways to choose:

    all1, all2          every step in System 1, in System 2
    vote                the commonest answer of as many all-System-1 samples as cost what SCALE with the chosen tau costs
    random_F, scale_F   F = 25, 50, 75% of the steps in System 2: drawn, and by the probe;  entropy_50 by the entropy of a draft
    tau_T               threshold T = .1, .3, .5, .7, .9, by the probe;  chosen: the cheapest T within a point of all2 on the other problems
    budget              budgeted rule, with half of what System 2 costs more at all steps;  even: the threshold that spends as much
    predicted           chosen, on outlines of the model's own

Tokens are all that were generated, drafts and outlines among them.

The rule, fixed before any run. A claim is about a paired difference over seeds, ours - baseline - margin. It holds where that is above 0
by a two-sided paired t-test at 5% after Holm's correction over all claims of this study that have run; it does not hold where it is below 0
by the same test; else, and with fewer than five seeds, it is not resolved. PRIMARY: chosen is within a point of all2, at 67% of its tokens
or less. No claim holds where its floor is not reached (`_floors`): System 2 right in 70% of the problems (of the control in half) and 20
points above System 1 (10), on average over the seeds; and the two halves of the primary claim hold only together.

It was frozen anew on 2026-12-02, before any run: easy steps cost System 2 one token more than System 1, so that an oracle spared the 33%
that are asked and leaving all easy kinds to System 1 spared 4 (now 39% by the kinds alone); a model that had learned nothing would have
fulfilled the primary claim; and the exact choice counted in units of more tokens than there were.

Not run yet. It is planned for 5 seeds, about eight hours of two cores by the time of a few steps. Whether the model learns both modes in so
many is not known either. The smaller size has a model that has learned next to nothing, and only shows that all of it works.
"""

import asyncio
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention
from anabranch.routers.contract.ask import Arm as Mode
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.scale import (
    Assessor,
    Budgeted,
    Constant,
    Entropy,
    Given,
    Oracle,
    Probe,
    Prompted,
    Rule,
    SelectiveReasoner,
    Settings,
    System,
    Threshold,
    TopFraction,
    Trace,
)
from anabranch.routers.scale.prompts import Prompts
from anabranch.studies.asked import Asked, judged
from anabranch.studies.floors import Floor, above_floors
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.scale_model import FAST, LETTERS, SLOW, ModelAsk, answer_of, asked, decoded, right, train
from anabranch.studies.scale_world import EASY, HARD, Chain, draw

PROMPTS = Path(__file__).with_name("scale_prompts.toml")
TAUS = (0.1, 0.3, 0.5, 0.7, 0.9)
SHARES = (25, 50, 75)
ArmName = Literal["mixed", "equal"]
ARMS: dict[ArmName, str] = {"mixed": "easy and hard kinds of steps", "equal": "steps that are all as hard"}
COLUMNS = (
    Column("acc_all1", "all\nSystem 1", ".3f"),
    Column("acc_all2", "all\nSystem 2", ".3f"),
    Column("acc_chosen", "SCALE", ".3f"),
    Column("spared", "tokens\nspared", ".3f"),
    Column("acc_random_50", "random\nhalf", ".3f"),
    Column("acc_scale_50", "hardest\nhalf", ".3f"),
    Column("acc_vote", "vote", ".3f"),
    Column("acc_predicted", "own\noutlines", ".3f"),
)


@configclass
class Size(Config):
    """What both arms share.

    Attributes:
        dim, layers, heads: of the decoder.
        steps, rows, rate: of its training.
        probed: steps that the probe learns from.
        most: tokens of an answer.
        longest: steps of a problem.
        tried, judged: problems to choose tau on, and to be judged on.
        threads: of the processor.
    """

    dim: int = Field(default=192, ge=16)
    layers: int = Field(default=6, ge=1)
    heads: int = Field(default=6, ge=1)
    steps: int = Field(default=3000, ge=1)
    rows: int = Field(default=16, ge=1)
    rate: float = Field(default=2e-3, gt=0)
    probed: int = Field(default=2000, ge=10)
    most: int = Field(default=160, ge=1)
    longest: int = Field(default=8, ge=3)
    tried: int = Field(default=200, ge=1)
    judged: int = Field(default=400, ge=1)
    threads: int = Field(default=2, ge=1)


@configclass
class ArmConfig(Config):
    """One arm, and the size."""

    arm: ArmName
    size: Size = Size()


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    tiny = Size(dim=32, layers=2, heads=2, steps=5, rows=8, probed=20, most=6, longest=4, tried=2, judged=3, threads=1)
    size = (Size() if full else tiny).replace(**changes)
    return Study(
        name="scale",
        title="thinking at the hard steps alone, against all, none and random ones",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=[Arm(name, about, ArmConfig(arm=name, size=size)) for name, about in ARMS.items()],
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        # 2: System 2 works at easy steps too.
        revision=2,
    )


def run(config: ArmConfig, seed: int, progress: Progress) -> Metrics:
    """Train the model of a seed, and measure every way to choose on the same problems."""
    torch.set_num_threads(config.size.threads)
    bench = Bench(config, seed, progress)
    found = bench.measured()
    return {**found, "third": 0.33, "point": 0.01, "parameters": sum(one.numel() for one in bench.model.parameters())}


class Bench:
    """A seed's model, problems and probe."""

    def __init__(self, config: ArmConfig, seed: int, progress: Progress) -> None:
        self.size, self.seed, self._progress, self._prompts = config.size, seed, progress, Prompts.read(str(PROMPTS))
        size, kinds = config.size, (*EASY, *HARD) if config.arm == "mixed" else ("add",)
        attention = SelfAttention.Config(num_heads=size.heads)
        shape = Decoder.Config(
            vocab_size=len(LETTERS), dim=size.dim, num_layers=size.layers, attention=attention, max_positions=512
        )
        self.model = shape.build(seed=seed)
        train(
            self.model, kinds, steps=size.steps, rows=size.rows, rate=size.rate, seed=seed + 1, progress=self._progress
        )
        rng = random.Random(f"problems {seed}")
        drawn = [draw(rng, kinds, most=size.longest) for _ in range(size.tried + size.judged)]
        self.tried, self.judged = drawn[: size.tried], drawn[size.tried :]
        self.probe = self._probe([draw(rng, kinds) for _ in range(-(-size.probed // 5))])

    def _probe(self, chains: Sequence[Chain]) -> Probe:
        """Learned from each system's answers to single steps, with the right results before them."""
        self._progress("probe")
        rows = [(chain, at) for chain in chains for at in range(len(chain.links))][: self.size.probed]
        texts = [chain.steps[at] for chain, at in rows]
        judged_NM = []
        for mode in (FAST, SLOW):
            models = ModelAsk(self.model, most=self.size.most)
            answers = asyncio.run(_answers(models, rows, mode))
            judged_NM.append([float(one == wanted) for one, wanted in zip(answers, _wanted(rows, mode), strict=True)])
        # Words alone, not pairs: operands are numbers that hardly come twice.
        config = Probe.Config(embedder=Hashed.Config(dim=64, pairs=False))
        probe: Probe = config.build()
        return probe.fit(texts, *judged_NM)

    # -- ways to choose

    def measured(self) -> Metrics:
        """Accuracies and tokens a problem of all ways."""
        found: Metrics = {}

        def note(name: str, runs: Sequence[Trace], chains: Sequence[Chain]) -> None:
            found[f"acc_{name}"] = sum(map(right, chains, (one.answer for one in runs))) / len(chains)
            found[f"tok_{name}"] = sum(one.totals.all.completion for one in runs) / len(chains)
            steps = [step for one in runs for step in one.steps]
            found[f"hard_{name}"] = sum(step.system == 2 for step in steps) / max(1, len(steps))

        for name, difficulty in (("all1", 0.0), ("all2", 1.0)):
            note(name, self._runs(self.judged, Constant.Config(difficulty=difficulty).build(), _tau(0.5)), self.judged)
        for tau in TAUS:
            note(f"tau_{round(100 * tau)}", self._runs(self.judged, self.probe, _tau(tau)), self.judged)
        tau = self._chosen()
        found["tau"] = tau
        for name in ("acc", "tok", "hard"):
            found[f"{name}_chosen"] = found[f"{name}_tau_{round(100 * tau)}"]
        draws = random.Random(f"random {self.seed}")
        drawn = Oracle(lambda index, text: draws.random())
        for share in SHARES:
            rule = TopFraction.Config(fraction=share / 100)
            note(f"scale_{share}", self._runs(self.judged, self.probe, rule.build()), self.judged)
            note(f"random_{share}", self._runs(self.judged, drawn, rule.build()), self.judged)
        note("entropy_50", self._runs(self.judged, Entropy.Config().build(), TopFraction.Config().build()), self.judged)
        note("predicted", self._runs(self.judged, self.probe, _tau(tau), predicted=True), self.judged)
        found |= self._voted(found) | self._budgets(found)
        return {**found, **_derived(found)}

    def _runs(
        self,
        chains: Sequence[Chain],
        assessor: Assessor,
        rule: Rule,
        *,
        predicted: bool = False,
        systems: tuple[System, System] | None = None,
    ) -> list[Trace]:
        """SCALE on problems, all at once: what is asked at one time is a batch."""
        self._progress(f"{type(assessor).__name__}, {rule.config}")
        models = ModelAsk(self.model, seed=self.seed, most=self.size.most)
        settings = Settings(
            force_last="score", rescore="upfront", retries=1, temperature=None, top_p=None, seed=None, last_step="join"
        )
        fast, slow = systems or self._systems()

        async def one(chain: Chain) -> Trace:
            decomposer = Prompted.Config(k=1) if predicted else Given.Config(steps=chain.steps)
            reasoner = SelectiveReasoner(
                system1=fast,
                system2=slow,
                decomposer=decomposer.build(),
                assessor=assessor,
                rule=rule,
                settings=settings,
                language=self._prompts,
            )
            return await reasoner.solve(chain.text, models)

        async def all_of_them() -> list[Trace]:
            return list(await asyncio.gather(*(one(chain) for chain in chains)))

        return asyncio.run(all_of_them())

    def _systems(self, fast_tokens: float = 8.0, slow_tokens: float = 40.0) -> tuple[System, System]:
        """Both, with what they are expected to write for a step."""
        fast, slow = (
            System(arm=Mode(name), max_tokens=self.size.most, expected_tokens=tokens)
            for name, tokens in (("fast", fast_tokens), ("slow", slow_tokens))
        )
        return fast, slow

    def _chosen(self) -> float:
        """The cheapest tau within a point of all System 2, on problems that nobody is judged on; the largest tau is the cheapest."""

        def accuracy(assessor: Assessor, tau: float) -> float:
            answers = [one.answer for one in self._runs(self.tried, assessor, _tau(tau))]
            return sum(map(right, self.tried, answers)) / len(self.tried)

        least = accuracy(Constant.Config(difficulty=1.0).build(), 0.5) - 0.01
        return next((tau for tau in TAUS[::-1] if accuracy(self.probe, tau) >= least), TAUS[0])

    def _voted(self, found: Metrics) -> Metrics:
        """The commonest of as many samples of System 1 as the chosen threshold costs, to the nearest whole number."""
        count = max(1, round(found["tok_chosen"] / max(found["tok_all1"], 1e-9)))
        self._progress(f"vote of {count}")
        answers: list[list[str | None]] = []
        for sample in range(count):
            heat, draw_seed = 0.0 if count == 1 else 0.7, 1000 * self.seed + sample
            models = ModelAsk(self.model, temperature=heat, seed=draw_seed, most=self.size.most)
            answers.append(asyncio.run(_chained(models, self.judged)))
        best = [_commonest([drawn[row] for drawn in answers]) for row in range(len(self.judged))]
        correct = sum(map(right, self.judged, best)) / len(self.judged)
        return {"acc_vote": correct, "tok_vote": count * found["tok_all1"], "samples": count}

    def _budgets(self, found: Metrics) -> Metrics:
        """The budgeted rule, and the threshold on the chances' gain that spends nearest to it, greedy against the exact choice."""
        extra = (found["tok_all2"] - found["tok_all1"]) / 2
        steps = sum(len(chain.links) for chain in self.judged) / len(self.judged)
        systems = self._systems(*(max(found[f"tok_all{number}"] / steps, 1.0) for number in (1, 2)))
        made: Metrics = {}
        for solver in ("greedy", "exact"):
            rule = Budgeted.Config(budget=max(extra, 0.0), solver=solver).build()
            runs = self._runs(self.judged, self.probe, rule, systems=systems)
            made[f"acc_budget_{solver}"] = sum(map(right, self.judged, (one.answer for one in runs))) / len(runs)
            made[f"tok_budget_{solver}"] = sum(one.totals.all.completion for one in runs) / len(runs)
        within = [tau for tau in TAUS if found[f"tok_tau_{round(100 * tau)}"] <= made["tok_budget_greedy"]]
        even = min(within, default=TAUS[-1])
        made |= {f"{name}_even": found[f"{name}_tau_{round(100 * even)}"] for name in ("acc", "tok")}
        return made


def _derived(found: Metrics) -> Metrics:
    """What claims are about beside accuracies."""
    accuracies = [found[f"acc_tau_{round(100 * tau)}"] for tau in TAUS]
    tokens = [found[f"tok_tau_{round(100 * tau)}"] for tau in TAUS]
    rises = [after - before for before, after in itertools.pairwise(accuracies)]
    grows = [after / max(before, 1e-9) - 1 for before, after in itertools.pairwise(tokens)]
    return {
        "spared": 1 - found["tok_chosen"] / max(found["tok_all2"], 1e-9),
        # Above 0 where accuracy, and tokens, fall with tau at every step.
        "falls": -max(rises),
        "shrinks": -max(grows),
        "nothing": 0.0,
        "kept": found["acc_chosen"] - found["acc_all2"],
        "deliberation": found["acc_all2"] - found["acc_all1"],
    }


def _tau(tau: float) -> Rule:
    rule: Rule = Threshold.Config(tau=tau).build()
    return rule


async def _answers(models: ModelAsk, rows: Sequence[tuple[Chain, int]], mode: str) -> list[str]:
    """What a mode writes for single steps."""
    ids = await asyncio.gather(*(models.write(asked(chain.results[:at], chain.steps[at], mode)) for chain, at in rows))
    return [decoded(one).rpartition("=")[2] for one in ids]


def _wanted(rows: Sequence[tuple[Chain, int]], mode: str) -> list[str]:
    values = [(chain.start, *chain.results) for chain, _ in rows]
    return [
        answer_of(chain.links[at], value[at], value[at + 1], mode).rpartition("=")[2]
        for (chain, at), value in zip(rows, values, strict=True)
    ]


async def _chained(models: ModelAsk, chains: Sequence[Chain]) -> list[str | None]:
    """Final answers, all steps in System 1."""

    async def one(chain: Chain) -> str | None:
        results: list[int] = []
        for step in chain.steps:
            said = decoded(await models.write(asked(results, step, FAST))).strip()
            if not said.isdigit():
                return None
            results.append(int(said))
        return str(results[-1])

    return list(await asyncio.gather(*(one(chain) for chain in chains)))


def _commonest(answers: Sequence[str | None]) -> str | None:
    said = [one for one in answers if one is not None]
    return max(dict.fromkeys(said), key=said.count) if said else None


def _asked(ours: str, theirs: str, margin: float, claim: str, paper: str = "-", arm: ArmName = "mixed") -> Asked:
    return (ours, arm, theirs, arm, margin, claim, paper)


# Metrics of ours and of the baseline, the margin, the claim, and what the paper says.
_CLAIMS: tuple[Asked, ...] = (
    _asked(
        "acc_chosen",
        "acc_all2",
        -0.01,
        "PRIMARY: the chosen threshold is within a point of all System 2",
        "82.92, 83.75",
    ),
    _asked("spared", "third", 0.0, "PRIMARY: it spares at least 33% of all System 2's tokens", "33 to 53%"),
    *(
        _asked(
            f"acc_scale_{share}",
            f"acc_random_{share}",
            0.05,
            f"{share}% of steps by the probe beat random ones by 5 points",
        )
        for share in SHARES
    ),
    _asked("acc_entropy_50", "acc_random_50", 0.0, "half of the steps by the entropy of a draft beat random ones"),
    _asked("falls", "nothing", -0.01, "accuracy falls as tau rises, to a point", "78.75 to 27.5"),
    _asked("shrinks", "nothing", -0.01, "tokens fall as tau rises, to 1%", "22.5k to 8.2k"),
    _asked("acc_chosen", "acc_vote", 0.0, "SCALE beats a vote at equal tokens", "82.92, 76.67"),
    _asked(
        "acc_budget_greedy",
        "acc_even",
        -0.01,
        "the budgeted rule is within a point of the threshold that spends no more",
    ),
    _asked("acc_budget_greedy", "acc_budget_exact", -0.02, "greedy is within 2 points of the exact choice"),
    _asked("acc_predicted", "acc_chosen", -0.05, "outlines of its own cost at most 5 points"),
    _asked(
        "acc_random_50",
        "acc_scale_50",
        -0.03,
        "CONTROL: of equally hard steps the probe's half gains at most 3 points",
        arm="equal",
    ),
)


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    return above_floors(results, judged(results, _CLAIMS), [_floors(asked) for asked in _CLAIMS])


def _floors(asked: Asked) -> tuple[Floor, ...]:
    """What must be reached before the claim says anything: that the model has two systems, of which the second is worth its tokens."""
    ours, arm, theirs, *_ = asked
    right, better = (0.7, 0.2) if arm == "mixed" else (0.5, 0.1)
    together: tuple[Floor, ...] = ()
    if (ours, theirs) == ("acc_chosen", "acc_all2"):
        together = (("spared", arm, 0.33),)
    elif ours == "spared":
        together = (("kept", arm, -0.01),)
    return (("acc_all2", arm, right), ("deliberation", arm, better), *together)
