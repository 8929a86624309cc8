"""Cards of kinds of adapters together: each where it serves best."""

from anabranch.adapters.after import SerialBottleneck
from anabranch.adapters.catalogue.card import Card, Op, Options, Paper, Work
from anabranch.adapters.catalogue.shape import Matrix, Shape
from anabranch.adapters.catalogue.works import BOTTLENECK, LOW_RANK, SERIAL, beside, each, lora, low_rank, serial
from anabranch.adapters.design_space import layer_at, prefixed
from anabranch.adapters.front import Front
from anabranch.adapters.gated import GatedBottleneck, GatedLowRank
from anabranch.adapters.low_rank import LowRank
from anabranch.nn import Linear

__all__ = ["CARDS"]


def _designed(matrix: Matrix, shape: Shape, options: Options) -> Linear.Config | None:
    """What S4 has at one matrix."""
    return layer_at(matrix.word, matrix.layer or 0, shape.num_layers, options)


def _designed_layer(matrix: Matrix, shape: Shape, options: Options) -> Linear.Config:
    made = _designed(matrix, shape, options)
    assert made is not None, "it takes no other matrix"
    return made


def _designed_size(matrix: Matrix, shape: Shape, options: Options) -> int:
    made = _designed(matrix, shape, options)
    if isinstance(made, SerialBottleneck.Config):
        return serial(matrix, options)
    return low_rank(matrix, options) if isinstance(made, LowRank.Config) else matrix.out_dim


def _unified(matrix: Matrix, options: Options) -> int:
    """What UniPELT has at one matrix: an adapter behind ``down``, LoRA elsewhere, and its gate."""
    if matrix.word == "down":
        return serial(matrix, options) + matrix.out_dim + 1
    return low_rank(matrix, options) + matrix.in_dim + 1


def _unified_layer(matrix: Matrix, shape: Shape, options: Options) -> Linear.Config:
    if matrix.word == "down":
        return GatedBottleneck.Config(width=options["width"])
    return GatedLowRank.Config(rank=options["rank"], alpha=float(options["alpha"]), biased=True)


_UNIFIED_WORK = Work(
    "2 r (C + O) + 2 C, or 4 d m + 2 d of the adapter",
    lambda matrix, options: (
        [*SERIAL.ops(matrix, options), Op(2 * matrix.out_dim)]
        if matrix.word == "down"
        else [*LOW_RANK.ops(matrix, options), Op(2 * matrix.in_dim)]
    ),
    is_behind=lambda matrix: matrix.word == "down",
    # What is behind the gate, and the gate.
    kept=lambda matrix, options: matrix.out_dim + 1.0,
)


CARDS = (
    Card(
        "mam",
        "MAM adapter",
        "hybrid",
        "a short prefix in attention, and a parallel adapter beside the feed-forward layer",
        "attention and feed-forward of every layer",
        "2 n p d_kv + (m (C + O) + m + O) per layer",
        (Paper("Towards a Unified View of Parameter-Efficient Transfer Learning", 2021, "2110.04366"),),
        backend="own",
        options={"tokens": 30, "width": 64, "activation": "relu", "scale": 4.0, "targets": ("down",)},
        count=lambda matrices, shape, options: (
            2 * shape.num_layers * options["tokens"] * shape.kv_width
            + sum(options["width"] * (matrix.in_dim + matrix.out_dim + 1) + matrix.out_dim for matrix in matrices)
        ),
        work=BOTTLENECK,
        layer=beside,
        front=lambda shape, options: Front.Config(num_tokens=options["tokens"], of="keys"),
        prefix_positions=lambda options: options["tokens"],
        starts_as_base=False,
        limits="the parallel adapter stands beside the last matrix of the feed-forward layer, the paper's beside the whole layer",
    ),
    Card(
        "unipelt",
        "UniPELT",
        "hybrid",
        "prefix, LoRA and adapter at once, each behind a sigmoid gate of what it takes",
        "prefix in attention and LoRA beside q and v of every layer, an adapter behind the feed-forward layer (target down)",
        "2 n p d_kv + r (C + O) + 2 d m + d + m, and a gate of each: its inputs + 1",
        (Paper("UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", 2021, "2110.07577"),),
        backend="own",
        options={"tokens": 10, "rank": 8, "alpha": 8.0, "width": 48, "targets": ("q", "v", "down")},
        count=lambda matrices, shape, options: (
            shape.num_layers * (2 * options["tokens"] * shape.kv_width + shape.dim + 1)
            + sum(_unified(matrix, options) for matrix in matrices)
        ),
        work=_UNIFIED_WORK,
        layer=_unified_layer,
        front=lambda shape, options: Front.Config(num_tokens=options["tokens"], of="keys", gated=True),
        prefix_positions=lambda options: options["tokens"],
        starts_as_base=False,
        limits="gates are of each token, where the paper's code has their mean over a sequence; the prefix has no network that makes it",
    ),
    Card(
        "llm-adapters",
        "LLM-Adapters",
        "hybrid",
        "which of serial, parallel, LoRA and prompt stands at which layer, as found by trials: LoRA at attention and feed-forward both",
        "attention and feed-forward of every layer",
        "r (C + O), at q, k, v, up and down",
        (
            Paper(
                "LLM-Adapters: An Adapter Family for Parameter-Efficient Fine-Tuning of Large Language Models",
                2023,
                "2304.01933",
            ),
        ),
        backend="own",
        options={"rank": 32, "alpha": 64.0, "targets": ("q", "k", "v", "up", "down")},
        count=each(low_rank),
        work=LOW_RANK,
        layer=lora,
        merges="yes",
        mixed="pool",
    ),
    Card(
        "s4",
        "S4",
        "hybrid",
        "four groups of layers with a choice of adapter A, LoRA L, prefix P and biases B each: AL, AP, APB, PBL, as a search found",
        "every layer, by group: A behind o and down, L beside q and v, B behind what has neither",
        "2 p d_kv, 2 d m + d + m, r (C + O) and O, of what a layer has",
        (Paper("Parameter-Efficient Fine-Tuning Design Spaces", 2023, "2301.01821"),),
        backend="own",
        options={"tokens": 10, "rank": 8, "alpha": 16.0, "width": 16, "targets": ("all",)},
        takes=lambda matrix, shape, options: _designed(matrix, shape, options) is not None,
        count=lambda matrices, shape, options: (
            2 * options["tokens"] * shape.kv_width * len(prefixed(shape.num_layers))
            + sum(_designed_size(matrix, shape, options) for matrix in matrices)
        ),
        layer=_designed_layer,
        front=lambda shape, options: Front.Config(
            num_tokens=options["tokens"], of="keys", layers=prefixed(shape.num_layers)
        ),
        starts_as_base=False,
        limits="the design that the paper names S4, without the search; sizes are equal in all groups, where the paper's layers have "
        "equally many numbers; biases are added behind matrices, with or without ones of their own; its FLOPs are not counted",
    ),
)
