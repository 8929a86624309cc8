import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.serving.core.queue import WaitingQueue


@dataclass
class Item:
    rank: tuple[int, float, int]
    key: str
    cost: int
    own_priority: int = 0


def items(specs):
    return [Item((priority, arrival, serial), key, cost) for serial, (priority, arrival, key, cost) in enumerate(specs)]


def drain(queue):
    taken = []
    while len(queue):
        shown = queue.peek()
        taken.append(queue.pop())
        assert taken[-1] is shown
    assert queue.peek() is None
    return taken


spec = st.tuples(st.integers(-1, 1), st.integers(0, 5).map(float), st.sampled_from("ab"), st.integers(1, 900))


@given(st.lists(spec, max_size=30), st.integers(1, 600))
def test_priority_first_then_arrival_within_a_key(specs, quantum):
    queue = WaitingQueue(quantum)
    for item in items(specs):
        queue.add(item)
    taken = drain(queue)
    assert len(taken) == len(specs)
    assert [item.rank[0] for item in taken] == sorted(item.rank[0] for item in taken)
    for key in "ab":
        ranks = [item.rank for item in taken if item.key == key]
        assert ranks == sorted(ranks)


@given(st.lists(st.tuples(spec, st.integers(-3, 3)), max_size=30), st.integers(1, 600))
def test_a_keys_own_priority_is_of_no_account_to_others(specs, quantum):
    """Of equal costs: whose turn it is stays the same, whatever numbers one gives its own."""
    made = [items([(0, float(at), one[2], 7) for at, (one, _) in enumerate(specs)]) for _ in range(2)]
    for item, (_, own) in zip(made[1], specs, strict=True):
        item.own_priority = own
    taken = []
    for own_items in made:
        queue = WaitingQueue(quantum)
        for item in own_items:
            queue.add(item)
        taken.append(drain(queue))
    assert [item.key for item in taken[0]] == [item.key for item in taken[1]]
    for key in "ab":
        orders = [(item.own_priority, item.rank) for item in taken[1] if item.key == key]
        assert orders == sorted(orders)


@given(st.lists(spec.map(lambda s: (*s[:2], "one", s[3])), max_size=30), st.integers(1, 600))
def test_with_one_key_it_is_first_come_first_served(specs, quantum):
    queue = WaitingQueue(quantum)
    for item in items(specs):
        queue.add(item)
    ranks = [item.rank for item in drain(queue)]
    assert ranks == sorted(ranks)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 2000), min_size=1, max_size=40), min_size=2, max_size=5),
    st.integers(1, 1500),
)
def test_keys_that_wait_are_given_the_same_within_a_quantum_and_two_costs(costs_of_keys, quantum):
    queue = WaitingQueue(quantum)
    specs = [(0, 0.0, f"k{key}", cost) for key, costs in enumerate(costs_of_keys) for cost in costs]
    for item in items(specs):
        queue.add(item)
    left = {f"k{key}": len(costs) for key, costs in enumerate(costs_of_keys)}
    given_to = dict.fromkeys(left, 0)
    largest = max(max(costs) for costs in costs_of_keys)
    while all(left.values()):  # all wait from the start until now
        item = queue.pop()
        left[item.key] -= 1
        given_to[item.key] += item.cost
        assert max(given_to.values()) - min(given_to.values()) <= quantum + 2 * largest


@given(st.data())
def test_one_that_is_sent_back_goes_first_in_its_priority_and_is_not_charged_again(data):
    queue = WaitingQueue(10)
    all_items = items([(0, 0.0, "a", 10), (0, 1.0, "b", 10), (0, 2.0, "a", 10), (1, 0.0, "b", 10), (0, 3.0, "b", 10)])
    for item in all_items:
        queue.add(item)
    taken = [queue.pop() for _ in range(data.draw(st.integers(1, 3)))]
    back = data.draw(st.lists(st.sampled_from(taken), unique_by=id))
    for item in back:
        queue.add_front(item)
    rest = [item for item in all_items if item not in taken]
    after = drain(queue)
    assert after[: len(back)] == sorted(back, key=lambda item: item.rank)
    assert sorted(item.rank for item in after[len(back) :]) == sorted(item.rank for item in rest)


def test_any_mix_of_adding_taking_and_removing_loses_nothing():
    for seed in range(80):
        rng = random.Random(seed)
        queue, inside, outside, serial = WaitingQueue(rng.choice([1, 50, 400])), {}, [], 0
        for _ in range(rng.randint(0, 300)):
            move = rng.random()
            if move < 0.5:
                item = Item((rng.randint(0, 2), rng.random(), serial), rng.choice("abcd"), rng.randint(1, 300))
                serial += 1
                queue.add(item)
                inside[item.rank] = item
            elif move < 0.65 and inside:
                item = inside.pop(rng.choice(list(inside)))
                queue.remove(item)
                with pytest.raises(KeyError):
                    queue.remove(item)
            elif move < 0.75 and outside:
                item = outside.pop()
                queue.add_front(item)
                inside[item.rank] = item
            elif move < 0.8:
                if outside:
                    queue.refund(rng.choice(outside), 100)
            elif inside:
                item = queue.pop()
                assert item.rank[0] == min(rank[0] for rank in inside)
                assert inside.pop(item.rank) is item
                outside.append(item)
            assert len(queue) == len(inside)
            assert sorted(item.rank for item in queue) == sorted(inside)
        assert {item.rank for item in drain(queue)} == set(inside)
        with pytest.raises(IndexError):
            queue.pop()


