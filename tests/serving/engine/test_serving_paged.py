"""Attention over a paged store, compiled and in plain torch, against a naive loop in float64 and against the model's own cache."""
# Shapes: P streams, T rows of a step, H query heads, G key-value heads, D head width, M prefix entries, S positions

import pytest
import torch

from anabranch.errors import CapacityError, InputError
from anabranch.nn.kernels import load
from anabranch.serving.core.batch import Chunk
from anabranch.serving.engine import PagedPool, PagedShape, PagedStore
from anabranch.serving.engine.layout import StepLayout
from anabranch.testing import DEVICES

KERNEL = pytest.param(True, marks=pytest.mark.skipif(load() is None, reason="no C++ compiler"))
LENGTHS = (1, 70, 3, 129, 16, 17)


class Sequences:
    """Random queries, keys and values of some sequences, and scattered blocks for them."""

    def __init__(
        self, lengths=LENGTHS, *, heads=6, kv_heads=2, width=16, streams=1, prefix=0, dtype=torch.float32, block=16
    ):
        generator = torch.Generator().manual_seed(len(lengths) * width + prefix)

        def draw(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        self.lengths, self.block = lengths, block
        self.query = [draw(streams, heads, length, width) for length in lengths]
        self.key = [draw(streams, kv_heads, length, width) for length in lengths]
        self.value = [draw(streams, kv_heads, length, width) for length in lengths]
        self.prefix = [tuple(draw(streams, kv_heads, prefix, width) for _ in range(2))] if prefix else []
        counts = [-(-length // block) for length in lengths]
        order = torch.randperm(sum(counts) + 5, generator=generator).tolist()
        self.blocks = [tuple(order.pop() for _ in range(count)) for count in counts]
        shape = PagedShape(layers=1, heads=kv_heads, width=width, streams=streams, dtype=dtype)
        self.pool = PagedPool(shape, sum(counts) + 5, block_tokens=block)
        for part in (self.pool.key, self.pool.value):
            part.fill_(torch.nan)  # nothing that was not written may count

    def step(self, parts, *, use_kernel):
        """Run (sequence, first, last) parts as one step; y_PHLD of each."""
        chunks = [
            Chunk(id=str(n), tokens=(0,) * (last - first), start=first, blocks=self.blocks[n], samples=False)
            for n, first, last in parts
        ]
        rows = [
            torch.cat([tensors[n][:, :, first:last] for n, first, last in parts], dim=2)
            for tensors in (self.query, self.key, self.value)
        ]
        store = PagedStore(self.pool, StepLayout(chunks, self.block), self.prefix, use_kernel=use_kernel)
        assert store.use_kernel == use_kernel
        return store.attend(0, *rows).split([last - first for _, first, last in parts], dim=2)

    def expected(self, n):
        """y_PHLD of a whole sequence, in float64."""
        fronts = self.prefix[0] if self.prefix else (self.key[n][:, :, :0], self.value[n][:, :, :0])
        key, value = (
            torch.cat(pair, dim=2).double() for pair in zip(fronts, (self.key[n], self.value[n]), strict=True)
        )
        query = self.query[n].double()
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        score = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        hidden = torch.ones(score.shape[2:], dtype=torch.bool).triu(1 + fronts[0].shape[2])
        return score.masked_fill(hidden, -torch.inf).softmax(-1) @ value


def whole(sequences):
    return [(n, 0, length) for n, length in enumerate(sequences.lengths)]


SHAPES = [
    {},
    {"heads": 4, "kv_heads": 4, "width": 4, "block": 4},
    {"heads": 3, "kv_heads": 1, "width": 64, "prefix": 5, "streams": 3},
    {"heads": 9, "kv_heads": 3, "width": 40, "block": 3, "prefix": 48},
    {"heads": 60, "kv_heads": 1, "width": 2, "block": 32},
]


@pytest.mark.parametrize("use_kernel", [KERNEL, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_sees_its_own_sequence_up_to_itself(shape, use_kernel):
    sequences = Sequences(**shape)
    for n, y in enumerate(sequences.step(whole(sequences), use_kernel=use_kernel)):
        torch.testing.assert_close(y.double(), sequences.expected(n), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_kernel", [KERNEL, False])
def test_prompts_in_chunks_beside_single_tokens(use_kernel):
    sequences = Sequences(prefix=3, streams=2)
    steps = [
        [(1, 0, 40), (3, 0, 100)],
        [(0, 0, 1), (1, 40, 69), (3, 100, 128), (5, 0, 16)],
        [(1, 69, 70), (3, 128, 129), (4, 0, 16), (5, 16, 17), (2, 0, 3)],
    ]
    for parts in steps:
        for (n, first, last), y in zip(parts, sequences.step(parts, use_kernel=use_kernel), strict=True):
            torch.testing.assert_close(y.double(), sequences.expected(n)[:, :, first:last], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_kernel", [KERNEL, False])
def test_bfloat16_is_kept_and_summed_in_float32(use_kernel):
    sequences = Sequences(dtype=torch.bfloat16, width=32)
    for n, y in enumerate(sequences.step(whole(sequences), use_kernel=use_kernel)):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), sequences.expected(n), atol=2e-2, rtol=2e-2)
        if use_kernel:  # rounded once, at the end
            torch.testing.assert_close(y, sequences.expected(n).to(torch.bfloat16), atol=1e-6, rtol=2**-7)


@pytest.mark.skipif(load() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_gives_a_row_the_same_bits_in_any_company(shape, dtype):
    sequences = Sequences(**shape, dtype=dtype)
    together = [y.clone() for y in sequences.step(whole(sequences), use_kernel=True)]
    for n, length in enumerate(sequences.lengths):
        alone = sequences.step([(n, 0, length)], use_kernel=True)[0]
        one_by_one = torch.cat([sequences.step([(n, i, i + 1)], use_kernel=True)[0] for i in range(length)], dim=2)
        assert torch.equal(alone, together[n])
        assert torch.equal(one_by_one, together[n])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded = sequences.step(whole(sequences)[::-1], use_kernel=True)[::-1]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(threaded, together, strict=True))


@pytest.mark.skipif(load() is None, reason="no C++ compiler")
def test_the_kernel_does_not_overflow_and_keeps_nan_visible():
    sequences = Sequences((40,), width=16)
    sequences.query[0].mul_(1e4)
    y = sequences.step([(0, 0, 40)], use_kernel=True)[0]
    torch.testing.assert_close(y.double(), sequences.expected(0), atol=1e-4, rtol=1e-4)
    sequences.key[0][:, :, 20] = torch.nan
    y = sequences.step([(0, 0, 40)], use_kernel=True)[0]
    assert y[:, :, :20].isfinite().all()
    assert y[:, :, 20:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("streams", [1, 2])
def test_a_store_attends_as_the_models_own_cache_does(tiny_model, streams, device):
    model = tiny_model(streams).to(device)
    tokens = torch.arange(37, device=device)[None] % 31
    shape = PagedShape.of(model)
    pool = PagedPool(shape, 5, block_tokens=8, device=device)
    cache = model.new_cache(40)
    prefix = [] if model.streams is None else model.streams.prefixes()
    with torch.inference_mode():
        for first, last in ((0, 20), (20, 21), (21, 37)):
            expected = model(tokens[:, first:last], cache=cache).logits_BLV
            chunk = Chunk(id="a", tokens=(0,) * (last - first), start=first, blocks=(4, 1, 3, 0, 2), samples=True)
            store = PagedStore(pool, StepLayout([chunk], 8, device), prefix)
            context = model.context(tokens[:, first:last])
            position = torch.arange(first, last, device=device)[None]
            context.rotary, context.cache = model.rotary(position, shape.dtype), store
            x = model.hidden(tokens[:, first:last], context)
            got = model.logits(x if model.streams is None else model.streams.merge(x, context))
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


# -- the memory


def test_blocks_are_copied_and_swapped_in_every_layer_and_stream():
    shape = PagedShape(layers=2, heads=1, width=2, streams=2)
    pool = PagedPool(shape, 4, block_tokens=2, host_blocks=2)
    for part in (pool.key, pool.value):
        part.copy_(torch.arange(part.numel()).view_as(part))
    before = pool.key.clone().unflatten(2, (4, 2))
    pool.copy([(0, 1), (1, 0)])
    blocks = pool.key.unflatten(2, (4, 2))
    assert torch.equal(blocks[:, :, :2], before[:, :, [1, 0]])
    pool.swap_out([(2, 1), (3, 0)])
    pool.key.zero_()
    pool.swap_in([(1, 0), (0, 3)])
    blocks = pool.key.unflatten(2, (4, 2))
    assert torch.equal(blocks[:, :, 0], before[:, :, 2])
    assert torch.equal(blocks[:, :, 3], before[:, :, 3])
    assert not blocks[:, :, 1:3].any()


def test_a_pool_says_what_it_cannot_do():
    shape = PagedShape(layers=2, heads=3, width=4, streams=2, dtype=torch.bfloat16)
    assert shape.bytes_per_token == 2 * 2 * 2 * 3 * 4 * 2
    assert shape.blocks_in(shape.bytes_per_token * 16 * 7 + 1, 16) == 7
    with pytest.raises(
        CapacityError, match=r"^100 bytes hold no block of the key-value cache; one of 16 tokens takes 3072 bytes$"
    ):
        shape.blocks_in(100, 16)
    pool = PagedPool(shape, 3)
    assert pool.size_bytes == pool.key.nbytes + pool.value.nbytes
    with pytest.raises(InputError, match="no host blocks"):
        pool.swap_out([(0, 0)])
    with pytest.raises(InputError, match=r"^buffers must be of torch\.bfloat16 and shape \[2, 2, 64, 3, 4\]$"):
        PagedPool(shape, 4, buffers=(pool.key, pool.value))
    with pytest.raises(CapacityError, match="no memory for a key-value cache"):
        PagedPool(shape, 10**14)
