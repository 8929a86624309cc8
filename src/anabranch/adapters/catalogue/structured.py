"""Cards of what changes matrices by other structures: rotations, Kronecker and Hadamard products, spectra, banks of vectors."""

from collections.abc import Sequence

from anabranch.adapters.catalogue.card import Card, Op, Options, Paper, Work
from anabranch.adapters.catalogue.shape import Matrix, Shape
from anabranch.adapters.catalogue.works import DENSE, ELEMENTWISE, LOW_RANK, each, low_rank

__all__ = ["CARDS"]

_QV = ("q", "v")


def _factors(size: int) -> tuple[int, int]:
    """The two factors of a number that are nearest to its root, the smaller one first."""
    small = next(number for number in range(int(size**0.5), 0, -1) if size % number == 0)
    return small, size // small


def _lokr(matrix: Matrix, options: Options) -> int:
    (out_small, out_large), (in_small, in_large) = _factors(matrix.out_dim), _factors(matrix.in_dim)
    rank = options["rank"]
    inner = rank * (out_large + in_large) if rank < max(out_large, in_large) / 2 else out_large * in_large
    return out_small * in_small + inner


def _block(matrix: Matrix, options: Options) -> int:
    """The size of OFT's blocks: what was asked for, or the nearest number that divides the inputs."""
    wanted = options["block"]
    if matrix.in_dim % wanted == 0:
        return wanted
    higher = next((size for size in range(wanted, matrix.in_dim + 1) if matrix.in_dim % size == 0), matrix.in_dim)
    lower = next(size for size in range(wanted, 0, -1) if matrix.in_dim % size == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _oft(matrix: Matrix, options: Options) -> int:
    block = _block(matrix, options)
    return matrix.in_dim // block * (block * (block - 1) // 2)


def _vblora(matrices: Sequence[Matrix], shape: Shape, options: Options) -> int:
    bank = options["vectors"] * options["length"]
    logits = sum(
        options["rank"] * options["vectors"] * (matrix.in_dim + matrix.out_dim) // options["length"]
        for matrix in matrices
    )
    return bank + logits


def _psoft(matrix: Matrix, options: Options) -> int:
    rank = options["rank"]
    return rank * (rank - 1) // 2 + 2 * rank


CARDS = (
    Card(
        "loha",
        "LoHa",
        "reparameterised/Hadamard",
        "W + (B1 A1) * (B2 A2), entry by entry",
        "in each chosen linear layer",
        "2 r (C + O)",
        (
            Paper(
                "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", 2021, "2108.06098"
            ),
        ),
        backend="peft",
        peft_type="LOHA",
        mixed="server",
        options={"rank": 8, "targets": _QV},
        count=each(lambda matrix, options: 2 * low_rank(matrix, options)),
        work=Work(
            "2 C O + building its matrix once per pass",
            lambda matrix, options: [Op(2 * matrix.size, per_call=4 * options["rank"] * matrix.size)],
        ),
        merges="yes",
    ),
    Card(
        "lokr",
        "LoKr",
        "reparameterised/Kronecker",
        "W + K1 (x) K2, of factors near the roots of C and O; K2 of low rank where that is less",
        "in each chosen linear layer",
        "c1 o1 + min(c2 o2, r (c2 + o2)) with C = c1 c2, O = o1 o2",
        (
            Paper(
                "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
                2023,
                "2309.14859",
            ),
        ),
        backend="peft",
        peft_type="LOKR",
        mixed="server",
        options={"rank": 8, "targets": _QV},
        count=each(_lokr),
        work=DENSE,
        merges="yes",
    ),
    Card(
        "hira",
        "HiRA",
        "reparameterised/Hadamard",
        "W + W * (B A), entry by entry",
        "in each chosen linear layer",
        "r (C + O)",
        (Paper("HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", 2025),),
        backend="peft",
        peft_type="HIRA",
        mixed="server",
        options={"rank": 32, "targets": _QV},
        count=each(low_rank),
        work=Work(
            "2 C O + building its matrix once per pass",
            lambda matrix, options: [Op(2 * matrix.size, per_call=2 * options["rank"] * matrix.size)],
        ),
        merges="yes",
    ),
    Card(
        "miss",
        "MiSS",
        "reparameterised/sharing",
        "W + one row of r learned rows for each run of inputs (DiSHA, Bone)",
        "beside each chosen linear layer",
        "r O",
        (
            Paper(
                "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", 2024, "2409.15371"
            ),
        ),
        backend="peft",
        peft_type="MISS",
        mixed="server",
        options={"rank": 64, "targets": _QV},
        count=each(lambda matrix, options: options["rank"] * matrix.out_dim),
        work=Work("2 r O", lambda matrix, options: [Op(2 * options["rank"] * matrix.out_dim)]),
        merges="yes",
    ),
    Card(
        "gralora",
        "GraLoRA",
        "reparameterised/low-rank blocks",
        "LoRA of k times k blocks of the matrix",
        "beside each chosen linear layer",
        "r (C + O)",
        (Paper("GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", 2025, "2505.20355"),),
        backend="peft",
        peft_type="GRALORA",
        mixed="server",
        options={"rank": 32, "targets": _QV},
        count=each(low_rank),
        merges="yes",
    ),
    Card(
        "delora",
        "DeLoRA",
        "reparameterised/low-rank",
        "W + (l |W| / r) sum_i b_i a_i / (|b_i| |a_i|): learned directions, one learned length",
        "beside each chosen linear layer",
        "r (C + O) + 1",
        (Paper("Decoupling Angles and Strength in Low-rank Adaptation", 2025, "2503.18225"),),
        backend="peft",
        peft_type="DELORA",
        mixed="server",
        options={"rank": 8, "targets": _QV},
        count=each(lambda matrix, options: low_rank(matrix, options) + 1),
        work=LOW_RANK,
        merges="yes",
    ),
    Card(
        "fourierft",
        "FourierFT",
        "reparameterised/spectral",
        "W + s F^-1(k learned coefficients of a random place in its spectrum)",
        "in each chosen linear layer",
        "k",
        (Paper("Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", 2024, "2405.03003"),),
        backend="peft",
        peft_type="FOURIERFT",
        mixed="server",
        options={"entries": 1000, "targets": _QV},
        count=each(lambda matrix, options: options["entries"]),
        work=DENSE,
        merges="yes",
        starts_as_base=False,
        limits="a transform of the whole matrix in every pass; .096 in the measured table as it comes",
    ),
    Card(
        "waveft",
        "WaveFT",
        "reparameterised/spectral",
        "W + s times the inverse wavelet transform of k learned coefficients",
        "in each chosen linear layer",
        "k",
        (Paper("Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", 2025, "2505.12532"),),
        backend="peft",
        peft_type="WAVEFT",
        mixed="server",
        options={"entries": 1000, "targets": _QV},
        count=each(lambda matrix, options: options["entries"]),
        work=DENSE,
        merges="yes",
    ),
    Card(
        "c3a",
        "C3A",
        "reparameterised/circulant",
        "W + blocks of circulant matrices, of b numbers each",
        "beside each chosen linear layer",
        "C O / b",
        (Paper("Parameter-Efficient Fine-Tuning via Circular Convolution", 2024, "2407.19342"),),
        backend="peft",
        peft_type="C3A",
        mixed="server",
        options={"block": 64, "targets": _QV},
        count=each(lambda matrix, options: matrix.size // options["block"]),
        merges="yes",
        limits="b must divide C and O; computed by Fourier transforms, in float32",
    ),
    Card(
        "vblora",
        "VB-LoRA",
        "reparameterised/shared projections",
        "A and B of LoRA put together from the best k of a bank of vectors, which all layers share",
        "beside each chosen linear layer",
        "h b + r h (C + O) / b",
        (Paper("VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", 2024, "2405.15179"),),
        backend="peft",
        peft_type="VBLORA",
        mixed="server",
        options={"rank": 4, "vectors": 256, "length": 256, "targets": _QV},
        count=_vblora,
        work=LOW_RANK,
        merges="yes",
        starts_as_base=False,
        limits="b must divide C and O; of a file only the best k of the logits need to be kept",
    ),
    Card(
        "oft",
        "OFT",
        "reparameterised/orthogonal",
        "W R with R block-diagonal and orthogonal, by Cayley's transform of b (b - 1) / 2 numbers each",
        "on the inputs of each chosen linear layer",
        "(C / b) b (b - 1) / 2",
        (Paper("Controlling Text-to-Image Diffusion by Orthogonal Finetuning", 2023, "2306.07280"),),
        backend="peft",
        peft_type="OFT",
        mixed="server",
        options={"block": 32, "targets": _QV},
        count=each(_oft),
        work=Work("2 b C", lambda matrix, options: [Op(2 * _block(matrix, options) * matrix.in_dim)]),
        merges="yes",
    ),
    Card(
        "boft",
        "BOFT",
        "reparameterised/orthogonal",
        "W R with R a product of m butterflies of orthogonal blocks, and a learned length of each row",
        "on the inputs of each chosen linear layer",
        "m C b + O",
        (Paper("Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", 2023, "2311.06243"),),
        backend="peft",
        peft_type="BOFT",
        mixed="server",
        options={"block": 4, "targets": _QV},
        count=each(lambda matrix, options: matrix.in_dim * options["block"] + matrix.out_dim),
        merges="yes",
        limits="the slowest of the measured table; without its CUDA kernel m is 1",
    ),
    Card(
        "hra",
        "HRA",
        "reparameterised/orthogonal",
        "W times r Householder reflections of learned vectors",
        "on the inputs of each chosen linear layer",
        "r C",
        (
            Paper(
                "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
                2024,
                "2405.17484",
            ),
        ),
        backend="peft",
        peft_type="HRA",
        mixed="server",
        options={"rank": 8, "targets": _QV},
        count=each(lambda matrix, options: options["rank"] * matrix.in_dim),
        merges="yes",
        limits="r must be even for it to start as the base",
    ),
    Card(
        "road",
        "RoAd",
        "reparameterised/orthogonal",
        "pairs of outputs turned by an angle and stretched, each learned",
        "on the outputs of each chosen linear layer",
        "O (2 O and 4 O in its larger variants)",
        (
            Paper(
                "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability",
                2024,
                "2409.00119",
            ),
        ),
        backend="peft",
        peft_type="ROAD",
        options={"group": 64, "targets": _QV},
        count=each(lambda matrix, options: matrix.out_dim),
        work=ELEMENTWISE,
        merges="yes",
        mixed="server",
        limits="its group must divide O",
    ),
    Card(
        "psoft",
        "PSOFT",
        "reparameterised/orthogonal",
        "an orthogonal turn and two scales within the main r directions of W",
        "beside each chosen linear layer",
        "r (r - 1) / 2 + 2 r",
        (Paper("Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", 2025, "2505.11235"),),
        backend="peft",
        peft_type="PSOFT",
        mixed="server",
        options={"rank": 32, "targets": _QV},
        count=each(_psoft),
        merges="yes",
    ),
)
