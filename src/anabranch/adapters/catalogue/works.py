"""What stands beside a matrix, what that computes, and how many numbers it learns: shared by the cards.

In words, C are a matrix's inputs, O its outputs, r a rank, d the model's width, p virtual tokens, n layers, d_kv the width of the keys.
"""

from collections.abc import Callable, Sequence

from anabranch.adapters.after import SerialBottleneck
from anabranch.adapters.bottleneck import Bottleneck
from anabranch.adapters.catalogue.card import Op, Options, Work
from anabranch.adapters.catalogue.shape import Matrix, Shape
from anabranch.adapters.low_rank import LowRank

__all__ = [
    "BOTTLENECK",
    "DENSE",
    "ELEMENTWISE",
    "FROZEN_PAIR",
    "LOW_RANK",
    "LOW_RANK_B",
    "SERIAL",
    "behind",
    "beside",
    "each",
    "lora",
    "low_rank",
    "serial",
]

Count = Callable[[Sequence[Matrix], Shape, Options], int]


def each(count: Callable[[Matrix, Options], int]) -> Count:
    """The sum over matrices of what is counted for one."""
    return lambda matrices, shape, options: sum(count(matrix, options) for matrix in matrices)


def low_rank(matrix: Matrix, options: Options) -> int:
    """r (C + O)."""
    return options["rank"] * (matrix.in_dim + matrix.out_dim)


def serial(matrix: Matrix, options: Options) -> int:
    """2 d m + d + m, of a bottleneck of m behind a matrix of d outputs."""
    return 2 * matrix.out_dim * options["width"] + matrix.out_dim + options["width"]


def lora(matrix: Matrix, shape: Shape, options: Options) -> LowRank.Config:
    """LoRA of ``rank`` and ``alpha``."""
    return LowRank.Config(rank=options["rank"], alpha=float(options["alpha"]))


def beside(matrix: Matrix, shape: Shape, options: Options) -> Bottleneck.Config:
    """A bottleneck of ``width``, ``activation`` and ``scale``, of what goes into the matrix."""
    return Bottleneck.Config(width=options["width"], activation=options["activation"], scale=float(options["scale"]))


def behind(matrix: Matrix, shape: Shape, options: Options) -> SerialBottleneck.Config:
    """A bottleneck of ``width``, of what comes out of the matrix."""
    return SerialBottleneck.Config(width=options["width"])


def _low_rank_ops(trains_a: bool, trains_b: bool) -> Callable[[Matrix, Options], list[Op]]:
    return lambda matrix, options: [
        Op(2 * options["rank"] * matrix.in_dim, trains_a),
        Op(2 * options["rank"] * matrix.out_dim, trains_b, takes_x=False),
    ]


LOW_RANK = Work("2 r (C + O)", _low_rank_ops(True, True))
LOW_RANK_B = Work("2 r (C + O)", _low_rank_ops(False, True))
FROZEN_PAIR = Work("2 r (C + O)", _low_rank_ops(False, False))
BOTTLENECK = Work(
    "2 m (C + O)",
    lambda matrix, options: [
        Op(2 * options["width"] * matrix.in_dim),
        Op(2 * options["width"] * matrix.out_dim, takes_x=False),
    ],
)
# Of a bottleneck behind the matrix.
SERIAL = Work(
    "4 d m",
    lambda matrix, options: [
        Op(2 * options["width"] * matrix.out_dim),
        Op(2 * options["width"] * matrix.out_dim, takes_x=False),
    ],
    is_behind=lambda matrix: True,
)
# A matrix of its own beside the first: entries that are masked or made from few numbers.
DENSE = Work("2 C O", lambda matrix, options: [Op(2 * matrix.size)])
ELEMENTWISE = Work("0 (elementwise)", lambda matrix, options: [])
