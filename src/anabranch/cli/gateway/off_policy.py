"""How ``anabranch gateway eval`` judges on a log: by weighing the choices that were made, since nobody knows what others had come to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.cli.gateway.options import embed, make_embedder, read_strategies, rest, say_read
from anabranch.cli.gateway.replay import print_replay
from anabranch.cli.gateway.verdict import Ending, print_verdict
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.output import print_json, say
from anabranch.errors import AnabranchError, DataError

if TYPE_CHECKING:
    from anabranch.routers.contract.dataset import Recorded
    from anabranch.routers.contract.query import Pool


# Questions that every model answered, below which a table with more of the others is judged on as a log.
ENOUGH = 20


def is_log(data: Recorded, read_copies: Callable[[], Recorded]) -> bool:
    """Whether outcomes tell more as a log of choices than as a table of all outcomes.

    They do if no question has an answer of every model; and if most lack some and either choices were drawn, so that they can be weighed,
    or the whole ones are too few. ``read_copies`` gives each answer as it was chosen.
    """
    import numpy as np

    whole_N = np.isfinite(data.score_NM).all(1)
    if not whole_N.any():
        return True
    # Where one model has answered all, others may have been drawn in vain.
    is_alone = len(data.models) == 1
    if whole_N.mean() >= 0.5 and not is_alone:
        return False
    chance_NM = read_copies().signals.get("probability")
    is_drawn = chance_NM is not None and bool((chance_NM < 1).any())
    return is_drawn or (not is_alone and int(whole_N.sum()) < ENOUGH)


def show_log(
    log: Recorded,
    pool: Pool,
    ending: Ending,
    fields: list[str] | None,
    embedder: str,
    share: float,
    seed: int,
    margin: float,
    quiet: bool,
    as_json: bool,
) -> None:
    """Judge on the questions that were not learned from, beside every single model, and print it with its verdict."""
    from anabranch.routers.referee import replay
    from anabranch.routers.referee.log_verdict import verdict_of_log
    from anabranch.routers.strategies.fixed import Static

    learned: Recorded | None
    read, whole = log.what_was_read(), log
    if ending.router is None:
        judged, learned, log = _learned(log, pool, ending.strategy, fields, embedder, share, seed, quiet)
    else:
        judged, learned, log = _fitted(log, ending.router, ending.strategy, ending.leaks, quiet)
    alone = {f"always {name}": Static(Static.Config(model=name)) for name in pool.names}
    with waiting("judging", quiet):
        result = replay({**judged, **alone}, log, pool)
        verdict = ending.of(verdict_of_log(judged, log, pool, learned=learned, margin=margin), is_log=True)
    if as_json:
        print_json({"estimated": "off_policy", **result.to_dict(), "verdict": verdict.to_dict(), "read": read})
        return
    say_read(log)
    print_replay(result)
    for line in never_asked(whole, pool):
        say(line)
    print_verdict(verdict)


def _learned(
    log: Recorded,
    pool: Pool,
    names: list[str] | None,
    fields: list[str] | None,
    embedder: str,
    share: float,
    seed: int,
    quiet: bool,
) -> tuple[dict[str, Any], Recorded, Recorded]:
    """Routers, the part that they learned from, and the one to judge on."""
    from anabranch.routers.data import pooled, split
    from anabranch.routers.embed import embed_of

    copies, test = split(log, (1 - share, share), seed=seed)
    train, chosen = pooled(copies), read_strategies(names, fields)
    if any(one.needs_vector or one.learns_vectors for one in chosen.values()):
        made = make_embedder(embedder).fit(train.query)
        tell = _tell(quiet)
        train, test = embed(made, train, tell), embed(made, test, tell)
        for one in chosen.values():
            one.connect(embed=embed_of(made))
    judged = {}
    for name, one in chosen.items():
        with waiting(f"fitting {name}", quiet):
            try:
                one.fit(train, seed=seed)
                # Of all there are, some cannot learn from a log, or not be played on one.
                if names == ["all"]:
                    one.play(test.take([0]), pool)
            except AnabranchError as error:
                if names != ["all"]:
                    raise
                say(f"{name} was left out: {error}")
                continue
        judged[name] = one
    return judged, copies, test


def _fitted(
    log: Recorded, router: Path, names: list[str] | None, allow_leak: bool, quiet: bool
) -> tuple[dict[str, Any], Recorded | None, Recorded]:
    """Routers, what there is of what they learned from, and what to judge on."""
    import numpy as np

    from anabranch.routers.embed.cache import fingerprint
    from anabranch.routers.fitted import load_folder

    found = load_folder(router, names)
    seen = np.flatnonzero([found.has_seen(text) for text in log.query])
    learned = log.take(seen) if len(seen) else None
    # A log grows from fit to eval, so that what is held out cannot be told from what is new: neither was learned from.
    log = log if allow_leak else rest(found, log)
    embedders = {fingerprint(one.embedder): one.embedder for one in found.routers.values() if one.embedder is not None}
    if len(embedders) > 1:
        raise DataError(f"the routers in {router} were fitted with different embedders; judge them one at a time")
    for made in embedders.values():
        log = embed(made, log, _tell(quiet))
    return {name: one.strategy for name, one in found.routers.items()}, learned, log


def never_asked(log: Recorded, pool: Pool) -> list[str]:
    """Why a model has no rows: what can have kept it from answering."""
    import numpy as np

    answered = {name for at, name in enumerate(log.models) if np.isfinite(log.score_NM[:, at]).any()}
    return [
        f"{name} has 0 rows: it answered none of these {len(log.query):,} questions. It was not among the models that were drawn from, it "
        "failed, or it was passed over, as a model is whose worst case (max_tokens at its price) a budget has no room for; "
        "anabranch gateway ledger list shows what was asked for and what answered"
        for name in pool.names
        if name not in answered
    ]


def _tell(quiet: bool) -> Any:
    return (lambda text: None) if quiet else say
