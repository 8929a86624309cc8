"""Cards of what combines adapters: many LoRAs under a router, kinds of adapters together, and ways to make any of them cheaper."""

from dataclasses import replace
from typing import Any

from anabranch.adapters.after import SerialBottleneck
from anabranch.adapters.catalogue.card import Card, Op, Options, Paper, Work
from anabranch.adapters.catalogue.low_rank import CARDS as _LOW_RANK
from anabranch.adapters.catalogue.shape import Matrix, Shape
from anabranch.adapters.catalogue.works import BOTTLENECK, LOW_RANK, SERIAL, each, low_rank, serial
from anabranch.adapters.design_space import layer_at, prefixed
from anabranch.adapters.ladder import Ladder
from anabranch.adapters.low_rank import LowRank
from anabranch.adapters.sparse_bottleneck import kept_weights

__all__ = ["CARDS"]

_QV = ("q", "v")
# What `anabranch adapt` adapts by `*.attention.*`.
_ATTENTION = ("q", "k", "v", "o")
_UNIFIED = Paper("Towards a Unified View of Parameter-Efficient Transfer Learning", 2021, "2110.04366")
_LORA = next(card for card in _LOW_RANK if card.id == "lora")


def _many(matrix: Matrix, options: Options) -> int:
    return options["number"] * low_rank(matrix, options)


_TASKS = Work(
    "2 r (C + O), and 2 K r (C + O) once per pass and task",
    lambda matrix, options: [
        Op(2 * options["rank"] * matrix.in_dim, per_call=2 * options["number"] * options["rank"] * matrix.in_dim),
        Op(
            2 * options["rank"] * matrix.out_dim,
            takes_x=False,
            per_call=2 * options["number"] * options["rank"] * matrix.out_dim,
        ),
    ],
)


_ROUTER = "a router chooses for each token, so it cannot be merged; DynMoLE and LoRA-Mixer are more of this kind"


def _active(options: Options) -> int:
    """How many LoRAs a token goes through."""
    return options.get("active", options["number"])


_ROUTED_WORK = Work(
    "2 K C of the router, and 2 k r (C + O) of the k LoRAs that a token goes through",
    lambda matrix, options: [
        Op(2 * options["number"] * matrix.in_dim),
        Op(2 * _active(options) * options["rank"] * matrix.in_dim),
        Op(2 * _active(options) * options["rank"] * matrix.out_dim, takes_x=False),
    ],
)


def _routed(id: str, name: str, rule: str, paper: Paper, **others: Any) -> Card:
    """K LoRAs of a layer and a router of K C weights."""
    usual: dict[str, Any] = {
        "limits": _ROUTER,
        "options": {"rank": 8, "alpha": 16.0, "number": 4, "targets": _QV},
        "work": _ROUTED_WORK,
    }
    return Card(
        id,
        name,
        "reparameterised/multi-LoRA",
        rule,
        "beside each chosen linear layer",
        "K r (C + O) + K C of a router",
        (paper,),
        count=each(lambda matrix, options: _many(matrix, options) + options["number"] * matrix.in_dim),
        mixed="server" if others.get("backend") == "own" else "no",
        **(usual | others),
    )


def _tasks(id: str, name: str, rule: str, formula: str, paper: Paper, heads: int) -> Card:
    """K LoRAs that tasks share by learned selectors; usual values are those of `anabranch adapt`."""
    return Card(
        id,
        name,
        "reparameterised/multi-LoRA",
        rule,
        "beside each chosen linear layer",
        formula,
        (paper,),
        backend="own",
        peft_type="POLY",
        options={"rank": 16, "alpha": 1.0, "number": 8, "tasks": 1, "heads": heads, "targets": _ATTENTION},
        count=each(
            lambda matrix, options: _many(matrix, options) + options["tasks"] * options["number"] * options["heads"]
        ),
        work=_TASKS,
        merges="per task",
        mixed="server",
        limits="each row of a batch names its task; `anabranch adapt --method` trains it",
    )


