"""Do a large model's answers lift a small one, does predicted use select better than similarity, does the router hold under load?

"IC-Cache: Efficient Large Language Model Serving via In-context Caching", SOSP 2025, arXiv 2501.12689. On NL2Bash the paper's 3B model
goes from 37.4% without examples to 24.8% with 5 random and 54.5% with 5 selected ones; similarity correlates 0.04 to 0.22 with use; 1.4 to
5.9 times the throughput at equal quality.

SmolLM2-135M-Instruct answers requests of NL2Bash held out; the reference commands of the other requests stand for a strong model's
answers. ``score`` is the mean of right command and argument recall (share of the request's literals that belong in the command and are
there); token F1 comes second, since it favours handing out a neighbour's command. A seed is a shard of 20 requests. Arms:

    none, random5, similar1, similar5, utility5        E1: what stands before the request
    nearest                                            the nearest stored command, nobody is asked; GPTCache serves the same where the
                                                       cosine is at least 0.6, its threshold of 0.8 (checked: benchmarks/_gptcache.py)
    similar5-far, utility5-far, nearest-far            without pool entries nearer than 0.8 to a held-out request
    similar5-flip, utility5-flip, nearest-flip         made requests whose nearest neighbour asks the opposite
    similar5-other, nearest-other                      made requests whose neighbours all have other names
    labels                                             E2: 250 answers with one example each, for the proxy
    proxy                                              how well proxies rank them (trained on the other shards)
    load-...                                           E3: Azure's arrivals, qualities and seconds of utility5 and none; the large arm
                                                       is the reference, at 8 times the small one's seconds
    keep-..., drift-...                                E4 and E5: see `ic_cache_keep`

The rule, fixed before the recorded runs. Claims on answers: bootstrap over requests (2,000 draws, paired); holds if the 95% interval of
the difference lies above what is claimed, does not hold if below. Correlations: t-interval over shards. Claims of E3 hold if so in every
one of at least two seeds; E4 and E5: paired t-intervals over seeds. "Dominated" means that another policy has at least the quality and at
most the P99 of ours, and is better by 0.5 points or 5% in one. P99 is bounded if it is at most 10 large service times; a load is sustained
if it is at most 5.
"""
# Shapes: R requests

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.files import atomic_file, atomic_write_text
from anabranch.places import data_file
from anabranch.report.style import GRID, INK, MUTED, SERIES, figure, to_png, to_svg
from anabranch.routers.contract.query import Query
from anabranch.routers.ic_cache.baselines import RandomExamples, TopSimilar
from anabranch.routers.ic_cache.cross_encoder import CrossEncoder
from anabranch.routers.ic_cache.proxy import Logistic, Mlp, Proxy, Similarity, merge
from anabranch.routers.ic_cache.router import Router
from anabranch.routers.ic_cache.selector import Selection, Selector
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.ic_cache_claims import claims
from anabranch.studies.ic_cache_keep import copied, drift, retained
from anabranch.studies.ic_cache_load import Measured, sweep
from anabranch.studies.ic_cache_work import (
    LARGE,
    SHARDS,
    SMALL,
    Work,
    labels,
    nl2bash_work,
    prompt,
    shard_of,
)
from anabranch.studies.nl2bash import PAIRS, PAIRS_SOURCE, Pair, clean, measure, reversals
from anabranch.studies.reading import TRACE, of_files
from anabranch.studies.small_model import SHA256, Reply, SmallModel

# Held-out requests that are answered, of 400 held out.
ASKED = 160
FLIPPED = 160  # made requests

# Of utility5: the lowest of the grid.
TAU = 0.3

# The large arm's seconds over those of the small one without examples.
LARGE_COST = 8.0
LOADS = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
MEASURES = ("score", "right", "recall", "f1", "exact")

COLUMNS = (
    Column("score", "score", ".3f"),
    Column("recall", "argument\nrecall", ".3f"),
    Column("right", "right\ncommand", ".3f"),
    Column("f1", "token F1", ".3f"),
    Column("exact", "exact", ".3f"),
    Column("wrong_way", "opposite\nanswer", ".2f"),
    Column("prompt_tokens", "prompt\ntokens", ".0f"),
    Column("cpu_s", "CPU s per\nanswer", ".2f"),
    Column("quality@0.5", "quality,\nload 0.5", ".3f"),
    Column("quality@1.3", "quality,\nload 1.3", ".3f"),
    Column("p99@1.3", "P99,\nload 1.3", ".1f"),
)


