"""The line for adapters' memory by hand: turns of keys, the right of way, what is closed for it, and who has waited for long enough."""

from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.serving.core.adapter_entry import Entry
from anabranch.serving.core.adapter_line import AdapterLine
from anabranch.serving.core.adapter_room import AdapterRoom, Waiter


class Lines:
    """A line before room for 100 bytes. ``a1=p50+q20`` is a request of key a for adapters of 50 and of 20."""

    def __init__(self, pinned=""):
        self.room = AdapterRoom(100)
        self.entries = {}
        for name in pinned.split():
            self.entry(name).is_pinned, self.entry(name).held = True, "there"
            self.room.pinned.append(self.entry(name))
        self.line = AdapterLine(30.0, self.room)

    def entry(self, name):
        return self.entries.setdefault(name, Entry(name, "", size=int(name[1:])))

    def waiter(self, told):
        id, _, names = told.partition("=")
        return Waiter(id, id[0], tuple((self.entry(name), 1.0) for name in names.split("+")))

    def use(self, told):
        for one in told.split():
            self.room.begin(self.waiter(one))

    def join(self, told, now=0.0):
        for one in told.split():
            self.line.join(self.waiter(one), now)

    def end(self, *ids):
        for id in ids:
            assert self.room.end(id) is not None

    def go(self, now=0.0):
        return [one.id for one in self.line.go(now)]

    def order(self):
        return [one.id for one in self.line]

    def head(self):
        return None if self.line.head is None else self.line.head.id

    def closed(self, now=0.0):
        return sorted(entry.name for entry in self.line.closed(now))


def test_keys_take_turns_and_a_key_s_requests_go_as_they_came():
    made = Lines()
    made.use("x=y100")
    made.join("a1=p60 a2=q60 a3=r60 b1=s60 c1=t60 b2=u60")
    assert made.order() == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert (len(made.line), made.line.of_key("a"), made.line.of_key("z")) == (6, 3, 0)
    # Room for one at a time. Who comes later is behind those that have waited for longer since they had a turn, and before the others.
    begun, last = [], "x"
    while made.order():
        made.end(last)
        [last] = made.go()
        begun.append(last)
        if last == "a1":
            made.join("d1=v60 d2=w60")
    assert begun == ["a1", "b1", "c1", "a2", "d1", "b2", "a3", "d2"]


def test_what_a_key_s_own_use_kept_waiting_has_no_turns_saved():
    """Of a key that was kept waiting by its own no more than one goes before who comes now, however many turns went meanwhile."""
    made = Lines()
    made.use("h0=y60")
    made.join("h1=p60 h2=q60 h3=r60")
    for number in range(5):
        made.join(f"b{number}=s40")
        assert made.go() == [f"b{number}"]
        made.end(f"b{number}")
    made.use("x=s40")
    made.join("c1=t100")
    made.end("h0", "x")
    assert made.go() == ["h1"]
    made.end("h1")
    assert made.go() == ["c1"]


def test_one_that_comes_back_has_its_place_and_its_time():
    made = Lines()
    made.use("x=y100")
    made.join("a1=p60 b1=q60")
    made.end("x")
    assert made.go() == ["a1"]
    back = made.room.lease("a1")
    made.end("a1")
    made.use("x=y100")
    made.line.join(back, 20.0)
    made.join("c1=r60", 20.0)
    assert made.order() == ["a1", "b1", "c1"]
    assert made.line.next_end() == 30.0


def test_who_leaves_changes_nobody_else_s_place():
    """The turn that went jumped to that of whoever left: who came next was behind all of a heavy key, whose last one was cancelled."""
    made = Lines()
    made.use("x=y100")
    made.join("h1=p60 h2=q60 h3=r60 h4=s60")
    assert made.line.leave("h4", 0.0).id == "h4"
    assert made.line.leave("h4", 0.0) is None
    made.join("b1=t60")
    assert made.order() == ["h1", "b1", "h2", "h3"]
    # Nor has a key a better place by one that it sent before and cancelled.
    made.line.leave("h1", 0.0)
    made.join("b2=t60")
    assert made.order() == ["h2", "b1", "h3", "b2"]
    made.join("c1=u60")
    made.line.leave("h2", 0.0)
    made.line.leave("h3", 0.0)
    made.join("h5=v60")
    assert made.order() == ["b1", "c1", "h5", "b2"]


