"""Does our packet simulator end when ns-3 does? Permutations of 16 hosts: hashed flows, pinned pieces, packets sprayed one by one.

ns-3 (package ns3, GPL-2.0) needs an environment of its own:

    python -m venv ns3 && ns3/bin/pip install ns3
    python benchmarks/ns3_referee.py --ns3 ns3/bin/python --json benchmarks/results/ns3_referee.json

Both have the same network (4 leaves, 4 spines, 16 hosts, 10 Gbit/s), the same pieces over the same paths, packets of the same bytes, and
queues without end; ns-3's transport is TCP, whose connections stand before the first byte and which resends nothing, with
acknowledgements of 54 bytes that wait in queues, which ours has too.
Hosts' cards come in both kinds: one queue, which is ns-3's default, and turns, which is FqCoDel there. Windows: of pinned pieces a little
more than fills their path; of sprayed flows no end, since TCP's is one of bytes in order. A row's ``ours`` and ``peer`` are milliseconds
of completion in the two simulators, not of our time. Bar: within 15%.
"""

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any, Literal

from _machine import here, version_in
from _records import write_record
from anabranch.cluster.fabric import PacketConfig, Plan, Topology, collective_flows, plan, simulate_packets

SEGMENT, HEADER, ACK = 8960, 42, 54
SIZE, GBPS, WIDTH = 2_000_000, 10, 4
# Packets in flight.
WINDOWS = {"ecmp": 8, "ethereal": 8, "spray": 1000}
CASES: tuple[tuple[str, Literal["turns", "fifo"]], ...] = (
    ("ecmp", "fifo"),
    ("ethereal", "fifo"),
    ("ethereal", "turns"),
    ("spray", "fifo"),
)
WORKER = Path(__file__).with_name("_ns3_worker.py")


def of_ns3(made: Plan, python: str, seed: int, card: str) -> float:
    """Seconds until the last byte."""
    job = {
        "leaves": WIDTH,
        "spines": WIDTH,
        "hosts_per_leaf": WIDTH,
        "gbps": GBPS,
        "latency_ns": made.topology.latency_ns,
        "is_sprayed": made.scheme == "spray",
        "takes_turns": card == "turns",
        "segment": SEGMENT,
        "window": WINDOWS[made.scheme],
        "seed": seed,
        "flows": [(piece.src, piece.dst, max(piece.path, 0), piece.size) for piece in made],
    }
    done = subprocess.run(
        [python, str(WORKER)], input=json.dumps(job), capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode:
        raise SystemExit(f"ns-3 failed: {done.stderr[-2000:]}")
    ends = json.loads(done.stdout)
    if min(ends) < 0:
        raise SystemExit(f"{sum(end < 0 for end in ends)} flows did not end in ns-3")
    return max(ends)


def of_ours(made: Plan, seed: int, card: Literal["turns", "fifo"]) -> float:
    """Seconds until the last byte."""
    config = PacketConfig(
        payload=SEGMENT,
        header=HEADER,
        window=WINDOWS[made.scheme],
        ecn_kb=1e9,
        buffer_mb=1e6,
        rto_us=1e9,
        card=card,
        ack_bytes=ACK,
    )
    return simulate_packets(made, config, seed=seed).completion_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ns3", required=True, metavar="PYTHON", help="a Python that has ns3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    topology = Topology.leaf_spine(WIDTH, WIDTH, WIDTH, cap_up=GBPS, cap_host=GBPS)
    rows: list[dict[str, Any]] = []
    for scheme, card in CASES:
        ratios = []
        for seed in range(options.seeds):
            flows = collective_flows("permutation", topology.num_hosts, SIZE, seed=seed)
            made = plan(flows, topology, scheme, seed=seed)
            ours, theirs = of_ours(made, seed, card), of_ns3(made, options.ns3, seed, card)
            ratios.append(ours / theirs)
            print(
                f"{scheme:<10} {card:<6} seed {seed}   ours {1e3 * ours:8.4f} ms   ns-3 {1e3 * theirs:8.4f} ms   {ours / theirs:.3f}",
                flush=True,
            )
            rows.append(
                {
                    "case": f"{scheme}, {card}, seed {seed}",
                    "ours": 1e3 * ours,
                    "peer": 1e3 * theirs,
                    "ratio": ours / theirs,
                    "peer_name": "ns-3",
                    "unit": "ms",
                    "missed": f"{ours / theirs - 1:+.1%}, beyond 15%" if abs(ours / theirs - 1) > 0.15 else None,
                }
            )
        off = max(abs(ratio - 1) for ratio in ratios)
        said = "within" if off <= 0.15 else "beyond"
        print(f"{scheme:<10} {card:<6} mean {statistics.fmean(ratios):.3f}, at most {off:.1%} off: {said} 15%")
    if options.json:
        versions = {"ns3": version_in(options.ns3, "ns3")}
        write_record(options.json, {"name": "ns3_referee", **here(1), "rows": rows, "versions": versions})


if __name__ == "__main__":
    main()
