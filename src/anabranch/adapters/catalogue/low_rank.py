"""Cards of what changes matrices by products of small ones: LoRA and what came of it."""

from collections.abc import Sequence
from typing import Any

from anabranch.adapters.catalogue.card import Backend, Card, Op, Options, Paper, Work
from anabranch.adapters.catalogue.shape import Matrix, Shape
from anabranch.adapters.catalogue.works import DENSE, FROZEN_PAIR, LOW_RANK, LOW_RANK_B, each, lora, low_rank
from anabranch.adapters.dora import Dora
from anabranch.adapters.eva import start_by_inputs
from anabranch.adapters.hashed_delta import HashedDelta
from anabranch.adapters.nested import NestedLowRank

__all__ = ["CARDS"]

_LORA = Paper("LoRA: Low-Rank Adaptation of Large Language Models", 2021, "2106.09685")
_QV = ("q", "v")
_RANK = {"rank": 8, "alpha": 16.0, "targets": _QV}
# LoRA+, section 4 of its paper: the rate of B over that of A.
_B_OVER_A = 16.0
_START = "starts in the base's own directions, so the base that it stands beside is another: save it as plain LoRA to move it"


def _widest(matrices: Sequence[Matrix], shape: Shape, options: Options) -> int:
    """A and B of the largest sizes, which all layers share."""
    return options["rank"] * (max(one.in_dim for one in matrices) + max(one.out_dim for one in matrices))


