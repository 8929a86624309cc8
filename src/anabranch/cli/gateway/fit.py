"""``anabranch gateway fit``: learn routers from recorded outcomes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.gateway.doors import door
from anabranch.cli.gateway.options import (
    ColumnMap,
    Data,
    EmbedderKind,
    Fields,
    HoldOut,
    Named,
    Prices,
    embed,
    held_share,
    make_embedder,
    read_data,
    read_strategies,
    say_read,
)
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.options import AsJson, Quiet, Seed
from anabranch.cli.output import fact, print_json, print_line, say, shell_word, size, table, wrote
from anabranch.errors import BackendError, DataError
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.routers.contract.dataset import Recorded

# Questions, of which a share is held out without a word: one at least, for eval to say what there is to say.
ENOUGH = 5


def fit(
    data: Data,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the routers; existing routers in it are replaced.")
    ],
    strategy: Named = None,
    fields: Fields = None,
    embedder: EmbedderKind = "hashed",
    columns: ColumnMap = None,
    prices: Prices = None,
    hold_out: HoldOut = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fit routers to recorded outcomes and write them to a folder.

    Example: anabranch gateway fit outcomes.jsonl.gz --out routers --strategy knn --strategy ridge
    """
    from anabranch.routers.embed import embed_of
    from anabranch.routers.fitted import RECOMMENDED, FittedRouter, check_router_folder, save_folder
    from anabranch.routers.referee.baselines import best_single
    from anabranch.routers.referee.evaluate import digest
    from anabranch.routers.strategies.budget import spending

    check_apart([out], [data, prices])
    check_router_folder(out)
    with waiting(f"reading {data}", quiet):
        recorded, pool = read_data(data, columns, prices)
    if len(recorded.models) == 1:
        say(f"{data} holds outcomes of one model, {recorded.models[0]}: there is none to choose between")
    chosen = read_strategies(strategy, fields)
    learned = _learned(recorded, hold_out, seed)
    made = make_embedder(embedder)
    if any(one.needs_vector or one.learns_vectors for one in chosen.values()):
        with waiting("embedding", quiet):
            learned = embed(made.fit(learned.query), learned, lambda text: None if quiet else say(text))
    about: dict[str, Any] = {
        "data": digest(recorded),
        "learned": len(learned),
        "held_out": len(recorded) - len(learned),
        "seed": seed,
        "embedder": embedder,
        "best_single": best_single(learned, learned).facts["model"],
    }
    routers, spent = {}, {}
    for name, one in chosen.items():
        with waiting(f"fitting {name}", quiet):
            one.connect(embed=embed_of(made))
            try:
                one.fit(learned, seed=seed)
            except (BackendError, DataError) as error:
                # Of all there are, some cannot learn from data like these, or with what is installed.
                if strategy != ["all"]:
                    raise
                say(f"{name} was left out: {error}")
                continue
            spent[name] = spending(one, learned, pool)
        needed = made if one.needs_vector else None
        known = {**about, "spending": spent[name]} if spent[name] else about
        routers[name] = FittedRouter(strategy=one, models=pool.models, embedder=needed, about=known)
    if not routers:
        raise DataError(f"no strategy can learn from {data}")
    was_recommended = (out / RECOMMENDED).is_file()
    save_folder(out, routers, learned, about)
    if was_recommended and not (out / RECOMMENDED).is_file():
        say(f"what was recommended of {out} is not among the new routers; until eval, nothing is")
    sizes = {name: (out / f"{name}.safetensors").stat().st_size for name in routers}
    if as_json:
        print_json(
            {
                "out": str(out),
                "routers": sizes,
                "told": {name: list(router.strategy.told()) for name, router in routers.items()},
                "models": list(recorded.models),
                "read": recorded.what_was_read(),
                **about,
            }
        )
        return
    table(
        ["router", "needs vectors", "file"],
        [[name, "yes" if router.embedder is not None else "no", size(sizes[name])] for name, router in routers.items()],
        text_columns=2,
    )
    say_read(recorded)
    for name, router in routers.items():
        for line in router.strategy.told():
            fact(name, line)
    print_line(
        f"learned from {len(learned):,} questions on {len(recorded.models)} models; {about['held_out']:,} held out"
    )
    after = f"eval {shell_word(data)}" if about["held_out"] else "route 'a question'"
    wrote(str(out), f"{door()} {after} --router {shell_word(out)}")


def _learned(data: Recorded, hold_out: float | None, seed: int) -> Recorded:
    """The part to learn from."""
    from anabranch.routers.data import split

    share = held_share(hold_out, len(data), "questions", enough=ENOUGH)
    return split(data, (1 - share, share), seed=seed)[0] if share else data
