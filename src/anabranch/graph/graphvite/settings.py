"""Arguments: what is allowed, and what ``"auto"`` stands for."""
# Shapes: N nodes, P parts

import math
from pathlib import Path
from typing import Any

from anabranch.bounds import LARGEST_FLOAT, LARGEST_INT, MOST_REPEATS, MOST_SIZE, is_whole, shown
from anabranch.errors import CapacityError, InputError
from anabranch.graph.arguments import check_flag, check_one_of, is_number, plain, within
from anabranch.graph.graphvite.augmentation import auto_augmentation, pairs_of_walk
from anabranch.graph.graphvite.train import OPTIMIZERS
from anabranch.graph.store import Graph

MODELS = ("deepwalk", "line", "node2vec")
EXECUTORS = ("auto", "threads", "torch", "distributed")

# By default; more where memory is short.
PARTS = 4
MOST_PARTS = 1024

# Samples of a pool in memory at most, 8 bytes each, two pools at a time.
POOL = 4_000_000

# The same where parts have to be moved for every pool.
POOL_OF_PARTS = 64_000_000
LEAST_POOL = 65_536

# Per run at least, where pools stay above that.
POOLS = 10

# Samples of a pool per node and part: the reference's episode.
VISITS = 175

# The default is 2,000. A file says how long a run goes on, too, and samples are counted in 64 bits.
MOST_EPOCHS = 1_000_000

# Samples of one walk, which a pool holds whole: 128 MiB of them.
MOST_PAIRS = 1 << 24

FLAGS = ("normalize",)


# Larger ones may be in files of before.
LIMITS: dict[str, float] = {
    "epochs": MOST_EPOCHS,
    **dict.fromkeys(("walk_length", "negatives", "samplers"), MOST_REPEATS),
}


