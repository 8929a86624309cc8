"""``anabranch graph peer`` between real processes, and items in ``anabranch graph rank``."""

import json
import re
import signal
import subprocess
import sys

import pytest

from anabranch.graph.rank import Peer


@pytest.fixture
def facts(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        code, out, err = here("graph", *arguments, "--json", "--quiet")
        assert code == 0, err
        return json.loads(out)

    return command


def start(folder, *arguments):
    """A peer in a process of its own, once it listens, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "anabranch", "graph", "peer", *arguments, "--every", "0.2", "--json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    found = re.search(r" listens on (127\.0\.0\.1:\d+)\n", line)
    assert found, line + process.stderr.read()
    return process, found[1]


def ended(process):
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    return json.loads(out)


def test_clicks_reach_a_peer_that_nobody_named(facts, tmp_path):
    ann, place = start(tmp_path, "ann.db", "--click", "jazz=i1", "--click", "jazz=i2", "--click", "jazz=i2")
    bob, second = start(tmp_path, "bob.db", "--peer", place, "--click", "jazz=i2")
    try:
        # Bob has Ann's clicks by now or asks again; Cat knows Bob alone.
        for _ in range(50):
            options = ("--rounds", 2, "--every", 0.05, "--isolation", 1, "--search", "jazz")
            found = facts("peer", "cat.db", "--peer", second, *options)
            if found["rows"] >= 4:
                break
    finally:
        told = [ended(process) for process in (ann, bob)]
    assert [one["item"] for one in found["rankings"]["jazz"]] == ["i2", "i1"]
    assert found["refused"] == {}
    assert found["node"] == "cat"
    assert [one["node"] for one in told] == ["ann", "bob"]
    # What was heard is kept.
    again = facts("peer", "cat.db", "--rounds", 0, "--isolation", 1, "--search", "jazz")
    assert again["rankings"] == found["rankings"]
    assert (again["pulls"], again["rows"]) == (0, found["rows"])


def test_signed_clicks(facts, tmp_path):
    pytest.importorskip("cryptography")
    first = facts("peer", "a.db", "--key", "a.key", "--click", "jazz=1", "--rounds", 0, "--search", "jazz")
    assert first["node"].startswith("ed25519:")
    assert first["rankings"]["jazz"][0]["item"] == 1
    again = facts("peer", "a.db", "--key", "a.key", "--rounds", 0)
    assert (again["node"], again["rows"]) == (first["node"], 1)
    assert (tmp_path / "a.key").stat().st_mode & 0o077 == 0


def test_a_library_names_items(facts, tmp_path):
    (tmp_path / "items.csv").write_text("id,title,artist,tags\n7,Blue Train,Coltrane,jazz; sax\n8,Symphony,Mahler,\n")
    found = facts("peer", "a.db", "--items", "items.csv", "--click", "late=8", "--rounds", 0, "--search", "jazz")
    assert [one["item"] for one in found["rankings"]["jazz"]] == [7]
    (tmp_path / "clicks.csv").write_text("node,term,item\nann,jazz,8\nann,jazz,8\nbob,jazz,7\n")
    plain = facts("rank", "clicks.csv", "jazz")
    assert [one["item"] for one in plain["rankings"]["jazz"]] == [8, 7]
    ranked = facts("rank", "clicks.csv", "jazz", "--items", "items.csv")
    assert [one["item"] for one in ranked["rankings"]["jazz"]] == [7, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("peer a.db --peer nowhere", "write HOST:PORT"),
        ("peer a.db --listen 127.0.0.1:70000", "a port of 0 to 65535"),
        ("peer a.db --click jazz", "write TERM=ITEM"),
        ("peer a.db --peer 127.0.0.1:1 --rounds 1", "no peer answered: cannot reach 127.0.0.1:1"),
        ("peer a.db --isolation -1 --rounds 0", "F is -1"),
        ("peer other.db --name someone --rounds 0", "holds the log of 'ann', not of 'someone'"),
        ("peer a.db --items twice.csv --rounds 0", "the item 1 is there twice"),
        ("peer a.db --items none.csv --rounds 0", "there is no file none.csv"),
        ("peer clicks.csv --rounds 0", "cannot use clicks.csv as a store of rows"),
        ("rank clicks.csv jazz --items twice.csv", "twice"),
    ],
)
def test_mistakes(here, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "twice.csv").write_text("id,title\n1,a\n1,b\n")
    (tmp_path / "clicks.csv").write_text("node,term,item\n" + "ann,jazz,8\n" * 200)
    Peer(node_id="ann", store=tmp_path / "other.db").close()
    code, out, err = here("graph", *arguments.split(), "--quiet")
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), err
    assert message in err
