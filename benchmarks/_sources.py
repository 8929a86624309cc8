"""Which code each benchmark measures, and which records are older than that code.

A record names the commit that it measured. Where the code that its benchmark measures (`SOURCES`) has become another since, the
record is stale: it says nothing certain of the code of today. The documentation says so below its table, and `make check` lists all of
them; neither fails, since a benchmark is run again when a machine is quiet. What decides is git: the code at the record's commit beside
that of HEAD. Comments, docstrings and form of Python files do not count, nor does what was changed and changed back.

    python benchmarks/_sources.py
"""

import functools
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from anabranch.studies.fingerprint import of_code

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/anabranch"

LAYERS = ("nn", "routing")
MODEL = (*LAYERS, "lm/cache.py", "lm/decoder.py", "lm/layers.py")
ENGINE = (*MODEL, "serving/core", "serving/engine", "serving/fast", "serving/sampling")
SERVER = (*ENGINE, "serving/http", "web")
# Strategies decide in it.
GATEWAY = ("gateway", "web", "routers")

# Folders and files of the package, of each benchmark.
SOURCES: dict[str, tuple[str, ...]] = {
    "adapter_batch": (
        *ENGINE,
        "adapters/by_row.py",
        "adapters/segmented.py",
        "adapters/pool.py",
        "adapters/low_rank.py",
        "serving/adapters.py",
    ),
    "adapter_dispatch": (
        *LAYERS,
        "adapters/dynmole.py",
        "adapters/routed.py",
        "adapters/low_rank.py",
        "adapters/pool.py",
        "adapters/segmented.py",
    ),
    "adapter_passes": (
        *MODEL,
        "lm/generate.py",
        "adapters/glider",
        "adapters/lora_mixer",
        "adapters/rewiring",
        "adapters/routed.py",
        "adapters/low_rank.py",
        "adapters/pool.py",
    ),
    "adapter_routing": (
        *MODEL,
        "adapters/lora_mixer",
        "adapters/routed.py",
        "adapters/low_rank.py",
        "adapters/pool.py",
    ),
    "adapter_steps": (
        *LAYERS,
        "adapters/mhr",
        "adapters/glider",
        "adapters/rewiring",
        "adapters/low_rank.py",
        "adapters/together.py",
        "adapters/tasks.py",
        "lm/decoder.py",
    ),
    "adapter_training": (*MODEL, "adapters", "train"),
    "balance_audit": ("routing/assignment.py",),
    "coe": ("routers/coe", "routers/embed"),
    "consistency": ("routing/consistency.py", "routing/srp_statistics.py", "routing/cache_policy.py"),
    "designs": (*MODEL, "experts", "depth/duo_llm", "presets.py", "serving/fast"),
    "duo_llm": (*MODEL, "depth/duo_llm"),
    "elasticmoe": ("serving/elasticmoe", "serving/engine", "serving/http"),
    "elaswave": ("cluster/elastic",),
    "expertflow": (*MODEL, "lm/generate.py", "serving/expertflow"),
    "fabric": ("cluster/fabric",),
    "fastrp": ("graph/fastrp", "graph/projection.py", "graph/products.py"),
    "fully_ppr": ("graph/fully_ppr", "graph/ppr", "graph/rows.py"),
    "g_rank": ("graph/rank",),
    "gateway_game_day": ("gateway/dispatch", "gateway/providers"),
    "gateway_large": GATEWAY,
    "gateway_memory": GATEWAY,
    "gateway_overhead": GATEWAY,
    "glider_matching": ("adapters/glider",),
    "gpipe": ("cluster/gpipe", "cluster/saved_bytes.py"),
    "graph_spark": ("graph/spark", "graph/fully_ppr", "graph/powerwalk", "graph/fastrp"),
    "graph_store": ("graph/csr.py", "graph/formats", "graph/graph_file.py", "graph/store.py", "graph/array_file.py"),
    "graphrouter": ("routers/graphrouter",),
    "graphvite": ("graph/graphvite",),
    "hnsw": ("graph/hnsw", "graph/codes.py", "graph/vectors.py"),
    "hnsw_disk": ("graph/hnsw", "graph/disk", "graph/codes.py", "graph/vectors.py"),
    "hnsw_live": ("graph/hnsw", "graph/live"),
    "ic_cache": ("routers/ic_cache", "routers/retrieve", "routers/embed"),
    "moe_layer": LAYERS,
    "ns3_referee": ("cluster/fabric",),
    "parscale": (*MODEL, "experts/parscale"),
    "pccl": ("cluster/pccl",),
    "ppr": ("graph/ppr", "graph/powerwalk", "graph/rows.py"),
    "prefill": (*MODEL, "serving/fast"),
    "reuse": (*MODEL, "experts/rexmoe.py", "experts/group_pool.py"),
    "ring_attention": ("cluster/ring",),
    "rl": ("rl", "train"),
    "rl_tokens": ("rl/grpo.py", "rl/tokens", "rl/router_r1", "train", *MODEL),
    "routed_heads": (*MODEL, "heads", "serving/fast"),
    "routing_decisions": ("routers/strategies", "routers/coe", "routers/graphrouter", "routers/ic_cache"),
    "scale": ("routers/scale",),
    "served_depth": (*ENGINE, "depth/dr_llm", "depth/routed.py"),
    "serving_drills": SERVER,
    "serving_engine": ENGINE,
    "serving_goodput": SERVER,
    "serving_latency": SERVER,
    "serving_moe_memory": (*ENGINE, "serving/expertflow", "serving/experts.py", "serving/memory"),
    "token_skipping": (*ENGINE, "depth/ftp"),
    "train_lm": (*MODEL, "train"),
    "ttspm": ("test_time", "routers/strategies"),
    "versatile": (*LAYERS, "experts/versatile"),
}


