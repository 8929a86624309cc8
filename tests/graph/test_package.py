"""The package's face: names are loaded when they are first used."""

import subprocess
import sys

import pytest

import anabranch.graph as package

SCRIPT = """
import sys
import anabranch.graph as package
heavy = ("numpy", "scipy", "numba", "pyarrow", "torch", "sklearn", "starlette")
assert not [name for name in heavy if name in sys.modules], sys.modules.keys()
package.PageRank, package.HNSW
assert not [name for name in ("torch", "sklearn", "starlette", "pyspark") if name in sys.modules]
"""


def test_importing_it_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", package.__all__)
def test_every_name_leads_to_what_it_says(name):
    value = getattr(package, name)
    # One is a package that can be called.
    assert value.__name__.rpartition(".")[2] == name
    assert callable(value)
    assert value.__doc__
    assert name in dir(package)


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'PageRnk'"):
        package.PageRnk  # noqa: B018


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import networkx
from anabranch.graph import HNSW, FastRP, FullyPPR, GRank, GraphVite, PageRank, PowerWalk, as_graph
graph = as_graph(networkx.karate_club_graph())
vectors = FastRP(8).fit_transform(graph)
HNSW(8).add(vectors)
GraphVite(4, epochs=2).fit(graph)
PowerWalk(walks=5).build(graph).query(0)
FullyPPR(method="exact", engine="local").fit(graph)
GRank().fit([("ann", "jazz", "one")])
PageRank().scores(graph)
"""


def test_all_of_it_works_without_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
