import numpy as np
import pytest

from anabranch.cluster.fabric import Topology
from anabranch.errors import CapacityError, InputError


def hops(topology, src, dst):
    """Names of the switches of each path between the leaves of two hosts."""
    leaf, to = int(topology.leaf_H[src]), int(topology.leaf_H[dst])
    return [[topology.names[topology.link_to[link]] for link in path] for path in topology.paths(leaf, to).tolist()]


def test_a_leaf_spine_by_hand():
    # 2 leaves x 3 spines, 2 hosts a leaf: 4 + 6 cables, 20 links.
    topology = Topology.leaf_spine(2, 3, 2, cap_up=100, cap_host=25)
    assert (topology.num_hosts, topology.num_links, len(topology.names)) == (4, 20, 9)
    assert topology.capacity_L.tolist() == [25_000_000_000] * 8 + [100_000_000_000] * 12
    assert [topology.names[leaf] for leaf in topology.leaf_H] == ["leaf0", "leaf0", "leaf1", "leaf1"]
    assert topology.link_name(int(topology.host_up_H[3])) == "host3 > leaf1"
    assert topology.link_name(int(topology.host_down_H[3])) == "leaf1 > host3"
    # Path p goes over spine p.
    assert hops(topology, 0, 3) == [["spine0", "leaf1"], ["spine1", "leaf1"], ["spine2", "leaf1"]]
    assert hops(topology, 0, 1) == [[]]


def test_a_fat_tree_by_hand():
    # k = 4: 4 pods of 2 leaves and 2 aggregation switches, 4 cores, 16 hosts; 16 + 16 + 16 cables.
    topology = Topology.fat_tree(4)
    assert (topology.num_hosts, topology.num_links // 2) == (16, 48)
    assert len(topology.names) == 16 + 8 + 8 + 4
    # Within a pod over either aggregation switch, to another pod over each core: path 2 t1 + t2.
    assert hops(topology, 0, 2) == [["agg0", "leaf1"], ["agg1", "leaf1"]]
    assert hops(topology, 0, 15) == [
        ["agg0", "core0", "agg6", "leaf7"],
        ["agg0", "core1", "agg6", "leaf7"],
        ["agg1", "core2", "agg7", "leaf7"],
        ["agg1", "core3", "agg7", "leaf7"],
    ]
    # Two hosts of 400 Gbit/s a leaf, two uplinks: nothing is oversubscribed.
    assert set(topology.capacity_L.tolist()) == {400_000_000_000}


def test_the_papers_fat_tree():
    topology = Topology.fat_tree(8, hosts_per_leaf=16)
    kinds = [sum(name.startswith(kind) for name in topology.names) for kind in ("host", "leaf", "agg", "core")]
    assert kinds == [512, 32, 32, 16]
    assert sorted(set(topology.capacity_L.tolist())) == [400_000_000_000, 1_600_000_000_000]
    assert len(topology.paths(int(topology.leaf_H[0]), int(topology.leaf_H[511]))) == 16
    halved = Topology.fat_tree(8, 2.0, hosts_per_leaf=16)
    assert halved.capacity_L.max() == 800_000_000_000


def test_any_network():
    # A square of switches with a host at each corner: two ways to the corner across.
    cables = [("a", "b", 10), ("b", "c", 10), ("c", "d", 10), ("d", "a", 10)]
    topology = Topology.from_links([*cables, *((f"h{switch}", switch, 1) for switch in "abcd")])
    assert topology.names[:4] == ("ha", "hb", "hc", "hd")
    assert hops(topology, 0, 2) == [["b", "c"], ["d", "c"]]
    assert hops(topology, 0, 1) == [["b"]]
    named = Topology.from_links([*cables, *((f"h{switch}", switch, 1) for switch in "abcd")], hosts=["hc", "ha"])
    assert named.names[:2] == ("hc", "ha")


def test_paths_of_a_leaf_spine_are_those_of_its_cables():
    made = Topology.leaf_spine(3, 2, 2)
    cables = [
        (made.names[a], made.names[b], bits / 1e9)
        for a, b, bits in zip(made.link_from[::2], made.link_to[::2], made.capacity_L[::2], strict=True)
    ]
    other = Topology.from_links(cables)
    for src, dst in ((0, 2), (5, 1), (0, 1)):
        assert hops(other, src, dst) == hops(made, src, dst)


def test_failures_and_speeds_are_copies():
    topology = Topology.leaf_spine(2, 3, 1)
    failed = topology.with_failed("leaf0-spine1")
    assert topology.is_up_L.all()
    assert (~failed.is_up_L).sum() == 2
    assert failed.failed_cables() == ["leaf0-spine1"]
    leaf, to = int(topology.leaf_H[0]), int(topology.leaf_H[1])
    assert failed.path_capacity(leaf, to).tolist() == [400_000_000_000, 0, 400_000_000_000]
    # A path is as slow as its slowest link, wherever that is.
    slow = failed.with_capacity({("leaf1", "spine2"): 100})
    assert slow.path_capacity(leaf, to).tolist() == [400_000_000_000, 0, 100_000_000_000]
    assert slow.path_capacity(leaf, leaf).tolist() == [400_000_000_000]


def test_groups_are_racks_and_pods():
    topology = Topology.fat_tree(4)
    sizes = sorted(len(group) for group in topology.groups)
    # 8 racks of a leaf and 2 hosts; 4 pods of 4 hosts, 2 leaves, 2 aggregation switches.
    assert sizes == [3] * 8 + [8] * 4
    pod = next(group for group in topology.groups if len(group) == 8)
    assert sorted(topology.names[node] for node in pod) == [
        "agg0",
        "agg1",
        "host0",
        "host1",
        "host2",
        "host3",
        "leaf0",
        "leaf1",
    ]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Topology.leaf_spine(0, 1, 2), "leaves is 0"),
        (lambda: Topology.leaf_spine(1, 1, 1), "leaves x hosts_per_leaf is 1; it must be a whole number from 2"),
        (lambda: Topology.leaf_spine(2, 2.0, 2), "spines is 2.0"),
        (lambda: Topology.leaf_spine(2, 2, 2, cap_up=0), "capacity of leaf0 - spine0 is 0"),
        (lambda: Topology.leaf_spine(2, 2, 2, cap_host=float("nan")), "capacity of host0 - leaf0 is nan"),
        (lambda: Topology.fat_tree(3), "k is 3; a fat-tree has switches with an even number of ports"),
        (lambda: Topology.fat_tree(4, float("inf")), "oversub is inf"),
        (lambda: Topology.from_links([("a", "a", 1)]), "from 'a' to itself"),
        (
            lambda: Topology.from_links([("a", "s", 1), ("s", "a", 1), ("b", "s", 1)], hosts=["a", "b"]),
            "host 'a' has 2",
        ),
        (lambda: Topology.from_links([("s", "t", 1), ("t", "s", 1), ("a", "s", 1), ("b", "t", 1)]), "is there twice"),
        (lambda: Topology.from_links([("a", "b", 1)]), "switches is 0"),
        (
            lambda: Topology.from_links([("a", "s", 1), ("b", "t", 1), ("s", "u", 1), ("t", "v", 1)]),
            "no route from host",
        ),
        (lambda: Topology.from_links([]), "hosts is 0"),
        (lambda: Topology.from_links([("a", "b")]), "a cable is (node, node, Gbit/s), not ('a', 'b')"),
        (lambda: Topology.leaf_spine(2, 2, 1).with_failed(["leaf0-spine9"]), "no node 'spine9'; did you mean"),
        (lambda: Topology.leaf_spine(2, 2, 1).with_failed(["leaf0-leaf1"]), "no cable leaf0 - leaf1"),
        (lambda: Topology.leaf_spine(2, 2, 1).with_failed(["nonsense"]), "no node 'nonsense'"),
        (lambda: Topology.leaf_spine(2, 2, 1).with_capacity({"leaf0-spine0": -1}), "capacity of leaf0-spine0 is -1"),
    ],
)
def test_what_is_no_network_is_told(make, said):
    with pytest.raises(InputError) as caught:
        make()
    assert said in str(caught.value)


