"""gpt-oss with a budget: experts in MXFP4, with biases and clamped SwiGLUs, come when they are wanted and compute what all in memory do."""

import json
from functools import partial

import pytest
import torch

from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import convert, load_model
from anabranch.lm.quantized import load_quantized
from anabranch.nn import kernels
from anabranch.nn.offloaded import OffloadedPool
from anabranch.nn.weight_kinds import numbers_of_kinds
from anabranch.serving import LLM, Sampling, ServingConfig
from anabranch.serving.expertflow import load_offloaded, offload
from anabranch.serving.memory.forms import Form
from anabranch.serving.memory.plan import plan_memory
from few_bits_packings import GPT_OSS, gpt_oss
from foreign_models import build_theirs
from serving_models import posted, serve_process

pytest.importorskip("transformers")
TOKENS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))
needs_kernels = pytest.mark.skipif(kernels.load() is None, reason="no compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As published models are, with a tokenizer of bytes."""
    place = tmp_path_factory.mktemp("gpt-oss")
    gpt_oss(place, vocab_size=257)
    ByteTokenizer().save(place)
    return place


def logits(model):
    with torch.inference_mode():
        return model.eval()(TOKENS).logits_BLV


def mxfp4(folder, tmp_path):
    return folder, "stored"


def rounded(folder, tmp_path):
    """With the rest in int4; experts stay as they are."""
    return folder, "int4"


def saved_few(folder, tmp_path):
    convert(folder, tmp_path / "few", dtype=torch.float32, quantize="int4")
    return tmp_path / "few", None


def saved_plain(folder, tmp_path):
    convert(folder, tmp_path / "plain", dtype=torch.float32)
    return tmp_path / "plain", None


def theirs(folder, tmp_path):
    """In floating point, whose gates and ups alternate."""
    build_theirs("GptOss", **GPT_OSS).save_pretrained(tmp_path)
    return tmp_path, None


WAYS = [mxfp4, rounded, saved_few, saved_plain, theirs]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_logits_are_those_of_all_experts_in_memory(way, folder, tmp_path):
    place, bits = way(folder, tmp_path)
    load = load_model if bits is None else partial(load_quantized, bits=bits)
    whole, _ = load(place, dtype=torch.float32)
    wanted = logits(whole)
    all_bytes, seen = None, []
    for budget in (None, "least", "half"):
        given = {"least": seen and seen[0] // 6, "half": seen and seen[0] // 2}.get(budget)
        model, _, engine = load_offloaded(place, given, quantize=bits, dtype=torch.float32)
        with engine:
            torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
            seen.append(engine.layout.total_bytes)
            assert engine.arena.bytes <= (given or engine.layout.total_bytes)
            assert budget is None or engine.cache.total().bytes_moved > engine.arena.bytes
            pools = [module for module in model.modules() if isinstance(module, OffloadedPool)]
            assert len(pools) == len(model.blocks) == 3
            assert not any(pool.is_plain for pool in pools)
            assert numbers_of_kinds(model) == numbers_of_kinds(whole)
        all_bytes = engine.layout.total_bytes
    assert all_bytes == seen[0]


def test_a_budget_is_of_matrices_and_biases_stay(folder):
    form = Form.of(str(folder), "stored", torch.float32)
    _model, _, engine = load_offloaded(folder, None, quantize="stored", dtype=torch.float32)
    with engine:
        assert form.experts == form.pools.layout.total_bytes == engine.layout.total_bytes
        with pytest.raises(ConfigError, match="give at least"):
            load_offloaded(folder, form.least_budget - 1, quantize="stored")
    # Four bits each, and a scale in bfloat16 beside one of zeros for 32.
    assert form.least_budget == 2 * (3 * 64 * 32) * (4 + 32 // 32) // 8


def test_experts_of_a_model_in_memory_go_and_come_back(folder):
    model, _ = load_quantized(folder, "stored", dtype=torch.float32)
    wanted = logits(model)
    for tier in ("memory", "file"):
        model, _ = load_quantized(folder, "stored", dtype=torch.float32)
        engine = offload(model, Form.of(str(folder), "stored", torch.float32).least_budget, tier=tier)
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
        if tier == "memory":
            engine.restore()
            assert torch.equal(logits(model), wanted)
        engine.close()


def test_gradients_go_through_experts_in_floating_point(folder, tmp_path):
    place, _ = saved_plain(folder, tmp_path)
    whole, found = load_model(place)[0], load_offloaded(place, 6 * 4 * 64 * 32 * 2)
    leaves = []
    for model in (whole, found[0]):
        model.requires_grad_(False)
        model.embedding.weight.requires_grad_()
        model(TOKENS, TOKENS).loss.backward()
        leaves.append(model.embedding.weight.grad)
    found[2].close()
    # Rows of an item are added in another order, and what that changes grows through three layers.
    assert (leaves[0] - leaves[1]).norm() < 1e-4 * leaves[0].norm()


def test_a_file_that_lacks_biases_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    place, _ = saved_plain(folder, tmp_path)
    path = place / "model.safetensors"
    state = load_file(path)
    del state["blocks.1.feed_forward.experts.b2"]
    save_file(state, path)
    (place / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match=r"lacks blocks\.1\.feed_forward\.experts\.b2"):
        load_offloaded(place, None)


def test_an_engine_gives_the_tokens_of_all_experts_in_memory(folder):
    sampling = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
    said = []
    for budget in (None, f"{Form.of(str(folder), 'stored', torch.float32).least_budget}B"):
        llm = LLM(str(folder), num_blocks=20, dtype="float32", quantize="stored", process=False, expert_budget=budget)
        said.append([answer.tokens for answer in llm.generate([[1, 2, 3], [9, 7]], sampling)])
        llm.close()
    assert said[0] == said[1]


def test_generate_takes_a_budget(folder, capsys):
    said = []
    for more in ([], ["--expert-budget", "20KiB"]):
        line = ["generate", str(folder), "-p", "ab", "--max-tokens", "6", "--temperature", "0", "--dtype", "float32"]
        assert main([*line, "--quantize", "stored", "--json", *more]) == 0
        said.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert said[0] == said[1]


def test_a_plan_of_memory_counts_biases_among_what_stays(folder):
    config = ServingConfig(model=str(folder), quantize="stored", dtype="float32", memory="2GiB")
    plans = [
        plan_memory(config.replace(expert_budget=budget), measure=lambda *_, **__: 1 << 20)
        for budget in (None, "20KiB")
    ]
    (whole, part), pool_bytes = plans, 12 * 3840
    assert whole.fits
    assert part.fits
    assert whole.rest == part.rest
    assert whole.experts == pool_bytes


@pytest.mark.slow
@needs_kernels
def test_a_server_takes_a_budget(folder):
    body = {"model": "m", "prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    settings = ("--set", "engine.num_blocks=40", "--set", "engine.dtype=float32", "--served-name", "m")
    said = []
    for more in ((), ("--expert-budget", "20KiB")):
        with serve_process(*settings, "--quantize", "stored", *more, model=str(folder)) as server:
            said.append(posted(server.url, body)["choices"])
    assert said[0] == said[1]
