"""The plan of a change of devices: which experts stay, which are copied from where, what is read from disk, what is let go.

    old = place(num_experts=12, layers=2, devices=(0, 1, 2, 3))
    plan = plan_scale(old, devices=(0, 1, 2, 3, 4, 5), expert_bytes=(1 << 20, 1 << 20))
    print(plan)                                   # 4 of 12 experts of each layer move

A *layer* here is a pool of experts: layers that share one count once. The rule of ElasticMoE (Singh et al. 2025, arXiv 2510.02613):
the tensor parallel degree is fixed, so attention shards and key-value caches of devices that are kept stay as they are, and only
experts move. The paper names the goal, maximal reuse; the placement is ours: every device has a quota of floor or ceil(E / n)
experts of a layer, a survivor keeps its experts up to the quota, and what is over goes to devices that are under it. No balanced
placement moves fewer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from anabranch.bounds import shown
from anabranch.errors import CapacityError, InputError

__all__ = ["Copy", "Placement", "ScalePlan", "check_memory", "place", "plan_scale"]

# Experts of one layer on one device, in the order of their slots.
Slots = tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Who holds what.

    Attributes:
        devices: in the order of ranks; ``tp`` neighbours share one copy of the attention.
        experts: for each layer, for each device of ``devices``, its experts.
        tp: tensor parallel degree.
    """

    devices: tuple[int, ...]
    experts: tuple[tuple[Slots, ...], ...]
    tp: int = 1

    def of(self, layer: int, device: int) -> Slots:
        """Experts of a layer that a device holds, in the order of their slots; none for a device that is not in it."""
        return self.experts[layer][self.devices.index(device)] if device in self.devices else ()

    def owners(self, layer: int) -> dict[int, tuple[int, int]]:
        """{expert: (rank, slot)} of a layer."""
        ranks = enumerate(self.experts[layer])
        return {expert: (rank, slot) for rank, held in ranks for slot, expert in enumerate(held)}

    def shard(self, device: int) -> int:
        """Which part of the attention a device holds: its tensor parallel rank."""
        return self.devices.index(device) % self.tp


