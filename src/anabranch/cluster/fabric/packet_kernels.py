"""The loops of the packet simulator: one event after the other, each a packet at a place, an acknowledgement, or a clock.

A packet is one event a hop: a link is a queue that is never reordered, so its packets leave when those before them have (``free_at``),
and how much waits in it is what it still has to send. Hosts pull: whenever a host's cable is free, the next piece in turn that has
something to send and room in its window puts one packet on it; or, first come first served, a piece puts all that its window has room for
in its host's queue at once. Acknowledgements come back after the latency of the path; or they have bytes, and wait in the queues back.
"""
# Shapes: as in `anabranch.cluster.fabric.packet_state`

from typing import Any

import numpy as np

from anabranch.cluster.fabric.kernels import go_on, kernel, pop, push
from anabranch.cluster.fabric.packet_state import (
    ACK,
    ARRIVE,
    AT_ONCE,
    BURST,
    CACHED,
    DROPS,
    EVENTS,
    FREE,
    HEARD,
    HOPS,
    LEFT,
    LINK_DOWN,
    LINK_UP,
    LOST,
    MARKS,
    MOVED,
    NACK,
    NIC,
    NOW,
    ORDER,
    OUT_OF_ORDER,
    PINNED,
    PLAIN,
    PS_PER_S,
    RECYCLED,
    RESENT,
    START,
    TIMEOUTS,
    TIMER,
)

DONE, PAUSED, FULL = 0, 1, 2
# An event's item is kind + 8 x place.
KINDS = 8


@kernel
def draw(state: Any, below: int) -> int:
    """A number from 0 up to ``below``, by Marsaglia's xorshift."""
    value = state.random[0]
    value ^= value << np.uint64(13)
    value ^= value >> np.uint64(7)
    value ^= value << np.uint64(17)
    state.random[0] = value
    return int((value >> np.uint64(33)) % np.uint64(below))


@kernel
def at(state: Any, time: int, kind: int, place: int) -> None:
    """Something will happen; there must be room in the heap."""
    state.clock[ORDER] += 1
    state.clock[EVENTS] = push(state.heap, state.clock[EVENTS], time, state.clock[ORDER], kind + KINDS * place)


@kernel
def sending_ps(link: Any, num_bytes: int) -> int:
    """How long a link takes to send so many bytes."""
    return int(num_bytes * 8.0 * PS_PER_S / link.rate + 0.5)


# Senders


@kernel
def next_number(state: Any, c: Any, place: int) -> int:
    """The packet that a piece would send next, -1 for none: the first that is not acknowledged, from where it is."""
    piece = state.pieces[place]
    number = piece.following
    if not c.in_order:
        while number < piece.num_packets and state.bits_M[piece.first_bit + number] & 2:
            number += 1
        piece.following = number
    return number if number < piece.num_packets else -1


@kernel
def flying(c: Any, piece: Any) -> int:
    """Packets that are sent and neither acknowledged nor given up."""
    return piece.following - piece.acked if c.in_order else piece.flying


@kernel
def can_send(state: Any, c: Any, place: int) -> bool:
    """Whether a piece has a packet to send, and room for it in its window, which has always room for one."""
    piece = state.pieces[place]
    if piece.active != 1 or flying(c, piece) >= max(1.0, piece.window):
        return False
    return next_number(state, c, place) >= 0


@kernel
def choose_row(state: Any, c: Any, place: int) -> int:
    """The path of the next packet: the pinned one, a recycled one, or any."""
    piece = state.pieces[place]
    if piece.path >= 0:
        return piece.first_row + piece.path
    if c.mode == RECYCLED and piece.cached > 0:
        row = piece.first_row + state.cache_QC[CACHED * place + piece.oldest]
        piece.oldest, piece.cached = (piece.oldest + 1) % CACHED, piece.cached - 1
        return row
    return piece.first_row + draw(state, piece.num_rows)


@kernel
def put(state: Any, c: Any, place: int, now: int) -> int:
    """Send the next packet of a piece, behind what its host's cable has to send; when that is free again."""
    piece = state.pieces[place]
    number = next_number(state, c, place)
    if flying(c, piece) == 0:
        piece.progress = now
    piece.following = number + 1
    piece.flying += 1
    state.clock[FREE] -= 1
    slot = state.free_K[state.clock[FREE]]
    packet = state.packets[slot]
    packet.piece, packet.number = place, number
    packet.row, packet.hop = choose_row(state, c, place), 0
    packet.length = c.header + (piece.last_bytes if number == piece.num_packets - 1 else c.payload)
    packet.marked, packet.says, packet.back = 0, PLAIN, 0
    return enqueue(state, c, state.links[piece.host_up], slot, now)


