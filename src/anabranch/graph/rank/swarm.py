"""Several peers in processes of their own that talk over loopback: the protocol as it is, to be tried and measured on one machine."""

import asyncio
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from anabranch.errors import BackendError, InputError
from anabranch.graph.rank.items import library
from anabranch.graph.rank.peer import Peer
from anabranch.graph.rank.transport import Address, GossipServer


def run_swarm(
    num_peers: int = 20, clicks: int = 5, *, F: float = 1.0, seed: int = 0, timeout: float = 120.0
) -> dict[str, Any]:
    """Start peers, let each search, click and pull from a random other ``clicks`` times, then from all, and compare what they hold.

    Each holds a tenth of the made-up library and joins through one that started before it.

    Returns:
        ``peers``; ``rows``, made by all; ``agreed``, whether all end with the same rows; ``errors``, refused requests; ``bytes``, sent by
        all; ``largest_log_bytes``; ``seconds``, without starting the processes.

    Raises:
        InputError: fewer than 2 peers or no clicks. BackendError: a process did not do its part in time.
    """
    if num_peers < 2 or clicks < 1:
        raise InputError(f"num_peers is {num_peers} and clicks {clicks}; a swarm has at least 2 peers and 1 click each")
    context = multiprocessing.get_context("spawn")
    lines: list[Connection] = []
    processes = []
    try:
        for number in range(num_peers):
            mine, theirs = context.Pipe()
            process = context.Process(target=_peer, args=(theirs, number, num_peers, clicks, F, seed), daemon=True)
            process.start()
            theirs.close()
            lines.append(mine)
            processes.append(process)
        addresses = [_receive(line, timeout) for line in lines]
        begin = time.perf_counter()
        for order in (addresses, "pull from all"):
            for line in lines:
                line.send(order)
            answers = [_receive(line, timeout) for line in lines]
        seconds = time.perf_counter() - begin
        for line in lines:
            line.send("done")
    finally:
        for process in processes:
            process.join(5)
            process.kill()
            process.join()
        for line in lines:
            line.close()
    keys = [answer["rows"] for answer in answers]
    return {
        "peers": num_peers,
        "rows": len(set().union(*keys)),
        "agreed": all(key == keys[0] for key in keys) and len(keys[0]) == num_peers * clicks,
        "errors": sum(answer["errors"] for answer in answers),
        "bytes": sum(answer["bytes"] for answer in answers),
        "largest_log_bytes": max(answer["log_bytes"] for answer in answers),
        "seconds": seconds,
    }


def _receive(line: Connection, timeout: float) -> Any:
    try:
        if line.poll(timeout):
            return line.recv()
        raise BackendError(f"a process of the swarm did not answer within {timeout:g} s")
    except EOFError:
        raise BackendError(
            "a process of the swarm ended before its time; what it wrote to standard error says why"
        ) from None


def _peer(line: Connection, number: int, num_peers: int, clicks: int, F: float, seed: int) -> None:
    """One process."""
    asyncio.run(_live(line, number, num_peers, clicks, F, seed))


async def _live(line: Connection, number: int, num_peers: int, clicks: int, F: float, seed: int) -> None:
    generator = np.random.default_rng([seed, number])
    items = library(seed=seed)
    held = generator.choice(len(items), len(items) // 10, replace=False)
    terms = sorted({tag for item in items for tag in item.tags})
    peer = Peer([items[place] for place in held], f"peer-{number}", F, seed=seed)
    async with GossipServer(peer, timeout=30.0) as server:
        line.send(server.address)
        addresses: list[Address] = await asyncio.to_thread(line.recv)
        if number:
            await server.bootstrap(addresses[generator.integers(number)])
        for _ in range(clicks):
            results = peer.query(terms[generator.integers(len(terms))])
            if results.items:
                peer.click(results.qid, results.items[0])
            else:
                # Nothing of it is known here: the user brings an item along.
                item = items[generator.integers(len(items))]
                peer.record(item.tags[0], item.id)
            other = int((number + generator.integers(1, num_peers)) % num_peers)
            await server.pull(addresses[other])
        line.send("clicked")
        await asyncio.to_thread(line.recv)
        for other, address in enumerate(addresses):
            if other != number:
                await server.pull(address)
        log = peer.log
        rows = sorted(row.key for row in log.all_rows())
        errors = sum(server.errors.values())
        line.send({"rows": rows, "errors": errors, "bytes": server.sent_bytes, "log_bytes": log.num_bytes})
        await asyncio.to_thread(line.recv)