def test_what_is_removed_does_not_pile_up_behind_one_that_stays():
    queue = WaitingQueue()
    queue.add(Item((0, 0.0, 0), "a", 1))
    for serial in range(1, 5000):
        item = Item((0, 1.0, serial), "a", 1)
        queue.add(item)
        queue.remove(item)
    (level,) = queue._levels.values()
    assert len(level.flows["a"].heap) < 100


def test_a_refund_lets_a_key_go_on():
    queue = WaitingQueue(100)
    a, b = ([Item((0, float(i), i + 10 * (key == "b")), key, 100) for i in range(4)] for key in "ab")
    for item in (*a, *b):
        queue.add(item)
    assert queue.pop() is a[0]
    queue.refund(a[0], 100)
    assert queue.pop() is a[1]
    assert queue.pop() is b[0]


def test_what_was_charged_while_nobody_else_waited_lets_nobody_overtake():
    """A key whose sixteen requests, taken before another came, all end early went fifteen times in a row."""
    queue, serial = WaitingQueue(512), iter(range(1000))
    made = [Item((0, 0.0, next(serial)), "a", 8000) for _ in range(47)]
    for item in made[:17]:
        queue.add(item)
    running = [queue.pop() for _ in range(16)]
    for _ in range(20):
        queue.add(Item((0, 1.0, next(serial)), "b", 300))
    for item in made[17:]:
        queue.add(item)
    taken = []
    for item in running:
        queue.refund(item, 7900)
        taken.append(queue.pop())
    given_to = {key: sum(item.cost for item in taken if item.key == key) for key in "ab"}
    assert abs(given_to["a"] - given_to["b"]) <= 512 + 2 * 8000


def test_what_was_given_back_waits_for_those_who_came_later_and_is_not_lost():
    queue = WaitingQueue(100)
    a, b, c = ([Item((0, float(i), i + 20 * place), key, 100) for i in range(6)] for place, key in enumerate("abc"))
    for item in (*a, *b):
        queue.add(item)
    assert queue.pop() is a[0]
    queue.add(c[0])
    # It paid for this while b waited, but not c.
    queue.refund(a[0], 100)
    assert [queue.pop() for _ in range(2)] == [b[0], c[0]]
    assert [queue.pop() for _ in range(3)] == [a[1], a[2], b[1]]
    # A second time there is nothing to give back.
    queue.refund(a[0], 100)
    assert [queue.pop().key for _ in range(2)] == ["a", "b"]


def test_what_was_charged_before_a_key_had_nothing_that_waits_is_not_given_back():
    queue = WaitingQueue(100)
    a, b = ([Item((0, float(i), i + 20 * (key == "b")), key, 100) for i in range(4)] for key in "ab")
    for item in (a[0], *b):
        queue.add(item)
    assert queue.pop() is a[0]
    queue.add(a[1])
    queue.add(a[2])
    queue.refund(a[0], 100)
    assert [queue.pop() for _ in range(4)] == [b[0], a[1], b[1], a[2]]


def test_what_was_given_back_is_gone_once_nothing_waits():
    queue = WaitingQueue(100)
    b = [Item((0, 0.0, 20 + i), "b", 100) for i in range(4)]
    first, second, third, fourth = (Item((0, 0.0, at), "a", cost) for at, cost in enumerate((100, 40, 60, 100)))
    for item in (first, second, *b):
        queue.add(item)
    assert [queue.pop() for _ in range(2)] == [first, b[0]]
    queue.refund(first, 100)
    assert queue.pop() is second
    queue.add(third)
    queue.add(fourth)
    # Its turn has begun, with a quantum: enough for one of the two.
    assert [queue.pop() for _ in range(3)] == [third, b[1], fourth]


