"""Peers that can only be restarted, on the weights of a folder of ours: vLLM and llama.cpp's server.

    restart_vllm(folder, binary, threads)      the weights exported for transformers
    restart_llama(folder, binary, threads)     the same as GGUF (`write_gguf`)

Each starts the server, asks for a token, and gives the seconds from the request to end until a new one has made a token. A peer that
cannot load the weights ends the benchmark with its log's place.
"""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from _gateway import free_port, running
from _serving import Server
from anabranch.lm import Decoder, export_huggingface, load_model

PROMPT = list(range(10, 26))
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONPATH": "",
}


def restart_vllm(folder: Path, binary: str, threads: int) -> float:
    """Seconds of a restart of ``vllm serve``, float32 as ours."""
    exported, port = folder.with_name("exported"), free_port()
    if not exported.exists():
        export_huggingface(exported, load_model(folder)[0])
    command = [
        binary,
        "serve",
        str(exported),
        "--port",
        str(port),
        "--served-model-name",
        "small",
        "--dtype",
        "float32",
        "--skip-tokenizer-init",
        "--max-num-seqs",
        "8",
        "--max-model-len",
        "512",
        "--enforce-eager",
    ]
    environment = {**VLLM, "OMP_NUM_THREADS": str(threads)}
    log = folder.with_name("vllm.log")
    return _restarted(Server("vllm", command, port, "/health", model="small", environment=environment, log=log))


def restart_llama(folder: Path, binary: str, threads: int) -> float:
    """Seconds of a restart of ``llama-server``."""
    file, port = folder.with_name("model.gguf"), free_port()
    if not file.exists():
        write_gguf(file, load_model(folder)[0])
    command = [
        binary,
        "-m",
        str(file),
        "--port",
        str(port),
        "-np",
        "8",
        "-c",
        "4096",
        "-t",
        str(threads),
        "-tb",
        str(threads),
        "--no-webui",
    ]
    return _restarted(Server("llama.cpp", command, port, "/health", kind="llama", log=folder.with_name("llama.log")))


def _restarted(server: Server) -> float:
    began = 0.0
    for _ in range(2):
        with running(server.command, server.port, server.health, server.environment, server.log, timeout_s=600):
            asyncio.run(server.run([[(PROMPT, 1)]]))
            began, seconds = time.perf_counter(), time.perf_counter() - began
    return seconds


def write_gguf(path: Path, model: Decoder) -> None:
    """A mixture of experts of ours with a vocabulary of 512 as GGUF of the architecture ``llama``, in float32.

    That architecture renormalises the weights of the chosen experts and turns pairs of neighbours by position, so the tokens are others;
    what is read and computed is the same.
    """
    from gguf import GGUFWriter, TokenType

    config, weights = model.config, model.state_dict()
    heads = config.attention.num_heads
    experts = config.feed_forward
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(experts.hidden_dim)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.attention.num_kv_heads or heads)
    writer.add_rope_dimension_count(config.dim // heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_expert_count(experts.num_experts)
    writer.add_expert_used_count(experts.router.select.top_k)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = [f"<{number}>" for number in range(config.vocab_size)]
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["< 1"])
    for name, value in _tensors(
        weights, config.num_layers, (config.attention.num_kv_heads or heads) * (config.dim // heads)
    ):
        writer.add_tensor(name, value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(weights: dict[str, torch.Tensor], num_layers: int, key_width: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values as GGUF has them; ``key_width`` rows of the joint projection are keys, as many are values."""
    yield "token_embd.weight", weights["embedding.weight"]
    yield "output_norm.weight", weights["norm.weight"]
    yield "output.weight", weights["head.weight"]
    for number in range(num_layers):
        ours, theirs = f"blocks.{number}", f"blk.{number}"
        joint = weights[f"{ours}.attention.qkv.weight"]
        parts = joint.split([len(joint) - 2 * key_width, key_width, key_width])
        for name, part in zip(("attn_q", "attn_k", "attn_v"), parts, strict=True):
            yield f"{theirs}.{name}.weight", part
        gate, up = weights[f"{ours}.feed_forward.experts.w13"].chunk(2, dim=1)
        yield f"{theirs}.attn_output.weight", weights[f"{ours}.attention.out.weight"]
        yield f"{theirs}.attn_norm.weight", weights[f"{ours}.attention_norm.weight"]
        yield f"{theirs}.ffn_norm.weight", weights[f"{ours}.feed_forward_norm.weight"]
        yield f"{theirs}.ffn_gate_inp.weight", weights[f"{ours}.feed_forward.router.score.weight"]
        yield f"{theirs}.ffn_gate_exps.weight", gate
        yield f"{theirs}.ffn_up_exps.weight", up
        yield f"{theirs}.ffn_down_exps.weight", weights[f"{ours}.feed_forward.experts.w2"]
