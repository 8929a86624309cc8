"""Packed matrices: the layout is a bijection, rounding keeps its bound, rows of a product do not depend on each other."""

import ctypes
import shutil
import subprocess

import pytest
import torch

from anabranch.errors import ConfigError
from anabranch.native.sources import HERE
from anabranch.nn import kernels, packed
from anabranch.nn.kernels import packed as native
from anabranch.nn.kernels.binding import Library
from anabranch.nn.packed import KINDS, Packed

needs_kernels = pytest.mark.skipif(kernels.load() is None, reason="no compiler")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 32), (50, 96), (3, 40, 64)])
def test_floats_come_back(shape):
    weight = normal(*shape)
    assert torch.equal(Packed.pack(weight, "float32").unpack().view(shape), weight)
    assert torch.equal(Packed.pack(weight, "bfloat16").unpack(torch.bfloat16).view(shape), weight.bfloat16())


@pytest.mark.parametrize(("kind", "most"), [("int8", 255), ("int4", 15)])
def test_integers_come_back(kind, most):
    generator = torch.Generator().manual_seed(1)
    number = torch.randint(0, most + 1, (2, 21, 128), generator=generator, dtype=torch.uint8)
    scale, least = (torch.randn((2, 21, 2), generator=generator).half() for _ in range(2))
    found = Packed.of_integers(number, scale, least, kind).integers()
    wanted = (number, scale, least if kind == "int4" else torch.zeros_like(least))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize(("kind", "symmetric"), [("int8", False), ("int4", False), ("int4", True)])
def test_rounding_loses_half_a_step(kind, symmetric, group):
    weight = normal(33, 128) * normal(33, 1, seed=1).exp()
    packed = Packed.pack(weight, kind, group=group, symmetric=symmetric)
    grouped = weight.unflatten(-1, (-1, group or 128))
    step = packed.integers()[1][0].float().abs().unsqueeze(-1)
    lost = (packed.unpack()[0].unflatten(-1, (-1, group or 128)) - grouped).abs()
    # fp16 keeps scales and minima to 2^-11: the ends of the range may lie that much outside of what the steps reach
    slack = grouped.abs().amax(-1, keepdim=True) * 2**-10 + 1e-6
    inside = lost <= step / 2 + slack
    if symmetric:  # seven steps on one side, eight on the other: the end of the shorter side is cut
        inside |= lost <= step + slack
    assert inside.all()
    steps = {"int8": 127, "int4": 8 if symmetric else 15}[kind]
    span = grouped.abs().amax(-1) if kind == "int8" or symmetric else grouped.amax(-1) - grouped.amin(-1)
    assert torch.allclose(step.squeeze(-1), span / steps, rtol=2e-3, atol=1e-4)


def test_constant_and_zero_rows_are_exact():
    weight = torch.zeros(16, 64)
    weight[1] = 0.5
    weight[2] = -0.25
    assert torch.equal(Packed.pack(weight, "int4", group=32).unpack()[0], weight)


@pytest.mark.parametrize(
    ("shape", "group", "message"), [((4, 40), None, "depth"), ((4, 96), 64, "divides"), ((4, 64), 48, "multiple of 32")]
)
def test_sizes_that_cannot_be_packed(shape, group, message):
    with pytest.raises(ConfigError, match=message):
        Packed.pack(torch.zeros(shape), "int4", group=group)


@pytest.mark.parametrize("value", [float("nan"), 1e9])
def test_weights_beyond_the_scales(value):
    with pytest.raises(ConfigError, match="not finite"):
        Packed.pack(torch.full((16, 32), value), "int8")


