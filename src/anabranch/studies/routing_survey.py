"""Which ways of routing queries to language models pay, on recorded outcomes, with one referee for all?

"Doing More with Less: A Survey on Routing Strategies for Resource Optimisation in Large Language Model-Based Systems",
Varangot-Reille et al., arXiv 2502.00409, orders the field and has no figures of its own. The arms are all strategies of ours that learn
from recorded outcomes, each with its defaults, and what they must be held against: random choice, the best single model and the best
model of the true task (chosen on what is learned from), and the oracle.

    llmrouter       5,541 questions, 9 open models, costs estimated; MiniLM vectors; 80/20 by task, ten splits
    routellm_mmlu   13,937 questions, Mixtral and GPT-4; hashed TF-IDF of 1,024 buckets; the first three splits
    made            topics with words of their own and models good at some of them: small, for a quick look and for tests

LLMRouter's published test repeats 69 questions of its train; both are merged, and a question is on one side only. Learned in-domain,
the figures on MMLU are not those of routers that learned from arena votes (RouteLLM). GPQA is not in our copy of LLMRouter, so the
survey's measured floors (.618 for the best single model, .645 to .652 for simple routers) are of another mix of questions.

Rules. All claims are ours: no figure of the survey is tested, and the primary one, that several simple ways beat the best single model,
is of our own asking. "Beats the best single model by 2 points": gain over all splits of more than 0.02 with p < 0.05 against a gain of
0.02, by the bootstrap over questions (2,000 draws; a question counts with all splits it was tested in) and Holm's correction over all
strategies; the claim asks for four of them, of those that are not told the task. "No strategy is below chance", in every split: mean
score below random choice, or APGR below 0.5 on MMLU. "APGR on MMLU": the mean over splits of the best arm that is not told the subject is
at least .68; it holds if so in every split, too. "Bandits", one claim each: from 4,000 rounds in which only the chosen model's score is
seen, it reaches 95% of the test score of ridge regression that saw all outcomes, in every split; one split in which it does not is enough
for "does not hold". "Quick": 99 of 100 decisions within 1 ms of the clock given a vector, mean over splits, on LLMRouter. "Twenty
minutes": one split of all sets takes at most 2,400 processor seconds over all arms that ran (20 minutes of two cores), vectors being
there. The survey's claim on routing after an answer (a cascade on GSM8K) is not judged: those answers are not among the public sets we
have.

What was changed after results were seen, each time to be stricter: `task`, told the subject of a question, was at first among the arms
whose best counts for APGR, and would have been that arm. Until November 2026 scores were held against chance on the main set alone, and
`hybrid` went unseen. Until December 2026 the p of "by 2 points" was against no gain at all, and the three bandits were one claim, which
one that fails in every split could not decide. The 1,024 buckets were chosen after trials on the first split of MMLU. Which questions are
the same is judged otherwise since (signs tell them apart), so that no run of before counts.
"""
# Shapes: N questions of a test, Q of a set, M models, S strategies

import base64
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.files import atomic_file, atomic_write_text
from anabranch.report.style import GRID, INK, MUTED, SERIES, figure, to_png, to_svg
from anabranch.routers import strategies
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.program import Program
from anabranch.routers.contract.query import Outcome, Pool
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.data import SETS, RoutingSet, pool_of, split
from anabranch.routers.embed import Embedder, embed_cached
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.embed.minilm import SHA256
from anabranch.routers.referee import aiq, bootstrap, holm, try_out, with_cheapest
from anabranch.routers.referee import baselines as rules
from anabranch.routers.strategies.bandit import Bandit
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.outcomes import digest_of
from anabranch.studies.paired import Verdict, every_seed

BASELINES = ("random", "best-single", "true-task", "oracle")

# Knows the true task, as the baseline does.
TOLD = ("task",)

BANDITS = ("eps_greedy", "thompson", "linucb")

# In place of a paper's number.
OURS = "ours; the survey has no figures"

# Learn nothing, or everything.
PLAIN = ("static", "random", "round_robin", "least_latency", "cheapest", "oracle")
GAIN, ALPHA, WINNERS, APGR, SHARE, FAST_MS, BUDGET_S = 0.02, 0.05, 4, 0.68, 0.95, 1.0, 2400.0

WINNING = f"at least {WINNERS} strategies beat the best single model by {100 * GAIN:g} points"

# A gain of 1, as one byte.
CODE = 127

