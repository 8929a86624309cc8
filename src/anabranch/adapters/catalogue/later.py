"""Cards of what the survey has not, and the package peft runs: most came after it."""

from collections.abc import Sequence
from functools import partial

from anabranch.adapters.catalogue.card import Card, Options, Paper
from anabranch.adapters.catalogue.shape import Matrix, Shape
from anabranch.adapters.catalogue.works import each, low_rank

__all__ = ["CARDS"]

_QV = ("q", "v")
_BESIDE = "beside each chosen linear layer"
# All of them are run by peft alone, and their FLOPs have not been counted.
_Card = partial(Card, backend="peft", only_peft="its parts have not been put around a model of ours")


def _kept_singular(matrix: Matrix, options: Options) -> int:
    """The singular directions that AdaMSS looks at."""
    return min(options["rank"], matrix.in_dim, matrix.out_dim)


def _rotations(matrix: Matrix, options: Options) -> int:
    """FRoD's entries beside the diagonal, of C (C - 1) that there are."""
    wanted = min(int(matrix.in_dim**2 * options["share"]), matrix.in_dim * (matrix.in_dim - 1))
    return max(1, wanted) if options["share"] > 0 and matrix.in_dim > 1 else wanted


def _bases(matrices: Sequence[Matrix], shape: Shape, options: Options) -> int:
    """FRoD's basis of each kind of matrix, which its layers share."""
    return sum(dim**2 for dim in {matrix.word: matrix.in_dim for matrix in matrices}.values())


def _free(matrix: Matrix, options: Options) -> int:
    """The singular directions that learn in OSF: all but the share with the greatest values."""
    least = min(matrix.in_dim, matrix.out_dim)
    return least - int(least * options["kept"])


def _entries(matrix: Matrix, options: Options) -> int:
    """Of a matrix, which Super-Tuning moves."""
    return int(matrix.size * (1 - options["sparsity"]))


def _projections(matrices: Sequence[Matrix], shape: Shape, options: Options) -> int:
    """PVeRA's A, of means and of variances, and B, of the largest sizes."""
    return options["rank"] * (2 * max(one.in_dim for one in matrices) + max(one.out_dim for one in matrices))


def _shadow(matrices: Sequence[Matrix], shape: Shape, options: Options) -> int:
    """A block and a norm like the model's own, and of each block of the model what feeds it and what it feeds."""
    rank, layers = options["rank"], shape.num_layers
    block = sum(matrix.size for matrix in shape.matrices if matrix.layer == 0)
    norms = (shape.norms - shape.dim) // layers + shape.dim
    # Down and up of the injection; two networks of r hidden numbers, with biases, of the candidate and of the gate.
    beside = 2 * rank * shape.dim + 2 * (2 * rank * shape.dim + rank + shape.dim)
    return block + norms + shape.biases // layers + layers * beside