def test_one_that_is_replaced_hands_on_its_place_and_its_time():
    made = Lines()
    made.use("x=y100")
    made.join("a1=p60 b1=q60 a2=r60")
    made.join("c1=s60", 5.0)
    assert made.line.replace("b1", made.waiter("b2=t90"))
    assert made.order() == ["a1", "b2", "c1", "a2"]
    assert (len(made.line), made.line.of_key("b"), made.line.next_end()) == (4, 1, 30.0)
    # Nobody's place: that of another key, of one that is gone, and that of none.
    assert not any(made.line.replace(id, made.waiter("b3=u60")) for id in ("a1", "b1", ""))
    assert made.order() == ["a1", "b2", "c1", "a2"]
    assert [one.id for one in made.line.over(30.0)] == ["a1", "a2", "b2"]


def test_one_that_is_replaced_hands_on_the_right_of_way_and_for_how_long_it_had_it():
    """Whoever asked anew was first no more, and was without the right of way for as long as it had had it."""
    made = Lines()
    made.use("a1=p30 c1=q30 c2=q30 d1=r40 d2=r40 d3=r40")
    made.join("b1=s20")
    made.go()
    made.join("e1=t20", 1.0)
    assert (made.go(6.0), made.head(), made.closed(6.0)) == ([], "b1", ["p30", "q30"])
    assert made.line.replace("b1", made.waiter("b2=u30"))
    assert (made.go(6.0), made.head(), made.closed(6.0)) == ([], "b2", ["p30", "q30"])
    assert made.line.replace("b2", made.waiter("b3=v20"))
    made.end("a1")
    assert made.go(7.0) == ["b3"]
    # Neither one that is larger than all that others leave, nor one that is pushed on for ever, keeps others waiting for longer.
    made = Lines()
    made.use("a1=p60 b0=q40")
    made.join("b1=s60")
    made.join("c1=t60", 1.0)
    made.go(1.0)
    assert made.head() == "b1"
    assert made.line.replace("b1", made.waiter("b2=u70"))
    made.go(2.0)
    assert made.head() == "c1"
    again = Lines()
    again.use("x=y100")
    again.join("b1=p60")
    again.join("c1=q60", 29.0)
    again.go(29.0)
    assert again.line.replace("b1", again.waiter("b2=r60"))
    assert [one.id for one in again.line.over(30.0)] == ["b2"]
    again.join("b3=p60", 30.0)
    for now in (30.0, 58.0):
        again.go(now)
        assert again.head() == "c1"


def test_what_one_that_takes_over_uses_is_not_closed_for_it():
    made = Lines()
    made.use("a1=p40 c1=q40")
    made.join("b1=s60+t30")
    made.go()
    assert made.closed() == ["p40", "q40"]
    assert made.line.replace("b1", made.waiter("b2=q40+u30"))
    made.go()
    assert (made.head(), made.closed()) == ("b2", ["p40"])


def test_the_head_is_the_first_whose_own_key_leaves_it_room():
    made = Lines()
    made.use("a0=p60 c0=q40")
    made.join("a1=r60 b1=s60")
    assert made.go() == []
    assert made.head() == "b1"
    # It keeps the right of way, though a is before it in line and could have it now.
    made.end("a0")
    assert made.go() == ["b1"]
    assert made.head() == "a1"
    made.end("b1")
    assert made.go() == ["a1"]
    assert made.head() is None


def test_what_stood_idle_for_one_is_not_kept_idle_for_more_of_its_key():
    """Of a key that asked for all memory two at a time one was always first, and others had a tenth of it each time it was between."""
    made = Lines()
    made.use("a1=p20 a2=q20 a3=r20 a4=s20 a5=t20")
    made.join("h1=v100 h2=w100")
    assert made.go() == []
    for number, name in enumerate(["p20", "q20", "r20", "s20", "t20"]):
        made.end(f"a{number + 1}")
        made.join(f"a{number + 6}={name}")
        # Only h's.
        assert made.go() == (["h1"] if number == 4 else [])
    assert made.head() == "a6"
    made.end("h1")
    assert made.go() == ["a6", "a7", "a8", "a9", "a10"]
    assert (made.head(), made.closed()) == ("h2", ["p20", "q20", "r20", "s20", "t20"])
    # Those that come later wait for it.
    made.join("a11=p20")
    made.end("a7")
    assert made.go() == []


