"""What an index looks like, in numbers."""
# Shapes: N slots in use

from typing import Any

from anabranch.graph.hnsw import layout
from anabranch.graph.hnsw.linking import Linker
from anabranch.graph.hnsw.storage import Storage


def figures(held: Storage, linker: Linker, size_bytes: int, last: tuple[int, int, int]) -> dict[str, Any]:
    """As `HNSW.stats`; ``last`` are hops, distances and queries of the last search."""
    graph, level_N = held.graph, held.level[: held.count]
    levels = [int((level_N >= level).sum()) for level in range(int(graph[layout.TOP]) + 1)]
    degrees = []
    for level in range(len(levels)):
        lists = held.first[: held.count][level_N >= level] + level - 1
        links = held.links[: held.count] if level == 0 else held.upper[lists]
        degrees.append(round(float((links >= 0).sum(1).mean()), 3))
    hops, distances, queries = last
    return {
        "count": held.count - int(graph[layout.NUM_DELETED]),
        "deleted": int(graph[layout.NUM_DELETED]),
        "levels": levels,
        "mean_degree": degrees,
        "unreachable": int((~linker.reached() & (held.deleted[: held.count] == 0)).sum()),
        "size_bytes": size_bytes,
        "mapped_bytes": held.mapped_bytes,
        "code_bytes": 0 if held.coded is None else held.coded.each,
        "queries": queries,
        "hops": hops / max(queries, 1),
        "distances": distances / max(queries, 1),
    }