def _bases(matrix: Matrix, options: Options) -> int:
    """How many pairs of r ranks reach the full rank of a matrix."""
    return -(-min(matrix.in_dim, matrix.out_dim) // options["rank"])


def _randlora_bases(matrices: Sequence[Matrix], shape: Shape, options: Options) -> int:
    """One A and as many B as the largest layer needs, which all layers share."""
    smaller = max(min(one.in_dim, one.out_dim) for one in matrices)
    larger = max(max(one.in_dim, one.out_dim) for one in matrices)
    return options["rank"] * (smaller + -(-smaller // options["rank"]) * larger)


def _randlora_ops(matrix: Matrix, options: Options) -> list[Op]:
    width = options["rank"] * _bases(matrix, options)
    return [Op(2 * width * matrix.in_dim, trains=False), Op(2 * width * matrix.out_dim, trains=False, takes_x=False)]


def _lily(matrices: Sequence[Matrix], shape: Shape, options: Options) -> int:
    """An A and a router for each matrix, and the B of all those of one kind."""
    rank, number = options["rank"], options["number"]
    shared = {matrix.word: matrix.out_dim for matrix in matrices}
    return sum(rank * (matrix.in_dim + number) for matrix in matrices) + number * rank * sum(shared.values())


def _start(
    id: str, name: str, rule: str, paper: Paper, limits: str = _START, backend: Backend = "peft", **others: Any
) -> Card:
    """LoRA that starts elsewhere: the same numbers and products."""
    return Card(
        id,
        name,
        "reparameterised/low-rank start",
        rule,
        "beside each chosen linear layer",
        "r (C + O)",
        (paper,),
        backend=backend,
        peft_type="LORA",
        options=dict(_RANK),
        count=each(low_rank),
        work=LOW_RANK,
        layer=lora,
        merges="yes",
        mixed="pool",
        limits=limits,
        **others,
    )


CARDS = (
    Card(
        "lora",
        "LoRA",
        "reparameterised/low-rank",
        "y = W x + (alpha / r) B A x",
        "beside each chosen linear layer",
        "r (C + O)",
        (_LORA,),
        backend="own",
        peft_type="LORA",
        options=dict(_RANK),
        count=each(low_rank),
        work=LOW_RANK,
        layer=lora,
        merges="yes",
        mixed="pool",
    ),
    Card(
        "rslora",
        "rsLoRA",
        "reparameterised/low-rank",
        "y = W x + (alpha / sqrt r) B A x",
        "beside each chosen linear layer",
        "r (C + O)",
        (Paper("A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023, "2312.03732"),),
        backend="own",
        peft_type="LORA",
        options=dict(_RANK),
        count=each(low_rank),
        work=LOW_RANK,
        layer=lambda matrix, shape, options: lora(matrix, shape, options).replace(rslora=True),
        merges="yes",
        mixed="pool",
    ),
    Card(
        "lora-plus",
        "LoRA+",
        "reparameterised/low-rank",
        "LoRA whose B learns 16 times as fast as A",
        "beside each chosen linear layer",
        "r (C + O)",
        (Paper("LoRA+: Efficient Low Rank Adaptation of Large Models", 2024, "2402.12354"),),
        backend="own",
        peft_type="LORA",
        options=dict(_RANK),
        count=each(low_rank),
        work=LOW_RANK,
        layer=lora,
        speed=lambda name: _B_OVER_A if name.endswith(".b") else 1.0,
        merges="yes",
        mixed="pool",
        limits="the adapter is LoRA's; its two learning rates are the optimizer's matter",
    ),
    Card(
        "lora-fa",
        "LoRA-FA",
        "reparameterised/low-rank",
        "LoRA whose A stays as it was drawn",
        "beside each chosen linear layer",
        "r O",
        (Paper("LoRA-FA: Memory-efficient Low-rank Adaptation for LLM Fine-tuning", 2023, "2308.03303"),),
        backend="own",
        peft_type="LORA",
        options=dict(_RANK),
        count=each(lambda matrix, options: options["rank"] * matrix.out_dim),
        frozen=each(lambda matrix, options: options["rank"] * matrix.in_dim),
        work=LOW_RANK_B,
        layer=lora,
        learns=lambda name: name.endswith(".b"),
        merges="yes",
        mixed="pool",
        memory="keeps r numbers of a token for the backward pass where LoRA keeps C",
    ),
    _start(
        "pissa",
        "PiSSA",
        "LoRA that starts as the greatest singular directions of W, and leaves the rest frozen",
        Paper("PiSSA: Principal Singular Values and Singular Vectors Adaptation", 2024, "2404.02948"),
    ),
    _start(
        "olora",
        "OLoRA",
        "LoRA that starts as the first columns of W's QR decomposition",
        Paper("OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024, "2406.01775"),
    ),
    _start(
        "eva",
        "EVA",
        "LoRA whose A starts as the main directions of the layer's inputs",
        Paper("Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024, "2410.07170"),
        "needs data before it starts: adapt takes the first 32 rows, and keeps C^2 numbers of each layer for that time; in Python see "
        "`start_by_inputs`. All layers have the same rank",
        backend="own",
        looks=start_by_inputs,
    ),
    _start(
        "loftq",
        "LoftQ",
        "LoRA that starts as what quantising W has lost",
        Paper("LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023, "2310.08659"),
        limits="starts from a base that is quantised for it: peft makes one with a LoftQConfig, which a catalogue has not",
        backend="none",
    ),
    Card(
        "adalora",
        "AdaLoRA",
        "reparameterised/low-rank budget",
        "W + P diag(l) Q, whose l of least importance are cut while it trains",
        "beside each chosen linear layer",
        "r (C + O) + r, with the rank that it starts with",
        (Paper("Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023, "2303.10512"),),
        backend="peft",
        peft_type="ADALORA",
        options={**_RANK, "rank": 12},
        count=each(lambda matrix, options: low_rank(matrix, options) + options["rank"]),
        work=LOW_RANK,
        merges="yes",
        only_peft="its budget is cut by each step's gradients between a step and the next, which a loop of peft's own has to do",
        limits="needs the number of steps beforehand, and a call after each one",
    ),
    Card(
        "dylora",
        "DyLoRA",
        "reparameterised/low-rank budget",
        "W + (alpha / b) B_b A_b with the first b ranks, b drawn in each step",
        "beside each chosen linear layer",
        "r (C + O)",
        (
            Paper(
                "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank Adaptation",
                2022,
                "2210.07558",
            ),
        ),
        backend="own",
        options=dict(_RANK),
        count=each(low_rank),
        work=LOW_RANK,
        layer=lambda matrix, shape, options: NestedLowRank.Config(rank=options["rank"], alpha=float(options["alpha"])),
        merges="yes",
        mixed="pool",
    ),
    Card(
        "sora",
        "SoRA",
        "reparameterised/low-rank budget",
        "W + B diag(g) A with gates g that a proximal step sets to zero",
        "beside each chosen linear layer",
        "r (C + O) + r",
        (Paper("Sparse Low-rank Adaptation of Pre-trained Language Models", 2023, "2311.11696"),),
        options=dict(_RANK),
        count=each(lambda matrix, options: low_rank(matrix, options) + options["rank"]),
        work=LOW_RANK,
        merges="yes",
    ),
    Card(
        "dora",
        "DoRA",
        "reparameterised/low-rank",
        "m * (W + s B A) / |W + s B A|, column by column, with learned lengths m",
        "in each chosen linear layer",
        "r (C + O) + O",
        (Paper("DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, "2402.09353"),),
        backend="own",
        peft_type="LORA",
        options=dict(_RANK),
        count=each(lambda matrix, options: low_rank(matrix, options) + matrix.out_dim),
        work=Work(
            "2 r (C + O) + building B A once per pass",
            lambda matrix, options: [
                *LOW_RANK.ops(matrix, options),
                Op(0, trains=False, per_call=2 * options["rank"] * matrix.size),
            ],
        ),
        layer=lambda matrix, shape, options: Dora.Config(
            rank=options["rank"], alpha=float(options["alpha"]), constant_norm=True
        ),
        merges="yes",
        mixed="server",
        memory="norms of whole matrices are computed in every pass",
    ),
    Card(
        "vera",
        "VeRA",
        "reparameterised/shared projections",
        "W + diag(b) B diag(d) A with random A and B that all layers share",
        "beside each chosen linear layer",
        "O + r",
        (Paper("VeRA: Vector-based Random Matrix Adaptation", 2023, "2310.11454"),),
        backend="peft",
        peft_type="VERA",
        mixed="server",
        options={"rank": 256, "targets": _QV},
        count=each(lambda matrix, options: matrix.out_dim + options["rank"]),
        frozen=_widest,
        work=FROZEN_PAIR,
        merges="yes",
        limits="its shared matrices are of the largest layer's size; peft stores them in the file unless told not to",
    ),
    Card(
        "randlora",
        "RandLoRA",
        "reparameterised/shared projections",
        "a sum of random low-rank pairs, as many as reach full rank, with learned diagonals",
        "beside each chosen linear layer",
        "k (r + min(C, O)) with k = min(C, O) / r",
        (Paper("RandLoRA: Full-rank parameter-efficient fine-tuning of large models", 2025, "2502.00987"),),
        backend="peft",
        peft_type="RANDLORA",
        mixed="server",
        options={"rank": 32, "targets": _QV},
        count=each(
            lambda matrix, options: _bases(matrix, options) * (options["rank"] + min(matrix.in_dim, matrix.out_dim))
        ),
        frozen=_randlora_bases,
        work=Work("2 k r (C + O) with k = min(C, O) / r", _randlora_ops),
        merges="yes",
        limits="its products are as large as the matrix's own, so it is slow until it is merged",
    ),
    Card(
        "lily",
        "Lily",
        "reparameterised/shared projections",
        "A of neighbouring layers is one, and B is mixed out of k by a router",
        "beside each chosen linear layer",
        "r (C + k) per layer, and k r O for all layers of one kind together",
        (Paper("Low-Rank Interconnected Adaptation across Layers", 2024, "2407.09946"),),
        backend="peft",
        peft_type="LILY",
        options={"rank": 32, "number": 2, "targets": _QV},
        count=_lily,
        limits="a router weighs them, so it cannot be merged",
        only_peft="the weights are means over all tokens of a pass, so a row's depend on the rows beside it and on its later tokens",
    ),
    Card(
        "unilora",
        "Uni-LoRA",
        "reparameterised/intrinsic",
        "all A and B of LoRA are one short vector, projected by a fixed sparse isometry",
        "beside each chosen linear layer",
        "K for the whole model",
        (Paper("Uni-LoRA: One Vector is All You Need", 2025, "2506.00799"),),
        backend="peft",
        peft_type="UNILORA",
        mixed="server",
        options={"rank": 4, "size": 256, "targets": _QV},
        count=lambda matrices, shape, options: options["size"],
        merges="yes",
        starts_as_base=False,
    ),
    Card(
        "tinylora",
        "TinyLoRA",
        "reparameterised/intrinsic",
        "a few numbers along the main r singular directions of each matrix",
        "beside each chosen linear layer",
        "u",
        (Paper("TinyLoRA", 2026, "2602.04118"),),
        backend="peft",
        peft_type="TINYLORA",
        mixed="server",
        options={"rank": 2, "size": 64, "targets": _QV},
        count=each(lambda matrix, options: options["size"]),
        merges="yes",
    ),
    Card(
        "intrinsic",
        "Intrinsic dimension",
        "reparameterised/intrinsic",
        "theta = theta_0 + P z with a fixed P",
        "in each chosen linear layer",
        "K for the whole model",
        (
            Paper(
                "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning", 2020, "2012.13255"
            ),
        ),
        backend="own",
        options={"size": 256, "targets": ("q", "k", "v", "o")},
        count=lambda matrices, shape, options: options["size"],
        work=DENSE,
        layer=lambda matrix, shape, options: HashedDelta.Config(size=options["size"]),
        merges="yes",
        mixed="server",
        memory="P is never stored: its places come of a hash, made anew in each pass",
        limits="until it is merged it costs a second product with the whole matrix; P has one entry in a row, where the paper has Fastfood",
    ),
)
