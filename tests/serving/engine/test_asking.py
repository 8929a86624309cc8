"""Pools whose queries go to endpoints or through the model: what they say, and what becomes of requests when those fail or are late."""

import json
import logging
import shutil
import threading
import time
from concurrent.futures import Executor
from contextlib import contextmanager

import pytest
import torch

from anabranch.adapters.glider import GliderPool, HiddenStates, PoolSettings
from anabranch.adapters.glider.settings import KEYS
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError, DataError
from anabranch.routing import record_routing
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.client import BusyError
from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.engine.adapter_place import folder_of
from anabranch.serving.engine.asking import MOST_CALLS, Asking, Either, Threads
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.layer_reader import pool_of, settings_of
from anabranch.serving.engine.turnstile import Turnstile
from scripted_endpoint import chat, endpoint, vectors
from served_adapters import INSTRUCTIONS, Runs, make_model, make_pool
from waiting import until

WORDS = ("SQL", "law", "news")
PROMPT = tuple(range(60, 90))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("made") / "pool")


@pytest.fixture
def pool(made, tmp_path):
    shutil.copytree(made, tmp_path / "pool")
    return tmp_path / "pool"


def says(pool, **settings):
    (pool / "pool.json").write_text(json.dumps(settings))


def embeds(path, body):
    """A vector for each text, by the words in it."""
    if path.endswith("completions"):
        return (
            200,
            chat("It is of " + next((word for word in WORDS if word in body["messages"][1]["content"]), "?")),
            {},
        )
    return 200, vectors(*[[float(word in text) + 0.01 for word in WORDS] for text in body["input"]]), {}


def asking(pool, **options):
    found = folder_of(str(pool), None)
    return Asking(pool_of(found), settings_of(found), "mine", **options)


def engine_of(**pools):
    load = tuple(f"{name}={folder}" for name, folder in pools.items())
    config = ServingConfig(num_blocks=128, dtype="float32", max_seqs=4, adapters=AdaptersConfig(load=load))
    return Runs(Engine.of(make_model(), config, tokenizer=ByteTokenizer()))


def run(runs, *names, **fields):
    """Tokens of a request for each name."""
    ids = [runs.put(name, PROMPT, **fields) for name in names]
    found = runs.outputs()
    return [found[id].tokens for id in ids]


# Endpoints that answer


def test_a_pool_is_compared_by_the_endpoints_of_its_file(pool):
    with endpoint(embeds) as (url, seen):
        says(pool, embedder={"url": url, "model": "e"}, writer={"url": url, "model": "w"}, weight=5.0)
        one = asking(pool)
        # Of all experts and wordings at once.
        assert [body["input"] for _, body, _ in seen] == [[INSTRUCTIONS[name] for name in ("law", "sql", "sum")]]
        terms = one.terms("Some law, please.")
        assert [path for path, _, _ in seen[1:]] == ["/v1/chat/completions", "/v1/embeddings"]
        assert seen[2][1]["input"] == ["It is of law"]
        assert (terms.a, max(range(3), key=terms.cosines.__getitem__)) == (5.0, 0)
        # An instruction of the caller's is compared as it is, and what was asked before is known.
        assert one.terms("Some law, please.", "a matter of SQL").cosines[1] == max(
            one.terms(None, "a matter of SQL").cosines
        )
        one.terms("Some law, please.")
        assert len(seen) == 4
        assert one.terms(None) is None
    kinds = [pool_of(folder_of(f"arrow:{pool}", None)), pool_of(folder_of(str(pool), None), is_looked_at=True)]
    assert [type(kind.matcher.embedder).__name__ for kind in kinds] == ["TextFeatures"] * 2