@kernel
def enqueue(state: Any, c: Any, link: Any, slot: int, now: int) -> int:
    """A packet goes to the end of a link's queue; when it has left it."""
    length = state.packets[slot].length
    link.free_at = max(now, link.free_at) + sending_ps(link, length)
    link.sent += length
    state.clock[HOPS] += 1
    at(state, link.free_at + c.latency_ps, ARRIVE, slot)
    return link.free_at


@kernel
def wait_turn(state: Any, place: int) -> None:
    """Put a piece at the end of its host's line."""
    piece = state.pieces[place]
    host = state.hosts[piece.src]
    piece.waits, piece.behind = 1, -1
    if host.rear >= 0:
        state.pieces[host.rear].behind = place
    else:
        host.head = place
    host.rear = place


@kernel
def serve(state: Any, c: Any, number: int, now: int) -> None:
    """The host's cable is free: the next piece in line that can sends one packet, and goes to the end of it."""
    host = state.hosts[number]
    while host.head >= 0:
        place = host.head
        piece = state.pieces[place]
        host.head = piece.behind
        if host.head < 0:
            host.rear = -1
        piece.waits = 0
        if can_send(state, c, place):
            is_free = put(state, c, place, now)
            if can_send(state, c, place):
                wait_turn(state, place)
            host.busy = 1
            at(state, is_free, NIC, number)
            return
    host.busy = 0


@kernel
def wake(state: Any, c: Any, place: int, now: int) -> None:
    """A piece may have something to send again."""
    piece = state.pieces[place]
    if piece.waits != 0 or not can_send(state, c, place):
        return
    if c.takes_turns:
        wait_turn(state, place)
        if state.hosts[piece.src].busy == 0:
            serve(state, c, piece.src, now)
    else:
        fill(state, c, place, now)


@kernel
def fill(state: Any, c: Any, place: int, now: int) -> None:
    """A piece puts what it may into its host's queue. Where that is very much, there must be room for events in between."""
    piece = state.pieces[place]
    piece.waits = 0
    for _ in range(AT_ONCE):
        if not can_send(state, c, place):
            return
        put(state, c, place, now)
    piece.waits = 1
    at(state, now, BURST, place)


@kernel
def enter(state: Any, rank: int, now: int) -> None:
    """Start what a rank may send now."""
    count = go_on(state.chain, rank)
    for number in range(count):
        place = state.chain.started[number]
        at(state, now + state.pieces[place].delay, START, place)


# The network


@kernel
def free(state: Any, slot: int) -> None:
    """A packet is no more."""
    state.free_K[state.clock[FREE]] = slot
    state.clock[FREE] += 1


@kernel
def waiting_bytes(link: Any, now: int) -> float:
    """What a link has still to send."""
    return max(0.0, (link.free_at - now) * link.rate / (8.0 * PS_PER_S))


@kernel
def path_of(c: Any, packet: Any) -> int:
    """Where the row of links begins that a packet goes over, or comes back over."""
    return c.depth * (packet.row if packet.back == 0 else packet.back - 1)


@kernel
def next_link(state: Any, c: Any, packet: Any) -> int:
    """The link that a packet at a switch goes on over. The way back is by the same cables: opposite links differ by one bit."""
    path, piece = path_of(c, packet), state.pieces[packet.piece]
    count = state.rows[path]
    if packet.back == 0:
        return piece.host_down if packet.hop == count else state.rows[path + 1 + packet.hop]
    return (piece.host_up if packet.hop == count else state.rows[path + count - packet.hop]) ^ 1


@kernel
def forward(state: Any, c: Any, slot: int, now: int) -> None:
    """A packet is at a switch: into the queue of its next link, marked if that is long, lost if the link or the buffer does not take it."""
    packet = state.packets[slot]
    link = state.links[next_link(state, c, packet)]
    if link.up == 0:
        state.clock[LOST] += 1
        free(state, slot)
        return
    held = 0.0
    for port in range(link.first_port, link.end_port):
        held += waiting_bytes(state.links[state.ports[port]], now)
    if held + packet.length > c.buffer_bytes:
        state.clock[DROPS] += 1
        free(state, slot)
        return
    if packet.back == 0 and waiting_bytes(link, now) > c.ecn_bytes:
        packet.marked = 1
        state.clock[MARKS] += 1
    packet.hop += 1
    enqueue(state, c, link, slot, now)


