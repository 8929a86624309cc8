"""The HTTP server: what it answers, what it refuses and how, and that files are swapped and processes stopped without a failed request."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from anabranch.errors import DataError, InputError
from anabranch.graph import HNSW, Graph, PageRank, PowerWalk
from anabranch.graph.disk import build
from anabranch.graph.names import Names, names_path, read_names, write_names
from anabranch.graph.serve import Limits, Sources, create_app
from anabranch.graph.serve.openapi import describe
from anabranch.graph.serve.sources import Loaded
from waiting import until

DIM, COUNT = 4, 40
LIMITS = Limits(body_bytes=4096, batch=4, k=8, ef=100, seeds=3, concurrency=2, waiting=2, timeout_s=5.0)


def vectors_of(seed):
    return np.random.default_rng(seed).normal(size=(COUNT, DIM)).astype(np.float32)


def save_index(path, seed, metric="l2"):
    index = HNSW(DIM, metric, M=8, ef_construction=40)
    index.add(vectors_of(seed), workers=1)
    beside = path.with_name(f"new-{path.name}")
    index.save(beside)
    beside.rename(path)
    return index


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An index with names, one without, and a graph: a ring of 12 nodes with a shortcut."""
    folder = tmp_path_factory.mktemp("serve")
    save_index(folder / "index.anb", 0)
    write_names(folder / "index.anb", Names([f"n{number}" for number in range(COUNT)]))
    save_index(folder / "plain.anb", 0, "cosine")
    graph = Graph.from_edges([*range(12), 0], [*range(1, 12), 0, 6], names=[f"v{number}" for number in range(12)])
    graph.save(folder / "graph.anb")
    PowerWalk(walks=50, seed=1).build(graph).save(folder / "walks.anb")
    return folder


@pytest.fixture(scope="module")
def client(folder):
    app = create_app(Sources([folder / "index.anb", folder / "graph.anb"]), LIMITS, token="secret")
    with TestClient(app) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        yield client


