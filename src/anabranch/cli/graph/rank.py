"""``anabranch graph rank``: rank items for a search by the clicks of similar users (G-Rank)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.graph.inputs import read_items, whole_number
from anabranch.cli.graph.options import Top, check_extra
from anabranch.cli.graph.tables import check_ending, write_table
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.options import AsJson, Quiet
from anabranch.cli.output import fact, print_json, table, wrote
from anabranch.errors import InputError
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.graph import GRank

OWN = ".anb"


def rank(
    clicks: Annotated[
        str,
        typer.Argument(
            metavar="CLICKS",
            help="A log of clicks (.parquet, .csv, .tsv): node, term, item; or a model saved before (.anb).",
        ),
    ],
    terms: Annotated[
        list[str] | None,
        typer.Argument(metavar="TERM...", help="Search term. Without it, the log is described."),
    ] = None,
    node: Annotated[
        str | None, typer.Option(metavar="NAME", help="Rank for this user. Default: for no particular user.")
    ] = None,
    top: Top = 10,
    isolation: Annotated[
        float, typer.Option(metavar="F", help="Weight of users who have nothing in common, at least 0.")
    ] = 0.0,
    columns: Annotated[
        str, typer.Option(metavar="N,T,I", help="Columns of user, search term and clicked item.")
    ] = "node,term,item",
    items: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Items: a table of id and perhaps title, artist, tags (.csv, .parquet). Items that match a term come first.",
        ),
    ] = None,
    test: Annotated[
        str | None, typer.Option(metavar="FILE", help="Held-out clicks: report how well they are predicted.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write rankings as a table (.parquet, .csv, .tsv, .jsonl).")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the counted clicks (.anb), which open faster than a log.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Rank items for a search term from a log of clicks with G-Rank: clicks of similar users count more. Nothing is trained.

    Example: anabranch graph rank clicks.csv jazz --node alice
    """
    check_extra()
    check_ending(out)
    check_apart([out, save], [clicks, test, items])
    names = _columns(columns)
    if save is not None and save.suffix != OWN:
        raise InputError(f"--save is {str(save)!r}; its name must end in {OWN}")
    if out is not None and not terms:
        raise InputError("--out is for rankings; give a term to rank items for")
    with waiting(f"reading {clicks}", quiet):
        model = _model(clicks, isolation, names, items)
    user = None if node is None else _user(model, node)
    found = {term: model.rank(term, user, top) for term in terms or ()}
    facts: dict[str, Any] = {
        "clicks": model.num_clicks_,
        "nodes": len(model.nodes_),
        "terms": len(model.terms_),
        "items": len(model.items_),
        "node": user,
        "isolation": model.F,
    }
    if test is not None:
        with waiting(f"testing with {test}", quiet):
            facts["ndcg"] = model.score(test, k=top, columns=names)
    written = _write(model, found, out, save)
    if as_json:
        rankings = {
            term: [{"item": one.item, "score": float(one.score)} for one in ranked] for term, ranked in found.items()
        }
        print_json({**facts, "rankings": rankings, "wrote": written})
        return
    _print(clicks, model, found, facts, top)
    after = f"anabranch graph rank {save or clicks} {_example(model)}"
    if written:
        wrote(", ".join(written), after)
    else:
        fact("next", after)


def _columns(text: str) -> tuple[str, str, str]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(parts):
        raise InputError(f"--columns is {text!r}; write the columns of user, term and item as N,T,I")
    return parts[0], parts[1], parts[2]


def _model(clicks: str, isolation: float, names: tuple[str, str, str], items: str | None) -> GRank:
    from anabranch.graph import GRank

    if Path(clicks).suffix == OWN:
        if items is not None:
            raise InputError(f"{clicks} already contains items; --items is only for a log of clicks")
        return GRank.load(clicks).set_params(F=isolation)
    return GRank(isolation).fit(clicks, columns=names, items=() if items is None else read_items(items))


def _user(model: GRank, text: str) -> Any:
    """A user as the log has it: by number where users are numbers."""
    number = whole_number(text) if model.nodes_.dtype.kind in "iu" else None
    return text if number is None else number


def _write(model: GRank, found: dict[str, list[Any]], out: Path | None, save: Path | None) -> list[str]:
    if save is not None:
        model.save(save)
    if out is not None:
        rows = [
            (term, place, one.item, one.score) for term, ranked in found.items() for place, one in enumerate(ranked, 1)
        ]
        columns = ("term", "rank", "item", "score")
        write_table(out, {name: [row[number] for row in rows] for number, name in enumerate(columns)})
    return [str(path) for path in (out, save) if path is not None]


def _example(model: GRank) -> str:
    text = str(model.terms_[0]) if len(model.terms_) else "TERM"
    return text if text.isalnum() else f"'{text}'"


def _print(clicks: str, model: GRank, found: dict[str, list[Any]], facts: dict[str, Any], top: int) -> None:
    fact(
        "clicks",
        f"{clicks}   {facts['clicks']:,} clicks of {facts['nodes']:,} users on {facts['items']:,} items, {facts['terms']:,} terms",
    )
    if facts["node"] is not None:
        others = int((model.similarity(facts["node"]) > 0).sum()) - 1
        fact("for", f"{facts['node']}   {others:,} users have something in common")
    if "ndcg" in facts:
        fact("test", f"NDCG@{top} {facts['ndcg']:.4f}")
    if found:
        print()
        rows = [
            [term if place == 1 else "", str(place), str(one.item), f"{one.score:.4g}"]
            for term, ranked in found.items()
            for place, one in enumerate(ranked, 1)
        ]
        table(["term", "rank", "item", "score"], rows, text_columns=3)
        print()