@pytest.mark.parametrize(("kind", "symmetric"), [("int8", False), ("int4", False), ("int4", True)])
@pytest.mark.parametrize("power", range(-12, 1))
def test_small_weights_keep_their_digits_or_are_refused(kind, symmetric, power):
    """fp16 ends at 6e-8: a matrix loses no more than one of ordinary size, a hundredth of its greatest weight beside, or is not taken."""
    weight = normal(32, 64) * 10.0**power
    step = {"int8": 254, "int4": 8 if symmetric else 15}[kind]
    try:
        found = Packed.pack(weight, kind, group=32, symmetric=symmetric).unpack()[0]
    except ConfigError as error:
        said = str(error)
        greatest = float(weight.abs().max())
        assert said.startswith(f"weights of at most {greatest:.3g} are too small for fp16 scales; keep this matrix in")
        assert power <= -4
        return
    assert power >= -5
    assert (found - weight).abs().max() <= weight.abs().max() * (1 / step + 0.02)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_small_row_beside_ordinary_ones_is_taken_and_small_rows_at_the_end_are_refused_alike(kind, monkeypatch):
    weight = normal(64, 64)
    weight[40:] *= 1e-9
    found = Packed.pack(weight, kind, group=32).unpack()[0]
    assert (found[40:] - weight[40:]).abs().max() < 1e-8
    # Of a matrix that is rounded a few rows at a time, all count.
    monkeypatch.setattr(packed, "AT_ONCE", 16 * 64)
    assert torch.equal(Packed.pack(weight, kind, group=32).unpack()[0], found)
    with pytest.raises(ConfigError, match="too small for fp16 scales"):
        Packed.pack(weight * 1e-7, kind, group=32)


def rounded(x):
    """What the kernels make of activations of integer weights."""
    grouped = x.unflatten(-1, (-1, 32))
    scale = grouped.abs().amax(-1, keepdim=True) / 127
    return ((grouped / torch.where(scale == 0, 1, scale)).round() * scale).flatten(-2)


def reference(packed, x):
    if packed.kind.startswith("int"):
        x = rounded(x)
    elif packed.kind == "bfloat16":
        x = x.bfloat16().float()
    return (x.double() @ packed.unpack(torch.float64)[0].T).float()


CASES = [
    ("float32", None),
    ("bfloat16", None),
    ("int8", None),
    ("int8", 32),
    ("int4", 32),
    ("int4", 64),
    ("int4", None),
]


@needs_kernels
@pytest.mark.parametrize(("kind", "group"), CASES)
@pytest.mark.parametrize("rows", [16, 50, 192])
def test_products(kind, group, rows):
    packed = Packed.pack(normal(rows, 192) / 8, kind, group=group)
    x, bias = normal(37, 192, seed=2), normal(rows, seed=3)
    y = packed.linear(x, bias)
    assert torch.allclose(y, reference(packed, x) + bias, atol=2e-3 if kind.startswith("int") else 1e-5)
    assert torch.allclose(packed.linear(x.bfloat16(), bias).float(), y, atol=0.05, rtol=0.02)


