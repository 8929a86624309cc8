"""The line for adapters' memory by hand: turns of keys, the right of way, and who has waited for long enough."""

from anabranch.serving.core.adapter_line import AdapterLine, Waiter


def joined(line, now, *ids):
    """``a1`` is of key a."""
    for id in ids:
        line.join(Waiter(id, id[0], ((id, 1.0),)), now)


def order(line):
    return [waiter.id for waiter in line]


def always(_):
    return True


def test_keys_take_turns_and_a_key_s_requests_go_as_they_came():
    line = AdapterLine(30.0)
    joined(line, 0.0, "a1", "a2", "a3", "b1", "c1", "b2")
    assert order(line) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert (len(line), line.of_key("a"), line.of_key("z")) == (6, 3, 0)
    # Who comes when the second turn goes is not before those that have waited since the first.
    for id in ("a1", "b1", "c1", "a2"):
        assert line.leave(id).id == id
    joined(line, 1.0, "d1")
    assert order(line) == ["b2", "a3", "d1"]
    assert line.leave("a1") is None


def test_one_that_comes_back_has_its_place_and_its_time():
    line = AdapterLine(30.0)
    joined(line, 0.0, "a1", "b1")
    back = line.leave("a1")
    line.join(back, 20.0)
    assert order(line) == ["a1", "b1"]
    assert line.next_end() == 30.0


def test_who_waited_in_vain_is_gone_and_its_key_has_no_right_of_way_for_as_long():
    line = AdapterLine(30.0)
    joined(line, 0.0, "a1")
    joined(line, 10.0, "b1")
    assert line.over(29.9) == []
    assert [waiter.id for waiter in line.over(30.0)] == ["a1"]
    joined(line, 30.0, "a2")
    assert line.head(30.0, always).id == "b1"
    line.leave("b1")
    assert line.head(59.9, always) is None
    assert line.head(60.0, always).id == "a2"
    assert line.next_end() == 60.0


def test_the_head_is_the_first_whose_own_key_leaves_it_room():
    line = AdapterLine(30.0)
    joined(line, 0.0, "a1", "b1")
    assert line.head(0.0, lambda one: one.key != "a").id == "b1"
    assert line.head(0.0, lambda one: False) is None


def test_who_begins_fits_beside_the_head_and_those_that_begin():
    line, asked = AdapterLine(30.0), []
    joined(line, 0.0, "a1", "b1", "c1")

    def fits(one, *others):
        asked.append((one.id, [other.id for other in others]))
        return one.id != "a1"

    assert [waiter.id for waiter in line.able(0.0, fits, always)] == ["b1", "c1"]
    assert asked == [("a1", []), ("b1", ["a1"]), ("c1", ["b1", "a1"])]
    # Nobody has left by being asked.
    assert len(line) == 3