def results(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


# What is answered


def test_search_by_vectors_is_that_of_the_index(client, folder):
    index, queries = HNSW.load(folder / "index.anb"), vectors_of(5)[:3]
    ids, distances = index.search(queries, 5, 50)
    found = results(client.post("/v1/search", json={"vectors": queries.tolist(), "k": 5, "ef": 50}))
    assert [row["ids"] for row in found] == ids.tolist()
    np.testing.assert_array_equal([row["distances"] for row in found], distances)
    assert found[0]["names"] == [f"n{id}" for id in found[0]["ids"]]


def test_elements_are_not_their_own_neighbours(client, folder):
    index = HNSW.load(folder / "index.anb")
    ids, _ = index.search(index.vectors([3, 7]), 4)
    expected = [[id for id in row if id != own][:3] for row, own in zip(ids.tolist(), (3, 7), strict=True)]
    by_id = results(client.post("/v1/search", json={"ids": [3, 7], "k": 3}))
    assert [row["ids"] for row in by_id] == expected
    assert results(client.post("/v1/search", json={"names": ["n3", "n7"], "k": 3})) == by_id


def test_filters(client):
    only = results(client.post("/v1/search", json={"ids": [3], "k": 8, "filter": {"ids": [1, 2, 3, 999]}}))[0]
    assert sorted(only["ids"]) == [1, 2]  # less than k, itself left out, what is not there matches nothing
    assert len(only["distances"]) == len(only["names"]) == 2
    named = results(client.post("/v1/search", json={"ids": [3], "k": 8, "filter": {"names": ["n1", "n2"]}}))[0]
    assert named == only
    everything = results(client.post("/v1/search", json={"ids": [3], "k": 8, "ef": 40}))[0]["ids"]
    body = {"ids": [3], "k": 8, "ef": 40, "filter": {"ids": everything[:2], "exclude": True}}
    assert results(client.post("/v1/search", json=body))[0]["ids"][:6] == everything[2:]
    assert results(client.post("/v1/search", json={"ids": [3], "filter": {"ids": []}}))[0]["ids"] == []


def test_pagerank_is_that_of_the_library(client, folder):
    graph = Graph.load(folder / "graph.anb")
    ids, scores = PageRank().personalized(graph, {1: 1.0, 2: 3.0}, 4)
    found = results(client.post("/v1/ppr", json={"seeds": [1, 2], "weights": [1, 3], "k": 4}))[0]
    assert found["ids"] == ids.tolist()
    np.testing.assert_allclose(found["scores"], scores, atol=1e-6)
    assert found["names"] == [f"v{id}" for id in ids]
    assert results(client.post("/v1/ppr", json={"names": ["v1", "v2"], "weights": [1, 3], "k": 4})) == [found]


def test_pagerank_of_many_seed_sets_is_that_of_each(client):
    one = results(client.post("/v1/ppr", json={"seeds": 4, "k": 3}))
    two = results(client.post("/v1/ppr", json={"names": "v7", "k": 3}))
    both = results(client.post("/v1/ppr", json={"queries": [{"seeds": 4}, {"names": ["v7"]}], "k": 3}))
    assert both == one + two


def test_an_index_of_walks_answers_for_its_graph(folder):
    graph = Graph.load(folder / "graph.anb")
    loaded = Sources([folder / "walks.anb", folder / "graph.anb"]).load()
    assert loaded.scores.about["engine"] == "powerwalk"
    assert loaded.vectors is None
    ids, scores = PowerWalk.load(folder / "walks.anb", graph).query(3, 4)
    found = loaded.scores.top(np.array([3]), np.ones(1), 4)
    np.testing.assert_array_equal(found[0], ids)
    np.testing.assert_array_equal(found[1], scores)
    with pytest.raises(InputError, match="name its graph too"):
        Sources([folder / "walks.anb"]).load()


def test_mapped_files_answer_the_same(folder):
    query, seed = vectors_of(5)[:2], (np.array([0]), np.ones(1), 3)
    files = [folder / "index.anb", folder / "graph.anb"]
    held, mapped = (Sources(files, mmap=mmap).load() for mmap in (False, True))
    np.testing.assert_array_equal(mapped.vectors.index.search(query, 3), held.vectors.index.search(query, 3))
    np.testing.assert_array_equal(mapped.scores.top(*seed), held.scores.top(*seed))


# What is refused


NAMED = "n0"
BAD = [
    ("search", b"", 400, "invalid_json", "not JSON"),
    ("search", b"{", 400, "invalid_json", "line 1, column 2"),
    ("search", b"\xff\xfe{}", 400, "invalid_json", "not UTF-8"),
    ("search", b"[" * 3000, 400, "invalid_json", "nested too deeply"),
    ("search", b'{"k": NaN}', 400, "invalid_json", "NaN is no number of JSON"),
    ("search", b'{"vectors": [[1, 2, 3, Infinity]]}', 400, "invalid_json", "Infinity"),
    ("search", b'{"k": ' + b"9" * 3900 + b"}", 400, "invalid_request", "give one of vectors, ids and names"),
    ("search", [], 400, "invalid_request", "a list; it must be a JSON object"),
    ("search", "x", 400, "invalid_request", "it must be a JSON object"),
    ("search", {}, 400, "invalid_request", "none is given"),
    ("search", {"ids": [1], "names": [NAMED]}, 400, "invalid_request", "ids and names are given"),
    ("search", {"ids": [1], "kk": 3}, 400, "invalid_request", "no field 'kk'"),
    ("search", {"vectors": []}, 400, "invalid_request", "vectors is empty"),
    ("search", {"vectors": 3}, 400, "invalid_request", "vectors is the number 3; it must be a list"),
    ("search", {"vectors": [1, 2, 3, 4]}, 400, "invalid_request", "vectors[0] is the number 1"),
    ("search", {"vectors": [[]]}, 400, "invalid_request", "vectors have 0 numbers each, those of the index 4"),
    ("search", {"vectors": [[1, 2]]}, 400, "invalid_request", "vectors have 2 numbers each, those of the index 4"),
    ("search", {"vectors": [[1, 2, 3, 4], [1, 2]]}, 400, "invalid_request", "vectors[1] has 2 numbers"),
    ("search", {"vectors": [[1, 2, 3, "4"]]}, 400, "invalid_request", "vectors[0][3] is the text '4'"),
    ("search", {"vectors": [[1, 2, 3, True]]}, 400, "invalid_request", "vectors[0][3] is true"),
    ("search", {"vectors": [[1, 2, 3, None]]}, 400, "invalid_request", "vectors[0][3] is null"),
    ("search", {"vectors": [[1, 2, 3, [4]]]}, 400, "invalid_request", "vectors[0][3] is a list"),
    ("search", {"vectors": [[1, 2, 3, 1e39]]}, 400, "invalid_request", "vectors[0][3] does not fit into a float32"),
    ("search", {"vectors": [[1, 2, 3, 4], [1e20, 0, 0, 0]]}, 400, "invalid_request", "vectors[1] is longer than 1e+18"),
    ("search", b'{"vectors": [[1, 2, 3, 1' + b"0" * 400 + b"]]}", 400, "invalid_request", "does not fit"),
    ("search", {"vectors": [[0, 0, 0, 0]] * 5}, 400, "over_limit", "vectors has 5 entries; this server takes 4"),
    ("search", {"ids": [1.5]}, 400, "invalid_request", "ids[0] is the number 1.5; it must be an id"),
    ("search", {"ids": [2**70]}, 400, "invalid_request", "ids[0] is too large"),
    ("search", {"ids": [1, -1]}, 404, "unknown_id", "ids[1] is -1"),
    ("search", {"ids": [40]}, 404, "unknown_id", "ids[0] is 40, which is none of the 40 vectors"),
    ("search", {"names": ["nobody"]}, 404, "unknown_id", "'nobody'"),
    ("search", {"names": [None]}, 400, "invalid_request", "names[0] is null"),
    ("search", {"ids": [1], "k": 0}, 400, "invalid_request", "k is the number 0; it must be a whole number"),
    ("search", {"ids": [1], "k": -3}, 400, "invalid_request", "k is the number -3"),
    ("search", {"ids": [1], "k": 2.0}, 400, "invalid_request", "k is the number 2.0"),
    ("search", {"ids": [1], "k": True}, 400, "invalid_request", "k is true"),
    ("search", {"ids": [1], "k": 9}, 400, "over_limit", "k is 9; this server takes at most 8"),
    ("search", {"ids": [1], "k": 10**30}, 400, "over_limit", "k is 1000000"),
    ("search", {"ids": [1], "k": 10**400}, 400, "over_limit", "k is an integer of about 401 digits"),
    ("ppr", {"seeds": 0, "k": 10**400}, 400, "over_limit", "k is an integer of about 401 digits"),
    ("search", {"ids": [1], "ef": 101}, 400, "over_limit", "ef is 101"),
    ("search", {"ids": [1], "ef": "wide"}, 400, "invalid_request", "ef is the text 'wide'"),
    ("search", {"ids": [1], "filter": [1]}, 400, "invalid_request", "filter is a list; it must be an object"),
    ("search", {"ids": [1], "filter": {}}, 400, "invalid_request", "none is given"),
    ("search", {"ids": [1], "filter": {"ids": 3}}, 400, "invalid_request", "filter.ids is the number 3"),
    ("search", {"ids": [1], "filter": {"ids": ["a"]}}, 400, "invalid_request", "filter.ids[0] is the text 'a'"),
    ("search", {"ids": [1], "filter": {"names": ["x"]}}, 404, "unknown_id", "filter.names"),
    ("search", {"ids": [1], "filter": {"ids": [], "exclude": 1}}, 400, "invalid_request", "filter.exclude is"),
    ("ppr", {}, 400, "invalid_request", "give seeds or names; none is given"),
    ("ppr", {"seeds": []}, 400, "invalid_request", "seeds is empty"),
    ("ppr", {"seeds": 12}, 404, "unknown_id", "seeds[0] is 12, which is none of the 12 nodes"),
    ("ppr", {"seeds": -1}, 404, "unknown_id", "seeds[0] is -1"),
    ("ppr", {"seeds": "v1"}, 400, "invalid_request", "seeds[0] is the text 'v1'"),
    ("ppr", {"seeds": [0, 1, 2, 3]}, 400, "over_limit", "seeds has 4 entries; this server takes 3"),
    ("ppr", {"seeds": [0], "names": ["v1"]}, 400, "invalid_request", "both are given"),
    ("ppr", {"names": ["v99"]}, 404, "unknown_id", "'v99'"),
    ("ppr", {"seeds": [0, 1], "weights": [1]}, 400, "invalid_request", "weights has 1 numbers for 2 seeds"),
    ("ppr", {"seeds": [0, 1], "weights": [1, -1]}, 400, "invalid_request", "weights[1] is -1.0"),
    ("ppr", {"seeds": [0, 1], "weights": [0, 0]}, 400, "invalid_request", "weights are all 0"),
    ("ppr", {"seeds": [0], "weights": ["1"]}, 400, "invalid_request", "weights[0] is the text '1'"),
    ("ppr", {"queries": []}, 400, "invalid_request", "queries is empty"),
    ("ppr", {"queries": [{"seeds": 0}], "seeds": 1}, 400, "invalid_request", "inside of queries"),
    ("ppr", {"queries": [3]}, 400, "invalid_request", "queries[0] is the number 3"),
    ("ppr", {"queries": [{"seeds": 0}, {"seeds": 99}]}, 404, "unknown_id", "queries[1].seeds[0] is 99"),
    ("ppr", {"queries": [{"seeds": 0, "k": 3}]}, 400, "invalid_request", "no field 'queries[0].k'"),
    ("ppr", {"queries": [{"seeds": 0}] * 5}, 400, "over_limit", "queries has 5 entries"),
    ("ppr", {"seeds": 0, "k": 9}, 400, "over_limit", "k is 9"),
]


@pytest.mark.parametrize(("path", "body", "status", "code", "message"), BAD)
def test_bad_requests_are_refused_by_name(client, path, body, status, code, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"})
    found = answer.json()["error"]
    assert (answer.status_code, found["code"]) == (status, code), found
    assert message in found["message"]
    assert len(found["message"]) < 300


def test_bodies_that_are_too_large_or_no_json(client):
    large = b'{"ids": [' + b"1," * 3000 + b"1]}"
    for content in (large, iter([large[:3000], large[3000:]])):  # with a length, and in chunks
        answer = client.post("/v1/search", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "too_large"
        assert answer.headers["connection"] == "close"
    answer = client.post("/v1/search", content=b"{}", headers={"Content-Type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "not_json")


def test_paths_and_methods_that_are_not_there(client):
    answer = client.get("/v1/serch")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_such_path")
    answer = client.get("/v1/search")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "wrong_method")
    assert answer.headers["allow"] == "POST"


def test_what_is_not_served_is_said(folder):
    with TestClient(create_app(Sources([folder / "plain.anb"]))) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/v1/ppr", json={"seeds": 0}).json()["error"]["code"] == "not_served"
        found = client.post("/v1/search", json={"names": ["n1"]}).json()["error"]
        assert found["message"].startswith("names cannot be used: what is served has no names")
        found = client.post("/v1/search", json={"vectors": [[1, 0, 0, 0], [0, 0, 0, 0]]}).json()["error"]
        assert found["message"] == "vectors[1] is all zeros, which has no cosine"
        assert "names" not in results(client.post("/v1/search", json={"ids": [1]}))[0]


# How much at once


class Slow:
    """Answers PageRank once it is let."""

    def __init__(self):
        self.names, self.num_nodes, self.about = None, 5, {"file": "slow"}
        self.writes = None
        self.go, self.begun = threading.Event(), threading.Semaphore(0)

    def signature(self):
        return ()

    def load(self, generation=1):
        return Loaded(None, self, generation)

    def close(self):
        pass

    def most(self, ids, k):
        return k

    def top(self, ids, weights, k):
        self.begun.release()
        assert self.go.wait(60)
        return ids, weights


@pytest.fixture
def slow():
    source = Slow()
    yield source
    source.go.set()


def post_all(client, count):
    """So many requests at a time, in threads; the threads and the list their answers go to."""
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.post("/v1/ppr", json={"seeds": 0}))) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads, answers


def test_more_than_may_wait_are_turned_away(slow):
    limits = Limits(concurrency=1, waiting=1, timeout_s=60)
    with TestClient(create_app(slow, limits)) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        threads, answers = post_all(client, 2)
        gate = client.app.state.serving.gate
        until(lambda: gate.taken == 2)
        refused = client.post("/v1/ppr", json={"seeds": 0})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "busy")
        assert refused.headers["retry-after"] == "1"
        assert client.get("/healthz").status_code == 200  # which needs no thread
        slow.go.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert client.post("/v1/ppr", json={"seeds": 0}).status_code == 200


def test_what_takes_too_long_is_given_up_but_keeps_its_thread(slow):
    limits = Limits(concurrency=1, waiting=0, timeout_s=0.2)
    with TestClient(create_app(slow, limits)) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        late = client.post("/v1/ppr", json={"seeds": 0})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")
        assert client.post("/v1/ppr", json={"seeds": 0}).status_code == 429  # the machine is still at work on the first
        slow.go.set()
        until(lambda: client.app.state.serving.gate.taken == 0)
        until(lambda: client.post("/v1/ppr", json={"seeds": 0}).status_code == 200)


def test_what_waited_too_long_is_not_computed(slow):
    limits = Limits(concurrency=1, waiting=1, timeout_s=1.0)
    with TestClient(create_app(slow, limits)) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        threads, answers = post_all(client, 2)
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [503, 503]
        slow.go.set()
        until(lambda: client.app.state.serving.gate.taken == 0)
        assert slow.begun.acquire(timeout=60)
        assert not slow.begun.acquire(timeout=0.05)  # the second never began


@pytest.mark.parametrize(
    "changes",
    [{"k": 0}, {"batch": -1}, {"timeout_s": 0.0}, {"timeout_s": float("nan")}, {"concurrency": 1.5}, {"waiting": -1}],
)
def test_limits_that_make_no_sense(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        Limits(**changes)


# What is told about it


def test_openapi_describes_the_routes_and_resolves(client):
    found = client.get("/openapi.json").json()
    assert found == json.loads(json.dumps(describe(LIMITS)))
    served = {route.path for route in client.app.routes}
    assert set(found["paths"]) == served
    schemas = found["components"]["schemas"]
    text = json.dumps(found)
    refs = {part.split('"')[0] for part in text.split('"$ref": "')[1:]}
    assert refs
    assert all(ref.removeprefix("#/components/schemas/") in schemas for ref in refs)
    assert schemas["SearchRequest"]["properties"]["k"]["maximum"] == LIMITS.k
    assert schemas["SearchRequest"]["properties"]["vectors"]["maxItems"] == LIMITS.batch
    operations = [operation["operationId"] for path in found["paths"].values() for operation in path.values()]
    assert len(operations) == len(set(operations))


def test_info_health_and_readiness(client, folder):
    found = client.get("/v1/info").json()
    assert found["search"] == {
        "file": str(folder / "index.anb"),
        "vectors": COUNT,
        "dim": DIM,
        "metric": "l2",
        "dtype": "f32",
        "named": True,
    }
    assert found["ppr"]["nodes"] == 12
    assert found["limits"]["k"] == LIMITS.k
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "generation": found["generation"]}


def metric(client, line):
    lines = client.get("/metrics").text.splitlines()
    return next((float(text.rsplit(" ", 1)[1]) for text in lines if text.startswith(line + " ")), 0.0)


def test_metrics_count_what_happens(client):
    answered = 'anabranch_requests_total{endpoint="/v1/search",status="200"}'
    refused = 'anabranch_requests_total{endpoint="/v1/search",status="400"}'
    other = 'anabranch_requests_total{endpoint="other",status="404"}'
    names = (
        answered,
        refused,
        other,
        'anabranch_queries_total{endpoint="search"}',
        'anabranch_refused_total{reason="over_limit"}',
        'anabranch_request_seconds_count{endpoint="/v1/search"}',
    )
    before = [metric(client, name) for name in names]
    client.post("/v1/search", json={"ids": [1, 2, 3]})
    client.post("/v1/search", json={"ids": [1], "k": 9})
    client.get("/nothing/here")
    assert [metric(client, name) - old for name, old in zip(names, before, strict=True)] == [1, 1, 1, 3, 1, 2]
    assert metric(client, "anabranch_vectors") == COUNT
    assert metric(client, "anabranch_nodes") == 12
    assert metric(client, "anabranch_in_flight") == 0


# New files


def test_reload_needs_the_token(client, folder):
    assert client.post("/admin/reload").json()["error"]["code"] == "wrong_token"
    wrong = client.post("/admin/reload", headers={"Authorization": "Bearer secrets"})
    assert (wrong.status_code, wrong.headers["www-authenticate"]) == (401, "Bearer")
    before = client.get("/v1/info").json()["generation"]
    right = client.post("/admin/reload", headers={"Authorization": "Bearer secret"})
    assert (right.status_code, right.json()["generation"]) == (200, before + 1)
    with TestClient(create_app(Sources([folder / "plain.anb"]))) as other:
        assert other.post("/admin/reload").json()["error"]["code"] == "no_token"


def test_files_that_cannot_be_used_leave_the_old_ones(folder, tmp_path):
    path = tmp_path / "index.anb"
    shutil.copy(folder / "plain.anb", path)
    with TestClient(create_app(Sources([path]), token="t")) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        before = results(client.post("/v1/search", json={"ids": [3]}))
        path.write_bytes(path.read_bytes()[:-100])
        answer = client.post("/admin/reload", headers={"Authorization": "Bearer t"})
        assert answer.status_code == 409
        assert "the old files are still served" in answer.json()["error"]["message"]
        assert "index.anb" in answer.json()["error"]["message"]
        assert results(client.post("/v1/search", json={"ids": [3]})) == before
        assert metric(client, 'anabranch_reloads_total{outcome="failed"}') == 1
        assert client.get("/readyz").json()["generation"] == 1


def test_changed_files_are_seen(folder, tmp_path):
    path = tmp_path / "index.anb"
    save_index(path, 0)
    with TestClient(create_app(Sources([path]), watch_s=0.05)) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        for content in (b"ANABARR1 but not more", None):  # a bad file in between is passed over
            if content is not None:
                path.write_bytes(content)
                until(lambda: metric(client, 'anabranch_reloads_total{outcome="failed"}') == 1)
                time.sleep(0.2)  # and is not tried again and again
                assert metric(client, 'anabranch_reloads_total{outcome="failed"}') == 1
            else:
                index = save_index(path, 1)
                until(lambda: client.get("/readyz").json()["generation"] == 2)
        expected = index.search(index.vectors([3]), 4)[0][0, 1:].tolist()
        assert results(client.post("/v1/search", json={"ids": [3], "k": 3}))[0]["ids"] == expected


def test_nothing_to_serve_is_not_ready(tmp_path):
    failures = []
    app = create_app(Sources([tmp_path / "gone.anb"]), on_failure=failures.append)
    with TestClient(app) as client:
        until(lambda: failures)
        assert isinstance(failures[0], DataError)
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert "gone.anb" in answer.json()["error"]["message"]
        assert client.post("/v1/search", json={"ids": [0]}).json()["error"]["code"] == "not_ready"
        assert client.get("/healthz").status_code == 200


def test_names_of_another_index_are_not_taken(folder, tmp_path):
    path = tmp_path / "index.anb"
    save_index(path, 0)
    write_names(path, Names([f"n{number}" for number in range(COUNT)]))
    assert read_names(path).of(np.array([5])) == ["n5"]
    save_index(path, 1)
    with pytest.raises(DataError, match="belongs to another index"):
        read_names(path)
    names_path(path).unlink()
    assert read_names(path) is None
    write_names(path, Names([1, 2]))
    with pytest.raises(DataError, match="2 names, and an id of the index is 39"):
        read_names(path, np.arange(COUNT))
    with pytest.raises(InputError, match="same one"):
        Names(["a", "a"])


def test_two_of_a_kind_are_refused(folder):
    with pytest.raises(InputError, match="a second index of vectors"):
        Sources([folder / "index.anb", folder / "plain.anb"]).load()
    with pytest.raises(InputError, match="nothing to serve"):
        Sources([])


# A process of its own


class Server:
    """``anabranch graph serve`` in a process."""

    def __init__(self, *arguments, token=None):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **({} if token is None else {"ANABRANCH_ADMIN_TOKEN": token}),
        }
        command = [
            sys.executable,
            "-m",
            "anabranch.cli.main",
            "graph",
            "serve",
            *map(str, arguments),
            "--port",
            "0",
            "--json",
        ]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        assert lines, self.process.communicate()[1]
        self.facts = json.loads("".join(lines))
        self.url = self.facts["url"]

    def stop(self, sent=signal.SIGTERM):
        self.process.send_signal(sent)
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("live") / "index.anb"
    save_index(path, 0)
    server = Server(path, "--max-body", 5000, "--timeout", 3, token="t")
    server.path = path
    yield server
    if server.process.poll() is None:
        server.stop(signal.SIGKILL)


