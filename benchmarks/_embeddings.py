"""Other ways to vectors of nodes, each with the settings that it is tuned over: what `benchmarks/fastrp.py` compares at equal terms.

    fastrp (pip)   the package of that name (Rust); weights of the orders
    RandNE         Zhang et al., ICDM 2018: orthogonal random vectors, powers of the adjacency matrix, growing weights. Written anew
    ProNE          Zhang et al., IJCAI 2019: a factorisation of the shifted matrix, then a Chebyshev filter. Written anew after THUDM/ProNE
    DeepWalk       PecanPy's walks and gensim's skip-gram with negative sampling: window, length of walks, epochs

Every method makes ``dim`` columns of a graph by one setting, in one thread.
"""
# Shapes: N nodes, D dim

import importlib.util
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array, diags_array, eye_array

from anabranch.graph import Graph


class Method(NamedTuple):
    """A way to vectors.

    Attributes:
        name: it goes by.
        settings: what is tried, by name; the first is the published one.
        make: vectors [N, D] of a graph, dim, setting and seed.
        trial: the same at less cost, for trials; None where trials cost what a run does.
    """

    name: str
    settings: dict[str, Any]
    make: Callable[[Graph, int, Any, int], np.ndarray]
    trial: Callable[[Graph, int, Any, int], np.ndarray] | None = None


def methods() -> list[Method]:
    """All whose packages are there; the others are named."""
    found = [
        Method(
            "RandNE",
            {f"q {q}, weights x{grows:g}": (q, grows) for q, grows in _grid((3, 2, 4), (100.0, 10.0, 1.0))},
            randne,
        ),
        Method(
            "ProNE",
            {f"mu {mu:g}, theta {theta:g}": (mu, theta) for mu, theta in _grid((0.2, 0.0, 0.5), (0.5, 0.2, 1.0))},
            prone,
        ),
    ]
    if package() is not None:
        sizes = (6.67, 1.0, 2.0, 4.0, 10.0, 16.0, 32.0, 64.0, 0.0)
        found.append(Method("fastrp (pip)", {f"last weight {size:g}": size for size in sizes}, pip_fastrp))
    else:
        print("not installed, left out: fastrp", file=sys.stderr)
    if importlib.util.find_spec("pecanpy") and importlib.util.find_spec("gensim"):
        grid = _grid((10, 5), (40, 80))
        found.append(
            Method(
                "DeepWalk (PecanPy + gensim)",
                {f"window {window}, length {length}": (window, length) for window, length in grid},
                lambda graph, dim, setting, seed: deepwalk(graph, dim, setting, seed, 80),
                lambda graph, dim, setting, seed: deepwalk(graph, dim, setting, seed, 10),
            )
        )
    else:
        print("not installed, left out: pecanpy, gensim", file=sys.stderr)
    return found


def _grid(first: tuple[Any, ...], second: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    return [(one, other) for one in first for other in second]


def package() -> Any:
    """The package fastrp, which the benchmark beside this file has the name of; None where it is not installed."""
    found = sys.path
    here = Path(__file__).resolve().parent
    sys.path = [path for path in found if Path(path).resolve() != here]
    try:
        import fastrp
    except ImportError:
        return None
    finally:
        sys.path = found
    return fastrp


def pip_work(matrix: Any, dim: int, last: float, seed: int) -> Callable[[], np.ndarray]:
    """A run of it with weights 0, 0, 1 and ``last``; it knows no beta, and is given no other option."""
    model = package().FastRP(dim, [0.0, 0.0, 1.0, last], seed=seed, undirected=False)
    return lambda: np.asarray(model.fit_transform(matrix))


def pip_fastrp(graph: Graph, dim: int, last: float, seed: int) -> np.ndarray:
    """`pip_work` of a graph."""
    return pip_work(graph.to_scipy(np.float64), dim, last, seed)()


def randne(graph: Graph, dim: int, setting: tuple[int, float], seed: int) -> np.ndarray:
    """U_0 orthogonal, U_i = A U_(i-1), sum of weights^i U_i."""
    order, grows = setting
    matrix = graph.to_scipy(np.float64)
    power_ND, _ = np.linalg.qr(np.random.default_rng(seed).normal(0, 1 / np.sqrt(dim), (graph.num_nodes, dim)))
    total_ND = power_ND.copy()
    for number in range(1, order + 1):
        power_ND = matrix @ power_ND
        total_ND += grows**number * power_ND
    return total_ND


def prone(graph: Graph, dim: int, setting: tuple[float, float], seed: int) -> np.ndarray:
    """log of the transition matrix over negatives, by randomised SVD; then what a Gaussian band-pass of the Laplacian makes of it."""
    mu, theta = setting
    matrix = csr_array(graph.to_scipy(np.float64))
    strength_N = np.asarray(matrix.sum(1)).ravel()
    walk = csr_array(diags_array(1 / np.where(strength_N > 0, strength_N, 1.0)) @ matrix)
    negative_N = np.asarray(walk.sum(0)).ravel() ** 0.75
    negative_N /= negative_N.sum()
    shifted = walk.copy()
    shifted.data = np.log(walk.data) - np.log(negative_N[walk.indices])
    return _filtered(matrix, _factors(shifted, dim, seed), dim, mu, theta)


def _factors(matrix: Any, dim: int, seed: int) -> np.ndarray:
    """U sqrt(S) of the ``dim`` largest, rows of length 1."""
    from sklearn.utils.extmath import randomized_svd

    left_ND, value_D, _ = randomized_svd(matrix, dim, random_state=seed)
    return _unit(left_ND * np.sqrt(value_D))


def _unit(rows_ND: np.ndarray) -> np.ndarray:
    return rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), 1e-30)