COLUMNS = (
    Column("llmrouter_score", "LLMRouter\nscore", ".4f"),
    Column("llmrouter_gain", "gain on\nbest single", "+.4f"),
    Column("llmrouter_aiq", "AIQ", ".4f"),
    Column("llmrouter_online", "after 4,000\nrounds", ".4f"),
    Column("routellm_mmlu_apgr", "MMLU\nAPGR", ".4f"),
    Column("routellm_mmlu_cpt50", "CPT\n50%", ".3f"),
    Column("made_score", "made\nscore", ".4f"),
    Column("llmrouter_p99_ms", "decision\nms p99", ".3f"),
    Column("seconds", "CPU s", ".1f"),
)


@configclass
class Case(Config):
    """One arm.

    Attributes:
        strategy: a name of `strategies.make`, or one of `BASELINES`.
        sets: of outcomes.
        splits: of each set, the first so many seeds.
        rounds: of what a bandit learns from.
        buckets: of TF-IDF.
        test_share: of the questions.
    """

    strategy: str
    sets: tuple[str, ...] = ("llmrouter", "routellm_mmlu")
    splits: tuple[int, ...] = (10, 3)
    rounds: int = Field(default=4000, ge=1)
    buckets: int = 1024
    test_share: float = 0.2


def make(full: bool = False) -> Study:
    """The recorded study, or a quick look at a small set that is made up."""
    base = Case(strategy="") if full else Case(strategy="", sets=("made",), splits=(2,), rounds=300, buckets=128)
    made = [Arm(name, _about(name), base.replace(strategy=name)) for name in (*BASELINES, *learners())]
    return Study(
        name="routing_survey",
        title="ways of routing queries to models, on recorded outcomes",
        settings={"size": "full" if full else "smoke", **to_dict(base.replace(strategy="each"))},
        arms=made,
        seeds=tuple(range(10)) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
        inputs=lambda case: read_by(case.sets),
        noted_only=True,
        primary=WINNING,
    )


def learners() -> list[str]:
    """Names of strategies that learn from outcomes alone: no answers to read, no model to ask."""
    return [name for name in strategies.names() if name not in PLAIN and _learns(name)]


def _learns(name: str) -> bool:
    try:
        one = strategies.make(name)
    except ImportError:
        # Of an extra that is not installed.
        return False
    return type(one).fit is not Strategy.fit and not (one.reads_answers or one.is_async or isinstance(one, Program))


def _about(name: str) -> str:
    return {
        "random": "every model alike",
        "best-single": "the best model of what is learned from",
        "true-task": "its best model for each task, which is told",
        "oracle": "the best answer of each question",
    }.get(name, f"strategy {name}, its defaults")


def run(case: Case, seed: int, progress: Progress) -> Metrics:
    """One arm on one split of every set that has so many splits."""
    found: Metrics = {}
    seconds = 0.0
    for name, splits in zip(case.sets, case.splits, strict=True):
        if seed >= splits:
            continue
        progress(f"{name}: reading and embedding")
        train, test, row_N, embedder = part(name, seed, case.buckets, case.test_share)
        started = time.process_time()
        if case.strategy in BASELINES:
            found |= _baseline(case.strategy, name, train, test)
        else:
            progress(f"{name}: learning and playing")
            found |= _judged(case, name, seed, train, test, embedder)
        seconds += time.process_time() - started
        # Which questions the gains of this split are of.
        if case.strategy == "best-single":
            found[f"{name}_rows"] = _packed(row_N.astype("<u2"))
    return found | {"seconds": seconds}


def _baseline(kind: str, name: str, train: Recorded, test: Recorded) -> Metrics:
    rule = {
        "random": lambda: rules.random_choice(test),
        "best-single": lambda: rules.best_single(train, test),
        "true-task": lambda: rules.best_per_task(train, test),
        "oracle": lambda: rules.oracle(test),
    }[kind]()
    best = rules.best_single(train, test)
    assert rule is not None
    found = {
        f"{name}_score": float(rule.quality_N.mean()),
        f"{name}_gain": float((rule.quality_N - best.quality_N).mean()),
    }
    return found if rule.cost_N is None else {**found, f"{name}_cost": float(rule.cost_N.mean())}