def test_swaps_under_load_fail_no_request(server):
    """Files change three ways while clients search without pause. Every answer is that of the files of its generation."""
    query = vectors_of(9)[:1]
    truth = {
        seed: save_index(server.path.with_name(f"{seed}.anb"), seed).search(query, 5)[0][0].tolist() for seed in (0, 1)
    }
    answers, errors, over = [], [], threading.Event()

    def load():
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not over.is_set():
                try:
                    answer = client.post("/v1/search", json={"vectors": query.tolist(), "k": 5})
                    answers.append((answer.status_code, answer.json()))
                except Exception as error:  # whatever it is, it fails the test
                    errors.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    seeds = {1: 0}
    until(lambda: len(answers) >= 6)
    for generation in range(2, 8):
        seeds[generation] = generation % 2
        shutil.copy(server.path.with_name(f"{generation % 2}.anb"), server.path.with_name("next.anb"))
        server.path.with_name("next.anb").rename(server.path)
        if generation % 3:
            server.process.send_signal(signal.SIGHUP)
        else:
            done = httpx.post(f"{server.url}/admin/reload", headers={"Authorization": "Bearer t"}, timeout=60)
            assert done.status_code == 200
        until(lambda wanted=generation: httpx.get(f"{server.url}/readyz").json()["generation"] == wanted)
        seen = len(answers)
        until(lambda seen=seen: len(answers) >= seen + 6)
    over.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert {status for status, _ in answers} == {200}
    assert {body["generation"] for _, body in answers} == set(range(1, 8))
    for _, body in answers:
        assert body["results"][0]["ids"] == truth[seeds[body["generation"]]]


