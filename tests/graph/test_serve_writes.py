"""Changes over HTTP: what is taken, what is refused and how, and that kill -9 loses nothing that was acknowledged."""

import contextlib
import json
import random
import signal
import socket
import threading
import time

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from anabranch.cli.graph.serve import is_loopback
from anabranch.errors import DataError, InputError
from anabranch.graph import HNSW
from anabranch.graph.live import live_folder, open_index
from anabranch.graph.live.log import Log
from anabranch.graph.names import Names, write_names
from anabranch.graph.serve import Limits, Sources, Writes, create_app, server
from hnsw_checks import drawn
from server_process import started
from waiting import until

DIM, COUNT = 4, 40
LIMITS = Limits(body_bytes=4096, batch=4, k=8, concurrency=2, waiting=2, timeout_s=5.0)
VECTORS = drawn(400, DIM, 3)
HERE = "http://127.0.0.1:8080"


def saved(path, metric="l2", rows=None):
    index = HNSW(DIM, metric, M=6, ef_construction=30, workers=1)
    index.add(VECTORS[:COUNT] if rows is None else rows)
    index.save(path)
    return path


@pytest.fixture
def path(tmp_path):
    return saved(tmp_path / "index.anb")


def served(path, writes=None, limits=LIMITS, **options):
    client = TestClient(create_app(Sources([path], writes=writes or Writes()), limits, **options), base_url=HERE)
    client.__enter__()
    until(lambda: client.get("/readyz").status_code == 200)
    return client


@pytest.fixture
def client(path):
    client = served(path)
    yield client
    client.__exit__(None, None, None)


