"""``anabranch adapters cluster``: which adapters of a pool are alike, and one in the place of each group of them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from anabranch.cli.options import AsJson, named_folder
from anabranch.cli.output import print_json, say, shell_word, table, visible, wrote
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import check_apart


def cluster(
    pool: Annotated[
        str, typer.Argument(metavar="POOL", callback=named_folder, help="A folder of adapters, all plain LoRA.")
    ],
    clusters: Annotated[int, typer.Option("--clusters", metavar="G", min=1, help="Number of clusters.")],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="New pool with one adapter for each cluster. Default: only show the clusters.",
        ),
    ] = None,
    method: Annotated[
        Literal["mean", "svd"],
        typer.Option(
            metavar="METHOD",
            help="With --out, how adapters are merged. mean: the averages of A and of B, which needs equal ranks. svd: the "
            "average of B A, factored again.",
        ),
    ] = "mean",
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="R", min=1, help="With --method svd, the rank. Default: the largest rank of the adapters."
        ),
    ] = None,
    local: Annotated[
        Literal["phatgoose", "arrow"],
        typer.Option(help="What is compared: gates (prototypes for adapters without gates), or only prototypes."),
    ] = "phatgoose",
    as_json: AsJson = False,
) -> None:
    """Group the adapters of a pool by the similarity of their gates or prototypes, and merge each group into one adapter.

    Example: anabranch adapters cluster pool --clusters 4 --out small && anabranch adapters route small "how many users are there?"
    """
    require("lm", by="anabranch adapters cluster")
    from anabranch.adapters.glider import merge_clusters

    if out is None and (method != "mean" or rank is not None):
        raise ConfigError(
            "--method and --rank say how adapters become one, which --out asks for; give it, or leave them out"
        )
    check_apart([out], [pool])
    found = merge_clusters(pool, clusters, out, method=method, rank=rank, local=local)
    if as_json:
        print_json(
            {
                "pool": pool,
                "out": out,
                "clusters": {name: list(members) for name, members in found.members.items()},
                "similarity": found.similarity_EE.round(6).tolist(),
                **({} if out is None else {"method": method, "errors": found.errors}),
            }
        )
        return
    rows = [
        [name, str(len(members)), ", ".join(map(visible, members)), *([f"{found.errors[name]:.3g}"] if out else [])]
        for name, members in found.members.items()
    ]
    table(["cluster", "adapters", "which", *(["error"] if out else [])], rows)
    if len(found.members) < clusters:
        say(f"note: there are {len(found.members)} clusters and not {clusters}, as some adapters have the same vectors")
    if out is not None:
        wrote(str(Path(out)), f"anabranch adapters route {shell_word(out)} QUERY")
