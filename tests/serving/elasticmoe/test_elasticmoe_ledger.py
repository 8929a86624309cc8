"""The book of requests with ranks of paper: whom it tells what when a reader is slow, and who gets the place."""

from collections import Counter

import pytest

from anabranch.serving.core.request import Finish, Output, Request, Sampling
from anabranch.serving.elasticmoe.handover import Carried
from anabranch.serving.elasticmoe.ledger import Ledger
from anabranch.serving.elasticmoe.rank_boot import Limits


class Ranks:
    """An instance that only notes what its ranks are told."""

    def __init__(self, *devices):
        self.devices, self.is_broken, self.told = devices, False, []

    def tell(self, device, name, **arguments):
        id = arguments.get("id") or getattr(arguments.get("request"), "id", None)
        self.told.append((device, name, id) if id else (device, name))

    def news(self):
        """What they were told since the last time."""
        told, self.told = self.told, []
        return told


class Book:
    """A ledger, its first instance, and what clients were given."""

    def __init__(self, *devices, max_seqs=1):
        self.served, self.given = [], []
        self.ledger = Ledger(Limits(num_blocks=8, max_seqs=max_seqs), 61, lambda *times: self.served.append(times))
        self.ranks = Ranks(*devices)
        self.ledger.resume(self.ranks)
        self.ranks.news()

    def submit(self, *ids):
        for id in ids:
            sampling = Sampling(max_tokens=9)
            self.ledger.submit(Request(id=id, prompt=(1, 2, 3), sampling=sampling), self.given.append)

    def gives(self, id, *tokens, **last):
        live = self.ledger.live[id]
        self.ledger.take(live.instance, live.device, [Output(id=id, tokens=tokens, **last)])


@pytest.fixture
def book():
    return Book(0)


def test_a_paused_request_stays_with_its_rank_and_another_has_its_place(book):
    book.submit("slow", "next", "last")
    assert book.ranks.news() == [(0, "submit", "slow")]
    assert (book.ledger.num_running, book.ledger.num_waiting, book.ledger.num_paused) == (1, 2, 0)
    book.ledger.pause_request("slow")
    book.ledger.pause_request("slow")
    assert book.ranks.news() == [(0, "pause_request", "slow"), (0, "submit", "next")]
    assert (book.ledger.num_running, book.ledger.num_waiting, book.ledger.num_paused) == (1, 1, 1)
    book.gives("slow", 7)  # of the step that was under way
    assert [output.tokens for output in book.given] == [(7,)]
    book.ledger.resume_request("slow")
    book.ledger.resume_request("slow")
    assert book.ranks.news() == [(0, "resume_request", "slow")]
    book.gives("next", 8, finish=Finish.LENGTH)
    assert book.ranks.news() == []  # the rank has as many as it runs
    book.gives("slow", 8, finish=Finish.LENGTH)
    assert book.ranks.news() == [(0, "submit", "last")]


def test_unknown_requests_are_left_alone(book):
    book.ledger.pause_request("nobody")
    book.ledger.resume_request("nobody")
    book.submit("a")
    book.ledger.resume_request("a")
    assert book.ranks.news() == [(0, "submit", "a")]


def test_one_whose_rank_died_begins_again_when_it_is_resumed(book):
    book.submit("slow", "other")
    book.gives("slow", 7, 8)
    book.ledger.pause_request("slow")
    book.ledger.send_back(book.ranks)
    new = Ranks(0)
    book.ledger.resume(new)
    assert new.news() == [(0, "go"), (0, "submit", "other")]
    book.ledger.pause_request("other")
    assert new.news() == [(0, "pause_request", "other")]
    book.ledger.resume_request("slow")
    assert new.news() == [(0, "submit", "slow")]
    assert book.ledger.live["slow"].output == [7, 8]