_ROUTED = (
    Card(
        "lorahub",
        "LoRAHub",
        "reparameterised/multi-LoRA",
        "halves of K trained LoRAs added up with weights that a search without gradients finds",
        "as the LoRAs that it mixes",
        "K numbers",
        (Paper("LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition", 2023, "2307.13269"),),
        options={"number": 4},
        count=lambda matrices, shape, options: options["number"],
        merges="yes",
        mixed="pool",
        limits="`adapters merge --method linear --model MODEL --data ROWS` finds the weights by a few rows",
        way="anabranch adapters merge --method linear --model MODEL --data ROWS",
    ),
    _routed(
        "molora",
        "MoLoRA",
        "y = W x + sum_k p_k(x) s B_k A_k x with soft weights of every token",
        Paper(
            "Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction Tuning",
            2023,
            "2309.05444",
        ),
        backend="own",
    ),
    _routed(
        "mole",
        "MoLE",
        "trained LoRAs, weighed layer by layer by a learned gate",
        Paper("Mixture of LoRA Experts", 2024, "2404.13628"),
    ),
    _routed(
        "mixlora",
        "MixLoRA",
        "LoRAs of the feed-forward layer as experts, the best two of which a router takes for each token, with a loss for balance",
        Paper(
            "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts",
            2024,
            "2404.15159",
        ),
        backend="own",
        options={"rank": 8, "alpha": 16.0, "number": 4, "active": 2, "targets": ("gate", "up", "down")},
        parts_differ="the balance loss is a product of two means, which parts have not in common",
    ),
    _routed(
        "mola",
        "MoLA",
        "MixLoRA with more experts in higher layers",
        Paper("Higher Layers Need More LoRA Experts", 2024, "2402.08562"),
        way="mola of anabranch.adapters, in Python",
    ),
    _tasks(
        "poly",
        "Poly",
        "s (sum_k z_tk B_k)(sum_k z_tk A_k), halves added up first, with learned selectors z of task t and skill k",
        "K r (C + O) + T K per layer",
        Paper("Combining Parameter-efficient Modules for Task-level Generalisation", 2022, "2202.13914"),
        1,
    ),
    _tasks(
        "mhr",
        "MHR",
        "Poly whose selectors choose for each of h slices of the inputs apart",
        "K r (C + O) + T K h per layer",
        Paper("Multi-Head Adapter Routing for Cross-Task Generalization", 2022, "2211.03831"),
        8,
    ),
    _routed(
        "xlora",
        "X-LoRA",
        "trained LoRAs, weighed for each token and layer by what the model without them has seen",
        Paper("X-LoRA: Mixture of Low-Rank Adapter Experts", 2024, "2402.07148"),
        limits="runs the model twice; in peft it wants use_cache=False",
    ),
    Card(
        "arrow",
        "Arrow",
        "reparameterised/multi-LoRA",
        "trained LoRAs, chosen for each token by the first right singular vector of each",
        "as the LoRAs that it chooses among",
        "none",
        (Paper("Towards Modular LLMs by Building and Reusing a Library of LoRAs", 2024, "2405.11157"),),
        count=lambda matrices, shape, options: 0,
        mixed="server",
        way="anabranch serve MODEL --adapter NAME=arrow:POOL, and adapters route POOL QUERY --model MODEL --local arrow",
    ),
)


def _sparse(matrix: Matrix, options: Options) -> int:
    return kept_weights(options["width"], matrix.out_dim, options["sparsity"]) + options["width"] + matrix.out_dim


def _rungs(shape: Shape, options: Options) -> list[int]:
    """Numbers of the ladder beside each block."""
    ladder = Ladder.Config(reduction=options["reduction"], expansion=options["expansion"])
    return [ladder.rung(shape.dim, layer, shape.num_layers) for layer in range(shape.num_layers)]


