"""`Limits`: how much one request may ask for, and how many there may be; `Writes`: how changes are taken."""

from dataclasses import dataclass, fields

from anabranch.errors import InputError
from anabranch.graph.live.index import FSYNC, SNAPSHOT_BYTES

LEAST_ANSWERS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server allows. Beyond a limit a request gets a clear 4xx answer, and costs next to nothing.

    Attributes:
        body_bytes: of a request.
        bodies_bytes: of all bodies that come, or wait to be computed; more get 429. One address may have half of what others leave; where
            room is short, a body that has been coming for more than 2 s gives way. None is 128 MiB, or four times ``body_bytes`` if that
            is more.
        batch: vectors, ids or seed sets in one request.
        k: results of each.
        ef: width of a search.
        seeds: nodes in one seed set.
        concurrency: requests computed at a time, each on one thread.
        waiting: requests that may wait for one of those threads; more get 429.
        timeout_s: seconds a request may take, waiting and its body included; then 503 (408 for a body that does not come).
        stop_s: seconds that a stop waits for requests under way.
        answer_names: characters of all names in one answer.
        answers_bytes: of all answers that are made (by what they will take, as far as it is known before), or not read yet; more get 429.
            One address may have half of what others leave; where room is short, an answer that has been read for more than 2 s gives way,
            and its connection is cut off.
        connections: open at once, or as many as the process may open files; 503 on those beyond, for all but ``/healthz``. One address
            may have three quarters of what others leave; one that is idle gives way.
        stall_s: seconds after which a connection is cut off that has not sent the whole head of a request, or is behind with reading and
            takes less than 4 KiB a second. In `run` only: another ASGI server has bounds of its own.

    Raises InputError for a value that is not positive (``waiting`` may be 0), for ``bodies_bytes`` below four times ``body_bytes``, and for
    ``answers_bytes`` below 1 MiB.
    """

    body_bytes: int = 8 << 20
    bodies_bytes: int | None = None
    batch: int = 1024
    k: int = 1000
    ef: int = 10_000
    seeds: int = 1000
    concurrency: int = 2
    waiting: int = 64
    timeout_s: float = 10.0
    stop_s: float = 30.0
    answer_names: int = 64 << 20
    answers_bytes: int = 256 << 20
    connections: int = 1024
    stall_s: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "waiting" else 1
            if field.name == "bodies_bytes" and value is None:
                continue
            if field.name.endswith("_s"):
                if not 0 < value < float("inf"):
                    raise InputError(f"{field.name} is {value}; it must be a positive number of seconds")
            elif isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{field.name} is {value!r}; it must be a whole number of at least {least}")
        if self.answers_bytes < LEAST_ANSWERS:
            raise InputError(f"answers_bytes is {self.answers_bytes:,}; it must be at least {LEAST_ANSWERS:,}")
        if self.bodies_bytes is not None and self.bodies_bytes < 4 * self.body_bytes:
            raise InputError(
                f"bodies_bytes is {self.bodies_bytes:,}; it must be at least {4 * self.body_bytes:,}, four times body_bytes, so that "
                "beside an address that takes all it may there is room for one of any size"
            )

    @property
    def room_for_bodies(self) -> int:
        """``bodies_bytes``, or what stands in place of it."""
        return max(128 << 20, 4 * self.body_bytes) if self.bodies_bytes is None else self.bodies_bytes


@dataclass(frozen=True, kw_only=True)
class Writes:
    """How a server takes changes of its index of vectors.

    Attributes:
        fsync: when they are brought to the disk, as of `LiveIndex.open`.
        snapshot_bytes: size of the log beyond which a snapshot is written and a new log begun.
        vectors: most that the index may hold; None for as many as there is memory for.
        token: who changes something sends it, as ``Authorization: Bearer TOKEN``; None lets every program of this machine.

    Raises InputError for a value that makes no sense.
    """

    fsync: str | float = "always"
    snapshot_bytes: int = SNAPSHOT_BYTES
    vectors: int | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        if self.fsync not in FSYNC and (isinstance(self.fsync, str | bool) or not 0 < self.fsync < float("inf")):
            raise InputError(f"fsync is {self.fsync!r}; it must be always, never, or a positive number of seconds")
        for name in ("snapshot_bytes", "vectors"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least 1")