@configclass
class Case(Config):
    """One arm.

    Attributes:
        part: answers, labels, proxy, load, keep or drift.
        how: what stands before a request, a policy, or a rule of keeping.
        count: examples.
        pool: "all", "far", "flip" or "other".
        asked: requests that are answered in all.
        limit: arrivals of the trace; None for all.
        decay: of drift.
        newcomers: of drift.
    """

    part: str = "answers"
    how: str = "none"
    count: int = Field(default=5, ge=0)
    pool: str = "all"
    asked: int = ASKED
    limit: int | None = None
    decay: float = 0.9
    newcomers: float = 0.25


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; the small one answers 32 requests and simulates 2,000 arrivals."""
    base = Case().replace(**changes) if full else Case(asked=32, limit=2000).replace(**changes)
    made = arms(base)
    default = [arm.name for arm in made if full or arm.name in SMOKE]
    return Study(
        name="ic_cache",
        title="examples from a large model's answers, and routing under load",
        settings={"size": "full" if full else "smoke", **to_dict(base)},
        arms=made,
        default_arms=tuple(default),
        seeds=tuple(range(SHARDS)) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
        inputs=read_by,
        # Of the paper's own selection, two-stage by predicted use; neighbours alone are what it is an answer to.
        primary="predicted use selects better than similarity",
    )


def read_by(case: Case) -> str:
    """Digest of requests and commands, of the trace where requests arrive by it, and of the model's weights."""
    files = [data_file(PAIRS, PAIRS_SOURCE), *([data_file(TRACE)] if case.part == "load" else [])]
    return f"{of_files(files)} {SHA256[:16]}"


SMOKE = ("none", "similar1", "nearest", "nearest-flip", "keep-knapsack", "keep-random", "drift-decay", "drift-none")


def arms(base: Case) -> list[Arm]:
    """All of them."""

    def answers(name: str, about: str, how: str, count: int = 5, pool: str = "all") -> Arm:
        return Arm(name, about, base.replace(how=how, count=count, pool=pool))

    def other(name: str, about: str, **fields: Any) -> Arm:
        return Arm(name, about, base.replace(**fields))

    return [
        answers("none", "no example", "none", 0),
        answers("random5", "5 random examples", "random"),
        answers("similar1", "the most similar example", "similar", 1),
        answers("similar5", "the 5 most similar", "similar"),
        answers("utility5", "5 by predicted use, diverse", "utility"),
        answers("nearest", "the nearest answer", "nearest", 0),
        answers("similar5-far", "5 most similar, no near-duplicates", "similar", 5, "far"),
        answers("utility5-far", "5 by predicted use, no near-duplicates", "utility", 5, "far"),
        answers("nearest-far", "the nearest answer, no near-duplicates", "nearest", 0, "far"),
        answers("similar5-flip", "5 most similar, the nearest asks the opposite", "similar", 5, "flip"),
        answers("utility5-flip", "5 by predicted use, the nearest asks the opposite", "utility", 5, "flip"),
        answers("nearest-flip", "the nearest answer, which is the opposite", "nearest", 0, "flip"),
        answers("similar5-other", "5 most similar, all with other names", "similar", 5, "other"),
        answers("nearest-other", "the nearest answer, with another name", "nearest", 0, "other"),
        other("labels", "outcomes of single examples", part="labels"),
        other("proxy", "how well proxies rank outcomes", part="proxy"),
        *(other(f"load-{name}", about, part="load", how=name) for name, about in POLICIES.items()),
        *(other(f"keep-{rule}", f"5% of the pool by {rule}", part="keep", how=rule) for rule in KEEPS),
        other("keep-all", "the whole pool", part="keep", how="all"),
        other("drift-decay", "offloads decay", part="drift"),
        other("drift-none", "no decay", part="drift", decay=1.0),
        other("drift-paper", "offloads decay, no room for newcomers", part="drift", newcomers=0.0),
    ]


POLICIES = {
    "ours": "the bandit",
    "ours-no-load": "the bandit, blind to load",
    "small": "always small with examples",
    "large": "always large",
    "static0.3": "classifier, threshold 0.3",
    "static0.5": "classifier, threshold 0.5",
    "static0.7": "classifier, threshold 0.7",
}
KEEPS = ("knapsack", "knapsack-all", "random", "newest")