def _judged(case: Case, name: str, seed: int, train: Recorded, test: Recorded, embedder: Embedder) -> Metrics:
    made = strategies.make(case.strategy)
    pool = pool_of(test.models, {model.name: model for model in _set(name).pool.models})
    trial = try_out(case.strategy, made, train, test, pool, [seed], embedder.embed)
    assert trial.curve_P2 is not None
    assert test.cost_NM is not None
    single_M2 = np.column_stack([test.cost_NM.mean(0), test.score_NM.mean(0)])
    low, high = single_M2[:, 0].min(), single_M2[:, 0].max()
    gain_N = trial.quality_N - rules.best_single(train, test).quality_N
    path = trial.recovery
    found: Metrics = {
        f"{name}_score": float(trial.quality_N.mean()),
        f"{name}_gain": float(gain_N.mean()),
        f"{name}_cost": float(trial.cost_N.mean()),
        f"{name}_aiq": aiq(with_cheapest(trial.curve_P2, single_M2), float(low), float(high)),
        f"{name}_fit_s": trial.fit_s,
        f"{name}_apgr": None if path is None else path.apgr,
        f"{name}_cpt50": None if path is None else path.cpt(0.5),
        f"{name}_gains": _packed(np.rint(CODE * gain_N).astype("i1")),
        f"{name}_p99_ms": None if trial.latency_ms is None else trial.latency_ms[1],
    }
    if isinstance(made, Bandit):
        found[f"{name}_online"] = online(made.config.build(), train, test, pool_of(test.models), case.rounds, seed)
    return found


def online(bandit: Strategy, train: Recorded, test: Recorded, pool: Pool, rounds: int, seed: int) -> float:
    """Mean test score of a bandit that saw ``rounds`` questions, and of each only the score of the model it chose."""
    queries = list(train.queries())
    order = np.random.default_rng(seed).permutation(len(queries))
    for step in range(rounds):
        row = order[step % len(order)]
        decision = bandit.route(queries[row], pool)
        column = train.models.index(decision.model)
        cost = None if train.cost_NM is None else float(train.cost_NM[row, column])
        bandit.observe(
            Outcome(
                query=queries[row],
                model=decision.model,
                quality=float(train.score_NM[row, column]),
                cost=cost,
                decision=decision,
            )
        )
    return float(bandit.play(test, pool).quality_N.mean())


@cache
def part(name: str, seed: int, buckets: int, share: float) -> tuple[Recorded, Recorded, np.ndarray, Embedder]:
    """Train and test with vectors, the rows of the test in the set, and what made the vectors."""
    data = _set(name).data
    place = {text: row for row, text in enumerate(data.query)}
    train, test = split(data, (1 - share, share), seed=seed)
    if name == "llmrouter":
        from anabranch.routers.embed.minilm import MiniLM

        embedder: Embedder = MiniLM(MiniLM.Config())
        train, test = (one.with_vectors(embed_cached(embedder, one.query)) for one in (train, test))
    else:
        embedder = Hashed(Hashed.Config(dim=buckets)).fit(train.query)
        train, test = (one.with_vectors(embedder.embed(one.query)) for one in (train, test))
    return train, test, np.array([place[text] for text in test.query]), embedder


@cache
def read_by(sets: tuple[str, ...]) -> str:
    """Digest of what is read of these sets of outcomes."""
    embedders = {"llmrouter": SHA256}
    return " ".join(digest_of(_set(one).data, _set(one).pool, embedder=embedders.get(one, "")) for one in sets)


@cache
def _set(name: str) -> RoutingSet:
    return made_up() if name == "made" else SETS[name]()


def made_up(num: int = 600, topics: int = 6, models: int = 4, seed: int = 0) -> RoutingSet:
    """Questions of topics, each with words of its own; each model is good at some topics and dearer the better it is overall."""
    generator = np.random.default_rng(seed)
    skill_TM = np.clip(generator.uniform(0.1, 0.6, (topics, models)) + np.linspace(0, 0.25, models), 0, 1)
    skill_TM[np.arange(topics), generator.integers(0, models, topics)] = 0.95
    topic_N = generator.integers(0, topics, num)
    text = []
    for row, topic in enumerate(topic_N):
        own, common = generator.integers(0, 12, 6), generator.integers(0, 99, 4)
        text.append(" ".join([*(f"t{topic}w{word}" for word in own), *(f"x{word}" for word in common), f"n{row}"]))
    names = tuple(f"model-{number}" for number in range(models))
    data = Recorded(
        query=tuple(text),
        models=names,
        task=tuple(f"topic {topic}" for topic in topic_N),
        score_NM=(generator.random((num, models)) < skill_TM[topic_N]).astype(float),
        cost_NM=np.tile(1e-4 * 3.0 ** np.arange(models), (num, 1)),
    )
    return RoutingSet(data=data, pool=pool_of(names), about="made up")