@kernel
def arrive(state: Any, c: Any, slot: int, now: int) -> None:
    """A packet is at the end of a link."""
    packet = state.packets[slot]
    if packet.hop <= state.rows[path_of(c, packet)]:
        forward(state, c, slot, now)
    elif packet.back > 0:
        acknowledge(state, c, slot, now)
    else:
        receive(state, c, slot, now)


# Receivers


@kernel
def take(state: Any, c: Any, slot: int) -> bool:
    """Whether a receiver has something to say of a packet; one that takes packets in order alone says once which one it wants."""
    packet = state.packets[slot]
    piece = state.pieces[packet.piece]
    if not c.in_order:
        bit = piece.first_bit + packet.number
        if state.bits_M[bit] & 1 == 0:
            state.bits_M[bit] |= 1
            piece.got += 1
        return True
    if packet.number > piece.got:
        state.clock[OUT_OF_ORDER] += 1
        if piece.nacked == piece.got:
            return False
        piece.nacked = piece.got
        packet.says = NACK
    elif packet.number == piece.got:
        piece.got += 1
    packet.number = piece.got
    return True


@kernel
def receive(state: Any, c: Any, slot: int, now: int) -> None:
    """A packet is at its host, which acknowledges it."""
    if not take(state, c, slot):
        free(state, slot)
        return
    packet = state.packets[slot]
    piece = state.pieces[packet.piece]
    if piece.got == piece.num_packets and piece.finish < 0:
        piece.finish = now
        state.clock[LEFT] -= 1
        state.chain.pending[piece.dst, piece.step] -= 1
        enter(state, piece.dst, now)
    if c.ack_bytes == 0:
        at(state, now + c.latency_ps * (state.rows[c.depth * packet.row] + 2), ACK, slot)
        return
    # Back over one path for all pieces of a host, as a route to its address is.
    packet.back = 1 + piece.first_row + piece.src % piece.num_rows
    packet.hop, packet.length = 0, c.ack_bytes
    enqueue(state, c, state.links[piece.host_down ^ 1], slot, now)


# Acknowledgements, congestion, time-outs


@kernel
def control(c: Any, piece: Any, count: int, is_marked: bool) -> None:
    """DCTCP: the window grows by one a round, and once a round shrinks by half of the mean share of marked packets."""
    piece.acks += count
    if is_marked:
        piece.marks += count
    elif piece.window < piece.slow:
        piece.window += count
    else:
        piece.window += count / piece.window
    if piece.acks > piece.span:
        piece.alpha += c.gain * (piece.marks / piece.acks - piece.alpha)
        if piece.marks > 0:
            piece.window = max(1.0, piece.window * (1.0 - piece.alpha / 2.0))
            piece.slow = piece.window
        piece.acks, piece.marks = 0, 0
        piece.span = int(piece.window)


@kernel
def heard(state: Any, c: Any, place: int, number: int, says: int) -> int:
    """What an acknowledgement tells a sender: how many packets more are there."""
    piece = state.pieces[place]
    if not c.in_order:
        bit = piece.first_bit + number
        if state.bits_M[bit] & 2:
            return 0
        state.bits_M[bit] |= 2
        piece.acked += 1
        # One that was given up and is not sent again yet flies no more: it is heard of late.
        if number < piece.following:
            piece.flying -= 1
        return 1
    count = max(0, number - piece.acked)
    piece.acked += count
    piece.following = max(piece.following, piece.acked)
    if says == NACK and number == piece.acked:
        state.clock[RESENT] += piece.following - number
        piece.following = number
    return count


@kernel
def acknowledge(state: Any, c: Any, slot: int, now: int) -> None:
    """A sender hears of a packet."""
    packet = state.packets[slot]
    place, number, row, is_marked, says = packet.piece, packet.number, packet.row, packet.marked == 1, packet.says
    free(state, slot)
    piece = state.pieces[place]
    if piece.active != 1:
        return
    count = heard(state, c, place, number, says)
    if count > 0:
        piece.progress = state.clock[HEARD] = now
        control(c, piece, count, is_marked)
        if c.mode == RECYCLED and piece.path < 0 and not is_marked:
            recycle(state, place, row - piece.first_row)
    if piece.acked == piece.num_packets:
        piece.active = 2
        state.chain.pending[piece.src, piece.step] -= 1
        state.chain.out_R[piece.src] -= 1
        enter(state, piece.src, now)
    else:
        wake(state, c, place, now)


