"""The protocol over TCP: a `GossipServer` answers for a `Peer`, and asks others for it.

A message is four bytes of length, big-endian, and that many of JSON. A connection carries one request and one answer:

    {"type": "pull", "from": node, "at": [host, port], "since": vector, "part": [[origin, number], [origin, number]]}
                                                                               -> {"type": "rows", "from", "rows", "more", "peers"}
    {"type": "bootstrap", "from": node, "at": [host, port], "share": 0.1}      -> the same
    {"type": "push", "from": node, "at": [host, port], "rows": [...]}          -> {"type": "taken", "added": n, "vector": vector}
    anything else, malformed or too long                                       -> {"type": "error", "message": text}, and the
    connection closes

A vector that one message does not hold is asked with in parts: ``part`` says of which rows, in the order of origin and number, ``since``
tells, and only those come (null in place of a start or an end; without ``part`` all). The vector of an answer may end early, too.
``at`` is where the asker listens (null if nowhere); ``peers`` are addresses the answerer knows. Nothing here trusts the other
side: lengths are checked before they are read, every wait has a limit, and a bad request costs its sender the connection and this
side nothing.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Self

from anabranch.errors import AnabranchError, DataError, InputError
from anabranch.graph.rank.peer import AROUND, Peer
from anabranch.graph.rank.results import Merged
from anabranch.graph.rank.rows import END, START, Key, check_part, dump, is_node

LENGTH = 4

# That one answer tells.
ADDRESSES = 64
LINGER = 0.5  # seconds

# That are remembered: of peers, and of how far each was asked.
PLACES = 10_000
Address = tuple[str, int]


class GossipServer:
    """A peer on the network.

    Args:
        peer: whose rows these are; used by this event loop alone.
        host: to listen on. Default: this machine only. There is no encryption: put it behind a tunnel beyond a trusted network.
        port: 0 for a free one.
        timeout: seconds that a connection may take.
        max_connections: at once; further ones are told so and closed.

    Use it as ``async with GossipServer(peer) as server:``.

    Attributes:
        address: where it listens, once it does.
        addresses: of peers, by name, as they told.
        received_bytes: of messages.
        sent_bytes: of messages.
        errors: requests that were refused, by reason.
    """

    def __init__(
        self, peer: Peer, host: str = "127.0.0.1", port: int = 0, *, timeout: float = 10.0, max_connections: int = 64
    ) -> None:
        if not timeout > 0 or max_connections < 1:
            raise InputError(f"timeout is {timeout} and max_connections {max_connections}; both must be positive")
        self.peer, self.host, self.port, self.timeout, self.max_connections = peer, host, port, timeout, max_connections
        self.address: Address | None = None
        self.addresses: dict[str, Address] = {}
        self.received_bytes = self.sent_bytes = 0
        self.errors: dict[str, int] = {}
        # Where the next question to an address begins, if the last one ended early.
        self._next: dict[Address, Key] = {}
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[Any]] = set()

    async def start(self) -> Self:
        """Listen. Raises InputError if the address cannot be listened on."""
        try:
            self._server = await asyncio.start_server(self._serve, self.host, self.port)
        except OSError as error:
            raise InputError(f"cannot listen on {self.host}:{self.port}: {error.strerror or error}") from error
        name = self._server.sockets[0].getsockname()
        self.address = (name[0], name[1])
        return self

    async def close(self) -> None:
        """Stop listening; answers under way have until the timeout."""
        if self._server is not None:
            self._server.close()
            if self._open:
                await asyncio.wait(self._open)
            await self._server.wait_closed()
            self._server = None

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # Asking others

    async def pull(self, address: Address) -> Merged:
        """Ask a peer for the rows this one lacks, and merge them.

        Where one message does not hold what this one has (logs with very many gaps), it is about a part of all rows, and the next one
        about those behind them.

        Raises DataError if it is not there, does not answer in time, or answers nonsense.
        """
        begin = self._next.get(address, START)
        since, end = self.peer.log.part(begin, self._room)
        request: dict[str, Any] = {"type": "pull", "since": since}
        if (begin, end) != (START, END):
            request["part"] = [None if begin == START else begin, None if end == END else end]
        merged = self._take_rows(await self._ask(address, request), address)
        self._next.pop(address, None)
        if end != END:
            self._next[address] = end
            if len(self._next) > PLACES:
                del self._next[next(iter(self._next))]
        return merged

    @property
    def _room(self) -> int:
        """Bytes of a message that are left for a vector."""
        return self.peer.defences.max_message_bytes - AROUND

    async def bootstrap(self, address: Address, share: float = 0.1) -> Merged:
        """Join through a peer: a random share of its log. Raises as `pull`."""
        return self._take_rows(await self._ask(address, {"type": "bootstrap", "share": share}), address)

    async def push(self, address: Address, since: Mapping[str, Any] | None = None) -> int:
        """Send a peer the rows that ``since`` lacks, unasked; how many it took. Raises as `pull`."""
        message = self.peer.make_reply(since or {})
        answer = await self._ask(address, {"type": "push", "rows": message["rows"]})
        if answer.get("type") != "taken" or not isinstance(answer.get("added"), int):
            raise DataError(f"{address[0]}:{address[1]} answered a push with {str(answer)[:80]!r}")
        return int(answer["added"])

    def _take_rows(self, answer: dict[str, Any], address: Address) -> Merged:
        if answer.get("type") != "rows":
            raise DataError(f"{address[0]}:{address[1]} answered with {str(answer.get('message', answer))[:200]!r}")
        # By the address that was asked: a name is what anyone says.
        merged = self.peer.merge(answer, teller=f"{address[0]}:{address[1]}")
        self.addresses[answer["from"]] = address
        told = answer.get("peers")
        for name, place in list(told.items())[:ADDRESSES] if isinstance(told, dict) else []:
            self._note(name, place)
        return merged

    async def _ask(self, address: Address, request: dict[str, Any]) -> dict[str, Any]:
        request |= {"from": self.peer.node_id, "at": None if self.address is None else list(self.address)}
        try:
            async with asyncio.timeout(self.timeout):
                reader, writer = await asyncio.open_connection(*address)
                async with _ending(writer):
                    await self._write(writer, request)
                    return await self._read(reader)
        except TimeoutError:
            raise DataError(f"{address[0]}:{address[1]} did not answer within {self.timeout:g} s") from None
        except (OSError, EOFError) as error:
            raise DataError(f"cannot reach {address[0]}:{address[1]}: {error}") from error

    # Answering

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            async with asyncio.timeout(self.timeout), _ending(writer):
                try:
                    if len(self._open) > self.max_connections:
                        raise DataError(f"busy: {self.max_connections} connections are open")
                    answer = self._answer(await self._read(reader), writer.get_extra_info("peername"))
                except AnabranchError as error:
                    self._count_error(str(error))
                    answer = {"type": "error", "message": str(error)[:500]}
                await self._write(writer, answer)
                # Closing on what was not read would reset the connection before it is heard.
                if answer["type"] == "error":
                    writer.write_eof()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LINGER):
                            await reader.read(1 << 16)
        except (TimeoutError, OSError, EOFError, AnabranchError) as error:
            # The other side is slow or gone: its loss.
            self._count_error(type(error).__name__)
        finally:
            self._open.discard(task)

    def _count_error(self, reason: str) -> None:
        reason = reason[:120]
        if reason in self.errors or len(self.errors) < 1000:
            self.errors[reason] = self.errors.get(reason, 0) + 1

    def _answer(self, request: dict[str, Any], place: Any) -> dict[str, Any]:
        kind, asker = request.get("type"), request.get("from")
        if not is_node(asker):
            raise DataError('a request says who it is from, in "from"')
        if kind == "push":
            # The port is another for each connection.
            teller = str(place[0]) if isinstance(place, tuple) else ""
            merged = self.peer.merge({"from": asker, "rows": request.get("rows")}, solicited=False, teller=teller)
            if "unsolicited" in merged.refused:
                raise DataError("this peer takes no rows that it did not ask for")
            vector, _ = self.peer.log.part(START, self._room)
            answer: dict[str, Any] = {"type": "taken", "added": merged.added, "vector": vector}
        elif kind == "pull":
            part = check_part(request.get("part", (None, None)))
            answer = {
                "type": "rows",
                **self.peer.make_reply(request.get("since", {}), asker, part),
                "peers": self._told(),
            }
        elif kind == "bootstrap":
            share = request.get("share")
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                raise DataError("a bootstrap names its share, above 0 and at most 1")
            answer = {"type": "rows", **self.peer.make_bootstrap(share, asker), "peers": self._told()}
        else:
            raise DataError(f"no request is called {str(kind)[:40]!r}; there are pull, bootstrap and push")
        self._note(asker, request.get("at"))
        return answer

    def _told(self) -> dict[str, list[Any]]:
        """Addresses that were heard of last, as many as fit beside rows, however long their names are."""
        told: dict[str, list[Any]] = {}
        left = AROUND // 2
        for name, address in list(self.addresses.items())[: -ADDRESSES - 1 : -1]:
            left -= len(dump([name, address]))
            if left < 0:
                break
            told[name] = list(address)
        return told

    def _note(self, name: Any, place: Any) -> None:
        """Remember where a peer listens, if this can be an address."""
        if not is_node(name) or name == self.peer.node_id or not isinstance(place, list | tuple) or len(place) != 2:
            return
        host, port = place
        if isinstance(host, str) and 0 < len(host) < 256 and isinstance(port, int) and 0 < port < 65536:
            if name in self.addresses or len(self.addresses) < PLACES:
                self.addresses[name] = (host, port)
            self.peer.learn(name)

    # Frames

    async def _read(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        limit = self.peer.defences.max_message_bytes
        length = int.from_bytes(await reader.readexactly(LENGTH), "big")
        if length > limit:
            raise DataError(f"a message of {length:,} bytes is too long; the limit is {limit:,}")
        body = await reader.readexactly(length)
        self.received_bytes += LENGTH + length
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise DataError(f"a message that is no JSON: {str(error)[:100]}") from error
        if not isinstance(value, dict):
            raise DataError("a message is a JSON object")
        return value

    async def _write(self, writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
        body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        limit = self.peer.defences.max_message_bytes
        if len(body) > limit:
            raise DataError(f"a message of {len(body):,} bytes is too long to send; the limit is {limit:,}")
        writer.write(len(body).to_bytes(LENGTH, "big") + body)
        self.sent_bytes += LENGTH + len(body)
        await writer.drain()


@contextlib.asynccontextmanager
async def _ending(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Around what is said: closes the connection. What was written has been read then, or an error ends it now.

    A connection that is closed with bytes that nobody reads would stay, and keep them, for as long as the other side likes.
    """
    # So that `drain` waits for all of it.
    writer.transport.set_write_buffer_limits(0)
    try:
        yield
    except BaseException:
        writer.transport.abort()
        raise
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