def lawful(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a file of before as they may be today: what was trained with others is as good as ever."""
    found = within(given, LIMITS)
    steps, length = given.get("augmentation"), given.get("walk_length")
    # Together within `MOST_PAIRS`, and one not beyond the other, which may have become shorter.
    if isinstance(steps, int) and isinstance(length, int) and 1 <= steps <= length:
        if steps > found["walk_length"] or pairs_of_walk(found["walk_length"], steps) > MOST_PAIRS:
            found["augmentation"] = "auto"
    return found


def check(given: dict[str, Any]) -> None:
    """Raise InputError for the first argument that has a value it may not have."""
    if given["workers"] is not None:
        _whole("workers", given["workers"], 1, ", or None")
    _whole("dim", given["dim"], 1, most=MOST_SIZE)
    _whole("samplers", given["samplers"], 0, most=MOST_REPEATS)
    # What is done one by one for each sample, in compiled code that nothing breaks off.
    for name, least in (("walk_length", 1), ("negatives", 0)):
        _whole(name, given[name], least, most=MOST_REPEATS)
    for name, least in (
        ("augmentation", 1),
        ("partitions", 1),
        ("group", 1),
        ("pool_size", 1),
        ("shuffle_base", 1),
        ("micro_batch", 1),
    ):
        # An array compares with a name to an array.
        if not isinstance(given[name], str) or given[name] != "auto":
            _whole(name, given[name], least, " or 'auto'")
    for name in FLAGS:
        check_flag(name, given[name])
    _number("epochs", given["epochs"], zero=False, most=MOST_EPOCHS)
    for name, zero in (
        ("lr", False),
        ("negative_weight", True),
        ("weight_decay", True),
        ("p", False),
        ("q", False),
    ):
        _number(name, given[name], zero)
    _check_words(given)
    if given["memory_limit"] is not None:
        _whole("memory_limit", given["memory_limit"], 1, " bytes, or None")
    _check_together(given)
    seed = given["seed"]
    if not is_whole(seed) or not 0 <= int(seed) < 2**63:
        raise InputError(f"seed is {shown(seed)}; it must be an integer from 0 to 2**63 - 1")


def _check_words(given: dict[str, Any]) -> None:
    """Raise InputError for the first argument that is no name, path or list of functions, where it must be."""
    for name, known in (
        ("model", MODELS),
        ("optimizer", tuple(OPTIMIZERS)),
        ("executor", EXECUTORS),
        ("isolated", ("keep", "zero")),
    ):
        check_one_of(name, given[name], known)
    if not isinstance(given["device"], str):
        raise InputError(f"device is {shown(given['device'])}; it must be the name of one, say 'cpu' or 'cuda:1'")
    scratch = given["scratch"]
    if scratch is not None and not isinstance(scratch, str | Path):
        raise InputError(f"scratch is {shown(scratch)}; it must be a path, or None")
    callbacks = given["callbacks"]
    if not isinstance(callbacks, list | tuple) or not all(callable(callback) for callback in callbacks):
        raise InputError(f"callbacks is {shown(callbacks)}; it must be a list of functions")


def _check_together(given: dict[str, Any]) -> None:
    """Raise InputError for arguments of which each is right, and one does not go with another."""
    if given["model"] != "node2vec" and (given["p"], given["q"]) != (1, 1):
        raise InputError(f"p and q bend the walks of model='node2vec'; the model is {given['model']!r}")
    if given["augmentation"] != "auto" and given["augmentation"] > given["walk_length"]:
        raise InputError(f"augmentation is {given['augmentation']}, beyond the walk_length of {given['walk_length']}")
    if given["augmentation"] != "auto":
        pairs = pairs_of_walk(given["walk_length"], given["augmentation"])
        if pairs > MOST_PAIRS:
            raise InputError(
                f"augmentation is {given['augmentation']} and walk_length {given['walk_length']}, so that a walk gives {pairs:,} "
                f"samples; a pool holds whole walks, of at most {MOST_PAIRS:,}"
            )
    if "auto" not in (given["pool_size"], given["shuffle_base"]) and given["pool_size"] % given["shuffle_base"]:
        raise InputError(
            f"pool_size is {given['pool_size']}, not a multiple of shuffle_base, {given['shuffle_base']}; "
            f"{given['pool_size'] // given['shuffle_base'] * given['shuffle_base']} is"
        )
    if given["executor"] in ("threads", "distributed") and given["device"] != "cpu":
        raise InputError(f"executor={given['executor']!r} trains on the CPU; device is {given['device']!r}")
    if given["executor"] == "distributed" and given["memory_limit"] is not None:
        raise InputError("memory_limit is for one process; executor='distributed' keeps all parameters in memory")


def check_graph(graph: Graph) -> None:
    """Raise InputError for a graph without an edge to train on."""
    if not len(graph.indices):
        raise InputError(f"the graph has {graph.num_nodes:,} nodes and no edges; there is nothing to train on")


def total_of(epochs: float, graph: Graph) -> int:
    """Positive samples of so many epochs."""
    return max(1, round(float(epochs) * graph.num_edges))


def steps_of(augmentation: int | str, walk_length: int, graph: Graph) -> int:
    """The augmentation step."""
    if augmentation == "auto":
        return min(auto_augmentation(graph.num_nodes, graph.num_edges), walk_length)
    return int(augmentation)


def parts_of(partitions: int | str, num_nodes: int, row_bytes: int, memory_limit: int | None) -> int:
    """P: what is asked for, or the smallest of 4, 8, 16 ... of which a head part and a tail part fit into the limit.

    A small graph has at most as many parts as nodes.
    """
    if partitions != "auto":
        if int(partitions) > num_nodes:
            raise InputError(f"partitions is {partitions}, but the graph has {num_nodes:,} nodes")
        return int(partitions)
    found = 1
    while found * 2 <= min(num_nodes, PARTS):
        found *= 2
    while memory_limit is not None and 2 * part_bytes(num_nodes, found, row_bytes) > memory_limit:
        if found * 2 > min(num_nodes, MOST_PARTS):
            raise CapacityError(
                f"memory_limit is {memory_limit:,} bytes; with {found} parts, the most, one head part and one tail part "
                f"need {2 * part_bytes(num_nodes, found, row_bytes):,}"
            )
        found *= 2
    return found


def part_bytes(num_nodes: int, num_parts: int, row_bytes: int) -> int:
    """Bytes of the largest part of one side."""
    return math.ceil(num_nodes / num_parts) * row_bytes


def workers_of(workers: int, num_parts: int, largest: int, memory_limit: int | None) -> int:
    """Workers in effect: no more than parts, and than have room for a head part and a tail part each."""
    found = min(workers, num_parts)
    if memory_limit is None:
        return found
    if 2 * largest > memory_limit:
        raise CapacityError(
            f"memory_limit is {memory_limit:,} bytes; one head part and one tail part of {num_parts} need {2 * largest:,}; "
            "use more partitions"
        )
    return min(found, memory_limit // (2 * largest))


def pool_of(pool_size: int | str, num_nodes: int, num_parts: int, total: int, base: int, moved: bool) -> int:
    """Samples of a pool, a multiple of the shuffle's base."""
    if pool_size != "auto":
        return int(pool_size)
    found = min(VISITS * num_nodes * num_parts, POOL_OF_PARTS if moved else POOL)
    if not moved:
        found = min(found, max(total // POOLS, LEAST_POOL))
    return -(-found // base) * base


def _whole(name: str, value: Any, least: int, also: str = "", most: int = LARGEST_INT) -> None:
    if not is_whole(value) or not least <= int(value) <= most:
        limit = "" if most == LARGEST_INT else f" and at most {most:,}"
        raise InputError(f"{name} is {shown(value)}; it must be a whole number of at least {least}{limit}{also}")


def _number(name: str, value: Any, zero: bool, most: float = LARGEST_FLOAT) -> None:
    # A short float of numpy would make the limit one of its own.
    if not is_number(value) or not 0 <= plain(value) <= most or (value == 0 and not zero):
        raise InputError(
            f"{name} is {shown(value)}; it must be a finite number {'of at least' if zero else 'greater than'} 0, "
            f"and at most {most:g}"
        )