def test_names_with_dashes_are_found():
    topology = Topology.from_links([("h-0", "top-of-rack", 1), ("h-1", "top-of-rack", 1)])
    assert topology.with_failed(["h-1-top-of-rack"]).failed_cables() == ["h-1-top-of-rack"]


def test_too_many_cables_are_refused_before_they_are_made():
    with pytest.raises(CapacityError, match="8,000 leaves and 4,000 spines have 32,000,000 cables"):
        Topology.leaf_spine(8000, 4000, 1)


def test_too_many_paths_are_refused():
    # 13 diamonds in a row: 2^13 shortest paths.
    cables = [("h", "x0", 1), ("g", "x13", 1)]
    for number in range(13):
        cables += [(f"x{number}", f"{side}{number}", 1) for side in "yz"]
        cables += [(f"{side}{number}", f"x{number + 1}", 1) for side in "yz"]
    topology = Topology.from_links(cables)
    with pytest.raises(CapacityError, match="more than 4,096 paths from x0 to x13"):
        topology.paths(int(topology.leaf_H[0]), int(topology.leaf_H[1]))


def test_paths_are_numbers_of_links():
    topology = Topology.leaf_spine(2, 2, 1)
    paths_PD = topology.paths(int(topology.leaf_H[0]), int(topology.leaf_H[1]))
    assert paths_PD.dtype == np.int32
    # A path begins where the host's leaf is, and each link where the one before ended.
    assert (topology.link_from[paths_PD[:, 0]] == topology.leaf_H[0]).all()
    assert (topology.link_to[paths_PD[:, 0]] == topology.link_from[paths_PD[:, 1]]).all()
    assert (topology.link_to[paths_PD[:, 1]] == topology.leaf_H[1]).all()
