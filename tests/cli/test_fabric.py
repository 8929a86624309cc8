"""``anabranch cluster fabric`` as users run it."""

import csv
import json

import numpy as np
import pytest

SMALL = ("--network", "leaf-spine:4x4x4", "--bytes", "4MB")


@pytest.fixture
def asked(here):
    """The JSON of a command line."""

    def ask(*words):
        code, out, err = here("cluster", "fabric", *words, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return ask


def by_scheme(told):
    return {row["scheme"]: row for row in told["schemes"]}


def test_as_a_program(cli):
    done = cli("cluster", "fabric", *SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "network leaf-spine of 4 leaves, 4 spines, 4 hosts a leaf"
    assert lines[1].startswith("traffic all-to-all of 4MB on 16 ranks   240 flows in 1 steps, 60 MB")
    assert lines[-1] == "nccl    split:4 is NCCL_IB_QPS_PER_CONNECTION=4 NCCL_IB_SPLIT_DATA_ON_QPS=1, over RDMA"
    shown = {line.split()[0]: line.split() for line in lines[5:-1]}
    assert list(shown) == ["ecmp", "split:4", "whole", "greedy", "ethereal", "wrap", "spray", "reps"]
    assert shown["ethereal"][1:4] == ["15.0", shown["spray"][2], "1.000"]


def test_the_numbers_are_those_of_the_library(asked):
    from anabranch.cluster.fabric import Topology, busiest, collective_flows, lower_bound, plan, simulate

    told = asked("permutation", *SMALL, "--scheme", "ecmp", "--scheme", "wrap", "--scope", "leaf", "--seed", 3)
    topology = Topology.leaf_spine(4, 4, 4)
    flows = collective_flows("permutation", 16, 4_000_000, seed=3)
    assert told["lower_bound_s"] == lower_bound(flows, topology)
    assert told["traffic"] == {
        "about": "permutation of 4MB on 16 ranks",
        "ranks": 16,
        "flows": 16,
        "steps": 1,
        "bytes": 64_000_000,
    }
    for row in told["schemes"]:
        made = plan(flows, topology, row["scheme"], scope="leaf", seed=3)
        assert (row["pieces"], row["busiest_s"]) == (len(made), busiest(made))
        assert row["completion_s"] == simulate(made).completion_s


def test_failed_and_slow_cables(asked):
    told = asked(
        "permutation", *SMALL, "--fail", "leaf0-spine1", "--fail", "leaf2-spine3", "--slow", "leaf1-spine0=100"
    )
    assert told["network"]["failed"] == ["leaf0-spine1", "leaf2-spine3"]
    found = by_scheme(told)
    assert found["ethereal"]["fell_back"]
    assert not found["wrap"]["fell_back"]
    assert found["wrap"]["completion_s"] < found["spray"]["completion_s"]


def test_a_network_of_cables(asked, work):
    cables = [("node", "node", "Gbit/s"), *((f"h{n}", f"s{n % 2}", 10) for n in range(4))]
    cables += [(f"s{n}", f"x{m}", 20) for n in range(2) for m in range(3)]
    (work / "net.csv").write_text("\n".join(",".join(map(str, row)) for row in cables) + "\n")
    told = asked("all-reduce:ring", "--network", "net.csv", "--ranks", 3, "--bytes", "3MB", "--scheme", "spray")
    assert told["network"]["hosts"] == 4
    assert (told["traffic"]["ranks"], told["traffic"]["steps"]) == (3, 4)
    # Each step is 1 MB over 10 Gbit/s.
    assert told["schemes"][0]["completion_s"] == pytest.approx(4 * 8e6 / 1e10)


def test_dispatch_of_a_recorded_model(asked, work):
    from anabranch.routing import TraceBuilder, TraceLayer

    # Experts of unequal popularity, as of a trained layer.
    score_NE = np.random.default_rng(0).random((512, 16)) * np.linspace(0.5, 1.5, 16)
    index_NK = np.argsort(-score_NE, 1)[:, :2]
    builder = TraceBuilder()
    layer = TraceLayer(layer=5, name="moe", num_destinations=16, top_k=2)
    builder.add(layer, index_NK, np.ones((512, 2), np.float32), item_N=np.arange(512))
    builder.trace().write(work / "moe.parquet")
    # Half of what the hosts of a leaf send goes up at once.
    cables = [f"h{n},leaf{n // 4},10" for n in range(16)] + [f"leaf{a},spine{b},5" for a in range(4) for b in range(4)]
    (work / "half.csv").write_text("\n".join(cables))
    told = asked(
        "--trace",
        "moe.parquet",
        "--network",
        "half.csv",
        "--row-bytes",
        "1kB",
        "--scheme",
        "wrap",
        "--scheme",
        "ecmp",
    )
    assert told["traffic"]["about"] == "dispatch of 512 tokens to 16 experts on 16 ranks, layer 5 of moe.parquet"
    rank_N = np.arange(512) * 16 // 512
    elsewhere = (index_NK != rank_N[:, None]).sum()
    assert told["traffic"]["bytes"] == 1000 * elsewhere
    found = by_scheme(told)
    assert found["wrap"]["busiest_s"] == pytest.approx(told["lower_bound_s"], rel=1e-3)
    assert found["ecmp"]["busiest_s"] > found["wrap"]["busiest_s"]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture(here, work, ending):
    code, out, err = here("cluster", "fabric", *SMALL, "--picture", f"fabric.{ending}")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"wrote   fabric.{ending}"
    assert (work / f"fabric.{ending}").read_bytes()[:4] == {"png": b"\x89PNG", "svg": b"<svg"}[ending]


def test_the_line_of_a_picture_is_where_its_own_busiest_link_is_through(here, work, monkeypatch):
    """In all steps; the sum over steps is another number, and may lie beyond the end."""
    from anabranch.cli.cluster import fabric_picture
    from anabranch.cluster.fabric import Topology, collective_flows, loads, plan

    drawn = []
    monkeypatch.setattr(
        fabric_picture,
        "to_png",
        lambda made: drawn.append([line.get_xdata().tolist() for line in made.axes[1].lines]) or b"\x89PNG",
    )
    traffic = ("all-reduce:halving-doubling", *SMALL, "--scheme", "ecmp", "--scheme", "wrap", "--picture", "fabric.png")
    code, out, _ = here("cluster", "fabric", *traffic)
    assert code == 0
    assert "step by step, ms" in out
    flows, topology = collective_flows("all-reduce", 16, 4_000_000, "halving-doubling"), Topology.leaf_spine(4, 4, 4)
    made = [plan(flows, topology, scheme, seed=0) for scheme in ("ecmp", "wrap")]
    seconds = [float((8 * loads(one) / topology.capacity_L).max()) for one in made]
    [[marks]] = drawn
    # In a unit that the picture chooses.
    assert marks[0] / marks[1] == pytest.approx(seconds[0] / seconds[1])
    assert seconds[0] > 1.1 * seconds[1]


def test_a_picture_of_one_switch(here):
    code, _, err = here("cluster", "fabric", "--network", "leaf-spine:1x1x4", "--bytes", "1MB", "--picture", "one.svg")
    assert (code, err) == (0, "")


def test_a_plan_in_a_file(here, work):
    from anabranch.cluster.fabric import Topology, collective_flows, plan

    words = ("permutation", *SMALL, "--scheme", "wrap", "--seed", 1, "--window", 4, "--out", "plan.csv")
    assert here("cluster", "fabric", *words)[0] == 0
    rows = list(csv.reader((work / "plan.csv").open()))
    made = plan(collective_flows("permutation", 16, 4_000_000, seed=1), Topology.leaf_spine(4, 4, 4), "wrap", seed=1)
    assert rows[0] == ["step", "src", "dst", "path", "offset", "bytes", "delay_ns", "window"]
    assert [row[1:6] for row in rows[1:]] == [
        [f"host{p.src}", f"host{p.dst}", str(p.path), str(p.offset), str(p.size)] for p in made
    ]


def test_packets_too(asked, here):
    from anabranch.cluster.fabric import LinkEvent, PacketConfig, Topology, collective_flows, plan, simulate_packets

    words = ("permutation", *SMALL[:2], "--bytes", "200kB", "--scheme", "ethereal", "--scheme", "spray", "--seed", 2)
    words += ("--packets", "--receiver", "go-back-n", "--lose", "leaf0-spine1")
    told = by_scheme(asked(*words))
    topology, flows = Topology.leaf_spine(4, 4, 4), collective_flows("permutation", 16, 200_000, seed=2)
    for scheme, row in told.items():
        made = plan(flows, topology, scheme, seed=2)
        config = PacketConfig(receiver="go-back-n")
        found = simulate_packets(made, config, events=[LinkEvent("leaf0-spine1")], seed=2)
        assert row["packets"] == {name: getattr(found, name) for name in row["packets"]}
        assert len(row["packets"]) == 10
    assert told["ethereal"]["packets"]["moved"] > 0
    _, out, _ = here("cluster", "fabric", *words)
    line = next(line for line in out.splitlines() if line.startswith("ethereal"))
    numbers = told["ethereal"]["packets"]
    assert line.split()[-3:] == [f"{numbers[name]:,}" for name in ("resent", "timeouts", "lost")]
    assert by_scheme(asked("permutation", *SMALL, "--scheme", "wrap"))["wrap"]["packets"] is None


def test_cards_with_one_queue_and_acknowledgements_that_wait(asked):
    from anabranch.cluster.fabric import PacketConfig, Topology, collective_flows, plan, simulate_packets

    words = ("permutation", *SMALL[:2], "--bytes", "200kB", "--scheme", "ethereal", "--packets")
    told = by_scheme(asked(*words, "--card", "fifo", "--ack-bytes", 54))["ethereal"]["packets"]
    made = plan(collective_flows("permutation", 16, 200_000), Topology.leaf_spine(4, 4, 4), "ethereal")
    found = simulate_packets(made, PacketConfig(card="fifo", ack_bytes=54))
    assert told == {name: getattr(found, name) for name in told}
    assert told["completion_s"] > by_scheme(asked(*words))["ethereal"]["packets"]["completion_s"]


def test_a_plan_as_a_trace_of_links(here, work):
    from anabranch.cluster.fabric import Topology, collective_flows, loads, plan
    from anabranch.routing import RoutingTrace

    words = ("permutation", *SMALL, "--scheme", "spray", "--out", "plan.parquet")
    assert here("cluster", "fabric", *words)[0] == 0
    trace = RoutingTrace.read(work / "plan.parquet")
    made = plan(collective_flows("permutation", 16, 4_000_000), Topology.leaf_spine(4, 4, 4), "spray")
    carried = np.bincount(trace.column("destination", 0), trace.column("weight", 0), made.topology.num_links)
    np.testing.assert_allclose(carried, loads(made), rtol=1e-6)


def test_much_traffic_without_numba_names_the_extra(here, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "numba", None)
    for words in (
        ("--network", "leaf-spine:16x16x16"),
        ("--network", "leaf-spine:2x2x2", "--bytes", "1GB", "--packets"),
    ):
        code, out, err = here("cluster", "fabric", *words, "--scheme", "spray")
        assert (code, out) == (2, "")
        assert "for so much traffic, needs numba; pip install 'anabranch[cluster]'" in err
        assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_the_theorem(here):
    code, out, err = here("cluster", "fabric", "--theorem")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "cases   384 pairs of flows and paths, 200 random networks with failed cables",
        "gap     0 of a flow, between single paths and packet spraying on any link",
        "pieces  as many as the formulas say",
        "theorem holds",
    ]


def test_a_theorem_that_does_not_hold_is_no_success(here, monkeypatch):
    from fractions import Fraction

    from anabranch.cluster import fabric

    monkeypatch.setattr(fabric, "check_equivalence", lambda seed: fabric.Equivalence(1, 0, Fraction(1, 3), 0, "this"))
    code, out, _ = here("cluster", "fabric", "--theorem")
    assert (code, out.splitlines()[-1]) == (1, "theorem does not hold: this")
    code, out, _ = here("cluster", "fabric", "--theorem", "--json")
    assert (code, json.loads(out)["gap"]) == (1, "1/3")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("all-to-one", "no collective 'all-to-one'"),
        ("all-reduce:rings", "no 'rings' of all-reduce"),
        ("all-reduce:halving-doubling --ranks 6", "needs a power of two"),
        ("--network leaf-spine:4x4", "--network is 'leaf-spine:4x4'; write leaf-spine:LEAVESxSPINESxHOSTS"),
        ("--network leaf-spine:4x4x0", "hosts_per_leaf is 0"),
        ("--network fat-tree:5", "k is 5"),
        ("--network none.csv", "cannot read none.csv: no such file or directory"),
        ("--network bad.csv", "bad.csv, line 2: 'a,b' is no cable; write node,node,Gbit/s"),
        ("--network noise.csv", "noise.csv is not text in UTF-8"),
        ("--ranks 65", "--ranks is 65, but the network has 64 hosts"),
        ("--bytes 12", "--bytes is '12'; give a number of bytes with a unit"),
        ("--fail leaf0-spine99", "no node 'spine99'"),
        ("--slow leaf0-spine1", "--slow is 'leaf0-spine1'; write CABLE=GBPS"),
        ("--slow leaf0-spine1=nan", "capacity of leaf0-spine1 is nan"),
        ("--scheme ethernet", "no scheme 'ethernet'"),
        ("--layer 3", "--layer is of a routing trace"),
        ("--row-bytes 1kB", "--row-bytes is of a routing trace"),
        (
            "all-to-all --trace none.parquet",
            "COLLECTIVE is of a collective, and --trace is given; leave one of them out",
        ),
        ("--bytes 1MB --trace none.parquet", "--bytes is of a collective, and --trace is given"),
        ("--theorem --scheme wrap", "--theorem has networks and flows of its own; leave out --scheme"),
        ("--theorem permutation", "leave out COLLECTIVE"),
        ("--network leaf-spine:8000x4000x2", "8,000 leaves and 4,000 spines have 32,000,000 cables"),
        ("--lose leaf0-spine1", "--lose is of packets; give --packets too"),
        ("--receiver go-back-n", "--receiver is of packets; give --packets too"),
        ("--card fifo", "--card is of packets; give --packets too"),
        ("--ack-bytes 64", "--ack-bytes is of packets; give --packets too"),
        ("--packets --lose leaf0-spine99", "no node 'spine99'"),
        ("--network leaf-spine:2x1x2 --bytes 10kB --packets --lose leaf0-spine0", "pieces were not through"),
        ("--trace none.parquet", "no routing trace at none.parquet"),
        ("--picture fabric.pdf", "--picture is 'fabric.pdf'; its name must end in .png or .svg"),
        ("--out plan.csv", "--out writes one plan; give one --scheme"),
        ("--out plan.txt --scheme wrap", "--out is 'plan.txt'; its name must end in .csv or .parquet"),
    ],
)
def test_wrong_lines_are_told_in_one(here, work, line, said):
    (work / "bad.csv").write_text("a,b,10\na,b\n")
    (work / "noise.csv").write_bytes(bytes(range(256)))
    code, out, err = here("cluster", "fabric", *line.split())
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]
    assert len(err.splitlines()) == 1
