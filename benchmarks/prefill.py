"""How fast is a prompt read by the compiled step, against torch's bare linear layers of the same sizes?

A decoder of the size of SmolLM2-135M with random weights. Ours is the whole of a prompt's way through `FastDecoder`: norms, rotary
positions, attention, storing keys and values, and the linear layers. The peer only multiplies: as many rows by the same matrices (queries,
keys and values in one, gate and up in one), in the same dtype, by `torch.nn.functional.linear`, or by oneDNN with weights that it has
packed beforehand, as ours has. Packing is counted on neither side. Scores are compared with the model's own first. Bar: 0.7 in bfloat16
from 128 to 512 tokens.

    python benchmarks/prefill.py --json benchmarks/results/prefill.avx512_bf16.json  # or of what instructions yours are
"""
# Shapes: T tokens, D width, U blocks of positions, V vocabulary

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from _harness import arguments, compare, finish, start
from anabranch.lm.decoder import Decoder
from anabranch.nn.attention import SelfAttention
from anabranch.nn.feed_forward import SwiGLU
from anabranch.serving.fast import FastDecoder

TOKENS = (128, 256, 512)
BLOCK = 16  # positions
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the median token's scores


def decoder(dtype: torch.dtype) -> Decoder:
    attention = SelfAttention.Config(num_heads=9, num_kv_heads=3)
    config = Decoder.Config(
        vocab_size=1024, dim=576, num_layers=30, attention=attention, feed_forward=SwiGLU.Config(hidden_dim=1536)
    )
    return config.build().to(dtype).eval()


def read_prompt(model: Decoder, token_T: Tensor) -> Callable[[], Tensor]:
    """The hidden states after the last norm, by the compiled step."""
    attention, blocks, dtype = model.blocks[0].attention, -(-len(token_T) // BLOCK), model.embedding.weight.dtype
    shape = (len(model.blocks), blocks * BLOCK, attention.num_kv_heads, attention.head_dim)
    fast = FastDecoder(model, torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), block_tokens=BLOCK)
    sequence_N4, table_U = np.array([[0, len(token_T), 0, 0]]), np.arange(blocks, dtype=np.int32)
    position_T = torch.arange(len(token_T))
    return lambda: fast.hidden(token_T, position_T, sequence_N4, table_U)[0]


def multiply_only(model: Decoder, num_tokens: int) -> dict[str, Callable[[], None]]:
    matrices = [
        module.weight.detach()
        for block in model.blocks
        for module in block.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    dtype = matrices[0].dtype
    rows = {width: torch.randn(num_tokens, width).to(dtype) for width in {w.shape[1] for w in matrices}}
    ready = [(torch.ops.mkldnn._reorder_linear_weight(matrix, num_tokens), matrix.shape[1]) for matrix in matrices]
    multiply = torch.ops.mkldnn._linear_pointwise

    def plain() -> None:
        with torch.no_grad():
            for matrix in matrices:
                F.linear(rows[matrix.shape[1]], matrix)

    def packed() -> None:
        with torch.no_grad():
            for matrix, width in ready:
                multiply(rows[width], matrix, None, "none", [], "")

    return {"torch's products": plain, "packed products": packed}


def check(model: Decoder, token_T: Tensor, ours_TD: Tensor) -> None:
    with torch.no_grad():
        theirs_TV = model(token_T[None]).logits_BLV[0].float()
        ours_TV = model.logits(ours_TD.to(model.embedding.weight.dtype)).float()
    error = ((ours_TV - theirs_TV).norm(dim=1) / theirs_TV.norm(dim=1)).median().item()
    allowed = TOLERANCE[model.embedding.weight.dtype]
    if not error <= allowed:
        raise SystemExit(f"scores of the vocabulary differ by {error:.1e}, more than {allowed:.0e}")


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    start(options)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        model = decoder(dtype)
        for count in TOKENS[:1] if options.quick else TOKENS:
            case = f"{count} tokens {str(dtype).removeprefix('torch.')}"
            if options.only not in case:
                continue
            token_T = torch.randint(1024, (count,))
            ours = read_prompt(model, token_T)
            check(model, token_T, ours())
            rows.append(compare(case, ours, multiply_only(model, count), rounds=options.rounds))
    finish("prefill", rows, options, ("torch", "anabranch"))


if __name__ == "__main__":
    main()
