import pytest
import torch
import torch.nn.functional as F

from anabranch.nn.causal import causal_attention
from anabranch.nn.kernels import attention as native

CASES = [  # B, H, G, L, M, D
    (1, 1, 1, 16, 0, 16),
    (2, 4, 2, 37, 5, 16),
    (1, 2, 2, 100, 0, 48),
    (2, 4, 1, 530, 16, 32),  # keys beyond one lane of a left operand
    (1, 2, 1, 49, 1, 64),
    (1, 3, 3, 3, 2, 32),  # too short for the kernels
    (1, 2, 2, 20, 3, 12),  # too odd for them
]


def tensors(batch, heads, key_heads, length, front, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    query = drawn(batch, length, heads, width).transpose(1, 2).requires_grad_()  # as a projection leaves it
    key, value = (drawn(batch, key_heads, front + length, width).requires_grad_() for _ in range(2))
    return query, key, value, drawn(batch, heads, length, width)


def by_definition(query, key, value):
    """Each query's softmax over the keys it sees, one by one, in fp64."""
    shared, front = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    key, value = (part.double().repeat_interleave(shared, 1) for part in (key, value))
    rows = []
    for number in range(query.shape[2]):
        seen = front + number + 1
        logits = torch.einsum("bhd,bhsd->bhs", query[:, :, number].double(), key[:, :, :seen]) / query.shape[-1] ** 0.5
        rows.append(torch.einsum("bhs,bhsd->bhd", logits.softmax(-1), value[:, :, :seen]))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_the_definition(case, dtype):
    query, key, value, dy = (part.detach().to(dtype).requires_grad_() for part in tensors(*case))
    expected = by_definition(query, key, value)
    wanted = torch.autograd.grad(expected, (query, key, value), dy.double())
    ours = causal_attention(query, key, value)
    assert ours.dtype == dtype
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (1e-2, 2e-2)
    torch.testing.assert_close(ours.double(), expected, rtol=rtol, atol=atol)
    for found, gradient in zip(torch.autograd.grad(ours, (query, key, value), dy), wanted, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=2e-5)
        else:
            assert (found - gradient).double().norm() <= 1e-2 * gradient.double().norm()


@pytest.mark.skipif(not native.can(*tensors(*CASES[0])[:3]), reason="no compiled kernels here")
class TestKernels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_any_number_of_threads_gives_the_same_bits(self, dtype):
        query, key, value, dy = (part.detach().to(dtype).requires_grad_() for part in tensors(3, 4, 2, 70, 4, 32))
        found, before = [], torch.get_num_threads()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = causal_attention(query, key, value)
            found.append((y, *torch.autograd.grad(y, (query, key, value), dy)))
        torch.set_num_threads(before)
        assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))

    def test_what_comes_out_lies_as_what_went_in(self):
        """The query, whose heads lie between its positions, is not copied into another order."""
        query, key, value, dy = tensors(2, 4, 2, 37, 5, 16)
        y, log_sum = native.forward(query.detach(), key.detach(), value.detach())
        assert y.stride() == query.stride() != query.contiguous().stride()
        found = native.backward(dy, query.detach(), key.detach(), value.detach(), y, log_sum)
        assert [part.stride() for part in found] == [part.stride() for part in (query, key, value)]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("width", [16, 32, 48, 128])
    @pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e9])
    def test_scores_of_any_size_choose_the_largest(self, dtype, width, size):
        """Scores that are far apart: the weight of the largest is 1, and what softmax subtracts is it to the bit."""
        query, key, value, dy = (part.detach().to(dtype) for part in tensors(1, 2, 2, 70, 3, width))
        query = (query * size).requires_grad_()
        y = causal_attention(query, key, value)
        wanted = by_definition(query, key, value)
        most = ((query.double() @ key.double().transpose(-1, -2)) * width**-0.5).topk(2).values
        clear = (most[..., 0] - most[..., 1] > 1e-2 * most[..., 0].abs())[
            ..., None
        ]  # rounded products cannot exchange these
        assert y.isfinite().all()
        difference = (y.double() - wanted).abs().masked_fill(~clear, 0.0)
        tolerance = 1e-3 if dtype == torch.float32 else 2e-2
        assert difference.max() <= tolerance * wanted.abs().max()
        (gradient,) = torch.autograd.grad(y, query, dy)
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_equal_scores_of_any_size_share(self, dtype):
        query = torch.full((1, 1, 64, 32), 3e5).to(dtype).requires_grad_()
        value = torch.randn(1, 1, 64, 32).to(dtype)
        y = causal_attention(query, query.detach(), value)
        means = value.double().cumsum(2) / torch.arange(1, 65)[:, None]
        torch.testing.assert_close(y.double(), means, rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("of", ["key", "value"])
    @pytest.mark.parametrize("position", [1, 31, 47, 63, 99])
    def test_no_position_reaches_an_earlier_one(self, dtype, bad, of, position):
        front = 2
        query, key, value, _ = (part.detach().to(dtype) for part in tensors(2, 4, 2, 100, front, 32))
        before = causal_attention(query, key, value)
        (key if of == "key" else value)[0, 0, front + position] = bad
        after = causal_attention(query, key, value)
        same = torch.ones(2, 4, 100, dtype=torch.bool)
        same[0, :2, position:] = False
        torch.testing.assert_close(after[same], before[same], rtol=2e-2, atol=2e-2)
        assert not after[0, :2, position].isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_shapes_that_are_not_for_the_kernels(self, dtype):
        nothing = torch.randn(0, 2, 32, 32, dtype=dtype, requires_grad=True)
        causal_attention(nothing, nothing, nothing).sum().backward()
        assert nothing.grad.shape == nothing.shape
        one = torch.randn(32, 32).to(dtype).as_strided((1, 1, 32, 32), (0, 0, 32, 1))
        plain = one.clone(memory_format=torch.contiguous_format)
        assert torch.equal(causal_attention(one, one, one), causal_attention(plain, plain, plain))
        query, key, value, _ = (part.detach().to(dtype) for part in tensors(2, 2, 2, 32, 0, 32))
        assert not native.can(query, key[:1], value[:1])
        assert not native.can(query[0], key[0], value[0])
        assert causal_attention(query, key, value[..., :16]).shape[-1] == 16

    def test_a_gradient_that_is_one_number_everywhere(self):
        query, key, value, _ = tensors(1, 2, 2, 24, 0, 16)
        y = causal_attention(query, key, value)  # sum() hands on a tensor without strides of its own
        ours = torch.autograd.grad(y.sum(), (query, key, value))
        wanted = torch.autograd.grad(by_definition(query, key, value).sum(), (query, key, value))
        for found, gradient in zip(ours, wanted, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=2e-5)

    def test_other_types_and_lengths_are_left_to_torch(self):
        query, key, value, _ = tensors(1, 1, 1, 16, 0, 16)
        assert not native.can(query.double(), key.double(), value.double())
        assert not native.can(query.bfloat16(), key, value)
        assert not native.can(query.half(), key.half(), value.half())
        assert not native.can(*(part[..., :8] for part in (query, key, value)))
        long = key.new_zeros(1, 1, native.MOST_KEYS + 1, 16)
        assert not native.can(query, long, long)
        y = causal_attention(*(part.half() for part in (query, key, value)))
        reference = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.testing.assert_close(y.float(), reference, rtol=3e-2, atol=3e-2)
