"""The pool: who may enter, who may see, what must go."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.routers.contract.query import Query
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.ic_cache.example import Traits, literals
from anabranch.routers.ic_cache.pool import ExamplePool, domain_of, namespace
from anabranch.routers.ic_cache.redact import redact_personal
from anabranch.routers.retrieve import Clustered, Exact, Hnsw

EMBEDDER = Hashed.Config(dim=64).build()


def make_pool(index=None, redact=redact_personal, **fields):
    config = ExamplePool.Config(**{"domains": ("",), "trust": {"large": 1}, **fields})
    return ExamplePool(config, (index or Exact.Config()).build(64), redact=redact)


def admit(pool, text, answer="an answer", model="large", now_s=0.0, quality=None, store=True, vector_D=None, **fields):
    return pool.admit(
        Query(text=text, **fields),
        answer,
        model,
        now_s=now_s,
        embed=EMBEDDER.embed,
        quality=quality,
        store=store,
        vector_D=vector_D,
    )


def search(pool, text, k=10, now_s=0.0, **fields):
    return pool.search(Query(text=text, **fields), EMBEDDER.embed([text])[0], k, now_s=now_s)


def test_by_hand():
    pool = make_pool()
    assert admit(pool, "count lines of a file", "wc -l f").id == 0
    assert admit(pool, "delete a folder", "rm -r d").id == 1
    examples, similarity = search(pool, "count lines of a file")
    assert [example.id for example in examples] == [0, 1]
    assert similarity[0] == pytest.approx(1, abs=1e-6)
    assert pool.size_bytes == sum(map(len, ("count lines of a file", "wc -l f", "delete a folder", "rm -r d")))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"store": False}, "sender forbids it"),
        ({"task": "law"}, "domain has not opted in"),
        ({"model": "small"}, "model is not trusted"),
        ({"model": "unheard of"}, "model is not trusted"),
        ({"answer": "  "}, "nothing in it"),
        ({"answer": "x" * 200}, "too large"),
    ],
)
def test_what_may_not_enter(how, reason):
    pool = make_pool(max_example_bytes=100, trust={"large": 1, "small": 0})
    admission = admit(pool, "a request", **how)
    assert (admission.id, admission.reason) == (None, reason)
    assert len(pool) == len(pool.index) == 0


def test_domains_opt_in_one_by_one_or_all():
    pool = make_pool(domains=("code",))
    assert admit(pool, "x y", task="code").id is not None
    assert admit(pool, "x y").reason == "domain has not opted in"
    assert admit(make_pool(domains=("*",)), "x y", task="anything").id is not None
    assert admit(make_pool(domains=()), "x y").id is None


def test_trust_is_a_level():
    pool = make_pool(trust={"a": 1, "b": 2, "c": 3}, min_trust=2)
    assert [admit(pool, f"request {m}", model=m).id is not None for m in "abc"] == [False, True, True]


def test_no_example_crosses_tenant_or_domain_in_ten_thousand_requests():
    random = np.random.default_rng(0)
    for index in (Exact.Config(), Clustered.Config(probes=2), Hnsw.Config()):
        pool = make_pool(index, domains=("*",))
        tenants, domains = ["a", "b", "a\x1fb", 'a", "b', ""], ["", "x", "y", 'x", "z']
        words = "list sort count find copy move print show files lines folders users".split()
        for _ in range(300):
            text, whose = " ".join(random.choice(words, 4)), {"tenant": str(random.choice(tenants))}
            admit(pool, text, task=str(random.choice(domains)), **whose)
        texts = [" ".join(random.choice(words, 4)) for _ in range(100)]
        vectors = EMBEDDER.embed(texts)
        for _ in range(4000 if index.owner is Exact else 3000):
            at = int(random.integers(100))
            query = Query(text=texts[at], tenant=str(random.choice(tenants)), task=str(random.choice(domains)))
            examples, _ = pool.search(query, vectors[at], 5, now_s=0.0)
            assert {(e.tenant, e.domain) for e in examples} <= {(query.tenant, domain_of(query))}
            assert examples


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4)), min_size=2, max_size=6, unique=True))
def test_namespaces_differ_where_tenant_or_domain_do(pairs):
    assert len({namespace(*pair) for pair in pairs}) == len(pairs)


def test_expired_examples_are_not_shown_and_then_go():
    pool = make_pool(ttl_s=10)
    for number in range(5):
        admit(pool, f"list files {number}", now_s=float(number))
    shown = [example.id for example in search(pool, "list files!", k=2, now_s=12.5)[0]]
    assert sorted(shown) == [3, 4]  # 0, 1 and 2 are past 10, 11 and 12
    assert pool.expire(12.5) == 3
    assert len(pool) == len(pool.index) == 2
    assert make_pool(ttl_s=None).config.ttl_s is None


def test_the_same_request_replaces_the_answer_and_keeps_the_record():
    pool = make_pool(trust={"large": 1, "huge": 2})
    admit(pool, "List files!", "ls", quality=0.5)
    pool.get(0).offloads = 7.0
    assert admit(pool, "list  files!", "ls -l", quality=0.4).reason == "a better answer is there"
    assert admit(pool, "list files!", "ls -la", quality=0.9).id == 1
    assert [(e.id, e.response, e.offloads) for e in pool] == [(1, "ls -la", 7.0)]
    assert admit(pool, "list files!", "dir", model="huge", quality=0.1).id == 2  # trusted more
    assert admit(pool, "list files!", "ls", quality=1.0).reason == "a better answer is there"
    assert len(pool) == len(pool.index) == 1


def test_personal_data_is_redacted_before_it_is_kept_or_embedded():
    pool = make_pool()
    seen = []

    def embed(texts):
        seen.extend(texts)
        return EMBEDDER.embed(texts)

    query = Query(text="write to ann@example.org about invoice 7")
    own = EMBEDDER.embed([query.text])[0]
    assert (
        pool.admit(query, "mail ann@example.org", "large", now_s=0.0, vector_D=own).reason
        == "no vector of what is kept"
    )
    assert pool.admit(query, "mail ann@example.org", "large", now_s=0.0, vector_D=own, embed=embed).id == 0
    assert seen == ["write to [email] about invoice 7"]
    assert pool.get(0).response == "mail [email]"
    assert not np.allclose(pool.index.vectors([0])[0], own)


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("mail a.b+c@d-e.co.uk now", "mail [email] now"),
        ("call +41 44 268 12 34 today", "call [phone] today"),
        ("card 4111 1111 1111 1111.", "card [card]."),
        ("ssn 123-45-6789", "ssn [ssn]"),
        ("from 10.0.12.7 to x", "from [ip] to x"),
        ("key sk-abcdefghij0123456789", "key [key]"),
        ("pay CH93 0076 2011 6238 5295 7 please", "pay [iban] please"),
        (
            "files older than 7 days in /tmp/2024-05-01/log.txt, mode 755",
            "files older than 7 days in /tmp/2024-05-01/log.txt, mode 755",
        ),
    ],
)
def test_redaction_by_hand(text, redacted):
    assert redact_personal(text) == redacted


def test_erasure_removes_from_pool_index_and_caches_of_prompts():
    pool, told = make_pool(domains=("*",)), []
    pool.on_removed.append(told.append)
    for number in range(12):
        admit(pool, f"request number {number}", tenant="ab"[number % 2], user="xyz"[number % 3], task=f"d{number % 2}")
    assert pool.forget(tenant="a", user="x") == {0, 6}
    assert pool.forget(tenant="b", ids=[0, 1, 2, 3, 6]) == {1, 3}  # ids of others are passed over
    assert told == [{0, 6}, {1, 3}]
    assert sorted(e.id for e in pool) == [2, 4, 5, 7, 8, 9, 10, 11]
    assert all(id not in pool.index for id in (0, 1, 3, 6))
    assert pool.forget(tenant="a") == {2, 4, 8, 10}
    assert pool.forget(tenant="nobody") == set()
    assert admit(pool, "request number 0", tenant="a").id == 12  # ids are not used again


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_bytes_and_index_agree_after_any_changes(data):
    pool = make_pool(domains=("*",), max_bytes=400, ttl_s=50.0)
    now = 0.0
    for _ in range(data.draw(st.integers(1, 25))):
        now += data.draw(st.floats(0, 20))
        what = data.draw(st.integers(0, 4))
        if what <= 2:
            text = data.draw(st.text("ab c", min_size=1, max_size=30))
            whose = {"tenant": data.draw(st.sampled_from("pq")), "user": data.draw(st.sampled_from("uv"))}
            admit(pool, text, data.draw(st.text("xy", max_size=60)), now_s=now, **whose)
        elif what == 3:
            pool.forget(tenant=data.draw(st.sampled_from("pq")), user=data.draw(st.sampled_from("uv")))
        else:
            pool.expire(now)
        assert pool.size_bytes == sum(e.size_bytes for e in pool) <= 400
        assert len(pool.index) == len(pool) == len({(e.tenant, e.request.lower()) for e in pool})


def test_full_pool_refuses_where_nobody_makes_room():
    pool = make_pool(max_bytes=60)
    assert admit(pool, "a" * 20, "b" * 20).id == 0
    assert admit(pool, "c" * 20, "d" * 20).reason == "pool is full"
    room = pool.admit(
        Query(text="c" * 20),
        "d" * 20,
        "large",
        now_s=0.0,
        embed=EMBEDDER.embed,
        make_room=lambda missing: pool.remove([0]),
    )
    assert room.id == 1
    assert pool.size_bytes == 40


def test_an_admission_that_fails_changes_nothing():
    pool = make_pool(max_bytes=60)
    admit(pool, "a" * 20, "b" * 20)
    with pytest.raises(InputError, match="vector has shape"):
        admit(pool, "a" * 20, "new", vector_D=np.ones(3))
    with pytest.raises(InputError, match="not finite"):
        admit(pool, "a" * 20, "new", vector_D=np.full(64, np.nan))
    assert admit(pool, "a" * 20, "c" * 45).reason == "too large"
    assert admit(pool, "A" * 20, "d" * 38).id == 1  # fits once the older answer has gone
    assert [(e.id, e.size_bytes) for e in pool] == [(1, 58)]
    assert len(pool.index) == 1


def test_state_reads_back_and_reindex_changes_the_dimension():
    pool = make_pool(domains=("*",))
    for number in range(30):
        admit(pool, f"find the file {number}", f"find -name {number}", task=f"d{number % 2}", quality=0.5)
    arrays, facts = pool.state()
    other = make_pool(domains=("*",))
    other.load_state(arrays, json.loads(json.dumps(facts)))
    assert [e.to_dict() for e in other] == [e.to_dict() for e in pool]
    assert other.size_bytes == pool.size_bytes
    assert (
        search(other, "find the file 7", task="d1")[1].tolist()
        == search(pool, "find the file 7", task="d1")[1].tolist()
    )
    wide = Hashed.Config(dim=128).build()
    pool.reindex(Exact.Config().build(128), wide.embed)
    found, _ = pool.search(Query(text="", task="d1"), wide.embed(["find the file 7"])[0], 1, now_s=0.0)
    assert found[0].request == "find the file 7"
    with pytest.raises(InputError, match="no example 99"):
        pool.get(99)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('find "a b" in /usr/lib, *.txt and file_7.', {"a b", "/usr/lib", "*.txt", "file_7"}),
        ("list all files", set()),
        ("chmod 755 for $HOME/x.", {"755", "$HOME/x"}),
        ("kill process 42", {"42"}),
        ("run 'ls -l' on ~/b", {"ls -l", "~/b"}),
    ],
)
def test_literals_by_hand(text, found):
    assert literals(text) == found


# Quadratic in a word; kept to compare with.
OLD = re.compile(r'"[^"\n]+"|\'[^\'\n]+\'|\S*[\w*~$][/._*@$~\d-]\S*|\S*[/._*@$~\d-][\w*~$]\S*|\d')


@given(st.text(alphabet="\"'a1 \n.-*(?,\u00b2\u0663", max_size=14))
def test_literals_are_what_the_pattern_says(text):
    found = (match.strip("\"'()[]{},;:").rstrip(".?!") for match in OLD.findall(text))
    assert literals(text) == {item for item in found if item}


@pytest.mark.parametrize(
    "text", ["a" * 2_000_000, "(" * 2_000_000, '""' * 300_000, "\"a\"'b'(" * 100_000, "a'" * 300_000]
)
def test_literals_of_one_long_word_are_found_in_linear_time(text):
    assert len(literals(text)) <= 3


def test_traits_are_those_of_the_text():
    assert Traits.of("Copy a.txt to A.TXT") == Traits(
        frozenset({"copy", "a", "txt", "to"}), frozenset({"a.txt", "A.TXT"}), 19
    )
