"""A fitted `FastRP` in one checked file: its vectors, and (with ``keep_powers``) what vectors of new nodes are made of."""

from pathlib import Path
from typing import Any

import numpy as np

from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.fastrp.start import Features, Projection, Setup
from anabranch.graph.header import described
from anabranch.graph.names import check_saved_names
from anabranch.graph.store import Graph

KIND = "fastrp"


def write(
    path: str | Path, params: dict[str, Any], arrays: dict[str, np.ndarray], nodes: Graph, setup: Setup | None
) -> None:
    """Write it, all or nothing.

    Args:
        path: where.
        params: arguments of the constructor, but ``features``; what JSON can hold.
        arrays: ``embedding``, ``mean``, ``factor``, and powers ``power0`` (L R), ``power1`` ...
        nodes: the nodes that were fitted, for their names.
        setup: what was kept for new nodes.

    Raises InputError for names that are neither integers nor all text, and as `atomic_file`.
    """
    meta: dict[str, Any] = {"params": params, "is_directed": nodes.is_directed}
    if nodes.names is not None:
        check_saved_names(nodes.names)
        arrays["names"] = nodes.names if nodes.names.dtype.kind in "iu" else np.array(nodes.names.tolist(), str)
    if setup is not None:
        start = setup.start
        arrays |= {"key": start.key_N, "scale": start.scale_N}
        meta["start"] = {"kind": start.kind, "s": start.s, "seed": int(start.seed), "num_random": start.num_random}
        meta["turned"] = setup.is_directed
        if setup.right_N is not None:
            arrays["right"] = setup.right_N
        if start.features is not None:
            arrays |= {"feature_columns": start.features.column_NC, "feature_random": start.features.random_FC}
    write_arrays(path, KIND, arrays, meta)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray], Graph, Setup | None]:
    """What `write` was given. Raises DataError for a file that is missing, foreign, truncated or damaged."""
    found = read_arrays(path, KIND)
    arrays, meta = found.arrays, found.meta
    with described(path, "a FastRP"):
        count, names = len(arrays["embedding"]), arrays.get("names")
        if names is not None and names.dtype.kind not in "iu":
            names = names.astype(object)
        nodes = Graph(np.zeros(count + 1, np.int64), np.empty(0, np.int32), None, bool(meta["is_directed"]), names)
        _check(arrays, count)
        setup = _setup(arrays, meta) if "start" in meta else None
        return dict(meta["params"]), arrays, nodes, setup


def _setup(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> Setup:
    features = None
    if "feature_columns" in arrays:
        features = Features(arrays["feature_columns"], arrays["feature_random"])
    facts = meta["start"]
    start = Projection(
        arrays["key"],
        facts["kind"],
        float(facts["s"]),
        int(facts["seed"]),
        int(facts["num_random"]),
        features,
        arrays["scale"],
    )
    return Setup(None, arrays.get("right"), start, bool(meta["turned"]))


def _check(arrays: dict[str, np.ndarray], count: int) -> None:
    """Raises ValueError for arrays that do not belong together."""
    rows = [
        name
        for name in arrays
        if name in ("key", "scale", "right", "names", "feature_columns") or name.startswith("power")
    ]
    for name in rows:
        if len(arrays[name]) != count:
            raise ValueError(f"{name} has {len(arrays[name]):,} rows, the embedding {count:,}")
    shapes = {arrays[name].shape for name in arrays if name.startswith("power")}
    if len(shapes) > 1:
        raise ValueError("powers have different shapes")
    if arrays["mean"].shape != arrays["factor"].shape or arrays["mean"].shape != arrays["embedding"].shape[1:]:
        raise ValueError("mean and factor do not fit the embedding")


def check_widths(arrays: dict[str, np.ndarray], setup: Setup | None, dim: int, parts: int) -> None:
    """Raises ValueError for arrays that are not as wide as the model is: kernels look at no bound.

    Args:
        arrays, setup: as `read` gives them.
        dim: of the model.
        parts: vectors that stand side by side.
    """
    num = len(arrays["embedding"])
    wanted: dict[str, tuple[int, ...]] = {
        "embedding": (num, dim * parts),
        "mean": (dim * parts,),
        "factor": (dim * parts,),
    }
    wanted |= {name: (num, dim) for name in arrays if name.startswith("power")}
    if setup is not None:
        random, features = setup.start.num_random, setup.start.features
        wanted |= {"key": (num,), "scale": (num,)} | ({"right": (num,)} if setup.right_N is not None else {})
        if features is not None:
            wanted["feature_columns"] = (num, dim - random)
            wanted["feature_random"] = (features.num, dim - random)
        if not 1 <= setup.start.s < np.inf:
            raise ValueError(f"s is {setup.start.s}; it is a number of at least 1")
        if not 0 <= random <= dim or (features is None and random != dim):
            raise ValueError(
                f"{random:,} of {dim:,} columns are random, and there are {'no ' if features is None else ''}features"
            )
    for name, shape in wanted.items():
        # Those that kernels are made for.
        kinds = (np.uint64,) if name == "key" else (np.float32, np.float64)
        if arrays[name].shape != shape or arrays[name].dtype not in kinds:
            raise ValueError(
                f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}; of this model it is {list(shape)}"
            )
