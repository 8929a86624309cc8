"""Blocks trained by torch on one or more devices: the same schedule, samples and negatives as CPU threads, in micro-batches.

The gradients of a micro-batch are those of its parameters before it (rows that come more than once get the sum), so one of a
single positive is the exact update. V_u is changed by its negatives, then by its positive, as in the kernel. The code is the same on
CPU and CUDA.

Parts of one device that holds them all stay there until the end. Otherwise each worker has its device, tail parts stay while the
worker's next block needs them, head parts go back to the host after each block, and the parts of the next block are fetched while
one is trained (from pinned memory, on a stream of its own, on CUDA).
"""
# Shapes: N nodes, n rows of a part, D dim, S samples of a block, K negatives, R samples of a micro-batch, B = P^2 blocks

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import BackendError, CapacityError
from anabranch.extras import require
from anabranch.graph.graphvite import train as rules
from anabranch.graph.graphvite.augmentation import Pool
from anabranch.graph.graphvite.executor import Plan
from anabranch.graph.graphvite.parts import SIDES, Parts
from anabranch.graph.graphvite.schedule import run_blocks
from anabranch.graph.graphvite.train import Rate, Rule

if TYPE_CHECKING:
    import torch

# Times that the busiest node may come in a micro-batch, where it is chosen.
VISITS = 8
MOST = 8192
_GOLDEN, _FIRST, _SECOND = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_LOW = 0xFFFFFFFF


def import_torch() -> Any:
    """The library. Raises BackendError where it is not installed."""
    require("torch", by="a device other than 'cpu'")
    import torch

    return torch


def devices_of(device: str, workers: int) -> list[Any]:
    """The devices of the workers, in turn. Raises BackendError for a device that is not there."""
    torch = import_torch()
    if device == "cuda:*":
        names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        if not names:
            raise BackendError("device is 'cuda:*', but there is no CUDA device; use device='cpu'")
        return [torch.device(name) for name in names]
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise BackendError(
            f"device is {shown(device)}, which PyTorch does not know; use 'cpu', 'cuda' or 'cuda:*'"
        ) from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"device is {shown(device)}, but there are {torch.cuda.device_count()} CUDA devices; use 'cpu'"
        )
    return [found] * workers


def auto_micro_batch(degree_N: np.ndarray, num_parts: int) -> int:
    """Samples of a micro-batch in which the busiest node is expected at most 8 times, as a power of two, 1 to 8192.

    Heads and positive tails come as their degree: in a block, with a share of P degree / sum of degrees.
    """
    share = num_parts * float(degree_N.max() / max(degree_N.sum(), 1e-30))
    return 1 << max(0, min(MOST, int(VISITS / max(share, 1e-9))).bit_length() - 1)


def _logical(value: torch.Tensor, bits: int) -> torch.Tensor:
    """The shift to the right of 64 bits without a sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def draw_negatives(state: int, count: int, keep_n: torch.Tensor, other_n: torch.Tensor) -> torch.Tensor:
    """The first ``count`` draws of a stream of negatives, int64: the same as the CPU kernel's, on the device of the table."""
    torch = import_torch()
    start = int(state) - 2**64 if int(state) >= 2**63 else int(state)
    number = torch.arange(1, count + 1, device=keep_n.device)
    # Wraps around, as the state does.
    bits = number * _GOLDEN + start
    bits = (bits ^ _logical(bits, 30)) * _FIRST
    bits = (bits ^ _logical(bits, 27)) * _SECOND
    bits = bits ^ _logical(bits, 31)
    slot = _logical(_logical(bits, 32) * len(keep_n), 32)
    gives_way = (bits & _LOW).double() * 2.0**-32 >= keep_n[slot]
    return torch.where(gives_way, other_n[slot].long(), slot)


