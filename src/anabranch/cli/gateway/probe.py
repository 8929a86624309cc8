"""``anabranch gateway probe``: the classifier of steps that SCALE scores by, from judged steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.gateway.options import EmbedderKind, HoldOut, held_share, make_embedder, read_data
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.options import AsJson, Quiet, Seed, finite_number
from anabranch.cli.output import fact, print_json, say, table, wrote
from anabranch.errors import InputError
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.routers.scale.steps import Steps

# Steps of which a share is held out without a word.
ENOUGH = 10


def probe(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help='Judged steps as JSON lines: {"step": "...", "right1": 0, "right2": 1}; or outcomes, with --system1.',
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File for the probe (.json); an older one is replaced.")],
    system1: Annotated[
        str | None, typer.Option(metavar="NAME", help="DATA are recorded outcomes, and this model is System 1.")
    ] = None,
    system2: Annotated[str | None, typer.Option(metavar="NAME", help="Likewise System 2. Default: not known.")] = None,
    embedder: EmbedderKind = "hashed",
    penalty: Annotated[
        float,
        typer.Option(metavar="F", min=1e-6, callback=finite_number, help="Penalty on the squares of the weights."),
    ] = 1.0,
    hold_out: HoldOut = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fit SCALE's probe to judged steps: it tells how likely each system answers a step rightly, and asks no model.

    It is judged on the steps that are held out, and then learns from all.

    Example: anabranch gateway probe steps.jsonl --out probe.json
    """
    from anabranch.routers.scale.probe import Probe
    from anabranch.routers.scale.steps import Steps

    check_apart([out], [data])
    if out.suffix != ".json":
        raise InputError(f"--out is {str(out)!r}; its name must end in .json")
    if system2 is not None and system1 is None:
        raise InputError(f"--system2 is {system2!r} without --system1; name both models of the outcomes")
    with waiting(f"reading {data}", quiet):
        steps = (
            Steps.read(data) if system1 is None else Steps.of_outcomes(read_data(data, None, None)[0], system1, system2)
        )

    def made() -> Probe:
        return Probe(Probe.Config(embedder=make_embedder(embedder).config, penalty=penalty))

    with waiting("fitting", quiet):
        judged = _judge(made, steps, hold_out, seed)
        made().fit(
            steps.text, steps.right1_N.tolist(), None if steps.right2_N is None else steps.right2_N.tolist()
        ).save(out)
    if as_json:
        print_json({"out": str(out), "steps": len(steps), "systems": judged})
        return
    rows = [
        [
            f"System {number}",
            f"{one['right']:.3f}",
            *(_shown(one.get(name)) for name in ("log_loss", "log_loss_of_mean", "auc")),
        ]
        for number, one in enumerate(judged, start=1)
    ]
    table(["", "right", "log loss\nheld out", "of the\nmean", "AUC"], rows)
    if steps.right2_N is None:
        say("nobody says how right System 2 was (right2); its chance is taken to be the config's success2")
    fact("steps", f"{len(steps):,}")
    wrote(str(out), f'in the config of the gateway: [strategies.scale] assessor = {{ kind = "probe", path = "{out}" }}')


def _judge(made: Any, steps: Steps, hold_out: float | None, seed: int) -> list[dict[str, float]]:
    """Of each system: how often it was right, and how well a probe of some steps tells that of the others."""
    import numpy as np

    rights = [one for one in (steps.right1_N, steps.right2_N) if one is not None]
    told = [{"right": float(one.mean())} for one in rights]
    count = round(held_share(hold_out, len(steps), "steps", enough=ENOUGH) * len(steps))
    if not count:
        return told
    order = np.random.default_rng(seed).permutation(len(steps))
    test, train = steps.take(order[:count]), steps.take(order[count:])
    fitted = made().fit(train.text, train.right1_N, train.right2_N)
    scores = fitted.predict(test.text)
    for number, (one, learned, held) in enumerate(
        zip(told, (train.right1_N, train.right2_N), (test.right1_N, test.right2_N), strict=False)
    ):
        chance_N = np.array([score.p2 if number else score.p1 for score in scores])
        assert learned is not None
        assert held is not None
        one |= {"log_loss": _loss(chance_N, held), "log_loss_of_mean": _loss(np.full(count, learned.mean()), held)}
        area = _auc(chance_N, held)
        if area is not None:
            one["auc"] = area
    return told


def _loss(chance_N: Any, right_N: Any) -> float:
    import numpy as np

    p_N = np.clip(chance_N, 1e-6, 1 - 1e-6)
    return float(-(right_N * np.log(p_N) + (1 - right_N) * np.log1p(-p_N)).mean())


def _auc(chance_N: Any, right_N: Any) -> float | None:
    """Chance that a step answered rightly is told to be likelier than one answered wrongly; None where all are alike."""
    good, bad = chance_N[right_N >= 0.5], chance_N[right_N < 0.5]
    if not len(good) or not len(bad):
        return None
    difference = good[:, None] - bad[None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