def run(case: Case, seed: int, progress: Progress) -> Metrics:
    """One arm, one shard or seed."""
    if case.part == "answers":
        return answer(case, seed, progress)
    if case.part == "labels":
        pairs, score, replies = labels(SmallModel(), seed, progress)
        similarity = pairs.feature_KF[:, 0]
        return {
            "score": float(score.mean()),
            "similarity_correlation": correlation(similarity, score),
            "cpu_s": float(np.mean([reply.cpu_s for reply in replies])),
            "count": len(score),
        }
    if case.part == "proxy":
        return judge_proxies(seed, progress)
    if case.part == "load":
        return sweep(case.how, measured(case.asked, progress), LOADS, seed, progress, case.limit)
    if case.part == "keep":
        kept = retained(nl2bash_work(), 0.05, case.how, seed)
        return {"copied": copied(kept), "examples": len(kept.stored)}
    return drift(nl2bash_work(), case.decay, seed, newcomers=case.newcomers, count=4000, capacity_kb=40)


# E1: answers


def work_of(pool: str) -> tuple[Work, list[str] | None]:
    """Requests and pool, and of made requests the opposite answers."""
    if pool in ("flip", "other"):
        cases, stored = reversals(FLIPPED, opposites=pool == "flip")
        return Work([case.pair for case in cases], stored), [case.reversed_command for case in cases]
    return (far_work() if pool == "far" else nl2bash_work()), None


@functools.cache
def far_work() -> Work:
    """Without near-duplicates."""
    return nl2bash_work().without_near()


def answer(case: Case, shard: int, progress: Progress) -> Metrics:
    """Answers to a shard of requests, measured."""
    work, wrong = work_of(case.pool)
    rows = shard_of(case.asked, shard)
    pairs = [work.held[row] for row in rows]
    selections = [select(case, work, row, shard, progress) for row in rows]
    nearest = [work.similar(work.held[row].request, work.vector_ND[row], 1) for row in rows]
    replies: list[Reply] = []
    if case.how == "nearest":
        texts = [examples[0].response for examples, _ in nearest]
    else:
        examples = [[item.example for item in selection.chosen] for selection in selections]
        prompts = [prompt(pair.request, shown) for pair, shown in zip(pairs, examples, strict=True)]
        replies = SmallModel().answer(prompts, progress)
        texts = [clean(reply.text) for reply in replies]
    found: Metrics = tabulate(texts, pairs)
    found["similarity_each"] = [float(similarity[0]) for _, similarity in nearest]
    found["shown"] = float(np.mean([len(selection.chosen) for selection in selections]))
    if replies:
        found["prompt_tokens"] = float(np.mean([reply.prompt_tokens for reply in replies]))
        found["cpu_s"] = float(np.mean([reply.cpu_s for reply in replies]))
        found["cpu_s_each"] = [round(reply.cpu_s, 4) for reply in replies]
    if wrong is not None:
        opposite = [text.split() == wrong[row].split() for text, row in zip(texts, rows, strict=True)]
        found["wrong_way"], found["wrong_way_each"] = float(np.mean(opposite)), [float(value) for value in opposite]
    return found


def tabulate(texts: Sequence[str], pairs: Sequence[Pair]) -> Metrics:
    """Means, and each measure of each answer."""
    each = [measure(text, pair) for text, pair in zip(texts, pairs, strict=True)]
    found: Metrics = {}
    for name in MEASURES:
        known = [value for row in each if (value := row[name]) is not None]
        found[name] = float(np.mean(known)) if known else None
        found[f"{name}_each"] = [row[name] for row in each]
    return found


def select(case: Case, work: Work, row: int, shard: int, progress: Progress) -> Selection:
    """What stands before a request."""
    query, vector_D = Query(text=work.held[row].request), work.vector_ND[row]
    if case.how == "random":
        return RandomExamples(work.pool, case.count, seed=1000 * shard + row).select(query, vector_D, now_s=0.0)
    if case.how == "similar":
        return TopSimilar(work.pool, case.count).select(query, vector_D, now_s=0.0)
    if case.how == "utility":
        selector = Selector(Selector.Config(max_examples=case.count), work.pool, fitted_proxy(progress))
        return selector.select(query, vector_D, SMALL, tau=TAU, now_s=0.0)
    return Selection()


# E2: the proxy


_PROXY: list[Proxy] = []