def nearest(client, row, k=1, **more):
    answer = client.post("/search", json={"vectors": [np.asarray(row).tolist()], "k": k, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["results"][0]["ids"]


def error_of(answer):
    return answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["message"]


def metric(client, line):
    lines = client.get("/metrics").text.splitlines()
    return next((float(text.rsplit(" ", 1)[1]) for text in lines if text.startswith(line + " ")), None)


def test_a_name_whose_element_was_deleted_is_told_by_its_name(path):
    write_names(path, Names([f"n{row}" for row in range(COUNT)]))
    client = served(path)
    assert client.post("/delete", json={"names": ["n5"]}).status_code == 200
    answer = client.post("/search", json={"names": ["n4", "n5"]})
    assert error_of(answer) == (404, "unknown_id", "names[1] is 'n5', which was deleted")
    client.__exit__(None, None, None)


# What is taken


@pytest.mark.parametrize("start", ["", "/v1"])
def test_what_was_brought_in_is_found_and_what_went_is_not(client, path, start):
    body = {"ids": [7, 2**63 - 1], "vectors": VECTORS[100:102].tolist()}
    answer = client.post(f"{start}/upsert", json=body)
    assert answer.status_code == 200
    assert answer.json() == {"upserted": 2, "new": 1, "vectors": COUNT + 1, "number": 1, "generation": 1}
    assert nearest(client, VECTORS[100]) == [7]
    assert nearest(client, VECTORS[101]) == [2**63 - 1]
    assert client.post(f"{start}/upsert", json=body).json()["new"] == 0
    answer = client.post(f"{start}/delete", json={"ids": [7, 8, 1000]})
    assert answer.json() == {"deleted": 2, "missing": [1000], "vectors": COUNT - 1, "number": 3, "generation": 1}
    assert not {7, 8} & set(nearest(client, VECTORS[100], 8))
    assert client.post("/v1/search", json={"ids": [7]}).json()["error"]["code"] == "unknown_id"
    assert len(open_index(path)) == COUNT - 1
    found = client.get("/v1/info").json()["search"]
    assert found["vectors"] == COUNT - 1
    assert found["writes"] == {
        "fsync": "always",
        "number": 3,
        "log_bytes": found["writes"]["log_bytes"],
        "failure": None,
    }


def test_an_empty_index_may_be_filled(tmp_path):
    HNSW(DIM, "cosine").save(tmp_path / "new.anb")
    client = served(tmp_path / "new.anb")
    assert nearest(client, VECTORS[0]) == []
    assert client.post("/upsert", json={"ids": [3], "vectors": [[1, 2, 3, 4]]}).status_code == 200
    assert nearest(client, [2, 4, 6, 8]) == [3]
    client.__exit__(None, None, None)
    assert open_index(tmp_path / "new.anb").ids.tolist() == [3]


# What is refused

GOOD = [[1, 2, 3, 4]]
BAD = [
    ("upsert", b"{", 400, "invalid_json", "not JSON"),
    ("upsert", b'{"ids": [1], "vectors": [[1, 2, 3, NaN]]}', 400, "invalid_json", "NaN is no number of JSON"),
    ("upsert", b'{"ids": [1], "vectors": [[1, 2, 3, -Infinity]]}', 400, "invalid_json", "Infinity"),
    ("upsert", [], 400, "invalid_request", "it must be a JSON object"),
    ("upsert", {}, 400, "invalid_request", "give ids or names; none is given"),
    ("upsert", {"ids": [1]}, 400, "invalid_request", "give vectors; there are none"),
    ("upsert", {"ids": [1], "vectors": GOOD, "k": 1}, 400, "invalid_request", "no field 'k'"),
    ("upsert", {"ids": [], "vectors": []}, 400, "invalid_request", "ids is empty"),
    ("upsert", {"ids": [1, 2], "vectors": GOOD}, 400, "invalid_request", "there are 2 ids for 1 vectors"),
    ("upsert", {"ids": [1] * 5, "vectors": GOOD * 5}, 400, "over_limit", "ids has 5 entries; this server takes 4"),
    ("upsert", {"ids": [1], "vectors": GOOD * 5}, 400, "over_limit", "vectors has 5 entries"),
    (
        "upsert",
        {"ids": [4, 5, 4], "vectors": GOOD * 3},
        400,
        "invalid_request",
        "ids[2] is 4, which stands there before",
    ),
    ("upsert", {"ids": [-1], "vectors": GOOD}, 400, "invalid_request", "ids[0] is -1; ids are not negative"),
    ("upsert", {"ids": [2**63], "vectors": GOOD}, 400, "invalid_request", "ids[0] is too large"),
    ("upsert", {"ids": [1.0], "vectors": GOOD}, 400, "invalid_request", "ids[0] is the number 1.0"),
    ("upsert", {"ids": [True], "vectors": GOOD}, 400, "invalid_request", "ids[0] is true"),
    ("upsert", {"ids": ["1"], "vectors": GOOD}, 400, "invalid_request", "ids[0] is the text '1'"),
    ("upsert", {"ids": 1, "vectors": GOOD}, 400, "invalid_request", "ids is the number 1; it must be a list"),
    (
        "upsert",
        {"ids": [1], "vectors": [[1, 2, 3]]},
        400,
        "invalid_request",
        "vectors have 3 numbers each, those of the index 4",
    ),
    ("upsert", {"ids": [1, 2], "vectors": [*GOOD, [1]]}, 400, "invalid_request", "vectors[1] has 1 numbers"),
    ("upsert", {"ids": [1], "vectors": [1, 2, 3, 4]}, 400, "invalid_request", "vectors[0] is the number 1"),
    ("upsert", {"ids": [1], "vectors": [[1, 2, 3, None]]}, 400, "invalid_request", "vectors[0][3] is null"),
    ("upsert", {"ids": [1], "vectors": [[1, 2, 3, 1e39]]}, 400, "invalid_request", "does not fit into a float32"),
    (
        "upsert",
        {"ids": [1, 2], "vectors": [*GOOD, [1e19, 0, 0, 0]]},
        400,
        "invalid_request",
        "vectors[1] is longer than 1e+18",
    ),
    ("delete", {}, 400, "invalid_request", "give ids or names; none is given"),
    ("upsert", {"names": ["a"], "vectors": GOOD}, 400, "invalid_request", "elements of this index have none; give ids"),
    (
        "upsert",
        {"ids": [1], "names": ["a"], "vectors": GOOD},
        400,
        "invalid_request",
        "give ids or names; both are given",
    ),
    ("delete", {"names": ["a"]}, 400, "invalid_request", "elements of this index have none; give ids"),
    ("delete", {"ids": []}, 400, "invalid_request", "ids is empty"),
    ("delete", {"ids": [3, 3]}, 400, "invalid_request", "ids[1] is 3, which stands there before"),
    ("delete", {"ids": [-2]}, 400, "invalid_request", "ids[0] is -2"),
    ("delete", {"ids": [2**64]}, 400, "invalid_request", "ids[0] is too large"),
    ("delete", {"ids": [0, 1, 2, 3, 4]}, 400, "over_limit", "ids has 5 entries"),
    ("delete", {"ids": [1], "vectors": GOOD}, 400, "invalid_request", "no field 'vectors'"),
]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    path = saved(tmp_path_factory.mktemp("untouched") / "index.anb")
    client = served(path)
    yield client
    # None of them changed anything.
    assert not live_folder(path).exists()
    client.__exit__(None, None, None)


@pytest.mark.parametrize(("name", "body", "status", "code", "message"), BAD)
def test_bad_changes_are_refused_by_name(untouched, name, body, status, code, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = untouched.post(f"/{name}", content=content, headers={"Content-Type": "application/json"})
    found = error_of(answer)
    assert found[:2] == (status, code), found
    assert message in found[2]
    assert len(found[2]) < 300


def test_bodies_methods_and_pages_of_others(untouched):
    large = json.dumps({"ids": [1], "vectors": [[0.123456789] * 500]}).encode()
    assert error_of(untouched.post("/upsert", content=large))[:2] == (413, "too_large")
    answer = untouched.post("/delete", content=b'{"ids": [1]}', headers={"Content-Type": "text/plain"})
    assert error_of(answer)[:2] == (415, "not_json")
    assert error_of(untouched.get("/delete"))[:2] == (405, "wrong_method")
    for origin in ("http://evil.example", "null"):
        answer = untouched.post("/delete", json={"ids": [1]}, headers={"Origin": origin})
        assert error_of(answer)[:2] == (403, "other_origin")


LOCAL = [
    "localhost:8080",
    "LOCALHOST",
    "localhost.",
    "127.8.0.1",
    "[::1]:8080",
    "app.localhost",
    "box.example:8080",
    "BOX.example",
]
OTHER = [
    "evil.example",
    "evil.example:8080",
    "127.0.0.1.evil.example",
    "10.0.0.1",
    "0.0.0.0",
    "[",
    "[::1",
    "",
    "localhost@evil.example",
]


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A server that listens at a name of its own."""
    client = served(saved(tmp_path_factory.mktemp("named") / "index.anb"), host="box.example")
    yield client
    client.__exit__(None, None, None)


@pytest.mark.parametrize("host", LOCAL)
@pytest.mark.parametrize("page", ["http://{}", None])
def test_names_of_this_machine_may_change_something(named, host, page):
    headers = {"Host": host} | ({} if page is None else {"Origin": page.format(host)})
    assert named.post("/delete", json={"ids": [10**6]}, headers=headers).status_code == 200


@pytest.mark.parametrize("host", OTHER)
@pytest.mark.parametrize("route", ["/upsert", "/v1/upsert", "/delete", "/v1/delete"])
def test_a_page_whose_name_leads_here_changes_nothing(untouched, host, route):
    for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}"}):
        assert error_of(untouched.post(route, json={"ids": [1]}, headers=headers))[:2] == (403, "other_host")
    # Which may still search: that changes nothing.
    assert untouched.post("/search", json={"ids": [1]}, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://[::1", "http://[", "[", "", "://", b"\xff://\xff", "http://127.0.0.1:8080:"]
)
def test_origins_that_are_none(untouched, origin):
    for headers in ({}, {"Authorization": "Bearer x"}):
        answer = untouched.post("/delete", json={"ids": [1]}, headers={"Origin": origin, **headers})
        assert error_of(answer)[:2] == (403, "other_origin")


def test_the_application_knows_where_it_listens(path, monkeypatch):
    def stop(*_, host, **__):
        raise DataError(f"it is {host}")

    monkeypatch.setattr(server, "create_app", stop)
    with pytest.raises(DataError, match=r"it is 127\.0\.0\.2"):
        server.run(Sources([path]), host="127.0.0.2", port=0)


def test_reloading_is_a_change_too(path):
    client = served(path, token="t")
    admin = {"Authorization": "Bearer t"}
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "http://[::1"}):
        answer = client.post("/admin/reload", headers=admin | headers)
        assert error_of(answer)[:2] == (403, "other_origin")
    assert client.post("/admin/reload", headers={"Authorization": "Bearer \xff".encode("latin-1")}).status_code == 401
    # Who knows the token may call the server what they like.
    assert client.post("/admin/reload", headers=admin | {"Host": "box.example"}).status_code == 200
    client.__exit__(None, None, None)


HALVES = [
    ("/search", '{"\\ud800": 1}', 400),
    ("/search", '{"vectors": [[1, 2, 3, 4]], "filter": {"\\udfff": 1}}', 400),
    ("/search", '{"names": ["\\ud800"]}', 400),
    ("/search", '{"ids": ["\\ud800"]}', 400),
    ("/search", '{"ids": [1], "k": "\\ud800"}', 400),
    ("/upsert", '{"\\ud800": 1}', 400),
    ("/upsert", '{"ids": ["\\ud800"], "vectors": [["\\ud800"]]}', 400),
    ("/delete", '{"ids": [1], "\\ud800\\ud800": 1}', 400),
    ("/ppr", '{"seeds": 1, "\\ud800": 1}', 400),
    ("/ppr", '{"queries": [{"seeds": 1, "\\ud800": 1}]}', 400),
    ("/%ed%a0%80", "{}", 404),
]


@pytest.mark.parametrize(("route", "body", "status"), HALVES)
def test_half_of_a_surrogate_pair_is_refused_in_json(untouched, route, body, status):
    answer = untouched.post(route, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert json.loads(answer.content.decode())["error"]["message"]
    if body.startswith('{"\\ud800"'):
        assert answer.json()["error"]["field"] == "\ud800"


def test_a_token_that_is_no_text_is_refused_and_no_fault(path):
    client = served(path, Writes(token="\udcff"), token="\udcff")
    for route in ("/delete", "/admin/reload"):
        answer = client.post(route, json={"ids": [1]}, headers={"Authorization": "Bearer x"})
        assert error_of(answer)[:2] == (401, "wrong_token")
    client.__exit__(None, None, None)


def test_an_element_that_goes_while_it_is_looked_up_is_unknown_all_the_same(client, monkeypatch):
    real = HNSW.contains
    monkeypatch.setattr(HNSW, "contains", lambda self, ids: np.ones_like(real(self, ids)))
    answer = client.post("/search", json={"ids": [3, 999]})
    assert error_of(answer) == (404, "unknown_id", "ids[1] is 999, which is not in the index")
    assert answer.json()["error"]["field"] == "ids[1]"


def test_a_distance_that_is_no_number_is_told_as_damage(client, monkeypatch):
    real = HNSW.search

    def search(self, *args, **options):
        ids, distances = real(self, *args, **options)
        distances[:, 0] = np.inf
        return ids, distances

    monkeypatch.setattr(HNSW, "search", search)
    answer = client.post("/search", json={"vectors": GOOD, "k": 2})
    assert error_of(answer)[:2] == (500, "damaged_index")


def test_zero_has_no_direction(tmp_path):
    client = served(saved(tmp_path / "index.anb", "cosine"))
    answer = client.post("/upsert", json={"ids": [1], "vectors": [[0, 0, 0, 0]]})
    assert error_of(answer)[::2] == (400, "vectors[0] is all zeros, which has no cosine")
    client.__exit__(None, None, None)


def test_a_token_is_asked_for_where_there_is_one(path):
    client = served(path, Writes(token="secret"))
    body = {"ids": [1]}
    assert error_of(client.post("/delete", json=body))[:2] == (401, "wrong_token")
    assert client.post("/delete", json=body, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.post("/delete", json=body, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert len(nearest(client, VECTORS[0])) == 1
    client.__exit__(None, None, None)


def test_a_server_may_only_read(path, tmp_path):
    client = TestClient(create_app(Sources([path]), LIMITS))
    with client:
        until(lambda: client.get("/readyz").status_code == 200)
        assert error_of(client.post("/delete", json={"ids": [1]}))[:2] == (403, "read_only")
        assert "writes" not in client.get("/v1/info").json()["search"]


def test_addresses_that_others_see_need_a_token(path):
    for host, expected in (
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("", False),
    ):
        assert is_loopback(host) == expected
    client = TestClient(create_app(Sources([path], why_read_only="there is no token"), LIMITS))
    with client:
        until(lambda: client.get("/readyz").status_code == 200)
        found = error_of(client.post("/upsert", json={"ids": [1], "vectors": GOOD}))
        assert found[1:] == ("read_only", "this server takes no changes: there is no token")


def test_an_index_that_is_full(path):
    client = served(path, Writes(vectors=COUNT + 1))
    assert client.post("/upsert", json={"ids": [100], "vectors": GOOD}).status_code == 200
    assert error_of(client.post("/upsert", json={"ids": [101], "vectors": GOOD}))[:2] == (409, "index_full")
    assert client.post("/upsert", json={"ids": [100], "vectors": GOOD}).status_code == 200
    client.__exit__(None, None, None)


@pytest.mark.parametrize("changes", [{"fsync": "no"}, {"fsync": -1.0}, {"snapshot_bytes": 0}, {"vectors": 1.5}])
def test_settings_that_make_no_sense(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        Writes(**changes)


def test_a_disk_that_fails_is_told_and_searches_go_on(client, monkeypatch):
    assert client.post("/delete", json={"ids": [1]}).status_code == 200

    def broken(self):
        self.failure = "the disk is gone"
        raise DataError(self.failure)

    monkeypatch.setattr(Log, "sync", broken)
    assert error_of(client.post("/delete", json={"ids": [2]}))[:2] == (503, "not_written")
    monkeypatch.undo()
    assert error_of(client.post("/delete", json={"ids": [3]}))[:2] == (503, "not_written")
    assert nearest(client, VECTORS[0]) == [0]
    assert metric(client, "anabranch_log_failed") == 1
    assert client.get("/v1/info").json()["search"]["writes"]["failure"] == "the disk is gone"


# What is told about it


def test_metrics_of_changes(client):
    client.post("/upsert", json={"ids": [1, 100], "vectors": VECTORS[100:102].tolist()})
    client.post("/delete", json={"ids": [2, 3, 999]})
    client.post("/delete", json={"ids": [-1]})
    expected = {
        "anabranch_upserted_total": 2,
        "anabranch_deleted_total": 2,
        "anabranch_log_writes_total": 2,
        "anabranch_log_syncs_total": 2,
        "anabranch_log_failed": 0,
        "anabranch_vectors": COUNT - 1,
        'anabranch_snapshots_total{outcome="done"}': 0,
        'anabranch_requests_total{endpoint="/delete",status="400"}': 1,
    }
    assert {name: metric(client, name) for name in expected} == expected
    assert metric(client, "anabranch_log_bytes") > 100
    assert metric(client, "anabranch_log_sync_seconds_total") > 0


def test_openapi_has_the_changes(client):
    found = client.get("/openapi.json").json()
    for path in ("/upsert", "/v1/upsert", "/delete", "/v1/delete", "/search"):
        assert "post" in found["paths"][path]
    upsert = found["components"]["schemas"]["UpsertRequest"]
    assert (upsert["required"], upsert["oneOf"]) == (["vectors"], [{"required": ["ids"]}, {"required": ["names"]}])
    assert upsert["properties"]["names"]["maxItems"] == LIMITS.batch
    assert upsert["properties"]["ids"]["maxItems"] == LIMITS.batch
    assert {"401", "403", "409", "413", "429"} <= found["paths"]["/upsert"]["post"]["responses"].keys()


# New files


def test_a_reload_keeps_what_was_changed_and_refuses_a_file_that_would_lose_it(path):
    client = served(path, token="t")
    admin = {"headers": {"Authorization": "Bearer t"}}
    # Nothing was changed yet: a new file is taken.
    saved(path, rows=VECTORS[:20])
    assert client.post("/admin/reload", **admin).json()["search"]["vectors"] == 20
    assert client.post("/delete", json={"ids": [0]}).json()["generation"] == 2
    answer = client.post("/admin/reload", **admin)
    assert (answer.status_code, answer.json()["generation"], answer.json()["search"]["vectors"]) == (200, 3, 19)
    assert client.post("/delete", json={"ids": [1]}).json()["vectors"] == 18
    # By another program: our own would not.
    saved(path.with_suffix(".new"), rows=VECTORS[:30]).replace(path)
    answer = client.post("/admin/reload", **admin)
    assert answer.status_code == 409
    assert "was replaced, and 2 changes were taken of the old one" in answer.json()["error"]["message"]
    assert client.post("/delete", json={"ids": [2]}).json()["vectors"] == 17
    client.__exit__(None, None, None)


def test_a_reload_beside_a_change_of_the_first_element_works(path, monkeypatch):
    """A change takes an element out for a moment: whatever was read of it before is not there any more."""
    real, source = HNSW.ids, Sources([path], writes=Writes())
    live = source.load().vectors.live

    def ids(self):
        found = real.__get__(self)
        if self is live.index:
            live.delete(found[:1])
        return found

    monkeypatch.setattr(HNSW, "ids", property(ids))
    assert source.load(2).generation == 2
    monkeypatch.undo()
    assert len(live) < COUNT
    source.close()


@pytest.mark.parametrize(
    "options",
    [{}, {"metric": "cosine", "dtype": "i8", "flat": True}, {"metric": "ip", "rerank": False, "dtype": "f16"}],
)
def test_kernels_of_changes_are_there_before_the_first(tmp_path, monkeypatch, options):
    """Such an index is changed and searched while the files are read, and what is served is not."""
    HNSW(DIM, **options).save(tmp_path / "new.anb")
    seen = []

    def spied(name, real):
        def called(self, *args, **more):
            seen.append((name, self))
            return real(self, *args, **more)

        return called

    for name in ("add", "remove", "search"):
        monkeypatch.setattr(HNSW, name, spied(name, getattr(HNSW, name)))
    source = Sources([tmp_path / "new.anb"], writes=Writes())
    loaded = source.load()
    assert {name for name, _ in seen} == {"add", "remove", "search"}
    for _, made in seen:
        assert made is not loaded.vectors.index
        for option in ("metric", "dtype", "rerank", "flat"):
            assert getattr(made, option) == getattr(loaded.vectors.index, option)
    assert len(loaded.vectors.index) == 0
    # Once, and not for whom only reads.
    seen.clear()
    source.load(2)
    source.close()
    Sources([tmp_path / "new.anb"]).load()
    assert seen == []


def test_a_request_to_an_index_that_was_replaced_meanwhile_is_not_lost(path):
    source = Sources([path], writes=Writes())
    old = source.load()
    saved(path, rows=VECTORS[:20])
    new = source.load(2)
    assert new.vectors.live is not old.vectors.live
    with pytest.raises(DataError, match="it was closed"):
        old.vectors.live.delete([1])
    new.vectors.live.delete([1])
    source.close()
    assert len(open_index(path)) == 19


# A process of its own


class Client(threading.Thread):
    """Writes all of its ids with one version after the other, or takes all out, until the server is gone; knows what was acknowledged."""

    def __init__(self, url, number, first):
        super().__init__()
        self.url, self.ids, self.version = url, list(range(1000 * number, 1000 * number + 3)), first
        self.acked, self.tried = None, None

    def run(self):
        try:
            with httpx.Client(timeout=60) as client:
                while True:
                    self.version += 1
                    self.tried = None if self.version % 5 == 0 else self.version
                    body = {"ids": self.ids}
                    if self.tried is not None:
                        body["vectors"] = [[self.version, number, self.ids[0], 1] for number in range(3)]
                    answer = client.post(f"{self.url}/{'delete' if self.tried is None else 'upsert'}", json=body)
                    assert answer.status_code == 200, answer.text
                    self.acked = self.tried
        except httpx.TransportError:
            pass

    def check(self, index):
        known = index.contains(self.ids)
        # All or none of what one request brought.
        assert known.all() or not known.any()
        if not known.any():
            assert None in (self.acked, self.tried)
            return
        rows = index.vectors(self.ids)
        assert len(set(rows[:, 0])) == 1
        assert rows[0, 0] in (self.acked, self.tried)
        np.testing.assert_array_equal(rows[:, 1:], [[number, self.ids[0], 1] for number in range(3)])


def hostile(url, over):
    """All that a client may do wrong, as fast as it can."""
    host, port = url.removeprefix("http://").split(":")
    head = b"POST /upsert HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    parts = (
        head + b"Content-Length: 99999999\r\n\r\n",
        head + b"Content-Length: 5000\r\n\r\n" + b"[" * 5000,
        head + b"Content-Length: 40\r\n\r\n" + b'{"ids": [1], "vectors": [[1e999,1,1,1]]}',
        head + b"Content-Length: 1000\r\n\r\n{",
        b"\x00\xff nonsense\r\n\r\n",
    )
    held = []
    with contextlib.suppress(OSError):
        while not over.is_set():
            for part in parts:
                held.append(socket.create_connection((host, int(port)), timeout=60))
                held[-1].sendall(part)
            while len(held) > 40:
                held.pop(0).close()
    for connection in held:
        connection.close()


def drill(path, kills, pauses, *options):
    """Start, write from three clients beside a hostile one, kill -9; again and again.

    What the next start finds is what was acknowledged, or tried last.
    """
    clients, generator = [], random.Random(0)
    for turn in range(kills + 1):
        token = {"ANABRANCH_WRITE_TOKEN": "secret"} if turn == kills else None
        with started(
            "graph", "serve", str(path), "--quiet", "--max-body", "8000", *options, environment=token
        ) as server:
            if clients:
                check(server.url, open_index(path), clients, is_closed=token is not None)
            else:
                refuses_what_it_may_not_take(server.url)
            if turn == kills:
                server.process.send_signal(signal.SIGTERM)
                assert server.process.wait(60) == 0
                assert server.log.read_text() == ""
                return
            clients, over = [Client(server.url, number + 1, 100 * turn) for number in range(3)], threading.Event()
            threads = [*clients, threading.Thread(target=hostile, args=(server.url, over))]
            for thread in threads:
                thread.start()
            until(lambda clients=clients, turn=turn: min(client.version for client in clients) > 100 * turn + 10)
            time.sleep(generator.uniform(*pauses))
            over.set()
            server.process.send_signal(signal.SIGKILL)
            for thread in threads:
                thread.join(60)
            assert "Traceback" not in server.log.read_text()


def refuses_what_it_may_not_take(url):
    """A page whose name was made to lead here, what is no origin, and half of a character: a word in JSON, and no fault."""
    with httpx.Client(base_url=url, timeout=60) as http:
        for headers, code in (
            ({"Host": "evil.example", "Origin": "http://evil.example"}, "other_host"),
            ({"Origin": "http://[::1"}, "other_origin"),
        ):
            assert error_of(http.post("/upsert", json={"ids": [1], "vectors": GOOD}, headers=headers))[:2] == (
                403,
                code,
            )
        answer = http.post("/search", content='{"\\ud800": 1}', headers={"Content-Type": "application/json"})
        assert error_of(answer)[:2] == (400, "invalid_request")


def check(url, found, clients, *, is_closed):
    """That the files, and a server that has begun with them, hold what the clients know of; one that is closed asks for its token."""
    for one in clients:
        one.check(found)
    with httpx.Client(base_url=url, timeout=60) as http:
        assert http.get("/v1/info").json()["search"]["vectors"] == len(found)
        assert http.post("/delete", json={"ids": [1]}).status_code == (401 if is_closed else 200)
        answer = http.post("/delete", json={"ids": [1]}, headers={"Authorization": "Bearer secret"})
        assert answer.json()["missing"] == [1]
        for one in clients:
            if found.contains(one.ids).all():
                assert nearest(http, found.vectors(one.ids[:1])[0]) == one.ids[:1]


def test_kill_9_beside_a_hostile_client_loses_nothing_that_was_acknowledged(tmp_path):
    drill(tmp_path / "new.anb", 1, (0, 0.05), "--dim", "4")
    # Which it began, and leaves as it is.
    assert len(HNSW.load(tmp_path / "new.anb")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("fsync", ["always", "never", "0.01"])
def test_kill_9_again_and_again_beside_snapshots(path, fsync):
    drill(path, 5, (0, 0.3), "--fsync", fsync, "--snapshot", "3000")
