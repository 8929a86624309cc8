"""GGUF files of every architecture continue as in llama.cpp: tokens and their probabilities. Left out without its package xllamacpp.

`make test-peers` installs it and runs them, or by hand:
pip install --no-deps --target llama xllamacpp && PYTHONPATH=src:llama python -m pytest -m slow tests/lm/test_gguf_llama_cpp.py
"""

import statistics

import pytest
import torch

from anabranch.lm import load_model
from gguf_made import MADE, VOCAB, theirs, write

llama_cpp = pytest.importorskip("xllamacpp")
gguf = pytest.importorskip("gguf")

pytestmark = pytest.mark.slow

# Beyond the windows of 8.
PROMPT = [5, 17, 3, 88, 41, 41, 60, 2, 9, 33, 71, 14]
STEPS, END = 24, 0
KINDS = [None, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0]


def with_tokens(writer):
    """A vocabulary, without which llama.cpp loads nothing."""
    tokens = ["Ġ", "Ċ", "ab", *map(chr, range(33, 126))]
    assert len(tokens) == VOCAB
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(END)


def continued(path):
    """(token, log-probability) of each step, by llama.cpp in float32."""
    params = llama_cpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 64, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    asked = {"prompt": PROMPT, "n_predict": STEPS, "temperature": 0, "n_probs": 1, "logprobs": 1, "ignore_eos": True}
    said = llama_cpp.Server(params).handle_completions(asked)
    return [(step["id"], step["logprob"]) for step in said["choices"][0]["logprobs"]["content"]]


# llama.cpp wants a latent of queries but in models of 27 layers, and scores groups of DeepSeek-V2 as those of V3.
@pytest.mark.parametrize("name", [name for name in MADE if name != "deepseek2 lite, groups"])
@pytest.mark.parametrize("kind", KINDS, ids=["F32", "Q8_0", "Q4_0"])
@torch.inference_mode()
def test_greedy_tokens_are_those_of_llama_cpp(name, kind, tmp_path):
    path = write(tmp_path / "m.gguf", theirs(name), name, kind=kind, extra=with_tokens)
    told = continued(path)
    assert len(told) == STEPS
    model, _ = load_model(path)
    log_probability = model.eval()(torch.tensor([PROMPT + [token for token, _ in told]])).logits_BLV.log_softmax(-1)
    ours = log_probability[0, len(PROMPT) - 1 : -1]
    far = [abs(float(row[token]) - given) for row, (token, given) in zip(ours, told, strict=True)]
    if kind is not None:
        # It rounds inputs to eight bits where weights are in blocks, which may choose other experts.
        assert statistics.median(far) < 0.3
        return
    # It reads GELU from a table in half precision.
    assert max(far) < (1e-2 if name == "gemma3" else 1e-3)
    # What ignore_eos leaves out.
    ours[:, END] = -torch.inf
    assert ours.argmax(-1).tolist() == [token for token, _ in told]
