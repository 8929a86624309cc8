"""Folders as transformers writes them, through the front door: scored, converted both ways, continued and served."""

import json
import math
import re

import pytest
import torch
import transformers

from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.lm import SamplingConfig, generate, load_model
from anabranch.serving import LLM, Sampling
from anabranch.serving.expertflow import load_offloaded
from anabranch.serving.fast import FastDecoder
from foreign_models import build_theirs

LENGTH = 32
TEXT = "def add(a, b):\n    return a + b\n\n\nclass Thing:\n    name = 'thing'\n\n\n" * 3
SHAPE = {"vocab_size": 257, "hidden_size": 64, "max_position_embeddings": 128, "num_hidden_layers": 3}
# Of each family: what it is made of, and why its steps are not compiled.
LATENT = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
FAMILIES = {
    "Gemma3Text": (
        {
            "intermediate_size": 96,
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        "Sandwich|scaled",
    ),
    "GptOss": (
        {
            "intermediate_size": 32,
            "head_dim": 16,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "truncate": False,
                "rope_theta": 1e3,
            },
        },
        "window|sinks",
    ),
    "DeepseekV2": ({**LATENT, "topk_method": "greedy"}, "LatentAttention"),
    "DeepseekV3": ({**LATENT, "n_group": 4, "topk_group": 2}, "LatentAttention"),
    "Glm4Moe": (
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 16,
        },
        "not rotated",
    ),
    "Qwen2": (
        {"intermediate_size": 96, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        "window",
    ),
    "Qwen3": ({"intermediate_size": 96, "head_dim": 16}, None),
    "Mistral": ({"intermediate_size": 96, "sliding_window": 7}, "window"),
}


@pytest.fixture(params=FAMILIES, scope="module")
def checkpoint(request, tmp_path_factory):
    """(folder, their model, why steps are not compiled)."""
    fields, reason = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    theirs = build_theirs(request.param, **{**SHAPE, **fields})
    theirs.save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder, theirs, reason


def said(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def nats(theirs):
    """Of the text in windows of LENGTH tokens to predict, as `anabranch eval` cuts it."""
    ids = [256, *TEXT.encode()]
    total = count = 0
    for first in range(0, len(ids) - 1, LENGTH):
        window = torch.tensor([ids[first : first + LENGTH + 1]])
        with torch.no_grad():
            logits = theirs(window[:, :-1]).logits
        total += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
        count += window.shape[1] - 1
    return total / count


def test_scored_converted_and_continued(checkpoint, tmp_path, capsys):
    folder, theirs, _ = checkpoint
    (tmp_path / "text.txt").write_text(TEXT)
    asked = ("--data", str(tmp_path / "text.txt"), "--sequence-length", str(LENGTH), "--dtype", "float32")
    scored = said(capsys, "eval", str(folder), *asked)
    assert math.isfinite(scored["nats_per_token"])
    assert main(["convert", str(folder), str(tmp_path / "native"), "--to", "native"]) == 0
    assert main(["convert", str(tmp_path / "native"), str(tmp_path / "back"), "--to", "huggingface"]) == 0
    capsys.readouterr()
    for copy in ("native", "back"):
        assert said(capsys, "eval", str(tmp_path / copy), *asked)["nats_per_token"] == scored["nats_per_token"]
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert back.config.model_type == theirs.config.model_type
    assert nats(back) == pytest.approx(nats(theirs), abs=1e-5)
    made = said(capsys, "generate", str(folder), "--prompt", TEXT[:40], "--temperature", "0", "--max-tokens", "20")
    assert made["token_ids"] == their_tokens(theirs, list(TEXT[:40].encode()), 20)


def their_tokens(theirs, prompt, count):
    """Greedy, up to the end of text."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 256:
            break
    return ids[len(prompt) :]


def test_experts_of_a_budget(checkpoint):
    folder, theirs, _ = checkpoint
    if theirs.config.model_type not in ("deepseek_v2", "deepseek_v3", "glm4_moe"):
        pytest.skip("no experts, or such as are not offloaded")
    plain = SamplingConfig(temperature=0.0, max_tokens=10)
    prompt = list(TEXT[:20].encode())
    size = 3 * 64 * 32 * 4  # bytes of an expert
    model, _, engine = load_offloaded(folder, 10 * size)
    with engine:
        assert generate(model, [prompt], plain) == generate(load_model(folder)[0], [prompt], plain)


@pytest.mark.parametrize("blocks", [200, 14], ids=["plenty", "scarce"])
def test_served(checkpoint, blocks):
    folder, _, reason = checkpoint
    model, _ = load_model(folder)
    why = FastDecoder.supports(model)
    assert why is None or reason is not None, why
    assert reason is None or re.search(reason, why)
    prompts = [tuple(TEXT[start : start + length].encode()) for start, length in ((0, 5), (3, 1), (10, 23), (40, 31))]
    greedy = Sampling(temperature=0.0, max_tokens=10, ignore_eos=True)
    llm = LLM(model, num_blocks=blocks, block_tokens=4, max_batched_tokens=9)
    made = [answer.tokens for answer in llm.generate(prompts, greedy)]
    llm.close()
    plain = SamplingConfig(temperature=0.0, max_tokens=10)
    assert made == [tuple(generate(model, [prompt], plain)[0]) for prompt in prompts]