CARDS = (
    _Card(
        "llama-adapter",
        "LLaMA-Adapter",
        "additive/prompt",
        "p learned vectors that the top layers attend to apart, behind a gate g that starts at 0: attention + g softmax(q K(P)) V(P)",
        "attention of the top m layers",
        "m (p d + 1)",
        (
            Paper(
                "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", 2023, "2303.16199"
            ),
        ),
        peft_type="ADAPTION_PROMPT",
        options={"tokens": 10, "layers": 1},
        count=lambda matrices, shape, options: (
            min(options["layers"], shape.num_layers) * (options["tokens"] * shape.dim + 1)
        ),
        limits="peft has it for Llama, Mistral and GPT-2, and refuses more layers than the model has; the paper takes 30 of 32",
    ),
    _Card(
        "adamss",
        "AdaMSS",
        "reparameterised/low-rank",
        "the first R left singular directions of W are grouped into K subspaces, each of which has a pair B_k A_k of rank s of its own",
        _BESIDE,
        "s (K min(R, C, O) + O)",
        (Paper("AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning", 2025),),
        peft_type="ADAMSS",
        options={"rank": 100, "subspaces": 5, "subspace_rank": 1, "targets": _QV},
        count=each(
            lambda matrix, options: (
                options["subspace_rank"] * (options["subspaces"] * _kept_singular(matrix, options) + matrix.out_dim)
            )
        ),
        frozen=each(lambda matrix, options: _kept_singular(matrix, options) * matrix.in_dim),
        merges="yes",
        limits="needs scikit-learn, which groups the directions; where it finds fewer groups than asked less learns. Giving subspaces up "
        "while it trains wants a callback of peft's",
    ),
    _Card(
        "deft",
        "DEFT",
        "reparameterised/low-rank",
        "(I - P relu(P)^T) W + P R: what W does in a learned subspace is taken out, and something else put there",
        _BESIDE,
        "r (C + O)",
        (Paper("DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models", 2025),),
        peft_type="DEFT",
        options={"rank": 8, "targets": _QV},
        count=each(low_rank),
        merges="yes",
        memory="the product with W is made anew in every pass",
        limits="made for models that draw pictures; starts as the base to rounding",
    ),
    _Card(
        "frod",
        "FRoD",
        "reparameterised/structured",
        "W = U diag(l) V^T with a basis V that all layers of a kind share: l learns, and a few entries S that turn it, U (diag(l) + S) V^T",
        _BESIDE,
        "C + max(1, share C^2)",
        (Paper("Full-Rank Efficient Fine-Tuning with Rotational Degrees", 2026),),
        peft_type="FROD",
        options={"share": 0.01, "targets": _QV},
        count=each(lambda matrix, options: matrix.in_dim + _rotations(matrix, options)),
        frozen=_bases,
        merges="yes",
        memory="U of each layer and V of each kind stand beside the base",
        limits="the bases are made from the weights first, which takes long for a large model; starts as the base to rounding",
    ),
    _Card(
        "glora",
        "GLoRA",
        "reparameterised/low-rank",
        "W + W * A + B with A and B of low rank: one pair of factors scales each weight, another is added",
        _BESIDE,
        "2 r (C + O)",
        (Paper("One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", 2023, "2306.07967"),),
        peft_type="GLORA",
        options={"rank": 8, "targets": _QV},
        count=each(lambda matrix, options: 2 * low_rank(matrix, options)),
        merges="yes",
        limits="the paper also moves biases (its C, D and E), which is off here, and searches for each part's form, as peft does not",
    ),
    _Card(
        "osf",
        "OSF",
        "selective/structured",
        "W by its singular values: the greatest directions stay, the others learn whole, at right angles to those",
        "each chosen linear layer",
        "k (C + O + 1) with k = min(C, O) less the kept share of it",
        (
            Paper(
                "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
                2025,
                "2504.07097",
            ),
        ),
        peft_type="OSF",
        options={"kept": 0.5, "targets": _QV},
        count=each(lambda matrix, options: _free(matrix, options) * (matrix.in_dim + matrix.out_dim + 1)),
        merges="yes",
        memory="as many numbers as half of the matrix learn by the usual share, beside factors of the rest",
        limits="made for tasks that come one after another; not small",
    ),
    _Card(
        "peanut",
        "PEANuT",
        "reparameterised/low-rank",
        "W + s f(W): a small network takes each column of W down to r numbers, through pairs of r x r layers with relu, and up again",
        _BESIDE,
        "2 r O + 2 h r^2 with h pairs of layers",
        (Paper("PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers", 2024, "2410.01870"),),
        peft_type="PEANUT",
        options={"rank": 32, "depth": 0, "targets": _QV},
        least={"depth": 0},
        count=each(lambda matrix, options: 2 * options["rank"] * (matrix.out_dim + options["depth"] * options["rank"])),
        merges="yes",
        memory="what is added is a whole matrix, made anew in every pass",
        limits="slower than LoRA",
    ),
    _Card(
        "pvera",
        "PVeRA",
        "reparameterised/shared projections",
        "VeRA whose middle is drawn: d times A x gives a mean and a variance of r numbers, and diag(b) B goes on from a draw of them",
        _BESIDE,
        "O + 2 r",
        (Paper("PVeRA: Probabilistic Vector-Based Random Matrix Adaptation", 2025, "2512.07703"),),
        peft_type="PVERA",
        options={"rank": 256, "targets": _QV},
        count=each(lambda matrix, options: matrix.out_dim + 2 * options["rank"]),
        frozen=_projections,
        merges="yes",
        limits="in training it draws in every pass; evaluated, and merged, it takes the mean",
    ),
    _Card(
        "shadow",
        "ShadowPEFT",
        "additive/side network",
        "a small network computes a state s beside the model: a block takes h + a U D (h - s), and its output moves s by a gate",
        "along all blocks",
        "a block and a norm like the model's, and 6 r d + 2 r + 2 d per block",
        (Paper("ShadowPEFT: Shadow Network for Parameter-Efficient Fine-Tuning", 2026, "2604.19254"),),
        peft_type="SHADOW",
        options={"rank": 8},
        count=_shadow,
        limits="cannot be merged; counted with peft's usual shadow of one block; nobody reads the state behind the last block, so "
        "that what would move it there gets no gradient",
    ),
    _Card(
        "supertuning",
        "Super-Tuning",
        "selective/unstructured",
        "W + delta at the entries of W that are largest in magnitude",
        "each chosen linear layer",
        "(1 - sparsity) C O",
        (Paper("Super-Tuning", 2026, "2607.09287"),),
        peft_type="SUPERTUNING",
        options={"sparsity": 0.99, "targets": _QV},
        count=each(_entries),
        frozen=each(_entries),
        merges="yes",
        memory="the places of its entries stand beside them",
        limits="with a LoRA beside it is the paper's Supra, which is not an option here",
    ),
    _Card(
        "trainable-tokens",
        "Trainable tokens",
        "selective/structured",
        "the embeddings of a few tokens learn, and those of the others stay",
        "the embedding, and a head that is the same matrix",
        "t d, of t tokens",
        (),
        peft_type="TRAINABLE_TOKENS",
        options={"ids": ("0",)},
        count=lambda matrices, shape, options: len(options["ids"]) * shape.dim,
        merges="yes",
        limits="for tokens that a tokenizer has learned anew; it is peft's own, of no paper",
    ),
)