def test_as_few_as_have_to_fall_idle_are_closed_the_least_used_first():
    made = Lines("m10")
    made.use("a1=p30 a2=p30 c1=q30 d1=r30 b0=r30")
    made.join("b1=s20")
    assert made.go() == []
    # b uses r itself; q has one request, p has two.
    assert made.closed() == ["q30"]
    # Who adds no bytes waits for what is closed alone, and never for what is pinned.
    made.join("e1=p30 e2=q30 e3=m10 e4=p30+m10 e5=t10")
    assert made.go(1.0) == ["e1", "e3", "e4"]
    assert made.order() == ["b1", "e2", "e5"]
    made.end("c1")
    # Now it is e's turn, for which r and s have to fall idle; what had room began before that.
    assert made.go(1.0) == ["b1", "e5"]
    assert (made.head(), made.closed(1.0)) == ("e2", ["r30", "s20"])


def test_with_those_whose_turn_it_was_begin_all_that_add_no_bytes():
    made = Lines()
    made.use("x=y60 w=z40")
    made.join("a1=p60 b1=q60 c1=p60 a2=p60 c2=z40")
    assert made.go() == ["c2"]
    made.end("x")
    assert made.go() == ["a1", "c1", "a2"]
    # Those that come later wait for what is closed then.
    assert (made.head(), made.closed()) == ("b1", ["p60", "z40"])
    made.join("d1=z40 d2=p60")
    assert made.go() == []


def test_who_is_without_the_right_of_way_comes_behind_all_that_have_it():
    made = Lines()
    made.use("x=y60 w=z40")
    made.join("a1=p100")
    made.go()
    made.line.over(30.0)
    made.join("a2=r40", 30.0)
    made.join("b1=q80", 31.0)
    made.end("w")
    # Beside y there is room for a's, though not beside b's.
    assert made.go(31.0) == []
    assert made.head() == "b1"


def test_what_the_head_or_its_key_uses_is_not_closed_for_it():
    made = Lines()
    made.use("a1=p50 a2=p50 a3=p50 b0=q30 c0=q30")
    made.join("b1=s60")
    made.go()
    assert made.closed() == ["p50"]
    made = Lines()
    made.use("a1=p40 a2=p40 c1=q40")
    made.join("b1=q40+s60")
    made.go()
    assert (made.head(), made.closed()) == ("b1", ["p40"])


def test_what_is_in_memory_and_in_use_is_there_for_all_also_where_too_much_is_begun():
    """Of one whose size nobody knew more may have begun than there is room for; what has to be read then waits."""
    made = Lines()
    made.use("x=y60 w=z60")
    made.entry("y60").held = made
    made.join("a1=y60 b1=z60")
    assert made.go() == ["a1"]


def test_a_turn_is_used_by_who_leaves_without_having_begun():
    made = Lines()
    made.use("x=y100")
    made.join("h1=p60 h2=q60 b1=r60")
    made.go()
    assert made.head() == "h1"
    made.line.leave("h1", 2.0)
    for now in (2.0, 5.0):
        made.go(now)
        assert made.head() == "b1"


def test_more_is_closed_as_time_goes():
    """As that which was chosen may be in use for long."""
    made = Lines()
    made.use("a1=p30 c1=q30 c2=q30 d1=r40 d2=r40 d3=r40")
    made.join("b1=s20")
    made.go()
    assert [made.closed(now) for now in (4.9, 5.0, 10.0, 29.0)] == [
        ["p30"],
        ["p30", "q30"],
        ["p30", "q30", "r40"],
        ["p30", "q30", "r40"],
    ]
    # Others may begin beside what has to fall idle; what falls idle of the rest makes room as well.
    made.end("c1", "c2")
    assert made.go(5.0) == ["b1"]


