"""Random numbers that are a function of what they are for: of step, layer, micro-batch and row, and of no machine.

    uniform = keyed_uniform((4, 512), seed=0, step=7, layer=3)         # row r is a function of (seed, step, layer, r) alone

Whatever ranks share a batch in whatever way, each row gets the numbers that it would get on one machine. The generator is Philox4x32-10
(Salmon et al., SC 2011), which is a function of a counter and a key, in integer arithmetic of torch: the same bits on every device.

Layers that draw by themselves (``nn.Dropout``) cannot be told of rows; `drawing` gives all that a thread draws a generator whose seed is
the key of (step, layer, micro-batch), so what they draw does not depend on where and beside what they run.
"""
# Shapes: N rows, X numbers of a row

import hashlib
import math
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from anabranch.errors import InputError

__all__ = ["Draws", "KeyedDropout", "drawing", "keyed_uniform", "philox", "place_of", "random_key"]

_MASK = 0xFFFFFFFF
_LARGEST_SEED = 2**63 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Places of `KeyedDropout`: where they begin, beyond all numbers that are given by hand, and how many a layer of a model has.
_FIRST_PLACE, _MOST_OF_LAYER = 1 << 40, 1 << 20


def place_of(layer: int, number: int) -> int:
    """The place of a `KeyedDropout` in a model: the how manyth of a layer's it is, in the order of its modules."""
    return _FIRST_PLACE + layer * _MOST_OF_LAYER + number


