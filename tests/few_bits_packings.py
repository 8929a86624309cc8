"""Weights as FP8, GPTQ, AWQ and MXFP4 store them, drawn at random, with the numbers that they mean.

``pack(weight, table)`` gives (name of each stored part: tensor, values [N, K]) for a matrix of the shape of ``weight``; ``table`` is the
``quantization_config``.
"""

import json

import torch
from safetensors.torch import load_file, save_file

from anabranch.lm.formats.few_bits import AWQ_ORDER


def packed_int32(number, bits, dim):
    """The lowest bits first."""
    number = number.movedim(dim, -1).long().unflatten(-1, (-1, 32 // bits))
    made = sum(number[..., i] << (bits * i) for i in range(32 // bits))
    return torch.where(made >= 2**31, made - 2**32, made).int().movedim(-1, dim).contiguous()


def fp8(weight, table):
    blocks = table["weight_block_size"]
    number = torch.randn(weight.shape).to(torch.float8_e4m3fn)
    scale = torch.rand([-(-length // part) for length, part in zip(weight.shape, blocks, strict=True)]) * 0.2
    value = number.float()
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            value[i, j] *= scale[i // blocks[0], j // blocks[1]]
    return {"weight": number, "weight_scale_inv": scale}, value


def gptq(weight, table):
    bits, size = table["bits"], table["group_size"]
    rows, depth = weight.shape
    number = torch.randint(0, 2**bits, (depth, rows))
    zero = torch.randint(0, 2**bits, (depth // size, rows))
    zero = torch.full_like(zero, 8) if table.get("sym") else zero
    scale = (torch.rand(depth // size, rows) * 0.1).half()
    group = torch.arange(depth) // size
    if table["desc_act"]:
        group = group[torch.randperm(depth)]
    value = (number - zero[group]).float() * scale.float()[group]
    stored = zero if table.get("checkpoint_format") == "gptq_v2" else (zero - 1) % 2**bits
    parts = {"qweight": packed_int32(number, bits, 0), "qzeros": packed_int32(stored, bits, 1), "scales": scale}
    return {**parts, "g_idx": group.int()}, value.t()


def awq(weight, table):
    size = table["group_size"]
    rows, depth = weight.shape
    number, zero = torch.randint(0, 16, (depth, rows)), torch.randint(0, 16, (depth // size, rows))
    scale = (torch.rand(depth // size, rows) * 0.1).half()
    value = (number - zero.repeat_interleave(size, 0)).float() * scale.float().repeat_interleave(size, 0)
    order = torch.tensor(AWQ_ORDER)
    number, zero = (part.unflatten(1, (-1, 8))[..., order].flatten(1) for part in (number, zero))
    return {"qweight": packed_int32(number, 4, 1), "qzeros": packed_int32(zero, 4, 1), "scales": scale}, value.t()


WAYS = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [24, 16]}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}),
    "gptq, ordered": (gptq, {"quant_method": "gptq", "bits": 8, "group_size": 16, "desc_act": True}),
    "gptq v2": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}),
}


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 64}
QWEN = {**MOE, "head_dim": 16}
GPT_OSS = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e3},
}


def folder_of(place, way):
    """A Qwen3-MoE whose projections are stored so, beside one of the same numbers in floating point."""
    from foreign_models import build_theirs

    pack, table = WAYS[way]
    torch.manual_seed(5)
    build_theirs("Qwen3Moe", **QWEN).save_pretrained(place / "plain")
    build_theirs("Qwen3Moe", **QWEN).save_pretrained(place / "few")
    plain, few = load_file(place / "plain" / "model.safetensors"), {}
    for name, tensor in list(plain.items()):
        if not name.endswith("_proj.weight"):
            few[name] = tensor
            continue
        parts, plain[name] = pack(tensor, table)
        few |= {f"{name.removesuffix('.weight')}.{part}": stored for part, stored in parts.items()}
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, place / "plain" / "model.safetensors")
    save_file(few, place / "few" / "model.safetensors")
    config = json.loads((place / "few" / "config.json").read_text())
    (place / "few" / "config.json").write_text(json.dumps({**config, "quantization_config": table}))
    return place / "few"


def gpt_oss(place, **fields):
    """A gpt-oss whose experts are stored in MXFP4, the rest in floating point; and a model of transformers' with the same numbers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from foreign_models import build_theirs

    theirs = build_theirs("GptOss", **{**GPT_OSS, **fields})
    theirs.save_pretrained(place)
    state = load_file(place / "model.safetensors")
    for number, name in enumerate(sorted(name for name in state if name.endswith(("gate_up_proj", "down_proj")))):
        experts, columns, rows = state.pop(name).shape
        state[f"{name}_blocks"], state[f"{name}_scales"] = mxfp4((experts, rows, columns), number)
        whole = convert_moe_packed_tensors(state[f"{name}_blocks"], state[f"{name}_scales"], dtype=torch.bfloat16)
        with torch.no_grad():
            dict(theirs.named_parameters())[name].copy_(whole)
    save_file(state, place / "model.safetensors")
    table = json.loads((place / "config.json").read_text())
    table["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (place / "config.json").write_text(json.dumps(table))
    return theirs


def mxfp4(shape, seed):
    """(blocks, scales) of experts with so many rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    experts, rows, columns = shape
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 126, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales
