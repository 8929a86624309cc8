"""Are parallel streams worth parameters, and how many?

"Parallel Scaling Law for Language Models", 2025, arXiv 2505.10475. The paper, 0.5B to 4.4B parameters and 42B tokens: every doubling of
P lowers the loss by 1 to 2%, so that P streams are worth k ln P + 1 times the parameters, k = 0.39 on Python, 0.33 on the Pile
(``anabranch study parscale --fit`` fits the published losses again, in seconds).

Scaled down: 0.7M parameters, 4 layers, prefixes of 8, bytes of Python source, 0.7M tokens a run instead of 42B. A run with P = 4 takes four
times the processor time of the plain model (about 5 minutes on one thread). Read a verdict here as one on this size.

Arms, the same backbone from the same initial weights, the same tokens in the same order for one seed, the same optimiser:

    p1        the plain model
    p2, p4    2 and 4 streams
    prefix1   one stream with a prefix: is it the prefix, not the streams?
    copies2   2 streams without prefixes: must be the plain model
    wide15    a plain model with 1.5 times the parameters (wider feed-forward): what P = 4 is worth by the paper's k
    wide3     3 times the parameters, for the curve of losses over sizes
    p4-m0, p4-m48    4 streams with prefixes of 0 and 48
    p4-direct        4 streams whose prefixes are parameters, without the network that makes them

and of p1 and p4 also ``-slow`` and ``-fast`` (half and twice the learning rate: is the shared one fair to each?).

The rule, fixed before any run. Every claim is a paired difference over the seeds that both arms have, with its 95% t-interval.
"Better" holds if the whole interval of ours - baseline in bits per byte lies below 0, does not hold if it lies above 0, and is not
resolved otherwise or with fewer than two seeds. "Reaches" holds if the interval lies below 0.01, does not hold if it lies above. "Equals"
holds if it lies within +-0.01, does not hold if it lies outside. Each claim is judged alone: expect one in twenty to resolve by chance.
"""

from pathlib import Path
from typing import Any

from anabranch.config import Field, configclass
from anabranch.experts.parscale import PAPER_LOSSES, Law, ParScale, fit_parallel_law
from anabranch.nn.feed_forward import SwiGLU
from anabranch.studies.harness import Arm, Claim, Column, Results, Study
from anabranch.studies.paired import Estimate, Verdict, verdict_below
from anabranch.studies.picture import draw_arms
from anabranch.studies.size import RunSize
from anabranch.studies.training import train_and_measure
from anabranch.train import RunConfig

# Bits per byte that count as nothing.
EQUAL = 0.01
MAIN = ("p1", "p2", "p4", "prefix1", "copies2", "wide15")
SMOKE = ("p1", "p2", "copies2")

# The points of our law.
SIZES = ("p1", "p2", "p4", "wide15", "wide3")

COLUMNS = (
    Column("bits_per_byte", "bits/byte", ".4f"),
    Column("parameters", "parameters", ",.0f"),
    Column("flops_per_token", "FLOPs\n/token", ",.0f"),
    Column("tokens_per_cpu_second", "tokens\n/CPU s", ",.0f"),
)


@configclass
class Size(RunSize):
    """What is the same for all arms."""

    num_layers: int = Field(default=4, ge=1)
    hidden_dim: int = 256
    prefix_len: int = 8
    steps: int = Field(default=320, ge=1)


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`, for part of the work or another machine."""
    size = Size().replace(**changes) if full else Size(num_layers=2, steps=40).replace(**changes)

    def fit(results: Results) -> list[dict[str, Any]]:
        return laws(results, size)

    return Study(
        name="parscale",
        title="parallel streams of one model against the plain model and wider ones",
        settings=size.settings(full),
        arms=list(arms(size).values()),
        default_arms=MAIN if full else SMOKE,
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=train_and_measure,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
        fit=fit,
    )


def arms(size: Size) -> dict[str, Arm]:
    """All arms, built from one budget."""
    m = size.prefix_len
    slow, fast = (size.replace(learning_rate=size.learning_rate * factor) for factor in (0.5, 2.0))
    made = [
        _arm(size, "p1", "the plain model"),
        _arm(size, "p2", "2 streams", _streams(2, m)),
        _arm(size, "p4", "4 streams", _streams(4, m)),
        _arm(size, "prefix1", "1 stream with a prefix", _streams(1, m, prefix_alone=True)),
        _arm(size, "copies2", "2 streams without prefixes", _streams(2, 0)),
        _arm(size, "wide15", "plain, 1.5x parameters", widen=1.5),
        _arm(size, "wide3", "plain, 3x parameters", widen=3.0),
        _arm(size, "p4-m0", "4 streams without prefixes", _streams(4, 0)),
        _arm(size, "p4-m48", "4 streams, prefixes of 48", _streams(4, 48)),
        _arm(size, "p4-direct", "4 streams, prefixes as parameters", _streams(4, m, prefix="direct")),
        _arm(slow, "p1-slow", "the plain model, half the learning rate"),
        _arm(fast, "p1-fast", "the plain model, twice the learning rate"),
        _arm(slow, "p4-slow", "4 streams, half the learning rate", _streams(4, m)),
        _arm(fast, "p4-fast", "4 streams, twice the learning rate", _streams(4, m)),
    ]
    return {arm.name: arm for arm in made}


def _streams(num_streams: int, prefix_len: int, **options: Any) -> ParScale.Config:
    """Streams whose prefix network suits a small model: the folded prefixes are what counts."""
    return ParScale.Config(num_streams=num_streams, prefix_len=prefix_len, embedding_dim=32, mlp_dim=32, **options)


def _arm(size: Size, name: str, about: str, streams: ParScale.Config | None = None, widen: float = 1.0) -> Arm:
    config = size.run_of(SwiGLU.Config(hidden_dim=_hidden_dim(size, widen)))
    return Arm(name, about, config.replace(model=config.model.replace(streams=streams)))


def _hidden_dim(size: Size, widen: float) -> int:
    """Feed-forward width of a model whose blocks have ``widen`` times the weights of the plain one's."""
    attention, one = 4 * size.dim**2, 3 * size.dim
    return round((widen * (attention + one * size.hidden_dim) - attention) / one)


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""

    def claim(
        ours: str, baseline: str, text: str, paper: str, verdict: Any = verdict_below, limit: Any = None
    ) -> Claim:
        return results.claim(
            "bits_per_byte",
            ours=ours,
            baseline=baseline,
            claim=text,
            paper=paper,
            verdict=verdict,
            limit=limit,
        )

    python = "Python, 0.54B: loss 1.1722, 1.1507, 1.1354 for P = 1, 2, 4"
    claims = [
        claim("p2", "p1", "2 streams beat 1", python),
        claim("p4", "p2", "4 streams beat 2", python),
        claim("p4", "p1", "4 streams beat 1", python),
        claim("p4", "prefix1", "4 streams beat 1 with a prefix", "not given"),
        claim(
            "copies2",
            "p1",
            "2 streams without prefixes equal 1",
            "by construction",
            _equals,
            lambda one: (one - EQUAL, one + EQUAL),
        ),
        claim(
            "p4",
            "wide15",
            "4 streams reach 1.5x the parameters",
            "k = 0.39: worth 1.54x",
            _reaches,
            lambda wide: wide + EQUAL,
        ),
        claim("p4", "p4-m0", "prefixes are what 4 streams gain by", "not given"),
        claim("p4-m48", "p4", "prefixes of 48 beat 8", "48 used, ablation not available"),
        claim("p4", "p4-direct", "the prefix network helps", "prefix-tuning style, no number"),
    ]
    return claims


def _reaches(difference: Estimate) -> Verdict:
    return verdict_below(difference, EQUAL)


def _equals(difference: Estimate) -> Verdict:
    if -EQUAL < difference.low and difference.high < EQUAL:
        return "holds"
    return "does not hold" if difference.low > EQUAL or difference.high < -EQUAL else "not resolved"


def laws(results: Results, size: Size, bootstrap: int = 100) -> list[dict[str, Any]]:
    """The law of each published corpus, and of our runs once every arm of `SIZES` has one: E, A, alpha, k, and what P = 4 is worth."""
    rows = [
        _row(f"published, {corpus}", fit_parallel_law(points, bootstrap=bootstrap))
        for corpus, points in PAPER_LOSSES.items()
    ]
    points = [
        (float(weights(arm.config)), getattr(arm.config.model.streams, "num_streams", 1), loss)
        for name, arm in arms(size).items()
        if name in SIZES
        for loss in results.values(name, "nats_per_token").values()
    ]
    if all(results.values(name, "nats_per_token") for name in SIZES):
        rows.append(_row("ours", fit_parallel_law(points, bootstrap=bootstrap)))
    return rows


def weights(config: RunConfig) -> int:
    """Parameters but those of embedding and head, prefixes folded."""
    model = config.model
    if model.streams is not None:
        model = model.replace(streams=model.streams.replace(prefix="direct"))
    tables = model.vocab_size * model.dim * (1 if model.tie_embeddings else 2)
    return model.count().parameters - tables


def _row(name: str, law: Law) -> dict[str, Any]:
    low, high = law.intervals["k"]
    return {
        "losses": name,
        "E": law.e,
        "A": law.a,
        "alpha": law.alpha,
        "k": law.k,
        "k low": low,
        "k high": high,
        "R2": law.r2,
        "4 streams are worth": law.equivalent_params(1.0, 4),
    }


def draw(results: Results, path: Path) -> None:
    """Bits per byte against the plain model, with intervals, and the learning curves."""
    draw_arms(results, path, baseline="p1", title="Parallel streams at our scale")
