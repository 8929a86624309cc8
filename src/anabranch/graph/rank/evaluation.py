"""How good the rankings in a simulated network are."""
# Shapes: N nodes, T terms, I items, L most items of a term (padded)

from collections.abc import Sequence
from typing import Any

import numpy as np

from anabranch.graph.rank.measures import positions
from anabranch.graph.rank.simulated import Simulated

NDCG_AT = 5


def evaluate(network: Simulated, nodes: Sequence[int], reference_TI: np.ndarray | None = None) -> dict[str, Any]:
    """How good the rankings of ``nodes`` are.

    Distances are sums over a term's items of |local position - global position|, the mean over terms and nodes; the global ranking is by
    clicks of honest nodes (``reference_TI`` for another).

    Returns:
        ``tick``; ``distance``, of plain clicks in the local log (how complete it is; what the paper's figures show);
        ``ranked_distance``, of R; ``coverage``, median over terms of the share of nodes that know the globally top item;
        ``by_term``, the ranked distance of each term; ``log_rows`` and ``log_bytes``, mean; ``messages``, ``rows_sent``,
        ``bytes_sent``, ``largest_bytes`` so far. With an attack ``attacked_distance`` of its term and ``target_place``, the mean
        place of its item. With groups NDCG@5, an item of the own group being worth 1: ``ndcg``, of R; ``ndcg_global``, of global
        popularity; ``ndcg_local``, of own clicks alone.
    """
    global_TI = network.global_clicks() if reference_TI is None else reference_TI
    global_TL = _places(network, global_TI)
    top_T = np.array([of[np.argmax(global_TI[term, of])] for term, of in enumerate(network.of_term)])
    term_T = np.arange(network.num_terms)
    found: dict[str, list[Any]] = {
        name: [] for name in ("plain", "ranked", "covered", "rows", "bytes", "target", "ndcg")
    }
    for node in nodes:
        score_TI, click_TI = network.scores(node)
        place_TL = _places(network, score_TI)
        found["plain"].append(_distance(network, _places(network, click_TI), global_TL))
        found["ranked"].append(_distance(network, place_TL, global_TL))
        found["covered"].append((click_TI[term_T, top_T] > 0) | network.library_NI[node, top_T])
        has_R = network.has_NR[node, : network.num_rows]
        found["rows"].append(int(np.count_nonzero(has_R)))
        found["bytes"].append(int(network.row_bytes[: network.num_rows][has_R].sum()))
        if network.groups > 1:
            rankings = (place_TL, global_TL, _places(network, network.own_clicks(node)))
            found["ndcg"].append([_ndcg(network, ranking_TL, node) for ranking_TL in rankings])
        if network.attack is not None and network.attack.target is not None:
            term, item = network.attack.target
            found["target"].append(place_TL[term, np.flatnonzero(network.item_TL[term] == item)[0]])
    by_term = np.mean(found["ranked"], axis=0).tolist()
    result: dict[str, Any] = {
        "tick": network.tick,
        "distance": float(np.mean(found["plain"])),
        "ranked_distance": float(np.mean(found["ranked"])),
        "coverage": float(np.median(np.mean(found["covered"], axis=0))),
        "by_term": by_term,
        "log_rows": float(np.mean(found["rows"])),
        "log_bytes": float(np.mean(found["bytes"])),
        "messages": network.messages,
        "rows_sent": network.rows_sent,
        "bytes_sent": network.bytes_sent,
        "largest_bytes": network.largest_bytes,
    }
    if network.attack is not None:
        attacked = network.attack.term
        result["attacked_distance"] = None if attacked is None else by_term[attacked]
        result["target_place"] = float(np.mean(found["target"])) if found["target"] else None
    if network.groups > 1:
        names = ("ndcg", "ndcg_global", "ndcg_local")
        result |= dict(zip(names, np.mean(found["ndcg"], axis=0).tolist(), strict=True))
    return result


def _places(network: Simulated, score_TI: np.ndarray) -> np.ndarray:
    """Places ``[T, L]`` of each term's items by score; padding stands last."""
    score_TL = np.take_along_axis(score_TI, np.maximum(network.item_TL, 0), axis=1)
    return positions(np.where(network.real_TL, score_TL, -np.inf))


def _distance(network: Simulated, place_TL: np.ndarray, global_TL: np.ndarray) -> np.ndarray:
    return (np.abs(place_TL - global_TL) * network.real_TL).sum(1)


def _ndcg(network: Simulated, place_TL: np.ndarray, node: int) -> float:
    """NDCG@5 of own-group items, the mean over terms: as `ndcg`, of all terms at once."""
    group_TL = np.take_along_axis(network.group_TI, np.maximum(network.item_TL, 0), axis=1)
    own_TL = (group_TL == network.group_N[node]) & network.real_TL
    gain_TL = np.zeros(place_TL.shape)
    np.put_along_axis(gain_TL, place_TL, own_TL.astype(float), axis=1)
    discount = 1 / np.log2(np.arange(2, min(NDCG_AT, place_TL.shape[1]) + 2))
    gained_T = gain_TL[:, : len(discount)] @ discount
    ideal_T = np.append(0.0, np.cumsum(discount))[np.minimum(own_TL.sum(1), len(discount))]
    return float(np.mean(gained_T / np.maximum(ideal_T, 1e-12)))