def test_what_begins_meanwhile_leaves_the_head_the_room_it_waits_for():
    """More may be closed than has to fall idle: the room of that is not given away."""
    made = Lines()
    made.use("a1=p50 c1=q30 c2=q30")
    made.join("b1=r60")
    assert made.go() == []
    made.join("d1=s20 e1=t10", 5.0)
    # b needs p's, and there are 10 beside then; q is closed as well by now.
    assert made.closed(5.0) == ["p50", "q30"]
    assert made.go(5.0) == ["e1"]
    made.end("a1")
    assert made.go(6.0) == ["b1"]


def test_what_has_fallen_idle_is_not_used_again_in_the_head_s_room():
    made = Lines()
    made.use("a1=p30 a2=q70")
    made.join("b1=r100")
    assert made.go() == []
    assert made.closed() == ["p30", "q70"]
    made.end("a1")
    made.join("a3=p30")
    assert made.go() == []
    made.end("a2")
    assert made.go() == ["b1"]


def test_who_waited_in_vain_is_without_the_right_of_way_for_as_long_as_it_had_it():
    made = Lines()
    made.use("x=y100")
    made.join("a1=p60")
    made.go()
    made.join("b1=q60 a2=r60", 10.0)
    made.go(10.0)
    assert made.line.over(29.9) == []
    assert [one.id for one in made.line.over(30.0)] == ["a1"]
    made.go(30.0)
    assert made.head() == "b1"
    # b has it for ten seconds; then nobody has it, as a had it for thirty.
    assert {one.id for one in made.line.over(40.0)} == {"b1", "a2"}
    made.join("a3=p60", 40.0)
    made.go(40.0)
    assert made.head() is None
    made.join("b2=q60", 45.0)
    made.go(49.9)
    assert made.head() is None
    made.go(50.0)
    assert made.head() == "b2"
    made.line.leave("b2", 59.0)
    made.go(60.0)
    assert made.head() == "a3"


def test_only_who_had_the_right_of_way_is_without_it():
    """Refusals of those that never had it were counted as well, so that a key which went on asking never had it again."""
    made = Lines()
    made.use("x=y100")
    made.join("a1=p60")
    made.go()
    made.join("b1=p60 b2=p60", 1.0)
    made.go(1.0)
    assert [one.id for one in made.line.over(30.0)] == ["a1"]
    made.line.leave("b1", 30.0)
    made.go(30.0)
    assert made.head() == "b2"


def test_who_never_had_the_right_of_way_gives_its_place_to_the_next_of_its_key():
    made = Lines()
    made.use("x=y100")
    made.join("a1=p60 b1=q60")
    made.go()
    made.line.over(30.0)
    made.join("c1=r60", 31.0)
    made.join("a2=p60", 31.0)
    made.join("b2=q60", 32.0)
    assert made.order() == ["b2", "c1", "a2"]
    # One that comes too late for it is behind the others, and so is the next one.
    late = Lines()
    late.use("x=y100")
    late.join("a1=p60 b1=q60")
    late.go()
    late.line.over(30.0)
    late.join("c1=r60", 50.0)
    late.join("b2=q60", 60.0)
    assert late.order() == ["c1", "b2"]


def test_a_place_is_kept_neither_for_who_had_a_turn_nor_before_those_of_its_key_that_wait():
    made = Lines()
    made.use("x=y100")
    made.join("b1=p60")
    made.go()
    made.join("a1=q60", 1.0)
    made.join("a2=q60", 5.0)
    made.line.over(31.0)
    made.join("c1=r60 b2=s60 a3=t60", 32.0)
    made.go(62.5)
    assert made.order() == ["a2", "c1", "b2", "a3"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abch"), st.booleans()), max_size=30))
def test_requests_that_a_key_cancels_change_nothing_for_others(asked):
    """The order of all that stay is the same, whether those that are cancelled ever were there."""
    orders = []
    for with_cancelled in (True, False):
        made = Lines()
        made.use("x=y100")
        for number, (key, is_cancelled) in enumerate(asked):
            if with_cancelled or not is_cancelled:
                made.join(f"{key}{number}=p{number + 1}")
        for number, (key, is_cancelled) in enumerate(asked):
            if with_cancelled and is_cancelled:
                made.line.leave(f"{key}{number}", 0.0)
        orders.append(made.order())
    assert orders[0] == orders[1]