def _products(shape: Shape, options: Options) -> int:
    """Numbers of its matrices: all but norms and gates."""
    width = max(1, shape.dim // options["reduction"])
    return sum(_rungs(shape, options)) - shape.num_layers * (width + 1) - width


def _fed(shape: Shape, options: Options) -> int:
    """Numbers of the matrices that the model's hidden states go through."""
    return (shape.num_layers + 1) * shape.dim * max(1, shape.dim // options["reduction"])


def _kept(shape: Shape, options: Options) -> int:
    """Numbers of a token that a step keeps: what is taken of the model, and of each rung's four narrow sums and its gated layer."""
    width = max(1, shape.dim // options["reduction"])
    rung = (4 + 4 * options["expansion"]) * width
    return shape.num_layers * (shape.dim + rung) + shape.dim + 2 * width


def _designed(matrix: Matrix, shape: Shape, options: Options) -> Any:
    """What S4 has at one matrix."""
    return layer_at(matrix.word, matrix.layer or 0, shape.num_layers, options)


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


_HYBRID = (
    Card(
        "mam",
        "MAM adapter",
        "hybrid",
        "a short prefix in attention, and a parallel adapter beside the feed-forward layer",
        "attention and feed-forward of every layer",
        "2 n p d_kv + (m (C + O) + m + O) per layer",
        (_UNIFIED,),
        backend="own",
        options={"tokens": 30, "width": 64, "activation": "relu", "scale": 4.0, "targets": ("down",)},
        count=lambda matrices, shape, options: (
            2 * shape.num_layers * options["tokens"] * shape.kv_width
            + sum(options["width"] * (matrix.in_dim + matrix.out_dim + 1) + matrix.out_dim for matrix in matrices)
        ),
        work=BOTTLENECK,
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
        starts_as_base=False,
        limits="the design that the paper names S4, without the search; sizes are equal in all groups, where the paper's layers have "
        "equally many numbers; biases are added behind matrices, with or without ones of their own; its FLOPs are not counted",
    ),
)

_CHEAPER = (
    replace(
        _LORA,
        id="adapter-drop",
        name="AdapterDrop",
        family="efficient",
        rule="leaves the first n layers without adapters, in training and after it",
        where="the upper layers",
        papers=(Paper("AdapterDrop: On the Efficiency of Adapters in Transformers", 2020, "2010.11918"),),
        peft_type=None,
        options={**_LORA.options, "drop": 1},
        count=lambda matrices, shape, options: sum(
            low_rank(matrix, options) for matrix in matrices if (matrix.layer or 0) >= options["drop"]
        ),
        formula="r (C + O), of the layers that keep theirs",
        memory="no backward pass below the first adapter",
        limits="here of LoRA",
    ),
    Card(
        "sparse-adapter",
        "SparseAdapter",
        "efficient",
        "h <- h + (m_U * U) s((m_D * D) h + e) + f, where masks m keep the weights of the greatest |w dL/dw| before the first step",
        "behind each sublayer (targets o and down)",
        "(1 - s) 2 d m + d + m per site",
        (
            Paper(
                "SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters", 2022, "2210.04284"
            ),
        ),
        backend="own",
        options={"width": 256, "sparsity": 0.8, "targets": ("o", "down")},
        count=each(_sparse),
        frozen=each(lambda matrix, options: 2 * kept_weights(options["width"], matrix.out_dim, options["sparsity"])),
        work=SERIAL,
        starts_as_base=False,
        limits="products are those of the wide adapter; `adapt` scores by the first 32 rows (SNIP), `apply` alone keeps the largest "
        "weights until `anabranch.adapters.sparse_bottleneck.snip` is given losses",
    ),
    replace(
        _LORA,
        id="qlora",
        name="QLoRA",
        family="efficient",
        rule="LoRA beside matrices of 4 bits (NF4), whose scales are quantised too",
        papers=(Paper("QLoRA: Efficient Finetuning of Quantized LLMs", 2023, "2305.14314"),),
        backend="none",
        merges="no",
        memory="matrices of the base take 0.52 bytes a weight in place of 2",
        limits="with any method whose layers stand beside matrices; experts in pools, the embedding and the head stay as they are; it is "
        "trained so, and used on the base as it was, or with --quantize nf4 of eval, generate and serve on that",
        setting="task.quantize=nf4",
    ),
    Card(
        "peqa",
        "PEQA",
        "efficient",
        "trains the scales of a quantised base, one of each row or group",
        "the scales of quantised matrices",
        "O",
        (
            Paper(
                "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer Quantization",
                2023,
                "2305.14152",
            ),
        ),
        options={"targets": ("all",)},
        count=each(lambda matrix, options: matrix.out_dim),
        merges="is the base",
        memory="the base stays in few bits",
    ),
    Card(
        "lst",
        "Ladder side-tuning",
        "efficient",
        "a network of d / k beside the model, fed by its hidden states through learned gates; no gradient goes through the model",
        "beside the whole model",
        "of s = d / k, and f = e s: d s + 3 f s + s + 1 per layer, and 2 d s + s once",
        (Paper("LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", 2022, "2206.06522"),),
        backend="own",
        options={"reduction": 8, "expansion": 4},
        count=lambda matrices, shape, options: sum(_rungs(shape, options)),
        along=lambda shape, options: (2 * _products(shape, options), 2 * _fed(shape, options), _kept(shape, options)),
        memory="no backward pass through the base: side activations alone are kept",
        limits="a side block is a feed-forward layer of the narrow width, the paper's a narrow transformer block",
    ),
    Card(
        "side-tuning",
        "Side-tuning",
        "efficient",
        "a small network whose output is blended with the model's: a f(x) + (1 - a) g(x)",
        "beside the whole model",
        "those of the small network, and one",
        (Paper("Side-Tuning: A Baseline for Network Adaptation via Additive Side Networks", 2019, "1912.13503"),),
        memory="no backward pass through the base",
        starts_as_base=False,
    ),
    Card(
        "mezo",
        "MeZO",
        "efficient",
        "no gradients: two forward passes with weights moved to and fro along a random direction that a seed makes anew",
        "every parameter, or those of an adapter",
        "of what it trains",
        (Paper("Fine-Tuning Language Models with Just Forward Passes", 2023, "2305.17333"),),
        memory="that of inference",
        limits="many more steps than with gradients",
        setting="train.optimizer=mezo",
    ),
    Card(
        "galore",
        "GaLore",
        "efficient",
        "gradients of whole matrices, projected onto r directions that are renewed now and then; moments of AdamW live there",
        "every matrix",
        "all of them",
        (Paper("GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024, "2403.03507"),),
        options={"targets": ("all",)},
        count=each(lambda matrix, options: matrix.size),
        merges="is the base",
        trains_base=True,
        memory="optimizer state of r (C + O) in place of 2 C O",
        limits="with --method full, or in training from nothing; matrices with a side of r or less, embedding, head and routers learn "
        "as with AdamW; one process, or replicas",
        setting="train.optimizer=galore",
    ),
    Card(
        "gradient-checkpointing",
        "Gradient checkpointing",
        "efficient",
        "keeps the input of each block, and computes the block again in the backward pass",
        "every block",
        "none",
        (Paper("Training Deep Nets with Sublinear Memory Cost", 2016, "1604.06174"),),
        count=lambda matrices, shape, options: 0,
        memory="one block's activations and each block's input, for a third more work; `Decoder.recompute` here",
        setting="train.recompute=true",
    ),
)

CARDS = (*_ROUTED, *_HYBRID, *_CHEAPER)