def random_key(*parts: int) -> int:
    """A seed of 63 bits that is a function of whole numbers, such as (seed, step, layer, micro-batch); others give another.

    Raises InputError for a number that does not fit 64 bits.
    """
    try:
        packed = struct.pack(f"<{len(parts)}q", *parts)
    except struct.error:
        raise InputError(f"the key {parts} is not of whole numbers of 64 bits") from None
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def philox(counter_N4: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10: int64 ``[N, 4]`` counters below 2^32 to as many random numbers below 2^32."""
    c0, c1, c2, c3 = counter_N4.unbind(-1)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 wraps around at 2^64, so both halves of a product of 32 bits are its bits as they stand.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK) ^ c1 ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


def keyed_uniform(
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    layer: int,
    micro_batch: int = 0,
    rows: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """float32 of [0, 1), of ``shape``; each row of dimension 0 is a function of the key and its number alone.

    Args:
        shape: ``[N, ...]``.
        seed, step, layer, micro_batch: of the key; step and micro-batch below 2^32.
        rows: int64 ``[N]``, the numbers of the rows. Default: 0 to N - 1. With those of the whole batch, and micro-batch 0, the
            numbers are the same however the batch is cut. Of each the low 32 bits count, and they are not checked, which would wait
            for a device: rows whose numbers are 2^32 apart have the same random numbers.
        device: of the result.

    Raises InputError for a step or a micro-batch that is out of range, a seed or a layer that does not fit 64 bits, and for rows of another
    shape.
    """
    if not shape:
        raise InputError("shape is empty; random numbers are drawn for rows, give at least [N]")
    num_rows, size = shape[0], math.prod(shape[1:])
    rows = torch.arange(num_rows, device=device) if rows is None else rows.to(device=device, dtype=torch.int64)
    if rows.shape != (num_rows,):
        raise InputError(f"rows has shape {list(rows.shape)}, and shape says {num_rows} rows")
    # What is equal for all rows is checked here; a check of the rows themselves would wait for the device.
    for name, value in (("step", step), ("micro_batch", micro_batch)):
        if not 0 <= value <= _MASK:
            raise InputError(f"{name} is {value}; use 0 to {_MASK}")
    key = random_key(seed, layer)
    blocks = math.ceil(size / 4)
    counter = torch.empty(num_rows, blocks, 4, dtype=torch.int64, device=rows.device)
    counter[..., 0] = torch.arange(blocks, device=rows.device)
    counter[..., 1] = (rows & _MASK)[:, None]
    counter[..., 2] = micro_batch
    counter[..., 3] = step
    drawn = philox(counter.view(-1, 4), (key & _MASK, key >> 32)).view(num_rows, blocks * 4)[:, :size]
    # 24 bits are all that float32 holds below 1.
    return ((drawn >> 8).to(torch.float32) * 2.0**-24).view(tuple(shape))


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of (seed, step, layer, row): equal for any number of ranks, stages and micro-batches.

    Whoever runs the model sets ``step``, ``run_seed``, ``place`` and ``first_row`` before each pass; a `GPipe` and an `ElasticTrainer` do.

    Args:
        p: share of numbers that become 0; the others grow by 1 / (1 - p).
        seed: of the key; that of the run is added to it.
        layer: of the key; two of one number drop the same. None for ``place``, by which these tell all apart.

    Attributes:
        step, run_seed: of the run.
        place: where it is in the model, as a number that no other has; None where nobody has said.
        first_row: the number of the batch's first row here.
    """

    def __init__(self, p: float = 0.1, *, seed: int = 0, layer: int | None = None) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise InputError(f"p is {p}; use 0 to 1")
        self.p, self.seed, self.layer = p, seed, layer
        self.step, self.first_row = 0, 0
        self.run_seed = 0
        self.place: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x [N, ...]`` with some numbers 0; unchanged in evaluation mode. Raises InputError where nothing says which layer it is."""
        if not self.training or self.p == 0:
            return x
        if self.p == 1:
            return x * 0
        layer = self.place if self.layer is None else self.layer
        if layer is None:
            raise InputError(
                "a KeyedDropout has no number: give layer=, another one to each, or run the model in a GPipe or an ElasticTrainer, "
                "which number them"
            )
        rows = torch.arange(self.first_row, self.first_row + len(x), device=x.device)
        drawn = keyed_uniform(
            x.shape,
            seed=(self.seed + self.run_seed) & _LARGEST_SEED,
            step=self.step,
            layer=layer,
            rows=rows,
            device=x.device,
        )
        return x * ((drawn >= self.p).to(x.dtype) / (1 - self.p))

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"p={self.p}, layer={self.layer}"


class Draws(TorchDispatchMode):
    """Gives every operation of this thread that draws a generator of its own, and notes whether one did.

    Threads of one process share torch's default generator, so what one of them draws would depend on the others.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch loads its compiler at the first operation, which takes seconds.
        return False

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.has_drawn = False
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, with a generator where it takes one."""
        kwargs = dict(kwargs or {})
        if _takes_generator(func):
            self.has_drawn = True
            if kwargs.get("generator") is None:
                kwargs["generator"] = self._generator(_device_of(args, kwargs))
        elif torch.Tag.nondeterministic_seeded in func.tags and not _has_no_dropout(func, args, kwargs):
            self.has_drawn = True
            return self._drawn_by_default(func, args, kwargs)
        return func(*args, **kwargs)

    def _drawn_by_default(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation that draws from the default generator of its device alone; on a GPU `drawing` has set that."""
        device = _device_of(args, kwargs)
        if device.type != "cpu":
            return func(*args, **kwargs)
        generator = self._generator(device)
        with _DEFAULT:
            before = torch.get_rng_state()
            torch.set_rng_state(generator.get_state())
            try:
                return func(*args, **kwargs)
            finally:
                generator.set_state(torch.get_rng_state())
                torch.set_rng_state(before)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


# Who has the CPU's default generator for a moment.
_DEFAULT = threading.Lock()


def _has_no_dropout(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a fused attention is called with a dropout of 0, where it draws nothing."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return False
    place = names.index("dropout_p")
    return not (args[place] if place < len(args) else kwargs.get("dropout_p", 0.0))


_TAKING: dict[Any, bool] = {}


def _takes_generator(func: Any) -> bool:
    if func not in _TAKING:
        _TAKING[func] = any(argument.name == "generator" for argument in func._schema.arguments)
    return _TAKING[func]


def _device_of(args: Any, kwargs: Any) -> torch.device:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    tensor = next((value for value in args if isinstance(value, Tensor)), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextmanager
def drawing(seed: int, devices: Sequence[torch.device] = ()) -> Iterator[Draws]:
    """All that this thread draws in the block comes from generators of ``seed``; the default generators stay as they are.

    Args:
        seed: such as `random_key` gives.
        devices: GPUs whose fused operations (dropout, attention with dropout) draw from the device's own generator, which is set and
            put back; no other thread may draw there meanwhile.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    # Without one the default generators are left alone: other threads of the process may draw from them.
    with torch.random.fork_rng(devices=gpus, enabled=bool(gpus)):
        for device in gpus:
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        with Draws(seed) as mode:
            yield mode
