"""Cards of what makes adapters, or any training, cheaper: fewer layers, weights or bits, no gradients, or a network along the model."""

from dataclasses import replace

from anabranch.adapters.catalogue.card import Card, Options, Paper
from anabranch.adapters.catalogue.low_rank import CARDS as _LOW_RANK
from anabranch.adapters.catalogue.shape import Matrix, Shape
from anabranch.adapters.catalogue.works import SERIAL, each
from anabranch.adapters.ladder import Ladder
from anabranch.adapters.sparse_bottleneck import SparseBottleneck, kept_weights, snip

__all__ = ["CARDS"]

_LORA = next(card for card in _LOW_RANK if card.id == "lora")


def _sparse(matrix: Matrix, options: Options) -> int:
    return kept_weights(options["width"], matrix.out_dim, options["sparsity"]) + options["width"] + matrix.out_dim


def _ladder(shape: Shape, options: Options) -> Ladder.Config:
    return Ladder.Config(reduction=options["reduction"], expansion=options["expansion"])


def _rungs(shape: Shape, options: Options) -> list[int]:
    """Numbers of the ladder beside each block."""
    ladder = _ladder(shape, options)
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


CARDS = (
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
        least={"drop": 0},
        takes=lambda matrix, shape, options: (matrix.layer or 0) >= options["drop"],
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
        layer=lambda matrix, shape, options: SparseBottleneck.Config(
            width=options["width"], sparsity=float(options["sparsity"])
        ),
        looks=snip,
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
        ladder=_ladder,
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
        trained="matrices",
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
