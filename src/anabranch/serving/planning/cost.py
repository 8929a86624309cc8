"""The cost model of NanoFlow (Zhu et al., "NanoFlow: Towards Optimal Large Language Model Serving Throughput", arXiv 2408.12757v2).

    T_mem     = MemSize / MemBW                              all device memory is read once in an iteration at the largest batch
    T_compute = 2 B_dense P / Compute
    T_net     = 4 N_GPU B_dense D S_type L / NetBW           two all-gathers and an all-reduce move four activations' worth
    T_R       = T_mem / T_compute                            below 1: compute-bound
    optimum   = B_dense / T_compute = Compute / (2 P)        tokens/s, whatever the bandwidth and the lengths

Compute, MemSize and MemBW are of all N devices, as is NetBW (one way). `operations` gives the same operation by operation, in which
a device sends to the N - 1 others, as the paper's table 2 counts it.
"""

from dataclasses import dataclass, field
from typing import Literal

from anabranch.bounds import shown
from anabranch.errors import CapacityError, ConfigError
from anabranch.serving.planning.hardware import Hardware
from anabranch.serving.planning.shape import FeedForwardShape, ModelShape

Resource = Literal["compute", "memory", "network"]
RESOURCES: tuple[Resource, ...] = ("compute", "memory", "network")

# Tokens; nano-batches are multiples of it.
TILE = 128
_MOST_TOKENS = 10**12

# Of what memory the weights leave, for keys and values.
MAX_UTILISATION = 0.98

# Which operation is of which kind; collectives are of the network.
ATTENTION = ("decode_attention", "prefill_attention")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one iteration works on: a dense batch whose tokens are decodes and prompts in the proportion of the requests' lengths.

    Attributes:
        prompt: mean tokens of a prompt.
        output: mean tokens of an answer.
        dense_batch: B_dense, tokens of an iteration.
    """

    prompt: float = 512
    output: float = 1024
    dense_batch: int = 2048

    def __post_init__(self) -> None:
        if not all(1 <= given <= _MOST_TOKENS for given in (self.prompt, self.output, self.dense_batch)):
            raise ConfigError(
                f"prompt, output and dense_batch are {shown(self.prompt)}, {shown(self.output)} and {shown(self.dense_batch)}; "
                f"use at least 1 and at most {_MOST_TOKENS:,}"
            )

    @property
    def num_decodes(self) -> int:
        """Tokens of the batch that are one each of a running request."""
        return int(self.dense_batch * self.output / (self.prompt + self.output))

    @property
    def num_prefills(self) -> int:
        """Tokens of prompts."""
        return self.dense_batch - self.num_decodes

    @property
    def decode_context(self) -> float:
        """Mean tokens that a decoded one looks at, itself included."""
        return self.prompt + (self.output + 1) / 2


@dataclass(frozen=True, kw_only=True)
class OpCost:
    """One operation on some tokens, all layers and devices together.

    Attributes:
        flops, bytes, network_bytes: work, device memory read and written, what links carry.
        compute_s, memory_s, network_s: what each would take at the devices' peaks.
        duration_s: at what kernels reach, alone on the device.
    """

    name: str
    flops: float
    bytes: float
    network_bytes: float
    compute_s: float
    memory_s: float
    network_s: float
    duration_s: float

    @property
    def resource(self) -> Resource:
        """What bounds it."""
        times = (self.compute_s, self.memory_s, self.network_s)
        return RESOURCES[times.index(max(times))]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the formulas say of a model on devices.

    Attributes:
        t_mem_s, t_compute_s, t_net_s: of an iteration.
        t_r: T_mem / T_compute.
        bound: the largest of the three.
        optimal_tokens_s: of all devices; optimal_per_device: of one.
        kv_tokens: keys and values that fit beside the weights, in tokens.
        operations: the table.
    """

    model: ModelShape
    hardware: Hardware
    workload: Workload
    t_mem_s: float
    t_compute_s: float
    t_net_s: float
    optimal_tokens_s: float
    kv_tokens: int
    operations: tuple[OpCost, ...] = field(repr=False)

    @property
    def t_r(self) -> float:
        """Below 1 compute bounds, above memory."""
        return self.t_mem_s / self.t_compute_s

    @property
    def bound(self) -> Resource:
        """What takes longest."""
        times = (self.t_compute_s, self.t_mem_s, self.t_net_s)
        return RESOURCES[times.index(max(times))]

    @property
    def optimal_per_device(self) -> float:
        """Tokens/s of one device."""
        return self.optimal_tokens_s / self.hardware.num_devices

    @property
    def pays(self) -> bool:
        """Whether there is anything to overlap with: an iteration bound by memory has its bottleneck busy as it is."""
        return self.t_r <= 1

    @property
    def fits_batch(self) -> bool:
        """Whether the keys and values of all requests that a dense batch decodes for fit."""
        return self.workload.num_decodes * self.workload.decode_context <= self.kv_tokens