def test_threads_that_ask_the_same_ask_once(pool):
    gate = threading.Event()

    def slow(path, body):
        if len(body["input"]) == 1:
            gate.wait(60)
        return embeds(path, body)

    with endpoint(slow) as (url, seen):
        says(pool, embedder={"url": url, "model": "e"}, weight=5.0)
        one, found = asking(pool), []
        threads = [threading.Thread(target=lambda: found.append(one.terms("law"))) for _ in range(6)]
        for thread in threads:
            thread.start()
        while len(seen) < 2:
            time.sleep(0.01)
        gate.set()
        for thread in threads:
            thread.join(60)
        assert len(set(found)) == 1
        assert found[0].a == 5.0
        assert len(seen) == 2


# Endpoints that do not


FAULTS = {
    "has no room": lambda path, body: (503, {"error": {"message": "no room, key sk-secret"}}, {}),
    "another dimension": lambda path, body: (200, vectors([1.0, 0.0, 0.0, 0.0]), {}),
    "knows no such key": lambda path, body: (401, {"error": {"message": "who are you, sk-secret?"}}, {}),
}
# What a query may be the reason of.
REFUSALS = {
    "too long": lambda path, body: (400, {"error": {"message": "more than 512 tokens"}}, {}),
    "too large": lambda path, body: (413, {"error": {"message": "too large"}}, {}),
    "filtered": lambda path, body: (422, {"error": {"message": "content"}}, {}),
    "broken over": lambda path, body: (500, {"error": {"message": "IndexError"}}, {}),
    "no numbers": lambda path, body: (200, vectors(["x"]), {}),
    "not finite": lambda path, body: (200, vectors([1e39, 0.0, 0.0]), {}),
    "endless": lambda path, body: (200, chat("x" * 2001), {}) if path.endswith("completions") else embeds(path, body),
    "wordless": lambda path, body: (200, chat("  "), {}) if path.endswith("completions") else embeds(path, body),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_query_whose_endpoint_fails_goes_by_tokens_and_that_is_told_once(pool, fault, caplog, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    monkeypatch.setenv(KEYS, "MY_KEY")
    answers = [embeds]
    with endpoint(lambda path, body: answers[0](path, body)) as (url, seen):
        says(pool, embedder={"url": url, "model": "e", "key_env": "MY_KEY"}, weight=5.0)
        one = asking(pool, rest_s=0.0)
        assert seen[0][2]["Authorization"] == "Bearer sk-secret"
        answers[0] = FAULTS[fault]
        with caplog.at_level(logging.INFO):
            assert [one.terms(f"law {number}").bias for number in range(3)] == [None] * 3
        [told] = [record.getMessage() for record in caplog.records]
        assert "until that is over its requests go by their tokens alone" in told
        assert "sk-secret" not in told
        assert "\n" not in told
        # It is over; and what comes anew is told anew.
        answers[0] = embeds
        assert one.terms("law").bias is not None
        answers[0] = FAULTS[fault]
        one.terms("other law")
        assert len(caplog.records) == 2
    assert "sk-secret" not in (pool / "pool.json").read_text()


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_query_that_an_endpoint_refuses_takes_nothing_from_others(pool, refusal, caplog):
    def answer(path, body):
        hostile = "x" * 50 in (body["messages"][1]["content"] if "messages" in body else "".join(body["input"]))
        return REFUSALS[refusal](path, body) if hostile else embeds(path, body)

    with endpoint(answer) as (url, _):
        says(pool, embedder={"url": url, "model": "e"}, writer={"url": url, "model": "w"}, weight=5.0)
        one = asking(pool, rest_s=3600.0)
        with caplog.at_level(logging.INFO):
            for number in range(5):
                assert one.terms("x" * 50 + str(number)).bias is None
                assert one.terms(f"Some law, {number}").a == 5.0
        [told] = [record.getMessage() for record in caplog.records]
        assert "a request goes by its tokens alone" in told


def test_an_endpoint_that_failed_is_left_alone_for_a_while(pool):
    answers = [embeds]
    with endpoint(lambda path, body: answers[0](path, body)) as (url, seen):
        says(pool, embedder={"url": url, "model": "e"}, weight=5.0)
        one = asking(pool, rest_s=3600.0)
        assert one.terms("law").bias is not None
        answers[0] = FAULTS["has no room"]
        one.terms("law 1")
        calls = len(seen)
        assert one.terms("law 2").bias is None
        assert len(seen) == calls
        # What is known needs nobody.
        assert one.terms("law").bias is not None


def test_what_comes_late_is_for_the_next_request(pool):
    gate = threading.Event()

    def slow(path, body):
        if len(body["input"]) == 1:
            gate.wait(60)
        return embeds(path, body)

    with endpoint(slow) as (url, _):
        says(pool, embedder={"url": url, "model": "e"}, weight=5.0, wait_s=0.02)
        one = asking(pool)
        first = one.terms("law")
        assert (first.a, first.bias) == (0.0, None)
        gate.set()
        until(lambda: one.pool.matcher.knows("law"))
        assert one.terms("law").a == 5.0


def test_nobody_learns_what_another_has_asked(pool):
    """By when, or whether in time, an endpoint's answer is there; requests of another salt share no prefixes either."""
    gate = threading.Event()

    def slow(path, body):
        if len(body["input"]) == 1:
            gate.wait(60)
        return embeds(path, body)

    with endpoint(slow) as (url, seen):
        says(pool, embedder={"url": url, "model": "e"}, weight=5.0, wait_s=0.05)
        one = asking(pool)
        for said in ({"query": "the patient has law"}, {"query": None, "instruction": "the patient has law"}):
            gate.clear()
            assert one.terms(**said, asker="alice").a == 0.0
            gate.set()
            until(lambda said=said: one.pool.matcher.knows(said["query"] or "", said.get("instruction"), asker="alice"))
            gate.clear()
            assert one.terms(**said, asker="alice").a == 5.0
            calls = len(seen)
            assert one.terms(**said, asker="mallory") == one.terms(f"nobody asked {len(seen)}", asker="mallory")
            assert len(seen) > calls
            gate.set()
        runs = engine_of(pool=pool)
        asked = [(salt, runs.put("pool", PROMPT, query="some news", cache_salt=salt)) for salt in ("a", "b")]
        runs.outputs()
        assert len(asked) == sum("some news" in body["input"] for _, body, _ in seen)


@contextmanager
def slow_endpoint():
    """(its address, what it was sent, the gate before which queries wait); what experts say is answered at once."""
    gate = threading.Event()

    def slow(path, body):
        if len(body["input"]) == 1:
            gate.wait(60)
        return embeds(path, body)

    with endpoint(slow) as (url, seen):
        try:
            yield url, seen, gate
        finally:
            gate.set()


def calls_under_way():
    found = [thread for thread in threading.enumerate() if "endpoint of a pool" in thread.name]
    # The end of the process waits for none of them.
    assert all(thread.daemon for thread in found)
    return len(found)


@pytest.mark.parametrize("wait_s", [0, 0.005])
def test_calls_to_a_slow_endpoint_are_few_and_who_comes_beyond_goes_by_its_tokens(pool, wait_s, caplog):
    until(lambda: calls_under_way() == 0)
    with slow_endpoint() as (url, seen, gate):
        says(pool, embedder={"url": url, "model": "e", "timeout_s": 60}, weight=5.0, wait_s=wait_s)
        one = asking(pool, rest_s=0.0)
        for number in range(50):
            assert one.terms(f"law {number}").bias is None
            assert calls_under_way() <= MOST_CALLS
        until(lambda: len(seen) == 1 + MOST_CALLS)
        gate.set()
        until(lambda: calls_under_way() == 0)
        # Those that were asked have come, each for the next request, and there is room again.
        assert all(one.terms(f"law {number}").bias for number in range(MOST_CALLS))
        one.terms("other law")
        until(lambda: one.pool.matcher.knows("other law"))
    assert len(seen) == 2 + MOST_CALLS


def test_who_waits_without_an_end_waits_for_few_calls(pool):
    """Beyond these nobody waits."""
    until(lambda: calls_under_way() == 0)
    with slow_endpoint() as (url, _, gate):
        says(pool, embedder={"url": url, "model": "e", "timeout_s": 60}, weight=5.0)
        one, found = asking(pool), {}
        threads = [
            threading.Thread(target=lambda number=number: found.update({number: one.terms(f"law {number}").a}))
            for number in range(MOST_CALLS + 5)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(found) == 5)
        assert set(found.values()) == {0.0}
        gate.set()
        for thread in threads:
            thread.join(60)
        assert sorted(found.values()) == [0.0] * 5 + [5.0] * MOST_CALLS


def test_an_endpoint_that_is_late_again_and_again_rests_and_that_is_told_once(pool, caplog, monkeypatch):
    monkeypatch.setattr("anabranch.serving.engine.asking.MOST_LATE", 3)
    with slow_endpoint() as (url, seen, gate):
        says(pool, embedder={"url": url, "model": "e", "timeout_s": 60}, weight=5.0, wait_s=0.02)
        one = asking(pool, rest_s=3600.0)
        for number in range(5):
            assert one.terms(f"law {number}").bias is None
        [told] = [record.getMessage() for record in caplog.records]
        assert "came later than wait_s (0.02 s) for 3 requests in a row; until that is over" in told
        gate.set()
        until(lambda: all(one.pool.matcher.knows(f"law {number}") for number in range(3)))
        assert len(seen) == 4
        # It rests: what has come is known, and nobody asks for more.
        assert one.terms("law 1").a == 5.0
        assert one.terms("law 4").bias is None
        assert len(seen) == 4


def test_where_nobody_waits_what_fails_anew_is_told_anew(pool, caplog):
    answers = [FAULTS["has no room"]]
    with endpoint(lambda path, body: answers[0](path, body) if len(body["input"]) == 1 else embeds(path, body)) as (
        url,
        _,
    ):
        says(pool, embedder={"url": url, "model": "e"}, weight=5.0, wait_s=0)
        one = asking(pool, rest_s=0.0)
        for number in range(2):
            answers[0] = FAULTS["has no room"]
            one.terms("law")
            until(lambda told=number + 1: len(caplog.records) == told)
            answers[0] = embeds
            one.terms(f"law {number}")
            until(lambda query=f"law {number}": one.pool.matcher.knows(query))
            until(lambda: calls_under_way() == 0)


def test_an_endpoint_that_is_late_now_and_then_is_asked_on(pool, caplog, monkeypatch):
    monkeypatch.setattr("anabranch.serving.engine.asking.MOST_LATE", 2)
    gate = threading.Event()

    def sometimes(path, body):
        if "slowly" in body["input"][0]:
            gate.wait(60)
        return embeds(path, body)

    with endpoint(sometimes) as (url, _):
        # Time enough for one that answers on a busy machine.
        says(pool, embedder={"url": url, "model": "e", "timeout_s": 60}, weight=5.0, wait_s=1.0)
        one = asking(pool, rest_s=3600.0)
        for number in range(2):
            assert one.terms(f"slowly, law {number}").bias is None
            assert one.terms(f"law {number}").a == 5.0
        gate.set()
    assert not caplog.records


def test_a_server_has_few_threads_for_a_slow_endpoint_too(pool):
    """Of its requests as of its calls; those beyond are answered meanwhile."""
    until(lambda: calls_under_way() == 0)
    with slow_endpoint() as (url, _, gate):
        says(pool, embedder={"url": url, "model": "e", "timeout_s": 60}, weight=5.0)
        runs = engine_of(far=pool)
        ids = [runs.put("far", PROMPT, query=f"law {number}") for number in range(MOST_CALLS + 4)]

        def ended():
            runs.loop._turn()
            return {event.id for event in runs.events if getattr(event, "finish", None) is not None}

        until(lambda: len(ended()) == 4)
        assert calls_under_way() <= 2 * MOST_CALLS
        gate.set()
        found = runs.outputs()
    assert {len(found[id].tokens) for id in ids if id in found} == {8}


def test_a_slow_endpoint_holds_up_nobody_else(made, pool):
    gate, asked = threading.Event(), threading.Event()

    def slow(path, body):
        if len(body["input"]) == 1:
            asked.set()
            gate.wait(60)
        return embeds(path, body)

    with endpoint(slow) as (url, _):
        says(pool, embedder={"url": url, "model": "e", "timeout_s": 60}, weight=5.0)
        runs = engine_of(far=pool, near=made)
        waits = runs.put("far", PROMPT, query="law")
        runs.loop._turn()
        assert asked.wait(60)
        others = [runs.put(name, PROMPT, query="law") for name in ("near", ())]

        def ended():
            runs.loop._turn()
            return {event.id for event in runs.events if getattr(event, "finish", None) is not None}

        until(lambda: ended() >= set(others))
        assert ended() == set(others)
        gate.set()
        assert len(runs.outputs()[waits].tokens) == 8


def test_an_engine_answers_by_tokens_while_an_endpoint_is_gone(pool):
    with endpoint(embeds) as (url, _):
        says(pool, embedder={"url": url, "model": "e"}, weight=500.0)
        runs = engine_of(far=pool)
        [by_query] = run(runs, "far", query="law")
    [by_tokens] = run(runs, "far")
    assert run(runs, "far", query="some other law") == [by_tokens]
    assert by_tokens != by_query


def test_the_first_request_waits_for_its_own_query_alone(pool):
    """How far instructions are from each other is found as the pool is read."""
    texts = []

    def noting(path, body):
        texts.extend(body["input"])
        return embeds(path, body)

    with endpoint(noting) as (url, _):
        says(pool, embedder={"url": url, "model": "e"}, weight=5.0)
        runs = engine_of(far=pool)
        assert set(INSTRUCTIONS.values()) < set(texts)
        texts.clear()
        run(runs, "far", query="Which law is it?")
    assert texts == ["Which law is it?"]


def test_nothing_is_kept_of_who_leaves_before_or_behind_the_answer_of_an_endpoint(pool):
    goes_on, asked = threading.Event(), threading.Event()

    def slow(path, body):
        if body["input"] == ["late"]:
            asked.set()
            goes_on.wait(60)
        return embeds(path, body)

    def request(query):
        sampling = Sampling(max_tokens=2)
        return Request(id=query, prompt=PROMPT, sampling=sampling, adapters=(("far", 1.0),), query=query)

    with endpoint(slow) as (url, _):
        says(pool, embedder={"url": url, "model": "e", "timeout_s": 60})
        adapters = engine_of(far=pool).engine.adapters
        early, late = request("early"), request("late")
        adapters.prepare(early).result(60)
        assert list(adapters._terms) == ["early"]
        adapters.release("early")
        assert not adapters._terms
        compared = adapters.prepare(late)
        assert asked.wait(60)
        adapters.release("late")
        goes_on.set()
        compared.result(60)
    assert not adapters._terms


def test_a_pool_that_cannot_be_embedded_is_not_loaded(pool):
    with endpoint(embeds) as (url, _):
        says(pool, embedder={"url": url, "model": "e"})
    with pytest.raises(DataError, match="cannot reach"):
        engine_of(far=pool)


def test_a_failure_is_told_once_though_others_are_known_meanwhile(pool, caplog):
    answers = [embeds]
    with endpoint(lambda path, body: answers[0](path, body)) as (url, _):
        says(pool, embedder={"url": url, "model": "e"}, weight=5.0)
        one = asking(pool, rest_s=0.0)
        assert one.terms("law").bias is not None
        answers[0] = FAULTS["has no room"]
        for number in range(3):
            assert one.terms(f"law {number}").bias is None
            assert one.terms("law").bias is not None
    assert len(caplog.records) == 1


# Without endpoints


def test_what_fails_in_this_process_is_told_once_until_it_is_over(pool, caplog):
    def embed(texts):
        if "odd" in texts[0]:
            raise ValueError("no such thing")
        return [[float(word in text) + 0.01 for word in WORDS] for text in texts]

    settings = PoolSettings(weight=5.0)
    one = Asking(GliderPool.load(pool, settings.choice, embedder=embed), settings, "mine")
    for told in (1, 2):
        for number in range(2):
            assert one.terms(f"odd {told} {number}").bias is None
        assert len(caplog.records) == told
        assert one.terms(f"law {told}").bias is not None
    assert "pool mine: ValueError: no such thing; until that is over" in caplog.records[0].getMessage()


def test_where_no_adapter_has_an_instruction_nobody_compares(pool):
    for card in pool.glob("*/glider.json"):
        card.unlink()
    one = asking(pool)
    assert one.pool.config.instruction
    assert not one.compares
    assert one.terms("law") is None


def test_calls_go_to_the_executor_that_is_meant_as_they_begin():
    class Named(Executor):
        def __init__(self, name):
            self.name = name

        def submit(self, work, /, *args):
            return self.name, work(*args)

    is_first = [True]
    either = Either(lambda: is_first[0], Named("first"), Named("second"))
    assert either.submit(abs, -1) == ("first", 1)
    is_first[0] = False
    assert either.submit(abs, -2) == ("second", 2)


def test_threads_give_what_a_call_gives_and_have_room_again():
    threads = Threads(1)
    for _ in range(3):
        assert threads.submit(abs, -1).result(60) == 1
        with pytest.raises(ZeroDivisionError):
            threads.submit(divmod, 1, 0).result(60)
    gate = threading.Event()
    held = threads.submit(gate.wait, 60)
    with pytest.raises(BusyError):
        threads.submit(abs, -1)
    gate.set()
    assert held.result(60)


# By the model's own states


def test_states_of_the_served_model_are_those_of_the_library(pool):
    says(pool, embedder="hidden-states", weight=20.0)
    runs = engine_of(mine=pool)
    held = runs.engine.adapters.shelf.peek("mine")
    model = make_model()
    theirs = GliderPool.load(
        pool, settings_of(folder_of(str(pool), None)).choice, embedder=HiddenStates(model, ByteTokenizer())
    )
    for query in INSTRUCTIONS.values():
        assert held.terms(query).bias == pytest.approx(theirs.bias([query])[0].tolist(), abs=1e-3)
    # Beside requests under way, and nobody's routing but theirs is recorded.
    told = run(runs, "mine", "mine", query=INSTRUCTIONS["law"])
    assert told[0] == told[1] != run(runs, "mine", query="")[0]
    with pytest.raises(ConfigError, match=r"pool\.json: embedder is 'hidden-states', of the model"):
        pool_of(folder_of(str(pool), None))


def test_texts_that_are_embedded_are_not_recorded():
    model = make_model(is_moe=True)
    with record_routing(model) as recorder, torch.no_grad():
        HiddenStates(model, ByteTokenizer()).embed(["some text"])
        model(torch.tensor([[1, 2, 3]]))
    assert len(recorder.trace().routing(0).index_NK) == 3


def test_a_turnstile_lets_whoever_waits_pass_first():
    turn, order, waits = Turnstile(), [], threading.Event()

    def other():
        waits.set()
        with turn:
            order.append("other")

    thread = threading.Thread(target=other)
    with turn:
        thread.start()
        waits.wait(60)
        time.sleep(0.2)
    with turn:
        order.append("again")
    thread.join(60)
    assert order == ["other", "again"]