def raw(server, *parts, pause=0.0):
    """A request sent in pieces over a plain socket; all that comes back."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        found = b""
        while chunk := connection.recv(65536):  # until the server closes the connection, as it does after these
            found += chunk
        return found


HEAD = b"POST /v1/search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_limits_of_bodies_on_the_wire(server):
    assert b" 413 " in raw(server, HEAD + b"Content-Length: 5001\r\n\r\n")
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    assert b" 413 " in raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk)
    slow = raw(server, HEAD + b"Content-Length: 20\r\n\r\n", b'{"ids":')  # and then nothing
    assert b" 408 " in slow
    assert b"slow_body" in slow
    assert b" 400 " in raw(server, b"NONSENSE\r\n\r\n")
    assert httpx.post(f"{server.url}/v1/search", json={"ids": [1]}).status_code == 200


def test_metrics_of_the_process(server):
    text = httpx.get(f"{server.url}/metrics").text
    assert "process_resident_memory_bytes" in text
    assert 'anabranch_reloads_total{outcome="done"}' in text


def test_a_stop_lets_requests_under_way_finish(server):
    """Half of a request is sent, then the signal, then the other half."""
    body = b'{"ids": [1], "k": 2}'
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(HEAD + f"Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        assert b" 100 " in connection.recv(65536)
        connection.sendall(body[:5])
        server.process.send_signal(signal.SIGTERM)

        def is_closed():
            try:
                httpx.get(f"{server.url}/healthz")
            except httpx.ConnectError:
                return True
            except httpx.TransportError:
                # It came to the door as that was closed.
                return False
            return False

        until(is_closed)  # nobody new comes in
        assert server.process.poll() is None
        connection.sendall(body[5:])
        answer = b""
        while chunk := connection.recv(65536):  # until the server closes the connection
            answer += chunk
    assert b" 200 " in answer.split(b"\r\n")[0]
    assert b'"results"' in answer
    out, err = server.process.communicate(timeout=60)
    assert server.process.returncode == 0, err
    assert out == ""
    assert "Traceback" not in err
    assert Path(server.path).exists()


def test_an_index_on_disk_is_served_and_takes_no_changes(tmp_path):
    path, rows = tmp_path / "disk.anb", vectors_of(0)
    build(rows, path, M=8, workers=1).close()
    server = Server(path)
    assert server.facts["search"]["dtype"] == "pq4"
    with httpx.Client(base_url=server.url, timeout=60) as client:
        found = client.post("/v1/search", json={"vectors": rows[:2].tolist(), "k": 3, "filter": {"ids": [0, 1, 5, 6]}})
        far = ((rows[[0, 1, 5, 6]] - rows[:2, None]) ** 2).sum(2)
        wanted = np.array([0, 1, 5, 6])[far.argsort(1)[:, :3]]
        assert [row["ids"] for row in found.json()["results"]] == wanted.tolist()
        own = client.post("/v1/search", json={"ids": [7], "k": 2}).json()["results"][0]["ids"]
        assert own == ((rows - rows[7]) ** 2).sum(1).argsort()[1:3].tolist()
        refused = client.post("/v1/upsert", json={"ids": [1], "vectors": rows[:1].tolist()})
        assert (refused.status_code, "on disk" in refused.text) == (403, True)
        # Damage after the start is one refused request, and no wrong answer.
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        with open(path, "r+b") as file:
            file.write(data)
        assert client.post("/v1/search", json={"vectors": rows[:1].tolist(), "k": 40, "ef": 40}).status_code == 500
        assert client.get("/healthz").status_code == 200
    assert server.stop() == 0