@settings(deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 1500), st.integers(1, 12))
def test_beyond_the_bound_a_key_is_given_only_what_it_gave_back_since_both_wait(random, quantum, seats):
    """Keys come and go, requests end early or late; looked at after every one that is taken, for each two keys that wait."""
    queue, waiting, running, serial, largest = WaitingQueue(quantum), dict.fromkeys("abc", 0), [], 0, 0
    # By two keys: what the first was given since both wait, what it gave back of that, and the items.
    pairs = {(one, other): [0, 0, set()] for one in "abc" for other in "abc" if one != other}

    def check():
        for one, other in pairs:
            if waiting[one] and waiting[other]:
                (given_to, back, _), (others, _, _) = pairs[one, other], pairs[other, one]
                assert given_to - others <= quantum + 2 * largest + back
            else:
                pairs[one, other] = [0, 0, set()]

    for _ in range(120):
        move = random.random()
        if move < 0.45 and sum(waiting.values()) < 40:
            key = random.choice("abc")
            for _ in range(random.choice((1, 1, 9))):
                cost = random.randint(1, random.choice((300, 8000)))
                queue.add(Item((0, 0.0, serial), key, cost))
                largest, serial = max(largest, cost), serial + 1
                waiting[key] += 1
        elif len(running) == seats or (running and random.random() < 0.3):
            item = running.pop(random.randrange(len(running)))
            back = random.choice((0, item.cost // 2, item.cost - 1))
            queue.refund(item, back)
            for (one, _), pair in pairs.items():
                if one == item.key and item.rank in pair[2]:
                    pair[1] += back
        elif len(queue):
            item = queue.pop()
            running.append(item)
            for (one, _), pair in pairs.items():
                if one == item.key:
                    pair[0] += item.cost
                    pair[2].add(item.rank)
            waiting[item.key] -= 1
            check()
    assert len(queue._charged) == len(running)


@settings(deadline=None)
@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 1500), st.integers(0, 4))
def test_to_look_at_all_keys_gives_nobody_a_turn(cost_of_a, cost_of_b, quantum, looks):
    """The scheduler looks at one key after the other; each look once gave quanta until the key was covered."""
    queue, serial, given_to = WaitingQueue(quantum), 0, {"a": 0, "b": 0}
    costs = {"a": cost_of_a, "b": cost_of_b}

    def add(key):
        nonlocal serial
        queue.add(Item((0, float(serial), serial), key, costs[key]))
        serial += 1

    for _ in range(3):
        add("a")
        add("b")
    for _ in range(150):
        for _ in range(looks):
            passed = set()
            while (item := queue.peek(passed)) is not None:
                passed.add(item.key)
        item = queue.pop()
        given_to[item.key] += item.cost
        add(item.key)
        assert abs(given_to["a"] - given_to["b"]) <= quantum + 2 * max(costs.values())


def test_who_comes_between_a_look_and_what_is_taken_is_last():
    queue = WaitingQueue(10)
    first = [Item((0, 0.0, number), "ab"[number % 2], 25) for number in range(4)]
    for item in first:
        queue.add(item)
    shown = queue.peek()
    late = Item((0, 0.0, 9), "c", 25)
    queue.add(late)
    queue.take(shown)
    assert [shown, *drain(queue)] == [*first, late]


# Out of turn


def test_a_key_is_passed_over_and_keeps_what_its_turn_has_left():
    queue = WaitingQueue(100)
    a, b = ([Item((0, 0.0, i + 10 * (key == "b")), key, 40) for i in range(4)] for key in "ab")
    for item in (*a, *b):
        queue.add(item)
    assert queue.pop() is a[0]
    assert queue.peek({"a"}) is b[0]
    queue.take(b[0])
    assert queue.peek({"a", "b"}) is None
    assert len(queue) == 6
    # Of their hundred both have sixty left.
    assert sorted(queue.pop().key for _ in range(2)) == ["a", "b"]


def test_the_first_of_a_key_is_one_that_was_sent_back():
    queue = WaitingQueue(100)
    first, second, third, other = (Item((0, 0.0, at), key, 40) for at, key in enumerate("aaab"))
    for item in (first, second, third, other):
        queue.add(item)
    queue.take(second)
    assert queue.keys() == {"a", "b"}
    assert queue.first_of("a") is first
    queue.add_front(second)
    assert queue.first_of("a") is second
    assert queue.peek({"a"}) is other
    queue.take(queue.first_of("b"))
    assert queue.keys() == {"a"}
    assert drain(queue) == [second, first, third]


def test_what_is_taken_out_of_turn_is_owed():
    queue = WaitingQueue(100)
    a, b = ([Item((0, 0.0, i + 20 * (key == "b")), key, 100) for i in range(9)] for key in "ab")
    for item in (*a, *b):
        queue.add(item)
    for item in b[:2]:
        queue.take(item)
    # Not more than one of them, so the next turns of the other are two.
    assert "".join(queue.pop().key for _ in range(6)) == "aababa"


def test_one_may_begin_to_wait_again_where_others_wait():
    queue = WaitingQueue(10)
    items_of_a = [Item((0, 0.0, at), "a", 10) for at in range(3)]
    for item in items_of_a:
        queue.add(item)
    first = queue.pop()
    queue.refund(first, 5)
    first.cost = 5
    queue.add(first)
    queue.remove(first)
    queue.add_front(first)
    assert sorted(item.rank for item in queue) == [item.rank for item in items_of_a]
    assert drain(queue) == items_of_a