def test_what_happens_to_readers_during_a_change_is_told_to_the_new_ranks_before_they_go_on():
    book = Book(0, max_seqs=9)
    book.submit("slow", "quick", "both", "gone", "runs")
    for id in ("slow", "quick"):
        book.ledger.pause_request(id)
    book.ledger.is_paused = True  # frozen by now: slow and quick are paused in what is handed over
    book.ledger.resume_request("quick")
    book.ledger.pause_request("both")
    book.ledger.resume_request("both")
    book.ledger.pause_request("both")
    book.ledger.pause_request("gone")
    book.ledger.abort("gone")
    new = Ranks(0, 1)
    book.ledger.move(book.ranks, new, {"slow": 1, "quick": 0, "both": 0, "runs": 1})
    book.ledger.resume(new)
    assert new.news() == [
        (0, "abort", "gone"),
        (1, "abort", "gone"),
        (1, "pause_request", "slow"),
        (0, "resume_request", "quick"),
        (0, "pause_request", "both"),
        (0, "go"),
        (1, "go"),
    ]
    book.ledger.resume(new)  # nothing is told twice but what must hold
    assert new.news() == [(1, "pause_request", "slow"), (0, "pause_request", "both"), (0, "go"), (1, "go")]


def test_a_drain_takes_what_is_paused_from_the_old_instance(book):
    book.submit("slow", "runs")
    book.gives("slow", 7)
    book.ledger.pause_request("slow")
    new = Ranks(1)
    book.ledger.resume(new)
    book.ranks.news()
    book.ledger.withdraw_paused(book.ranks)
    assert book.ranks.news() == [(0, "abort", "slow")]
    assert [live.request.id for live in book.ledger.with_instance(book.ranks)] == ["runs"]
    book.ledger.take(book.ranks, 0, [Output(id="slow", tokens=(8,)), Output(id="slow", finish=Finish.ABORT)])
    assert [output.tokens for output in book.given] == [(7,)]  # what came too late is given by the new instance
    assert new.news() == [(1, "go")]
    book.ledger.resume_request("slow")
    assert new.news() == [(1, "submit", "slow")]


def test_aborted_while_paused(book):
    book.submit("slow")
    book.ledger.pause_request("slow")
    book.ledger.abort("slow")
    assert book.ranks.news() == [(0, "submit", "slow"), (0, "pause_request", "slow"), (0, "abort", "slow")]
    assert [output.finish for output in book.given] == [Finish.ABORT]
    book.ledger.resume_request("slow")
    assert book.ranks.news() == []
    assert book.ledger.num_paused == 0


