"""``anabranch graph predict``: how likely edges are, by a fitted model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.graph.models import MODEL, open_model
from anabranch.cli.graph.node_tables import pairs_of
from anabranch.cli.graph.options import Top, check_extra
from anabranch.cli.graph.tables import check_ending, write_table
from anabranch.cli.options import AsJson, Quiet
from anabranch.cli.output import fact, print_json, table, wrote
from anabranch.files import check_apart

if TYPE_CHECKING:
    import numpy as np


def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    edges: Annotated[str, typer.Argument(metavar="EDGES", help="A table of source and target (.csv, .tsv, .parquet).")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all scores (.parquet, .csv, .tsv, .jsonl).")
    ] = None,
    top: Top = 10,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Score edges: the higher the score, the more likely the edge.

    GraphVite: the dot product of the source's vector and the target's context vector. FastRP: the cosine of both vectors.

    Example: anabranch graph predict model.anb candidates.csv --out scores.csv
    """
    check_extra()
    check_ending(out)
    check_apart([out], [model, edges])
    import numpy as np

    found = open_model(model)
    ids_E2, source, target = pairs_of(found.nodes, edges)
    score_E = _scores(found, ids_E2)
    columns = {"source": source, "target": target, "score": score_E}
    if out is not None:
        write_table(out, columns)
    best = np.argsort(-score_E, kind="stable")[:top].tolist()
    ranking = [{"source": source[row], "target": target[row], "score": float(score_E[row])} for row in best]
    facts: dict[str, Any] = {
        "model": model,
        "method": type(found).__name__.lower(),
        "edges": len(score_E),
        "ranking": ranking,
        "wrote": None if out is None else str(out),
    }
    if as_json:
        print_json(facts)
        return
    fact("model", f"{model}   {type(found).__name__}, {found.nodes.num_nodes:,} nodes")
    print()
    rows = [[str(place), one["source"], one["target"], f"{one['score']:.4f}"] for place, one in enumerate(ranking, 1)]
    table(["rank", "source", "target", "score"], rows, text_columns=3)
    print()
    again = f"anabranch graph predict {model} {edges} --out scores.csv"
    if out is None:
        fact("next", again)
    else:
        wrote(str(out), f"anabranch graph transform {model} --out vectors.npy")


def _scores(model: Any, ids_E2: np.ndarray) -> np.ndarray:
    import numpy as np

    from anabranch.graph import FastRP

    if not isinstance(model, FastRP):
        return model.predict(ids_E2)
    vectors_ND = model.embedding_.astype(np.float64)
    length_N = np.maximum(np.linalg.norm(vectors_ND, axis=1), 1e-300)
    head, tail = ids_E2.T
    return np.einsum("ed,ed->e", vectors_ND[head], vectors_ND[tail]) / (length_N[head] * length_N[tail])
