"""Arguments and options that several commands of ``anabranch gateway`` have, and how recorded outcomes are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import FLAG, finite_number, read_assignments
from anabranch.cli.output import fact, say
from anabranch.errors import ConfigError, DataError, InputError

if TYPE_CHECKING:
    from anabranch.routers.contract.dataset import Recorded
    from anabranch.routers.contract.query import Pool
    from anabranch.routers.contract.strategy import Strategy
    from anabranch.routers.embed import Embedder
    from anabranch.routers.fitted import RouterFolder

# Learn in seconds and need no torch.
DEFAULT = ("knn", "cluster", "ridge")
Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Recorded outcomes: .jsonl, .csv, also .gz; a store (.db); a folder of MT-Bench; or a public set (llmrouter, routellm_mmlu).",
    ),
]
Named = Annotated[
    list[str] | None,
    typer.Option(
        "--strategy",
        metavar="NAME",
        help=f"A routing strategy, or all. May be repeated. Default: {', '.join(DEFAULT)}.",
    ),
]
Fields = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME.FIELD=VALUE", help="Set a field of a strategy, e.g. --set knn.k=20."),
]
HoldOut = Annotated[
    float | None,
    typer.Option(
        "--hold-out",
        metavar="F",
        min=0,
        max=0.9,
        callback=finite_number,
        help="Share of the data that is held out to judge by. Default: 0.2; 0 learns from all.",
    ),
]
EmbedderKind = Annotated[str, typer.Option("--embedder", metavar="KIND", help="Text embedding: hashed or minilm.")]
ColumnMap = Annotated[
    str | None,
    typer.Option(
        metavar="MAP",
        help="Columns of a CSV file: query=COLUMN,task=COLUMN,score:MODEL=COLUMN,... Default: by their names.",
    ),
]
Prices = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Prices of models (JSON or TOML), for outcomes without costs."),
]
AllowLeak = Annotated[
    bool,
    typer.Option(
        "--allow-leak",
        metavar=FLAG,
        help="Allow evaluation on questions that the routers were fitted to; results are then too good.",
    ),
]

Unseen = Annotated[
    bool, typer.Option("--unseen", metavar=FLAG, help="Leave out questions that the routers were fitted to.")
]


def read_data(
    name: str,
    columns: str | None,
    prices: Path | None,
    *,
    keep_copies: bool = False,
    by_sample: bool = False,
    tell: bool = True,
) -> tuple[Recorded, Pool]:
    """Outcomes, and the pool of their models.

    Each question once: what a log knows of it from several answers together. With ``keep_copies`` each answer as it was chosen, for
    what weighs choices; with ``by_sample`` copies are samples of it, be they scored alike or not. What of the file was left out is said on
    stderr, unless ``tell`` is False.
    """
    from anabranch.routers.data import SETS, Columns, deduplicated, load_outcomes, pool_of, pooled, read_prices

    if name in SETS and not Path(name).is_file():
        found = SETS[name]()
        return found.data, found.pool
    known = None if prices is None else read_prices(prices)
    parsed = None if columns is None else Columns.parse(columns)
    data = load_outcomes(name, columns=parsed, prices=known, by_choice=keep_copies)
    if tell and data.reading.left_out:
        left = "; ".join(f"{one or 'a column without a name'} ({why})" for one, why in data.reading.left_out.items())
        say(f"left out of {name}: {left}")
    if not keep_copies:
        # Copies that were scored apart, as conversations that end alike are, are all that is known of the text that they share.
        data = deduplicated(data) if _is_agreed(data) and not by_sample else pooled(data)
    return data, pool_of(data.models, known)


def say_read(data: Recorded) -> None:
    """Which models there are outcomes of, and which of them have costs."""
    read = data.what_was_read()
    fact("models", ", ".join(read["models"]))
    is_all = read["costs"] == read["models"]
    fact("costs", "of all models" if is_all else f"of {', '.join(read['costs'])}" if read["costs"] else "none")


def _is_agreed(data: Recorded) -> bool:
    """Every model has a score everywhere, and copies of a question have the same."""
    import numpy as np

    from anabranch.routers.data import groups

    if not np.isfinite(data.score_NM).all():
        return False
    group_N = groups(data)
    first_G = np.unique(group_N, return_index=True)[1]
    return bool((data.score_NM == data.score_NM[first_G][group_N]).all())


def rest(found: RouterFolder, data: Recorded) -> Recorded:
    """The questions that routers did not learn from. Raises DataError if there are none."""
    import numpy as np

    rows = np.flatnonzero([not found.has_seen(text) for text in data.query])
    if not len(rows):
        raise DataError(
            "the routers learned from all of these questions; judge them on others, fit anew with --hold-out 0.3, or use --allow-leak"
        )
    return data.take(rows)


def measured(data: Recorded, unit: str, prices: Path | None) -> Recorded:
    """Outcomes with costs in another unit. Raises ConfigError for another word than those of `UNITS`."""
    from anabranch.routers.data import UNITS, measured_in, read_joules

    for known in UNITS:
        if unit == known:
            return measured_in(data, known, None if prices is None or known != "joules" else read_joules(prices))
    raise ConfigError(f"--budget is {unit!r}; use one of {', '.join(UNITS)}")


def held_share(hold_out: float | None, count: int, what: str, *, enough: int) -> float:
    """Of so many the share that is held out: of fewer than enough none, where nobody says. Raises InputError where a side is empty."""
    share = (0.2 if count >= enough else 0.0) if hold_out is None else hold_out
    if share and round(share * count) in (0, count):
        raise InputError(f"--hold-out is {share:g}, which leaves one side of {count} {what} empty; use 0 for none")
    return share


def read_strategies(names: list[str] | None, fields: list[str] | None) -> dict[str, Strategy]:
    """Strategies by name, not fitted; of ``all``, those that need no more than their defaults and what is installed."""
    from anabranch.routers import strategies

    is_all = names == ["all"]
    if is_all:
        names = [name for name in strategies.names() if name != "oracle"]
    of_name: dict[str, dict[str, Any]] = {name: {} for name in names or DEFAULT}
    for path, value in read_assignments(fields).items():
        name, _, field = path.partition(".")
        if name not in of_name or not field:
            raise ConfigError(f"--set has {path!r}; write NAME.FIELD=VALUE with one of {', '.join(of_name)}")
        # Configs hold what TOML has as a list as a tuple.
        of_name[name][field] = tuple(value) if isinstance(value, list) else value
    made = {}
    for name, given in of_name.items():
        try:
            made[name] = strategies.make(name, **given)
        except (ImportError, ConfigError) as error:
            if not is_all:
                raise
            say(f"{name} was left out: {error}")
    return made


def make_embedder(kind: str) -> Embedder:
    """An embedder with its default config."""
    from anabranch.config import from_dict
    from anabranch.routers.embed import Embedder

    return from_dict(Embedder.Config, {"kind": kind}).build()


def embed(embedder: Embedder, data: Recorded, progress: Any) -> Recorded:
    """Outcomes with vectors; those of a slow embedder are kept for another time."""
    from anabranch.routers.embed import embed_cached, unit_vectors

    if embedder.is_fast:
        return data.with_vectors(unit_vectors(embedder, data.query))
    return data.with_vectors(embed_cached(embedder, data.query, progress=progress))


def check_ending(path: Path | None, option: str, endings: tuple[str, ...]) -> None:
    """Before the work. Raises InputError for a name that ends in nothing we write."""
    if path is not None and path.suffix not in endings:
        raise InputError(f"{option} is {str(path)!r}; its name must end in {' or '.join(endings)}")