@kernel
def recycle(state: Any, place: int, way: int) -> None:
    """Keep a path to use it again, the newest in place of the oldest; they are used in the order in which they came."""
    piece = state.pieces[place]
    if piece.cached == CACHED:
        piece.oldest, piece.cached = (piece.oldest + 1) % CACHED, CACHED - 1
    state.cache_QC[CACHED * place + (piece.oldest + piece.cached) % CACHED] = way
    piece.cached += 1


@kernel
def move(state: Any, c: Any, place: int, now: int) -> None:
    """Mark the path of a pinned piece as failed for a while, and give it another that is not marked, drawn among all of those."""
    piece = state.pieces[place]
    first = (piece.src * c.leaves + piece.leaf) * c.ways
    state.marked_until[first + piece.path] = now + c.hold_ps
    good = 0
    for way in range(piece.num_rows):
        if state.marked_until[first + way] <= now:
            good += 1
    if good == 0:
        return
    pick = draw(state, good)
    for way in range(piece.num_rows):
        if state.marked_until[first + way] <= now:
            if pick == 0:
                piece.path = way
                state.clock[MOVED] += 1
                return
            pick -= 1


@kernel
def patience_ps(state: Any, c: Any, place: int) -> int:
    """After how long a piece that hears nothing gives up what flies: no sooner than an answer can come where nothing waits."""
    piece = state.pieces[place]
    if piece.path < 0:
        return max(c.rto_ps, piece.round_trip)
    path = c.depth * (piece.first_row + piece.path)
    count = state.rows[path]
    length = c.header + c.ack_bytes + (c.payload if piece.num_packets > 1 else piece.last_bytes)
    total = 2 * c.latency_ps * (count + 2)
    total += sending_ps(state.links[piece.host_up], length) + sending_ps(state.links[piece.host_down], length)
    for hop in range(count):
        total += sending_ps(state.links[state.rows[path + 1 + hop]], length)
    return max(c.rto_ps, total)


@kernel
def time_out(state: Any, c: Any, place: int, now: int) -> None:
    """A piece looks at the clock: if it has heard nothing for too long, all that flies counts as lost, and the window is one packet."""
    piece = state.pieces[place]
    if piece.active != 1:
        return
    rto_ps = patience_ps(state, c, place)
    if flying(c, piece) == 0 or now - piece.progress < rto_ps:
        due = piece.progress + rto_ps
        at(state, due if due > now else now + rto_ps, TIMER, place)
        return
    state.clock[TIMEOUTS] += 1
    state.clock[RESENT] += flying(c, piece)
    piece.following = piece.acked if c.in_order else 0
    piece.flying = 0
    piece.slow = max(2.0, piece.window / 2.0)
    piece.window = 1.0
    piece.progress = now
    if c.mode == PINNED and piece.path >= 0:
        move(state, c, place, now)
    # Perhaps by another path.
    at(state, now + patience_ps(state, c, place), TIMER, place)
    wake(state, c, place, now)


@kernel
def start(state: Any, c: Any, place: int, now: int) -> None:
    """A piece begins."""
    piece = state.pieces[place]
    piece.active, piece.progress = 1, now
    at(state, now + patience_ps(state, c, place), TIMER, place)
    wake(state, c, place, now)


@kernel
def run(state: Any, c: Any, most_events: int, margin: int) -> int:
    """Let ``most_events`` happen: DONE when all is there or nothing will happen, FULL when there may be no room for more."""
    for _ in range(most_events):
        if state.clock[LEFT] == 0 or state.clock[EVENTS] == 0:
            return DONE
        if state.clock[EVENTS] + margin > len(state.heap[0]) or state.clock[FREE] < AT_ONCE:
            return FULL
        now, item = state.heap[0][0], state.heap[2][0]
        state.clock[EVENTS] = pop(state.heap, state.clock[EVENTS])
        state.clock[NOW] = now
        kind, place = item % KINDS, item // KINDS
        if kind == ARRIVE:
            arrive(state, c, place, now)
        elif kind == NIC:
            serve(state, c, place, now)
        elif kind == ACK:
            acknowledge(state, c, place, now)
        elif kind == TIMER:
            time_out(state, c, place, now)
        elif kind == START:
            start(state, c, place, now)
        elif kind == BURST:
            fill(state, c, place, now)
        elif kind == LINK_DOWN:
            state.links[place].up = 0
        elif kind == LINK_UP:
            state.links[place].up = 1
    return PAUSED


@kernel
def begin(state: Any, most_rank: int) -> None:
    """Let every rank enter its first step, at time 0."""
    for rank in range(most_rank):
        enter(state, rank, 0)