class Age(NamedTuple):
    """What a record is beside the code of today.

    Attributes:
        changed: files below src/anabranch that are others than those measured, one of them at least in its code; None where git
            cannot say, as for a commit that is not in the history of the code of today.
        last: day and commit of the last change to them.
    """

    changed: tuple[str, ...] | None
    last: str = ""

    def told(self) -> str | None:
        """In a sentence; None for a record of the code of today."""
        if self.changed is None:
            return "Its age is not known: the commit is not in the history that lies here. Take it for stale"
        if not self.changed:
            return None
        count = len(self.changed)
        shown = ", ".join(f"`{name}`" for name in self.changed[:3]) + (f" and {count - 3} more" if count > 3 else "")
        return f"Stale: code that it measures has changed since, last on {self.last}: {shown}"


def age(record: Mapping[str, Any], root: Path = ROOT) -> Age:
    """Of a record of a benchmark, by the commit it names."""
    measured = str(record.get("commit", "")).removesuffix("-dirty")
    return _age(measured, SOURCES.get(record["name"], ()), root)


@functools.cache
def _age(measured: str, sources: tuple[str, ...], root: Path) -> Age:
    paths = [f"{PACKAGE}/{name}" for name in sources]
    # A word of git's own would be no commit.
    is_commit = re.fullmatch("[0-9a-f]{7,40}", measured) is not None
    # One of a branch that was dropped may lie here, and in no other copy of the history.
    is_known = paths and is_commit and _git(root, "merge-base", "--is-ancestor", measured, "HEAD") is not None
    differing = (
        _git(root, "diff", "--raw", "--no-renames", "--no-abbrev", measured, "HEAD", "--", *paths) if is_known else None
    )
    if differing is None:
        return Age(None)
    # Mode and name of the content before and after, then the path.
    lines = [(*line.split("\t")[0].split(" ")[2:4], line.split("\t")[1]) for line in differing.splitlines()]
    # Reading code takes its time: the first file that has other code decides.
    if not any(_is_other_code(root, *line) for line in lines):
        return Age(())
    changed = [path for *_, path in lines]
    last = _git(root, "log", "-1", "--format=%cs (%h)", "HEAD", "--", *changed) or ""
    return Age(tuple(path.removeprefix(f"{PACKAGE}/") for path in changed), last.strip())


def _is_other_code(root: Path, before: str, after: str, path: str) -> bool:
    return not path.endswith(".py") or _code(root, before) != _code(root, after)


@functools.cache
def _code(root: Path, blob: str) -> str:
    """What a Python file does, by the name git has for its content; empty for one that is not there."""
    if set(blob) == {"0"}:
        return ""
    text = _git(root, "cat-file", "blob", blob)
    try:
        return of_code(text or "")
    except SyntaxError:
        return blob


def _git(root: Path, *words: str) -> str | None:
    """What git says, None where there is none, or it does not know what it is asked for."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, encoding="utf-8", check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def records(root: Path = ROOT) -> list[tuple[str, dict[str, Any]]]:
    """Name of the file and content of each recorded result."""
    found = sorted((root / "benchmarks" / "results").glob("*.json"))
    return [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in found]


def main() -> None:
    """Print the records that are stale, and how many are not."""
    ages = {name: age(record) for name, record in records()}
    for name, found in ages.items():
        if (said := found.told()) is not None:
            print(f"{name}: {said.replace('`', '')}")
    fresh = sum(found.changed == () for found in ages.values())
    print(f"{fresh} of {len(ages)} records of benchmarks are of the code of today")


if __name__ == "__main__":
    main()