def fitted_proxy(progress: Progress) -> Proxy:
    """The default proxy, taught all labels."""
    if not _PROXY:
        parts = [labels(SmallModel(), shard, progress) for shard in range(SHARDS)]
        score = np.concatenate([part[1] for part in parts])
        _PROXY.append(Logistic.Config().build().fit(merge([part[0] for part in parts]), score))
    return _PROXY[0]


def judge_proxies(shard: int, progress: Progress) -> Metrics:
    """Correlation with the outcomes of one shard, of proxies taught the others."""
    parts = [labels(SmallModel(), other, progress) for other in range(SHARDS)]
    pairs = merge([part[0] for at, part in enumerate(parts) if at != shard])
    score = np.concatenate([part[1] for at, part in enumerate(parts) if at != shard])
    found: Metrics = {}
    for config in (Similarity.Config(), Logistic.Config(), Mlp.Config(), CrossEncoder.Config()):
        proxy = config.build().fit(pairs, score, seed=shard)
        found[f"{proxy.kind}_correlation"] = correlation(proxy.score(parts[shard][0]), parts[shard][1])
    return found


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's."""
    return float(np.corrcoef(first, second)[0, 1])


# E3: what the simulation draws from


@functools.cache
def measured(asked: int, progress: Progress) -> Measured:
    """Qualities and seconds of all requests, as measured by the arms utility5 and none."""
    work, _ = work_of("all")
    router = Router(Router.Config(), (SMALL, LARGE), (0.3, 1.0), work.embedder.dim)
    contexts, quality, service = [], [], []
    for shard in range(SHARDS):
        with_examples = answer(Case(how="utility", asked=asked), shard, progress)
        bare = answer(Case(how="none", asked=asked), shard, progress)
        for place, row in enumerate(shard_of(asked, shard)):
            selection = select(Case(how="utility"), work, row, shard, progress)
            contexts.append(router.context(work.vector_ND[row], selection, len(work.held[row].request) // 4))
            quality.append((with_examples["score_each"][place], 1.0))
            service.append((with_examples["cpu_s_each"][place], LARGE_COST * bare["cpu_s_each"][place]))
    return Measured(np.array(contexts), np.array(quality), np.array(service))


# The claims and the picture


def judge(results: Results) -> list[Claim]:
    """All claims whose arms have run; see the rule in the module's docstring."""
    return claims(results, POLICIES, LOADS)


def draw(results: Results, path: Path) -> None:
    """Left, score and recall of each arm; right, quality against P99 of each policy over loads."""
    rows = [arm for arm in results.runs if results.values(arm, "score") and arm != "labels"]
    policies = [name for name in POLICIES if results.runs.get(f"load-{name}")]
    with figure(10, max(3.4, 1.4 + 0.32 * len(rows)), ncols=2) as (made, (left, right)):
        made.suptitle("IC-Cache at our scale", x=0.01, ha="left", fontweight="bold", color=INK)
        for row, arm in enumerate(rows):
            for metric, colour, mark in (("score", SERIES[0], "D"), ("recall", SERIES[1], "o"), ("f1", MUTED, "s")):
                values = list(results.values(arm, metric).values())
                if values:
                    # A point at 1 is drawn whole.
                    label = metric if row == 0 else None
                    left.plot(np.mean(values), row, mark, color=colour, markersize=5, label=label, clip_on=False)
        left.set_yticks(range(len(rows)), rows)
        left.set_ylim(len(rows) - 0.5, -0.5)
        left.set_xlim(0, 1)
        left.set_xlabel("of the answers")
        if rows:
            left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize=8)
        for number, name in enumerate(policies):
            runs = results.runs[f"load-{name}"].values()
            quality, p99 = (
                [float(np.mean([run[f"{metric}@{rho:g}"] for run in runs])) for rho in LOADS]
                for metric in ("quality", "p99")
            )
            right.plot(p99, quality, ".-", color=SERIES[number % len(SERIES)], linewidth=1, markersize=5, label=name)
        right.set_xlabel("P99, large service times (loads 0.5 to 1.5)")
        right.set_ylabel("quality")
        if policies:
            right.set_xscale("log")
            right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, fontsize=8)
        for axes in (left, right):
            axes.grid(color=GRID)
        png, svg = to_png(made), to_svg(made)
    with atomic_file(path.with_name(f"{path.name}.png")) as temporary:
        temporary.write_bytes(png)
    atomic_write_text(path.with_name(f"{path.name}.svg"), svg)