def test_time_that_a_reader_takes_is_no_fault_of_the_devices(book, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("anabranch.serving.elasticmoe.ledger.time.monotonic", lambda: now[0])
    book.submit("slow")

    def at(time, work, *arguments, **more):
        now[0] = time
        work(*arguments, **more)

    at(1, book.gives, "slow", 5)
    at(2, book.gives, "slow", 6)
    at(2, book.ledger.pause_request, "slow")
    at(22, book.ledger.resume_request, "slow")
    at(23, book.gives, "slow", 7, finish=Finish.LENGTH)
    assert book.served == [(1, (23 - 1 - 20) / 2)]
    assert book.ledger.longest_gap_s == 1


# -- requests that ranks die of


def outlive(book, killer, most=20):
    """Replace ranks that die of ``killer`` until it is gone; gives who ran when they did, each time."""
    deaths = []
    for _ in range(most):
        running = [live.request.id for live in book.ledger.live.values() if live.runs]
        if killer in running:
            deaths.append(sorted(running))
            book.ledger.send_back(book.ranks)
            book.ranks = Ranks(*book.ranks.devices)
            book.ledger.resume(book.ranks)
        elif running:
            book.gives(running[0], len(book.given))
        if killer not in book.ledger.live:
            return deaths
    raise AssertionError(f"it lives on: {deaths}")


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("place", [0, 2, 5])
def test_only_the_request_that_ranks_die_of_ends(devices, place):
    book, ids = Book(*range(devices), max_seqs=6), list("abcdef")
    book.submit(*ids)
    killer = ids[place]
    deaths = outlive(book, killer)
    assert deaths[:2] == [ids, ids]
    assert deaths[2:] == [[killer]]
    ended = [output for output in book.given if output.finish is not None]
    assert [(output.id, output.finish) for output in ended] == [(killer, Finish.ERROR)]
    assert "with nothing else to run" in ended[0].error
    # The rest run together again, from what they have.
    assert {live.request.id for live in book.ledger.live.values() if live.runs} == set(ids) - {killer}
    for id in set(ids) - {killer}:
        given = [token for output in book.given if output.id == id for token in output.tokens]
        assert book.ledger.live[id].output == given
        book.gives(id, 1, finish=Finish.LENGTH)
    assert not book.ledger.live


def test_new_requests_wait_while_one_is_run_alone_and_the_paused_harm_nobody():
    book = Book(0, max_seqs=4)
    book.submit("a", "b", "slow")
    book.ledger.pause_request("slow")
    for _ in range(2):
        book.ledger.send_back(book.ranks)
        book.ranks = Ranks(0)
        book.ledger.resume(book.ranks)
    book.submit("new")
    assert book.ranks.news() == [(0, "go"), (0, "submit", "a")]
    assert book.ledger.live["slow"].failures == 0
    book.ledger.resume_request("slow")
    book.gives("a", 7)
    assert book.ranks.news() == [(0, "pause_request", "a"), (0, "submit", "b")]
    book.gives("a", 8)  # of the step that was under way
    book.ledger.pause_request("a")
    book.ledger.resume_request("a")
    assert book.ranks.news() == [(0, "pause_request", "a")]  # its reader changes nothing
    book.gives("b", 7)
    assert book.ranks.news() == [(0, "resume_request", "a"), (0, "submit", "slow"), (0, "submit", "new")]
    assert book.ledger.live["a"].output == [7, 8]
    assert all(live.runs for live in book.ledger.live.values())


def test_ranks_that_die_of_themselves_end_nobody():
    book = Book(0, max_seqs=4)
    book.submit("a", "b")
    for number in range(30):
        for id in "ab":
            book.gives(id, number)
        book.ledger.send_back(book.ranks)
        book.ranks = Ranks(0)
        book.ledger.resume(book.ranks)
        assert book.ranks.news() == [(0, "go"), (0, "submit", "a"), (0, "submit", "b")]
    assert [output for output in book.given if output.finish is not None] == []


def order_of(book, count):
    """Ids in the order in which the rank gets them, each ended as soon as it is there."""
    taken = []
    for _ in range(count):
        (id,) = [id for _, name, id in book.ranks.news() if name == "submit"]
        taken.append(id)
        book.gives(id, 5, finish=Finish.LENGTH)
    return taken


def put(book, id, key, tokens=400, **fields):
    sampling = Sampling(max_tokens=tokens)
    book.ledger.submit(Request(id=id, prompt=(1,), sampling=sampling, key=key, **fields), book.given.append)


def test_a_request_s_own_priority_goes_before_others_of_its_key_and_no_other_s():
    book = Book(0)
    put(book, "first", "a")
    for number in range(3):
        put(book, f"a{number}", "a", own_priority=-number)
    put(book, "b", "b")
    put(book, "urgent", "c", priority=-1)
    # Each key has one with the rank, whose own seats say whose turn it is.
    assert [id for _, name, id in book.ranks.news() if name == "submit"] == ["first", "b", "urgent"]
    book.gives("b", 5, finish=Finish.LENGTH)
    book.gives("urgent", 5, finish=Finish.LENGTH)
    book.gives("first", 5, finish=Finish.LENGTH)
    assert order_of(book, 3) == ["a2", "a1", "a0"]


def test_no_key_waits_for_the_end_of_another_s_requests():
    book = Book(0, 1, max_seqs=4)
    for number in range(20):
        put(book, f"a{number}", "a")
    assert len(book.ranks.news()) == 8
    for number in range(9):
        put(book, f"b{number}", "b")
    # Half of each rank's places.
    told = book.ranks.news()
    assert [id for _, _, id in told] == [f"b{number}" for number in range(4)]
    assert sorted(device for device, _, _ in told) == [0, 0, 1, 1]
    put(book, "c", "c")
    assert [id for _, _, id in book.ranks.news()] == ["c"]
    # a's end: its rank has as many as it runs even so, and b has its part.
    book.gives("a0", 5, finish=Finish.LENGTH)
    assert book.ranks.news() == []


def test_what_keys_pay_and_do_not_use_they_get_back_and_nothing_is_kept_of_it():
    book = Book(0, max_seqs=2)
    for number in range(6):
        put(book, f"a{number}", "a")
        put(book, f"b{number}", "b")
    book.ledger.abort("a0")
    book.ledger.pause_request("b0")
    book.ledger.withdraw_paused(book.ranks)
    book.ledger.resume_request("b0")
    while book.ledger.live:
        for live in list(book.ledger.live.values()):
            if live.instance is not None:
                book.gives(live.request.id, 7, finish=Finish.STOP)
    assert book.ledger._queue._charged == {}
    for number in range(4):
        put(book, f"c{number}", "c")
    refunded, book.ledger._queue.refund = [], lambda live, tokens: refunded.append((live.request.id, tokens))
    book.gives("c0", 7, 8)
    book.gives("c0", 9, finish=Finish.STOP)
    assert refunded == [("c0", 400 - 3)]


def test_each_key_has_as_many_with_a_rank_as_its_part_however_much_they_cost():
    book = Book(0)
    put(book, "first", "a")
    for number in range(4):
        put(book, f"a{number}", "a")
    for number in range(4):
        put(book, f"b{number}", "b", tokens=200)
    assert [id for _, name, id in book.ranks.news() if name == "submit"] == ["first", "b0"]
    for id, instead in (("first", "a0"), ("b0", "b1")):
        book.ledger.pause_request(id)
        assert book.ranks.news() == [(0, "pause_request", id), (0, "submit", instead)]


def test_one_that_was_paused_while_it_waited_keeps_its_place_and_is_taken_once():
    book = Book(0)
    for id in ("runs", "slow", "next"):
        put(book, id, "a")
    book.ledger.pause_request("slow")
    book.ledger.resume_request("slow")
    assert order_of(book, 3) == ["runs", "slow", "next"]
    assert not book.ledger.live


def test_requests_of_a_group_with_a_seed_get_the_same_ones_again():
    def seeds(seed):
        ledger = Ledger(Limits(num_blocks=8, max_seqs=9, seed=seed), 61, lambda *times: None)
        for number in range(3):
            sampling = Sampling(max_tokens=9)
            ledger.submit(Request(id=f"{number}", prompt=(1,), sampling=sampling), lambda output: None)
        return [live.request.sampling.seed for live in ledger.live.values()]

    assert seeds(3) == seeds(3) != seeds(4)
    assert seeds(None) != seeds(None)


# -- what waits in a rank beyond its places


def fill(book, **asks):
    for key, count in asks.items():
        for number in range(count):
            put(book, f"{key}{number}", key)
    book.ranks.news()


def with_devices(book):
    return Counter(live.device for live in book.ledger.live.values())


def test_a_device_that_falls_idle_is_given_what_waits_in_another():
    book = Book(0, 1, max_seqs=4)
    fill(book, a=8, b=4)
    assert with_devices(book) == {0: 6, 1: 6}
    assert (book.ledger.num_running, book.ledger.num_waiting) == (8, 4)
    on_1 = [id for id, live in book.ledger.live.items() if live.device == 1]
    for id in on_1[:3]:
        book.gives(id, 7, finish=Finish.LENGTH)
    # One place is free, and it is asked for once.
    assert [told for told in book.ranks.news() if told[1] != "submit"] == [(0, "give_back")]
    for id in on_1[3:]:
        book.gives(id, 7, finish=Finish.LENGTH)
    assert book.ranks.news() == []
    on_0 = [id for id, live in book.ledger.live.items() if live.device == 0]
    book.gives(on_0[5], 8, 9)
    book.ledger.given_back(book.ranks, 0, {on_0[5]: None})
    # From what it has on; of the other three places one is asked for as well, since one waits.
    assert book.ranks.news() == [(1, "submit", on_0[5]), (0, "give_back")]
    assert book.ledger.live[on_0[5]].output == [8, 9]
    # By now it runs.
    book.ledger.given_back(book.ranks, 0, {})
    assert book.ranks.news() == []
    book.gives(on_0[0], 7)
    book.gives(on_0[0], 7, finish=Finish.LENGTH)
    assert book.ranks.news() == []
    assert with_devices(book) == {0: 4, 1: 1}
    assert (book.ledger.num_running, book.ledger.num_waiting) == (5, 0)


def test_a_device_that_comes_is_given_what_waits_in_another():
    book = Book(0, max_seqs=4)
    fill(book, a=4, b=2)
    book.ledger.is_paused = True
    new = Ranks(0, 1)
    book.ledger.move(book.ranks, new, dict.fromkeys(book.ledger.live, 0))
    book.ledger.resume(new)
    assert new.news() == [(0, "go"), (1, "go"), (0, "give_back")]
    # The ranks are changed once more before they answer: those that come then are asked anew.
    book.ledger.resume(new)
    assert new.news() == [(0, "go"), (1, "go"), (0, "give_back")]
    # What the one before says now is of nobody here.
    book.ledger.given_back(book.ranks, 0, {"a0": None})
    book.ledger.given_back(new, 1, {"a0": None})
    book.ledger.given_back(new, 0, dict.fromkeys(("a2", "gone", "a3")))
    assert new.news() == [(1, "submit", "a2"), (1, "submit", "a3")]


def test_ranks_are_asked_for_no_more_than_there_are_places():
    book = Book(0, 1, max_seqs=2)
    fill(book, a=4, b=2)
    assert with_devices(book) == {0: 3, 1: 3}
    book.ledger.is_paused = True
    new = Ranks(0, 1, 2)
    book.ledger.move(book.ranks, new, {live.request.id: live.device for live in book.ledger.live.values()})
    put(book, "c0", "c")
    book.ledger.resume(new)
    assert new.news() == [(0, "go"), (1, "go"), (2, "go"), (2, "submit", "c0"), (0, "give_back")]


def test_a_reader_that_is_back_finds_the_place_of_another_device():
    book = Book(0, 1)
    fill(book, a=2)
    book.ledger.pause_request("a0")
    put(book, "a2", "a")
    book.gives("a1", 7, finish=Finish.LENGTH)
    assert book.ranks.news() == [(0, "pause_request", "a0"), (0, "submit", "a2")]
    book.ledger.resume_request("a0")
    assert book.ranks.news() == [(0, "resume_request", "a0"), (0, "give_back")]
    # Paused once more before its rank has let go of it: it begins there when it is resumed.
    book.ledger.pause_request("a0")
    book.ledger.given_back(book.ranks, 0, {"a0": None})
    assert book.ranks.news() == [(0, "pause_request", "a0")]
    book.ledger.resume_request("a0")
    assert book.ranks.news() == [(1, "submit", "a0")]


def test_what_is_given_back_is_charged_once():
    book, paid, queue = Book(0, 1, max_seqs=2), Counter(), None
    queue = book.ledger._queue
    charge, refund = queue._charge, queue.refund

    def charges(level, flow, live):
        paid[live.request.id] += live.cost
        charge(level, flow, live)

    def refunds(live, tokens):
        paid[live.request.id] -= tokens if live.rank[2] in queue._charged else 0
        refund(live, tokens)

    queue._charge, queue.refund = charges, refunds
    fill(book, a=5, b=2, c=3)
    all_of = dict(book.ledger.live)
    # One that was with a rank that died goes before all others and is not charged again.
    again = [live for live in all_of.values() if live.device == 0][-1]
    again.reruns = 1
    for _ in range(3):
        for device in (0, 1):
            ids = [id for id, live in book.ledger.live.items() if live.device == device]
            book.gives(ids[-1], 7)
            book.ledger.given_back(book.ranks, device, dict.fromkeys(ids[-2:]))
    while book.ledger.live:
        live = next(live for live in book.ledger.live.values() if live.instance is not None)
        book.gives(live.request.id, 7, 8, finish=Finish.STOP)
    assert paid == {id: len(live.request.prompt) + len(live.output) for id, live in all_of.items()}
    assert queue._charged == {}


def kept(book):
    """Charges of requests that have not ended, by id."""
    return {live.request.id for live in book.ledger.live.values() if live.rank[2] in book.ledger._queue._charged}


def test_one_that_is_withdrawn_or_ends_with_an_error_gets_back_what_it_paid():
    book = Book(0, max_seqs=2)
    fill(book, a=2)
    assert kept(book) == {"a0", "a1"}
    book.ledger.pause_request("a0")
    book.ledger.withdraw_paused(book.ranks)
    assert kept(book) == {"a1"}
    outlive(book, "a1")
    assert book.given[-1].finish is Finish.ERROR
    assert book.ledger._queue._charged == {}


def test_a_key_gets_a_place_where_it_has_fewest_before_where_there_are_fewest():
    book = Book(0, 1, max_seqs=4)
    fill(book, a=8)
    fill(book, b=1)
    (has_b,) = [live.device for live in book.ledger.live.values() if live.key == "b"]
    # Of a one more is resumed where b has none, so that there are more.
    other = 1 - has_b
    slow = [id for id, live in book.ledger.live.items() if live.device == other][:2]
    for id in slow:
        book.ledger.pause_request(id)
    for id in ("a8", "a9"):
        put(book, id, "a")
    for id in slow:
        book.ledger.resume_request(id)
    assert with_devices(book) == {has_b: 5, other: 6}
    put(book, "b1", "b")
    assert book.ledger.live["b1"].device == other


# -- paths that depth routers choose


def routed(book, *ids, **fields):
    sampling = Sampling(max_tokens=9)
    for id in ids:
        request = Request(id=id, prompt=(1, 2, 3), sampling=sampling, **fields)
        book.ledger.submit(request, book.given.append)


def asks(book, id):
    request = book.ledger.live[id].request
    return request.path, request.routes_depth, request.depth_control


@pytest.mark.parametrize("path", [(0, 2, 2), ()])
@pytest.mark.parametrize("news", [{"tokens": (7,)}, {"prompt_logprobs": ("score",)}], ids=["token", "score"])
def test_a_path_that_was_told_stays_wherever_the_request_goes_on(path, news):
    book = Book(0, max_seqs=3)
    routed(book, "told", "chooses", routes_depth=True, depth_control=0.2)
    assert asks(book, "told") == asks(book, "chooses") == (None, True, 0.2)
    live = book.ledger.live["told"]
    book.ledger.take(live.instance, live.device, [Output(id="told", path=path, **news)])
    assert [output.path for output in book.given] == [path]
    book.gives("told", 8)
    assert asks(book, "told") == (path, False, None)
    assert asks(book, "chooses") == (None, True, 0.2)
    # Its rank dies: another begins it again, and one that leaves hands it on as it stands here, whatever it knows itself.
    old, new = book.ranks, Ranks(0, 1)
    parcels = [Carried(Request(id=id, prompt=(1, 2, 3), routes_depth=True)) for id in ("told", "gone")]
    spread = [parcel for each in book.ledger.spread(parcels, (0, 1)).values() for parcel in each]
    assert {parcel.request.id: parcel.request.path for parcel in spread} == {"told": path, "gone": None}
    book.ledger.send_back(old)
    given = []
    new.tell = lambda device, name, **arguments: given.append(arguments.get("request"))
    book.ledger.resume(new)
    found = {request.id: (request.path, request.routes_depth) for request in given if request is not None}
    assert found == {"told": (path, False), "chooses": (None, True)}


def test_what_a_pruned_request_tells_is_no_path_that_was_chosen():
    book = Book(0)
    routed(book, "pruned", skips_tokens=True)
    live = book.ledger.live["pruned"]
    book.ledger.take(live.instance, live.device, [Output(id="pruned", tokens=(7,), path=(0, 1), computed=(3, 2))])
    assert asks(book, "pruned") == (None, False, None)
    assert live.request.skips_tokens