def judge(results: Results) -> list[Claim]:
    """The claims; see the rules in the module's docstring."""
    arms = [name for name in results.runs if name not in BASELINES]
    main = next(
        (name for name in ("llmrouter", "made") if any(results.values(arm, f"{name}_score") for arm in arms)), ""
    )
    claims = [_winners(results, arms, main), _above_chance(results, arms), _best_apgr(results, arms)]
    bandits = [_bandit(results, arm, main) for arm in BANDITS]
    return [*claims, *bandits, _quick(results, arms, main), _in_time(results)]


def gains(
    results: Results, arms: Sequence[str], name: str, beyond: float = 0.0
) -> dict[str, tuple[float, float, float]]:
    """Gain of each arm on the best single model over all splits, its p against a gain of ``beyond``, and that p by Holm; empty until the
    reference arm has run."""
    reference = results.runs.get("best-single", {})
    seeds = [seed for seed, metrics in reference.items() if f"{name}_rows" in metrics]
    ready = [arm for arm in arms if seeds and all(f"{name}_gains" in results.runs[arm].get(seed, {}) for seed in seeds)]
    if not ready:
        return {}
    row_N = [_unpacked(reference[seed][f"{name}_rows"], "<u2") for seed in seeds]
    num = 1 + max(int(rows.max()) for rows in row_N)
    count_Q, sum_QS = np.zeros(num), np.zeros((num, len(ready)))
    for seed, rows in zip(seeds, row_N, strict=True):
        count_Q[rows] += 1
        for column, arm in enumerate(ready):
            sum_QS[rows, column] += _unpacked(results.runs[arm][seed][f"{name}_gains"], "i1") / CODE
    seen = count_Q > 0
    found = bootstrap(sum_QS[seen] - beyond * count_Q[seen, None], count_N=count_Q[seen])
    corrected = holm([one.p for one in found])
    return {arm: (one.mean + beyond, one.p, p) for arm, one, p in zip(ready, found, corrected, strict=True)}


def _winners(results: Results, arms: Sequence[str], name: str) -> Claim:
    found = gains(results, arms, name, GAIN)
    winners = sorted(
        (arm for arm, (gain, _, p) in found.items() if arm not in TOLD and gain > GAIN and p < ALPHA),
        key=lambda arm: -found[arm][0],
    )
    verdict: Verdict = "holds" if len(winners) >= WINNERS else "does not hold"
    if len(results.values("best-single", f"{name}_score")) < 2:
        verdict = "not resolved"
    if not found:
        return Claim.not_run(WINNING, OURS)
    told, ours = f"{WINNING} ({', '.join(winners) or 'none'})", float(len(winners))
    return Claim.against(WINNERS, told, OURS, ours, verdict)


def _above_chance(results: Results, arms: Sequence[str]) -> Claim:
    """On each set that was run; told are the figures of the one where the worst arm does worst beside chance."""
    told, apart, seen = "no strategy is below chance on any set", {}, []
    for name in (*SETS, "made"):
        random = results.values("random", f"{name}_score")
        worst = {
            seed: min(
                (value for arm in arms if (value := results.values(arm, f"{name}_score").get(seed)) is not None),
                default=np.nan,
            )
            for seed in random
        }
        pairs = [(worst[seed], random[seed]) for seed in random if np.isfinite(worst[seed])]
        seen += [ours > chance for ours, chance in pairs]
        if pairs:
            ours, chance = np.mean(pairs, axis=0).tolist()
            apart[name] = (ours - chance, ours, chance)
    if not seen:
        return Claim.not_run(told, OURS)
    seen += [value > 0.5 for arm in arms for value in results.values(arm, "routellm_mmlu_apgr").values()]
    verdict: Verdict = every_seed(seen) if all(seen) else "does not hold"
    difference, ours, chance = min(apart.values())
    return Claim(told, OURS, chance, ours, difference, None, verdict)


def _best_apgr(results: Results, arms: Sequence[str]) -> Claim:
    told_nothing = [arm for arm in arms if arm not in TOLD]
    paper = "domain mean .673, TF-IDF ridge .675 (measured before)"
    if not any(results.values(arm, "routellm_mmlu_apgr") for arm in told_nothing):
        return Claim.not_run(f"the best strategy has an APGR of at least {APGR} on MMLU", paper)
    best = max(
        told_nothing,
        key=lambda arm: (
            results.mean(arm, "routellm_mmlu_apgr").mean if results.values(arm, "routellm_mmlu_apgr") else -np.inf
        ),
    )
    values = list(results.values(best, "routellm_mmlu_apgr").values())
    mean = float(np.mean(values))
    told = f"the best strategy ({best}) has an APGR of at least {APGR} on MMLU"
    verdict = every_seed([value >= APGR for value in values])
    return Claim.against(APGR, told, paper, mean, verdict)


