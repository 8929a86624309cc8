"""A relay passes on what it gets, all of it and in order, and ends when either side does."""

import socket
import threading

import pytest
import torch

from anabranch.cluster.pccl import Reduction
from anabranch.cluster.pccl.relay import Relay
from anabranch.errors import InputError
from pccl_peers import Peer, a_master
from ports import held_port


def echo(server):
    sock, _ = server.accept()
    with sock:
        while data := sock.recv(4096):
            sock.sendall(data)


@pytest.mark.parametrize("settings", [{}, {"delay_s": 0.01, "window": 100}, {"rate": 1e6}])
def test_bytes_come_back_as_they_went(settings):
    sent = bytes(range(256)) * 40
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=echo, args=(server,))
        thread.start()
        with (
            Relay(server.getsockname(), **settings) as relay,
            socket.create_connection(("127.0.0.1", relay.port)) as sock,
        ):
            sock.settimeout(60)
            sender = threading.Thread(target=lambda: (sock.sendall(sent), sock.shutdown(socket.SHUT_WR)))
            sender.start()
            back = b""
            while data := sock.recv(4096):
                back += data
            sender.join()
        thread.join(60)
    assert back == sent


def test_who_calls_nobody_is_told():
    with (
        held_port() as port,
        Relay(("127.0.0.1", port)) as relay,
        socket.create_connection(("127.0.0.1", relay.port)) as sock,
    ):
        sock.settimeout(60)
        assert sock.recv(1) == b""


def test_peers_reduce_over_a_long_way():
    """Each is reached through a relay, whose address it gives."""

    def work(number, peers):
        values = [torch.full((2000,), number + tag + 1.0) for tag in range(4)]
        peers.all_reduce_many([Reduction(value, tag=tag) for tag, value in enumerate(values)])
        return [value[0].item() for value in values]

    relays = []
    with held_port() as first, held_port() as second, a_master() as master:
        try:
            peers = []
            for number, port in enumerate((first, second)):
                relays.append(Relay(("127.0.0.1", port), delay_s=0.005, window=1 << 14))
                settings = {"listen": f"127.0.0.1:{port}", "advertise": f"127.0.0.1:{relays[-1].port}", "pool": 2}
                peers.append(Peer(master.address, work, number, 2, **settings))
            assert [peer.wait().value for peer in peers] == [[3.0, 5.0, 7.0, 9.0]] * 2, [peer.error for peer in peers]
        finally:
            for relay in relays:
                relay.close()


def test_what_cannot_be_is_told():
    for wrong in ({"delay_s": -1}, {"window": 0}, {"rate": 0}):
        with pytest.raises(InputError):
            Relay(("127.0.0.1", 1), **wrong)