class TorchExecutor:
    """Trains pools on devices. ``workers`` is the number of devices; the result depends on ``micro_batch``, not on them."""

    def __init__(
        self, plan: Plan, parts: Parts, devices: list[Any], micro_batch: int, limit: int | None, row_bytes: int
    ) -> None:
        self.torch = import_torch()
        self.plan, self.parts, self.devices, self.micro_batch = plan, parts, devices, micro_batch
        largest = plan.partition.largest * row_bytes
        if limit is not None and 4 * largest > limit:
            raise CapacityError(
                f"memory_limit is {limit:,} bytes on a device; two parts under work and two being fetched need {4 * largest:,}; "
                "use more partitions"
            )
        stays = len(devices) == 1 and limit is None
        self.stores = [(_Resident if stays else _Moving)(self.torch, parts, device) for device in devices]
        self.tables = {device: self._tables(device) for device in devices}

    def _tables(self, device: Any) -> tuple[Any, Any]:
        return tuple(
            self.torch.tensor(array, device=device) for array in (self.plan.tables.keep_M, self.plan.tables.other_M)
        )

    def route(self, pool: Pool) -> Pool:
        """They are where they are trained."""
        return pool

    def run(self, pool: Pool, episode: int, rate: Rate) -> np.ndarray:
        """Train a pool; the sums of losses, float64 [B]."""
        plan = self.plan
        first_B = plan.firsts(pool.count_B)
        workers = len(self.devices)
        losses: dict[int, Any] = {}
        done = threading.Lock()
        finished = [False] * len(plan.blocks)
        # The next place of the same worker that has samples.
        following: dict[int, int] = {}
        busy = [place for place in range(len(plan.blocks)) if len(pool.block(plan.number(place))[0])]
        for worker in range(workers):
            own = [place for place in busy if plan.blocks[place].tail % workers == worker]
            following |= dict(itertools.pairwise(own))

        def work(worker: int, place: int) -> None:
            block, number = plan.blocks[place], plan.number(place)
            samples = pool.block(number)
            if len(samples[0]):
                device, store = self.devices[worker], self.stores[worker]
                head, tail = store.take("head", block.head), store.take("tail", block.tail)
                rows = slice(plan.partition.start_P[block.tail], plan.partition.start_P[block.tail + 1])
                table = tuple(array[rows] for array in self.tables[device])
                at = Rate(rate.first + int(first_B[place]), rate.total)
                loss = train_block(
                    head, tail, samples, table, int(plan.state(episode, place)), plan.rule, at, self.micro_batch
                )
                ahead = following.get(place)
                if ahead is not None:
                    coming = plan.blocks[ahead]
                    with done:
                        free = all(finished[before] for before in coming.after if before != place)
                    store.fetch("tail", coming.tail)
                    if free and coming.head != block.head:
                        store.fetch("head", coming.head)
                keeps = ahead is not None and plan.blocks[ahead].tail == block.tail
                store.give("head", block.head)
                if not keeps:
                    store.give("tail", block.tail)
                losses[number] = loss
            with done:
                finished[place] = True

        run_blocks(plan.blocks, workers, work)
        loss_B = np.zeros(len(plan.blocks))
        for number, loss in losses.items():
            loss_B[number] = float(loss)
        return loss_B

    def finish(self) -> None:
        """Bring all parameters back to the host."""
        for store in self.stores:
            store.finish()


class _Resident:
    """All parts on one device."""

    def __init__(self, torch: Any, parts: Parts, device: Any) -> None:
        self.torch, self.parts = torch, parts
        self.held = {
            (side, part): [torch.from_numpy(array).to(device) for array in parts.load(side, part)]
            for side in SIDES
            for part in range(parts.partition.num_parts)
        }

    def take(self, side: str, part: int) -> list[Any]:
        return self.held[side, part]

    def fetch(self, side: str, part: int) -> None:
        """It is there."""

    def give(self, side: str, part: int) -> None:
        """It stays."""

    def finish(self) -> None:
        for (side, part), tensors in self.held.items():
            host = self.parts.load(side, part)
            for array, tensor in zip(host, tensors, strict=True):
                self.torch.from_numpy(array).copy_(tensor)
            self.parts.store(side, part, host)


class _Moving:
    """The parts that one worker has on its device now. On CUDA they travel on a stream beside that of the training."""

    def __init__(self, torch: Any, parts: Parts, device: Any) -> None:
        self.torch, self.parts, self.device = torch, parts, device
        self.held: dict[tuple[str, int], list[Any]] = {}
        self.is_cuda = device.type == "cuda"
        self.side: Any = torch.cuda.Stream(device) if self.is_cuda else None

    def _beside(self) -> Any:
        return self.torch.cuda.stream(self.side) if self.is_cuda else contextlib.nullcontext()

    def fetch(self, side: str, part: int) -> None:
        if (side, part) in self.held:
            return
        host = [self.torch.from_numpy(array) for array in self.parts.load(side, part)]
        with self._beside():
            if self.is_cuda:
                host = [array.pin_memory() for array in host]
            self.held[side, part] = [array.to(self.device, non_blocking=True, copy=True) for array in host]

    def take(self, side: str, part: int) -> list[Any]:
        self.fetch(side, part)
        if self.is_cuda:
            now = self.torch.cuda.current_stream(self.device)
            now.wait_stream(self.side)
            for tensor in self.held[side, part]:
                tensor.record_stream(now)
        return self.held[side, part]

    def give(self, side: str, part: int) -> None:
        tensors = self.held.pop((side, part))
        # The copy waits for the training of the block, and who comes next for the copy.
        if self.is_cuda:
            self.side.wait_stream(self.torch.cuda.current_stream(self.device))
        host = self.parts.load(side, part)
        with self._beside():
            for array, tensor in zip(host, tensors, strict=True):
                self.torch.from_numpy(array).copy_(tensor)
        self.parts.store(side, part, host)

    def finish(self) -> None:
        for side, part in list(self.held):
            self.give(side, part)