def estimate(
    model: ModelShape, hardware: Hardware, workload: Workload | None = None, *, parameters: float | None = None
) -> Estimate:
    """The formulas and the table of operations.

    Args:
        model: its shape.
        hardware: the devices.
        workload: lengths and batch.
        parameters: P, where a nominal number (70e9) shall stand for the model's own.

    Raises:
        CapacityError: weights do not fit, or not even one request beside them.
    """
    workload = workload or Workload()
    memory = hardware.memory_bytes * hardware.num_devices
    room = (memory - model.weights_bytes) * MAX_UTILISATION
    longest = workload.prompt + workload.output
    need = model.weights_bytes + longest * model.kv_bytes_per_token / MAX_UTILISATION
    if need > memory:
        raise CapacityError(
            f"{model.name} needs {need:,.0f} bytes ({model.weights_bytes:,.0f} of weights) for one request of {longest:,.0f} tokens, but "
            f"{hardware.num_devices} x {hardware.name} have {memory:,.0f}; use more devices or fewer bytes a weight"
        )
    active = parameters or model.active_parameters
    count = hardware.num_devices
    batch = workload.dense_batch
    t_net = 0.0
    if count > 1:
        moved = 4 * count * batch * model.dim * model.activation_bytes * model.num_layers
        t_net = moved / (hardware.network_bandwidth * count)
    t_compute = 2 * batch * active / (hardware.best_compute * count)
    return Estimate(
        model=model,
        hardware=hardware,
        workload=workload,
        t_mem_s=hardware.memory_bytes / hardware.memory_bandwidth,
        t_compute_s=t_compute,
        t_net_s=t_net,
        optimal_tokens_s=batch / t_compute,
        kv_tokens=int(room / model.kv_bytes_per_token),
        operations=tuple(operations(model, hardware, workload)),
    )


def largest_batch(model: ModelShape, hardware: Hardware, prompt: float = 512, output: float = 1024) -> int:
    """The dense batch that memory allows: decodes whose keys and values fit, and prompts in proportion; a power of two of tokens."""
    room = (hardware.memory_bytes * hardware.num_devices - model.weights_bytes) * MAX_UTILISATION
    lengths = Workload(prompt=prompt, output=output)
    decodes = room / model.kv_bytes_per_token / lengths.decode_context
    return 1 << max(int(decodes * (prompt + output) / output).bit_length() - 1, 0)


def fitting_devices(model: ModelShape, hardware: Hardware) -> int:
    """The least power of two of devices whose memory the weights fill to a quarter at most: keys and values need the rest."""
    count = 1
    while model.weights_bytes > hardware.memory_bytes * count / 4 and count < 1024:
        count *= 2
    return count


def operations(model: ModelShape, hardware: Hardware, workload: Workload) -> list[OpCost]:
    """The table: every operation on the whole dense batch, in the order of a layer; collectives are one row."""
    found = []
    for name in operation_names(model):
        start, end = span_of(name, workload)
        if end > start:
            found.append(op_cost(name, model, hardware, workload, end - start))
    if hardware.num_devices > 1:
        found.append(
            _cost("network", model, hardware, _collective("network", 4, model, hardware, workload.dense_batch))
        )
    return found


def operation_names(model: ModelShape) -> tuple[str, ...]:
    """The operations of a layer that are not collectives."""
    gate = ("gate",) if model.is_routed else ()
    return ("kqv", "decode_attention", "prefill_attention", "o", *gate, "up_gate", "down")


def span_of(name: str, workload: Workload) -> tuple[int, int]:
    """Tokens of the batch that an operation is about: decodes come first, then prompts."""
    if name == "decode_attention":
        return 0, workload.num_decodes
    if name == "prefill_attention":
        return workload.num_decodes, workload.dense_batch
    return 0, workload.dense_batch


def op_cost(name: str, model: ModelShape, hardware: Hardware, workload: Workload, num_tokens: int) -> OpCost:
    """An operation on ``num_tokens`` tokens, in all layers; a collective is named ``ag_...`` or ``ar_...``."""
    if name.startswith(("ag_", "ar_")):
        moved = 1 if name.startswith("ag_") else 2
        return _cost(name, model, hardware, _collective(name, moved, model, hardware, num_tokens))
    if name in ATTENTION:
        return _cost(name, model, hardware, _attention(name, model, hardware, workload, num_tokens))
    return _cost(name, model, hardware, _product(name, model, hardware, num_tokens))


# Flops, bytes, network bytes, share of the peak that kernels reach, launches.
Work = tuple[float, float, float, float, float]


