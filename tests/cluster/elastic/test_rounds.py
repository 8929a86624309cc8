"""What all do together: when it is done, and what is dropped with an epoch."""

from anabranch.cluster.elastic.rounds import Rounds


class Said(list):
    """What was noted."""

    def __call__(self, what, **details):
        self.append((what, details))


def slices(rank, why=None, version=7):
    told = {"kind": "slices", "what": f"slices of step {version}", "version": version, "folder": "kept"}
    return {**told, "file": f"rank-{rank}.slices", "why": why}


def test_it_is_done_when_the_last_has_told():
    rounds = Rounds(Said())
    done = {"kind": "done", "what": "weights"}
    assert rounds.heard(0, done, (0, 2, 5)) == {}
    # One that is no rank of the layout counts for nothing, and who tells twice is one.
    assert rounds.heard(9, done, (0, 2, 5)) == {}
    assert rounds.heard(0, done, (0, 2, 5)) == {}
    assert rounds.missing("weights", (0, 2, 5)) == [2, 5]
    assert rounds.heard(5, done, (0, 2, 5)) == {}
    assert rounds.heard(2, done, (0, 2, 5)) == dict.fromkeys((0, 2, 5), done)
    # The next one begins anew.
    assert rounds.heard(2, done, (0, 2, 5)) == {}


def test_what_was_told_in_an_older_epoch_is_nothing():
    rounds = Rounds(Said())
    for rank in (0, 1, 2):
        rounds.heard(rank, slices(rank), (0, 1, 2, 3))
    rounds.has_epoch()
    # Rank 3 is lost: files of the old cut are no checkpoint with those of the new one.
    assert rounds.heard(0, slices(0), (0, 1, 2)) == {}
    assert rounds.heard(1, slices(1), (0, 1, 2)) == {}
    files = [f"rank-{rank}.slices" for rank in range(3)]
    assert rounds.heard(2, slices(2), (0, 1, 2)) == {0: {"kind": "manifest", "files": files}}


def test_a_checkpoint_is_one_when_its_manifest_is_written_and_not_before():
    said = Said()
    rounds = Rounds(said)
    rounds.heard(4, slices(4), (4, 1))
    assert rounds.heard(1, slices(1), (4, 1)) == {4: {"kind": "manifest", "files": ["rank-4.slices", "rank-1.slices"]}}
    assert rounds.newest is None
    assert not said
    # All wait for the first rank then.
    assert rounds.missing("slices of step 7", (4, 1)) == [4]
    manifest = {"kind": "manifest", "version": 7, "folder": "kept", "why": None}
    saved = {"kind": "saved", "why": None}
    assert rounds.heard(4, manifest, (4, 1)) == dict.fromkeys((4, 1), saved)
    assert rounds.newest == "kept (step 7)"
    assert said == [("saved", {"version": 7, "why": None})]


def test_who_could_not_write_is_told_to_all():
    rounds = Rounds(Said())
    rounds.wrote("before", 3)
    rounds.heard(1, slices(1, "OSError: no room"), (0, 1))
    answer = {"kind": "saved", "why": "rank 1: OSError: no room"}
    assert rounds.heard(0, slices(0), (0, 1)) == dict.fromkeys((0, 1), answer)
    manifest = {"kind": "manifest", "version": 7, "folder": "kept", "why": "OSError: no room"}
    answer = {"kind": "saved", "why": "rank 0: OSError: no room"}
    assert rounds.heard(0, manifest, (0, 1)) == dict.fromkeys((0, 1), answer)
    assert rounds.newest == "before (step 3)"
