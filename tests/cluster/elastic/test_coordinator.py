"""A coordinator over more than one training; what it decides in one is in ``test_decisions.py``."""

import threading

import pytest
import torch
from torch import nn

from anabranch.cluster.elastic import Coordinator, ElasticTrainer
from anabranch.errors import InputError, PeerError
from waiting import until


def rank_of(host, weight=0.5, **given):
    layer = nn.Linear(2, 1)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, weight)
    return ElasticTrainer(
        [layer],
        global_batch=2,
        optimizer_factory=torch.optim.SGD,
        loss=nn.functional.mse_loss,
        coordinator=host.address,
        **given,
    )


BATCH = (torch.ones(2, 2), torch.zeros(2, 1))


def what(host):
    return [one for _, one, _ in host.history]


def trained(host, steps, *, is_done=True, weight=0.5):
    rank = rank_of(host, weight)
    while rank.steps < steps:
        rank.step(BATCH)
    rank.close(is_done=is_done)
    return rank


def test_where_training_has_stopped_another_begins_as_often_as_it_may():
    with Coordinator(replicas=1, stages=1, restarts=1) as host:
        trained(host, 2, is_done=False)
        until(lambda: "anew" in what(host) and (host.stopped, host.restarts, host.version) == (None, 0, 0))
        # Of other weights: nothing of the one before is left. It goes on from wherever it says.
        trained(host, 1, is_done=False, weight=0.25)
        until(lambda: host.stopped is not None)
        assert "no rank is left" in host.stopped
        with pytest.raises(PeerError, match="training has stopped"):
            trained(host, 1)
    assert what(host).count("anew") == 1


def test_who_had_a_part_in_what_has_stopped_has_none_in_what_follows():
    """A rank that lives is told that training has stopped, and its name is given to another."""
    with Coordinator(replicas=2, stages=1, restarts=1) as host:
        made, told = [], []

        def wait():
            try:
                made.append(rank_of(host, wish=1))
                made[0].step(BATCH)
            except PeerError as error:
                told.append(str(error))

        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: 1 in host.ranks)
        first = rank_of(host, wish=0)
        with host._lock:
            host._decisions._stop("as a test wants it")
            host._begin_anew()
        with pytest.raises(PeerError, match="as a test wants it"):
            first.step(BATCH)
        thread.join(60)
        assert told == ["as a test wants it"]
        assert (host.ranks, host.stopped) == ((), None)
        for one in (first, *made):
            one.close()
        # Their ends are not those of ranks of the next one.
        thread = threading.Thread(target=lambda: trained(host, 1))
        thread.start()
        trained(host, 1)
        thread.join(60)
        assert host.wait_for(lambda host: host.has_ended)
    assert [details["rank"] for _, one, details in host.history if one == "lost"] == []


@pytest.mark.parametrize("way", ["stopped", "cast out"])
def test_whoever_speaks_before_it_is_told_of_its_end_is_told_all_the_same(way, monkeypatch):
    """A beat that came meanwhile closed the connection, and with it went what was to be sent: why training had stopped."""
    with Coordinator(replicas=1, stages=1, restarts=1) as host:
        rank = rank_of(host)
        with host._lock:
            (member,) = host._decisions.members.values()
            channel, closed = member.channel, []
            close = channel.close
            monkeypatch.setattr(
                channel, "close", lambda *told, **how: (closed.append((told, how)), close(*told, **how))
            )
            if way == "stopped":
                host._decisions._stop("as a test wants it")
                host._begin_anew()
            else:
                host._decisions._cast_out([member.rank], "as a test wants it")
            before = list(closed)
            host._on_frame(channel, {"kind": "beat", "epoch": 0, "waits": None, "is_long": False}, b"")
            assert closed == before
        if way == "stopped":
            with pytest.raises(PeerError, match="as a test wants it"):
                rank.step(BATCH)
        rank.close()


def test_whoever_speaks_as_the_coordinator_is_closed_is_told_that_it_was(monkeypatch):
    host = Coordinator(replicas=1, stages=1)
    rank = rank_of(host)
    (member,) = host._decisions.members.values()
    channel, send = member.channel, member.channel.send

    def send_late(header, *body):
        # What the rank says meanwhile comes when it is nobody's member any more.
        host._on_frame(channel, {"kind": "beat", "epoch": 0, "waits": None, "is_long": False}, b"")
        send(header, *body)

    monkeypatch.setattr(channel, "send", send_late)
    host.close()
    with pytest.raises(PeerError, match="the coordinator was closed"):
        rank.step(BATCH)
    rank.close()


def test_a_number_that_is_none_is_refused():
    with pytest.raises(InputError, match="restarts is -1; use at least 0"):
        Coordinator(replicas=1, stages=1, restarts=-1)