@needs_kernels
@pytest.mark.parametrize(("kind", "group"), CASES)
def test_a_row_has_the_same_bits_in_any_company(kind, group):
    packed, x = Packed.pack(normal(40, 128), kind, group=group), normal(67, 128, seed=4)
    alone = torch.cat([packed.linear(row[None]) for row in x])
    for count in (2, 3, 11, 12, 13, 17, 33, 67):
        assert torch.equal(packed.linear(x[:count]), alone[:count])


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind):
    packed, x = Packed.pack(normal(100, 64), kind), normal(19, 64, seed=5)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(packed.linear(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_gives_none_and_leaves_the_others_alone(kind, wrong):
    matrix, x = (
        Packed.pack(normal(32, 128), kind, group=32 if kind in ("int8", "int4") else None),
        normal(5, 128, seed=1),
    )
    wanted = native.linear(matrix, x)
    x[2, 70] = wrong
    found = native.linear(matrix, x)
    assert not torch.isfinite(found[2]).any()
    assert torch.equal(found[[0, 1, 3, 4]], wanted[[0, 1, 3, 4]])


@needs_kernels
def test_rows_of_zeros_stay_zeros():
    for kind in KINDS:
        packed, x = Packed.pack(normal(16, 64), kind), normal(3, 64)
        x[1] = 0
        assert torch.equal(packed.linear(x)[1], torch.zeros(16))


@needs_kernels
def test_without_kernels_the_weights_are_unpacked(monkeypatch):
    packed, x = Packed.pack(normal(48, 64), "int4", group=32), normal(5, 64)
    quick = packed.linear(x)
    monkeypatch.setattr(native, "load", lambda: None)
    slow = packed.linear(x)
    assert torch.allclose(slow, x @ packed.unpack()[0].T, atol=1e-5)
    assert torch.allclose(slow, quick, atol=0.2)
    assert not torch.equal(slow, quick)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("flags", [("-mavx2", "-mfma", "-mf16c"), ("-msse2",)])
def test_older_processors(flags, tmp_path, monkeypatch):
    """The same source for processors without the newest instructions gives the same products."""
    target, source = tmp_path / "packed.so", HERE / "packed.cpp"
    command = ["g++", "-std=gnu++17", "-O3", *flags, "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    monkeypatch.setattr(native, "LINEAR", native.LINEAR.bound_to(Library(ctypes.CDLL(str(target)))))
    for kind, group in CASES:
        packed, x = Packed.pack(normal(40, 192), kind, group=group), normal(21, 192, seed=6)
        y = packed.linear(x)
        assert torch.allclose(y, reference(packed, x), atol=5e-3, rtol=1e-4)
        assert torch.equal(y[7:8], packed.linear(x[7:8]))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_one_matrix_of_integers_is_packed_like_a_pool_of_one(kind):
    number = torch.randint(0, 16, (21, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale, least = normal(21, 2).half(), normal(21, 2, seed=1).half()
    for minima in (least, None):
        one = Packed.of_integers(number, scale, minima, kind)
        pool = Packed.of_integers(number[None], scale[None], None if minima is None else minima[None], kind)
        assert torch.equal(one.data, pool.data)
        assert (one.num_experts, one.rows, one.depth, one.group) == (1, 21, 64, 32)
    assert Packed.pack(normal(3, 40, 64), kind).num_experts == 3


@pytest.mark.parametrize("symmetric", [False, True])
def test_minima_that_have_no_place_in_fp16_are_refused(symmetric):
    """An eighth of 100,000 is a fine scale, eight of them are no minimum."""
    weight = normal(3, 64)
    weight[1] = -1e5
    with pytest.raises(ConfigError, match="not finite, or too large for fp16 scales"):
        Packed.pack(weight, "int4", group=32, symmetric=symmetric)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_single_rows_are_those_of_the_matrix(kind):
    weight_NK = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    packed = Packed.pack(weight_NK, kind, group=32 if kind.startswith("int") else None)
    index_T = torch.tensor([0, 39, 17, 17, 16, 3])
    found = packed.rows_at(index_T)
    assert found.dtype == (torch.bfloat16 if kind == "bfloat16" else torch.float32)
    assert torch.equal(found.float(), packed.unpack()[0][index_T])


@pytest.mark.parametrize(("kind", "zero"), [("int8", 128), ("int4", 8)])
def test_zeros_of_single_rows_have_the_signs_of_their_scales(kind, zero):
    """As where a format takes off its zero before it scales: a digest of the table compares bits with those of one in floats."""
    generator = torch.Generator().manual_seed(0)
    number_NK = torch.randint(zero - 2, zero + 3, (40, 96), generator=generator, dtype=torch.uint8)
    scale_NG = torch.randn(40, 3, generator=generator).half()
    packed = Packed.of_integers(number_NK, scale_NG, -zero * scale_NG, kind)
    wanted = (number_NK.float() - zero) * scale_NG.float().repeat_interleave(32, -1)
    is_zero = wanted == 0
    assert len(set(wanted[is_zero].signbit().tolist())) == 2
    found = packed.rows_at(torch.arange(40))
    assert torch.equal(found.signbit()[is_zero], wanted.signbit()[is_zero])
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)