def _bandit(results: Results, arm: str, name: str) -> Claim:
    """In every split: one in which it does not reach the share is enough. The least share stands in the table."""
    told = f"{arm} reaches {SHARE:.0%} of ridge regression that saw all outcomes, in every split"
    full, ours = results.values("ridge", f"{name}_score"), results.values(arm, f"{name}_online")
    shares = [ours[seed] / full[seed] for seed in sorted(ours.keys() & full.keys())]
    if not shares:
        return Claim.not_run(told, OURS)
    seen = [share >= SHARE for share in shares]
    verdict: Verdict = every_seed(seen) if all(seen) else "does not hold"
    return Claim.against(SHARE, told, OURS, min(shares), verdict, count=len(shares))


def _quick(results: Results, arms: Sequence[str], name: str) -> Claim:
    means = {arm: results.mean(arm, f"{name}_p99_ms").mean for arm in arms if results.values(arm, f"{name}_p99_ms")}
    slowest = max(means, key=means.__getitem__, default="")
    told = f"99 of 100 decisions within {FAST_MS:g} ms, given a vector" + f" (slowest: {slowest})" * bool(means)
    if not means:
        return Claim.not_run(told, OURS)
    verdict: Verdict = "holds" if means[slowest] <= FAST_MS else "does not hold"
    return Claim.against(FAST_MS, told, OURS, means[slowest], verdict)


def _in_time(results: Results) -> Claim:
    spent = sum(results.runs[arm][0]["seconds"] for arm in results.runs if 0 in results.runs[arm])
    told = f"all strategies on all sets, one split, within {BUDGET_S:,.0f} processor seconds"
    if not any(0 in runs for runs in results.runs.values()):
        return Claim.not_run(told, "under 20 minutes of two cores")
    verdict: Verdict = "holds" if spent <= BUDGET_S else "does not hold"
    return Claim.against(BUDGET_S, told, "under 20 minutes of two cores", spent, verdict)


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _unpacked(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def draw(results: Results, path: Path) -> None:
    """Left, score of each arm with its splits; right, APGR on MMLU, where it was measured."""
    main = "llmrouter" if any(results.values(arm, "llmrouter_score") for arm in results.runs) else "made"
    panels = [(f"{main}_score", "mean score, LLMRouter" if main == "llmrouter" else "mean score, made up")]
    if any(results.values(arm, "routellm_mmlu_apgr") for arm in results.runs):
        panels.append(("routellm_mmlu_apgr", "APGR, MMLU of two models"))
    arms = [arm for arm in results.runs if arm not in BASELINES]
    arms.sort(key=lambda arm: -results.mean(arm, panels[0][0]).mean if results.values(arm, panels[0][0]) else 0.0)
    with figure(5.4 * len(panels), 1.5 + 0.27 * len(arms), ncols=len(panels), squeeze=False) as (made, axes):
        for place, (metric, label) in zip(axes[0], panels, strict=True):
            for row, arm in enumerate(arms):
                values = list(results.values(arm, metric).values())
                place.plot(values, [row] * len(values), "o", color=MUTED, markersize=3, alpha=0.5)
                if values:
                    place.plot(np.mean(values), row, "D", color=SERIES[0], markersize=5)
            lines = {arm: results.mean(arm, metric).mean for arm in BASELINES[1:] if results.values(arm, metric)}
            for number, (arm, value) in enumerate({**lines, **({"chance": 0.5} if "apgr" in metric else {})}.items()):
                place.axvline(
                    value, color=INK if arm == "oracle" else MUTED, linestyle=(0, (2 + 3 * number, 2)), linewidth=1
                )
                place.annotate(
                    arm,
                    (value, 1),
                    (0, 3),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    ha="center",
                    color=MUTED,
                    fontsize=7.5,
                )
            place.set_yticks(range(len(arms)), arms)
            place.set_ylim(len(arms) - 0.5, -0.5)
            place.set_xlabel(label)
            place.grid(axis="x", color=GRID)
        png, svg = to_png(made), to_svg(made)
    with atomic_file(path.with_name(f"{path.name}.png")) as temporary:
        temporary.write_bytes(png)
    atomic_write_text(path.with_name(f"{path.name}.svg"), svg)
