"""Attention in one process by its definition, with a loop over queries: what all of the ring's tests compare with."""
# Shapes: B sequences, S positions, H query heads, G key heads, D head width

import torch
from torch import Tensor


def is_seen(query: int, key: int, causal: bool, window: int | None, documents: tuple[int, ...] | None) -> bool:
    if causal and key > query:
        return False
    if window is not None and query - key >= window:
        return False
    if documents is None:
        return True
    return [sum(place <= at for place in documents) for at in (query, key)].count(
        sum(place <= query for place in documents)
    ) == 2


def naive(
    q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, causal=False, window=None, documents=None, scale=None
) -> Tensor:
    shared = q_BSHD.shape[2] // k_BSGD.shape[2]
    k, v = (part.repeat_interleave(shared, 2) for part in (k_BSGD, v_BSGD))
    scale = q_BSHD.shape[3] ** -0.5 if scale is None else scale
    rows = []
    for query in range(q_BSHD.shape[1]):
        keys = [key for key in range(k.shape[1]) if is_seen(query, key, causal, window, documents)]
        score_BHS = torch.einsum("bhd,bshd->bhs", q_BSHD[:, query], k[:, keys]) * scale
        rows.append(torch.einsum("bhs,bshd->bhd", score_BHS.softmax(-1), v[:, keys]))
    return torch.stack(rows, 1) if rows else q_BSHD.clone()


def drawn(
    batch: int, length: int, heads: int, kv_heads: int, width: int, dtype=torch.float64, seed: int = 0
) -> list[Tensor]:
    """q, k and v that ask for gradients, and what out is differentiated with."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, length, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    return [
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(number < 3)
        for number, size in enumerate(sizes)
    ]
