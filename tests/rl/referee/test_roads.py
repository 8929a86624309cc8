"""Networks of SUMO read as lanes of ours, from a file written by hand: two roads that cross, a way straight on and one to the left."""

import numpy as np
import pytest

from anabranch.errors import DataError
from anabranch.rl.laneworld.lane_graph import LIGHT, light_state
from anabranch.rl.referee.roads import SumoRoads

NET = """<net>
 <edge id=":m_0" function="internal"><lane id=":m_0_0" index="0" speed="8" shape="40,0 60,0"/></edge>
 <edge id=":m_1" function="internal"><lane id=":m_1_0" index="0" speed="6" shape="40,0 50,2"/></edge>
 <edge id=":m_2" function="internal"><lane id=":m_2_0" index="0" speed="6" shape="50,2 52,4 54,10"/></edge>
 <edge id=":m_3" function="internal"><lane id=":m_3_0" index="0" speed="8" shape="54,-10 54,10"/></edge>
 <edge id="west" from="w" to="m"><lane id="west_0" index="0" speed="10" shape="0,0 40,0"/></edge>
 <edge id="south" from="s" to="m"><lane id="south_0" index="0" speed="12" shape="54,-40 54,-10"/></edge>
 <edge id="east" from="m" to="e"><lane id="east_0" index="0" speed="10" shape="60,0 100,0"/></edge>
 <edge id="north" from="m" to="n"><lane id="north_0" index="0" speed="10" shape="54,10 54,60"/></edge>
 <connection from="west" to="east" fromLane="0" toLane="0" via=":m_0_0" tl="m" linkIndex="1" dir="s" state="o"/>
 <connection from="west" to="north" fromLane="0" toLane="0" via=":m_1_0" tl="m" linkIndex="2" dir="l" state="o"/>
 <connection from="south" to="north" fromLane="0" toLane="0" via=":m_3_0" tl="m" linkIndex="0" dir="s" state="o"/>
 <connection from=":m_0" to="east" fromLane="0" toLane="0" dir="s" state="M"/>
 <connection from=":m_1" to="north" fromLane="0" toLane="0" via=":m_2_0" dir="l" state="m"/>
 <connection from=":m_2" to="north" fromLane="0" toLane="0" dir="l" state="M"/>
 <connection from=":m_3" to="north" fromLane="0" toLane="0" dir="s" state="M"/>
</net>"""


@pytest.fixture
def roads(tmp_path):
    (tmp_path / "a.net.xml").write_text(NET)
    return SumoRoads(tmp_path / "a.net.xml")


def test_roads_and_ways_are_lanes(roads):
    assert roads.edges == ["west", "south", "east", "north", None, None, None]
    assert roads.roads == [0, 1, 2, 3]
    assert [segment.next for segment in roads.segments] == [[4, 5], [6], [], [], [2], [3], [3]]
    assert [segment.is_junction for segment in roads.segments] == [False] * 4 + [True] * 3
    # A way is as fast as the slowest of the road before it and of what it is made of.
    assert [segment.limit for segment in roads.segments] == [10, 12, 10, 10, 8, 6, 8]
    assert roads.lengths[:2] == pytest.approx([40, 30])
    # To the left it goes by both lanes within the junction.
    assert roads.lengths[5] == pytest.approx(np.hypot(10, 2) + np.hypot(2, 2) + np.hypot(2, 6))


def test_a_route_is_laid_out_from_road_to_road(roads):
    path = roads.path([0, 5, 3])
    assert path.length == int(40 + roads.lengths[5] + 50)
    assert np.allclose(path.point_P2[0], [0, 0])
    assert np.allclose(path.point_P2[-1], [54, 60], atol=1.0)
    assert path.stop_s_J.tolist() == [40]
    assert path.stop_kind_J.tolist() == [LIGHT]
    assert path.junction_P[45]
    assert not path.junction_P[30]
    ways = roads.ways(np.random.default_rng(0), 3, 60, 200)
    assert all(way[0] in (0, 1) and way[-1] in (2, 3) for way in ways)


def test_roads_that_cross_take_turns_as_in_laneworld(roads):
    text = roads.lights()
    phases = [line.split('"')[1::2] for line in text.splitlines() if "phase" in line]
    # Place 0 comes from the south, 1 and 2 from the west, of which the second turns left and waits for who comes.
    assert phases == [["8", "rGg"], ["2", "ryy"], ["8", "Grr"], ["2", "yrr"]]
    starts = np.cumsum([0, 8, 2, 8])
    for segment, place in ((roads.segments[0], 1), (roads.segments[1], 0)):
        for (_, state), start in zip(phases, starts, strict=True):
            shown = int(light_state(np.array(start + 0.5), np.array(segment.offset_s))[0])
            assert "Gyr"[shown] == state[place]


@pytest.mark.parametrize(("text", "message"), [("<net>", "is no network of SUMO's"), ("<net/>", "has no roads")])
def test_what_is_no_network_is_told(tmp_path, text, message):
    (tmp_path / "a.net.xml").write_text(text)
    with pytest.raises(DataError, match=message):
        SumoRoads(tmp_path / "a.net.xml")
    with pytest.raises(DataError, match="is no network of SUMO's"):
        SumoRoads(tmp_path / "b.net.xml")