def _filtered(matrix: Any, start_ND: np.ndarray, dim: int, mu: float, theta: float, order: int = 10) -> np.ndarray:
    from scipy.special import iv

    one = eye_array(matrix.shape[0], format="csr")
    looped = csr_array(matrix + one)
    walk = diags_array(1 / np.asarray(looped.sum(1)).ravel()) @ looped
    shifted = csr_array((1 - mu) * one - walk)
    before_ND, here_ND = start_ND, 0.5 * (shifted @ (shifted @ start_ND)) - start_ND
    total_ND = iv(0, theta) * before_ND - 2 * iv(1, theta) * here_ND
    for number in range(2, order):
        next_ND = shifted @ (shifted @ here_ND) - 2 * here_ND - before_ND
        total_ND += (2 if number % 2 == 0 else -2) * iv(number, theta) * next_ND
        before_ND, here_ND = here_ND, next_ND
    smooth_ND = looped @ (start_ND - total_ND)
    left_ND, value_D, _ = np.linalg.svd(smooth_ND, full_matrices=False)
    return _unit(left_ND[:, :dim] * np.sqrt(value_D[:dim]))


class _AnyType:
    """Stands for every type of nptyping, which only annotates PecanPy and does not import beside numpy 2."""

    def __class_getitem__(cls, _: Any) -> type:
        return cls


def _pecanpy() -> Any:
    def type_of(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyType

    stub = types.ModuleType("nptyping")
    stub.__getattr__ = type_of  # type: ignore[method-assign]
    sys.modules.setdefault("nptyping", stub)
    from pecanpy import pecanpy

    return pecanpy


def deepwalk(graph: Graph, dim: int, setting: tuple[int, int], seed: int, walks: int) -> np.ndarray:
    """So many walks a node; skip-gram with 5 negatives, one pass over all walks, the rate falling from 0.025."""
    from gensim.models import Word2Vec

    pecanpy = _pecanpy()
    window, length = setting
    source, target, weight = graph.edges()
    columns = [source, target] if weight is None else [source, target, weight]
    with tempfile.TemporaryDirectory() as scratch:
        edges_file = str(Path(scratch) / "graph.edg")
        np.savetxt(edges_file, np.column_stack(columns), fmt="%d" if weight is None else "%.9g", delimiter="\t")
        walker = pecanpy.FirstOrderUnweighted if weight is None else pecanpy.SparseOTF
        made = walker(p=1, q=1, workers=1, verbose=False, random_state=seed)
        made.read_edg(edges_file, weighted=weight is not None, directed=False)
        paths = made.simulate_walks(num_walks=walks, walk_length=length)
    model = Word2Vec(
        paths, vector_size=dim, window=window, sg=1, negative=5, min_count=0, workers=1, seed=seed, sample=0, epochs=1
    )
    found_ND = np.zeros((graph.num_nodes, dim), np.float32)
    for name in model.wv.index_to_key:
        found_ND[int(float(name))] = model.wv[name]
    return found_ND
