"""Pools whose replies are written down: nobody is asked twice, limits hold side by side, and files are gone on with."""

import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import BackendError, DataError, LimitError
from anabranch.routers.router_r1.environment import MultiRoundRouteEnv, Price, Reply
from anabranch.routers.router_r1.kept_pool import KeptPool, read_lines, read_table
from kept_pools import Live, failing, rows


def test_nobody_is_asked_twice_by_this_run_or_the_next(tmp_path):
    path, live = tmp_path / "kept.jsonl", Live()
    pool = KeptPool(live, path)
    first = pool.reply("large", "Who?")
    assert pool.reply("large", "  who? ") == first == Reply("large says", 10, 5)
    assert live.asked == [("large", "Who?")]
    # 10 prompt tokens at 1 and 5 of the answer at 2, per million.
    assert (pool.calls, pool.usd) == (1, pytest.approx(20e-6))
    again = KeptPool(other := Live(), path)
    assert again.reply("large", "who?") == first
    assert (again.calls, again.usd, other.asked) == (1, pytest.approx(20e-6), [])
    assert read_table(path) == {("large", "Who?"): first}


def test_a_line_that_was_not_finished_is_dropped(tmp_path):
    path = tmp_path / "kept.jsonl"
    KeptPool(Live(), path).reply("small", "a")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"model": "small", "que')
    pool = KeptPool(Live(), path)
    assert path.read_bytes() == whole
    pool.reply("small", "b")
    assert [row["query"] for row in rows(path)] == ["a", "b"]
    path.write_text("nonsense\n")
    with pytest.raises(DataError, match=r"line 1 of .* is no JSON"):
        KeptPool(Live(), path)


def test_a_call_that_failed_counts_and_is_made_again(tmp_path):
    def fails(model, query):
        raise BackendError("busy")

    path = tmp_path / "kept.jsonl"
    with pytest.raises(BackendError, match="busy"):
        KeptPool(Live(fails), path).reply("small", "a")
    assert rows(path) == [{"model": "small", "query": "a", "error": "busy", "usd": 0.0}]
    pool = KeptPool(live := Live(), path)
    assert pool.calls == 1
    assert pool.reply("small", "a").text == "small says"
    assert (pool.calls, len(live.asked)) == (2, 1)
    assert list(read_table(path)) == [("small", "a")]


