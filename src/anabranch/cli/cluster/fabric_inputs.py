"""What ``anabranch cluster fabric`` reads: networks, cables, collectives, routing traces."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

    from anabranch.cluster.fabric import Topology

# Characters of a file of cables: more than a million of them.
MOST_CHARACTERS = 1 << 26


def read_topology(text: str) -> Topology:
    """``leaf-spine:4x4x8``, ``fat-tree:8``, ``fat-tree:8x16`` or a .csv. Raises ConfigError or DataError for anything else."""
    from anabranch.cluster.fabric import Topology

    if text.endswith(".csv"):
        return Topology.from_links(_read_cables(Path(text)))
    kind, _, sizes = text.partition(":")
    numbers = [int(part) for part in sizes.split("x")] if re.fullmatch(r"\d{1,9}(x\d{1,9})*", sizes) else []
    if kind == "leaf-spine" and len(numbers) == 3:
        return Topology.leaf_spine(*numbers)
    if kind == "fat-tree" and len(numbers) in (1, 2):
        return Topology.fat_tree(numbers[0], hosts_per_leaf=numbers[1] if len(numbers) == 2 else None)
    raise ConfigError(
        f"--network is {text!r}; write leaf-spine:LEAVESxSPINESxHOSTS, fat-tree:K, fat-tree:KxHOSTS, or the name of a .csv"
    )


def _read_cables(path: Path) -> list[tuple[str, str, float]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not text in UTF-8") from None
    if len(text) > MOST_CHARACTERS:
        raise DataError(f"{path} has more than {MOST_CHARACTERS:,} characters; that is no file of cables")
    found = []
    try:
        for number, row in enumerate(csv.reader(text.splitlines()), start=1):
            if not row or (number == 1 and len(row) == 3 and not _is_number(row[2])):
                continue
            if len(row) != 3 or not _is_number(row[2]):
                raise DataError(f"{path}, line {number}: {','.join(row)[:80]!r} is no cable; write node,node,Gbit/s")
            found.append((row[0].strip(), row[1].strip(), float(row[2])))
    except csv.Error as error:
        raise DataError(f"{path} is not a table: {error}") from None
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_slow(texts: list[str] | None) -> dict[tuple[str, str] | str, float]:
    """``leaf0-spine1=100`` options. Raises ConfigError for anything else."""
    found: dict[tuple[str, str] | str, float] = {}
    for text in texts or []:
        cable, sign, speed = text.rpartition("=")
        if not sign or not _is_number(speed):
            raise ConfigError(f"--slow is {text!r}; write CABLE=GBPS, such as leaf0-spine1=100")
        found[cable] = float(speed)
    return found


def read_algorithm(text: str) -> tuple[str, str | None]:
    """``all-reduce`` or ``all-reduce:ring``."""
    kind, sign, algo = text.partition(":")
    return kind, algo if sign else None


def ranks_of(topology: Topology, ranks: int | None) -> int:
    """How many hosts take part. Raises ConfigError if there are not so many."""
    if ranks is not None and ranks > topology.num_hosts:
        raise ConfigError(f"--ranks is {ranks}, but the network has {topology.num_hosts} hosts")
    return topology.num_hosts if ranks is None else ranks


def read_trace(path: Path, layer: int | None) -> tuple[np.ndarray, int, str]:
    """index_NK of a layer of a routing trace, how many experts it chooses from, and its name. Raises DataError as `RoutingTrace.read`."""
    from anabranch.extras import require

    require("lm", by="reading a routing trace")
    from anabranch.routing import RoutingTrace

    trace = RoutingTrace.read(path)
    if not trace.layers:
        raise DataError(f"{path} has no layers")
    chosen = trace.layer(trace.layers[0].layer if layer is None else layer)
    return trace.decisions(chosen.layer).index_NK, chosen.num_destinations, f"layer {chosen.layer} of {path}"