def _cost(name: str, model: ModelShape, hardware: Hardware, work: Work) -> OpCost:
    flops, moved, sent, reached, launches = work
    count, efficiency = hardware.num_devices, hardware.efficiency
    compute_s = flops / (hardware.compute * count)
    memory_s = moved / (hardware.memory_bandwidth * count)
    network_s = sent / (hardware.network_bandwidth * count) if sent else 0.0
    launch_s = efficiency.collective_s if sent else efficiency.launch_s
    # What slows a product's arithmetic (tiles) or a collective's link (its protocol) does not slow reading.
    slowest_s = max(compute_s / reached, memory_s / efficiency.attention, network_s / reached)
    return OpCost(
        name=name,
        flops=flops,
        bytes=moved,
        network_bytes=sent,
        compute_s=compute_s,
        memory_s=memory_s,
        network_s=network_s,
        duration_s=slowest_s + launches * launch_s,
    )


def _product(name: str, model: ModelShape, hardware: Hardware, tokens: int) -> Work:
    """KQV, O, gate, up and gate projection, down projection."""
    rows = tokens * model.streams
    # Layers, FLOPs, weights, activations, share of full tiles.
    parts: list[tuple[int, float, float, float, float]] = []
    if name in ("kqv", "o"):
        inner, outer = model.query_dim, model.dim
        if name == "kqv":
            inner, outer = model.dim, model.query_dim + 2 * model.store_dim
        fill = hardware.fill(rows, outer // hardware.num_devices)
        parts.append((model.num_layers, 2.0 * rows * inner * outer, inner * outer, rows * (inner + outer), fill))
    else:
        parts += [
            (part.num_layers, *_feed_forward(name, part, model.dim, rows, hardware))
            for part in model.feed_forwards
            if name != "gate" or part.is_routed
        ]
    flops = sum(layers * work for layers, work, _, _, _ in parts)
    weights = sum(layers * size for layers, _, size, _, _ in parts)
    between = sum(layers * size for layers, _, _, size, _ in parts)
    busy = sum(layers * work / fill for layers, work, _, _, fill in parts)
    reached = hardware.efficiency.gemm * (flops / busy if busy else 1.0)
    moved = weights * model.weight_bytes + between * model.activation_bytes
    return flops, moved, 0.0, reached, sum(layers for layers, *_ in parts)


def _feed_forward(
    name: str, part: FeedForwardShape, dim: int, rows: int, hardware: Hardware
) -> tuple[float, float, float, float]:
    """FLOPs, weights, activations and share of full tiles of one layer's operation."""
    if name == "gate":
        return 2.0 * rows * part.router_parameters, part.router_parameters, rows * (dim + part.num_experts), 1.0
    matrices = 2 if name == "up_gate" else 1
    # Experts' tiles share the device: what is lost is the ragged edge of each, not whole rounds.
    if part.is_routed:
        fill = _ragged(hardware, rows * part.top_k / part.num_experts)
    else:
        outer = 2 * part.hidden_dim / hardware.num_devices if name == "up_gate" else dim
        fill = hardware.fill(rows, round(outer))
    work = 2.0 * rows * matrices * dim * part.active_dim
    weights = matrices * dim * part.touched_dim(rows)
    return work, weights, rows * (dim + matrices * part.active_dim), fill


def _ragged(hardware: Hardware, rows: float) -> float:
    """Share of an expert's tiles that are rows of tokens."""
    if not hardware.num_units:
        return 1.0
    tile = hardware.tile[0]
    return rows / (-(-rows // tile) * tile) if rows >= 1 else 1 / tile


def _attention(name: str, model: ModelShape, hardware: Hardware, workload: Workload, tokens: int) -> Work:
    """Decoding reads every earlier key and value; a prompt is one product of its length squared, read once."""
    layers, rows = model.num_layers * model.streams, tokens
    own = rows * (2 * model.query_dim + 2 * model.store_dim) * model.activation_bytes
    if name == "decode_attention":
        context = workload.decode_context
        read = rows * context * 2 * model.store_dim * model.kv_bytes
        return 4 * rows * context * model.query_dim * layers, (read + own) * layers, 0.0, 1.0, layers
    return 4 * rows * workload.prompt * model.query_dim * layers, own * layers, 0.0, hardware.efficiency.prefill, layers


def _collective(name: str, activations: int, model: ModelShape, hardware: Hardware, tokens: int) -> Work:
    """An all-gather moves one activation to each of the other devices, an all-reduce two and adds one of them."""
    others = hardware.num_devices - 1
    numbers = activations * others * tokens * model.streams * model.dim * model.num_layers
    added = numbers / 2 if not name.startswith("ag_") else 0.0
    sent = numbers * model.activation_bytes
    launches = model.num_layers * (3 if name == "network" else 1)
    return added, sent, sent, hardware.efficiency.network, launches