@dataclass(frozen=True)
class Copy:
    """Bytes to bring to ``target``: from the device ``source``, or from disk where it is None.

    ``layer`` and ``expert`` name an expert; a shard of the attention has neither.
    """

    target: int
    source: int | None
    bytes: int
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True, kw_only=True)
class ScalePlan:
    """What leads from one placement to another.

    Attributes:
        old, new: the placements.
        keep: (device, layer, expert) that stay where they are.
        copy: experts to bring, from a device or from disk.
        drop: (device, layer, expert) to let go once the new placement serves.
        attention: shards of the attention to bring to new devices.
        kv_keep: devices whose key-value cache stays; kv_new: those that begin with an empty one.
        lost: devices that are gone without having been asked.
        shared: all devices map the same pages of weights, so that what moves is mapped elsewhere and not copied.
    """

    old: Placement
    new: Placement
    keep: tuple[tuple[int, int, int], ...]
    copy: tuple[Copy, ...]
    drop: tuple[tuple[int, int, int], ...]
    attention: tuple[Copy, ...]
    kv_keep: tuple[int, ...]
    kv_new: tuple[int, ...]
    lost: tuple[int, ...] = ()
    shared: bool = False

    @property
    def map(self) -> dict[tuple[int, int], Slots]:
        """{(device, layer): experts in the order of slots} of the new placement."""
        return {
            (device, layer): held
            for layer, row in enumerate(self.new.experts)
            for device, held in zip(self.new.devices, row, strict=True)
        }

    @property
    def moves(self) -> int:
        """Experts that change their device, or are read again."""
        return len(self.copy)

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes by kind: ``zero_copy`` is not known here, ``p2p`` between devices, ``disk`` read again."""
        every = () if self.shared else (*self.copy, *self.attention)
        return {
            "p2p": sum(copy.bytes for copy in every if copy.source is not None),
            "disk": sum(copy.bytes for copy in every if copy.source is None),
        }

    def incoming(self, device: int) -> int:
        """Bytes of weights that a device receives, or maps anew where they are shared."""
        return sum(copy.bytes for copy in (*self.copy, *self.attention) if copy.target == device)

    def inverse(self) -> "ScalePlan":
        """The plan that leads back: to the very slots that were."""
        sizes = {(copy.layer, copy.expert): copy.bytes for copy in self.copy}
        shard = max((copy.bytes for copy in self.attention), default=0)
        expert_bytes = {key: size for key, size in sizes.items() if key[0] is not None}
        return _plan(self.new, self.old, (), lambda layer, expert: expert_bytes.get((layer, expert), 0), shard)

    def __str__(self) -> str:
        total = sum(len(held) for row in self.new.experts for held in row)
        sizes = self.bytes
        lines = [
            f"{_names(self.old.devices)} -> {_names(self.new.devices)}"
            + (f", lost {_names(self.lost)}" if self.lost else ""),
            f"experts    {len(self.keep)} of {total} stay, {self.moves} move",
            f"attention  {len(self.kv_keep)} devices keep theirs, {len(self.attention)} receive a shard",
            f"bytes      {sizes['p2p']:,} between devices, {sizes['disk']:,} from disk"
            + (", for devices share their weights" if self.shared else ""),
        ]
        for copy in self.copy[:16]:
            source = ("lost" if self.shared else "disk") if copy.source is None else f"device {copy.source}"
            lines.append(f"  layer {copy.layer} expert {copy.expert}: {source} -> device {copy.target}")
        if self.moves > 16:
            lines.append(f"  and {self.moves - 16} more")
        return "\n".join(lines)


def place(num_experts: int | Sequence[int], layers: int, devices: Sequence[int], tp: int = 1) -> Placement:
    """The first placement: each device a run of neighbouring experts, loads that differ by at most one.

    ``num_experts`` may differ from layer to layer.

    Raises InputError for devices that are no whole number of tensor parallel groups.
    """
    _check_devices(devices, tp)
    empty = Placement((), tuple(() for _ in range(layers)), tp)
    sizes = (num_experts,) * layers if isinstance(num_experts, int) else tuple(num_experts)
    return _spread(empty, tuple(devices), sizes, {})


def plan_scale(
    old: Placement,
    devices: Sequence[int],
    *,
    expert_bytes: Sequence[int],
    shard_bytes: int = 0,
    lost: Sequence[int] = (),
    heat: Mapping[tuple[int, int], float] | None = None,
) -> ScalePlan:
    """The plan that leads from ``old`` to a balanced placement over ``devices`` with the fewest moves.

    Args:
        old: where experts are now.
        devices: all devices of the new configuration, in the order of ranks. Kept ones must keep their tensor parallel rank.
        expert_bytes: of one expert of each layer.
        shard_bytes: of the attention and all else that a device holds of the dense part.
        lost: devices of ``old`` that cannot be read any more, in any order; what only they held comes from disk.
        heat: how often (layer, expert) is used; the coldest of a surplus move. Without it the last ones do.

    Raises InputError for a configuration that cannot be.
    """
    _check_devices(devices, old.tp)
    for device in lost:
        if device not in old.devices:
            raise InputError(f"lost has device {shown(device)}; the group has {_names(old.devices)}")
    if set(lost) & set(devices):
        raise InputError(f"devices has {min(set(lost) & set(devices))}, which is lost")
    if len(expert_bytes) != len(old.experts):
        raise InputError(f"expert_bytes has {len(expert_bytes)} layers; the placement has {len(old.experts)}")
    for rank, device in enumerate(devices):
        if device in old.devices and old.shard(device) != rank % old.tp:
            held, asked = old.shard(device), rank % old.tp
            raise InputError(f"device {device} holds part {held} of the attention; it cannot become part {asked}")
    sizes = tuple(sum(len(held) for held in row) for row in old.experts)
    new = _spread(old, tuple(devices), sizes, heat or {})
    # Each once, however often it was said.
    gone = tuple(dict.fromkeys(lost))
    return _plan(old, new, gone, lambda layer, expert: expert_bytes[layer], shard_bytes)


def check_memory(
    plan: ScalePlan,
    *,
    capacity_bytes: int,
    expert_bytes: Sequence[int],
    shard_bytes: int,
    kv_bytes: int,
) -> dict[int, int]:
    """Bytes of each new device at the worst moment, when it holds what it had and what comes in.

    Raises CapacityError, with the sum, where that is more than ``capacity_bytes``.
    """
    peaks: dict[int, int] = {}
    for device in plan.new.devices:
        had = sum(len(plan.old.of(layer, device)) * size for layer, size in enumerate(expert_bytes))
        incoming = sum(copy.bytes for copy in plan.copy if copy.target == device)
        peaks[device] = shard_bytes + kv_bytes + had + incoming
        if peaks[device] > capacity_bytes:
            raise CapacityError(
                f"device {device} would need {peaks[device]:,} bytes ({shard_bytes:,} dense weights + {kv_bytes:,} key-value cache "
                f"+ {had:,} experts + {incoming:,} incoming) and has {capacity_bytes:,}; use more devices"
            )
    return peaks


def _check_devices(devices: Sequence[int], tp: int) -> None:
    if not devices:
        raise InputError("devices is empty; at least one must serve")
    if len(set(devices)) != len(devices):
        raise InputError(f"devices is {tuple(devices)}; each may be there once")
    if len(devices) % tp:
        raise InputError(f"devices are {len(devices)}, which is not a multiple of the tensor parallel degree {tp}")


def _spread(old: Placement, devices: tuple[int, ...], sizes: tuple[int, ...], heat: Mapping) -> Placement:
    rows = []
    # Where the next larger quota goes, so that over all layers no device gets all of them.
    spare = 0
    for layer, size in enumerate(sizes):
        have = {device: old.of(layer, device) for device in devices}
        quota = _quotas(have, size, spare)
        spare += size % len(devices)
        rows.append(_fill(have, quota, size, lambda expert, layer=layer: heat.get((layer, expert), 0.0)))
    return Placement(devices, tuple(rows), old.tp)


def _quotas(have: dict[int, Slots], size: int, first: int) -> dict[int, int]:
    """floor or ceil(size / n) of each device; the larger to those that have most, which moves fewest."""
    count = len(have)
    low, larger = divmod(size, count)
    turn = {device: (number - first) % count for number, device in enumerate(have)}
    order = sorted(have, key=lambda device: (-len(have[device]), turn[device]))
    return {device: low + (number < larger) for number, device in enumerate(order)}


def _fill(have: dict[int, Slots], quota: dict[int, int], size: int, heat) -> tuple[Slots, ...]:
    kept: dict[int, list[int]] = {}
    for device, held in have.items():
        hottest = sorted(held, key=lambda expert: (-heat(expert), held.index(expert)))[: quota[device]]
        # Slots keep their order.
        kept[device] = [expert for expert in held if expert in hottest]
    placed = {expert for held in kept.values() for expert in held}
    homeless = iter([expert for expert in range(size) if expert not in placed])
    return tuple((*held, *(next(homeless) for _ in range(quota[device] - len(held)))) for device, held in kept.items())


@dataclass
class _Parts:
    keep: list[tuple[int, int, int]] = field(default_factory=list)
    copy: list[Copy] = field(default_factory=list)
    drop: list[tuple[int, int, int]] = field(default_factory=list)


def _plan(old: Placement, new: Placement, lost: tuple[int, ...], size, shard_bytes: int) -> ScalePlan:
    parts = _Parts()
    alive = [device for device in old.devices if device not in lost]
    for layer in range(len(new.experts)):
        had = {device: set(old.of(layer, device)) for device in old.devices}
        source = {expert: device for device in alive for expert in had[device]}
        for device in new.devices:
            for expert in new.of(layer, device):
                if expert in had.get(device, ()):
                    parts.keep.append((device, layer, expert))
                else:
                    parts.copy.append(Copy(device, source.get(expert), size(layer, expert), layer, expert))
        for device in alive:
            gone = had[device] - set(new.of(layer, device))
            parts.drop.extend((device, layer, expert) for expert in sorted(gone))
    added = [device for device in new.devices if device not in old.devices]
    return ScalePlan(
        old=old,
        new=new,
        keep=tuple(parts.keep),
        copy=tuple(parts.copy),
        drop=tuple(parts.drop),
        attention=tuple(_attention(old, new, alive, added, shard_bytes)),
        kv_keep=tuple(device for device in new.devices if device in alive),
        kv_new=tuple(added),
        lost=lost,
    )


def _attention(old: Placement, new: Placement, alive: list[int], added: list[int], shard_bytes: int) -> list[Copy]:
    """A shard for each new device, from a device that has it; sources take turns."""
    given: dict[int, int] = {}
    copies = []
    for device in added:
        holders = [other for other in alive if old.shard(other) == new.shard(device)]
        source = min(holders, key=lambda other: given.get(other, 0), default=None)
        if source is not None:
            given[source] = given.get(source, 0) + 1
        copies.append(Copy(device, source, shard_bytes))
    return copies


def _names(devices: Sequence[int]) -> str:
    return f"devices {', '.join(map(str, devices))}" if len(devices) != 1 else f"device {devices[0]}"