def train_block(
    head: list[Any],
    tail: list[Any],
    samples: tuple[np.ndarray, np.ndarray],
    table: tuple[Any, ...],
    state: int,
    rule: Rule,
    rate: Rate,
    micro_batch: int,
) -> Any:
    """Train one block in place; the sum of the losses as a tensor on the device. Arguments as of the CPU kernel's, with tensors."""
    torch = import_torch()
    device = head[0].device
    head_S, tail_S = (torch.from_numpy(array).to(device).long() for array in samples)
    count = rule.negatives
    negative_SK = draw_negatives(state, len(head_S) * count, *table).view(len(head_S), count)
    number_S = torch.arange(rate.first, rate.first + len(head_S), device=device, dtype=torch.float64)
    lr_S1 = (rule.lr * (1 - number_S / rate.total).clamp_min(rules.FLOOR)).float()[:, None]
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for at in range(0, len(head_S), micro_batch):
        inside = slice(at, at + micro_batch)
        loss += _train_micro_batch(head, tail, head_S[inside], tail_S[inside], negative_SK[inside], lr_S1[inside], rule)
    return loss / (1 + count * rule.negative_weight)


def _train_micro_batch(
    head: list[Any], tail: list[Any], head_R: Any, tail_R: Any, negative_RK: Any, lr_R1: Any, rule: Rule
) -> Any:
    torch = import_torch()
    # V_u of each sample, and its moments.
    before = [array[head_R] for array in head]
    now = list(before)
    loss = torch.zeros((), dtype=torch.float64, device=head_R.device)
    for number in range(rule.negatives + 1):
        is_positive = number == rule.negatives
        target_R = tail_R if is_positive else negative_RK[:, number]
        weight, sign = (1.0, -1.0) if is_positive else (rule.negative_weight, 1.0)
        context = [array[target_R] for array in tail]
        score_R = (now[0] * context[0]).sum(-1)
        # P - 1 = -sigmoid(-z), or p.
        error_R1 = sign * torch.sigmoid(sign * score_R)[:, None]
        loss += weight * torch.nn.functional.softplus(sign * score_R).double().sum()
        head_gradient = weight * (error_R1 * context[0] + rule.weight_decay * now[0])
        tail_gradient = weight * (error_R1 * now[0] + rule.weight_decay * context[0])
        now = _changed(now, head_gradient, lr_R1, rule)
        for array, new, old in zip(tail, _changed(context, tail_gradient, lr_R1, rule), context, strict=True):
            array.index_add_(0, target_R, new - old)
    for array, new, old in zip(head, now, before, strict=True):
        array.index_add_(0, head_R, new - old)
    return loss


def _changed(values: list[Any], gradient: Any, lr_R1: Any, rule: Rule) -> list[Any]:
    """Parameters and moments after a regularised gradient; see `anabranch.graph.graphvite.train`."""
    if rule.optimizer == "sgd":
        return [values[0] - lr_R1 * gradient]
    if rule.optimizer == "momentum":
        a = rules.MOMENTUM * values[1] + (1 - rules.MOMENTUM) * gradient
        return [values[0] - lr_R1 * a, a]
    if rule.optimizer == "adagrad":
        a = values[1] + gradient * gradient
        return [values[0] - lr_R1 * gradient / (a.sqrt() + rules.ADAGRAD_EPSILON), a]
    if rule.optimizer == "rmsprop":
        a = rules.ALPHA * values[1] + (1 - rules.ALPHA) * gradient * gradient
        return [values[0] - lr_R1 * gradient / (a + rules.EPSILON).sqrt(), a]
    a = rules.BETA_1 * values[1] + (1 - rules.BETA_1) * gradient
    b = rules.BETA_2 * values[2] + (1 - rules.BETA_2) * gradient * gradient
    return [values[0] - lr_R1 * a / (b.sqrt() + rules.EPSILON), a, b]