def test_who_asks_the_same_at_once_waits_for_the_one_call():
    ready = threading.Event()

    def slow(model, query):
        ready.wait(60)
        return Reply("x")

    pool, found = KeptPool(live := Live(slow)), []
    threads = [threading.Thread(target=lambda: found.append(pool.reply("small", "a"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    ready.set()
    for thread in threads:
        thread.join()
    assert found == [Reply("x")] * 6
    assert len(live.asked) == 1


@given(limit=st.floats(0, 10), calls=st.integers(0, 8), costs=st.lists(st.floats(0, 3), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_limits_are_never_passed(limit, calls, costs):
    left = iter(costs)
    live = Live(lambda *_: Reply("x", 0, int(next(left) * 1e6)), most=3.0, small=Price(1.0))
    pool = KeptPool(live, max_usd=limit, max_calls=calls)
    for number in range(len(costs)):
        try:
            pool.reply("small", f"question {number}")
        except LimitError:
            break
    assert pool.usd <= limit
    assert pool.calls == len(live.asked) <= calls


def test_limits_hold_for_calls_side_by_side():
    live = Live(lambda *_: (time.sleep(0.02), Reply("x", 0, 1_000_000))[1], most=1.0, small=Price(1.0))
    pool, refused = KeptPool(live, max_usd=3.0), []

    def ask(number):
        try:
            pool.reply("small", f"{number}")
        except LimitError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pool.usd == 3.0
    assert len(refused) == 7
    assert "would pass max_usd (3)" in refused[0]


def test_too_many_failures_in_a_row_end_it():
    works = iter([False, True, False, False])

    def sometimes(model, query):
        if not next(works):
            raise BackendError("busy")
        return Reply("x")

    pool = KeptPool(Live(sometimes), max_failures=2)
    with pytest.raises(BackendError):
        pool.reply("small", "a")
    pool.reply("small", "b")
    with pytest.raises(BackendError):
        pool.reply("small", "c")
    with pytest.raises(LimitError, match="failed 2 times in a row"):
        pool.reply("small", "d")


def test_an_environment_ends_where_nobody_may_be_asked():
    env = MultiRoundRouteEnv(KeptPool(Live(), max_calls=0))
    env.reset(["Who?"])
    with pytest.raises(LimitError):
        env.step(["<think>a</think><search>small: who?</search>"])


def test_what_is_known_from_elsewhere_is_nobodys_call(tmp_path):
    """As it was asked, and by its words in any case; it is neither written down nor counted."""
    path = tmp_path / "kept.jsonl"
    pool = KeptPool(live := Live(), path, known={("small", "Who  wrote it?"): Reply("Ann", 3, 1)})
    for asked in ("Who  wrote it?", "who wrote it?", " WHO WROTE\tIT? "):
        assert pool.reply("small", asked) == Reply("Ann", 3, 1)
    assert (live.asked, pool.calls, pool.usd, path.exists()) == ([], 0, 0.0, False)
    # Of another model it is not known.
    assert pool.reply("large", "Who wrote it?").text == "large says"


def test_a_pool_of_nobody_knows_what_was_recorded_alone():
    pool = KeptPool(None, known={("gone", "a"): Reply("x")}, prices={"gone": Price(3.0)})
    assert pool.reply("gone", "A") == Reply("x")
    assert pool.prices == {"gone": Price(3.0)}
    with pytest.raises(DataError, match="gone was not recorded with this question"):
        pool.reply("gone", "b")
    pool.close()


def test_prices_of_who_is_there_come_before_those_that_were_given():
    pool = KeptPool(Live(small=Price(1.0)), prices={"small": Price(9.0), "gone": Price(3.0)})
    assert pool.prices == {"small": Price(1.0), "gone": Price(3.0)}
    with pytest.raises(DataError, match="gone was not recorded"):
        pool.reply("gone", "a")


def test_a_folder_that_is_not_there_is_made(tmp_path):
    KeptPool(Live(), tmp_path / "a/b/kept.jsonl").reply("small", "a")
    assert len(rows(tmp_path / "a/b/kept.jsonl")) == 1


def test_an_answer_without_counts_costs_what_it_may_have(tmp_path):
    path = tmp_path / "kept.jsonl"
    pool = KeptPool(Live(lambda *_: Reply("x y", 1, 2, is_counted=False), most=0.25), path)
    pool.reply("small", "a")
    assert rows(path) == [{"model": "small", "query": "a", "text": "x y", "usd": 0.25}]
    assert pool.usd == 0.25
    # Its words are what the table has.
    assert read_table(path) == {("small", "a"): Reply("x y", 1, 2)}


def test_lines_of_a_file_keep_their_numbers(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('\n{"a": 1}\n  \n{"b": 2}')
    assert list(read_lines(path)) == [(2, {"a": 1}), (4, {"b": 2})]
    assert list(read_lines(tmp_path / "t.jsonl")) == list(read_lines(str(path)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2 of .* is no JSON"),
        ("[1]", "line 2 of .* is a list; it must be an object"),
        ('{"model": "m", "query": "q"}', "line 2 of .* has no text that is a text"),
        ('{"model": 1, "query": "q", "text": "x"}', "line 2 of .* has no model that is a text"),
        (
            '{"model": "m", "query": "q", "text": "x", "prompt_tokens": -1}',
            "line 2 of .* has prompt_tokens -1; it must be a whole number",
        ),
        (
            '{"model": "m", "query": "q", "text": "x", "completion_tokens": true}',
            "line 2 of .* has completion_tokens True",
        ),
        ('{"model": "m", "query": "q", "text": "x", "completion_tokens": 1.0}', "completion_tokens 1.0"),
    ],
)
def test_a_damaged_line_is_told_by_its_number_whoever_reads_it(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text('{"model": "m", "query": "a b", "text": "x y z"}\n' + line + "\n")
    for read in (read_table, lambda path: KeptPool(None, path)):
        with pytest.raises(DataError, match=message):
            read(path)


def test_a_table_counts_words_where_it_is_not_told(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"model": "m", "query": "a b", "text": "x y z"}\n{"model": "m", "query": "c", "error": "busy"}\n'
        '{"model": "m", "query": "a b", "text": "later", "prompt_tokens": 9, "completion_tokens": 4}\n'
    )
    # What failed is left out, and the last line of a question counts.
    assert read_table(path) == {("m", "a b"): Reply("later", 9, 4)}
    with pytest.raises(DataError, match="cannot read"):
        read_table(tmp_path / "nothing.jsonl")
    path.write_bytes(b"\xff\n")
    with pytest.raises(DataError, match="cannot read"):
        read_table(path)


@pytest.mark.parametrize(("failures", "answered"), [(0, True), (1, True), (2, True), (3, False)])
def test_a_call_that_failed_by_what_may_be_over_is_made_again(tmp_path, failures, answered):
    """One answer of 429 taught a router that a model is useless."""
    live, path = failing(*[True] * failures), tmp_path / "kept.jsonl"
    pool = KeptPool(live, path, retries=2, wait_s=0.0)
    if answered:
        assert pool.reply("small", "a").text == "x"
    else:
        with pytest.raises(BackendError, match="busy"):
            pool.reply("small", "a")
    # Each try is a call, and a line.
    assert pool.calls == len(live.asked) == len(rows(path)) == min(failures, 2) + 1
    assert sum("error" in row for row in rows(path)) == failures


def test_a_call_that_fails_for_good_is_not_made_again():
    live = failing(True, transient=False)
    with pytest.raises(BackendError, match="busy"):
        KeptPool(live, retries=2, wait_s=0.0).reply("small", "a")
    assert len(live.asked) == 1


def test_tries_keep_to_limits_and_count_as_one_failure():
    pool = KeptPool(failing(True, True), max_calls=2, retries=2, wait_s=0.0)
    with pytest.raises(LimitError, match="max_calls"):
        pool.reply("small", "a")
    pool = KeptPool(failing(*[True] * 9), retries=2, wait_s=0.0, max_failures=2)
    with pytest.raises(BackendError, match="busy"):
        pool.reply("small", "a")
    with pytest.raises(LimitError, match="failed 2 times in a row"):
        pool.reply("small", "b")
    assert pool.calls == 6


@pytest.mark.parametrize("later", [0.01, 1.0, 100.0])
def test_what_was_spent_does_not_change_with_prices(tmp_path, later):
    """Lines were counted anew at today's prices: after a fall as much could be spent again."""
    path = tmp_path / "kept.jsonl"
    pool = KeptPool(Live(small=Price(1.0)), path)
    pool.reply("small", "a")
    assert rows(path)[0]["usd"] == pool.usd == pytest.approx(5e-6)
    assert KeptPool(Live(small=Price(later)), path).usd == pool.usd
    # A line of before tells none.
    path.write_text(json.dumps({name: value for name, value in rows(path)[0].items() if name != "usd"}) + "\n")
    assert KeptPool(Live(small=Price(later)), path).usd == pytest.approx(later * 5e-6)
